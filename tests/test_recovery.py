"""Running out of memory: at whatever place, the run goes on as if nothing had happened, or says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight as fw
import models
import tiny
from featherweight.adapter import snapshot, trainable
from featherweight.engine import memory, train, update
from featherweight.engine.memory import LEARNED, left_bytes, out_of_memory, within
from featherweight.engine.optimizers import OPTIMIZERS
from featherweight.engine.train import Report, Settings, fit
from models import shake
from subjects import a_base, build, examples, gradients_off

WORDS = {
    "an accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
}
PLACES = ("forward", "backward", "optimizer")


@pytest.fixture
def run() -> Callable[..., tuple[Report, list[torch.Tensor]]]:
    """A short training run in float64, from the same start each time."""

    def once(family: str = "llama", method: Any = None, **more: Any) -> tuple[Report, list[torch.Tensor]]:
        torch.manual_seed(0)
        base = a_base(build(family))
        fw.attach(base.model, method or fw.LoRA(r=2))
        shake(trainable(base.model))
        settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, **more}
        report = fit(base, examples(base.model), Settings(**settings))
        return report, snapshot(base.model)

    return once


def fail_at(monkeypatch: pytest.MonkeyPatch, place: str, calls: Iterator[int], error: BaseException) -> list[int]:
    """Raise at the given calls of this place, counted from 0; returns the calls that failed."""
    wanted, seen, failed = set(calls), [0], list[int]()
    owner, name = {
        "forward": (update, "labelled_loss"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (torch.optim.AdamW, "step"),
    }[place]
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] - 1 in wanted:
            failed.append(seen[0] - 1)
            if place == "optimizer":  # half-way through
                original(*args, **kwargs)
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return failed


@pytest.mark.parametrize("error", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_runs_out_of_memory_ends_as_one_that_did_not(
    run: Any, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    expected, parts = run()
    assert expected.micro_batch == 4
    with monkeypatch.context() as patch:
        failed = fail_at(patch, place, iter((2,)), error)  # the rehearsal is call 0: this is in the second step
        report, found = run()
    assert failed == [2]
    assert report.stopped is None
    assert report.micro_batch == 2
    assert report.losses == pytest.approx(expected.losses, rel=1e-6)
    assert gradients_off(found, parts) < 1e-6


def test_after_two_failures_rows_are_read_one_at_a_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, parts = run()
    with monkeypatch.context() as patch:
        fail_at(patch, "backward", iter((1, 3)), WORDS["a CPU"])
        report, found = run()
    assert report.micro_batch == 1
    assert report.losses == pytest.approx(expected.losses, rel=1e-6)
    assert gradients_off(found, parts) < 1e-6


def test_what_does_not_fit_at_all_is_found_out_before_the_first_step(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failed = fail_at(patch, "forward", iter(range(100)), WORDS["an accelerator"])
        report, _ = run()
    assert report.stopped == "out of memory"
    assert report.steps == 0
    assert len(failed) == 4  # four rows, two, one, and one with nothing kept by the C library


def test_the_last_resort_is_to_hand_back_what_is_freed_and_it_ends_with_the_run(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[int]()
    monkeypatch.setattr(update, "hand_back", lambda size=0: told.append(size) or True)
    monkeypatch.setattr(train, "hand_back", lambda size=0: told.append(size) or True)
    expected, parts = run()
    assert told == []
    with monkeypatch.context() as patch:
        fail_at(patch, "backward", iter((1, 3, 7)), WORDS["a CPU"])
        report, found = run()
    assert told == [0, LEARNED]
    assert report.micro_batch == 1
    assert report.compact
    assert report.losses == pytest.approx(expected.losses, rel=1e-6)
    assert gradients_off(found, parts) < 1e-6


def test_another_error_is_no_lack_of_memory(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "backward", iter((2,)), RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run()
    assert not out_of_memory(ValueError("memory of an elephant"))


def test_the_longest_batch_is_read_first_and_leaves_no_trace(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    original = update.labelled_loss

    def seen(model: Any, batch: Any, labelled: Any) -> Any:
        lengths.append(batch.tokens)
        return original(model, batch, labelled)

    expected, parts = run(batch_size=2, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(update, "labelled_loss", seen)
        run(batch_size=2, steps=3)
    assert lengths[0] == max(lengths)
    assert len(lengths) == 4
    with monkeypatch.context() as patch:
        patch.setattr(update.Learner, "rehearse", lambda *_: None)
        report, found = run(batch_size=2, steps=3)
    assert report.losses == expected.losses
    assert all(map(torch.equal, found, parts))


def test_random_numbers_are_those_of_a_run_without_a_rehearsal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = fw.LoRA(r=2, lora_dropout=0.5)
    expected, _ = run(method=method)
    monkeypatch.setattr(update.Learner, "rehearse", lambda *_: None)
    report, _ = run(method=method)
    assert report.losses == expected.losses


@pytest.mark.parametrize("kept", ["layer", "offload"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize(
    "method", [fw.LoRA(r=2), fw.PromptTuning(num_virtual_tokens=3), fw.PrefixTuning(num_virtual_tokens=3)]
)
def test_layers_that_are_computed_again_give_the_same_run(run: Any, family: str, method: Any, kept: str) -> None:
    try:
        expected, parts = run(family, method)
    except fw.InputError:
        pytest.skip("this method is not for this model")
    report, found = run(family, method, checkpoint_activations=kept)
    assert report.losses == expected.losses
    assert all(map(torch.equal, found, parts))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(run: Any, name: str) -> None:
    rate = {"sgd": 1.0, "adafactor": 1.0, "lion": 4e-3}.get(name, 1e-2)
    torch.manual_seed(0)
    base = a_base(models.FAMILIES["llama"]())
    fw.attach(base.model, fw.LoRA(r=2))
    report = fit(base, examples(base.model), Settings(steps=30, batch_size=6, lr=rate, optimizer=name))
    assert report.stopped is None
    assert report.losses[-1] < 0.9 * report.losses[0]


def test_an_unknown_optimizer_or_choice_is_refused_in_one_line(run: Any) -> None:
    with pytest.raises(fw.InputError, match="did you mean 'adamw'"):
        run(optimizer="adam")
    with pytest.raises(fw.InputError, match="there are: none, layer, offload"):
        run(checkpoint_activations="layers")


def test_evaluation_goes_on_with_fewer_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = fw.load_base(str(tiny.save_llama(tmp_path / "base")))
    task = fw.load_task(str(tiny.write(tmp_path / "rows.csv", tiny.reviews())))
    expected = fw.evaluate(base, task, batch_size=4)
    original, sizes = type(base.model).forward, list[int]()

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(1)
        if len(sizes) == 2:
            raise WORDS["a CPU"]
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(base.model), "forward", failing)
        found = fw.evaluate(base, task, batch_size=4)
    assert found.predictions == expected.predictions
    assert found.batches > expected.batches


LIMITED = """
import sys, torch
from featherweight.engine.memory import out_of_memory, within
cpu = torch.device("cpu")
kept = torch.ones(8 << 20)
try:
    with within(cpu, int(sys.argv[1]) << 20):
        torch.ones(256 << 18)
except (RuntimeError, MemoryError) as e:
    print("refused", out_of_memory(e))
torch.ones(256 << 18)
print("afterwards there is room")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such limit")
@pytest.mark.parametrize(("limit", "refused"), [(350, True), (20_000, False)])
def test_a_limit_on_the_process_turns_a_lack_of_memory_into_an_error(limit: int, refused: bool) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(limit)], capture_output=True, text=True, check=True)
    assert done.stdout == ("refused True\n" if refused else "") + "afterwards there is room\n"


FOR_REAL = """
import json, random, sys, torch
sys.path.insert(0, sys.argv[1])
from transformers import LlamaConfig, LlamaForCausalLM
import featherweight as fw
from featherweight.engine.memory import peak_bytes, reset_peak
from featherweight.engine.train import Settings, fit
from featherweight.rows import Row
from featherweight.tokens import Example
from subjects import a_base

torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
)
rng = random.Random(0)
rows = []
for _ in range(32):
    ids = [rng.randrange(512) for _ in range(257)]
    rows.append(Example(ids, [-100, *ids[1:]], ids[:1], Row((), "", "row")))

torch.manual_seed(0)
base = a_base(LlamaForCausalLM(config))
fw.attach(base.model, fw.LoRA(r=2))
fit(base, rows[:1], Settings(steps=1))  # libraries are loaded, threads begun
fw.detach(base.model)
torch.manual_seed(0)
fw.attach(base.model, fw.LoRA(r=2))
reset_peak(base.device)
before = peak_bytes(base.device)
memory = before + int(sys.argv[2]) if len(sys.argv) > 2 else None
report = fit(base, rows, Settings(steps=2, batch_size=32, lr=1e-3, memory=memory))
print(json.dumps([report.stopped, report.micro_batch, peak_bytes(base.device) - before, report.losses]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such limit")
def test_a_run_under_a_real_limit_reads_fewer_rows_at_a_time_and_learns_the_same() -> None:
    def run(*limit: int) -> Any:
        command = [sys.executable, "-c", FOR_REAL, str(Path(__file__).parent), *map(str, limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    stopped, micro, needed, losses = run()
    assert (stopped, micro) == (None, 32)
    stopped, micro, used, found = run(needed // 3)
    assert stopped is None
    assert micro < 32
    assert used < 0.4 * needed
    assert found == pytest.approx(losses, rel=1e-5)


def test_a_containers_limit_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    used.write_text(str(100 << 20))
    monkeypatch.setattr(memory, "_GROUPS", {limit: used})
    limit.write_text("max\n")
    free = left_bytes(torch.device("cpu"))
    limit.write_text(str(150 << 20))
    assert left_bytes(torch.device("cpu")) == 50 << 20
    assert free is None or free > 50 << 20
    with within(torch.device("cpu")):
        pass
