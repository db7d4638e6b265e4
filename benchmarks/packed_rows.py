"""From which length on do packed rows pass the fused kernel faster than as gathered products?

One attention, forward and backward, over rows of nearly the same length behind 30 shared tokens, both ways in turn, several rounds; the
ratio of each pair is what counts. `attention.LONG_EXACT` is the answer in float32.

    OMP_NUM_THREADS=1 python benchmarks/packed_rows.py --out benchmarks/results/packed_rows.json
"""

from __future__ import annotations

import argparse
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
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 500)
TOKENS = 800
SHARED, SIZE = 30, 64


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


def main() -> None:
    """Measure every length, and store the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    results = list[dict[str, Any]]()
    for name, (heads, kv_heads) in HEADS.items():
        for length in LENGTHS:
            layout = Layout(SHARED, tuple(length - i % 3 for i in range(max(2, TOKENS // length))))
            seq = layout.shared + sum(layout.lengths)
            torch.manual_seed(0)
            tensors = tuple(
                torch.randn(seq, n, SIZE, dtype=getattr(torch, args.dtype)) for n in (heads, kv_heads, kv_heads)
            )
            ratios = []
            for number in range(args.rounds + 1):
                products, fused = (seconds(tensors, layout, long) for long in (2**30, 1))  # type: ignore[arg-type]
                if number:  # the first builds masks and kernels
                    ratios.append(fused / products)
            found = {"fused_over_products": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            results.append({"heads": name, "length": length, "rows": len(layout.lengths), **found})
            print(results[-1], flush=True)
    told = {"results": results, "rounds": args.rounds, "dtype": args.dtype, "threads": torch.get_num_threads()}
    args.out.write_text(json.dumps({**told, **provenance.record()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
