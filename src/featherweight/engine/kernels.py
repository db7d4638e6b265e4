"""Which of two ways a small step goes on an accelerator: PyTorch's operations, or one kernel.

A norm or a gate (`lean.py`) is about ten operations of PyTorch, each of which starts a program on the device and reads and writes
all of its numbers. Written in Triton (`fused.py`) it is one program forward and one backward. What is gained depends on device,
driver, compiler and size, so nothing is assumed:

* Tried before it is trusted. Where a kernel would be used for the first time (for a device, types and a width), it and the formula
  compute the same few rows on that device, forward and backward. It is used if every number agrees to rounding.
* Used where it wins. Both are then timed on the numbers at hand. The faster one is used from then on.
* Else the formula: on a CPU, in float64, where there is no Triton or no compiler, where anything is raised, for tensors that have no
  numbers (a simulation's), and while `torch.compile` traces, which fuses by itself. `chosen()` tells the reason.

A trial takes seconds, most of them the compiler's, whose results stay on disk. It draws no random numbers. Which way wins
near a tie can differ from run to run, and with it the last bits: on an accelerator they do anyway (`docs/never-lose-work.md`).
Never run on a GPU yet: the tests run the kernels in Triton's interpreter, and the choice on a CPU.
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

AGREE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""How far a number may be off, of itself plus the typical one: rounding, and the order of sums. Other types stay with the formula."""
ROWS = 7  # of a first trial: odd, so that a block of an elementwise kernel is not full
AT_MOST = 2**23  # numbers that are timed: enough to fill a device, 16 MiB in bfloat16
ROUNDS, TIMES = 3, 5


class Way(NamedTuple):
    """A step's two halves. What is kept between them are the step's tensors and what `forward` returns behind its result."""

    forward: Callable[..., tuple[Tensor, ...]]
    """(inputs …) → (y, more to keep …)"""
    backward: Callable[..., tuple[Tensor, ...]]
    """(dy, input tensors …, what else was kept …) → the gradients"""

    def both(self, inputs: tuple[Any, ...], dy: Tensor | None = None) -> list[Tensor]:
        """The result and the gradients; `dy` is the result itself where it does not matter."""
        y, *kept = self.forward(*inputs)
        return [y, *self.backward(y if dy is None else dy, *(t for t in inputs if isinstance(t, Tensor)), *kept)]


_CHOSEN: dict[tuple[Any, ...], tuple[Way, str]] = {}


def best(name: str, formula: Way, *inputs: Any) -> Way:
    """The kernel of this name in `fused.py` if it does what `formula` does, and faster, for such inputs; else `formula`."""
    x = inputs[0]
    if torch.compiler.is_compiling() or not accelerated(x.device) or x.dtype not in AGREE or not x.numel():
        return formula
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):  # fake, or one that computes in its own way
        return formula
    key = (name, x.device, *((t.dtype, t.shape[-1]) for t in tensors))
    if key not in _CHOSEN:
        try:
            _CHOSEN[key] = choose(lambda: kernel(name), formula, inputs)
        except torch.OutOfMemoryError:  # says nothing about the kernel: another time
            return formula
    return _CHOSEN[key][0]


@functools.cache
def accelerated(device: torch.device) -> bool:
    """Whether there is something to write kernels for."""
    there = torch.accelerator.current_accelerator()
    return there is not None and there.type == device.type


def chosen() -> dict[str, str]:
    """What was decided in this process, and why."""
    return {" ".join(map(str, key)): reason for key, (_, reason) in _CHOSEN.items()}


def kernel(name: str) -> Way:
    """The one in Triton; `ImportError` where there is none."""
    found: Way = getattr(importlib.import_module(".fused", __package__), name)
    return found


@torch.no_grad()
def choose(candidate: Callable[[], Way], formula: Way, inputs: tuple[Any, ...]) -> tuple[Way, str]:
    """`candidate()` if it agrees with `formula` and is faster on `inputs`, else `formula`; and why."""
    try:
        way = candidate()
        sample = tuple(_waves(t, i) if isinstance(t, Tensor) else t for i, t in enumerate(inputs))
        dy = _waves(inputs[0], len(inputs))
        for ours, theirs in zip(way.both(sample, dy), formula.both(sample, dy), strict=True):
            if not agree(ours, theirs):
                return formula, "the kernel's numbers are not the formula's"
        part = tuple(_few(t) if isinstance(t, Tensor) else t for t in inputs)
        seconds = dict.fromkeys((way, formula), math.inf)
        for w in (way, formula) * (1 + ROUNDS):  # the first round warms up: its time is the longest
            seconds[w] = min(seconds[w], _seconds(w, part))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver may say
        return formula, f"{type(error).__name__}: {error}"
    times = seconds[formula] / seconds[way]
    return way if times > 1 else formula, f"the kernel is {times:.2f} times as fast"


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether they are the same but for rounding, number by number: a norm would forgive a single wrong one."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    a, b, limit = ours.float(), theirs.float(), AGREE[theirs.dtype]
    return bool(((a - b).abs() <= limit * (b.abs() + b.square().mean().sqrt())).all())  # NaN is not


def _waves(like: Tensor, i: int) -> Tensor:
    """A few rows with numbers between -2 and 2 of the same type and width, others for every `i`; what is a vector stays one."""
    shape = like.shape if like.dim() == 1 else (ROWS, like.shape[-1])
    numbers = torch.arange(math.prod(shape), dtype=torch.float32, device=like.device)
    return numbers.mul_(0.7 + 0.4 * i).sin_().mul_(2).to(like.dtype).view(shape)


def _few(t: Tensor) -> Tensor:
    return t if t.dim() == 1 else t.reshape(-1, t.shape[-1])[: max(1, AT_MOST // t.shape[-1])]


def _seconds(way: Way, inputs: tuple[Any, ...]) -> float:
    device = inputs[0].device
    wait = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    wait()
    start = time.perf_counter()
    for _ in range(TIMES):
        way.both(inputs)
    wait()
    return time.perf_counter() - start
