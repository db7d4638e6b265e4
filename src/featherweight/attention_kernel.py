"""Attention over packed rows in one kernel: FlashAttention for rows of any lengths, where a GPU has it.

PyTorch's `varlen_attn` (FlashAttention-2, arXiv:2307.08691) takes the rows' queries one after the other and the rows' keys one after
the other, and is told where each row begins. A row's last query sees its last key, the one before it the key before it, and so
on back, so that a row may have more keys than queries: what all rows see stands in front of each row's own keys. That
copies a few keys; no scores are ever stored, and a batch is one call however many rows it has.

Tried before it is trusted: the first time for a device, a type and sizes, it attends to a few rows beside our own products
(`attention_blocks.py`), forward and backward, and is used only if both agree to rounding. It has never run on a GPU: the tests call it with
tensors that have no numbers, and the same calls with a stand-in of PyTorch's function on a CPU.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import varlen

from .attention_blocks import attend_in_blocks
from .layout import Layout

TRIED = Layout(3, (5, 40, 17, 1))
AGREE = 0.01  # distance of half-precision results and gradients from float32's, relative to these


@dataclass(frozen=True)
class _Rows:
    """Where rows begin, and which keys they see.

    `seen` is the key at each place, rows one after the other: the `front` keys that all see, then the row's own. `own` are the places of
    the keys that one row sees alone, in order; `shared` the others, row by row.
    """

    front: int
    begins: Int[Tensor, " rows_and_end"]
    key_begins: Int[Tensor, " rows_and_end"]
    longest: tuple[int, int]
    seen: Int[Tensor, " key_places"]
    own: Int[Tensor, " own_keys"]
    shared: Int[Tensor, " front_places"]


@functools.lru_cache(maxsize=64)
def _rows_of(layout: Layout, extra: int, device: torch.device) -> _Rows:
    """`extra` keys stand in front of the tokens'. What is shared is a row whose keys are all rows'."""
    front = extra + layout.shared
    lengths = [n for n in layout.lengths if n]
    queries = ([layout.shared] if layout.shared else []) + lengths
    owned = ([0] if layout.shared else []) + lengths  # keys that a row sees alone
    parts, own, shared, place, key = [], [], [], 0, front
    for n in owned:
        parts += [torch.arange(front), torch.arange(key, key + n)]
        shared.append(torch.arange(place, place + front))
        own.append(torch.arange(place + front, place + front + n))
        place, key = place + front + n, key + n
    keys = [front + n for n in owned]
    begins, key_begins = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (queries, keys)
    )
    flat = (torch.cat(x).to(device) for x in (parts, own, shared))
    return _Rows(front, begins, key_begins, (max(queries), max(keys)), *flat)


class _ForEveryRow(torch.autograd.Function):
    """Keys (or values) as every row sees them; the gradients of those that many see are summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "keys heads size"], rows: _Rows) -> Float[Tensor, "places heads size"]:
        ctx.rows = rows
        return x.index_select(0, rows.seen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = ctx.rows
        many = grad.index_select(0, rows.shared).view(-1, rows.front, *grad.shape[1:])
        total = many.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
        return torch.cat([total, grad.index_select(0, rows.own)]), None


def attend_at_once(
    q: Float[Tensor, "seq heads size"],
    k: Float[Tensor, "keys kv_heads size"],
    v: Float[Tensor, "keys kv_heads size"],
    layout: Layout,
    window: int | None,
    scaling: float,
) -> Float[Tensor, "seq heads size"]:
    """softmax(s · q kᵀ) v within each row, in one kernel."""
    rows = _rows_of(layout, k.shape[0] - q.shape[0], q.device)
    if rows.front:
        k, v = (_ForEveryRow.apply(x, rows) for x in (k, v))
    more: dict[str, Any] = {"enable_gqa": True} if k.shape[1] != q.shape[1] and _asks_for_groups() else {}
    out: Any = varlen.varlen_attn(
        q, k, v, rows.begins, rows.key_begins, *rows.longest,
        scale=scaling, window_size=(window - 1 if window else -1, 0), **more,
    )  # fmt: skip
    return out


def _asks_for_groups() -> bool:
    """Whether `varlen_attn` wants to be told that heads share keys: PyTorch 2.11's takes it as it comes."""
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel is there for such tensors, and has proved right for them."""
    if not _accelerated(q) or q.dtype not in (torch.bfloat16, torch.float16) or v.shape[2] != q.shape[2]:
        return False
    return _agrees(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])


def _accelerated(x: Tensor) -> bool:
    """On a GPU, and with numbers in it: not one of a simulation's."""
    return x.is_cuda and type(x) is Tensor and not torch.compiler.is_compiling()


@functools.cache
def _agrees(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> bool:
    """Whether it attends, and finds gradients, as our products do in float32. Whatever it raises is a no."""
    seq = TRIED.shared + sum(TRIED.lengths)

    def waves(n: int, count: int) -> Tensor:
        numbers = torch.arange(n * count * size, dtype=torch.float32, device=device)
        return numbers.mul_(0.37 + 0.1 * n).sin_().mul_(2).view(n, count, size).to(dtype)

    given = (waves(seq, heads), waves(seq + 2, kv_heads), waves(seq + 2, kv_heads).roll(1, 0))
    try:
        for window in (None, 4):
            found, exact = (
                _both(attend, [x.to(kind) for x in given], window)
                for attend, kind in ((attend_at_once, dtype), (attend_in_blocks, torch.float32))
            )
            if not all(
                float((a.float() - b).norm()) <= AGREE * float(b.norm()) for a, b in zip(found, exact, strict=True)
            ):
                return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no kernel for this card, this size, this version
        return False
    return True


def _both(attend: Any, given: list[Tensor], window: int | None) -> list[Tensor]:
    """What comes out, and the gradients."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(True) for x in given]
        out = attend(*inputs, TRIED, window, given[0].shape[2] ** -0.5)
        return [out.detach(), *torch.autograd.grad(out, inputs, out.detach())]
