"""`report.html`: a comparison as one page in one file, which asks nothing of anyone. It needs no network, and without JavaScript only
sorting is lost.

The page's policy forbids every request, and any script but its own, which is known by its hash: text out of data cannot become code even
where escaping it were forgotten.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .. import figures, merged, on_disk
from ..advice import advice, verdict
from ..figures import Part, Shown, Tested, drawing
from ..redaction import clean
from ..results import Line, read_tested
from . import examples, origin
from .cells import Row
from .table import rows, table
from .tags import Html, foreign, joined, tag, text

FILE = "report.html"
LABELS = ("Advice", "Cost", "Limits")
GUIDE = (
    (
        "The interval, [low, high]",
        "Other test rows and other seeds would have given another accuracy. In 95 of 100 comparisons like this one the interval "
        "holds the accuracy that all of them together would give. It counts rows and seeds; with one seed it knows nothing of seeds.",
    ),
    (
        "“Not told apart”",
        "Two methods are compared on the same test rows and seeds. If luck alone would often enough make a difference as large as "
        "theirs, they are one group: marked at the left, and their order means nothing. Of many rows one is easily lucky, so all of them "
        "together may be wrong in 5 of 100 comparisons: a single interval without 0 is not enough.",
    ),
    (
        "Memory",
        "“Required memory” is the most that was held while training; on a CPU that is the whole process. “Above the weights” is what "
        "training added to it: that grows with the batch, the weights do not.",
    ),
)


def write(
    folder: Path, title: str, lines: Sequence[Line], notes: Sequence[str] = (), sources: Sequence[Path] = ()
) -> Path:
    """Write `report.html` and its figures into a folder; `sources` are the comparisons whose runs these are, if not this folder's."""
    tested = {name: _rows(name, sources or [folder]) for name in dict.fromkeys(line.tested for line in lines)}
    shown = figures.save(folder, lines, tested)
    on_disk.write(folder / FILE, page(title, lines, tested, notes, shown=shown))
    return folder / FILE


def _rows(name: str, folders: Sequence[Path]) -> list[dict[str, str]]:
    return next((rows for folder in folders if (rows := read_tested(folder, name))), [])


def page(
    title: str,
    lines: Sequence[Line],
    tested: Tested,
    notes: Sequence[str] = (),
    *,
    shown: Sequence[Shown] | None = None,
) -> str:
    """The page. `tested` are the rows that were tested on, by `Line.tested`; `shown` its figures, where they are drawn already."""
    shown = figures.show(lines, tested) if shown is None else shown
    title, notes, said = clean(title), clean(list(notes)), _said(lines)
    lines = merged.kept_apart(lines)
    found = rows(lines)
    parts = [
        _header(title, lines),
        _section("In short", _summary(said, merged.letters(lines))),
        _section("The table", joined(table(found), _below(lines, found))) if lines else None,
        _section("How to read it", tag("dl", *(joined(tag("dt", a), tag("dd", b)) for a, b in GUIDE), class_="guide")),
        _section("Figures", tag("div", *map(_figure, shown), class_="figures")) if shown else None,
        _section("Where they disagree", examples.section(lines, tested)),
        _section("Where it comes from", origin.section(lines)) if lines else None,
        _section("Notes", _notes(said, notes)),
    ]
    return _document(title, joined(*(part for part in parts if part)))


def _document(title: str, main: Html) -> str:
    script, style = _part("sort.js"), drawing.palette() + _part("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    head = joined(
        Html('<meta charset="utf-8">'), Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<meta name="generator" content="featherweight">'), Html('<link rel="icon" href="data:,">'), tag("title", text(title, 200)),
        Html(f"<style>\n{style}</style>"), by="\n",
    )  # fmt: skip
    body = joined(tag("main", main), Html(f"<script>{script}</script>"), by="\n")
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _section(title: str, content: Html | None) -> Html | None:
    name = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title, id=name), content, aria_labelledby=name) if content else None


def _header(title: str, lines: Sequence[Line]) -> Html:
    """What was compared on what."""
    rows = {len(line.right) or line.eval_examples for line in lines if line.predictions or line.eval_examples}
    names = len({line.name for line in lines})
    seeds = len({line.seed for line in lines if line.train_steps})
    letters = merged.letters(lines)
    machines = [f"{letter}: {name}" if len(letters) > 1 else name for name, letter in letters.items()]
    dates = sorted(origin.fact(lines, "date"))
    facts = (
        ("Model", ", ".join(origin.fact(lines, "base"))), ("Data", ", ".join(origin.fact(lines, "data"))),
        ("Test rows", " and ".join(f"{n:,}" for n in sorted(rows))), ("Compared", f"{names} rows, {len(lines)} runs"),
        ("Seeds", str(seeds) if seeds else ""),
        ("Date", dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""),
        ("Machine", "; ".join(machines) if machines != [merged.UNKNOWN] else ""),
    )  # fmt: skip
    told = [tag("div", tag("dt", name), tag("dd", foreign(clean(value)))) for name, value in facts if value]
    return tag(
        "header",
        tag("p", "featherweight · comparison", class_="kicker"),
        tag("h1", foreign(title, 200)),
        tag("dl", *told, class_="facts"),
    )


@dataclass(frozen=True)
class Said:
    """What the numbers say in words: of each machine, because what a method costs is a machine's; and of the answers."""

    advice: dict[str, list[str]]
    verdict: list[str]


def _said(lines: Sequence[Line]) -> Said:
    told = [line for line in lines if line.right]
    own = {name: advice(merged.kept_apart(of)) for name, of in merged.by_machine(told).items()}
    return Said(own, verdict(merged.kept_apart(told)))


def _summary(said: Said, letters: Mapping[str, str]) -> Html | None:
    found = []
    for machine, words in said.advice.items():
        if words and len(letters) > 1:
            found.append(tag("h3", f"On machine {letters[machine]}"))
        pairs = zip(LABELS, (word.removeprefix("advice: ") for word in words), strict=False)
        if words:
            found.append(tag("dl", *(joined(tag("dt", a), tag("dd", _sentence(b))) for a, b in pairs), class_="advice"))
    found += [tag("p", _sentence(word), class_="verdict-line") for word in said.verdict]
    return joined(*found) if found else None


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _below(lines: Sequence[Line], found: Sequence[Row]) -> Html:
    """What the marks in the table mean, and what its numbers are over."""
    bar = tag("span", class_="swatch", aria_hidden="true")
    alike = " Rows with this bar are the best row and those that cannot be told apart from it. "
    seeds = len({line.seed for line in lines if line.train_steps})
    over = f"Speeds and times are over all {seeds} seeds, memory is the largest of them. " if seeds > 1 else ""
    sort = tag("span", "Press a heading to sort.", class_="with-script")
    return tag("p", joined(bar, alike) if any(row.alike for row in found) else "", over, sort, class_="legend")


def _figure(shown: Shown) -> Html:
    caption = tag("figcaption", tag("b", shown.title), " ", shown.caption)
    panels = any(part.name for part in shown.parts)
    drawn = tag("div", *map(_part_of_figure, shown.parts), class_="panels" if panels else None)
    return tag("figure", drawn, caption, class_="wide" if panels else None, id=f"figure-{shown.name}")


def _part_of_figure(part: Part) -> Html:
    name = tag("p", part.name, class_="panel-name") if part.name else ""
    return tag("div", name, Html(part.svg), class_=f"drawn {part.screen}".rstrip())


def _notes(said: Said, notes: Sequence[str]) -> Html | None:
    """Those that are not at the top already."""
    above = {*said.verdict, *(word for words in said.advice.values() for word in words)}
    left = [note for note in notes if note not in above]
    return tag("ul", *(tag("li", foreign(note, 1000)) for note in left), class_="notes") if left else None
