"""Accuracy against what it costs, and the Pareto front: the rows that no other row beats in both."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..merged import contender, estimate
from ..plain import plain
from ..results import Entry, Line, entries
from . import drawing, placing
from .drawing import Look

WIDTH, NARROW, HEIGHT = 480, 344, 380
"""Of the figure, in points; the narrow one is for phones."""
FAR = 0.6
"""A reference further below the rows than this share of their spread is told at the edge, and does not flatten what is above."""
FLATTENED = 1 / 3
"""Of the axis: rows far below are told at the edge where those above would be left with less than this share of it."""

LONGEST = 30
"""Characters of a name in one line."""
GAP = 2
"""Points between a name and the line to it."""
BETWEEN = 5
"""Points between the places on a line that names keep away from: a name is higher and wider."""


@dataclass(frozen=True)
class Cost:
    """One kind of cost: `of` an entry, None where it was not measured."""

    name: str
    title: str
    word: str
    less: str
    axis: str
    of: Callable[[Entry], float | None]
    logarithmic: bool = False


PARAMETERS = Cost(
    "parameters", "trainable parameters", "parameters", "fewer parameters", "trainable parameters",
    lambda entry: entry.first.trainable_params, logarithmic=True,
)  # fmt: skip
MEMORY = Cost(
    "memory", "memory", "memory", "less memory", "MiB, peak of training",
    lambda entry: max(run.peak_bytes for run in entry.runs) / 2**20,
)  # fmt: skip
TIME = Cost(
    "time", "training time", "time", "less time", "seconds of training",
    lambda entry: statistics.fmean(run.train_seconds for run in entry.runs),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One row of the table."""

    name: str
    title: str
    cost: float
    accuracy: float
    interval: tuple[float, float]
    reference: bool


def points(lines: Sequence[Line], cost: Cost) -> list[Point]:
    """Every row that was trained."""
    found = []
    for entry in entries(lines):
        at, known = cost.of(entry), estimate(entry)
        if entry.first.train_steps and at and known is not None:
            first, title = entry.first, _two_lines(entry.first.method)
            found.append(Point(first.name, title, at, known.mean, known.interval, first.kind == "reference"))
    return found


def _two_lines(method: str) -> str:
    """A long name has its options in a second line: short ones find a place more easily."""
    name, options = plain(method, LONGEST), ""
    if name.endswith("…") and " (" in name:
        name, _, options = plain(method, 2 * LONGEST).partition(" (")
    return f"{name}\n({plain(options, LONGEST)}" if options else name


def levels(lines: Sequence[Line]) -> list[tuple[str, float]]:
    """The references that nothing was trained for: accuracies that cost nothing."""
    found = [(e.first.method, estimate(e)) for e in entries(lines) if not e.first.train_steps]
    return [(plain(title, LONGEST), known.mean) for title, known in found if known is not None]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, accuracy), those that no other has both for less and better, or one of both alike; by cost."""
    beaten = lambda a, b: b[0] <= a[0] and b[1] >= a[1] and b != a  # noqa: E731
    best = [i for i, a in enumerate(points) if not any(beaten(a, b) for b in points)]
    return sorted(best, key=lambda i: points[i])


def draw(
    look: Look,
    title: str,
    cost: Cost,
    points: Sequence[Point],
    levels: Sequence[tuple[str, float]],
    colour: Mapping[str, int],
) -> Any:
    """One such figure."""
    width = NARROW if look.narrow else WIDTH
    figure = drawing.sheet(look, width, HEIGHT, title)
    axes = drawing.panel(figure, look, 46, 44, width - 62, HEIGHT - 68)
    figure.text(10 / width, (HEIGHT - 14) / (figure.get_figheight() * 72), "accuracy, %", size=10, color=look.soft)
    axes.set_xlabel(cost.axis, size=10, color=look.soft, labelpad=6)
    below, near = _limits(axes, points, levels)
    beyond = _cost_axis(axes, cost, sorted(p.cost for p in points))
    points = [_off_the_axes(p, cost, below, beyond) for p in points]
    best = pareto([(p.cost, p.accuracy) for p in points])
    marks = _front(axes, look, [points[i] for i in best], below)
    for i, point in enumerate(points):
        shade = look.ink if point.reference else look.series(colour.get(contender(point.name), i))
        marks.append(_mark(axes, look, point, shade, below, filled=i in best))
    around = [(x - 5, y - 5, x + 5, y + 5) for x, y in (_place(axes, p, below) for p in points)]
    marks += _levels(axes, look, levels, near, [*marks, *around])
    _names(axes, look, points, best, marks, below)
    return figure


def _limits(
    axes: Any, points: Sequence[Point], levels: Sequence[tuple[str, float]]
) -> tuple[float, tuple[float, float]]:
    """Sets the axis of accuracies; returns the least accuracy that has its place, and those between which references are drawn as lines.

    One broken row far below would press all others into a line: it is drawn at the lower edge, with its number.
    """
    order = sorted(points, key=lambda p: -p.accuracy)
    low, high = order[0].interval
    whole = high - min(p.interval[0] for p in points)
    for above, point in itertools.pairwise(order):
        if above.accuracy - point.accuracy > max(high - low, 0.1) and high - low < FLATTENED * whole:
            break
        low, high = min(low, point.interval[0]), max(high, point.interval[1])
    spread = max(high - low, 0.02)
    near = (low - FAR * spread, high + FAR * spread)
    seen = [low, high, *(level for _, level in levels if near[0] <= level <= near[1])]
    bottom, top = 100 * min(seen), 100 * max(seen)
    room = max(top - bottom, 2) * 0.09
    axes.set_ylim(max(bottom - room, -2), min(top + room, 102))
    axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}")
    return min(low, axes.get_ylim()[0] / 100), near


def _cost_axis(axes: Any, cost: Cost, costs: Sequence[float]) -> float:
    """Sets the axis of costs, which are sorted; returns the largest that has its place: one far beyond the others is drawn at the edge."""
    logarithmic = cost.logarithmic or costs[-1] > 20 * costs[0]
    if not logarithmic and len(costs) > 3 and costs[-1] - costs[-2] > 1.2 * (costs[-2] - costs[0]):
        costs = costs[:-1]
    if logarithmic:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_xscale("log")
        wide = costs[-1] / costs[0]
        room = max(wide, 3.0) ** 0.12
        axes.set_xlim(costs[0] / room, costs[-1] * room**1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide > 300 else (1, 3) if wide > 20 else (1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        wide = max(costs[-1] - costs[0], 0.1 * costs[-1])
        axes.set_xlim(costs[0] - 0.14 * wide, costs[-1] + 0.25 * wide)
        axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(
        lambda x, _: drawing.short(x) if cost.logarithmic else f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"
    )
    return costs[-1]


def _off_the_axes(point: Point, cost: Cost, below: float, beyond: float) -> Point:
    """The same point; one that is drawn at an edge is told by its numbers too."""
    title = point.title + (f" {100 * point.accuracy:.1f}" if point.accuracy < below else "")
    return replace(point, title=title + (f" → {point.cost:,.0f}" if point.cost > beyond else ""))


def _place(axes: Any, point: Point, below: float) -> tuple[float, float]:
    """Where a mark is, in points of the figure."""
    low, high = axes.get_ylim()
    height = 100 * point.accuracy if point.accuracy >= below else low + 0.02 * (high - low)
    right = axes.get_xlim()[1]
    x, y = axes.transData.transform((min(point.cost, right), height))
    return float(x) - (5 if point.cost > right else 0), float(y)


def _front(axes: Any, look: Look, best: Sequence[Point], below: float) -> list[placing.Box]:
    """A thin line along the front; boxes on it."""
    at = [np.array(_place(axes, point, below)) for point in best]
    if len(at) < 2:
        return []
    axes.plot(*axes.transData.inverted().transform(at).T, color=look.soft, linewidth=1, zorder=2)
    between = [
        a + share * (b - a)
        for a, b in itertools.pairwise(at)
        for share in np.linspace(0, 1, 2 + int(math.dist(a, b) / BETWEEN))
    ]
    return [(x - 3, y - 3, x + 3, y + 3) for x, y in between]


def _mark(axes: Any, look: Look, point: Point, colour: str, below: float, *, filled: bool) -> placing.Box:
    """A mark with its interval; the box of the interval. Full fine-tuning, the reference, is a square."""
    low, high = (100 * edge for edge in point.interval)
    x, y = axes.transData.inverted().transform(_place(axes, point, below))
    shape = "s" if point.reference else "o"
    if point.cost > axes.get_xlim()[1]:
        shape = ">"
    if point.accuracy < below:
        low, high, shape = y, y, "v"
    axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.6, zorder=3, solid_capstyle="butt")
    face = colour if filled else look.paper
    axes.plot([x], [y], shape, color=colour, markerfacecolor=face, markersize=7.5, markeredgewidth=1.6, zorder=4)
    (left, under), (_, over) = axes.transData.transform([(x, low), (x, high)])
    return left - 1, under - 5, left + 1, over + 5


def _levels(
    axes: Any,
    look: Look,
    levels: Sequence[tuple[str, float]],
    near: tuple[float, float],
    marks: Sequence[placing.Box],
) -> list[placing.Box]:
    """References without a cost as dashed lines with their name on them; those far away in words at the edge."""
    (left, below, right, above), boxes = axes.get_window_extent().extents, list[placing.Box]()

    def write(words: str, height: float, sides: Sequence[int]) -> None:
        """Beside a line: in one line of text or in two, wherever that lies on least."""
        places: dict[placing.Box, str] = {}
        for text in dict.fromkeys((words, words.replace(" (", "\n(", 1))):
            width, high = drawing.extent(text, 9.5)[0], 7 * (1 + text.count("\n"))
            start, end = left + 3, right - width - 3
            for y in (height + side * (high + 1) for side in sides):
                for x in (start, end, *np.linspace(start, end, 20)):
                    places.setdefault((float(x), y - high, float(x) + width, y + high), text)
        box = placing.freest(list(places), [*marks, *boxes])
        drawing.label(axes, look, box, places[box], size=9.5, color=look.soft, zorder=5)
        boxes.append(box)

    inside = [(name, level) for name, level in levels if near[0] <= level <= near[1]]
    for name, level in inside:
        axes.axhline(100 * level, color=look.soft, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        height = float(axes.transData.transform((axes.get_xlim()[1], 100 * level))[1])
        write(f"{name} {100 * level:.1f}", height, (1, -1))
        boxes.append((left, height - 1, right, height + 1))
    for arrow, height, side, far in (
        ("↓", below, 1, [x for x in levels if x[1] < near[0]]),
        ("↑", above, -1, [x for x in levels if x[1] > near[1]]),
    ):
        if far:
            write(f"{arrow} " + ", ".join(f"{name} {100 * level:.1f}" for name, level in far), height, (side,))
    return boxes


def _names(
    axes: Any,
    look: Look,
    points: Sequence[Point],
    best: Sequence[int],
    marks: Sequence[placing.Box],
    below: float,
) -> None:
    """Every point's name beside it, those of the front bold; a thin line where it had to go further."""
    at = [_place(axes, p, below) for p in points]
    weight = ["bold" if i in best else "normal" for i in range(len(points))]
    sizes = [drawing.extent(p.title, 10.5, w) for p, w in zip(points, weight, strict=True)]
    around = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    frame, turn = axes.get_window_extent().extents, axes.transAxes.inverted().transform
    wide = (frame[0], frame[1], frame[2] + 14, frame[3])
    for i, box in enumerate(placing.place(at, sizes, [*marks, *around, *around], wide)):
        near = placing.nearest(box, at[i])
        low, high = (axes.transData.transform((points[i].cost, 100 * edge))[1] for edge in points[i].interval)
        on_bar = (
            abs((box[0] + box[2]) / 2 - at[i][0]) < 0.3 * (box[2] - box[0])
            and low - 14 < near[1] < high + 14
            and points[i].accuracy >= below
        )
        if math.dist(near, at[i]) > 13 and not on_bar:
            short = 1 - GAP / math.dist(near, at[i])
            end = [a + short * (b - a) for a, b in zip(at[i], near, strict=True)]
            (x0, y0), (x1, y1) = turn(at[i]), turn(end)
            axes.plot(
                [x0, x1], [y0, y1], transform=axes.transAxes, color=look.soft, linewidth=0.6, zorder=2, clip_on=False
            )
        drawing.label(axes, look, box, points[i].title, size=10.5, weight=weight[i], color=look.ink, zorder=6)
