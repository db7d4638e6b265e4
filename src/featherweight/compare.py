"""`compare`: train and evaluate every method the same way, with every seed.

Nothing here trains or measures by itself: a run is `attach` + `fit` + `evaluate` + `detach` on one base in memory.
What is on disk is rewritten after every run, and a run that is there already is not repeated: a comparison that was
interrupted goes on where it stopped, and one with a method or a seed more adds only those.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import provenance, report
from .adapter import count, detach
from .adapter_folder import save
from .api import begin
from .base import Base
from .checkpoints import Checkpoints, finite
from .contenders import Contender
from .engine.train import Report, Settings, fit
from .identity import check_base, data_print, identity_of
from .progress import bar, mebibytes, note
from .results import Line, entries, read, verdict
from .run_folder import CHECKPOINTS
from .scoring import Score, evaluate, majority
from .task import Task
from .tokens import Example, Writer

ADVICE = (
    "memory ran out with one row at a time; try --checkpoint-activations layer, --quantize nf4 or a shorter --max-length, "
    "and see `featherweight plan` for what fits"
)


def fit_with_bar(
    base: Base,
    examples: Sequence[Example],
    settings: Settings,
    title: str,
    *,
    checkpoints: Checkpoints | None = None,
    validation: Sequence[Example] = (),
) -> Report:
    """Train the live adapter with a progress bar: loss, speed, memory, time left."""
    micro = settings.micro_batch or settings.batch_size
    with bar(f"{title}: train", settings.steps) as progress:

        def on_step(r: Report) -> None:
            nonlocal micro
            if r.micro_batch < micro:
                micro = r.micro_batch
                note(f"{title}: memory ran out; from here on {micro} rows are read at a time, with the same result")
            recent = [loss for loss in r.losses[-10:] if math.isfinite(loss)]
            progress.update(
                r.steps,
                f"loss {sum(recent) / max(1, len(recent)):.3f} · {r.steps_per_second:.2f} it/s · {mebibytes(r.peak_bytes)}",
            )

        return fit(base, examples, settings, on_step=on_step, checkpoints=checkpoints, validation=validation)


def evaluate_with_bar(base: Base, task: Task, writer: Writer, metric: str, title: str, batch_size: int = 32) -> Score:
    """Evaluate with a progress bar: accuracy so far, time left."""
    with bar(f"{title}: evaluate", len(task.test)) as progress:
        score = evaluate(
            base, task, writer, metric=metric, batch_size=batch_size,
            on_batch=lambda done, right: progress.update(done, f"accuracy {right / done:.1%}"),
        )  # fmt: skip
    if score.cut:
        note(f"{score.cut:,} of {score.n:,} test rows were longer than {writer.max_length} tokens and were cut")
    return score


@dataclass(frozen=True)
class Comparison:
    """What is compared on what, and how: all runs share the base, the rows, and the settings but for rate and seed."""

    base: Base
    task: Task
    writer: Writer
    contenders: Sequence[Contender]
    settings: Settings
    seeds: int = 1
    """So many runs of each contender, with `settings.seed` and those after it; the split of the rows stays the same."""
    lr: float | None = None
    """None: every method's own measured default."""
    metric: str = "auto"
    told: Mapping[str, Any] = field(default_factory=dict)
    """Settings that decide what is learned, for the runs' identity."""

    def runs(self) -> list[Run]:
        """All of them, seed by seed, so that a comparison that ends early has something of every method."""
        return [
            self._run(contender, self.settings.seed + i) for i in range(self.seeds) for contender in self.contenders
        ]

    def _run(self, contender: Contender, seed: int) -> Run:
        method = contender.method
        lr = self.lr if self.lr is not None else method.rate(self.base.classifies)
        place = contender.folder if self.seeds == 1 else f"{contender.folder}/seed-{seed}"
        return Run(contender, replace(self.settings, lr=lr, seed=seed), place)

    def identity(self, run: Run) -> dict[str, Any]:
        """All that decides a run's result; the adapter is attached."""
        own = {"method": run.contender.name, "options": asdict(run.contender.method), "lr": run.settings.lr}
        tested = {"tested": data_print(self.task.test), "metric": self.metric}
        return identity_of(self.base, self.task, {**self.told, **own, **tested, "seed": run.settings.seed})


@dataclass(frozen=True)
class Run:
    """One contender with one seed, and its place in the comparison's folder."""

    contender: Contender
    settings: Settings
    place: str


def compare(asked: Comparison, folder: Path) -> tuple[list[Line], list[str], int | None]:
    """The runs' results; notes: what there is to beat, and what can be said; the signal that ended it, if one did.

    Everything is saved in `folder` at once. Runs that are finished there already are not repeated, and one that was
    interrupted goes on from its checkpoint. Ctrl-C and SIGTERM end the comparison: the adapter in training is saved as it is, and
    the rows that are complete stay.
    """
    base, task, writer = asked.base, asked.task, asked.writer
    examples, _ = writer.examples(task.train)
    known = {line.identity: line for line in read(folder)}
    lines: list[Line] = []
    notes, ended = baselines(base, task, writer, asked.metric), None
    runs = asked.runs()
    for run in runs:
        method = run.contender.method
        begin(base, method, task, writer, seed=run.settings.seed)
        identity = asked.identity(run)
        key = _hash(identity)
        title = run.contender.title + (f", seed {run.settings.seed}" if asked.seeds > 1 else "")
        try:
            if key in known:
                note(f"{title}: done before")
                lines.append(known.pop(key))
                continue
            check = partial(check_base, base, identity)
            # By identity: one that was interrupted under other settings may lie beside it, and is not this run's.
            where = folder / run.place / f"{CHECKPOINTS}-{key}"
            checkpoints = Checkpoints(where, identity, check=check, tell=note)
            result = fit_with_bar(base, examples, run.settings, title, checkpoints=checkpoints)
            save(base.model, folder / run.place)
            if result.signal is not None:
                ended = result.signal
                raise KeyboardInterrupt
            if result.stopped == "out of memory":
                notes.append(f"{title} was left out: {ADVICE}")
                continue
            lines.append(_line(asked, run, result, key))
            shutil.rmtree(where, ignore_errors=True)
        except KeyboardInterrupt:
            ended = ended or signal.SIGINT
            notes.append(f"interrupted during {title}; the rows above are complete; the same command goes on")
            break
        finally:
            detach(base.model)
            report.save(folder, lines, notes, list(known.values()))
    notes += [*blind_spots(lines, task), *verdict(lines)]
    return lines, notes, ended


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def blind_spots(lines: Sequence[Line], task: Task) -> list[str]:
    """What an accuracy hides: macro-F1 (the mean over seeds), and classes that no method ever answers."""
    if not task.labels or not lines:
        return []
    found = entries(lines)
    scores = ((e.runs[0].method, sum(run.macro_f1 for run in e.runs) / len(e.runs)) for e in found)
    notes = ["macro-F1: " + ", ".join(f"{method} {100 * f1:.1f} %" for method, f1 in scores)]
    answers = [row.answer for row in task.test]
    for label in task.labels:
        if share := answers.count(label) / len(answers):
            blind = [e.runs[0].method for e in found if not any(label in run.predictions for run in e.runs)]
            if blind:
                who = "no method" if len(blind) == len(found) else ", ".join(blind) + " never"
                notes.append(f"{who} answers {label!r}, which {100 * share:.1f} % of the test rows are")
    return notes


def baselines(base: Base, task: Task, writer: Writer, metric: str) -> list[str]:
    """What there is to beat, in words: the untouched model and the most frequent answer."""
    if base.random:
        notes = ["untouched model: none, its head for these labels is random; every method trains the head as well"]
    else:
        zero = evaluate_with_bar(base, task, writer, metric, "untouched model")
        notes = [f"untouched model: {report.accuracy_cell(zero.correct, zero.n, zero.interval)}"]
    if task.labels:
        most = majority(task)
        notes.append(f"majority class ({most.predictions[0]}): {100 * most.accuracy:.1f} %")
    return notes


def _line(asked: Comparison, run: Run, result: Report, key: str) -> Line:
    base, task = asked.base, asked.task
    total, trained = count(base.model)
    score = evaluate_with_bar(base, task, asked.writer, asked.metric, run.contender.title)
    right = [p == a for p, a in zip(score.predictions, score.answers, strict=True)]
    return Line(
        name=run.contender.name, method=run.contender.title, batch_size=run.settings.batch_size,
        total_params=total, trainable_params=trained, peak_bytes=result.peak_bytes,
        train_steps=result.steps, train_seconds=result.seconds, train_examples=result.examples,
        eval_batches=score.batches, eval_seconds=score.seconds, eval_examples=score.n,
        correct=score.correct, accuracy=score.accuracy, interval=score.interval, macro_f1=score.macro_f1,
        metric=score.metric, lr=run.settings.lr, losses=finite(result.losses), predictions=score.predictions,
        stopped=result.stopped, provenance={**provenance.record(), "dtype": str(base.model.dtype), "device": str(base.device)},
        seed=run.settings.seed, right=right, identity=key,
    )  # fmt: skip
