"""Embeddings and the output head stay in the host's memory; the device gets what it needs of them, when it needs it.

A large vocabulary is a large part of a quantised model: of an 8-billion Qwen3 in NF4 the layers take 3.6 GB and the two matrices (words ×
width) that are not quantised 2.5 GB more. Frozen, they need not be where the model computes:

* Of the embeddings a batch reads as many rows as it has different words. They are looked up on the host, and a table of them
  goes to the device. Rows that were seen stay in that table, so a later batch brings only the words that are new.
* Of the head all rows are needed, but one after the other: piece by piece they pass through the device, the next on its way
  while one computes. What the loss needs of all of them at once is a sum, which can be had from pieces (`engine/loss.py`).

So in training the head crosses the bus once for each piece of a batch, forward and backward together: at 12 GB/s, 0.1 s for Qwen3's
(twice where the model does something after its head, as Gemma 2 does). Writing texts brings it once for every token: that is slow.

The two modules keep their names and weights, and their classes are swapped for subclasses whose `forward` asks the host; the
model says that it is on the device where it computes, though its first weight is not. A trained vocabulary cannot be kept so.
Not yet run on a GPU: the tests run it with a CPU as the device, and on tensors that have no numbers but are on a device of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .errors import InputError

TABLE = PIECE = 2**26
"""Bytes on the device: of the table of words that were seen, and of a piece of the head. Two pieces are there at a time."""


def check_offloading(device: torch.device) -> None:
    """Can the vocabulary be kept from this device? Raises `InputError` where that means nothing."""
    if device.type == "cpu":
        raise InputError(
            "--offload-vocabulary: on a CPU the vocabulary is in the host's memory anyway; to need less of it, use --stream-base disk"
        )


class Waiting:
    """A frozen matrix (words × width) on the host, and what of it is on the device."""

    def __init__(self, weight: nn.Parameter, device: torch.device) -> None:
        self.weight, self.device = weight, device
        self.beside: Any = None
        if device.type not in ("cpu", "meta") and torch.accelerator.is_available():
            self.beside = torch.Stream(device)
        self.row_bytes = weight.shape[1] * weight.element_size()
        self.place = torch.full((len(weight),), -1)
        """Where each word is in the table; -1: it is not."""
        self.known = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return self  # a stream cannot be copied, and what is frozen need not be

    @functools.cached_property
    def table(self) -> Float[Tensor, "rows width"]:
        """Room on the device for words that were seen; a head needs none."""
        rows = min(len(self.weight), max(1, TABLE // self.row_bytes))
        with torch.inference_mode(False):  # it is written to later, in whatever mode
            return self.weight.data.new_empty(rows, self.weight.shape[1], device=self.device)

    def look_up(self, ids: Int[Tensor, "*batch"]) -> tuple[Float[Tensor, "rows width"], Int[Tensor, "*batch"]]:
        """(a table, where in it each of the words is), both on the device."""
        ids = ids.cpu()
        words = ids.unique()
        if len(words) > len(self.table):  # more than it holds: a table for this once
            return self._bring(words), torch.searchsorted(words, ids).to(self.device)
        new = words[self.place[words] < 0]
        if self.known + len(new) > len(self.table):
            self.place.fill_(-1)
            self.known, new = 0, words
        self.table[self.known : self.known + len(new)] = self._bring(new)
        self.place[new] = torch.arange(self.known, self.known + len(new))
        self.known += len(new)
        return self.table, self.place[ids].to(self.device)

    def _bring(self, words: Int[Tensor, " words"]) -> Float[Tensor, "words width"]:
        return self.weight.data[words].to(self.device)

    def pieces(self, rows: int | None = None) -> Iterator[tuple[int, Float[Tensor, "rows width"]]]:
        """(the first word, the matrix's rows from there on) on the device, piece by piece; at most `rows` at a time.

        There are two buffers: a piece is overwritten when the next but one is asked for.
        """
        n = max(1, min(rows or len(self.weight), PIECE // self.row_bytes))
        starts, slots = range(0, len(self.weight), n), self._slots(n)
        if slots is None:
            yield from ((at, self.weight.data[at : at + n]) for at in starts)
            return
        self._pin()
        used: list[Any] = [None, None]  # when the device is through with a buffer
        if self.beside is not None:
            here = torch.accelerator.current_stream(self.device)
            used = [here.record_event()] * 2
        coming = self._send(0, slots[0], used[0])
        for i, at in enumerate(starts):
            piece, sent = coming
            if at + n < len(self.weight):
                coming = self._send(at + n, slots[(i + 1) % 2], used[(i + 1) % 2])
            if sent is not None:
                here.wait_event(sent)
            yield at, piece
            used[i % 2] = None if sent is None else here.record_event()

    def _slots(self, n: int) -> list[Tensor] | None:
        """Two buffers on the device; none where it is the host itself."""
        if self.weight.device == self.device:
            return None
        return [self.weight.data.new_empty(n, self.weight.shape[1], device=self.device) for _ in range(2)]

    def _pin(self) -> None:
        """A device reads such memory by itself, beside its work."""
        if self.beside is not None and not self.weight.is_pinned():
            self.weight.data = self.weight.data.pin_memory()

    def _send(self, at: int, slot: Tensor, used: Any) -> tuple[Tensor, Any]:
        """Begin to copy rows into a buffer; what it returns besides is an event, which happens when they are there."""
        rows = self.weight.data[at : at + len(slot)]
        with self.beside or nullcontext():
            if used is not None:
                self.beside.wait_event(used)
            piece = slot[: len(rows)].copy_(rows, non_blocking=True)
        return piece, None if self.beside is None else self.beside.record_event()


def keep_on_host(model: Any, device: torch.device) -> None:
    """Have the model's embeddings and head stay on the host while all else is moved to `device`, where it computes.

    For good: the model cannot train them any more. A head that is no plain matrix goes to the device.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weights = {id(w): w for m in (model.get_input_embeddings(), head) if (w := getattr(m, "weight", None)) is not None}
    waiting = dict[int, Waiting]()
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        forward = _words if isinstance(module, nn.Embedding) else _logits if type(module) is nn.Linear else None
        if weight is None or id(weight) not in weights or forward is None:
            continue
        if id(weight) not in waiting:
            weight.requires_grad_(False)
            weight.data = weight.data if weight.is_meta else weight.data.cpu()
            waiting[id(weight)] = Waiting(weight, device)
        module.__dict__["waiting"] = waiting[id(weight)]
        cls: Any = type(module)
        module.__class__ = _waits(cls, forward)
    for module in model.modules():
        if isinstance(getattr(type(module), "device", None), property):  # a model of transformers, and those inside it
            module.__dict__["_computes_on"] = device
            kind: Any = type(module)
            module.__class__ = _elsewhere(kind)


def waiting_at(module: Any) -> Waiting | None:
    """What `keep_on_host` keeps of this module."""
    found: Waiting | None = module.__dict__.get("waiting")
    return found


def refuse_training(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise `InputError` if one of these modules stays on the host: an adapter cannot be there."""
    for path in paths:
        if waiting_at(model.get_submodule(path)) is not None:
            raise InputError(
                f"--offload-vocabulary: {path} is to be trained, so it must be where the model computes; leave the flag out"
            )


def on_host(model: nn.Module) -> set[int]:
    """`id`s of the parameters that stay on the host."""
    return {id(m._parameters["weight"]) for m in model.modules() if waiting_at(m) is not None}


def _words(self: Any, cls: Any, ids: Tensor) -> Tensor:
    """The module's own forward, on a small table: some scale what they look up."""
    table, places = self.__dict__["waiting"].look_up(ids)
    weight, padding = self._parameters["weight"], self.padding_idx
    self._parameters["weight"], self.padding_idx = table, None
    try:
        found: Tensor = cls.forward(self, places)
    finally:
        self._parameters["weight"], self.padding_idx = weight, padding
    return found


def _logits(self: Any, cls: Any, x: Tensor) -> Tensor:
    out: Tensor = _Logits.apply(x, self.__dict__["waiting"], self.bias)
    return out


class _Logits(torch.autograd.Function):
    """x Wᵀ + b, W in pieces, of which none is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, waiting: Waiting, bias: Tensor | None) -> Tensor:
        ctx.waiting = waiting
        out = x.new_empty(*x.shape[:-1], len(waiting.weight))
        for at, piece in waiting.pieces() if x.numel() else ():
            own = None if bias is None else bias[at : at + len(piece)]
            out[..., at : at + len(piece)] = F.linear(x, piece, own)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exact = torch.promote_types(grad.dtype, torch.float32)
        dx = grad.new_zeros(*grad.shape[:-1], ctx.waiting.weight.shape[1], dtype=exact)
        for at, piece in ctx.waiting.pieces():
            dx += grad[..., at : at + len(piece)] @ piece
        return dx.to(grad.dtype), None, None


@functools.cache
def _waits(cls: Any, forward: Any) -> Any:
    """A subclass of the same name that reads its weight from the host, and does not take it along when it is moved."""

    @functools.wraps(cls.forward)
    def asks(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, cls, *args, **kwargs)

    def moved(self: Any, fn: Any, recurse: bool = True) -> Any:
        weight, self._parameters["weight"] = self._parameters["weight"], None
        try:
            return cls._apply(self, fn, recurse)
        finally:
            self._parameters["weight"] = weight

    return type(cls.__name__, (cls,), {"forward": asks, "_apply": moved, "__module__": cls.__module__})


@functools.cache
def _elsewhere(cls: Any) -> Any:
    """A subclass of the same name that says where it computes."""
    device = property(lambda self: self.__dict__["_computes_on"])
    return type(cls.__name__, (cls,), {"device": device, "__module__": cls.__module__})
