"""A sheet to draw on: boxes, lines, words and formulas as SVG, in the few styles that all figures share."""

from __future__ import annotations

from html import escape

STYLE = """
svg.fw{--ink:#1f2933;--soft:#5f6c7b;--frozen:#edf0f3;--edge:#9aa5b1;--trained:#c2410c;--warm:#ffe4d1;--paper:#ffffff;--other:#1d5fa8;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:13px}
@media(prefers-color-scheme:dark){svg.fw{--ink:#e6e9ee;--soft:#a3afbd;--frozen:#2b323c;--edge:#66727f;--trained:#ff9d5c;--warm:#4d2b14;
--paper:#14171c;--other:#7fb5ef}}
.fw text{fill:var(--ink)}.fw .soft{fill:var(--soft)}.fw .hot{fill:var(--trained);font-weight:600}
.fw .cold{fill:var(--other);font-weight:600}
.fw .small{font-size:11.5px}.fw .tiny{font-size:10.5px}.fw .large{font-size:16px;font-weight:600}.fw .middle{text-anchor:middle}
.fw .end{text-anchor:end}.fw .maths{font-family:"KaTeX_Math","Latin Modern Math","Cambria Math",Georgia,serif;font-style:italic;
font-size:15px}
.fw .frozen{fill:var(--frozen);stroke:var(--edge)}.fw .trained{fill:var(--warm);stroke:var(--trained);stroke-width:1.6}
.fw .group{fill:none;stroke:var(--edge);stroke-dasharray:4 4}.fw .paper{fill:var(--paper);stroke:var(--edge)}
.fw .line{fill:none;stroke:var(--edge);stroke-width:1.4}.fw .flow{fill:none;stroke:var(--trained);stroke-width:1.8}
.fw .tip{fill:var(--edge)}.fw .hottip{fill:var(--trained)}
.fw .region{stroke-width:1.4}.fw .a{fill:#3b82f622;stroke:#3b82f6}.fw .s{fill:#10b98122;stroke:#10b981}.fw .r{fill:#a855f722;stroke:#a855f7}
.fw a:hover rect{stroke-width:2.6}.fw a{cursor:pointer}.fw a:focus rect{stroke-width:2.6}
"""


class Sheet:
    """A drawing of so many units; what is drawn later lies on top."""

    def __init__(self, width: float, height: float, title: str, text: str) -> None:
        self.width, self.height, self.title, self.about = width, height, title, text
        self.parts: list[str] = []

    def add(self, element: str) -> None:
        """Draw an element as it is written."""
        self.parts.append(element)

    def box(
        self, x: float, y: float, w: float, h: float, kind: str = "frozen", words: str = "", style: str = ""
    ) -> None:
        """A rounded rectangle of a kind (frozen, trained, group, paper), with words in its middle."""
        self.add(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5"/>')
        if words:
            style = style or ("hot" if kind == "trained" else "")
            self.words(x + w / 2, y + h / 2 + 4.5, words, f"middle {style}")

    def words(self, x: float, y: float, words: str, style: str = "") -> None:
        """Words at their baseline; `_` and `^` before a character lower or raise it."""
        self.add(f'<text class="{style.strip()}" x="{x:g}" y="{y:g}">{indexed(words)}</text>')

    def line(self, *points: tuple[float, float], tip: bool = True, hot: bool = False, dashed: bool = False) -> None:
        """A path through points, with an arrow's tip at its end."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.add(f'<path class="{"flow" if hot else "line"}" d="{path}"{dash}/>')
        if tip:
            (x0, y0), (x1, y1) = points[-2:]
            length = max(1e-9, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
            ux, uy = (x1 - x0) / length, (y1 - y0) / length
            left, right = (
                (x1 - 7 * ux + 3.5 * uy, y1 - 7 * uy - 3.5 * ux),
                (x1 - 7 * ux - 3.5 * uy, y1 - 7 * uy + 3.5 * ux),
            )
            corners = " ".join(f"{x:g},{y:g}" for x, y in ((x1, y1), left, right))
            self.add(f'<polygon class="{"hottip" if hot else "tip"}" points="{corners}"/>')

    def shape(
        self, points: list[tuple[float, float]], kind: str = "trained", words: str = "", style: str = "maths hot"
    ) -> None:
        """A polygon, with words in the middle of it."""
        corners = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.add(f'<polygon class="{kind}" points="{corners}" stroke-linejoin="round"/>')
        if words:
            x, y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
            self.words(x, y + 5, words, f"middle {style}")

    def round(self, x: float, y: float, words: str, hot: bool = False, radius: float = 10) -> None:
        """A circle with a sign in it, where values meet."""
        self.add(f'<circle class="{"trained" if hot else "paper"}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')
        self.words(x, y + 4.5, words, "middle" + (" hot" if hot else ""))

    def svg(self) -> str:
        """The figure. It has no blank line, so that it can stand inside Markdown."""
        size = f'viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" height="{self.height:g}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="fw" role="img" {size} aria-label="{escape(self.title)}">'
        )
        told = f"<title>{escape(self.title)}</title><desc>{escape(self.about)}</desc><style>{STYLE.strip()}</style>"
        return "\n".join([head + told, *self.parts, "</svg>\n"])


def indexed(words: str) -> str:
    """`P_K` with its K lowered, `d_{in}` likewise; everything else as it is."""
    out, rest = "", escape(words)
    while "_" in rest:
        before, _, rest = rest.partition("_")
        if rest.startswith("{"):
            index, _, rest = rest[1:].partition("}")
        else:
            index, rest = rest[:1], rest[1:]
        out += f'{before}<tspan dy="3.5" font-size="75%">{index}</tspan>' + (
            f'<tspan dy="-3.5">{rest}</tspan>' if rest and "_" not in rest else ""
        )
        if rest and "_" not in rest:
            return out
    return out + rest
