"""`predict`: an adapter that was trained on labels gives them to rows that have none."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import data
from .adapted import told_by
from .adapter import attached
from .api import Prediction, label_rows
from .config import PredictConfig
from .demo import MODEL
from .errors import InputError, listed, shown
from .foreign import path_of
from .prepare import adapted_base, check_writable, refuse_own_input
from .progress import bar, note
from .rows import Row, pieces, unlabelled
from .tokens import writer_for

BLOCK = 1024
"""Rows that are written together: no more is lost when somebody interrupts."""
ADDED = ("prediction", "probability")
"""The columns that a row has besides its own once it is labelled."""
ENDINGS = (".csv", ".tsv", ".jsonl")

Writes = Callable[[Sequence[Mapping[str, Any]], Sequence[Prediction | None]], None]


def run_predict(config: PredictConfig) -> int:
    """`featherweight predict`."""
    if config.adapter is None:
        raise InputError("give --adapter, the folder of an adapter that was trained on labels")
    saved = told_by(config.adapter)
    labels = saved.get("labels")
    if not labels or not saved.get("template"):
        raise InputError(
            f"the adapter {config.adapter} was not trained to tell labels apart, so it has none to give; use featherweight generate"
        )
    table = asked_of(config, saved)
    rows = written_out(config, table, saved)
    if empty := [place for place, row in zip(table.places, rows, strict=True) if row is None]:
        if len(empty) == len(rows):
            raise InputError(f"data: {table.source} has no text in any row, so there is nothing to label")
        note(f"rows without a text, which get no label: {len(empty):,}; the first is {empty[0]}")
    if config.out is not None:
        _check_out(config.out, config.data, table)
    name = config.model or saved.get("base") or MODEL
    base = adapted_base(config, name, labels)
    writer, done = writer_for(base, config.max_length, labels, attached(base.model).values()), 0
    with labelled(config.out, table.columns) as write, bar("predict", len(rows)) as progress:

        def show(in_block: int) -> None:
            progress.update(done + in_block, "rows labelled")

        try:
            for start in range(0, len(rows), BLOCK):
                block = slice(start, start + BLOCK)
                full = [row for row in rows[block] if row is not None]
                given = iter(label_rows(base, full, labels, writer, batch_size=config.batch_size, on_batch=show))
                write(table.rows[block], [None if row is None else next(given) for row in rows[block]])
                done += len(rows[block])
        finally:
            if config.out is not None or done < len(rows):
                note(f"labelled {done:,} of {len(rows):,} rows" + (f"; they are in {config.out}" if config.out else ""))
    return 0


def asked_of(config: PredictConfig, saved: Mapping[str, Any]) -> data.Rows:
    """The rows to label: those of the file, all its splits, or one for each line of standard input that is not empty."""
    if config.data is not None:
        splits = list(data.read(config.data).values())
        return data.Rows(config.data, [r for s in splits for r in s.rows], [p for s in splits for p in s.places])
    if sys.stdin.isatty():
        raise InputError("give --data, or texts on standard input, one a line")
    column = config.text_column or pieces(saved["template"])[0][0][1]
    try:
        lines = [(n, line.strip()) for n, line in enumerate(sys.stdin, 1) if line.strip()]
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text; convert it to UTF-8") from None
    if not lines:
        raise InputError("standard input is empty; give texts, one a line, or --data")
    return data.Rows("standard input", [{column: line} for _, line in lines], [f"standard input:{n}" for n, _ in lines])


def written_out(config: PredictConfig, table: data.Rows, saved: Mapping[str, Any]) -> list[Row | None]:
    """The rows as the adapter's template writes them, None for those without a text; every one is looked at before a model loads."""
    wanted = [name for _, name in pieces(saved["template"])[0]]
    if config.text_column is not None and len(wanted) > 1:
        raise InputError(
            f"--text-column: this adapter reads the columns {', '.join(wanted)}; give those of the file these names"
        )
    source = {name: config.text_column or name for name in wanted}
    if missing := [column for column in source.values() if column not in table.columns]:
        flag = "; name the one with the text with --text-column" if len(wanted) == 1 else ""
        raise InputError(
            f"data: {table.source} has no column {shown(missing[0])}, which the adapter reads; "
            f"its columns are: {listed(table.columns)}{flag}"
        )
    needed = (saved.get("columns") or {}).get("text_column")
    needed = needed if needed in wanted else wanted[0]
    rows: list[Row | None] = []
    for row, place in zip(table.rows, table.places, strict=True):
        read = {name: row.get(column) for name, column in source.items()}
        blank = read[needed] is None or read[needed] != read[needed] or not str(read[needed]).strip()
        rows.append(None if blank else unlabelled(saved["template"], read, place, needed))
    return rows


def _check_out(out: str, source: str | None, table: data.Rows) -> None:
    path = path_of(out)
    if path.suffix.lower() not in ENDINGS:
        raise InputError(
            f"--out {out}: labelled rows are written as {', '.join(ENDINGS)}; give the file one of these endings"
        )
    refuse_own_input(out, {"--data": source})
    if there := [name for name in ADDED if name in table.columns]:
        raise InputError(
            f"data: {table.source} has a column {shown(there[0])} already, which would be lost; rename it first"
        )
    check_writable(out)


@contextmanager
def labelled(out: str | None, columns: Sequence[str]) -> Iterator[Writes]:
    """What writes rows with their labels, into the file as it goes, or each label and its probability in a line of standard output."""
    if out is None:
        yield lambda _, found: print("\n".join("\t".join(_cells(p)) for p in found), flush=True)
        return
    with path_of(out).open("w", encoding="utf-8", newline="") as file:
        if path_of(out).suffix.lower() == ".jsonl":

            def write(rows: Sequence[Mapping[str, Any]], found: Sequence[Prediction | None]) -> None:
                for row, p in zip(rows, found, strict=True):
                    told = {**row, "prediction": p and p.label, "probability": p and round(p.probability, 4)}
                    file.write(json.dumps(told, ensure_ascii=False, default=str) + "\n")
                file.flush()

        else:
            sheet = csv.writer(
                file, delimiter="\t" if path_of(out).suffix.lower() == ".tsv" else ",", lineterminator="\n"
            )
            sheet.writerow([*columns, *ADDED])

            def write(rows: Sequence[Mapping[str, Any]], found: Sequence[Prediction | None]) -> None:
                for row, p in zip(rows, found, strict=True):
                    sheet.writerow([*(row.get(c) for c in columns), *_cells(p)])
                file.flush()

        yield write


def _cells(found: Prediction | None) -> tuple[str, str]:
    return ("", "") if found is None else (found.label, f"{found.probability:.4f}")
