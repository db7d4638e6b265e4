"""A case of the fuzzer: a command line, what must become of it, and where the fault is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

OUT = "out"
"""The out folder of a case, below its folder: the one place where something may be written."""


@dataclass
class Case:
    """The files are in the case's folder, where the command line is run."""

    kind: str
    args: list[str]
    must: bool | None = True
    """Whether it must be refused; None: either will do, as long as it is done properly."""
    place: str = ""
    """What the complaint must name: `file:line` where there is a line."""
    seed: int = -1
    codes: tuple[int, ...] = ()
    """Exit codes that are good for this verb, besides 0."""


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A few bytes flipped, put in, taken out, or repeated."""
    spoilt = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(spoilt) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(spoilt):
            spoilt[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            spoilt[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        elif how == 2:
            del spoilt[at : at + rng.randint(1, 12)]
        elif how == 3:
            spoilt[at:at] = rng.choice(TOKENS)
        else:
            spoilt[at:at] = spoilt[max(0, at - rng.randint(1, 40)) : at]
    return bytes(spoilt)


TOKENS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b'""', b"'", b"\n", b"\r", b"\r\n", b",", b"\t", b"[", b"{", b"}", b"]", b"null",
    b"NaN", b"-1", b"1e999", b"\\ud800", b"\\u0000", b"\x1b[2J", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"../", b"%s", b"{text}",
)  # fmt: skip


def write(path: Path, content: bytes | str) -> Path:
    """Bytes, or text in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
