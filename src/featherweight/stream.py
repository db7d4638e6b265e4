"""A base that is larger than the memory: its blocks are brought in one by one, the next while one computes.

A block is one layer of a stack: of Llama's `model.layers`, or of T5's `encoder.block` and `decoder.block`. A frozen weight is
needed twice a step, forward and backward, and never changes, so it can be fetched each time:

    forward    0 → 1 → … → n          backward    n → … → 1 → 0

A hook in front of every block, and one on the gradient of its output, say which block is needed now. The next is the one
that came next the last time. All others are let go. There are two places to stream to:

* A CPU, from `disk`: weights are views of memory-mapped files (pages.py). Nothing is copied: the kernel is asked for the
  next block's pages and told that the others' are not needed.
* An accelerator, from `ram` (pinned) or `disk`: two slots on the device, each as large as the largest block; a thread copies
  the next block into one while the other computes. Block i always lies in slot i mod 2. So whatever autograd or a
  quantised layer keeps a view of is right again when its block is back, with activation checkpointing or without.
  This has not been run on a GPU: the tests run it with a CPU as the device.

What it costs: reading the weights twice a step. Embeddings, head and all that is trained stay where the model computes. A
streamed base is read-only: merging into it is refused.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .errors import InputError
from .pages import Pages
from .quant import is_quantised, kind
from .slots import Slots

Source = Literal["ram", "disk"]
Blocks = list[list[nn.Parameter]]


def check_source(source: str, device: torch.device) -> None:
    """Can a base be streamed from here to this device? Raises `InputError` where it cannot."""
    if source == "ram" and device.type == "cpu":
        raise InputError("--stream-base ram: on a CPU the base is in RAM anyway; to need less of it, use disk")
    if source == "disk" and sys.platform != "linux":
        raise InputError("--stream-base disk works on Linux only; elsewhere use none, or ram with an accelerator")


@contextmanager
def streamed(model: nn.Module, device: torch.device, source: Source) -> Iterator[None]:
    """Inside, the frozen weights of the model's blocks are on `device` only while they are needed, the rest always.

    The model comes on the CPU and is there again afterwards. Adapters may be attached before or inside.
    """
    stream = start(model, device, source)
    try:
        yield
    finally:
        stream.stop()


def start(model: nn.Module, device: torch.device, source: Source) -> Stream:
    """Stream until `stop`, or for good."""
    check_source(source, device)
    if device.type == "cpu":
        return Stream(model, Pages)
    return Stream(model, functools.partial(Slots, device=device, pinned=source == "ram"))


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers: members of the outermost lists of modules, in the model's order."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            elif name != "parts":  # an adapter's own
                look(child)

    look(model)
    if not found:
        raise InputError(f"--stream-base: {type(model).__name__} has no list of layers to bring in one by one")
    return found


def _frozen(model: nn.Module, layers: list[nn.Module]) -> Blocks:
    """The weights of each block that come and go: neither trained nor an adapter's, and used nowhere else."""
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    blocks = []
    for layer in layers:
        for module in layer.modules():
            if is_quantised(module) and kind(module) != "Linear4bit":
                raise InputError(
                    f"--stream-base: {kind(module)} keeps its weight in a form that cannot be streamed; "
                    f"use a base that is not quantised, or one in 4 bits (bitsandbytes)"
                )
        own = (p for name, p in layer.named_parameters() if ".parts." not in f".{name}")
        blocks.append([p for p in own if not p.requires_grad and uses[id(p)] == 1 and p.numel()])
    if not any(blocks):
        raise InputError("--stream-base: no weight of the layers is frozen; attach an adapter first")
    return blocks


class Place(Protocol):
    """Where blocks are brought to."""

    def bring(self, here: int, coming: int | None) -> None:
        """Have block `here` ready, begin to fetch block `coming`, and let others go."""

    def stop(self) -> None:
        """Leave every weight as it is at rest: on the CPU."""


class Stream:
    """The hooks, which follow the computation from block to block."""

    def __init__(self, model: nn.Module, place: Callable[[nn.Module, list[nn.Module], Blocks], Place]) -> None:
        layers = find_blocks(model)
        blocks = _frozen(model, layers)
        self.count, self.before, self.here = len(layers), -1, -1
        self.learned: dict[tuple[int, int], int] = {}
        self.place = place(model, layers, blocks)
        self.versions = [(p, p._version) for block in blocks for p in block]
        self.hooks: list[Any] = []
        for i, layer in enumerate(layers):
            self.hooks.append(layer.register_forward_pre_hook(functools.partial(self._before, i)))
            self.hooks.append(layer.register_forward_hook(functools.partial(self._watch_gradient, i)))

    def stop(self) -> None:
        """Take the hooks away; weights are at rest again."""
        for hook in self.hooks:
            hook.remove()
        self.place.stop()

    def _before(self, i: int, *_: Any) -> None:
        self._enter(i)

    def _watch_gradient(self, i: int, layer: nn.Module, args: Any, out: Any) -> None:
        """The gradient of a block's output arrives right before the block's backward pass, recomputation included."""
        tensors = (out,) if isinstance(out, Tensor) else tuple(out.values() if isinstance(out, dict) else out)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._enter(i))
                break

    @torch.compiler.disable
    def _enter(self, i: int) -> None:
        if any(p._version != version for p, version in self.versions):
            raise InputError("a streamed base is read-only, but a weight was changed; merge without --stream-base")
        if i != self.here:
            self.learned[self.before, self.here] = i
            self.before, self.here = self.here, i
        straight_on = self.here + (1 if self.before < self.here else -1)
        coming = self.learned.get((self.before, self.here), straight_on)
        self.place.bring(i, coming if 0 <= coming < self.count else None)
