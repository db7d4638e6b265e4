"""How figures look: colours, type, axes; and the two ways out: files on white, and an SVG that takes the colours of the page around it.

matplotlib knows only colours, so what is for a page is drawn in stand-ins, `#010200` and up, for which `inline` puts CSS variables. All
is drawn with the object-oriented interface: nothing here changes what a program around it draws.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

SERIES = 8
LIGHT = {
    "ink": "#1b2027", "soft": "#59636e", "rule": "#dcdfe3", "paper": "#ffffff", "accent": "#00609c",
    "series-0": "#0072b2", "series-1": "#d55e00", "series-2": "#008a64", "series-3": "#b0548a",
    "series-4": "#a87400", "series-5": "#3389bd", "series-6": "#6f6f00", "series-7": "#5c6773",
}  # fmt: skip
"""The hues of Okabe & Ito (2008), who chose them for all kinds of colour vision, darkened to 3 : 1 and more on white."""
DARK = {
    "ink": "#e7e9ec", "soft": "#a0a8b1", "rule": "#343a41", "paper": "#15181c", "accent": "#6db9ec",
    "series-0": "#4c9fd8", "series-1": "#f0803c", "series-2": "#1fb88c", "series-3": "#d58fb9",
    "series-4": "#e69f00", "series-5": "#8fd0f5", "series-6": "#c9bf3a", "series-7": "#a3acb5",
}  # fmt: skip
STAND_INS = {f"#0102{i:02x}": name for i, name in enumerate(LIGHT)}
TYPE = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif"
PNG_DPI = 200
_MEASURED_IN = "DejaVu Sans"
"""Comes with matplotlib, and is wider than what pages are set in: what fits in it fits."""


@dataclass(frozen=True)
class Look:
    """The colours of a drawing, whether it carries its own title, and whether it is for a phone."""

    colours: dict[str, str]
    titled: bool
    narrow: bool = False

    def __getattr__(self, name: str) -> str:
        try:
            return self.colours[name]
        except KeyError:
            raise AttributeError(name) from None

    def series(self, i: int) -> str:
        """The colour of the i-th of several lines."""
        return self.colours[f"series-{i % SERIES}"]


FILES = Look(LIGHT, titled=True)
PAGE = Look({name: stand_in for stand_in, name in STAND_INS.items()}, titled=False)
PHONE = replace(PAGE, narrow=True)


@contextmanager
def settings() -> Iterator[None]:
    """What matplotlib takes from nowhere but its settings: set while we draw, and put back."""
    import matplotlib

    ours: Any = {
        "font.family": ["sans-serif"], "font.sans-serif": [_MEASURED_IN], "font.size": 11, "text.parse_math": False,
        "svg.fonttype": "none", "svg.hashsalt": "featherweight", "svg.id": "figure", "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(ours), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # a PNG cannot write every script; an SVG can
        yield


def sheet(look: Look, width: float, height: float, title: str) -> Any:
    """An empty figure of so many points; `top(figure)` is where its title ends."""
    from matplotlib.figure import Figure

    room = 26 if look.titled else 0
    figure = Figure(figsize=(width / 72, (height + room) / 72), dpi=72, facecolor=look.paper)
    if look.titled:
        figure.text(10 / width, 1 - 10 / (height + room), title, va="top", size=13, weight="bold", color=look.ink)
    return figure


def panel(
    figure: Any, look: Look, left: float, below: float, width: float, height: float, *, lines: bool = True
) -> Any:
    """Axes at a place that is given in points from the figure's lower left."""
    whole, high = figure.get_size_inches() * 72
    axes = figure.add_axes((left / whole, below / high, width / whole, height / high), facecolor="none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(look.soft)
    axes.tick_params(colors=look.soft, labelcolor=look.soft, labelsize=10, length=3, width=0.8)
    axes.tick_params(axis="y", length=0)
    if lines:
        axes.grid(axis="y", color=look.rule, linewidth=0.8)
        axes.set_axisbelow(True)
    return axes


def label(axes: Any, look: Look, box: tuple[float, float, float, float], words: str, **style: Any) -> None:
    """A text in a box, in points of the figure, without the grid or what else is only a background behind it. Marks stay."""
    from matplotlib.patches import Rectangle

    turn, where = axes.transAxes.inverted().transform, {"transform": axes.transAxes}
    (x0, y0), (x1, y1) = turn([box[:2], box[2:]])
    behind = Rectangle(
        (x0, y0), x1 - x0, y1 - y0, facecolor=look.paper, linewidth=0, zorder=1.5, clip_on=False, **where
    )
    axes.add_patch(behind)
    axes.text(x0, (y0 + y1) / 2, words, va="center", **where, **style)


def clear_text(axes: Any, look: Look, across: float, up: float, words: str, *, va: str) -> None:
    """A text that ends at a place in the axes, with nothing behind it: neither the grid nor a line goes through it."""
    behind = {"facecolor": look.paper, "edgecolor": "none", "pad": 1}
    style = {"size": 10, "color": look.ink, "ha": "right", "va": va, "zorder": 5, "bbox": behind}
    axes.text(across, up, words, transform=axes.transAxes, **style)


@lru_cache(maxsize=4096)
def extent(text: str, size: float, weight: str = "normal") -> tuple[float, float]:
    """Width and height of a text in points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1), dpi=72)
    box = figure.text(0, 0, text, size=size, weight=weight).get_window_extent(FigureCanvasAgg(figure).get_renderer())
    return float(box.width), float(box.height)


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    figure.set_dpi(PNG_DPI)
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    figure.set_dpi(72)
    return out.getvalue()


def svg(figure: Any) -> str:
    """The figure as an SVG file: text is text, and the same figure is the same bytes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub(rf"font-family: '{_MEASURED_IN}'(, sans-serif)?", f"font-family: {TYPE}", out.getvalue())


def inline(text: str, name: str, told: str) -> str:
    """An SVG file as a part of a page: the page's colours and type, names of its own, nothing that speaks to the rest of the page.

    `told` is what it shows, for who cannot see it; it is escaped already.
    """
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    start = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{told}" style="--wide: {box[1].split()[2] if box else 0}px">'
    text = start + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for stand_in, colour in STAND_INS.items():
        text = text.replace(stand_in, "currentColor" if colour == "ink" else f"var(--{colour})")
    text = re.sub(r'\b(?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: inherit", text)
    return re.sub(r"\s*\n\s*", "\n", text)


def palette() -> str:
    """The colours as CSS: for light, and for who asks for dark."""
    light, dark = (";".join(f"--{name}:{value}" for name, value in found.items()) for found in (LIGHT, DARK))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def short(count: float) -> str:
    """`460k`, `1.3M`: a number that need not be exact."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def columns(n: int, few: int, many: int) -> int:
    """In how many columns n panels stand: in as many as leave fewest places empty."""
    return n if n <= many else min(range(few, many + 1), key=lambda c: (-n % c, -c))


def fitted(text: str, size: float, width: float, weight: str = "normal") -> str:
    """The text, or as much of its beginning as fits."""
    whole = text
    while text and extent(text if text == whole else text + "…", size, weight)[0] > width:
        text = text[:-1].rstrip()
    return text if text == whole else text + "…"
