"""Training and evaluating with a bar that a person can watch: loss, speed, memory, accuracy so far, time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .base import Base
from .checkpoints import Checkpoints
from .engine.train import Report, Settings, fit
from .progress import bar, mebibytes, note
from .scoring import EVAL_BATCH, Score, evaluate
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
    also: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Train the live adapter; `also` is called after each step too."""
    micro, compact = settings.micro_batch or settings.batch_size, False
    with bar(f"{title}: train", settings.steps) as progress:

        def on_step(r: Report) -> None:
            nonlocal micro, compact
            if r.compact and not compact:
                compact = True
                note(
                    f"{title}: memory ran out with one row at a time; freed memory is handed back at once now: up to 1.7 times slower"
                )
            if r.micro_batch < micro:
                micro = r.micro_batch
                note(f"{title}: memory ran out; from here on {micro} rows are read at a time, with the same result")
            recent = [loss for loss in r.losses[-10:] if math.isfinite(loss)]
            progress.update(
                r.steps,
                f"loss {sum(recent) / max(1, len(recent)):.3f} · {r.steps_per_second:.2f} it/s · {mebibytes(r.peak_bytes)}",
            )
            also(r)

        return fit(base, examples, settings, on_step=on_step, checkpoints=checkpoints, validation=validation)


def evaluate_with_bar(
    base: Base, task: Task, writer: Writer, metric: str, title: str, batch_size: int = EVAL_BATCH
) -> Score:
    """Evaluate whatever is live."""
    with bar(f"{title}: evaluate", len(task.test)) as progress:
        score = evaluate(
            base, task, writer, metric=metric, batch_size=batch_size,
            on_batch=lambda done, right: progress.update(done, f"accuracy {right / done:.1%}"),
        )  # fmt: skip
    if score.cut:
        note(f"{score.cut:,} of {score.n:,} test rows were longer than {writer.max_length} tokens and were cut")
    return score
