"""The figures of a comparison: what accuracy costs, how the loss fell, memory over a step, what is taken for what.

`save` writes each as PNG and SVG, and returns it for a page. A colour means the same method in all of them, as far as eight go round;
names stand beside what they mean, so no figure needs its colours to be read.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import merged
from ..results import Line, entries, read_tested
from . import accuracies, confusion, drawing, front, trails
from .drawing import FILES, PAGE, PHONE, Look

FOLDER = "figures"
Tested = Mapping[str, Sequence[Mapping[str, str]]]
"""The rows that were tested on, by what `Line.tested` calls them."""


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn."""

    name: str
    title: str
    caption: str
    """What to look at, in a sentence."""
    draw: Callable[..., Any]
    """`draw(look, title)` is matplotlib's `Figure`; `draw(look, title, i)` has nothing but the i-th panel."""
    panels: Sequence[str] = ()
    """What its small panels are called: a page has them one by one, as many beside each other as it has room for."""
    crowded: bool = False
    """Names stand in it that would be too small on a phone: it is drawn once more for one."""


@dataclass(frozen=True)
class Part:
    """One drawing of a figure."""

    svg: str
    name: str = ""
    """What it is called, where it is one of several panels."""
    screen: str = ""
    """`broad` or `narrow`: the only screens that it is for."""


@dataclass(frozen=True)
class Shown:
    """A figure as a page has it."""

    name: str
    title: str
    caption: str
    parts: Sequence[Part]


def save(folder: Path, lines: Sequence[Line], tested: Tested | None = None) -> list[Shown]:
    """Write every figure as PNG and SVG into `figures/` of a comparison's folder; returns them for its page.

    What was tested on is read from the folder where it is not given.
    """
    if tested is None:
        tested = {name: read_tested(folder, name) for name in dict.fromkeys(line.tested for line in lines)}
    place, shown = folder / FOLDER, []
    place.mkdir(parents=True, exist_ok=True)
    with drawing.settings():
        for picture in pictures(lines, tested):
            figure = picture.draw(FILES, picture.title)
            _write(place / f"{picture.name}.png", drawing.png(figure))
            _write(place / f"{picture.name}.svg", drawing.svg(figure).encode())
            shown.append(_shown(picture))
    return shown


def show(lines: Sequence[Line], tested: Tested) -> list[Shown]:
    """Every figure for a page; nothing is written."""
    with drawing.settings():
        return [_shown(picture) for picture in pictures(lines, tested)]


def _shown(picture: Picture) -> Shown:
    def svg(look: Look, mark: str, told: str, *panel: int) -> str:
        return drawing.inline(
            drawing.svg(picture.draw(look, picture.title, *panel)), picture.name + mark, html.escape(told)
        )

    whole = f"{picture.title}. {picture.caption}"
    if picture.panels:
        parts = [Part(svg(PAGE, f"-{i}", f"{picture.title}: {name}", i), name) for i, name in enumerate(picture.panels)]
    elif picture.crowded:
        parts = [Part(svg(PAGE, "", whole), screen="broad"), Part(svg(PHONE, "-narrow", whole), screen="narrow")]
    else:
        parts = [Part(svg(PAGE, "", whole))]
    return Shown(picture.name, picture.title, picture.caption, parts)


def _write(file: Path, content: bytes) -> None:
    """In one step; a figure can be drawn again, so that it is on the disk need not be waited for."""
    beside = file.with_name(f".{file.name}")
    beside.write_bytes(content)
    beside.replace(file)


def pictures(lines: Sequence[Line], tested: Tested) -> list[Picture]:
    """Those that these runs have numbers for. Time and memory are drawn for each machine by itself."""
    together, machines, letters = merged.kept_apart(lines), merged.by_machine(lines), merged.letters(lines)
    colour = {entry.first.name: i for i, entry in enumerate(entries(lines))}
    alone = [
        (merged.kept_apart(own), letters[machine] if len(machines) > 1 else "") for machine, own in machines.items()
    ]
    found = [
        _accuracies(together, colour),
        _cost(front.PARAMETERS, together, colour),
        *(_cost(cost, own, colour, letter) for cost in (front.MEMORY, front.TIME) for own, letter in alone),
        _losses(together, colour),
        *(_memory(own, colour, letter) for own, letter in alone),
        _confusion(together, tested),
    ]
    return [picture for picture in found if picture is not None]


def _on(letter: str, name: str, title: str) -> tuple[str, str]:
    """Name and title of a figure that is of one machine of several."""
    return (f"{name}-{letter.lower()}", f"{title} on machine {letter}") if letter else (name, title)


def _accuracies(lines: Sequence[Line], colour: Mapping[str, int]) -> Picture | None:
    rows = accuracies.accuracies(lines)
    if not rows:
        return None
    caption = "Every row of the table, the best first, with its 95 % interval; squares are references."
    return Picture("accuracy", "Accuracy", caption, lambda look, title: accuracies.draw(look, title, rows, colour))


def _cost(cost: front.Cost, lines: Sequence[Line], colour: Mapping[str, int], letter: str = "") -> Picture | None:
    points = front.points(lines, cost)
    if not points:
        return None
    names = ", ".join(
        points[i].title.replace("\n", " ") for i in front.pareto([(point.cost, point.accuracy) for point in points])
    )
    caption = (
        f"Filled marks on the line are worth their {cost.word}: nothing else here is as accurate with {cost.less} ({names}); "
        "bars are 95 % intervals."
    )
    draw = lambda look, title: front.draw(look, title, cost, points, front.levels(lines), colour)  # noqa: E731
    name, title = _on(letter, f"accuracy-{cost.name}", f"Accuracy against {cost.title}")
    return Picture(name, title, caption, draw, crowded=True)


def _losses(lines: Sequence[Line], colour: Mapping[str, int]) -> Picture | None:
    curves = trails.curves(lines)
    if not curves:
        return None
    seeds = max(len(curve.runs) for curve in curves)
    over = f"the mean of up to {seeds} seeds in a band from lowest to highest" if seeds > 1 else "of one seed"
    caption = (
        f"Training loss, smoothed, {over}, with all others in grey: a curve that still falls at its end would have learned more with "
        "more steps."
    )
    draw = lambda look, title, *only: trails.draw_losses(look, title, curves, colour, *only)  # noqa: E731
    return Picture("learning-curves", "How the loss fell", caption, draw, [curve.title for curve in curves])


def _memory(lines: Sequence[Line], colour: Mapping[str, int], letter: str) -> Picture | None:
    steps = trails.steps(lines)
    if not steps:
        return None
    caption = (
        "What was held while one training step ran, with all others in grey: the dotted peak is what the method needs, the level at "
        "the left what is held between steps."
    )
    draw = lambda look, title, *only: trails.draw_memory(look, title, steps, colour, *only)  # noqa: E731
    name, title = _on(letter, "memory-over-a-step", "Memory over one training step")
    return Picture(name, title, caption, draw, [step.title for step in steps])


def _confusion(lines: Sequence[Line], tested: Tested) -> Picture | None:
    matrices = confusion.matrices(lines, tested)
    if not matrices:
        return None
    caption = (
        "For each right answer (a row), how often each answer was given, in %, over all seeds: what is right lies on the falling "
        "diagonal, and an empty column is an answer never given."
    )
    draw = lambda look, title, *only: confusion.draw(look, title, matrices, *only)  # noqa: E731
    return Picture("confusion", "What is taken for what", caption, draw, [matrix.title for matrix in matrices])
