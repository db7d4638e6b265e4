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
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from .errors import InputError

NAME = "featherweight_rows"
LONG = 512  # rows from here on go through the fused kernel, one by one: it does not keep seq × seq scores
# Rows up to here are attended to together, whatever their lengths: many small products cost more than padding.
SHORT = 96
WASTE = 1.3  # longer ones while padding them to the longest costs less than this factor


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
        numbers = torch.arange(len(self.lengths) + 1).repeat_interleave(torch.tensor([self.shared, *self.lengths]))
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
class _Places:
    """Rows of similar length stand together, padded to the longest: the shape of each group, and who stands where.

    `at` is the token at each place, `back` the place of each token, `padding` the places whose token stands elsewhere.
    The first group is what is shared, if anything is.
    """

    shapes: tuple[tuple[int, int], ...]
    at: Int[Tensor, " places"]
    back: Int[Tensor, " seq"]
    padding: Int[Tensor, " padded"]


@functools.lru_cache(maxsize=64)
def _places(layout: Layout, device: torch.device) -> _Places:
    """Seat every token."""
    starts = list(itertools.accumulate(layout.lengths, initial=layout.shared))
    rows = sorted((n, start) for n, start in zip(layout.lengths, starts, strict=False) if n)
    groups: list[list[tuple[int, int]]] = []
    for n, start in rows:
        tokens = n + sum(m for m, _ in groups[-1]) if groups else 0
        if groups and (n <= SHORT or (n < LONG and n * (len(groups[-1]) + 1) <= WASTE * tokens)):
            groups[-1].append((n, start))
        else:
            groups.append([(n, start)])
    if layout.shared:
        groups.insert(0, [(layout.shared, 0)])
    at, real = [], []
    for group in groups:
        column = torch.arange(max(n for n, _ in group))
        length, first = torch.tensor(group).T[:, :, None]
        at.append((first + column.minimum(length - 1)).flatten())
        real.append((column < length).flatten())
    everyone, seated = torch.cat(at), torch.cat(real)
    back = torch.empty(starts[-1], dtype=torch.long)
    back[everyone[seated]] = seated.nonzero()[:, 0]
    shapes = tuple((len(g), max(n for n, _ in g)) for g in groups)
    return _Places(shapes, everyone.to(device), back.to(device), (~seated).nonzero()[:, 0].to(device))


class _Seat(torch.autograd.Function):
    """From tokens to their places. The gradient is a look-up as well, because every token has one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.places.back), None


class _Unseat(torch.autograd.Function):
    """From places to tokens. What stands there as padding has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places = ctx.places
        return grad.index_select(0, places.at).index_fill_(0, places.padding, 0), None


@functools.lru_cache(maxsize=64)
def _visible(width: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What to add to the scores of a row of `width` behind `before` tokens: 0 for what a token sees, else the minimum."""
    distance = torch.arange(before, before + width)[:, None] - torch.arange(before + width)
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).to(device)


def _attend(
    q: Float[Tensor, "n heads width size"],
    k: Float[Tensor, "n kv_heads keys size"],
    v: Float[Tensor, "n kv_heads keys size"],
    scaling: float,
    dropout: float,
    window: int | None,
) -> Float[Tensor, "n heads width size"]:
    """Attention of rows to what comes before them and to themselves."""
    n, heads, width, size = q.shape
    keys, before = k.shape[2], k.shape[2] - width
    window = window if window and window < keys else None
    if width >= LONG:
        added = None if window is None and not before else _visible(width, before, window, q.dtype, q.device)
        return scaled_dot_product_attention(
            q, k, v, added, dropout, is_causal=added is None, scale=scaling, enable_gqa=True
        )
    if (repeats := heads // k.shape[1]) > 1:
        k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(n, heads, keys, size) for x in (k, v))
    q, k, v = (x.reshape(n * heads, -1, size) for x in (q, k, v))
    added = _visible(width, before, window, q.dtype, q.device)
    scores = torch.baddbmm(added.expand(n * heads, -1, -1), q, k.transpose(1, 2), alpha=scaling)
    weights = scores.softmax(-1)
    weights = drop(weights, dropout) if dropout else weights
    return torch.bmm(weights, v).view(n, heads, width, size)


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
    extra, places = key.shape[2] - query.shape[2], _places(layout, query.device)
    sizes = [n * width for n, width in places.shapes]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # tokens first, as the projections wrote them
    seated = [_Seat.apply(x, places).split(sizes) for x in (q, k[extra:], v[extra:])]
    out = []
    for i, (shape, *own) in enumerate(zip(places.shapes, *seated, strict=True)):
        own_q, own_k, own_v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in own)
        before = extra if layout.shared and i == 0 else extra + layout.shared
        if before:
            front_k, front_v = (x[:before].transpose(0, 1).expand(shape[0], -1, -1, -1) for x in (k, v))
            own_k, own_v = torch.cat([front_k, own_k], 2), torch.cat([front_v, own_v], 2)
        result = _attend(own_q, own_k, own_v, scaling, dropout, sliding_window)
        out.append(result.transpose(1, 2).reshape(-1, q.shape[1], v.shape[2]))
    return _Unseat.apply(torch.cat(out) if len(out) > 1 else out[0], places)[None], None


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
