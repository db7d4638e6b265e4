"""One update of the parts: the very code that `fit` runs and `plan` simulates.

An update that runs out of memory is undone — parameters, optimiser, random numbers — and made again of smaller pieces. Each
piece is weighted by its own labelled tokens, so that many small batches give what one large one would: the run goes on as
if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import attached, parts, trainable
from ..base import Base
from ..tokens import Example
from .batches import Batch
from .loss import labelled_loss
from .memory import free, out_of_memory
from .optimizers import build_optimizer

Collate = Callable[[Base, list[Example]], Batch]


class DivergedError(Exception):
    """The loss, a gradient or a weight is no longer finite."""


class OutOfMemoryError(Exception):
    """Not even one row at a time fits."""


@dataclass
class Before:
    """All that an update changes."""

    tensors: list[Tensor]
    states: dict[Any, dict[str, Any]] | None
    """The optimiser's; None leaves them as they are."""
    random: list[Tensor]


class Learner:
    """An adapter with its optimiser. `micro` is how many rows are read at a time; it only ever shrinks."""

    def __init__(self, base: Base, settings: Any, tensors: Collate, name: str = "default") -> None:
        self.base, self.settings, self.tensors = base, settings, tensors
        self.method, self.own = attached(base.model)[name], parts(base.model, name)
        self.parameters = trainable(base.model, name)
        self.optimizer = build_optimizer(settings.optimizer, self.parameters, settings.lr, settings.weight_decay)
        self.micro: int = settings.batch_size
        self.before = self.state()

    def gradients(self, rows: Sequence[list[Example]]) -> tuple[Tensor, Tensor, list[Batch]]:
        """Clipped gradients of the mean loss over some batches of rows; returns that loss, and the norm before clipping."""
        pieces = [batch[i : i + self.micro] for batch in rows for i in range(0, len(batch), self.micro)]
        batches = [self.tensors(self.base, piece) for piece in pieces]
        loss = gradients(self.base, batches, self.parameters)
        if (penalty := self.method.penalty(self.own)) is not None:
            penalty.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        return loss, norm, batches

    def update(
        self, rows: Sequence[list[Example]], check: Callable[[], None] | None = None
    ) -> tuple[float, list[Batch]]:
        """One update; returns the loss. Out of memory, it is undone and made again of half as many rows at a time.

        Raises `DivergedError` where a loss or gradient is not finite, with the parameters as they were; what gave the last
        finite loss is in `self.before`. Raises `OutOfMemoryError` where one row at a time does not fit.
        """
        while True:
            before = self.state()
            try:
                loss, norm, batches = self.gradients(rows)
                if check:
                    check()
                total = loss.item()  # waits for an accelerator, so that the clock is honest
                if not math.isfinite(total):
                    raise DivergedError  # the last update made it so
                self.before = before  # these tensors gave a finite loss
                if not math.isfinite(norm):
                    raise DivergedError  # and this update would spoil them
                self.optimizer.step()
                return total, batches
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
            # Here, not in the handler: there the error still holds every tensor of the steps that failed.
            self.restore(before)
            free(self.base.device)
            if self.micro == 1:
                raise OutOfMemoryError
            self.micro = (min(self.micro, max(map(len, rows))) + 1) // 2

    def rehearse(self, rows: Sequence[list[Example]]) -> None:
        """An update that is undone: does it fit? `micro` is what fits afterwards."""
        before = self.state()
        try:
            self.update(rows)
        except DivergedError:
            pass  # the same will be seen, and told, where it happens
        finally:
            self.restore(before)
            self.before = before

    def state(self) -> Before:
        """A copy of all that an update changes. Paged states are not copied once they exist: a copy would not be paged."""
        paged = self.settings.optimizer.startswith("paged") and bool(self.optimizer.state)
        states = None if paged else {p: _copied(state) for p, state in self.optimizer.state.items()}
        return Before([p.detach().clone() for p in self.parameters], states, random_states(self.base.device))

    @torch.no_grad()
    def restore(self, before: Before) -> None:
        """Put a `state` back, and forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for p, kept in zip(self.parameters, before.tensors, strict=True):
            p.copy_(kept)
        if before.states is not None:
            self.optimizer.state.clear()
            self.optimizer.state.update({p: _copied(state) for p, state in before.states.items()})
        set_random_states(self.base.device, before.random)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the random number generators that a step draws from."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Put `random_states` back."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


def gradients(base: Base, batches: Sequence[Batch], parameters: Sequence[nn.Parameter]) -> Tensor:
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
    return total
