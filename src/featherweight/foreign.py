"""What somebody else wrote — names, texts, JSON — read with limits, so that nothing in it costs more than a complaint.

A file can be a gigabyte in one line, nested a hundred thousand deep, or no file at all but a pipe. The limits are far above what
people have, and far below what hurts: memory is used for the part that is looked at, never for the whole.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError, near, shown

LONGEST_ROW = 2 * 2**20
"""Characters of a line or an object of a data file."""
LONGEST_FILE = 16 * 2**20
"""Bytes of a file that is read whole: a recipe, an adapter's JSON."""
MOST_ENTRIES = 1_000
"""Entries of a folder that are looked at for a name like a mistyped one."""
DEEPEST = 100
"""Levels of a JSON file that is read whole; JSON of rows is limited by Python itself."""


def path_of(name: str) -> Path:
    """A name as a path, `~` spelled out where there is such a user. Raises `InputError` for a name that no file can have."""
    path = Path(name)
    with suppress(RuntimeError):  # there is no such user: the name as it stands
        path = path.expanduser()
    try:
        path.lstat()
    except (OSError, ValueError) as e:
        if isinstance(e, ValueError) or e.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{shown(name)} cannot be the name of a file: {getattr(e, 'strerror', None) or e}"
            ) from None
    return path


def similar(name: str, known: Iterable[str] = (), *, folder: bool | None = None) -> str:
    """A hint such as `; did you mean 'tickets.csv'?` for what is not there: from the first entries of the folder that it would be
    in, else from the `known` names; else nothing.

    `folder` says whether it is a folder that is wanted, or a file; either will do where it is None.
    """
    path, there = path_of(name), list[str]()
    with suppress(OSError), os.scandir(path.parent) as entries:
        first = itertools.islice(entries, MOST_ENTRIES)
        there = [e.name for e in first if e.name != path.name and folder in (None, e.is_dir())]
    stems = near(path.stem, {Path(entry).stem for entry in there})  # that both end in .csv does not make names alike
    files = near(path.name, [entry for entry in there if Path(entry).stem in stems])
    found = [str(Path(name).with_name(file)) for file in files] + near(name, known)
    return f"; did you mean {found[0]!r}?" if found else ""


def read_text(path: Path, most_bytes: int = LONGEST_FILE) -> str:
    """A small file, whole. Raises `OSError`, or `ValueError` that says what is wrong with its content."""
    path.stat()  # raises what the system says of a file that is not there
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    with path.open("rb") as f:
        content = f.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes // 2**20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8 (line {content[: e.start].count(10) + 1}); save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """A small JSON file, whole. Raises `OSError` or `ValueError` as `read_text` does."""
    text = read_text(path)
    with plain_errors():
        value = json.loads(text, object_pairs_hook=once)
    if _is_deeper(value, DEEPEST):
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return value


@contextmanager
def plain_errors() -> Iterator[None]:
    """Inside, whatever a parser of JSON or TOML raises is a `ValueError` in words for people."""
    try:
        yield
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as e:
        if "integer string conversion" in str(e):
            raise ValueError("it holds a number of thousands of digits") from None
        raise


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose names occurs once: of two values, one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(name)} occurs twice in an object")
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(v, levels - 1) for v in inner)
