"""Measured numbers as pictures: a search of learning rates, a loss, memory beside memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .svg import Sheet

LEFT, RIGHT, TOP, BOTTOM = 52, 16, 22, 44


class Plot(Sheet):
    """Axes with a few round marks, and a way to put numbers on them."""

    def __init__(
        self,
        title: str,
        text: str,
        x: tuple[float, float],
        y: tuple[float, float],
        size: tuple[float, float] = (420, 250),
        log: bool = False,
    ) -> None:
        super().__init__(*size, title, text)
        self.x, self.y, self.log = x, y, log

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a pair of values lies on the sheet."""
        low, high = self.x
        share = math.log(x / low) / math.log(high / low) if self.log else (x - low) / (high - low)
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        across = self.width - LEFT - RIGHT
        return LEFT + share * across, self.height - BOTTOM - up * (self.height - TOP - BOTTOM)

    def axes(
        self, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]], x_words: str, y_words: str
    ) -> None:
        """Marks on both axes and what they count."""
        for value, words in ys:
            _, py = self.at(self.x[0], value)
            self.line((LEFT, py), (self.width - RIGHT, py), tip=False, dashed=True)
            self.words(LEFT - 6, py + 4, words, "end soft small")
        for value, words in xs:
            px, _ = self.at(value, self.y[0])
            self.words(px, self.height - BOTTOM + 18, words, "middle soft small")
        self.words((LEFT + self.width - RIGHT) / 2, self.height - 8, x_words, "middle soft small")
        self.words(6, 13, y_words, "soft small")


def search(title: str, trials: Sequence[tuple[float, float, float, float]], chosen: float) -> Sheet:
    """Validation accuracy by learning rate, each with its interval; the default is filled in."""
    rates = [t[0] for t in trials]
    low = math.floor(min(t[2] for t in trials) * 20) / 20
    high = math.ceil(max(t[3] for t in trials) * 20) / 20
    text = f"Validation accuracy of {title} by learning rate, with 95 % intervals; {chosen:g} is the default."
    plot = Plot(f"{title}: learning rates", text, (min(rates) / 1.5, max(rates) * 1.5), (low, high), log=True)
    step = 0.05 if high - low <= 0.35 else 0.1
    marks = [low + step * i for i in range(round((high - low) / step) + 1)]
    plot.axes(
        [(r, f"{r:g}") for r in rates], [(m, f"{100 * m:.0f} %") for m in marks], "learning rate", "validation accuracy"
    )
    plot.line(*[plot.at(rate, value) for rate, value, _, _ in trials], tip=False, hot=True)
    for rate, value, bottom, top in trials:
        x, y = plot.at(rate, value)
        plot.line(plot.at(rate, bottom), plot.at(rate, top), tip=False)
        kind = "trained" if rate == chosen else "paper"
        plot.add(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if rate == chosen else 4}"/>')
    return plot


def losses(title: str, values: Sequence[float]) -> Sheet:
    """A loss by step, and its mean over ten steps."""
    top = math.ceil(max(values))
    plot = Plot(f"{title}: loss", f"Training loss of {title} by step.", (1, len(values)), (0, top))
    plot.axes(
        [(s, str(s)) for s in (1, *range(25, len(values) + 1, 25))],
        [(i, str(i)) for i in range(top + 1)],
        "step",
        "loss (in colour: mean of ten steps)",
    )
    plot.line(*[_rounded(plot.at(i + 1, v)) for i, v in enumerate(values)], tip=False)
    smooth = [sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
    plot.line(*[_rounded(plot.at(i + 1, v)) for i, v in enumerate(smooth)], tip=False, hot=True)
    return plot


def bars(title: str, rows: Sequence[tuple[str, float, str]], hot: Sequence[bool], unit: str) -> Sheet:
    """Lengths beside each other, each with its words and value."""
    sheet = Sheet(420, 34 + 46 * len(rows), title, "; ".join(f"{words}: {told}" for words, _, told in rows))
    sheet.words(4, 14, unit, "soft small")
    most = max(value for _, value, _ in rows)
    for i, ((words, value, told), trained) in enumerate(zip(rows, hot, strict=True)):
        y = 28 + 46 * i
        sheet.words(4, y + 10, words, "small")
        sheet.box(4, y + 15, round(240 * value / most, 1), 16, "trained" if trained else "frozen")
        sheet.words(round(10 + 240 * value / most, 1), y + 27.5, told, "small")
    return sheet


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], marks: Sequence[tuple[float, str]]) -> Sheet:
    """A value and its interval for each name, below each other; dashed lines mark what to compare them with."""
    low = math.floor(min([r[2] for r in rows] + [m[0] for m in marks]) * 10) / 10
    high = math.ceil(max(r[3] for r in rows) * 20) / 20
    told = "; ".join(f"{name} {100 * value:.1f} % [{100 * a:.1f}, {100 * b:.1f}]" for name, value, a, b in rows)
    sheet = Sheet(640, 56 + 30 * len(rows), title, told)

    def across(value: float) -> float:
        return round(130 + 480 * (value - low) / (high - low), 1)

    bottom = 30 + 30 * len(rows)
    for value, words in marks:
        sheet.line((across(value), 22), (across(value), bottom), tip=False, dashed=True)
        sheet.words(across(value), 14, words, "middle soft small")
    for i, (name, value, a, b) in enumerate(rows):
        y = 44 + 30 * i
        sheet.words(120, y + 4, name, "end")
        sheet.line((across(a), y), (across(b), y), tip=False, hot=True)
        sheet.add(f'<circle class="trained" cx="{across(value)}" cy="{y}" r="6"/>')
    for tenth in range(round(low * 10), round(high * 10) + 1):
        sheet.words(across(tenth / 10), bottom + 18, f"{10 * tenth} %", "middle soft small")
    return sheet


def _rounded(point: tuple[float, float]) -> tuple[float, float]:
    return round(point[0], 1), round(point[1], 1)
