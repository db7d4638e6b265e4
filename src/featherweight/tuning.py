"""A small search per method, the same number of trials for each, on validation rows that are cut from the training side.

The first trial is the method as it is; the others spread evenly over rates (a tenth to ten times its own, on a logarithmic scale) and over
the sizes that the method names, by Halton's sequence: no trial repeats another, and more of them fill the gaps. A trial that is hopeless
is ended early: after a third of its steps, its validation loss is above the median of what the trials before it had reached by then (after
the median stopping rule of Golovin et al. 2017, "Google Vizier"). The smallest validation loss wins. Test rows are never looked at.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import on_disk
from .adapter import detach
from .api import begin
from .engine.train import Report, Settings
from .identity import data_print, hashed, identity_of
from .progress import note
from .task import Task, set_apart
from .watched import fit_with_bar

if TYPE_CHECKING:
    from .bench import Bench
    from .contenders import Contender

FILE = "trials.jsonl"
DECADES = 1.0
"""A rate is at most so many powers of ten from the method's own."""
PATIENCE = 3
"""A trial is not judged before this measurement, of ten."""
VALIDATION = 300
"""Rows to validate on at most; never more than a tenth of the training rows."""


class _HopelessError(Exception):
    """This trial will not win."""


@dataclass
class Trial:
    """One candidate: what was tried, and its validation loss at each tenth of its steps."""

    options: dict[str, Any]
    lr: float
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str | None = None
    """`hopeless`, or why training ended early."""
    key: str = ""

    @property
    def loss(self) -> float:
        """The smallest; infinity where there is none, or training diverged."""
        return min((x for x in self.losses if math.isfinite(x)), default=math.inf)


def candidates(method: Any, rate: float, trials: int, fixed: Sequence[str]) -> list[tuple[dict[str, Any], float]]:
    """(options, rate) of every trial; `fixed` are options, or `lr`, that somebody has chosen already."""
    sizes = [{}, *(s for s in method.sizes if not set(s) & set(fixed))]
    found: list[tuple[dict[str, Any], float]] = [({}, rate)]
    for i in range(1, trials):
        factor = 1.0 if "lr" in fixed else 10 ** (DECADES * (2 * _halton(i + 1, 2) - 1))
        found.append((dict(sizes[int(_halton(i, 3) * len(sizes))]), float(f"{rate * factor:.2g}")))
    unique: list[tuple[dict[str, Any], float]] = []
    for candidate in found:  # with a rate that is fixed, few are left
        if candidate not in unique:
            unique.append(candidate)
    return unique


def _halton(i: int, base: int) -> float:
    """The i-th number of van der Corput's sequence: the digits of i behind the point, in reverse."""
    value, share = 0.0, 1.0
    while i:
        share /= base
        value += share * (i % base)
        i //= base
    return value


def hopeless(losses: Sequence[float], others: Sequence[Trial]) -> bool:
    """Whether a trial should end now: it is behind the median of those that have come as far."""
    at = len(losses)
    reached = [min(t.losses[:at]) for t in others if len(t.losses) >= at]
    return at >= PATIENCE and len(reached) >= 2 and min(losses) > statistics.median(reached)


def search(bench: Bench, who: Contender, settings: Settings, trials: int, folder: Path) -> Trial:
    """The best of so many trials of the run that `settings` are for. Those in `folder` from before are not made again."""
    assert who.method is not None
    task = _with_validation(bench.task, bench.config.seed)
    rows, checked = bench.writer.examples(task.train)[0], bench.writer.examples(task.validation)[0]
    fixed = [o.partition("=")[0] for o in who.name.split(":")[1:]] + (["lr"] if who.lr or bench.config.lr else [])
    done = {trial.key: trial for trial in _read(folder)}
    found: list[Trial] = []
    for number, (options, lr) in enumerate(candidates(who.method, settings.lr, trials, fixed), 1):
        method = replace(who.method, **options)
        told = {**bench.shared, "method": who.name, "options": asdict(method), "lr": lr, "steps": settings.steps}
        told |= {"batch_size": settings.batch_size, "seed": settings.seed, "checked": data_print(task.validation)}
        begin(bench.base, method, task, bench.writer, seed=bench.config.seed)
        try:
            key = hashed(identity_of(bench.base, task, told))
            if key in done:
                found.append(done[key])
                continue
            title = f"{who.title}, trial {number} of {trials}"
            trial = _try(bench, Trial(options, lr, key=key), settings, title, (rows, checked), found)
        finally:
            detach(bench.base.model)
        found.append(trial)
        _write(folder, [*done.values(), *(t for t in found if t.key not in done)])
    best = min(found, key=lambda t: t.loss)
    chosen = ", ".join([f"lr={best.lr:g}", *(f"{k}={v}" for k, v in best.options.items())])
    note(f"{who.title}: of {len(found)} trials the best has {chosen} (validation loss {best.loss:.4f})")
    return best


def _with_validation(task: Task, seed: int) -> Task:
    if task.validation:
        return task
    train, validation = set_apart(task.train, max(1, min(VALIDATION, len(task.train) // 10)), seed)
    return replace(task, train=train, validation=validation)


def _try(
    bench: Bench, trial: Trial, settings: Settings, title: str, data: tuple[Any, Any], others: Sequence[Trial]
) -> Trial:
    rows, checked = data

    def watch(report: Report) -> None:
        if len(report.validation) > len(trial.losses):
            trial.losses.append(report.validation[-1][1])
            if hopeless(trial.losses, others):
                raise _HopelessError

    start = time.perf_counter()
    try:
        result = fit_with_bar(bench.base, rows, replace(settings, lr=trial.lr), title, validation=checked, also=watch)
    except _HopelessError:
        trial.stopped = "hopeless"
    else:
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        trial.stopped = result.stopped
        if result.stopped is not None:
            trial.losses.append(math.inf)
    trial.seconds = time.perf_counter() - start
    return trial


def _read(folder: Path) -> Iterator[Trial]:
    if (folder / FILE).is_file():
        for text in (folder / FILE).read_text(encoding="utf-8").splitlines():
            try:
                told = json.loads(text)
                yield Trial(**{**told, "losses": [math.inf if x is None else float(x) for x in told["losses"]]})
            except (ValueError, TypeError, KeyError):
                continue  # it is made again


def _write(folder: Path, trials: Sequence[Trial]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(t) | {"losses": [x if math.isfinite(x) else None for x in t.losses]} for t in trials]
    on_disk.write(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
