"""Run as a script, with TRITON_INTERPRET=1: the Triton kernels beside the formulas and the truth, a line of JSON for each case."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from featherweight.engine import fused, lean
from featherweight.engine.kernels import agree

WIDTHS = (3, 100, 576, 2048)


def numbers(width: int, dtype: torch.dtype) -> Tensor:
    """(2, 3, width), of which no row lies in one piece."""
    return torch.randn(2, width, 3).mul(2).to(dtype).transpose(1, 2)


def case(name: str, dtype: torch.dtype, width: int) -> dict[str, Any]:
    ours, formula = (fused.norm, lean.NORM) if name == "norm" else (fused.gate, lean.GATE)
    weight = torch.rand(width).add(0.5).to(torch.float32 if width == 100 else dtype)  # a norm may have another type
    x, other, dy = (numbers(width, dtype) for _ in range(3))
    inputs = (x, weight, 1e-5) if name == "norm" else (x, other)
    exact = tuple(t.double() if isinstance(t, Tensor) else t for t in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, kept = ours.both(inputs, dy), ours.forward(*inputs)
    expected, truth = formula.both(inputs, dy), formula.both(exact, dy.double())
    ours_made, theirs_made = ([(t.shape, t.dtype) for t in made] for made in (kept, formula.forward(*inputs)))

    def off(results: list[Tensor]) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(results, truth, strict=True)]

    return {
        "agree": [agree(a, b) for a, b in zip(found, expected, strict=True)], "same_shapes": ours_made == theirs_made,
        "ours": off(found), "theirs": off(expected),
    }  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    for width in WIDTHS:
        print(json.dumps({"width": width, **case(sys.argv[1], getattr(torch, sys.argv[2]), width)}))
