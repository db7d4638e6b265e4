"""What a power cut must not halve: a file is written beside its place, made safe on the disk, and only then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InputError


def write(path: Path, text: str) -> None:
    """In one step: whoever reads the file sees the old one or the new one. Raises `InputError` where that fails."""
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_text(text, encoding="utf-8")
        make_safe(beside)
        beside.replace(path)
        make_safe(path.parent)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        beside.unlink(missing_ok=True)


def make_safe(path: Path) -> None:
    """Wait until a file or folder is on the disk. Windows has no such thing for folders."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
