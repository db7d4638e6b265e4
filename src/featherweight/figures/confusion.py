"""What is taken for what: for each row of the table, how often every answer was given to the rows of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..plain import plain
from ..results import Entry, Line, entries
from . import drawing
from .drawing import Look

WIDTH, ALONE = 840, 260
"""Of the figure, and of a panel that stands alone, in points."""
MOST = 40
"""Classes: more cannot be drawn."""
SMALLEST_WITH_NUMBER = 20
"""Points of a cell's side: a smaller one has no room for its number."""
SMALLEST_CELL = 12
"""Points of its side in a panel that stands alone: a label of that height stands beside it."""
DARKEST = 0.5
"""Of a cell: on more of the accent its number could not be read."""


@dataclass(frozen=True)
class Matrix:
    """`share[i, j]`: of the rows whose right answer is `labels[i]`, how many were answered `labels[j]`; nan where there are none."""

    title: str
    labels: list[str]
    share: np.ndarray


def matrices(lines: Sequence[Line], tested: Mapping[str, Sequence[Mapping[str, str]]]) -> list[Matrix]:
    """One for each row of the table that answers with labels, over all its seeds; none where there are too many classes."""
    found = [e for e in entries(lines) if e.first.metric == "labels" and _answers(e, tested)]
    labels = sorted(
        {answer for e in found for answer in (*_answers(e, tested), *(p for r in e.runs for p in r.predictions))}
    )
    if not 2 <= len(labels) <= MOST:
        return []
    return [_matrix(entry, _answers(entry, tested), labels) for entry in found]


def _answers(entry: Entry, tested: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """The right ones, one for each prediction; empty where they are not known."""
    found = [row["answer"] for row in tested.get(entry.first.tested, ())]
    return found if all(len(run.predictions) == len(found) for run in entry.runs) else []


def _matrix(entry: Entry, answers: Sequence[str], labels: list[str]) -> Matrix:
    number = {label: i for i, label in enumerate(labels)}
    count = np.zeros((len(labels), len(labels)))
    for run in entry.runs:
        for right, given in zip(answers, run.predictions, strict=True):
            count[number[right], number[given]] += 1
    whole = count.sum(1, keepdims=True)
    return Matrix(plain(entry.first.method, 60), labels, np.where(whole > 0, count / np.maximum(whole, 1), np.nan))


def draw(look: Look, title: str, matrices: Sequence[Matrix], only: int | None = None) -> Any:
    """A small panel for each; or only that of one."""
    if only is not None:
        return _alone(look, title, matrices[only])
    k, words = len(matrices[0].labels), [plain(label, 14) for label in matrices[0].labels]
    columns = drawing.columns(len(matrices), *((4, 5) if k <= 4 else (3, 4) if k <= 6 else (3, 3)))
    rows = -(-len(matrices) // columns)
    room = max(drawing.extent(word, 9.5)[0] for word in words)
    left, below, gap = room + 14, room * 0.75 + 22, 30
    side = min((WIDTH - left) / columns - 14, 250)
    height = rows * (side + gap) + below
    figure = drawing.sheet(look, WIDTH, height, title)
    for i, matrix in enumerate(matrices):
        across, down = left + (i % columns) * (side + 14), height - (i // columns + 1) * (side + gap) + 4
        axes = drawing.panel(figure, look, across, down, side, side, lines=False)
        _cells(axes, look, matrix, side)
        fits = drawing.fitted(matrix.title, 11, side + 6, "bold")
        axes.set_title(fits, size=11, weight="bold", color=look.ink, loc="left", pad=6)
        axes.set_yticks(range(k), words if i % columns == 0 else [""] * k, size=9.5)
        last = i // columns == rows - 1
        axes.set_xticks(
            range(k), words if last else [""] * k, size=9.5, rotation=40, ha="right", rotation_mode="anchor"
        )
    axes.figure.text(
        left / WIDTH,
        5 / (figure.get_figheight() * 72),
        "rows: the right answer · columns: the answer given",
        size=9.5,
        color=look.soft,
    )
    return figure


def _alone(look: Look, title: str, matrix: Matrix) -> Any:
    """One panel, without its name: that is for what stands around it."""
    k, words = len(matrix.labels), [plain(label, 14) for label in matrix.labels]
    room = max(drawing.extent(word, 9.5)[0] for word in words)
    side = max(ALONE - room - 24, k * SMALLEST_CELL)
    left, below = room + 14, room * 0.75 + 28
    figure = drawing.sheet(look, left + side + 10, below + side + 8, title)
    axes = drawing.panel(figure, look, left, below, side, side, lines=False)
    _cells(axes, look, matrix, side)
    axes.set_yticks(range(k), words, size=9.5)
    axes.set_xticks(range(k), words, size=9.5, rotation=40, ha="right", rotation_mode="anchor")
    return figure


def _cells(axes: Any, look: Look, matrix: Matrix, side: float) -> None:
    from matplotlib.patches import Rectangle

    k = len(matrix.labels)
    axes.set_xlim(-0.5, k - 0.5)
    axes.set_ylim(k - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, pad=3)
    edges = np.arange(k + 1) - 0.5
    for rule in (axes.hlines, axes.vlines):
        rule(edges, -0.5, k - 0.5, color=look.rule, linewidth=1, clip_on=False, zorder=2)
    for i, j in zip(*np.nonzero(np.nan_to_num(matrix.share)), strict=True):
        share = float(matrix.share[i, j])
        cell = Rectangle((j - 0.5, i - 0.5), 1, 1, zorder=1, facecolor=look.accent, alpha=DARKEST * share, linewidth=0)
        axes.add_patch(cell)
        if side / k >= SMALLEST_WITH_NUMBER:
            size, weight = min(10.5, 0.34 * side / k), "bold" if i == j else "normal"
            axes.text(j, i, f"{100 * share:.0f}", size=size, ha="center", va="center", color=look.ink, weight=weight)
