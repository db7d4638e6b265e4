"""The one training loop: every method, every command, every benchmark goes through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..adapter import attached, rewind, snapshot, trainable
from ..base import Base
from ..errors import InputError
from ..tokens import Example
from .batches import collate, schedule
from .loss import labelled_loss
from .memory import peak_bytes, reset_peak


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. Units: steps are optimiser updates, rates are per update."""

    steps: int = 120
    batch_size: int = 8
    lr: float = 1e-3
    warmup: float = 0.06
    """Share of the steps over which the rate rises; it then falls linearly to zero."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass
class Report:
    """What a training run did. Times are of the steps alone: no loading, no tokenising."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    peak_bytes: int = 0
    stopped: str | None = None
    """None, `interrupted` (Ctrl-C) or `diverged` (a loss or gradient that is not finite)."""

    @property
    def steps(self) -> int:
        """Steps that were completed."""
        return len(self.losses)

    @property
    def steps_per_second(self) -> float:
        """Speed of the steps."""
        return self.steps / self.seconds if self.seconds else 0.0

    @property
    def examples_per_second(self) -> float:
        """Speed in rows."""
        return self.examples / self.seconds if self.seconds else 0.0


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then linear decay to zero at the last step."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * (settings.steps - step) / max(1, settings.steps - warm)


def fit(
    base: Base,
    examples: Sequence[Example],
    settings: Settings,
    *,
    name: str = "default",
    on_step: Callable[[Report], None] | None = None,
) -> Report:
    """Train the parts of adapter `name` on the examples; the base stays as it is.

    Ctrl-C and a loss that is not finite end the run early with the last good adapter in place; `Report.stopped` says so.
    Raises `InputError` when there is nothing to learn from.
    """
    if name not in attached(base.model):
        raise InputError(f"nothing to train: no adapter named {name!r} is attached")
    if not examples:
        raise InputError("nothing to train on: no rows")
    parameters = trainable(base.model, name)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    report = Report()
    base.model.train()
    reset_peak(base.device)
    good = snapshot(base.model, name)
    batches = schedule(examples, settings.batch_size, settings.steps, settings.seed)
    try:
        for step, rows in enumerate(batches):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, settings)
            batch = collate(base, rows)
            loss = labelled_loss(base.model, batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            value = loss.item()  # waits for an accelerator, so that the clock is honest
            if not (math.isfinite(value) and math.isfinite(float(norm))):
                report.stopped = "diverged"  # before the update: the adapter is the last good one
                break
            good = snapshot(base.model, name)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report.seconds += time.perf_counter() - start
            report.losses.append(value)
            report.examples += len(rows)
            report.tokens += int(batch.inputs["attention_mask"].sum())
            report.peak_bytes = peak_bytes(base.device)
            if on_step:
                on_step(report)
    except KeyboardInterrupt:
        report.stopped = "interrupted"
        rewind(base.model, good, name)  # the update may have been cut in the middle
    finally:
        optimizer.zero_grad(set_to_none=True)
        base.model.eval()
    return report
