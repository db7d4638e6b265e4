"""Attention over rows that lie one after the other: nothing is computed for padding, and what rows share is read once.

A packed row is

    shared | row 1 | row 2 | …          every row sees what is shared, and itself; never another row

so that a batch of rows of different lengths costs what its tokens cost, and a prompt that all of them begin with — a
chat template's opening, or the virtual tokens of Prompt Tuning — is computed once for the batch instead of once a row.

How the layers are told: as the attention mask they get the *number of the row* that each token belongs to (`layout.py`).
`transformers` hands a mask of four dimensions on as it is, to the attention that a model names in its configuration;
`rows_apart` names this one for as long as it lasts. Any other mask means what it always means.

Three ways:

* products of matrices, in blocks of queries (`attention_blocks.py`): on a CPU, where they are quicker than PyTorch's fused kernel
  (`benchmarks/packed_rows.py`);
* one call of FlashAttention for all rows (`attention_kernel.py`): on a GPU where that proves right;
* the fused kernel row by row: with dropout, and for long rows elsewhere.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from . import hardware
from .attention_blocks import LANES, attend_in_blocks, visible
from .attention_kernel import attend_at_once, takes
from .errors import InputError
from .layout import Layout, layout_of

NAME = "featherweight_rows"
# Rows from here on go through the fused kernel, one by one: on an accelerator, and on a CPU in float32 where nothing is shared. Behind
# shared tokens it needs a mask, and blocks are quicker at any length, as they are in bfloat16.
LONG, LONG_EXACT = 512, 2048

_visible_afar = functools.lru_cache(maxsize=2)(visible.__wrapped__)  # for long rows: such masks are large


def long_from(x: Tensor, front: int) -> int:
    """The length from which on a row is a long one, behind `front` keys that all rows see."""
    if hardware.kind_of(x.device) != "cpu":
        return LONG
    return LONG_EXACT if x.dtype == torch.float32 and not front else sys.maxsize


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scaling: float, dropout: float
) -> Float[Tensor, "seq heads size"]:
    """All rows in one call, or short rows together and long ones one after the other. Keys in front (a prefix) are seen by all."""
    if not dropout and takes(q, k, v):
        return attend_at_once(q, k, v, layout, window, scaling)
    extra = k.shape[0] - q.shape[0]
    long = 0 if dropout else long_from(q, extra + layout.shared)
    together = not dropout and layout.shared < long  # what is shared is with the short rows
    if together and max(layout.lengths, default=0) < long:
        return attend_in_blocks(q, k, v, layout, window, scaling)
    if len(layout.lengths) == 1:  # what a single row shares is its beginning
        layout = Layout(0, (layout.shared + layout.lengths[0],))
    sizes = (layout.shared, *layout.lengths)
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
        out = attend_in_blocks(rows, keys, values, some, window, scaling)
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
        width = -(-n // LANES) * LANES
        added = visible(width, before, before + width, near, 1, q.dtype, q.device)[:n, : before + n]
    elif before or near:
        added = _visible_afar(n, before, before + n, near, 1, q.dtype, q.device)
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
