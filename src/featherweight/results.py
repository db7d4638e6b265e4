"""The results of a comparison: one `Line` per run, one `Entry` per row of the table, and where they are kept.

rows.jsonl             a line per run: every figure, the loss of every step, every answer, and where it all comes from
tested-<hash>.jsonl    the rows that were tested on, in the order of the answers
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from . import on_disk, stats
from .redaction import clean
from .rows import Row
from .task import text_of

FILE = "rows.jsonl"


@dataclass
class Line:
    """One run's results, in plain units: bytes, seconds, shares. None: not measured here, or there is no such thing."""

    name: str
    """How it was asked for, such as `lora:r=64`."""
    method: str
    """What the table calls it, such as `LoRA (r=64)`."""
    kind: str = "method"
    """`method`; `reference` for what there is to beat: the untouched model, the most frequent class, full fine-tuning."""
    seed: int = 0
    batch_size: int = 0
    lr: float = 0.0
    total_params: int = 0
    trainable_params: int = 0

    train_steps: int = 0
    train_examples: int = 0
    train_tokens: int = 0
    eval_batches: int = 0
    eval_examples: int = 0
    eval_tokens: int = 0

    load_seconds: float = 0.0
    """Reading the base into memory, with the import of the code that it needs."""
    tokenise_seconds: float = 0.0
    train_seconds: float = 0.0
    """Of the steps alone."""
    eval_seconds: float = 0.0
    """Of the forward passes alone."""
    whole_seconds: float = 0.0
    """From the start of its process to its end, the import of libraries included."""

    peak_bytes: int = 0
    """The peak of the training steps: of the accelerator's allocator, or on a CPU of the whole process."""
    before_bytes: int = 0
    """What was held before the first step, counted alike: the weights, and on a CPU the process itself."""
    reserved_bytes: int | None = None
    """What an accelerator's allocator had taken from the device at the peak of training."""
    eval_peak_bytes: int = 0
    host_bytes: int = 0
    """The largest resident size of the process, from its start to its end."""
    weights_bytes: int = 0
    """The base's weights."""
    adapter_bytes: int | None = None
    """The adapter's file."""
    predicted_bytes: int | None = None
    """What `plan` said of `peak_bytes` before the run, and its interval."""
    predicted_interval: tuple[int, int] | None = None
    memory_over_step: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since its begin, bytes) while one training step ran."""
    joules: float | None = None
    """Energy of training and evaluating, where the device reports it."""

    metric: str = "labels"
    correct: int = 0
    accuracy: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    macro_f1: float = 0.0
    general_loss: float | None = None
    """Mean loss of a token of general text that has nothing to do with the task: what it rises by is what was forgotten."""
    losses: list[float | None] = field(default_factory=list)
    """Of every step; None where it was not finite."""
    predictions: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    """Whether each test row was answered right, in the order of `predictions`."""
    tested: str = ""
    """Tells which rows were tested on: they are in `tested-<this>.jsonl`."""
    stopped: str | None = None
    identity: str = ""
    """Tells one run from another: a hash of all that decides its result. A comparison that goes on does not repeat it."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, machine, command, date; hashes of weights, tokenizer, template and data; every setting."""


@dataclass
class Entry:
    """One row of the table: the runs of one contender, one for each seed."""

    runs: list[Line]

    @property
    def first(self) -> Line:
        """Any of them, for what they have in common."""
        return self.runs[0]

    @property
    def accuracy(self) -> stats.Estimate:
        """Over all rows and seeds."""
        return stats.accuracy(self.right)

    @property
    def right(self) -> stats.Right:
        """(seeds, rows): right or wrong."""
        return np.array([run.right for run in self.runs])

    @property
    def seeds(self) -> list[int]:
        """Those that it was run with."""
        return [run.seed for run in self.runs]

    def mean(self, figure: Callable[[Line], float | None]) -> float | None:
        """The mean of a figure over the runs; None where a run lacks it."""
        found = [x for run in self.runs if (x := figure(run)) is not None]
        return statistics.fmean(found) if len(found) == len(self.runs) else None

    def rate(self, count: str, seconds: str) -> float | None:
        """How many a second, over all runs: `rate("train_tokens", "train_seconds")`."""
        took = sum(getattr(run, seconds) for run in self.runs)
        return sum(getattr(run, count) for run in self.runs) / took if took else None

    def alongside(self, seeds: int) -> stats.Right | None:
        """`right` beside methods with so many seeds: what no seed changes is the same for each. None: it has not as many."""
        if len(self.runs) == seeds:
            return self.right
        fixed = len(self.runs) == 1 and not self.first.train_steps
        return np.repeat(self.right, seeds, axis=0) if fixed else None


def entries(lines: Sequence[Line]) -> list[Entry]:
    """The runs by contender, in the order in which contenders first occur: methods before references."""
    found: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.kind == "reference"):
        found.setdefault(line.name, []).append(line)
    return [Entry(sorted(runs, key=lambda run: run.seed)) for runs in found.values()]


def read(folder: Path) -> list[Line]:
    """The runs that a comparison has finished so far; a line that is not one is left out."""
    known = {f.name for f in fields(Line)}
    found: list[Line] = []
    if (folder / FILE).is_file():
        for text in (folder / FILE).read_text(encoding="utf-8").splitlines():
            try:
                found.append(line_of({k: v for k, v in json.loads(text).items() if k in known}))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    return found


def line_of(told: dict[str, Any]) -> Line:
    """A `Line` as JSON gives it back."""
    pairs: dict[str, Any] = {"memory_over_step": [(float(s), int(b)) for s, b in told.get("memory_over_step", [])]}
    pairs |= {key: tuple(told[key]) for key in ("interval", "predicted_interval") if told.get(key) is not None}
    return Line(**{**told, **pairs})


def write(folder: Path, lines: Sequence[Line]) -> None:
    """All of them, in one step."""
    text = "".join(json.dumps(clean(asdict(line)), ensure_ascii=False) + "\n" for line in lines)
    on_disk.write(folder / FILE, text)


def write_tested(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """The rows that were tested on: their text, answer and place."""
    if not (file := folder / f"tested-{name}.jsonl").is_file():
        told = ({"text": text_of(row), "answer": row.answer.strip(), "place": row.place} for row in rows)
        on_disk.write(file, "".join(json.dumps(clean(row), ensure_ascii=False) + "\n" for row in told))


def read_tested(folder: Path, name: str) -> list[dict[str, str]]:
    """What `write_tested` wrote; empty where it is not there."""
    file = folder / f"tested-{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
