"""Calling the command line in a test, and reading what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]

BARE = ("--no-isolate", "--references", "none", "--general-text", "none")
"""For `compare`: the methods alone, in this process."""


def complaint(result: Result) -> str:
    """The one line of an error; nothing else was printed."""
    assert result.code == 2, result
    assert result.out == ""
    line = result.err.removesuffix("\n")
    assert "\n" not in line
    assert line.startswith("featherweight: error: ")
    return line.removeprefix("featherweight: error: ")
