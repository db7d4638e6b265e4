"""Rows from a file or a hub data set, each with the place it came from, so that every complaint can name it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import demo
from .errors import InputError

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Rows:
    """A table: its rows, where each came from (`file:line`), and the columns."""

    source: str
    rows: list[dict[str, Any]]
    places: list[str]

    @property
    def columns(self) -> list[str]:
        """All column names, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def read(source: str) -> dict[str, Rows]:
    """Read a data set: `{"train": …}` for a file, and its own splits for a hub data set or a folder of files.

    Raises `InputError` for a missing or empty file, an unknown format, or a broken line (naming `file:line`).
    """
    if source == demo.DATA:
        return {"train": _read_file(demo.data_file(), source)}
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": _read_file(path, source)}
    if path.suffix in FORMATS or source.startswith((".", "/", "~")):
        raise InputError(f"data: there is no file {source}")
    return _read_hub(source)


def _read_file(path: Path, source: str) -> Rows:
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise InputError(f"data: {source} is not one of the known formats: {', '.join(FORMATS)}")
    try:
        pairs = list(readers[path.suffix](path))
    except UnicodeDecodeError as e:
        raise InputError(f"data: {source} is not UTF-8 text (byte {e.start}); save it as UTF-8") from None
    except OSError as e:
        raise InputError(f"data: {source} cannot be read: {e.strerror or e}") from None
    if not pairs:
        raise InputError(f"data: {source} has no rows")
    return Rows(source, [row for row, _ in pairs], [f"{source}:{place}" for _, place in pairs])


def _csv(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        header: list[str] = []
        try:
            for fields in reader:
                if not fields:
                    continue  # a blank line
                if not header:
                    header = [name.strip() for name in fields]
                    if len(set(header)) < len(header):
                        raise InputError(f"data: {path}:1: a column name occurs twice: {', '.join(header)}")
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"data: {path}:{reader.line_num}: {len(fields)} fields where the header has {len(header)} "
                        f"({', '.join(header)}); quote texts that hold the separator"
                    )
                yield dict(zip(header, fields, strict=True)), reader.line_num
        except csv.Error as e:
            raise InputError(f"data: {path}:{reader.line_num}: broken line: {e}") from None


def _jsonl(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    with path.open(encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield _object(line, f"{path}:{number}"), number


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise InputError(f"data: {place}: not valid JSON: {e}") from None
    if not isinstance(row, dict):
        raise InputError(f'data: {place}: expected an object such as {{"text": …}}, found {type(row).__name__}')
    return row


def _json(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise InputError(f"data: {path}: not valid JSON: {e}; for one object a line name the file .jsonl") from None
    if not isinstance(rows, list):
        raise InputError(f"data: {path}: expected a list of objects; for one object a line name the file .jsonl")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"data: {path}: element {number} is no object but a {type(row).__name__}")
        yield row, number


def _parquet(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    import pyarrow.parquet as pq  # comes with datasets

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as e:
        raise InputError(f"data: {path} is not a readable parquet file: {str(e).splitlines()[0]}") from None
    yield from ((row, number) for number, row in enumerate(rows, 1))


def _read_hub(source: str) -> dict[str, Rows]:
    import datasets

    try:
        splits = datasets.load_dataset(source)
    except Exception as e:  # the library raises a dozen kinds
        raise InputError(
            f"data: {source!r} is neither a file here nor a hub data set that could be read: {str(e).splitlines()[0]}"
        ) from None
    found = {}
    for split, table in splits.items():
        names = {c: f.names for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
        rows = [{k: names[k][v] if k in names and v >= 0 else v for k, v in row.items()} for row in table]
        found[str(split)] = Rows(source, rows, [f"{source}[{split}]:{i}" for i in range(1, len(rows) + 1)])
    return found
