"""The one training loop: every method, every command, every benchmark goes through it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from ..adapter import attached, folded, know, living, parts, rewind, snapshot, trainable
from ..attention import rows_apart
from ..base import Base
from ..errors import InputError
from ..method import Part, Retrained
from ..tokens import Example
from .batches import Batch, check_packing, collate, keeps_apart, pack, schedule
from .lean import lean
from .loss import labelled_loss
from .memory import peak_bytes, reset_peak


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. Units: steps are optimiser updates, rates are per update."""

    steps: int = 100
    batch_size: int = 8
    accumulate: int = 1
    """Batches whose gradients make one update: the same result as one batch of all their rows, in less memory."""
    packing: bool | None = None
    """Put a batch's texts into one row instead of padding them; None: wherever the model can keep them apart."""
    lean: bool = True
    """Norms and gates of our own in place of transformers', where they do the same: see `engine.lean`. For debugging."""
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
    cut: int = 0
    """Rows that were longer than the context and were cut."""
    stopped: str | None = None
    """None, `interrupted` (Ctrl-C) or `diverged` (a loss or gradient that is not finite)."""

    def add(self, loss: float, batches: Sequence[Batch], seconds: float, peak: int) -> None:
        """Account for one finished step."""
        self.losses.append(loss)
        self.seconds += seconds
        self.examples += sum(len(b.examples) for b in batches)
        self.tokens += sum(b.tokens for b in batches)
        self.peak_bytes = peak

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
    if name not in living(base.model):
        raise InputError(f"nothing to train: the adapter {name!r} is attached but not live")
    if name in folded(base.model):
        raise InputError(f"nothing to train: the adapter {name!r} is merged into the weights; unmerge it first")
    if base.model.dtype == torch.float16:
        raise InputError("a float16 base cannot be trained here: its gradients underflow; use bfloat16 or float32")
    if not examples:
        raise InputError("nothing to train on: no rows")
    if base.random:
        raise InputError(
            f"the {base.random[0]} of {base.name} is random and must be trained too: name it in modules_to_save"
        )
    know(base.model, attached(base.model)[name].scheduled(settings.steps), name)
    method, own = attached(base.model)[name], parts(base.model, name)
    parameters = trainable(base.model, name)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    report = Report()
    reset_peak(base.device)
    good = snapshot(base.model, name)
    others = [p for other in living(base.model) if other != name for p in trainable(base.model, other)]
    for p in others:  # they run along, frozen
        p.requires_grad_(False)
    try:
        with prepared(base, settings.packing, settings.lean) as tensors:
            stream = schedule(
                examples,
                settings.batch_size,
                settings.steps * settings.accumulate,
                settings.seed,
                by_length=tensors is collate,
            )
            for step in range(settings.steps):
                start = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(step, settings)
                batches = [tensors(base, rows) for rows in itertools.islice(stream, settings.accumulate)]
                loss = gradients(base, batches, parameters)
                if (penalty := method.penalty(own)) is not None:
                    penalty.backward()
                if step == 0:
                    _check_reached(own)
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
                if not math.isfinite(loss):
                    raise _DivergedError  # the last update made it so
                good = snapshot(base.model, name)  # these tensors gave a finite loss
                if not math.isfinite(norm):
                    raise _DivergedError  # and this update would spoil them
                optimizer.step()
                method.after_step(own, step + 1)
                report.add(loss, batches, time.perf_counter() - start, peak_bytes(base.device))
                if on_step:
                    on_step(report)
        if not all(bool(p.isfinite().all()) for p in parameters):
            raise _DivergedError
    except (KeyboardInterrupt, _DivergedError) as stop:
        report.stopped = "interrupted" if isinstance(stop, KeyboardInterrupt) else "diverged"
        rewind(base.model, good, name)  # an interrupted update may have been cut in the middle
    finally:
        for p in others:
            p.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
    return report


@contextmanager
def prepared(
    base: Base, packing: bool | None = None, own_layers: bool = True
) -> Iterator[Callable[[Base, list[Example]], Batch]]:
    """Inside, the model trains; what it is given are batches made by the function that this yields: `pack` or `collate`.

    `packing` of None packs where the model keeps packed texts apart; True raises `InputError` where it does not.
    `own_layers` of False leaves norms and gates as `transformers` has them.
    """
    if packing:
        check_packing(base)
    elif packing is None:
        packing = keeps_apart(base)
    base.model.train()
    try:
        with (
            lean(base.model) if own_layers else nullcontext(),
            rows_apart(base.model) if packing else nullcontext(),
        ):
            yield pack if packing else collate
    finally:
        base.model.eval()


class _DivergedError(Exception):
    """The loss, a gradient or a weight is no longer finite."""


def _check_reached(own: Mapping[str, Part]) -> None:
    """A module that is trained as a whole must be called: another adapter's copy of it may run in its place."""
    for path, part in own.items():
        if isinstance(part, Retrained) and all(p.grad is None for p in part.parameters()):
            raise InputError(
                f"{path} is to be trained as a whole, but the model never calls it, or another live adapter's copy runs "
                f"instead: train one at a time, with live(model, name)"
            )


def gradients(base: Base, batches: Sequence[Batch], parameters: Sequence[torch.nn.Parameter]) -> float:
    """Fresh gradients of the mean loss over all labelled tokens of all batches; returns that loss.

    Each batch is weighted by its own labelled tokens, so that many small batches give what one large one would (dividing
    every batch by its own count, and then by the number of batches, would not).
    """
    for p in parameters:
        p.grad = None
    labelled = sum(b.targets.numel() for b in batches)
    total = torch.zeros((), device=base.device)
    for batch in batches:
        loss = labelled_loss(base.model, batch, labelled)
        loss.backward()
        total += loss.detach()
    return total.item()  # waits for an accelerator, so that the clock is honest
