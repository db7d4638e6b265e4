"""Every row's accuracy with its interval on one scale, the best first: whatever it costs, and however far below the others it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..merged import contender, estimate
from ..plain import plain
from ..results import Line, entries
from . import drawing
from .drawing import Look

WIDTH, ROW, SIDE, BELOW = 344, 38, 10, 40
"""Points: the figure, one row of it, its margins at the sides, and what the axis needs. It fits a phone as it is."""


@dataclass(frozen=True)
class Accuracy:
    """One row of the table."""

    name: str
    title: str
    mean: float
    interval: tuple[float, float]
    reference: bool


def accuracies(lines: Sequence[Line]) -> list[Accuracy]:
    """Of all rows that answered, the best first."""
    found = []
    for entry in entries(lines):
        first, known = entry.first, estimate(entry)
        if known is not None:
            title, reference = plain(first.method, 60), first.kind == "reference"
            found.append(Accuracy(first.name, title, known.mean, known.interval, reference))
    return sorted(found, key=lambda row: -row.mean)


def draw(look: Look, title: str, rows: Sequence[Accuracy], colour: Mapping[str, int]) -> Any:
    """Name and number of a row stand above its line, so that nothing lies on them."""
    height = len(rows) * ROW + BELOW
    figure = drawing.sheet(look, WIDTH, height, title)
    axes = drawing.panel(figure, look, SIDE, BELOW, WIDTH - 2 * SIDE, height - BELOW, lines=False)
    low, high = min(row.interval[0] for row in rows), max(row.interval[1] for row in rows)
    room = 0.04 * max(high - low, 0.02)
    axes.set_xlim(100 * (low - room), 100 * (high + room))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("accuracy, %", size=10, color=look.soft, labelpad=4)
    for i, row in enumerate(rows):
        _row(axes, look, row, i, look.ink if row.reference else look.series(colour.get(contender(row.name), i)))
    return figure


def _row(axes: Any, look: Look, row: Accuracy, i: int, colour: str) -> None:
    """Dots are methods, squares are references."""
    mean, low, high = (100 * x for x in (row.mean, *row.interval))
    number, at = f"{mean:.1f}", i + 0.7
    left = WIDTH - 2 * SIDE - drawing.extent(number, 10.5)[0] - 10
    across = axes.get_yaxis_transform()
    name = drawing.fitted(row.title, 10.5, left)
    axes.text(0, i + 0.33, name, transform=across, size=10.5, color=look.ink, va="center")
    axes.text(1, i + 0.33, number, transform=across, size=10.5, color=look.ink, va="center", ha="right")
    axes.axhline(at, color=look.rule, linewidth=0.8, zorder=1)
    axes.plot([low, high], [at, at], color=colour, linewidth=2, alpha=0.6, zorder=3, solid_capstyle="butt")
    axes.plot([mean], [at], "s" if row.reference else "o", color=colour, markersize=7.5, zorder=4, clip_on=False)
