"""How do packed rows pass faster: as products in blocks, or through PyTorch's fused kernel, row by row?

One attention, forward and backward, over rows of nearly the same length, alone and behind 30 tokens that all of them see: both ways in
turn, several rounds; the ratio of each pair is what counts. From which length on the fused kernel wins in float32, with nothing shared, is
`attention.LONG_EXACT`.

    python benchmarks/packed_rows.py --out benchmarks/results/packed_rows.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight import attention, provenance
from featherweight.layout import Layout

HEADS = {"135M": (9, 3), "1B": (32, 8)}  # query and key heads of SmolLM2-135M and Llama-3.2-1B, 64 numbers each
LENGTHS = (32, 96, 128, 256, 512, 1024, 2048, 4096)
TOKENS = 800
SHARED, SIZE = (0, 30), 64


def seconds(tensors: tuple[Tensor, Tensor, Tensor], layout: Layout, long: int) -> float:
    """One attention there and back, rows from `long` tokens on through the fused kernel."""
    before, attention.long_from = attention.long_from, lambda x, front: long
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    start = time.perf_counter()
    try:
        attention._attend(q, k, v, layout, None, SIZE**-0.5, 0.0).sum().backward()
    finally:
        attention.long_from = before
    return time.perf_counter() - start


def compared(heads: tuple[int, int], length: int, shared: int, dtype: str, rounds: int) -> dict[str, Any]:
    """The fused kernel's time as a multiple of that of products."""
    layout = Layout(shared, tuple(length - i % 3 for i in range(max(2, TOKENS // length))))
    seq = layout.shared + sum(layout.lengths)
    torch.manual_seed(0)
    q, k, v = (torch.randn(seq, n, SIZE, dtype=getattr(torch, dtype)) for n in (heads[0], heads[1], heads[1]))
    ratios = []
    for number in range(rounds + 1):
        products, fused = (seconds((q, k, v), layout, long) for long in (2**30, 1))
        if number:  # the first builds masks and kernels
            ratios.append(fused / products)
    found = {"fused_over_products": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"length": length, "rows": len(layout.lengths), "shared": shared, "dtype": dtype, **found}


def main() -> None:
    """Measure every length, and store the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = list[dict[str, Any]]()
    for name, dtype, shared, length in itertools.product(HEADS, ("bfloat16", "float32"), SHARED, LENGTHS):
        results.append({"heads": name, **compared(HEADS[name], length, shared, dtype, args.rounds)})
        print(results[-1], flush=True)
    told = {"results": results, "rounds": args.rounds, "threads": torch.get_num_threads()}
    args.out.write_text(json.dumps({**told, **provenance.record()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
