"""Attention over packed rows as products of matrices: nothing is computed for padding, and little for what nobody sees.

softmax(s · q kᵀ + mask) v, for rows of many lengths in few products. Rows are gathered in groups, keys padded to the longest. The
queries of a group are cut into blocks, and a block is multiplied with the keys up to its end only, since what comes later
nobody sees:

    keys  ──▶              of five blocks of a row's queries, the first is multiplied with a fifth of its keys, the last with all:
    ■ · · · ·              for long rows half of the work. A shorter row of the group has fewer blocks.
    ■ ■ · · ·
    ■ ■ ■ · ·              Nothing of the size of all scores is ever there: for the backward pass a block's are computed again, except
    ■ ■ ■ ■ ·              where rows are short. (That is FlashAttention's way with memory, arXiv:2205.14135; a block here has all
    ■ ■ ■ ■ ■              of its keys at once, so a plain softmax will do.)

Short rows are one group of one block: many small products cost more than padding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .layout import Layout

SHORT = 96  # rows up to here are one block, whatever their lengths
BLOCK = 64  # queries of a longer row that are multiplied together
WASTE = 2  # longer rows are a group while padding their keys to the longest costs less than this factor
LANES = 16  # keys of a block are a multiple of this: vector instructions take so many at a time
KEPT = 512  # keys of short rows, with what is in front of them, up to which their scores are kept for the backward pass
QUERIES = 8  # and its queries of this, so that few masks are needed


@dataclass(frozen=True)
class _Block:
    """Queries that are multiplied together: `width` a row of the `rows` longest of a group, from the row's place `first` on.

    A row's first place has `start` keys in front of it. Nobody sees what comes later, so the block needs `keys` keys and no more.
    """

    rows: int
    start: int
    first: int
    width: int
    keys: int

    def seen(self, window: int | None) -> slice:
        """The keys that some query of the block sees."""
        first = max(0, self.start + self.first - window + 1) if window else 0
        return slice(first // LANES * LANES, self.keys)


@dataclass(frozen=True)
class _Group:
    """Rows whose keys are gathered together. `k_at` says which (token, head) stands at each place, places ordered row, head, key."""

    rows: int
    keys: int
    k_at: Int[Tensor, " key_places"]
    blocks: tuple[_Block, ...]

    @property
    def short(self) -> bool:
        """Whether its scores are few enough to be kept."""
        return len(self.blocks) == 1 and self.keys <= KEPT


@dataclass(frozen=True)
class _Seats:
    """All groups, and who sits where.

    `q_at` is the (token, head) at each place of the queries, in each block of `sizes` places ordered row, key head, query head,
    position, so that what is gathered is a batch of matrices; `padding` are the places whose token stands elsewhere. `q_back` and
    `k_back` are the way back: each (token, head)'s place among all groups'. The `front` keys have none, as they are in every row.
    """

    groups: tuple[_Group, ...]
    front: int
    sizes: tuple[int, ...]
    q_at: Int[Tensor, " places"]
    padding: Int[Tensor, " padded"]
    q_back: Int[Tensor, " token_heads"]
    k_back: Int[Tensor, " row_token_key_heads"]

    def cut(
        self, places: Float[Tensor, "places size"], kv_heads: int
    ) -> Iterator[Float[Tensor, "matrices queries size"]]:
        """What stands at the queries' places, block by block."""
        blocks = (b for g in self.groups for b in g.blocks)
        for b, x in zip(blocks, places.split(self.sizes), strict=True):
            yield x.view(b.rows * kv_heads, -1, x.shape[1])


Rows = list[tuple[int, int]]  # the length of each, and its first token


def _together(layout: Layout) -> list[Rows]:
    """The rows of each group, the longest first."""
    firsts = itertools.accumulate(layout.lengths, initial=layout.shared)
    groups: list[Rows] = []
    for n, first in sorted((n, first) for n, first in zip(layout.lengths, firsts, strict=False) if n):
        tokens = n + sum(m for m, _ in groups[-1]) if groups else 0
        if groups and (n <= SHORT or n * (len(groups[-1]) + 1) <= WASTE * tokens):
            groups[-1].append((n, first))
        else:
            groups.append([(n, first)])
    return [group[::-1] for group in groups]


def _blocks(group: Rows, start: int) -> tuple[_Block, ...]:
    """Where the queries of a group's rows are cut, so that what comes after them is not multiplied."""
    longest = group[0][0]
    ends = range(BLOCK - start % (2 * LANES), longest, BLOCK) if longest > SHORT else ()
    blocks = []
    for first, end in itertools.pairwise([0, *ends, -(-longest // QUERIES) * QUERIES]):
        keys = -(-(start + end) // LANES) * LANES
        blocks.append(_Block(sum(n > first for n, _ in group), start, first, end - first, keys))
    return tuple(blocks)


@functools.lru_cache(
    maxsize=8
)  # all layers of a step ask for the same; another step hardly ever, and long rows' are large
def seats_of(layout: Layout, extra: int, heads: int, kv_heads: int, device: torch.device) -> _Seats:
    """Seat every token. `extra` keys stand in front of the tokens'. What is shared is a row whose keys are all rows'."""
    seq, front = layout.shared + sum(layout.lengths), extra + layout.shared
    q_back, k_back = (torch.empty(seq, n, dtype=torch.long) for n in (heads, kv_heads))
    groups, sizes, q_at, padding, k_places = [], list[int](), [], [], 0
    shared = [([(layout.shared, 0)], extra)] if layout.shared else []
    for rows, start in [*shared, *((rows, front) for rows in _together(layout))]:
        blocks, (length, first) = _blocks(rows, start), torch.tensor(rows).T[:, :, None]
        keys = max(b.keys for b in blocks)
        column = torch.arange(keys - start)
        own = first + column.minimum(length - 1)
        seen = torch.cat([torch.arange(start).expand(len(rows), -1), own + extra], 1)
        k_at = seen[:, None] * kv_heads + torch.arange(kv_heads)[None, :, None]  # row, head, key
        places = k_places + torch.arange(k_at.numel()).view(k_at.shape)[:, :, start:]
        k_back[own[column < length]] = places.transpose(1, 2)[column < length]
        k_places += k_at.numel()
        for b in blocks:
            column = torch.arange(b.first, b.first + b.width)
            token, seated = (x[: b.rows] for x in (first + column.minimum(length - 1), column < length))
            at = token[:, None] * heads + torch.arange(heads)[None, :, None]  # row, head, position
            places = sum(sizes) + torch.arange(at.numel()).view(at.shape)
            q_back[token[seated]] = places.transpose(1, 2)[seated]
            padding.append(places.transpose(1, 2)[~seated].flatten())
            q_at.append(at.flatten())
            sizes.append(at.numel())
        groups.append(_Group(len(rows), keys, k_at.flatten().to(device), blocks))
    flat = (torch.cat(q_at), torch.cat(padding), q_back.flatten(), k_back[layout.shared :].flatten())
    return _Seats(tuple(groups), front, tuple(sizes), *(x.to(device) for x in flat))


@functools.lru_cache(maxsize=64)
def visible(
    width: int, before: int, keys: int, window: int | None, repeats: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "queries keys"]:
    """What to add to the scores of `width` queries, the first of which is behind `before` keys: 0 for what each sees, else the minimum.

    Once for each of the `repeats` heads that share their keys.
    """
    distance = torch.arange(before, before + width)[:, None] - torch.arange(keys)
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return added.repeat(repeats, 1).to(device)


class _Blocks(torch.autograd.Function):
    """softmax(s · q kᵀ + mask) v within each row, from tokens to tokens: (seq, heads, size) → (seq, heads, size).

    Rows of a group are gathered into one batch of matrices, and cut into blocks of queries. A key counts for every block that sees
    it, so its gradients are summed. Scores are kept for short rows and computed again for longer ones.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scaling: float
    ) -> Tensor:
        heads, kv_heads = q.shape[1], k.shape[1]
        seats = seats_of(layout, k.shape[0] - q.shape[0], heads, kv_heads, q.device)
        ctx.seats, ctx.window, ctx.scaling, ctx.shapes = seats, window, scaling, (q.shape, k.shape, v.shape)
        flat_q, flat_k, flat_v = (x.reshape(-1, x.shape[2]) for x in (q, k, v))
        queries = flat_q.index_select(0, seats.q_at)
        saved: list[Tensor | None] = [queries]
        out, cut = list[Tensor](), seats.cut(queries, kv_heads)
        for g in seats.groups:
            gk, gv = (x.index_select(0, g.k_at).view(-1, g.keys, x.shape[1]) for x in (flat_k, flat_v))
            saved += [gk, gv]
            for b in g.blocks:
                matrices, seen = b.rows * kv_heads, b.seen(window)
                weights = _weights(next(cut), gk[:matrices, seen], b, window, scaling)
                out.append(torch.bmm(weights, gv[:matrices, seen]).view(-1, v.shape[2]))
                saved.append(weights if g.short else None)
        ctx.save_for_backward(*saved)
        return _joined(out).index_select(0, seats.q_back).view(q.shape[0], heads, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seats, (q_shape, k_shape, v_shape), kv_heads = ctx.seats, ctx.shapes, ctx.shapes[1][1]
        saved, exact = iter(ctx.saved_tensors), torch.promote_types(grad.dtype, torch.float32)
        queries = next(saved)
        grad = grad.reshape(-1, grad.shape[2]).index_select(0, seats.q_at).index_fill_(0, seats.padding, 0)
        cut = zip(seats.cut(queries, kv_heads), seats.cut(grad, kv_heads), strict=True)
        found: tuple[list[Tensor], ...] = ([], [], [])
        front = [grad.new_zeros(kv_heads, seats.front, shape[2], dtype=exact) for shape in (k_shape, v_shape)]
        for g in seats.groups:
            gk, gv, sums = next(saved), next(saved), []
            for b in g.blocks:
                matrices, seen = b.rows * kv_heads, b.seen(ctx.window)
                bk, bv = gk[:matrices, seen], gv[:matrices, seen]
                (bq, go), weights = next(cut), next(saved)
                weights = _weights(bq, bk, b, ctx.window, ctx.scaling) if weights is None else weights
                dv = torch.bmm(weights.transpose(1, 2), go)
                scores = torch._softmax_backward_data(torch.bmm(go, bv.transpose(1, 2)), weights, -1, weights.dtype)
                scores.mul_(ctx.scaling)
                found[0].append(torch.bmm(scores, bk).view(-1, q_shape[2]))
                dk = torch.bmm(scores.transpose(1, 2), bq)
                if len(g.blocks) == 1 and dk.shape == gk.shape:
                    sums = [dk, dv]
                else:
                    sums = sums or [torch.zeros_like(x, dtype=exact) for x in (gk, gv)]
                    for total, x in zip(sums, (dk, dv), strict=True):
                        total[:matrices, seen] += x
            for kept, total, x in zip(found[1:], front, sums, strict=True):
                kept.append(x.to(grad.dtype).view(-1, x.shape[2]))
                if seats.front:
                    total += x.unflatten(0, (g.rows, kv_heads))[:, :, : seats.front].sum(0, dtype=exact)
        dq, dk, dv = map(_joined, found)
        own = (x.index_select(0, seats.k_back).view(-1, kv_heads, x.shape[1]) for x in (dk, dv))
        back = (
            _joined([t.transpose(0, 1).to(x.dtype), x]) if seats.front else x for t, x in zip(front, own, strict=True)
        )
        return dq.index_select(0, seats.q_back).view(q_shape), *back, None, None, None


def attend_in_blocks(
    q: Float[Tensor, "seq heads size"],
    k: Float[Tensor, "keys kv_heads size"],
    v: Float[Tensor, "keys kv_heads value_size"],
    layout: Layout,
    window: int | None,
    scaling: float,
) -> Float[Tensor, "seq heads value_size"]:
    """softmax(s · q kᵀ) v within each row. Keys in front of the tokens' are seen by all rows."""
    out: Tensor = _Blocks.apply(q, k, v, layout, window, scaling)
    return out


def _weights(q: Tensor, k: Tensor, b: _Block, window: int | None, scaling: float) -> Tensor:
    """What each query of a block takes from each key: rows sum to 1. Heads that share keys are further rows."""
    first = b.seen(window).start
    window = window if window and window < b.keys - first else None
    near = 0 if window or not b.first else b.start + b.first - first  # so many keys are seen by all queries
    added = visible(
        b.width, b.start + b.first - first - near, k.shape[1] - near, window, q.shape[1] // b.width, q.dtype, q.device
    )
    if not near:
        return torch.baddbmm(added.expand(q.shape[0], -1, -1), q, k.transpose(1, 2), alpha=scaling).softmax(-1)
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=scaling)
    scores[:, :, near:] += added
    return scores.softmax(-1)


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
