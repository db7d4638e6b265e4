"""`compare`: train and evaluate every method the same way, one row each.

Nothing here trains or measures by itself: a row is `attach` + `fit` + `evaluate` + `detach` on one base in memory.
The table on disk is rewritten after every row, so an interrupted comparison keeps what it has.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import provenance, report
from .adapter import attached, count, detach
from .adapter_folder import save
from .api import begin
from .base import Base
from .checkpoints import Checkpoints
from .engine.train import Report, Settings, fit
from .method import Method
from .methods import method_name
from .progress import bar, mebibytes, note
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


def compare(
    base: Base,
    task: Task,
    writer: Writer,
    methods: Sequence[Method],
    settings: Settings,
    *,
    lr: float | None = None,
    metric: str = "auto",
    folder: Path,
) -> tuple[list[report.Line], list[str], int | None]:
    """One `Line` per method; notes: the untouched base and the majority class; the signal that ended it, if one did.

    Everything is saved in `folder`. `lr` of None gives every method its own measured default. Ctrl-C and SIGTERM end the
    comparison: the adapter in training is saved as it is, and the rows that are complete stay.
    """
    examples, _ = writer.examples(task.train)
    lines: list[report.Line] = []
    notes, ended = baselines(base, task, writer, metric), None
    for method in methods:
        chosen = replace(settings, lr=lr if lr is not None else method.rate(base.classifies))
        begin(base, method, task, writer, seed=settings.seed)
        try:
            result = fit_with_bar(base, examples, chosen, method.title)
            save(base.model, folder / method_name(method))
            if result.signal is not None:
                ended = result.signal
                raise KeyboardInterrupt
            if result.stopped == "out of memory":
                notes.append(f"{method.title} was left out: {ADVICE}")
                continue
            lines.append(_row(base, task, writer, result, chosen, metric))
        except KeyboardInterrupt:
            ended = ended or signal.SIGINT
            notes.append(f"interrupted during {method.title}; the rows above are complete")
            break
        finally:
            detach(base.model)
            report.save(folder, lines, notes)
    notes += blind_spots(lines, task)
    return lines, notes, ended


def blind_spots(lines: Sequence[report.Line], task: Task) -> list[str]:
    """What an accuracy hides: macro-F1, and classes that no method ever answers."""
    if not task.labels or not lines:
        return []
    notes = ["macro-F1: " + ", ".join(f"{line.method} {100 * line.macro_f1:.1f} %" for line in lines)]
    answers = [row.answer for row in task.test]
    for label in task.labels:
        if share := answers.count(label) / len(answers):
            blind = [line.method for line in lines if label not in line.predictions]
            if blind:
                who = "no method" if len(blind) == len(lines) else ", ".join(blind) + " never"
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


def _row(base: Base, task: Task, writer: Writer, result: Report, settings: Settings, metric: str) -> report.Line:
    method = attached(base.model)["default"]
    total, trained = count(base.model)
    score = evaluate_with_bar(base, task, writer, metric, method.title)
    return report.Line(
        name=method_name(method), method=method.title, batch_size=settings.batch_size,
        total_params=total, trainable_params=trained, peak_bytes=result.peak_bytes,
        train_steps=result.steps, train_seconds=result.seconds, train_examples=result.examples,
        eval_batches=score.batches, eval_seconds=score.seconds, eval_examples=score.n,
        correct=score.correct, accuracy=score.accuracy, interval=score.interval, macro_f1=score.macro_f1,
        metric=score.metric, lr=settings.lr, losses=result.losses, predictions=score.predictions,
        stopped=result.stopped, provenance={**provenance.record(), "dtype": str(base.model.dtype), "device": str(base.device)},
    )  # fmt: skip
