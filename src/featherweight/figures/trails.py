"""What changes over time: the loss by step, and memory over one training step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..merged import contender
from ..plain import plain
from ..results import Entry, Line, entries
from . import drawing
from .drawing import Look

WIDTH, ALONE = 840, 260
"""Of the figure, and of a panel that stands alone, in points."""
WINDOW = 12
"""A loss is smoothed over so many-th a part of the run."""
POINTS = 200
"""Of a curve that are drawn: more cannot be seen."""


@dataclass(frozen=True)
class Curve:
    """The smoothed losses of one row's runs, (runs, points); nan where no loss was finite."""

    name: str
    title: str
    reference: bool
    at: np.ndarray
    runs: np.ndarray
    lost: int | None
    """The first step of which a loss was not finite."""

    @property
    def mean(self) -> np.ndarray:
        """Over the runs that have a loss there."""
        return _quietly(np.nanmean, self.runs)


def curves(lines: Sequence[Line]) -> list[Curve]:
    """Of every row that was trained; runs that ended early are shorter."""
    return [_curve(entry) for entry in entries(lines) if any(run.losses for run in entry.runs)]


def _curve(entry: Entry) -> Curve:
    steps = max(len(run.losses) for run in entry.runs)
    table = np.full((len(entry.runs), steps), np.nan)
    for i, run in enumerate(entry.runs):
        table[i, : len(run.losses)] = [math.nan if loss is None else loss for loss in run.losses]
    lost = [run.losses.index(None) + 1 for run in entry.runs if None in run.losses]
    smooth = np.array([_smooth(row, max(1, steps // WINDOW)) for row in table])
    at = np.unique(np.linspace(0, steps - 1, min(steps, POINTS)).round().astype(int))
    return Curve(
        entry.first.name,
        plain(entry.first.method, 60),
        entry.first.kind == "reference",
        at + 1,
        smooth[:, at],
        min(lost, default=None),
    )


def _smooth(row: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite losses around each step; nan where its own is not finite."""
    known, box = np.isfinite(row), np.ones(2 * (window // 2) + 1)
    total = np.convolve(np.where(known, row, 0.0), box)[window // 2 :][: len(row)]
    count = np.convolve(known.astype(float), box)[window // 2 :][: len(row)]
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _quietly(of: Any, table: np.ndarray) -> np.ndarray:
    """Over the runs; nan, without a warning, where none has a number."""
    found = np.full(table.shape[1], np.nan)
    some = np.isfinite(table).any(0)
    found[some] = of(table[:, some], axis=0)
    return found


def draw_losses(
    look: Look, title: str, curves: Sequence[Curve], colour: Mapping[str, int], only: int | None = None
) -> Any:
    """A small panel for each, with all the others grey behind it; or only the panel of one."""
    values = np.concatenate([curve.mean for curve in curves])
    values = values[np.isfinite(values)]
    logarithmic = len(values) > 0 and bool(0 < 15 * values.min() < values.max())
    steps = max(int(curve.at[-1]) for curve in curves)
    figure, panels = _panels(look, title, [curve.title for curve in curves], "training step", "loss", only)
    for i, axes in panels.items():
        curve = curves[i]
        for other in curves:
            axes.plot(other.at[::3], other.mean[::3], color=look.soft, alpha=0.35, linewidth=0.7)
        _one_curve(axes, look, curve, _shade(look, curve, colour, i))
        axes.set_xlim(0, steps)
        axes.locator_params(axis="x", nbins=4)
        _loss_axis(axes, values, logarithmic)
    return figure


def _shade(look: Look, row: Curve | Step, colour: Mapping[str, int], i: int) -> str:
    return look.ink if row.reference else look.series(colour.get(contender(row.name), i))


def _panels(
    look: Look, title: str, names: Sequence[str], across: str, up: str, only: int | None
) -> tuple[Any, dict[int, Any]]:
    """A figure with a small panel for each name, or for one; numbers stand at the left and below only."""
    if only is not None:
        return _alone(look, title, across, up, only)
    columns = drawing.columns(len(names), 3, 4)
    rows = -(-len(names) // columns)
    each, high, gap = (WIDTH - 46) / columns, 132 if columns > 1 else 220, 36
    height = rows * (high + gap) + 44
    figure = drawing.sheet(look, WIDTH, height, title)
    whole = figure.get_figheight() * 72
    panels = {}
    for i, name in enumerate(names):
        left, below = 46 + (i % columns) * each, height - 16 - (i // columns + 1) * (high + gap) + 8
        axes = drawing.panel(figure, look, left, below, each - 26, high)
        last = i + columns >= len(names)
        axes.tick_params(axis="y", labelleft=i % columns == 0)
        axes.tick_params(axis="x", labelbottom=last, length=3 if last else 0)
        fits = drawing.fitted(name, 11, each - 26, "bold")
        axes.set_title(fits, size=11, weight="bold", color=look.ink, loc="left", pad=6)
        panels[i] = axes
    figure.text(46 / WIDTH, 4 / whole, across, size=10, color=look.soft)
    figure.text(10 / WIDTH, (height - 12) / whole, up, size=10, color=look.soft)
    return figure, panels


def _alone(look: Look, title: str, across: str, up: str, only: int) -> tuple[Any, dict[int, Any]]:
    """One panel, without its name: that is for what stands around it."""
    height = 190
    figure = drawing.sheet(look, ALONE, height, title)
    axes = drawing.panel(figure, look, 42, 40, ALONE - 60, height - 64)
    axes.set_xlabel(across, size=10, color=look.soft, labelpad=4)
    figure.text(6 / ALONE, 1 - 14 / height, up, size=10, color=look.soft)
    return figure, {only: axes}


def _loss_axis(axes: Any, values: np.ndarray, logarithmic: bool) -> None:
    if not len(values):
        return
    low, high = float(values.min()), float(np.quantile(values, 0.995)) if len(values) > 50 else float(values.max())
    if logarithmic:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.4)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = 0.06 * max(high - low, 1e-3)
        axes.set_ylim(min(0.0, low - room) if low >= 0 else low - room, high + room)
        axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")


def _one_curve(axes: Any, look: Look, curve: Curve, colour: str) -> None:
    """The mean, its band, and where it was lost."""
    if len(curve.runs) > 1:
        low, high = _quietly(np.nanmin, curve.runs), _quietly(np.nanmax, curve.runs)
        axes.fill_between(curve.at, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(curve.at, curve.mean, color=colour, linewidth=1.8)
    if curve.lost is not None:
        words = f"no finite loss at step {curve.lost}"
        drawing.clear_text(axes, look, 0.97, 0.93, words, va="top")


@dataclass(frozen=True)
class Step:
    """Memory over one training step of one row."""

    name: str
    title: str
    reference: bool
    seconds: list[float]
    mebibytes: list[float]


def steps(lines: Sequence[Line]) -> list[Step]:
    """Of every row of which it was followed: the run whose peak is the median of its seeds'."""
    found = []
    for entry in entries(lines):
        runs = [run for run in entry.runs if len(run.memory_over_step) > 1]
        if runs:
            middle = statistics.median_low(run.peak_bytes for run in runs)
            run = next(run for run in runs if run.peak_bytes == middle)
            seconds, held = zip(*run.memory_over_step, strict=True)
            found.append(
                Step(run.name, plain(run.method, 60), run.kind == "reference", list(seconds), [b / 2**20 for b in held])
            )
    return found


def draw_memory(
    look: Look, title: str, steps: Sequence[Step], colour: Mapping[str, int], only: int | None = None
) -> Any:
    """A small panel for each, its peak in numbers, with all the others grey behind it; or only the panel of one."""
    names = [step.title for step in steps]
    figure, panels = _panels(look, title, names, "seconds since the step began", "MiB", only)
    least, most = min(min(step.mebibytes) for step in steps), max(max(step.mebibytes) for step in steps)
    room = max(most - least, 0.02 * most, 1.0)
    for i, axes in panels.items():
        step = steps[i]
        for other in steps:
            axes.plot(other.seconds, other.mebibytes, color=look.soft, alpha=0.35, linewidth=0.7)
        shade, peak = _shade(look, step, colour, i), max(step.mebibytes)
        axes.fill_between(step.seconds, step.mebibytes, least - 0.08 * room, color=shade, alpha=0.15, linewidth=0)
        axes.plot(step.seconds, step.mebibytes, color=shade, linewidth=1.8)
        axes.axhline(peak, color=shade, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set_xlim(0, max(step.seconds[-1] for step in steps) or 1)
        axes.set_ylim(least - 0.08 * room, most + 0.22 * room)
        top = axes.get_xaxis_transform().inverted().transform(axes.transData.transform((0, peak)))[1]
        drawing.clear_text(axes, look, 1, top + 0.03, f"{peak:,.0f}", va="bottom")
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=4)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    return figure
