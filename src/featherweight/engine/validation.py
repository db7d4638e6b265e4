"""Which parts are best: those with the smallest mean loss on rows that are neither trained on nor tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..method import Part
from ..tokens import Example
from .loss import labelled_loss
from .memory import free, out_of_memory
from .update import Learner, OutOfMemoryError

if TYPE_CHECKING:
    from .train import Report

TIMES = 10  # a run is validated so often


def tensors_of(own: Mapping[str, Part]) -> dict[str, Tensor]:
    """All tensors of an adapter's parts as they are, by `path/name`: parameters, and buffers whether saved or not."""
    return {
        f"{path}/{name}": t
        for path, part in own.items()
        for name, t in (*part.named_parameters(), *part.named_buffers())
    }


@torch.no_grad()
def put_tensors(own: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors_of` back."""
    for name, t in tensors_of(own).items():
        t.copy_(tensors[name])


def validate(learner: Learner, report: Report, rows: Sequence[Example]) -> bool:
    """At each tenth of the run, once: measure the loss on `rows`; whether it is the smallest so far. It is kept in `learner.best`."""
    step, steps = report.steps, learner.settings.steps
    due = step * TIMES // steps > (step - 1) * TIMES // steps
    if not rows or not due or any(known == step for known, _ in report.validation):
        return False
    loss, (_, smallest) = mean_loss(learner, rows), report.best
    report.validation.append((step, loss))
    if not loss < smallest:  # nor is what is no number
        return False
    learner.best = {name: t.detach().clone() for name, t in tensors_of(learner.own).items()}
    return True


def mean_loss(learner: Learner, rows: Sequence[Example]) -> float:
    """The mean loss over all labelled tokens of `rows`, without dropout; fewer rows are read at a time where memory runs out."""
    by_length, micro = sorted(rows, key=lambda e: len(e.ids)), learner.micro
    learner.base.model.eval()
    try:
        while True:
            try:
                return _loss(learner, [by_length[i : i + micro] for i in range(0, len(by_length), micro)])
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
            if micro == 1:
                raise OutOfMemoryError
            free(learner.base.device)
            micro = (micro + 1) // 2
    finally:
        learner.base.model.train()


@torch.no_grad()
def _loss(learner: Learner, pieces: Sequence[list[Example]]) -> float:
    total = labelled = 0.0
    for piece in pieces:
        learner.stop.check()
        batch = learner.tensors(learner.base, piece)
        n = batch.targets.numel()
        total += float(labelled_loss(learner.base.model, batch, n)) * n
        labelled += n
    return total / labelled
