"""Attention over rows that lie one after the other: nothing is computed for padding, and what rows share is read once.

A packed row is

    shared | row 1 | row 2 | …          every row sees what is shared, and itself; never another row

so that a batch of rows of different lengths costs what its tokens cost, and a prompt that all of them begin with — a
chat template's opening, or the virtual tokens of Prompt Tuning — is computed once for the batch instead of once a row.

How the layers are told: as the attention mask they get the *number of the row* that each token belongs to, 1 × 1 × 1 × seq,
0 for what is shared. `transformers` hands a mask of four dimensions on as it is, to the attention that a model names in its
configuration; `rows_apart` names this one for as long as it lasts. Any other mask means what it always means.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from . import hardware
from .errors import InputError

NAME = "featherweight_rows"
# Rows from here on go through the fused kernel, one by one, which keeps no seq × seq scores.
LONG = 512
LONG_EXACT = 128  # in float32 on a CPU, where it is quicker from here on (benchmarks/packed_rows.py)
# Rows up to here are attended to together, whatever their lengths: many small products cost more than padding.
SHORT = 96
LANES = 16  # keys per row are a multiple of this: vector instructions take so many at a time
WASTE = 1.15  # longer ones while padding them to the longest costs less than this factor


@dataclass(frozen=True)
class Layout:
    """Where the rows lie: `shared` tokens, then rows of these lengths."""

    shared: int
    lengths: tuple[int, ...]

    def after(self, more: int) -> Layout:
        """The layout with `more` shared tokens in front."""
        return Layout(self.shared + more, self.lengths)

    def mask(self, device: torch.device) -> Int[Tensor, "1 1 1 seq"]:
        """What the model gets as its attention mask: each token's row, 0 where it is shared. It carries this layout."""
        numbers = torch.cat([torch.full((n,), i) for i, n in enumerate((self.shared, *self.lengths))])
        numbers = numbers.to(device)[None, None, None]
        numbers.rows_layout = self  # type: ignore[attr-defined]  # reading it back from the numbers would wait for a GPU
        return numbers

    def positions(self, device: torch.device) -> Int[Tensor, "1 seq"]:
        """Each token's position in its own text, what is shared counted in front of every row."""
        parts = [torch.arange(self.shared), *(torch.arange(n) + self.shared for n in self.lengths)]
        return torch.cat(parts).to(device)[None]


def layout_of(mask: Any) -> Layout | None:
    """The layout that an attention mask stands for; None where it is an ordinary mask, or none."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.long:
        return None
    known: Layout | None = getattr(mask, "rows_layout", None)
    if known is None:
        shared, *lengths = torch.bincount(mask.flatten()).tolist()
        known = Layout(shared, tuple(lengths))
    return known


@dataclass(frozen=True)
class _Group:
    """Rows that are attended to together: `n` of them, padded to `width`, each behind `before` tokens that all of it see.

    `q_at` and `k_at` say which (token, head) stands at each place, places ordered row, key head, query head, position, so
    that what is gathered is a batch of matrices; `padding` are the places whose token stands elsewhere.
    """

    n: int
    width: int
    before: int
    q_at: Int[Tensor, " places"]
    k_at: Int[Tensor, " key_places"]
    padding: Int[Tensor, " padded"]


@dataclass(frozen=True)
class _Seats:
    """All groups, and the way back: for each (token, head) its place among the queries', and the keys', of all groups."""

    groups: tuple[_Group, ...]
    q_back: Int[Tensor, " token_heads"]
    k_back: Int[Tensor, " token_key_heads"]


def _together(layout: Layout) -> list[list[tuple[int, int]]]:
    """(length, start) of the rows of each group, rows of similar length together; what is shared is a group of its own."""
    starts = itertools.accumulate(layout.lengths, initial=layout.shared)
    groups: list[list[tuple[int, int]]] = []
    for n, start in sorted((n, start) for n, start in zip(layout.lengths, starts, strict=False) if n):
        tokens = n + sum(m for m, _ in groups[-1]) if groups else 0
        if groups and (n <= SHORT or n * (len(groups[-1]) + 1) <= WASTE * tokens):
            groups[-1].append((n, start))
        else:
            groups.append([(n, start)])
    return [[(layout.shared, 0)], *groups] if layout.shared else groups


@functools.lru_cache(maxsize=64)
def _seats(layout: Layout, extra: int, heads: int, kv_heads: int, device: torch.device) -> _Seats:
    """Seat every token. `extra` keys stand in front of the tokens'."""
    seq = layout.shared + sum(layout.lengths)
    q_back, k_back = (torch.empty(seq, n, dtype=torch.long) for n in (heads, kv_heads))
    groups, q_places, k_places = [], 0, 0
    for i, group in enumerate(_together(layout)):
        before = extra if layout.shared and i == 0 else extra + layout.shared
        width = -(-(before + max(n for n, _ in group)) // LANES) * LANES - before
        column, (length, first) = torch.arange(width), torch.tensor(group).T[:, :, None]
        token, seated = first + column.minimum(length - 1), column < length
        keys = torch.cat([torch.arange(before).expand(len(group), -1), token + extra], 1)
        q_at = token[:, None] * heads + torch.arange(heads)[None, :, None]  # row, head, position
        k_at = keys[:, None] * kv_heads + torch.arange(kv_heads)[None, :, None]
        q_place = q_places + torch.arange(q_at.numel()).view(q_at.shape)
        k_place = k_places + torch.arange(k_at.numel()).view(k_at.shape)[:, :, before:]
        q_back[token[seated]] = q_place.transpose(1, 2)[seated]
        k_back[token[seated]] = k_place.transpose(1, 2)[seated]
        padding = (~seated)[:, None].expand(q_at.shape).flatten().nonzero()[:, 0]
        groups.append(_Group(len(group), width, before, *(x.flatten().to(device) for x in (q_at, k_at, padding))))
        q_places, k_places = q_places + q_at.numel(), k_places + k_at.numel()
    return _Seats(tuple(groups), q_back.flatten().to(device), k_back.flatten().to(device))


@functools.lru_cache(maxsize=64)
def _visible(
    width: int, before: int, window: int | None, repeats: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "queries keys"]:
    """What to add to the scores of a row of `width` behind `before` tokens: 0 for what a token sees, else the minimum.

    Once for each of the `repeats` heads that share their keys.
    """
    distance = torch.arange(before, before + width)[:, None] - torch.arange(before + width)
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return added.repeat(repeats, 1).to(device)


_visible_afar = functools.lru_cache(maxsize=2)(_visible.__wrapped__)  # for long rows: such masks are large


class _ShortRows(torch.autograd.Function):
    """softmax(s · q kᵀ + mask) v within each row, from tokens to tokens: (seq, heads, size) → (seq, heads, size).

    Rows of a group are gathered into one batch of matrices. Keys of earlier tokens count for every row that sees them, so
    their gradients are summed. Scores are kept for short rows and computed again for longer ones.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scaling: float
    ) -> Tensor:
        heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
        seats = _seats(layout, k.shape[0] - q.shape[0], heads, kv_heads, q.device)
        flat = [x.reshape(-1, x.shape[2]) for x in (q, k, v)]
        ctx.shapes, ctx.seats, ctx.window, ctx.scaling = (q.shape, k.shape, v.shape), seats, window, scaling
        saved, out = [], []
        for g in seats.groups:
            gq = flat[0].index_select(0, g.q_at).view(g.n * kv_heads, -1, size)
            gk, gv = (x.index_select(0, g.k_at).view(g.n * kv_heads, g.before + g.width, -1) for x in flat[1:])
            weights = _weights(gq, gk, g, window, scaling)
            out.append(torch.bmm(weights, gv).view(-1, gv.shape[2]))
            saved += [gq, gk, gv, weights if g.width <= SHORT else None]
        ctx.save_for_backward(*saved)
        together = torch.cat(out) if len(out) > 1 else out[0]
        return together.index_select(0, seats.q_back).view(q.shape[0], heads, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keys, kv_heads, _ = ctx.shapes[1]
        seats, saved, flat = ctx.seats, ctx.saved_tensors, grad.reshape(-1, grad.shape[2])
        found: list[list[Tensor]] = [[], [], []]
        extra = keys - grad.shape[0]
        most = max(g.before for g in seats.groups)
        front = [
            grad.new_zeros(most, kv_heads, shape[2], dtype=torch.promote_types(grad.dtype, torch.float32))
            for shape in ctx.shapes[1:]
        ]
        for i, g in enumerate(seats.groups):
            gq, gk, gv, weights = saved[4 * i : 4 * i + 4]
            weights = _weights(gq, gk, g, ctx.window, ctx.scaling) if weights is None else weights
            go = flat.index_select(0, g.q_at).index_fill_(0, g.padding, 0).view(gq.shape[0], gq.shape[1], -1)
            dv = torch.bmm(weights.transpose(1, 2), go)
            scores = torch._softmax_backward_data(torch.bmm(go, gv.transpose(1, 2)), weights, -1, weights.dtype)
            scores.mul_(ctx.scaling)
            dq, dk = torch.bmm(scores, gk), torch.bmm(scores.transpose(1, 2), gq)
            for kept, x in zip(found, (dq, dk, dv), strict=True):
                kept.append(x.view(-1, x.shape[2]))
            for total, x in zip(front, (dk, dv), strict=True) if g.before else ():
                seen = x.view(g.n, kv_heads, -1, x.shape[2])[:, :, : g.before]
                total[: g.before] += seen.sum(0, dtype=total.dtype).transpose(0, 1)
        dq, dk, dv = (torch.cat(x) if len(x) > 1 else x[0] for x in found)
        own = [x.index_select(0, seats.k_back).view(-1, kv_heads, x.shape[1]) for x in (dk, dv)]
        if most:
            own = [torch.cat([x.new_zeros(extra, *x.shape[1:]), x]) if extra else x for x in own]
            for x, total in zip(own, front, strict=True):
                x[:most] += total
        return dq.index_select(0, seats.q_back).view(ctx.shapes[0]), *own, None, None, None


def _weights(q: Tensor, k: Tensor, g: _Group, window: int | None, scaling: float) -> Tensor:
    """What each query of a group takes from each key: rows sum to 1. Heads that share keys are further rows."""
    window = window if window and window < g.before + g.width else None
    added = _visible(g.width, g.before, window, q.shape[1] // g.width, q.dtype, q.device)
    return torch.baddbmm(added.expand(q.shape[0], -1, -1), q, k.transpose(1, 2), alpha=scaling).softmax(-1)


def long_from(x: Tensor) -> int:
    """The length from which on a row is a long one."""
    exact = x.dtype == torch.float32 and hardware.kind_of(x.device) == "cpu"
    return LONG_EXACT if exact else LONG


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scaling: float, dropout: float
) -> Float[Tensor, "seq heads size"]:
    """Short rows together, long ones one after the other. Keys in front of the tokens' (a prefix) are seen by all."""
    long = 0 if dropout else long_from(q)
    together = not dropout and layout.shared < LONG  # what is shared is with the short rows
    if together and max(layout.lengths) < long:
        out: Tensor = _ShortRows.apply(q, k, v, layout, window, scaling)
        return out
    if len(layout.lengths) == 1:  # what a single row shares is its beginning
        layout = Layout(0, (layout.shared + layout.lengths[0],))
    extra, sizes = k.shape[0] - q.shape[0], (layout.shared, *layout.lengths)
    queries, ends = q.split(sizes), list(itertools.accumulate(sizes, initial=extra))
    front = ends[1]  # so many keys are seen by every row

    def own(x: Tensor, i: int) -> Tensor:
        return x[ends[i] : ends[i + 1]]

    def seen(x: Tensor, i: int) -> Tensor:
        if i and front:
            return torch.cat([x[:front], own(x, i)])
        return own(x, i) if i else x[:front]

    found: dict[int, Tensor] = {}
    short = [i for i, n in enumerate(sizes) if i and n < long]
    if short and together:
        some = Layout(layout.shared, tuple(sizes[i] for i in short))
        keys, values = (torch.cat([x[:front], *(own(x, i) for i in short)]) for x in (k, v))
        rows = torch.cat([queries[i] for i in (0, *short)])
        out = _ShortRows.apply(rows, keys, values, some, window, scaling)
        found = dict(zip((0, *short), out.split([some.shared, *some.lengths]), strict=True))
    for i, n in enumerate(sizes):
        if n and i not in found:
            keys, values = (seen(x, i) for x in (k, v))
            found[i] = _one_row(queries[i], keys, values, window, scaling, dropout)
    return torch.cat([found[i] for i in sorted(found)])


def _one_row(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scaling: float, dropout: float
) -> Float[Tensor, "seq heads size"]:
    """A row behind the keys that are more than its own, through the fused kernel."""
    n, before = q.shape[0], k.shape[0] - q.shape[0]
    near = window if window and window < before + n else None
    added = None
    if n < LONG and (before or near):  # one mask for lengths that are nearly the same
        added = _visible(-(-n // LANES) * LANES, before, near, 1, q.dtype, q.device)[:n, : before + n]
    elif before or near:
        added = _visible_afar(n, before, near, 1, q.dtype, q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, added, dropout, is_causal=added is None, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


@torch.compiler.disable
def attend_in_rows(
    module: nn.Module,
    query: Float[Tensor, "batch heads seq size"],
    key: Float[Tensor, "batch kv_heads keys size"],
    value: Float[Tensor, "batch kv_heads keys size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch seq heads size"], None]:
    """What `transformers` calls as a layer's attention. Keys beyond the tokens (a prefix) stand in front, for all rows."""
    if (layout := layout_of(attention_mask)) is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if more := [k for k, v in kwargs.items() if v is not None and k in ("softcap", "s_aux", "position_bias")]:
        raise InputError(f"packing: the layers of this model use {more[0]}, which is not known here; train it without")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # tokens first, as the projections wrote them
    return _attend(q, k, v, layout, sliding_window, scaling, dropout)[None], None


@functools.cache
def _register() -> None:
    """Make the name known to `transformers`. Masks that are not ours are built as for plain attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attend_in_rows)
    AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def rows_apart(model: Any) -> Iterator[None]:
    """Inside, the model's layers attend as a mask of row numbers says, where they are given one."""
    _register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
