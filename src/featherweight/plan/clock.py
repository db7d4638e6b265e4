"""How long an update takes: what the simulation counted, at the rates of a device.

    seconds = scale · Σ over operations (max(floating-point operations / rate, bytes / bandwidth) + overhead)

The rates of a card are the vendor's; those of this machine are measured in less than half a minute (`calibrate`): products in the
model's own shapes, one pass over memory, and the overhead of an operation from updates of a tiny model of the same architecture,
which does nothing else. `scale` is the error that is left, as `benchmarks/plan_error.py` found it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..base import Base
from .cards import Card
from .follow import Work

LAUNCH = 10e-6  # seconds that starting an operation takes, where nothing was measured: Python, dispatch and launch


@dataclass(frozen=True)
class Rates:
    """How fast a device is; `flops` by the bytes of a number."""

    name: str
    flops: dict[int, float]
    bandwidth: float
    overhead: float
    measured: bool = False


def seconds(work: Work, rates: Rates, scale: float = 1.0) -> float:
    """The time of one update."""
    total = 0.0
    for (operations, moved, size), n in work.items():
        rate = rates.flops.get(size) or rates.flops[min(rates.flops)]
        total += n * (max(operations / rate, moved / rates.bandwidth) + rates.overhead)
    return scale * total


ORDINARY_CPU = Rates("an ordinary CPU", {2: 2e11, 4: 2e11}, 2e10, LAUNCH)
"""Two cores of a server, roughly: not to say how long something takes, but which of two ways takes longer."""


def rates_of(card: Card) -> Rates:
    """A card at what its vendor says."""
    return Rates(card.name, {2: card.flops, 4: card.flops / 2}, card.bandwidth, LAUNCH)


def calibrate(
    config: Any, tokens: int, dtype: torch.dtype, device: torch.device, tiny: tuple[Base, Work, Any]
) -> Rates:
    """Measure this machine. `tiny`: a real small base, the work of one update of it, and a function that does that update."""
    text = config if config.is_encoder_decoder else config.get_text_config()
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or 4 * width
    rows = max(16, min(tokens, 2048))
    flops = {}
    for kind in {dtype, torch.float32}:
        x, w = torch.randn(rows, width, device=device).to(kind), torch.randn(inner, width, device=device).to(kind)
        flops[x.element_size()] = 2 * rows * width * inner / _timed(lambda x=x, w=w: F.linear(x, w), device)  # type: ignore[misc]
    a = torch.randn(rows, inner, device=device).to(dtype)
    bandwidth = 3 * a.nbytes / _timed(lambda: F.silu(a) * a, device) * 5 / 3  # two passes: 2 and 3 tensors
    _, work, update = tiny
    spent = _timed(update, device, least=5)
    bare = Rates("", flops, bandwidth, 0.0)
    overhead = max(1e-6, (spent - seconds(work, bare)) / sum(work.values()))
    return Rates("this machine", flops, bandwidth, overhead, measured=True)


def _timed(run: Callable[[], Any], device: torch.device, least: int = 10, limit: float = 3.0) -> float:
    """The median of at least so many runs, of as many as fit into half a second, never longer than the limit."""
    run()
    taken: list[float] = []
    while (len(taken) < least or sum(taken) < 0.5) and sum(taken) < limit:
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
