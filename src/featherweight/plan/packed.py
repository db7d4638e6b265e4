"""Quantised layers in a simulation: the bytes they keep, and those they need while they work.

| name | keeps a weight in | while a layer works |
|---|---|---|
| `nf4` | 4 bits and, for 64 weights, a scale of 8 bits: 4.127 bits in all | its matrix in the type of the computation |
| `int8` | 8 bits, and a scale for each row | the same |

The matrix is made for the forward pass, dropped, and made again for the backward pass. Output heads and
embeddings stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, nearest
from ..quantise import kept_dense
from ..sites import features, is_linear

QUANTISATIONS = ("none", "nf4", "int8")
BLOCK, BLOCKS = 64, 256  # weights that share a scale; scales that share theirs


class Packed(nn.Linear):
    """A linear layer that keeps its weight in few bits. It has no numbers, only sizes."""

    def __init__(self, d_in: int, d_out: int, bias: Tensor | None, dtype: torch.dtype, bits: int) -> None:
        nn.Module.__init__(self)
        n = d_in * d_out
        sizes = (n, 4 * d_out) if bits == 8 else (-(-n // 2), -(-n // BLOCK) + 4 * -(-n // (BLOCK * BLOCKS)) + 4 * 272)
        packed, scales = (torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes)
        self.in_features, self.out_features, self.kind, self.bits = d_in, d_out, dtype, bits
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.register_buffer("scales", scales)
        self.told: Callable[[Iterable[Tensor], str], None] = lambda tensors, part: None

    def dense(self) -> Tensor:
        """Room for the matrix."""
        scales = torch.empty(self.in_features * self.out_features // BLOCK if self.bits == 4 else self.out_features)
        matrix = torch.empty(self.out_features, self.in_features, dtype=self.kind)
        self.told((scales, matrix), "workspace")
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        """As large as the layer's output."""
        out: Tensor = _Unpacked.apply(x, self)
        return out


class _Unpacked(torch.autograd.Function):
    """x Wᵀ + b. The packed weight is the layer's; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Packed) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense(), None


def pack_weights(model: Any, quantize: str) -> None:
    """Put a `Packed` in place of every linear layer but the heads."""
    if quantize not in QUANTISATIONS:
        raise InputError(f"quantize {quantize!r} is unknown; {nearest(quantize, QUANTISATIONS)}")
    if quantize == "none":
        return
    kept = {*kept_dense(model, quantize)}
    for path, site in list(model.named_modules()):
        if not path or not is_linear(site) or path in kept:
            continue
        d_in, d_out = features(site)
        made = Packed(d_in, d_out, site.bias, site.weight.dtype, 4 if quantize == "nf4" else 8)
        above, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(above), leaf, made)
