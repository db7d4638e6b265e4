"""A run that stops and goes on ends as if it had never stopped; a checkpoint that is not whole is never used."""

from __future__ import annotations

import json
import os
import random
import shutil
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
from featherweight.engine import update, validation
from featherweight.engine.optimizers import OPTIMIZERS
from featherweight.engine.train import Report, Settings, fit
from featherweight.engine.validation import tensors_of
from subjects import METHODS, a_base, build, examples

STEPS = 12
Run = Callable[..., tuple[Report, dict[str, torch.Tensor]]]


@pytest.fixture
def train(tmp_path: Path) -> Run:
    """A short run in a folder of the test."""
    return run_in(tmp_path)


def run_in(folder: Path) -> Run:
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
        keep = Checkpoints(folder / where, {"run": 1}, **{"tell": told.append, **(checkpoints or {})})

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


@pytest.mark.parametrize("which", [3, 10])
def test_a_signal_while_the_validation_rows_are_read_costs_no_measurement(
    train: Run, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    whole, expected = train(where="a", validation=4)
    assert len(whole.validation) == 10
    original, calls = validation.mean_loss, list[int]()

    def press(*given: Any) -> float:
        calls.append(1)
        if len(calls) == which:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "mean_loss", press)
        stopped, _ = train(validation=4)
    assert (stopped.stopped, len(stopped.validation)) == ("interrupted", which - 1)
    report, found = train(validation=4)
    assert report.validation == whole.validation
    assert same(found, expected)


def test_a_signal_during_the_rehearsal_leaves_what_the_checkpoint_holds(
    train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = train(micro_batch=1, where="a")
    _, before = train(micro_batch=1, stop_at=5)
    original = update.labelled_loss

    def press(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(update, "labelled_loss", press)
        report, found = train(micro_batch=1)
    assert (report.stopped, report.steps) == ("interrupted", 5)
    assert same(found, before)
    assert same(train(micro_batch=1)[1], expected)


def test_what_a_diverging_run_goes_back_to_is_remembered(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = update.labelled_loss

    def spoil() -> Any:
        calls: list[int] = []

        def spoiled(*given: Any) -> Any:
            calls.append(1)
            return original(*given) * float("nan")

        return spoiled

    _, four = train(stop_at=4, where="a")
    train(stop_at=5)
    with monkeypatch.context() as patch:
        patch.setattr(update, "labelled_loss", spoil())
        report, found = train()
    assert (report.stopped, report.steps) == ("diverged", 5)
    assert same(found, four)  # what gave the last finite loss


def test_where_memory_runs_out_for_good_a_checkpoint_is_left(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = update.labelled_loss, list[int]()

    def fails(*given: Any) -> Any:
        calls.append(1)
        if len(calls) > 1 + 4:  # the rehearsal and four updates
            raise MemoryError
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(update, "labelled_loss", fails)
        report, found = train()
    assert (report.stopped, report.steps) == ("out of memory", 4)
    _, tensors = read(tmp_path / "checkpoints" / "step-000004")
    assert same(found, parts_of(tensors))
    assert train()[0].steps == STEPS


def test_so_it_is_where_not_one_validation_row_fits(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(validation, "labelled_loss", fails)
        report, _ = train(validation=4)
    assert (report.stopped, report.validation) == ("out of memory", [])
    assert len(train(validation=4)[0].validation) == 10


def test_a_validation_loss_that_is_no_number_is_never_the_best(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([float("nan"), 3.0, 2.0, float("nan"), 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(validation, "mean_loss", lambda *_: next(losses))
    report, found = train(validation=4, checkpoints={"every_steps": 1, "keep": 20})
    facts, tensors = read(tmp_path / "checkpoints" / f"step-{report.validation[2][0]:06}")
    assert same(found, parts_of(tensors))
    json.dumps(facts, allow_nan=False)


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a checkpoint."""
    return {name.removeprefix("parts/"): t for name, t in tensors.items() if name.startswith("parts/")}


def test_pythons_random_numbers_go_on_too(train: Run, tmp_path: Path) -> None:
    """Compared at the instant they are put back: the type checker of these tests draws from them too."""
    seen: list[Any] = []
    train(stop_at=5)
    train(checkpoints={"tell": lambda _: seen.append(random.getstate())})
    facts, _ = read(tmp_path / "checkpoints" / "step-000005")
    version, internal, gauss = facts["python_random"]
    assert seen == [(version, tuple(internal), gauss)]


def test_an_accelerators_random_numbers_say_nothing_on_a_cpu() -> None:
    state = torch.get_rng_state()
    update.set_random_states(torch.device("cpu"), [state, state])
    assert torch.equal(torch.get_rng_state(), state)


def test_numpys_random_numbers_go_on_too(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_last_ones_and_the_best_are_kept(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, original = set[int](), module.write

    def write(folder: Path, *given: Any) -> None:
        saved.add(int(folder.name.removeprefix("step-")))
        original(folder, *given)

    monkeypatch.setattr(module, "write", write)
    measured = iter((5.0, 4.0, 1.0, 3.0, *[6.0] * 20))  # which step is the best must not depend on the machine
    monkeypatch.setattr(validation, "mean_loss", lambda *_: next(measured))
    report, _ = train(checkpoints={"every_steps": 1, "keep": 2}, validation=4)
    best = report.validation[2][0]
    kept = [int(p.name.removeprefix("step-")) for p in (tmp_path / "checkpoints").iterdir()]
    assert best < 9
    assert sorted(kept) == [best, *sorted(saved)[-2:]]


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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run's checkpoints after Ctrl-C at step 6, and what it ends in if nobody stops it."""
    folder = tmp_path_factory.mktemp("stopped")
    _, expected = run_in(folder)(where="a")
    run_in(folder)(stop_at=6, checkpoints={"every_steps": 3})
    return folder / "checkpoints", expected


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_by_name(
    stopped: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / "step-000006"
    shutil.copytree(stopped[0] / folder.name, folder)
    DAMAGE[damage](folder / name)
    with pytest.raises(fw.InputError, match=name):
        verify(folder)


@pytest.mark.parametrize(("name", "damage"), list(zip(FILES, DAMAGE, strict=False)))
def test_the_one_before_a_damaged_checkpoint_is_used(
    stopped: tuple[Path, dict[str, torch.Tensor]],
    train: Run,
    tmp_path: Path,
    name: str,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(stopped[0], tmp_path / "checkpoints")
    DAMAGE[damage](tmp_path / "checkpoints" / "step-000006" / name)
    said: list[str] = []
    monkeypatch.setattr(Checkpoints, "_sweep", lambda self: setattr(self, "tell", said.append))
    assert same(train()[1], stopped[1])
    assert name in said[0]
    assert "it is not used" in said[0]
    assert "going on from" in said[1]
    assert "step-000003" in said[1]


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(train: Run, tmp_path: Path) -> None:
    train(stop_at=6, checkpoints={"every_steps": 3})
    DAMAGE["cut"](tmp_path / "checkpoints" / "step-000006" / "state.safetensors")
    train(stop_at=5, checkpoints={"keep": 1})
    [left] = (tmp_path / "checkpoints").iterdir()
    assert left.name == "step-000005"


def test_the_millionth_step_is_newer_than_the_one_before(tmp_path: Path) -> None:
    for name in ("step-999999", "step-1000000", "step-000010"):
        (tmp_path / name).mkdir()
    assert [p.name for p in Checkpoints(tmp_path, {}).all()] == ["step-1000000", "step-999999", "step-000010"]


def test_all_of_a_checkpoint_is_safe_on_the_disk_before_it_gets_its_name(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe, renamed, fsync, replace = set[int](), list[Path](), os.fsync, Path.replace

    def noted(handle: int) -> None:
        safe.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched(self: Path, target: Path) -> Path:
        if self.name == ".saving-step-000003":
            renamed.append(target)
            assert {p.name for p in self.iterdir()} == set(FILES)
            assert all(p.stat().st_ino in safe for p in (self, *self.iterdir()))
            safe.clear()
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", watched)
    train(stop_at=3)
    assert renamed == [tmp_path / "checkpoints" / "step-000003"]
    assert (tmp_path / "checkpoints").stat().st_ino in safe  # the new name too


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
