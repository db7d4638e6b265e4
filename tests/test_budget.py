"""Equal budgets: the same steps, tokens, time or memory for every contender."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
from command import BARE, Cli, complaint
from featherweight.budget import foreseen, largest_batch, steps_for_tokens
from featherweight.contenders import contenders
from featherweight.engine.train import Settings
from featherweight.results import Line, read
from featherweight.tokens import writer_for


@pytest.fixture
def line(llama: Path, reviews: Path) -> Any:
    return lambda *more: ("compare", *BARE, "--model", llama, "--data", reviews, "--dtype", "float32", *more)


def rows(folder: str) -> dict[str, Line]:
    return {row.name: row for row in read(Path(folder))}


def test_a_variant_may_have_its_own_rate_and_batch(fw_cli: Cli, line: Any) -> None:
    done = fw_cli(*line("--steps", 2, "--methods", "lora,lora:lr=0.5:batch_size=3", "--out", "table"))
    assert done.code == 0, done.err
    found = rows("table")
    assert [(r.lr, r.batch_size, r.train_examples) for r in found.values()] == [
        (fw.LoRA.learning_rate, 8, 16),
        (0.5, 3, 6),
    ]
    assert found["lora:lr=0.5:batch_size=3"].method == "LoRA (lr=0.5, batch_size=3)"
    for asked in ("lora:lr=0", "lora:batch_size=x", "lora:lr=nan"):
        with pytest.raises(fw.InputError, match="above 0"):
            contenders(asked, {})


def test_the_same_tokens_are_more_steps_of_smaller_batches(fw_cli: Cli, line: Any) -> None:
    done = fw_cli(*line("--tokens", 900, "--methods", "ia3,ia3:batch_size=2", "--out", "table"))
    assert done.code == 0, done.err
    large, small = rows("table").values()
    assert small.train_steps == pytest.approx(4 * large.train_steps, abs=2)
    assert large.train_tokens == pytest.approx(900, rel=0.15)
    assert small.train_tokens == pytest.approx(900, rel=0.15)


def test_steps_for_tokens_counts_what_an_update_reads(llama: Path, reviews: Path) -> None:
    task = fw.load_task(str(reviews))
    rows = writer_for(fw.load_base(str(llama), dtype="float32"), None).examples(task.train)[0]
    mean = sum(len(e.ids) for e in rows) / len(rows)
    assert steps_for_tokens(rows, Settings(batch_size=4, accumulate=2), round(80 * mean)) == 10
    assert steps_for_tokens(rows, Settings(batch_size=4), 1) == 1


def test_the_same_time_is_as_many_steps_as_fit_into_it(fw_cli: Cli, line: Any) -> None:
    done = fw_cli(*line("--minutes", 0.02, "--methods", "ia3", "--out", "table"))
    assert done.code == 0, done.err
    [row] = read(Path("table"))
    [decided] = Path("table/ia3").glob("steps-*.json")
    told = json.loads(decided.read_text())
    assert row.train_steps == told["steps"] == max(1, round(1.2 / told["seconds_a_step"]))
    assert 0.2 < row.train_seconds < 6
    start = time.monotonic()
    assert fw_cli(*line("--minutes", 0.02, "--methods", "ia3", "--out", "table")).code == 0  # the same run: not again
    assert len(read(Path("table"))) == 1
    assert time.monotonic() - start < 30


def test_a_pilot_leaves_no_trace_in_what_is_learned(fw_cli: Cli, line: Any) -> None:
    assert (
        fw_cli(*line("--minutes", 0.01, "--methods", "lora", "--set", "lora.lora_dropout=0.2", "--out", "timed")).code
        == 0
    )
    [timed] = read(Path("timed"))
    same = ("--steps", timed.train_steps, "--methods", "lora", "--set", "lora.lora_dropout=0.2")
    assert fw_cli(*line(*same, "--out", "counted")).code == 0
    assert read(Path("counted"))[0].losses == timed.losses


def test_the_same_memory_is_the_largest_batch_that_fits_by_the_plan(llama: Path, reviews: Path) -> None:
    base, task = fw.load_base(str(llama), dtype="float32"), fw.load_task(str(reviews))
    examples = writer_for(base, None).examples(task.train)[0]
    given: dict[str, Any] = {"cpu": True, "dtype": base.model.dtype}
    settings, shape = Settings(steps=16, batch_size=8), base.model.config

    def needs(size: int) -> int:
        tried = Settings(steps=16 * 8 // size, batch_size=size)
        return foreseen(shape, fw.LoRA(), tried, examples, **given).high

    limit = max(needs(1), needs(2), needs(4)) + 1
    assert limit < needs(8)
    found = largest_batch(shape, fw.LoRA(), settings, examples, limit, **given)
    assert found.batch_size == 4
    assert found.steps * found.batch_size == 16 * 8
    with pytest.raises(fw.InputError, match="does not fit"):
        largest_batch(shape, fw.LoRA(), settings, examples, 1, **given)


def test_fill_needs_to_know_how_much(fw_cli: Cli, line: Any) -> None:
    assert "--fill needs --memory" in complaint(fw_cli(*line("--fill", "--steps", 1)))


def test_only_one_setting_may_say_how_long(fw_cli: Cli, line: Any) -> None:
    assert "give --steps or --tokens, not both" in complaint(fw_cli(*line("--steps", 3, "--tokens", 50)))
    assert "give --tokens or --minutes, not both" in complaint(fw_cli(*line("--minutes", 3, "--tokens", 50)))
    Path("r.toml").write_text("steps = 7\n")
    assert fw_cli(*line("--recipe", "r.toml", "--tokens", 100, "--methods", "ia3", "--out", "t")).code == 0  # flags win


def test_a_pilot_that_diverges_costs_its_own_run_alone(fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.engine import update

    original = update.labelled_loss
    monkeypatch.setattr(update, "labelled_loss", lambda *given: original(*given) * float("nan"))
    done = fw_cli(*line("--minutes", 0.01, "--methods", "ia3,lora", "--out", "table"))
    assert done.code == 1
    assert (
        "(IA)³ was left out: its pilot ended early (diverged)"
        in done.out + done.err + Path("table/table.md").read_text()
    )
    assert "LoRA was left out" in Path("table/table.md").read_text()
    assert "interrupted" not in Path("table/table.md").read_text()
