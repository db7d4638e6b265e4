"""Planning comes first: what cannot fit is refused with what would, and `--memory` chooses tricks and rows at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
import tiny
from command import Cli, complaint
from featherweight.config import CompareConfig
from featherweight.contenders import contenders, references
from featherweight.plan import before, estimate


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return tiny.save_llama(tmp_path / "wide", width=256)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "rows.csv", tiny.reviews(40))


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that weighs nothing and is known to the byte, so that a tiny model's own needs decide."""
    exact = dict.fromkeys(("process_bytes", "fixed_bytes", "quantised_bytes", "share", "share_again"), 0)
    exact |= {"memory_error": [-0.01, 0.01]}
    known = {kind: {**values, **exact} for kind, values in estimate.constants().items()}
    monkeypatch.setattr(estimate, "constants", lambda: known)


def needed(model: Path, rows: Path, **more: Any) -> int:
    """What the plan says that LoRA needs on this model."""
    found: list[int] = []
    original = estimate.predict

    def seen(*args: Any, **kwargs: Any) -> Any:
        plan = original(*args, **kwargs)
        found.append(plan.high)
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "predict", seen)
        config = before.TrainConfig(model=str(model), data=str(rows), memory="100GB", **more)
        plan_for(config)
    return found[0]


def plan_for(config: Any) -> Any:
    from featherweight.prepare import load_config, settings_of, task_of

    task = task_of(config)
    settings = settings_of(config, len(task.train), 1e-3)
    return before.before_the_run(config, load_config(config.model), task, fw.LoRA(), settings)


def test_what_fits_stays_as_it_was_asked(wide: Path, rows: Path) -> None:
    config = before.TrainConfig(model=str(wide), data=str(rows), memory="2GB")
    chosen, settings = plan_for(config)
    assert chosen == config
    assert settings.micro_batch is None
    assert settings.memory == 2 << 30


def test_with_less_memory_fewer_rows_are_read_before_anything_less_exact_is_done(
    wide: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = needed(wide, rows, batch_size=16)
    capsys.readouterr()
    config = before.TrainConfig(model=str(wide), data=str(rows), batch_size=16, memory=f"{(whole >> 20) - 1}MB")
    chosen, settings = plan_for(config)
    assert chosen.quantize == "none"
    assert settings.micro_batch is not None or settings.checkpoint_activations == "layer"
    assert settings.batch_size == 16  # of an update
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert all(line.startswith("plan: ") for line in told)


@pytest.mark.parametrize("kept", ["none", "layer"])
def test_what_is_computed_again_is_told_as_the_price(
    wide: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    whole = needed(wide, rows, batch_size=16)
    monkeypatch.setattr(before, "sets_for", lambda _: [estimate.Tricks(kept)])
    capsys.readouterr()
    plan_for(before.TrainConfig(model=str(wide), data=str(rows), batch_size=16, memory=f"{(whole >> 20) - 1}MB"))
    told = re.search(r"an update computes (1\.\d) times as much as without a limit", capsys.readouterr().err)
    if kept == "none":
        assert told is None
    else:
        assert told is not None
        assert 1.1 <= float(told[1]) < 2  # of a step, reading forwards is less than half


def test_a_model_that_is_stored_quantised_is_planned_as_it_is(wide: Path, rows: Path, fw_cli: Cli) -> None:
    dense = needed(wide, rows)
    config = json.loads((wide / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    (wide / "config.json").write_text(json.dumps(config))
    packed = needed(wide, rows)
    assert packed < 0.9 * dense
    chosen, _ = plan_for(before.TrainConfig(model=str(wide), data=str(rows), memory=f"{packed * 0.9 / 2**20:.0f}MB"))
    assert chosen.quantize == "nf4"
    table = fw_cli("plan", "--model", wide, "--memory", "1GB").out.partition("at most")[2]
    assert "nf4" in table
    assert "int8" not in table


@pytest.mark.parametrize("asked", [{"quantize": "nf4"}, {"checkpoint_activations": "offload"}])
def test_what_was_asked_for_is_kept(wide: Path, rows: Path, asked: dict[str, Any]) -> None:
    """Offloading too, which on a CPU is in no set that would be chosen."""
    whole = needed(wide, rows, batch_size=16, **asked)
    config = before.TrainConfig(
        model=str(wide), data=str(rows), batch_size=16, memory=f"{(whole >> 20) - 1}MB", **asked
    )
    chosen, _ = plan_for(config)
    assert {name: getattr(chosen, name) for name in asked} == asked


def test_what_cannot_fit_is_refused_and_what_would_is_named(
    wide: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = needed(wide, rows, batch_size=1)
    monkeypatch.setattr(before, "resident_bytes", lambda: 0)
    monkeypatch.setattr(before, "left_bytes", lambda _: int(least * 0.9))
    with pytest.raises(fw.InputError, match=r"needs about .* this would fit .*(checkpoint|quantize)"):
        plan_for(before.TrainConfig(model=str(wide), data=str(rows), batch_size=8))
    monkeypatch.setattr(before, "left_bytes", lambda _: 1 << 20)
    with pytest.raises(
        fw.InputError,
        match=r"the least it needs is about .*, with one row at a time and --checkpoint-activations layer",
    ):
        plan_for(before.TrainConfig(model=str(wide), data=str(rows), batch_size=8))


def test_a_run_with_memory_to_spare_is_not_planned(wide: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "consider", lambda *_, **__: pytest.fail("planned"))
    plan_for(before.TrainConfig(model=str(wide), data=str(rows)))


def test_the_command_line_trains_within_the_memory_it_is_given(
    fw_cli: Cli, wide: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = fw_cli("train", "--model", wide, "--data", rows, "--steps", "2", "--memory", "4GB", "--out", out)
    assert done.code == 0, done.err
    assert json.loads((out / "featherweight.json").read_text())["steps"] == 2
    message = complaint(fw_cli("train", "--model", wide, "--data", rows, "--memory", "lots"))
    assert "--memory 'lots' is not a size" in message
    short = fw_cli("train", "--model", wide, "--data", rows, "--memory", "1MB", "--out", tmp_path / "none")
    assert "does not fit into 0.00 GiB" in complaint(short)
    assert not (tmp_path / "none").exists()


# --- a comparison ----------------------------------------------------------------------------------------------------


def choice_for(config: CompareConfig) -> tuple[CompareConfig, dict[str, int]]:
    from featherweight.prepare import load_config, settings_of, task_of

    task = task_of(config)
    settings = settings_of(config, len(task.train), 0.0)
    who = [*references(config.references), *contenders(config.methods, {})]
    return before.before_the_comparison(config, load_config(config.model), task, who, settings)


@pytest.fixture
def comparison(wide: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    few = [
        estimate.Tricks(),
        estimate.Tricks("layer"),
        estimate.Tricks("layer", "nf4"),
    ]  # each is a simulation a method
    monkeypatch.setattr(before, "sets_for", lambda _: few)
    return lambda memory, **more: CompareConfig(
        model=str(wide), data=str(rows), batch_size=16, methods="lora,lora:batch_size=4", memory=memory, dtype="float32", **more
    )  # fmt: skip


def test_with_memory_to_spare_every_method_is_compared_as_it_was_asked(comparison: Any) -> None:
    config = comparison("2GB")
    assert choice_for(config) == (config, {"lora": 16, "lora:batch_size=4": 4})
    assert choice_for(comparison(None)) == (comparison(None), {})


@pytest.mark.parametrize(("fitting", "quantize"), [(16, "none"), (1, "nf4")])
def test_with_less_memory_all_methods_get_the_same_tricks(
    comparison: Any, wide: Path, rows: Path, capsys: pytest.CaptureFixture[str], fitting: int, quantize: str
) -> None:
    """A megabyte short of what LoRA needs for 16 rows at a time, fewer do; short of what it needs row by row, nothing exact does."""
    limit = needed(wide, rows, batch_size=fitting, dtype="float32") - (1 << 20)
    capsys.readouterr()
    chosen, micro = choice_for(comparison(f"{limit >> 20}MB"))
    assert chosen.quantize == quantize
    assert micro["lora"] < 16
    told = capsys.readouterr().err
    assert "plan: the same tricks for every method: " in told
    assert ("nf4" in told) == ("a little less exact" in told) == (quantize == "nf4")
    assert "LoRA needs most" in told


def test_beside_full_fine_tuning_nothing_is_quantised(comparison: Any, wide: Path, rows: Path) -> None:
    limit = needed(wide, rows, batch_size=1, dtype="float32") - (1 << 20)
    chosen, _ = choice_for(comparison(f"{limit >> 20}MB", references="majority,full"))
    assert chosen.quantize == "none"


def test_what_fits_with_no_trick_is_tried_all_the_same_and_that_is_said(
    comparison: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, micro = choice_for(comparison("1MB"))
    assert set(micro.values()) == {1}
    assert (chosen.quantize, chosen.checkpoint_activations) == ("nf4", "layer")  # what needs least
    assert "plan: LoRA may not fit: it needs about " in capsys.readouterr().err
