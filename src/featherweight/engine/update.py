"""One update of the parts: the very code that `fit` runs and `plan` simulates.

An update that runs out of memory is undone — parameters, optimiser, random numbers — and made again of smaller pieces. Each
piece is weighted by its own labelled tokens, so that many small batches give what one large one would: the run goes on as
if nothing had happened.

On a float16 base, small gradients would be rounded to zero. There the loss is multiplied by a large scale before the backward
pass and gradients are divided by it after, in float32 (Micikevicius et al. 2018, "Mixed Precision Training",
arXiv:1710.03740, section 3.2). Where the scale was too large, they are infinite: the update is skipped and the scale halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..adapter import attached, parts, trainable
from ..base import Base
from ..tokens import Example
from .batches import Batch
from .loss import labelled_loss
from .memory import free, hand_back, out_of_memory
from .optimizers import build_optimizer
from .stopping import Stop, StopRequested

SCALE, GROW_AFTER = 2.0**16, 200  # where the loss scale starts, and after how many good updates it is doubled
GIVE_UP_AFTER = 10  # updates in a row that are not finite: then it is not the rows
Collate = Callable[[Base, list[Example]], Batch]


class DivergedError(Exception):
    """The loss, a gradient or a weight is no longer finite. `rows` are those of the batch that cause it each by itself."""

    def __init__(self, rows: Sequence[Example] = ()) -> None:
        super().__init__()
        self.rows = list(rows)


class OutOfMemoryError(Exception):
    """Not even one row at a time fits."""


@dataclass
class Before:
    """All that an update changes."""

    tensors: list[Tensor]
    states: dict[Any, dict[str, Any]] | None
    """The optimiser's; None leaves them as they are."""
    random: list[Tensor]
    scaling: tuple[float, int, int]


class Learner:
    """An adapter with its optimiser. `micro` is how many rows are read at a time; it only ever shrinks."""

    def __init__(
        self, base: Base, settings: Any, tensors: Collate, name: str = "default", stop: Stop | None = None
    ) -> None:
        self.base, self.settings, self.tensors, self.stop, self.name = base, settings, tensors, stop or Stop(), name
        self.method, self.own = attached(base.model)[name], parts(base.model, name)
        self.parameters = trainable(base.model, name)
        self.optimizer = build_optimizer(settings.optimizer, self.parameters, settings.lr, settings.weight_decay)
        self.micro: int = settings.micro_batch or settings.batch_size
        self.compact = False
        """Whether freed memory goes back to the system at once: slower."""
        self.scaling = base.model.dtype == torch.float16
        self.scale = SCALE if self.scaling else 1.0
        self.skipped = self.good = 0
        self.left_out: list[str] = []  # places of rows that were not finite, of updates that `skip_nonfinite` left out
        self.nonfinite = self.bad_in_a_row = 0
        self.best: dict[str, Tensor] = {}  # the parts' tensors at the smallest validation loss
        self.before = self.state()

    def gradients(self, rows: Sequence[list[Example]]) -> tuple[Tensor, Tensor, list[Batch]]:
        """Clipped gradients of the mean loss over some batches of rows; returns that loss, and the norm before clipping."""
        pieces = [batch[i : i + self.micro] for batch in rows for i in range(0, len(batch), self.micro)]
        batches = [self.tensors(self.base, piece) for piece in pieces]
        loss = gradients(self.base, batches, self.parameters, self.scale, self.stop.check)
        if (penalty := self.method.penalty(self.own)) is not None:
            penalty.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        return loss, norm, batches

    def update(
        self, rows: Sequence[list[Example]], check: Callable[[], None] | None = None
    ) -> tuple[float, list[Batch]]:
        """One update; returns the loss. Out of memory, it is undone and made again of half as many rows at a time. Where that is one row,
        on a CPU, it is tried once more with all that is freed handed back at once.

        Raises `DivergedError` where a loss or gradient is not finite, with the parameters as they were; what gave the last
        finite loss is in `self.before`. Raises `OutOfMemoryError` where that does not fit either, and `StopRequested`
        after a signal, with everything as it was.
        """
        while True:
            before = self.state()
            try:
                loss, norm, batches = self.gradients(rows)
                if check:
                    check()
                total = loss.item()  # waits for an accelerator, so that the clock is honest
                if math.isfinite(total):
                    self.before = before  # these tensors gave a finite loss
                    if self._too_large(norm):
                        return total, batches
                if not (math.isfinite(total) and math.isfinite(norm)):
                    self._refuse(rows, before)  # the update would spoil them
                    return total, batches
                self.bad_in_a_row = 0
                self.optimizer.step()
                return total, batches
            except StopRequested:
                self.restore(before)
                raise
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
            # Here, not in the handler: there the error still holds every tensor of the steps that failed.
            self.restore(before)
            free(self.base.device)
            if self.micro == 1:
                if self.compact or self.base.device.type != "cpu" or not hand_back():
                    raise OutOfMemoryError
                self.compact = True
                continue
            self.micro = (min(self.micro, max(map(len, rows))) + 1) // 2

    def _refuse(self, rows: Sequence[list[Example]], before: Before) -> None:
        """Name the rows whose loss or gradient is not finite; with `skip_nonfinite` go on without this update."""
        causes = [row for batch in rows for row in batch if not self._is_finite(row)]
        self.restore(before)
        self.bad_in_a_row += 1
        if not self.settings.skip_nonfinite or self.bad_in_a_row > GIVE_UP_AFTER:
            raise DivergedError(causes)
        self.nonfinite += 1
        self.left_out += [row.row.place for row in causes]

    def _is_finite(self, row: Example) -> bool:
        """Whether a row by itself has a finite loss and finite gradients."""
        loss = gradients(self.base, [self.tensors(self.base, [row])], self.parameters)
        found = [p.grad for p in self.parameters if p.grad is not None]
        return math.isfinite(loss.item()) and all(bool(g.isfinite().all()) for g in found)

    def _too_large(self, norm: Tensor) -> bool:
        """Whether the loss scale made the gradients infinite; it is halved then, and raised again after many that were not."""
        if not self.scaling or self.scale < 1:  # a smaller scale would not help: the model itself is beyond float16
            return False
        if math.isfinite(norm):
            self.good += 1
            if self.good % GROW_AFTER == 0:
                self.scale *= 2
            return False
        self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        return True

    def rehearse(self, rows: Sequence[list[Example]]) -> None:
        """An update that is undone: does it fit? `micro` is what fits afterwards."""
        states = dict(self.optimizer.state)  # set aside, not copied: paged ones cannot be
        self.optimizer.state.clear()
        before, last, counts = self.state(), self.before, (list(self.left_out), self.nonfinite, self.bad_in_a_row)
        try:
            self.update(rows)
        except DivergedError:
            pass  # the same will be seen, and told, where it happens
        finally:
            self.restore(before)
            self.optimizer.state.update(states)
            self.before, (self.left_out, self.nonfinite, self.bad_in_a_row) = last, counts

    def state(self) -> Before:
        """A copy of all that an update changes. Paged states are not copied once they exist: a copy would not be paged."""
        paged = self.settings.optimizer.startswith("paged") and bool(self.optimizer.state)
        states = None if paged else {p: _copied(state) for p, state in self.optimizer.state.items()}
        tensors = [p.detach().clone() for p in self.parameters]
        return Before(tensors, states, random_states(self.base.device), (self.scale, self.good, self.skipped))

    @torch.no_grad()
    def restore(self, before: Before) -> None:
        """Put a `state` back, and forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for p, kept in zip(self.parameters, before.tensors, strict=True):
            p.copy_(kept)
        if before.states is not None:
            self.optimizer.state.clear()
            self.optimizer.state.update({p: _copied(state) for p, state in before.states.items()})
        self.scale, self.good, self.skipped = before.scaling
        set_random_states(self.base.device, before.random)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the random number generators that a step draws from."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Put `random_states` back; those of another kind of device say nothing here."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


def gradients(
    base: Base,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    scale: float = 1.0,
    check: Callable[[], None] = lambda: None,
) -> Float[Tensor, ""]:
    """Fresh gradients of the mean loss over all labelled tokens of all batches; returns that loss.

    On the way back through the model they are multiplied by `scale`. `check` is called before each batch.

    Each batch is weighted by its own labelled tokens, so that many small batches give what one large one would (dividing
    every batch by its own count, and then by the number of batches, would not).
    """
    for p in parameters:
        p.grad = None
    labelled = sum(b.targets.numel() for b in batches)
    total = torch.zeros((), device=base.device)
    for batch in batches:
        check()
        loss = labelled_loss(base.model, batch, labelled)
        (loss * scale if scale != 1 else loss).backward()
        total += loss.detach()
    if scale != 1:
        for p in parameters:
            if p.grad is not None:
                p.grad /= scale
    return total
