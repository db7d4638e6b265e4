"""A loss or gradient that is not finite: the update is not made, and the rows that cause it are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight as fw
from command import Cli
from featherweight.adapter import snapshot, trainable
from featherweight.engine import update
from featherweight.engine.train import Report, Settings, fit
from subjects import a_base, build, examples

Spoil = Callable[[Any, torch.Tensor], torch.Tensor]


def nan_loss(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def nan_gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """The loss is as it was, its gradient is not: the root's is infinite at zero."""
    return loss + (trainable(model)[0] * 0).sum().sqrt()


def infinite_gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    p = trainable(model)[0]
    return loss + 3e38 * (p - p.detach()).sum() * 100


SPOILS = (nan_loss, nan_gradient, infinite_gradient)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Whatever batch one of these rows is in has no finite loss, or no finite gradient."""
    original = update.labelled_loss

    def these(rows: set[str], how: Spoil = nan_loss) -> None:
        def spoiled(model: Any, batch: Any, labelled: Any) -> torch.Tensor:
            loss = original(model, batch, labelled)
            return how(model, loss) if any(e.row.place in rows for e in batch.examples) else loss

        monkeypatch.setattr(update, "labelled_loss", spoiled)

    return these


def train(**more: Any) -> tuple[Report, list[torch.Tensor], list[torch.Tensor], list[str]]:
    torch.manual_seed(0)
    base = a_base(build("llama", torch.float32))
    fw.attach(base.model, fw.LoRA(r=2))
    rows, before = examples(base.model), list[list[torch.Tensor]]()
    rows = [
        type(e)(e.ids, e.targets, e.prompt, type(e.row)((), "", f"data.csv:{i}"), e.types)
        for i, e in enumerate(rows, 2)
    ]
    report = fit(
        base, rows, Settings(**{"steps": 6, "batch_size": 4, "lr": 1e-2, **more}),
        on_step=lambda r: before.append(snapshot(base.model)),
    )  # fmt: skip
    return report, snapshot(base.model), before[-1] if before else [], [e.row.place for e in rows]


@pytest.mark.parametrize("how", SPOILS)
def test_the_run_stops_before_the_update_and_names_the_row(spoil: Any, how: Spoil) -> None:
    expected, _, _, places = train()
    spoil({places[1]}, how)
    report, left, _, _ = train()
    assert report.stopped == "diverged"
    assert report.bad_rows == [places[1]]
    assert report.steps < 6
    assert report.losses == pytest.approx(expected.losses[: report.steps])
    assert all(bool(t.isfinite().all()) for t in left)


def test_two_rows_of_a_batch_are_both_named(spoil: Any) -> None:
    places = train()[3]
    spoil(set(places))
    report = train()[0]
    assert report.steps == 0
    assert len(report.bad_rows) == 4
    assert set(report.bad_rows) <= set(places)


@pytest.mark.parametrize("how", SPOILS)
def test_asked_to_skip_it_goes_on_without_and_counts(spoil: Any, how: Spoil) -> None:
    places = train()[3]
    spoil({places[1]}, how)
    report, left, _, _ = train(skip_nonfinite=True)
    assert report.stopped is None
    assert report.steps == 6
    assert report.nonfinite >= 1
    assert set(report.bad_rows) == {places[1]}
    assert all(bool(t.isfinite().all()) for t in left)
    assert sum(not math.isfinite(loss) for loss in report.losses) == (report.nonfinite if how is nan_loss else 0)


def test_a_skipped_update_leaves_no_trace(spoil: Any) -> None:
    """The parts after it are those before it, though Adam's means would have moved them."""
    places = train()[3]
    spoil(set(places))
    report, left, before, _ = train(skip_nonfinite=True, steps=1)
    torch.manual_seed(0)
    base = a_base(build("llama", torch.float32))
    fw.attach(base.model, fw.LoRA(r=2))
    assert report.nonfinite == 1
    assert all(map(torch.equal, left, snapshot(base.model)))
    assert all(map(torch.equal, before, left))


def test_where_nothing_but_skipping_happens_it_gives_up(spoil: Any) -> None:
    spoil(set(train()[3]))
    report = train(skip_nonfinite=True, steps=40)[0]
    assert report.stopped == "diverged"
    assert report.nonfinite == update.GIVE_UP_AFTER


def test_the_command_line_says_which_lines_of_the_file(
    fw_cli: Cli, reviews: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    [bad] = [row.place for row in fw.load_task(str(reviews)).train if row.place.endswith(":20")]
    spoil({bad})
    line = ("train", "--model", llama, "--data", reviews, "--steps", 30, "--dtype", "float32")
    result = fw_cli(*line, "--out", "mine")
    assert result.code == 1
    assert f"by themselves these rows are: {bad};" in result.err
    assert "--skip-nonfinite" in result.err
    result = fw_cli(*line, "--skip-nonfinite", "--out", "skipped")
    assert result.code == 0, result.err
    assert f"updates were left out: their loss or gradient was not finite, because of {bad}" in result.err
    assert "NaN" not in Path("skipped/featherweight.json").read_text()
