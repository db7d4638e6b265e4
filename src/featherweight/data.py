"""Rows from a file or a hub data set, each with the place it came from, so that every complaint can name it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import demo
from .errors import InputError, shown
from .foreign import path_of, similar
from .formats import first_line, read_csv, read_json_list, read_jsonl, read_parquet
from .network import ask_hub_if_it_is_there, check_hub_id

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
    path = path_of(source)
    return str(path.resolve()) if path.exists() else source


def read(source: str) -> dict[str, Rows]:
    """Read a data set: `{"train": …}` for a file, and its own splits for a hub data set or a folder of files.

    Raises `InputError` for a missing or empty file, an unknown format, or a broken line (naming `file:line`).
    """
    if source in demo.TABLES:
        return {"train": _read_file(demo.data_file(source), source)}
    path = path_of(source)
    if path.is_file():
        return {"train": _read_file(path, source)}
    if path.exists() and not path.is_dir():
        raise InputError(f"data: {source} is no file but a device or a pipe; give a file")
    if not path.is_dir() and (path.suffix.lower() in FORMATS or source.startswith((".", "/", "~"))):
        raise InputError(f"data: there is no file {source}{similar(source)}")
    return _read_hub(str(path) if path.is_dir() else source)


def _read_file(path: Path, source: str) -> Rows:
    readers = {
        ".csv": read_csv, ".tsv": read_csv, ".jsonl": read_jsonl, ".json": read_json_list, ".parquet": read_parquet,
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise InputError(f"data: {source} is not one of the known formats: {', '.join(FORMATS)}")
    try:
        pairs = list(readers[path.suffix.lower()](path))
    except OSError as e:
        raise InputError(f"data: {source} cannot be read: {e.strerror or e}") from None
    if not pairs:
        raise InputError(f"data: {source} has no rows")
    return Rows(source, [row for row, _ in pairs], [f"{source}:{place}" for _, place in pairs])


def _read_hub(source: str) -> dict[str, Rows]:
    if not Path(source).is_dir():
        check_hub_id("data", source)
    import datasets

    ask_hub_if_it_is_there()
    datasets.disable_progress_bars()  # a complaint is one line
    try:
        builder = datasets.load_dataset_builder(source)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in TABLES:  # other formats may hold pickles
            raise ValueError(f"it is of the format {kind}; tables are read: {', '.join(TABLES)}")
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as e:  # the library raises a dozen kinds
        hint = similar(source, demo.TABLES)
        raise InputError(
            f"data: {shown(source)} is neither a file here nor a hub data set that could be read{hint or ':'} {first_line(e)}"
        ) from None
    finally:
        datasets.enable_progress_bars()
    found = {}
    for split, table in splits.items():
        names = {c: f.names for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
        rows = [{k: names[k][v] if k in names and v >= 0 else v for k, v in row.items()} for row in table]
        found[str(split)] = Rows(source, rows, [f"{source}[{split}]:{i}" for i in range(1, len(rows) + 1)])
    return found
