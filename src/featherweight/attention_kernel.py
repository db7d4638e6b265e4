"""Attention over packed rows in one kernel: FlashAttention for rows of any lengths, where a GPU has it.

PyTorch's `varlen_attn` (FlashAttention-2, arXiv:2307.08691) takes the rows' queries one after the other and the rows' keys one after
the other, and is told where each row begins. A row's last query sees its last key, the one before it the key before it, and so
on back, so that a row may have more keys than queries: what all rows see stands in front of each row's own keys. That
copies a few keys; no scores are ever stored, and a batch is one call however many rows it has.

Tried before it is trusted: the first time for a device, a type and sizes, it attends to a few rows beside our own products
(`attention_blocks.py`), forward and backward, and is used only if both agree to rounding; `chosen()` tells. It has never run on a GPU: the
tests make its calls on tensors that have no numbers, and on a CPU with a stand-in of PyTorch's function.
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
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import varlen

from .attention_blocks import attend_in_blocks
from .layout import Layout

TRIED, WINDOWS = Layout(3, (5, 300, 17, 1)), (None, 16, 100)  # more keys than the kernel holds at once
AGREE = 0.05
"""Distance of results and gradients in half precision from those of products in float32, relative to these. With the kernel's
roundings it was 0.003 to 0.009 for the sizes of common models, and 0.034 at worst; of a wrong mask it is 0.2 and more."""

_VERDICTS: dict[tuple[Any, ...], str] = {}
RIGHT = "it agrees"


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


@functools.lru_cache(maxsize=8)
def rows_of(layout: Layout, extra: int, device: torch.device) -> _Rows:
    """`extra` keys stand in front of the tokens'. What is shared is a row whose keys are all rows'."""
    front = extra + layout.shared
    lengths = [n for n in layout.lengths if n]
    queries = ([layout.shared] if layout.shared else []) + lengths
    owned = ([0] if layout.shared else []) + lengths  # keys that a row sees alone
    seen, own, shared, place, key = [], [], [], 0, front
    for n in owned:
        seen += [torch.arange(front), torch.arange(key, key + n)]
        shared.append(torch.arange(place, place + front))
        own.append(torch.arange(place + front, place + front + n))
        place, key = place + front + n, key + n
    keys = [front + n for n in owned]
    begins = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (queries, keys)]
    parts = [torch.cat(x).int() for x in (seen, own, shared)]
    together = torch.cat([*begins, *parts]).to(device)  # one copy to the device, not five that wait for it
    begin, key_begin, *rest = together.split([len(x) for x in (*begins, *parts)])
    return _Rows(front, begin, key_begin, (max(queries), max(keys)), *rest)


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
    rows = rows_of(layout, k.shape[0] - q.shape[0], q.device)
    if rows.front:
        k, v = (_ForEveryRow.apply(x, rows) for x in (k, v))
    more: dict[str, Any] = (
        {"enable_gqa": True} if k.shape[1] != q.shape[1] and _asks_for_groups(varlen.varlen_attn) else {}
    )
    out: Any = varlen.varlen_attn(
        q, k, v, rows.begins, rows.key_begins, *rows.longest,
        scale=scaling, window_size=(window - 1 if window else -1, 0), **more,
    )  # fmt: skip
    return out


@functools.cache
def _asks_for_groups(function: Any) -> bool:
    """Whether PyTorch's function wants to be told that heads share keys: that of 2.11 takes them as they come."""
    return "enable_gqa" in inspect.signature(function).parameters


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention is for such types and sizes at all."""
    return q.dtype in (torch.bfloat16, torch.float16) and v.shape[2] == q.shape[2]


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel is there for such tensors, and has proved right for them."""
    if not _accelerated(q) or not fits(q, k, v) or any(x.stride(-1) != 1 for x in (q, k, v)):
        return False
    key = (q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])
    if key not in _VERDICTS:
        _VERDICTS[key] = _verdict(*key)
    return _VERDICTS[key] == RIGHT


def chosen() -> dict[str, str]:
    """What was found in this process, by device, type, heads, key heads and size."""
    return {"rows at once " + " ".join(map(str, key)): verdict for key, verdict in _VERDICTS.items()}


def _accelerated(x: Tensor) -> bool:
    """On a GPU, and with numbers in it: not one of a simulation's."""
    return x.is_cuda and type(x) is Tensor and not torch.compiler.is_compiling()


def _verdict(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> str:
    """`RIGHT` if it attends, and finds gradients, as our products do in float32; else what is wrong.

    Whoever calls may be checkpointing or not want gradients: the trial is none of that.
    """
    seq = TRIED.shared + sum(TRIED.lengths)

    def waves(n: int, count: int) -> Tensor:
        numbers = torch.arange(n * count * size, dtype=torch.float32, device=device)
        return numbers.mul_(0.37 + 0.001 * n).sin_().mul_(2).view(n, count, size).to(dtype)

    def as_it_is(x: Tensor) -> Tensor:
        return x

    try:
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(as_it_is, as_it_is):
            given = (waves(seq, heads), waves(seq + 2, kv_heads), waves(seq + 2, kv_heads).roll(1, 0))
            for window in WINDOWS:
                found, exact = (
                    _both(attend, [x.to(kind) for x in given], window)
                    for attend, kind in ((attend_at_once, dtype), (attend_in_blocks, torch.float32))
                )
                off = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
                if not off <= AGREE:
                    return f"{off:.0%} off"
    except torch.OutOfMemoryError:  # says nothing about the kernel: another time
        raise
    except Exception as error:  # no kernel for this card, this size, this version
        return f"{type(error).__name__}: {error}"
    return RIGHT


def _both(attend: Any, given: list[Tensor], window: int | None) -> list[Tensor]:
    """What comes out, and the gradients."""
    inputs = [x.detach().requires_grad_(True) for x in given]
    out = attend(*inputs, TRIED, window, given[0].shape[2] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, inputs, out.detach())]
