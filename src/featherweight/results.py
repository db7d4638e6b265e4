"""The results of a comparison: one `Line` per run, one `Entry` per method, and what can be said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import on_disk, stats
from .redaction import clean

FILE = "rows.jsonl"


@dataclass
class Line:
    """One method's results, in plain units: bytes, seconds, shares."""

    name: str
    method: str
    batch_size: int
    total_params: int
    trainable_params: int
    peak_bytes: int
    train_steps: int
    train_seconds: float
    train_examples: int
    eval_batches: int
    eval_seconds: float
    eval_examples: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float
    metric: str
    lr: float
    losses: list[float | None] = field(default_factory=list)
    """Of every step; None where it was not finite."""
    predictions: list[str] = field(default_factory=list)
    stopped: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    right: list[bool] = field(default_factory=list)
    """Whether each test row was answered right, in the order of `predictions`."""
    identity: str = ""
    """Tells one run from another: a hash of all that decides its result. A comparison that goes on does not repeat it."""


@dataclass
class Entry:
    """One row of the table: a method's runs, one for each seed."""

    runs: list[Line]

    @property
    def accuracy(self) -> stats.Estimate:
        """Over all rows and seeds."""
        return stats.accuracy(self.right)

    @property
    def right(self) -> stats.Right:
        """(seeds, rows): right or wrong."""
        return np.array([run.right for run in self.runs])


def entries(lines: Sequence[Line]) -> list[Entry]:
    """The runs by method, in the order in which methods first occur."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.name, []).append(line)
    return [Entry(sorted(runs, key=lambda run: run.seed)) for runs in found.values()]


def verdict(lines: Sequence[Line]) -> list[str]:
    """In words: which method is best, which cannot be told apart from it, and which are worse, by how much.

    Only methods that have been run with the same seeds are compared.
    """
    found = entries(lines)
    seeds = [run.seed for run in found[0].runs] if found else []
    found = [entry for entry in found if [run.seed for run in entry.runs] == seeds]
    if len(found) < 2:
        return []
    apart = stats.told_apart([entry.right for entry in found])
    best = max(found, key=lambda entry: entry.accuracy.mean)
    like = [e.runs[0].method for e, other in zip(found, apart, strict=True) if not other and e is not best]
    worse = []
    for entry, other in zip(found, apart, strict=True):
        if other:
            d = stats.difference(entry.right, best.right)
            low, high = (100 * edge for edge in d.interval)
            worse.append(f"{entry.runs[0].method} ({100 * d.mean:+.1f} points [{low:+.1f}, {high:+.1f}])")
    name, tested = best.runs[0].method, f"{'one seed' if len(seeds) == 1 else f'{len(seeds)} seeds'}, the same rows"
    words = [
        f"best: {name}" + (f"; not to be told apart from it ({tested}): {', '.join(like)}" if like else f" ({tested})")
    ]
    return words + ([f"worse than {name}: {', '.join(worse)}"] if worse else [])


def read(folder: Path) -> list[Line]:
    """The runs that a comparison has finished so far; a line that is not one is left out."""
    found: list[Line] = []
    if (folder / FILE).is_file():
        for text in (folder / FILE).read_text(encoding="utf-8").splitlines():
            try:
                told = json.loads(text)
                found.append(Line(**{**told, "interval": tuple(told["interval"])}))
            except (ValueError, TypeError, KeyError):
                continue
    return found


def write(folder: Path, lines: Sequence[Line]) -> None:
    """All of them, in one step: every figure, the loss of every step, every prediction."""
    text = "".join(json.dumps(clean(asdict(line)), ensure_ascii=False) + "\n" for line in lines)
    on_disk.write(folder / FILE, text)
