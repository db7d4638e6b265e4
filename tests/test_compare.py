"""Comparisons: variants, seeds, what can be said, and that no run is made twice or lost."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
from command import BARE, Cli, complaint
from featherweight import bench
from featherweight.contenders import contenders
from featherweight.engine.train import Settings
from featherweight.results import read

SHORT = ("--steps", 3, "--dtype", "float32")
RESULT = ("losses", "predictions", "right", "name", "seed", "lr", "trainable_params", "identity")


@pytest.fixture
def line(llama: Path, reviews: Path) -> Any:
    return lambda *more: ("compare", *BARE, "--model", llama, "--data", reviews, *SHORT, *more)


def results(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    """What does not depend on the machine, by run."""
    return {(r.name, r.seed): {k: getattr(r, k) for k in RESULT} for r in read(Path(folder))}


def first_table(folder: str) -> list[str]:
    """The lines of the table with the reference's columns."""
    return (Path(folder) / "table.md").read_text().partition("\n\n")[0].splitlines()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the runs that are really trained."""
    seen: list[str] = []
    first = bench.fit_with_bar

    def fit(base: Any, examples: Any, settings: Any, title: str, **more: Any) -> Any:
        seen.append(title)
        return first(base, examples, settings, title, **more)

    monkeypatch.setattr(bench, "fit_with_bar", fit)
    return seen


# --- who takes part -------------------------------------------------------------------------------------------------------


def test_variants_take_part_beside_their_method() -> None:
    found = contenders("lora, lora:r=64, prefix_tuning:num_virtual_tokens=5:init_weights=zero", {"lora": {"r": 2}})
    assert [c.title for c in found] == [
        "LoRA",
        "LoRA (r=64)",
        "Prefix-Tuning (num_virtual_tokens=5, init_weights=zero)",
    ]
    assert found[0].method == fw.LoRA(r=2)
    assert found[1].method == fw.LoRA(r=64)
    assert found[2].method == fw.PrefixTuning(num_virtual_tokens=5, init_weights="zero")
    assert found[1].folder == "lora-r=64"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (" , ", "names none"), ("lora:r", "write options as NAME:OPTION=VALUE"), ("lara", "did you mean 'lora'"),
        ("lora:rank=3", "lora has no option 'rank'"), ("lora:r=x", "r must be int"), ("lora:r=0", "r must be at least 1"),
        ("lora:target_modules=a/b,lora:target_modules=a-b", "would share the folder"),
    ],
)  # fmt: skip
def test_a_wrong_contender_is_refused(asked: str, words: str) -> None:
    with pytest.raises(fw.InputError, match=words):
        contenders(asked, {})


# --- seeds and variants in the table -----------------------------------------------------------------------------------------


def test_every_seed_is_a_run_and_every_method_a_row(fw_cli: Cli, line: Any, trained: list[str]) -> None:
    done = fw_cli(*line("--methods", "lora,lora:r=2", "--seeds", 2, "--out", "table"))
    assert done.code == 0, done.err
    assert trained == ["LoRA, seed 0", "LoRA (r=2), seed 0", "LoRA, seed 1", "LoRA (r=2), seed 1"]
    rows = [row for row in first_table("table") if row.startswith("| LoRA")]
    assert len(rows) == 2
    assert all("n = 6, 2 seeds" in row for row in rows)
    assert "best: " in done.out
    for place in ("lora/seed-0", "lora/seed-1", "lora-r=2/seed-0", "lora-r=2/seed-1"):
        assert (Path("table") / place / "adapter_model.safetensors").is_file()
    assert len(read(Path("table"))) == 4
    tex = Path("table/table.tex").read_text()
    assert tex.count(r" \\") == 3
    assert r"\%" in tex


def test_a_seed_changes_the_run_but_not_the_rows(fw_cli: Cli, line: Any) -> None:
    assert fw_cli(*line("--methods", "lora", "--seeds", 2, "--out", "table")).code == 0
    first, second = read(Path("table"))
    assert first.losses != second.losses
    assert (
        json.loads(Path("table/lora/seed-0/featherweight.json").read_text())["identity"]["data"]
        == (json.loads(Path("table/lora/seed-1/featherweight.json").read_text())["identity"]["data"])
    )


def test_the_order_of_the_methods_does_not_matter(fw_cli: Cli, line: Any) -> None:
    assert fw_cli(*line("--methods", "lora,ia3,p_tuning", "--out", "one")).code == 0
    assert fw_cli(*line("--methods", "p_tuning,ia3,lora", "--out", "other")).code == 0
    assert results("one") == results("other")


# --- never twice, never lost ------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again_and_what_is_new_is_added(fw_cli: Cli, line: Any, trained: list[str]) -> None:
    assert fw_cli(*line("--methods", "lora", "--out", "table")).code == 0
    once = results("table")
    assert fw_cli(*line("--methods", "lora,ia3", "--out", "table")).code == 0
    assert trained == ["LoRA", "(IA)³"]
    assert results("table")[("lora", 0)] == once[("lora", 0)]
    table = Path("table/table.md").read_text()
    assert "| LoRA |" in table
    assert "| (IA)³ |" in table


def test_a_changed_setting_is_another_run_and_the_old_one_is_kept(fw_cli: Cli, line: Any, trained: list[str]) -> None:
    assert fw_cli(*line("--methods", "lora", "--out", "table")).code == 0
    assert fw_cli(*line("--methods", "lora", "--lr", 0.5, "--out", "table")).code == 0
    assert len(trained) == 2
    assert sorted(run.lr for run in read(Path("table"))) == [fw.LoRA.learning_rate, 0.5]
    assert "\n".join(first_table("table")).count("| LoRA |") == 1


def test_interrupted_and_asked_again_it_ends_as_if_it_had_not_been(
    fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second run: it goes on from its checkpoint, and the first is not repeated."""
    more = ("--methods", "lora,ia3,prompt_tuning", "--steps", 30, "--set", "lora.lora_dropout=0.1")
    assert fw_cli(*line(*more, "--out", "whole")).code == 0
    first, calls = bench.fit_with_bar, []

    def fit(base: Any, examples: Any, settings: Any, title: str, *, checkpoints: Any, **more: Any) -> Any:
        from featherweight.engine.train import fit

        calls.append(title)
        if len(calls) != 2:
            return first(base, examples, settings, title, checkpoints=checkpoints, **more)
        stop = lambda r: r.steps == 12 and signal.raise_signal(signal.SIGINT)  # noqa: E731
        return fit(base, examples, settings, on_step=stop, checkpoints=checkpoints)

    monkeypatch.setattr(bench, "fit_with_bar", fit)
    assert fw_cli(*line(*more)).code == 130
    assert "interrupted during (IA)³" in Path("runs/compare-001/table.md").read_text()
    calls[:] = ["", "", ""]
    done = fw_cli(*line(*more))
    assert done.code == 0, done.err
    assert calls[3:] == ["(IA)³", "Prompt Tuning"]
    assert "going on from" in done.err
    assert results("runs/compare-001") == results("whole")
    for name in ("lora", "ia3", "prompt_tuning"):
        weights = [
            Path(folder, name, "adapter_model.safetensors").read_bytes() for folder in ("runs/compare-001", "whole")
        ]
        assert weights[0] == weights[1]
    assert not list(Path("runs/compare-001/ia3").glob("checkpoints*"))


def test_a_run_that_was_interrupted_under_other_settings_is_not_in_the_way(
    fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.fit_with_bar

    def fit(base: Any, examples: Any, settings: Any, title: str, *, checkpoints: Any, **_: Any) -> Any:
        from featherweight.engine.train import fit

        stop = lambda r: r.steps == 2 and signal.raise_signal(signal.SIGINT)  # noqa: E731
        return fit(base, examples, settings, on_step=stop, checkpoints=checkpoints)

    monkeypatch.setattr(bench, "fit_with_bar", fit)
    assert fw_cli(*line("--methods", "lora", "--out", "table")).code == 130
    monkeypatch.setattr(bench, "fit_with_bar", first)
    done = fw_cli(*line("--methods", "lora", "--lr", 0.5, "--out", "table"))
    assert done.code == 0, done.err
    assert "going on from" not in done.err


def test_fresh_begins_a_new_comparison(fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.fit_with_bar
    monkeypatch.setattr(bench, "fit_with_bar", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert fw_cli(*line("--methods", "lora")).code == 130
    monkeypatch.setattr(bench, "fit_with_bar", first)
    assert fw_cli(*line("--methods", "lora", "--fresh")).code == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["compare-001", "compare-002"]
    assert "is in use" in complaint(fw_cli(*line("--methods", "lora", "--fresh", "--out", "runs/compare-002")))


def test_a_line_that_is_damaged_is_run_again(fw_cli: Cli, line: Any, trained: list[str]) -> None:
    assert fw_cli(*line("--methods", "lora", "--out", "table")).code == 0
    rows = Path("table/rows.jsonl")
    rows.write_text(rows.read_text()[:100] + "\n")
    assert fw_cli(*line("--methods", "lora", "--out", "table")).code == 0
    assert len(trained) == 2


def test_the_rows_at_a_time_that_were_chosen_are_those_of_the_run() -> None:
    shared = Settings(batch_size=8)
    assert bench.Run("lora", 0, "lora", batch_size=8, micro_batch=2).settings(shared).micro_batch == 2
    assert bench.Run("lora", 0, "lora", batch_size=8).settings(replace(shared, micro_batch=4)).micro_batch == 4
