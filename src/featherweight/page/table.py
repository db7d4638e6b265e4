"""The table: one that scrolls and sorts on a screen, several narrow ones on paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from .. import merged
from ..advice import standings
from ..results import Line, entries
from .cells import Column, Row, columns
from .tags import Html, joined, tag, text

ON_PAPER = 8
"""Columns of a table that fit on a sheet, beside the names."""


def rows(lines: Sequence[Line]) -> list[Row]:
    """One for each contender; `lines` are kept apart already."""
    known = {standing.entry.first.name: standing for standing in standings([x for x in lines if x.right])}
    letters = merged.letters(lines)
    before = {
        merged.machine(x): x.general_loss
        for x in lines
        if x.kind == "reference" and not x.train_steps and x.general_loss
    }
    return [
        Row(entry, known.get(entry.first.name), before.get(where := merged.machine(entry.first)), letters[where])
        for entry in entries(lines)
    ]


def table(found: Sequence[Row]) -> Html:
    """For the screen and for paper."""
    shown = columns(found)
    screen = tag(
        "div", _one(found, shown, "Every row of the comparison", sortable=True), class_="scroll on-screen", tabindex="0", role="region",
        aria_label="The table; it scrolls sideways",
    )  # fmt: skip
    hint = tag("p", "The table goes on to the right → scroll it sideways.", class_="hint on-screen")
    name, rest = shown[0], shown[1:]
    first = sum(column.always for column in rest)
    more = rest[first:]
    parts = -(-len(more) // ON_PAPER)
    sheets = [rest[:first], *(more[len(more) * i // parts : len(more) * (i + 1) // parts] for i in range(parts))]
    paper = [_one(found, [name, *some], f"The table, part {i} of {len(sheets)}") for i, some in enumerate(sheets, 1)]
    return joined(hint, screen, tag("div", *paper, class_="on-paper"))


def _one(rows: Sequence[Row], columns: Sequence[Column], caption: str, *, sortable: bool = False) -> Html:
    # The name's cell stands alone above its column: it stays where it is when the rest is scrolled.
    spans = [("", 1), *((group, len(list(of))) for group, of in groupby(column.group for column in columns[1:]))]
    above = tag("tr", *(_above(group, n) for group, n in spans))
    heads = tag("tr", *(_head(column, sortable) for column in columns))
    body = tag("tbody", *(_row(row, columns) for row in rows))
    return tag(
        "table", tag("caption", caption), tag("thead", above if any(g for g, _ in spans) else "", heads), body, class_="runs",
        data_sortable=sortable or None,
    )  # fmt: skip


def _above(group: str, n: int) -> Html:
    return tag("th", group, scope="colgroup", colspan=str(n)) if group else tag("td", colspan=str(n))


def _head(column: Column, sortable: bool) -> Html:
    kind = "number" if column.numeric else "words"
    return tag("th", column.heading, scope="col", class_=kind, data_sort=kind if sortable else None)


def _row(row: Row, columns: Sequence[Column]) -> Html:
    kind = " ".join(["alike"] * row.alike + ["reference"] * (row.entry.first.kind == "reference"))
    return tag("tr", *(_cell(row, column, i == 0) for i, column in enumerate(columns)), class_=kind or None)


def _breakable(name: str) -> Html:
    """`num_virtual_tokens=50` may go on in the next line after an underscore."""
    return Html(re.sub(r"_(?=\w)", "_<wbr>", text(name)))


def _together(words: str) -> Html:
    """`n = 600` stays on one line."""
    return Html(text(words).replace(" = ", "&nbsp;=&nbsp;"))


def _cell(row: Row, column: Column, first: bool) -> Html:
    cell = column.cell(row)
    key = cell.key if isinstance(cell.key, str) else None if cell.key is None else repr(float(cell.key))
    name = tag("span", _breakable(cell.words), class_="name") if first else cell.words
    small = [tag("small", _together(cell.more))] if cell.more else []
    if first and row.alike:
        best = row.standing is not None and row.standing.behind is None
        small.append(tag("small", "best row" if best else "like the best", class_="chip"))
    inner = joined(name, *small, by=" ")
    if first:
        return tag("th", inner, scope="row", data_key=key)
    return tag("td", inner, class_="number" if column.numeric else "words", data_key=key)
