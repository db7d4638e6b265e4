"""A base's file is removed, cut or overwritten while a run trains on it; and whether a run has helpers that could die.

On a CPU weights that are stored in the type they are computed in are views of the file: what happens to it happens to them.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from forked import Forked, said
from killing import SHORT, after_step, result_of

MAPPED = [(), ("--stream-base", "disk")]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="--stream-base disk, and /proc")


@pytest.fixture
def train(server: Forked, in_tmp: Path, reviews: Path) -> Any:
    """A run on a base of its own, to which something happens after step 15; its exit code."""
    tiny.save_llama(in_tmp / "base", width=64)  # of pages enough for mapping to matter

    def run(out: str, *more: Any, do: str = "pass") -> int:
        args = ("--model", "base", "--data", reviews, *SHORT, "--save-steps", 10, "--out", out, *more)
        return server.run(in_tmp, "train", *args, before=after_step(15, do))

    return run


@pytest.mark.parametrize("more", MAPPED, ids=["whole", "streamed"])
def test_a_base_whose_files_are_removed_does_no_harm(train: Any, in_tmp: Path, more: Any) -> None:
    assert train("whole", *more) == 0, said(in_tmp)
    assert train("mine", *more, do="import shutil; shutil.rmtree('base')") == 0, said(in_tmp)
    assert result_of(in_tmp / "mine")[0] == result_of(in_tmp / "whole")[0]  # the others name the base, if it is there


@pytest.mark.parametrize("more", MAPPED, ids=["whole", "streamed"])
def test_a_base_that_is_cut_ends_the_run_at_once_and_costs_no_checkpoint(train: Any, in_tmp: Path, more: Any) -> None:
    """The system ends a process that reads where a mapped file no longer is."""
    assert train("whole", *more) == 0, said(in_tmp)
    weights = in_tmp / "base" / "model.safetensors"
    content = weights.read_bytes()
    assert train("mine", *more, do="os.truncate('base/model.safetensors', 0)") == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in said(in_tmp)
    assert [p.name for p in (in_tmp / "mine" / "checkpoints").glob("step-*")] == ["step-000010"]
    assert train("mine", *more) != 0
    weights.write_bytes(content)
    assert train("mine", *more) == 0, said(in_tmp)
    assert "going on from" in said(in_tmp)
    assert result_of(in_tmp / "mine") == result_of(in_tmp / "whole")


@pytest.mark.parametrize("steps", [10, 100], ids=["before a checkpoint", "before the end"])
@pytest.mark.parametrize("more", MAPPED, ids=["whole", "streamed"])
def test_a_base_that_is_overwritten_is_noticed_before_anything_is_saved(
    train: Any, in_tmp: Path, more: Any, steps: int
) -> None:
    more = (*more, "--save-steps", steps)
    assert train("whole", *more) == 0, said(in_tmp)
    weights = in_tmp / "base" / "model.safetensors"
    content = weights.read_bytes()
    spoil = "size = os.path.getsize('base/model.safetensors'); open('base/model.safetensors', 'r+b').write(bytes([1]) * size)"
    assert train("mine", *more, do=spoil) == 2
    assert "the weights of base have changed since the run began" in said(in_tmp)
    assert len(list((in_tmp / "mine" / "checkpoints").glob("step-*"))) == (steps == 10)
    assert not (in_tmp / "mine" / "adapter_model.safetensors").exists()
    weights.write_bytes(content)
    assert train("mine", *more) == 0, said(in_tmp)
    assert result_of(in_tmp / "mine") == result_of(in_tmp / "whole")


def test_a_run_has_no_other_process_that_could_be_killed_or_hang(train: Any, in_tmp: Path) -> None:
    look = "print('children:', [open(f'/proc/self/task/{t}/children').read() for t in os.listdir('/proc/self/task')], flush=True)"
    assert train("mine", do=look) == 0
    [told] = [row for row in said(in_tmp).splitlines() if "children:" in row]
    assert set(told.partition("children: ")[2]) <= set("[', ]")
