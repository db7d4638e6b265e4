"""Equal budgets: how many steps, and of how many rows, each contender may take. By default the same steps of the same rows.

--steps, --epochs    the same updates
--tokens N           as many steps as read N tokens of text
--minutes M          as many steps as fit into M minutes, from the pace of a short pilot
--memory … --fill    the largest batch that `plan` says fits, and as many steps as read the same number of rows
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import on_disk
from .engine.train import Report, Settings, fit, heaviest
from .errors import InputError
from .method import Method
from .plan.estimate import Plan, Target, predict
from .plan.imagine import packs
from .tokens import Example

if TYPE_CHECKING:
    from .bench import Bench, Run

PILOT, WARM = 8, 3  # steps, and those of them that are not counted
LARGEST = 512


def steps_for_tokens(examples: Sequence[Example], settings: Settings, tokens: int) -> int:
    """The number of steps that read about so many tokens."""
    mean = statistics.fmean(len(e.ids) for e in examples)
    return max(1, round(tokens / (mean * settings.batch_size * settings.accumulate)))


def steps_in(bench: Bench, run: Run, file: Path) -> int:
    """The number of steps that take `config.minutes`, by a pilot; written down, so that a run that goes on does not change its mind.

    The pilot trains what is attached: attach anew before the run itself.
    """
    if file.is_file():
        return int(json.loads(file.read_text(encoding="utf-8"))["steps"])
    ends = list[float]()

    def on_step(_: Report) -> None:
        ends.append(time.perf_counter())

    settings = replace(run.settings(bench.settings), steps=PILOT)
    stopped = fit(bench.base, bench.examples, settings, on_step=on_step).stopped
    if stopped == "interrupted":
        raise KeyboardInterrupt
    if stopped is not None:
        raise InputError(f"its pilot ended early ({stopped})")
    pace = (ends[-1] - ends[WARM - 1]) / (PILOT - WARM)
    steps = max(1, round(60 * (bench.config.minutes or 0) / pace))
    file.parent.mkdir(parents=True, exist_ok=True)
    on_disk.write(file, json.dumps({"steps": steps, "seconds_a_step": pace}) + "\n")
    return steps


def foreseen(
    shape: Any, method: Method, settings: Settings, examples: Sequence[Example], *, cpu: bool, **given: Any
) -> Plan:
    """What `plan` says of a run: memory by part and its interval. `given` are `predict`'s: dtype, labels, tricks."""
    rows = heaviest(examples, settings, packs(shape, settings.packing))
    return predict(shape, method, settings, rows, Target("here", 0, cpu=cpu), micro=settings.micro_batch, **given)


def largest_batch(
    shape: Any, method: Method, settings: Settings, examples: Sequence[Example], memory_bytes: int, **given: Any
) -> Settings:
    """`settings` with the largest batch (a power of two) that fits into this memory, and the steps that read as many rows as before."""
    rows, fitting = settings.steps * settings.batch_size, 0
    size = 1
    while size <= min(LARGEST, len(examples), rows):
        tried = replace(settings, batch_size=size, steps=max(1, round(rows / size)))
        if not foreseen(shape, method, tried, examples, **given).fits(memory_bytes):
            break
        fitting, size = size, size * 2
    if not fitting:
        raise InputError(f"{method.title} does not fit into the memory that --fill may use, not even one row at a time")
    return replace(settings, batch_size=fitting, steps=max(1, round(rows / fitting)))
