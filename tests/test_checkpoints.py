"""A run that stops and goes on ends as if it had never stopped; a checkpoint that is not whole is never used."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featherweight as fw
from featherweight import checkpoints as module
from featherweight.adapter import parts
from featherweight.checkpoints import Checkpoints, read, verify
from featherweight.engine.optimizers import OPTIMIZERS
from featherweight.engine.train import Report, Settings, fit
from featherweight.engine.validation import tensors_of
from subjects import METHODS, a_base, build, examples

STEPS = 12
Run = Callable[..., tuple[Report, dict[str, torch.Tensor]]]


@pytest.fixture
def train(tmp_path: Path) -> Run:
    """A short run with everything random in it, from the same start each time; `stop_at` is the step after which Ctrl-C comes."""

    def once(
        method: Any = None,
        family: str = "llama",
        *,
        stop_at: int | None = None,
        where: str = "checkpoints",
        checkpoints: dict[str, Any] | None = None,
        validation: int = 0,
        **more: Any,
    ) -> tuple[Report, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        base = a_base(build(family, torch.float32))
        fw.attach(base.model, method or fw.LoRA(r=2, lora_dropout=0.2))
        rows = examples(base.model)
        told = list[str]()
        keep = Checkpoints(tmp_path / where, {"run": 1}, tell=told.append, **(checkpoints or {}))

        def press(report: Report) -> None:
            if report.steps == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        settings = Settings(**{"steps": STEPS, "batch_size": 3, "lr": 1e-2, **more})
        report = fit(base, rows[validation:], settings, on_step=press, checkpoints=keep, validation=rows[:validation])
        return report, {name: t.clone() for name, t in tensors_of(parts(base.model)).items()}

    return once


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("stop_at", [1, 5, STEPS - 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_stops_and_goes_on_ends_bit_for_bit_as_one_that_did_not(train: Run, name: str, stop_at: int) -> None:
    method = METHODS[name] if name != "lora" else None
    whole, expected = train(method, where="a")
    stopped, _ = train(method, stop_at=stop_at)
    assert (stopped.stopped, stopped.signal, stopped.steps) == ("interrupted", signal.SIGINT, stop_at)
    report, found = train(method)
    assert report.stopped is None
    assert report.losses == whole.losses
    assert same(found, expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_goes_on_where_it_was(train: Run, optimizer: str) -> None:
    if optimizer not in ("adamw", "sgd", "adafactor"):
        pytest.importorskip("bitsandbytes")
    _, expected = train(optimizer=optimizer, where="a")
    train(optimizer=optimizer, stop_at=5)
    assert same(train(optimizer=optimizer)[1], expected)


@pytest.mark.parametrize(
    "more",
    [
        {"accumulate": 3},
        {"micro_batch": 1},
        {"validation": 4},
        {"family": "t5"},
        {"family": "bert"},
        {"packing": False},
        {"checkpoint_activations": "layer"},
    ],
    ids=str,
)
def test_so_do_runs_of_other_kinds(train: Run, more: dict[str, Any]) -> None:
    whole, expected = train(where="a", **more)
    train(stop_at=5, **more)
    report, found = train(**more)
    assert same(found, expected)
    assert report.validation == whole.validation


def test_a_run_may_stop_after_every_single_step(train: Run) -> None:
    _, expected = train(where="a")
    for step in range(1, STEPS):
        train(stop_at=step)
    assert same(train()[1], expected)


def test_a_signal_in_the_middle_of_an_accumulation_window_undoes_the_update(
    train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featherweight.engine import update

    _, expected = train(accumulate=3, where="a")
    original, calls = update.labelled_loss, list[int]()

    def press_in_the_middle(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 + 3 * 4 + 2:  # the rehearsal, four updates, the second batch of the fifth
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(update, "labelled_loss", press_in_the_middle)
        stopped, _ = train(accumulate=3)
    assert (stopped.signal, stopped.steps) == (signal.SIGTERM, 4)
    assert same(train(accumulate=3)[1], expected)


def test_numpys_random_numbers_go_on_too(  # Python's own cannot be compared here: the type checker draws from them
    train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def draws(self: Any, own: Any, step: int) -> None:
        drawn.append(np.random.rand())

    monkeypatch.setattr(fw.LoRA, "after_step", draws)
    train(where="a")
    expected, drawn = drawn, []
    train(stop_at=5)
    train()
    assert drawn == expected


def test_the_adapter_in_a_checkpoint_is_usable_as_it_is(train: Run, tmp_path: Path) -> None:
    _, _ = train(stop_at=5)
    [folder] = (tmp_path / "checkpoints").iterdir()
    base = a_base(build("llama", torch.float32))
    assert fw.load(base.model, folder).peft_type == "LORA"


# --- when, and how many ----------------------------------------------------------------------------------------------


def test_the_last_ones_and_the_best_are_kept(train: Run, tmp_path: Path) -> None:
    report, _ = train(checkpoints={"every_steps": 2, "keep": 2}, validation=4, lr=0.5)
    best = min(report.validation, key=lambda v: v[1])[0]
    kept = {int(p.name.removeprefix("step-")) for p in (tmp_path / "checkpoints").iterdir()}
    assert {10, 11} - {best} <= kept | {8, 10, 11}
    assert len(kept - {best}) <= 2
    assert best in kept or best == STEPS


def test_time_decides_when_steps_do_not_and_costs_at_most_two_per_cent(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    original = module.write

    def slow(*given: Any) -> None:
        now[0] += 1.0
        original(*given)

    class Slow(Checkpoints):
        def after_step(self, *given: Any) -> bool:
            now[0] += 10.0
            return super().after_step(*given)

    monkeypatch.setattr(module, "write", slow)
    monkeypatch.setattr("test_checkpoints.Checkpoints", Slow)
    report, _ = train(checkpoints={"every_seconds": 25.0})
    assert report.saves == 2  # after 30 seconds; that took one, so the next comes after 50
    assert report.saving_seconds == 2.0


def test_without_anything_due_nothing_is_written(train: Run, tmp_path: Path) -> None:
    assert train()[0].saves == 0
    assert not (tmp_path / "checkpoints").exists()


# --- damage ------------------------------------------------------------------------------------------------------------

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "featherweight.json",
    "manifest.json",
    "state.json",
    "state.safetensors",
)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(
    train: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, expected = train(where="a")
    train(stop_at=6, checkpoints={"every_steps": 3})
    folder = tmp_path / "checkpoints" / "step-000006"
    DAMAGE[damage](folder / name)
    with pytest.raises(fw.InputError, match=name):
        verify(folder)
    said: list[str] = []
    monkeypatch.setattr(Checkpoints, "_sweep", lambda self: setattr(self, "tell", said.append))
    assert same(train()[1], expected)
    assert name in said[0]
    assert "the one before it is used" in said[0]
    assert "going on from" in said[1]
    assert "step-000003" in said[1]


def test_every_byte_of_the_small_files_counts(train: Run, tmp_path: Path) -> None:
    train(stop_at=3)
    [folder] = (tmp_path / "checkpoints").iterdir()
    content = (folder / "manifest.json").read_bytes()
    for at in range(len(content)):
        flip(folder / "manifest.json", at)
        with pytest.raises(fw.InputError, match="checkpoint"):
            verify(folder)
        (folder / "manifest.json").write_bytes(content)
    verify(folder)


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(stop_at=5)
    base, other = a_base(build("llama", torch.float32)), Checkpoints(tmp_path / "checkpoints", {"run": 1, "lr": 0.1})
    fw.attach(base.model, fw.LoRA(r=2))
    with pytest.raises(fw.InputError, match=r"another run: lr was None and is 0\.1; take a new --out, or --force"):
        fit(base, examples(base.model), Settings(steps=STEPS), checkpoints=other)


def test_nothing_of_a_checkpoint_is_pickled(train: Run, tmp_path: Path) -> None:
    train(stop_at=5)
    [folder] = (tmp_path / "checkpoints").iterdir()
    assert {p.name for p in folder.iterdir()} == set(FILES)
    facts, tensors = read(folder)
    assert facts["report"]["examples"] == 15
    assert tensors["losses"].tolist() == pytest.approx(train(where="a")[0].losses[:5])
    json.dumps(facts, allow_nan=False)


# --- a disk that does not take it -----------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Saving the state fails the first three times, half-way through."""
    left, original = [3], module.save_file

    def fails(tensors: Any, path: Path) -> None:
        if left[0]:
            left[0] -= 1
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(module, "save_file", fails)
    return left


@pytest.mark.usefixtures("full_disk")
def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(train: Run, tmp_path: Path) -> None:
    report, found = train(checkpoints={"every_steps": 2})
    assert report.stopped is None
    assert report.saves == 2  # of five
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000008", "step-000010"]
    assert same(found, train(where="a")[1])


@pytest.mark.usefixtures("full_disk")
def test_or_it_stops_if_that_is_what_was_asked_for(train: Run, tmp_path: Path) -> None:
    report, _ = train(checkpoints={"every_steps": 2, "stop_if_unsaved": True})
    assert (report.stopped, report.steps) == ("not saved", 2)
    assert list((tmp_path / "checkpoints").iterdir()) == []
