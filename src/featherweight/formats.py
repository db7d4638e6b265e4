"""The formats of a data file: each a generator of rows, and of the place in the file where each begins.

A file is read piece by piece, and every piece is checked before it is parsed: a line or object is at most `LONGEST_ROW` characters
of UTF-8 without NUL, and no row has more than `MOST_COLUMNS` columns. What is broken is refused as `file:line`.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .errors import InputError, listed, shown
from .foreign import LONGEST_ROW, once, plain_errors

MOST_COLUMNS = 10_000
_SPACES = re.compile(r"[ \t\r\n]*")
_BOMB_BYTES, _BOMB_RATIO = 64 * 2**20, 100
"""A parquet file that unpacks to more bytes than this, and to so many times its size, is no data set."""
_AT_A_TIME = 64  # rows of a parquet file: one text can be packed into no room at all, over and over
_ARROW_ERRORS = (OSError, ValueError, TypeError, KeyError, ArithmeticError, NotImplementedError, MemoryError)
"""Arrow's own errors are of these kinds too."""

Placed = Iterator[tuple[dict[str, Any], int | str]]


def refuse(path: Path, place: int | str, why: str) -> NoReturn:
    """Raise the `InputError` for this place of a file."""
    raise InputError(f"data: {path}:{place}: {why}")


def _open(path: Path) -> TextIO:
    """A text file whose line ends stay as they are, and whose bytes that are not UTF-8 can be found by `_check`."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _check(text: str, path: Path, line: int) -> None:
    """Refuse a piece of a file, which begins in line `line`, for a NUL or what is not UTF-8."""
    at = text.find("\0")
    if at >= 0:
        line += text.count("\n", 0, at)
        refuse(path, line, "a NUL character: the file is damaged, or UTF-16; save it as UTF-8")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as e:
        refuse(path, line + text.count("\n", 0, e.start), "not UTF-8 text; save the file as UTF-8")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends."""
    with _open(path) as f:
        for number in itertools.count(1):
            line = f.readline(LONGEST_ROW + 1)
            if not line:
                return
            if len(line) > LONGEST_ROW:
                refuse(
                    path, number, f"a line of more than {LONGEST_ROW:,} characters; is a line end or a quote missing?"
                )
            _check(line, path, number)
            yield line


def read_csv(path: Path) -> Placed:
    """Comma-separated, or tab-separated as `.tsv`; the first line names the columns."""
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] = []
    line = 1  # where the current row begins: a quoted text may run over several lines
    try:
        for fields in reader:
            begin, line = line, reader.line_num + 1
            if not fields:
                continue  # a blank line
            if not header:
                header = [name.strip() for name in fields]
                _check_names(header, path, begin)
                continue
            if len(fields) != len(header):
                refuse(
                    path, begin,
                    f"{len(fields)} fields where the header has {len(header)} ({listed(header)}); quote texts that hold the separator",
                )  # fmt: skip
            yield dict(zip(header, fields, strict=True)), begin
    except csv.Error as e:
        if "field larger" in str(e):
            refuse(path, line, f"a text of more than {LONGEST_ROW:,} characters: is a quote never closed?")
        refuse(path, line, f"broken line: {e}; a quote inside a text is written twice, in a quoted text")


def _check_names(names: list[str], path: Path, place: int | str) -> None:
    if len(names) > MOST_COLUMNS:
        refuse(path, place, f"{len(names):,} columns; at most {MOST_COLUMNS:,} are read: keep those that are needed")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        refuse(path, place, f"a column name occurs twice: {shown(twice)}; rename one of: {listed(names)}")


def _checked(row: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        refuse(path, line, f'expected an object such as {{"text": …}}, found {type(row).__name__}')
    if len(row) > MOST_COLUMNS:
        refuse(path, line, f"{len(row):,} columns; at most {MOST_COLUMNS:,} are read: keep those that are needed")
    return row


def read_jsonl(path: Path) -> Placed:
    """One JSON object a line."""
    for number, line in enumerate(_lines(path), 1):
        if not line.isspace():
            try:
                with plain_errors():
                    row = json.loads(line, object_pairs_hook=once)
            except ValueError as e:
                refuse(path, number, f"not valid JSON: {e}")
            yield _checked(row, path, number), number


class _Window:
    """What comes next of a text file: at least `LONGEST_ROW` characters where there are so many, and the line it begins in."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            space = _SPACES.match(self.text, self.at)
            assert space is not None  # it matches anything
            self.move(space.end())
            if self.ended or len(self.text) - self.at >= LONGEST_ROW:
                return self.text[self.at : self.at + 1]
            more = self.file.read(LONGEST_ROW)
            self.ended = not more
            _check(more, self.path, self.line + self.text.count("\n", self.at))
            self.text, self.at = self.text[self.at :] + more, 0

    def move(self, end: int) -> None:
        """Go on to this place of the text."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def refuse(self, why: str, at: int | None = None) -> NoReturn:
        """Refuse the file at the line of this place."""
        line = self.line + self.text.count("\n", self.at, self.at if at is None else at)
        refuse(self.path, line, f"{why}; for one object a line name the file .jsonl")


_DECODER = json.JSONDecoder(object_pairs_hook=once)


def read_json_list(path: Path) -> Placed:
    """A JSON list of objects, one after the other."""
    with _open(path) as f:
        window = _Window(f, path)
        first = window.peek()
        if not first:
            return
        if first != "[":
            window.refuse("expected a list of objects")
        window.move(window.at + 1)
        closed = window.peek() == "]"
        while not closed:
            window.peek()
            row, end = _element(window)
            yield _checked(row, path, window.line), window.line
            window.move(end)
            closed = window.peek() == "]"
            if not closed and window.peek() != ",":
                window.refuse("not valid JSON: a comma or the end of the list is missing")
            window.move(window.at + (not closed))
        window.move(window.at + 1)
        if window.peek():
            window.refuse("not valid JSON: something follows the list")


def _element(window: _Window) -> tuple[Any, int]:
    try:
        with plain_errors():
            return _DECODER.raw_decode(window.text, window.at)
    except json.JSONDecodeError as e:
        more = "" if window.ended else f", or an object of more than {LONGEST_ROW:,} characters"
        window.refuse(f"not valid JSON: {e.msg}{more}", e.pos)
    except ValueError as e:
        window.refuse(f"not valid JSON: {e}")


def read_parquet(path: Path) -> Placed:
    """Parquet, some rows at a time."""
    import pyarrow.parquet as pq  # comes with datasets

    number = unpacked = 0
    try:
        with pq.ParquetFile(path, buffer_size=2**20) as file:
            names = list(file.schema_arrow.names)
            _check_names(names, path, 1)
            _refuse_bomb(file.metadata, path)
            for batch in file.iter_batches(batch_size=_AT_A_TIME, use_threads=False):
                unpacked += batch.nbytes + len(batch) * (200 + 60 * len(names))  # as Python keeps it
                if unpacked > max(_BOMB_BYTES, _BOMB_RATIO * path.stat().st_size):
                    refuse(
                        path,
                        f"row {number + 1}",
                        f"unpacked it is {_BOMB_RATIO} times its size: it is damaged, or made to fill memory",
                    )
                for row in _rows_of(batch, path, number):
                    number += 1
                    yield row, f"row {number}"
    except InputError:
        raise
    except _ARROW_ERRORS as e:
        raise InputError(f"data: {path} is not a readable parquet file: {first_line(e)}; write it anew") from None


def _rows_of(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a batch; `before` came before it. Refuses the first that cannot be had in Python, by its number."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except _ARROW_ERRORS:
        rows = []
        for i in range(len(batch)):
            try:
                rows += batch.slice(i, 1).to_pylist()
            except _ARROW_ERRORS as e:
                refuse(path, f"row {before + i + 1}", f"cannot be read: {first_line(e)}")
    return rows


def _refuse_bomb(metadata: Any, path: Path) -> None:
    """Refuse groups of rows that claim to unpack to far more than the file is: a page is unpacked as a whole.

    What the columns claim is not asked for: where their description is damaged, Arrow ends the process instead of raising.
    """
    file_bytes = path.stat().st_size
    for g in range(metadata.num_row_groups):
        unpacked = metadata.row_group(g).total_byte_size
        if unpacked > max(_BOMB_BYTES, _BOMB_RATIO * file_bytes):
            refuse(
                path, "row 1",
                f"{unpacked / 2**30:.1f} GiB unpacked, from {file_bytes:,} bytes: it is damaged, or made to fill memory",
            )  # fmt: skip


def first_line(error: BaseException) -> str:
    """What an error of another library says, short; its kind where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else line[:299] + "…"
