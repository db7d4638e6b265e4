"""Following a computation: which tensors are alive when, what they are for, and how much work is done.

A `Follower` sees every operation (torch's dispatch mode) and the birth and death of every tensor's storage. It does not care
whether the tensors have numbers: a simulation is followed like the real thing, which is how the tests compare the two.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.attention.varlen  # names its operations
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

PARTS = ("weights", "adapter", "gradients", "optimiser", "copies", "activations", "loss", "workspace", "process")
"""What memory is for. Copies: of the adapter and its optimiser, to undo an update that fails. Process: Python, its libraries and
the device's context; nobody sees it here."""

Work = Counter[tuple[int, int, int]]
"""How often an operation of so many (floating-point operations, bytes read and written, bytes a number) is done."""


class Follower(TorchDispatchMode):
    """Bytes alive by part, and their highest sum in each phase of a step; `rounding` is the allocator's grain."""

    def __init__(self, rounding: int = 1) -> None:
        super().__init__()
        self.rounding = rounding
        self.alive: dict[int, tuple[int, str]] = {}
        self.bytes: Counter[str] = Counter()
        self.total = 0
        self.part, self.phase = "activations", "forward"
        self.highest: dict[str, tuple[int, dict[str, int]]] = {}
        self.work: Work = Counter()

    def start(self) -> None:
        """Forget peaks and work so far; what is alive stays."""
        self.highest, self.work = {}, Counter()

    def peaks(self) -> dict[str, dict[str, int]]:
        """By phase, the bytes of every part when most was alive."""
        return {phase: parts for phase, (_, parts) in self.highest.items()}

    def mark(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what tensors are for, from now on."""
        for t in tensors:
            if t is not None:
                self._count(t, part, anew=True)

    def _count(self, t: Tensor, part: str, *, anew: bool = False) -> bool:
        """Account for a tensor; whether its storage is new."""
        storage = t.untyped_storage()
        key = storage._cdata
        known = self.alive.get(key)
        if known is not None and not anew:
            return False
        if known is None:
            size = -(-storage.nbytes() // self.rounding) * self.rounding
            weakref.finalize(storage, self._gone, key)
            self.total += size
        else:
            size, before = known
            self.bytes[before] -= size
        self.alive[key] = size, part
        self.bytes[part] += size
        return known is None

    def _gone(self, key: int) -> None:
        size, part = self.alive.pop(key)
        self.bytes[part] -= size
        self.total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return float(args[0].dtype != torch.bool)  # a check answers no; Adafactor asks for a norm, any number does
        out = func(*args, **kwargs)
        backward = torch._C._current_graph_task_id() != -1
        part = "activations" if backward and self.part == "loss" else self.part
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [self._count(t, part) for t in found]
        if any(new) or func._schema.is_mutable:  # else it is another view of the same numbers
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            flops = _COUNTED.get(func._overloadpacket)
            self.work[
                (
                    int(flops(*args, **kwargs, out_val=out)) if flops else 0,
                    sum(t.numel() * t.element_size() for t in (*given, *found)),
                    found[0].element_size() if found else 0,
                )
            ] += 1
        phase = "backward" if backward else self.phase
        if phase not in self.highest or self.total > self.highest[phase][0]:
            self.highest[phase] = self.total, dict(self.bytes)
        return out


def _fused(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _fused_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _rows(
    query: Any, key: Any, value: Any, begins: Any, key_begins: Any, *args: Any, products: int = 2, **kwargs: Any
) -> int:
    """FlashAttention over rows: its two products, of the pairs of query and key that are seen. Where rows begin has numbers."""
    with unset_fake_temporarily():
        lengths = zip(begins.diff().tolist(), key_begins.diff().tolist(), strict=True)
    pairs = sum(n * m - n * (n - 1) // 2 for n, m in lengths)
    return int(2 * products * query.shape[1] * query.shape[2] * pairs)


def _rows_backward(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    begins: Any,
    key_begins: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _rows(query, key, value, begins, key_begins, products=5)


_COUNTED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
    **flop_registry,
    torch.ops.torch_attn._varlen_attn: _rows,
    torch.ops.torch_attn._varlen_attn_backward: _rows_backward,
}
