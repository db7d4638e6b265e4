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
from .network import check_hub_id

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TABLES = ("csv", "json", "parquet", "arrow", "text", "cache")
"""What a hub data set or a folder may consist of, as `datasets` calls it; `cache` is one that has been read before."""


@dataclass(frozen=True)
class Rows:
    """A table: its rows, where each came from (`file:line`, or `file:row n` where lines mean nothing), and the columns."""

    source: str
    rows: list[dict[str, Any]]
    places: list[str]

    @property
    def columns(self) -> list[str]:
        """All column names, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def named(source: str) -> str:
    """A data set's name that means the same from every folder."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def read(source: str) -> dict[str, Rows]:
    """Read a data set: `{"train": …}` for a file, and its own splits for a hub data set or a folder of files.

    Raises `InputError` for a missing or empty file, an unknown format, or a broken line (naming `file:line`).
    """
    if source == demo.DATA:
        return {"train": _read_file(demo.data_file(), source)}
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": _read_file(path, source)}
    if not path.is_dir() and (path.suffix.lower() in FORMATS or source.startswith((".", "/", "~"))):
        raise InputError(f"data: there is no file {source}")
    return _read_hub(str(path) if path.is_dir() else source)


def _read_file(path: Path, source: str) -> Rows:
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"data: {source} is not one of the known formats: {', '.join(FORMATS)}")
    try:
        pairs = list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError:
        raise InputError(f"data: {source}:{_undecodable(path)}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as e:
        raise InputError(f"data: {source} cannot be read: {e.strerror or e}") from None
    if not pairs:
        raise InputError(f"data: {source} has no rows")
    return Rows(source, [row for row, _ in pairs], [f"{source}:{place}" for _, place in pairs])


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return 1


def _csv(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] = []
        line = 1  # where the current row begins: a quoted text may run over several lines
        try:
            for fields in reader:
                begin, line = line, reader.line_num + 1
                if not fields:
                    continue  # a blank line
                if not header:
                    header = [name.strip() for name in fields]
                    if len(set(header)) < len(header):
                        raise InputError(f"data: {path}:{begin}: a column name occurs twice: {', '.join(header)}")
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"data: {path}:{begin}: {len(fields)} fields where the header has {len(header)} "
                        f"({', '.join(header)}); quote texts that hold the separator"
                    )
                yield dict(zip(header, fields, strict=True)), begin
        except csv.Error as e:
            raise InputError(
                f"data: {path}:{line}: broken line: {e}; a quote inside a text is written twice, in a quoted text"
            ) from None


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


def _json(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as e:
        raise InputError(
            f"data: {path}:{e.lineno}: not valid JSON: {e.msg}; for one object a line name the file .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise InputError(f"data: {path}: expected a list of objects; for one object a line name the file .jsonl")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"data: {path}: element {number} is no object but a {type(row).__name__}")
        yield row, f"row {number}"


def _parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow.parquet as pq  # comes with datasets

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as e:
        raise InputError(f"data: {path} is not a readable parquet file: {_first_line(e)}") from None
    yield from ((row, f"row {number}") for number, row in enumerate(rows, 1))


def _first_line(error: Exception) -> str:
    """What an error of another library says, short; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_hub(source: str) -> dict[str, Rows]:
    if not Path(source).is_dir():
        check_hub_id("data", source)
    import datasets

    try:
        builder = datasets.load_dataset_builder(source)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in TABLES:  # other formats may hold pickles
            raise ValueError(f"it is of the format {kind}; tables are read: {', '.join(TABLES)}")
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as e:  # the library raises a dozen kinds
        raise InputError(
            f"data: {source!r} is neither a file here nor a hub data set that could be read: {_first_line(e)}"
        ) from None
    found = {}
    for split, table in splits.items():
        names = {c: f.names for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
        rows = [{k: names[k][v] if k in names and v >= 0 else v for k, v in row.items()} for row in table]
        found[str(split)] = Rows(source, rows, [f"{source}[{split}]:{i}" for i in range(1, len(rows) + 1)])
    return found
