"""Which attention is faster for short rows: plain matrix products (`eager`) or the fused kernel (`sdpa`)?

One training step (forward, backward to the input embeddings, head at two positions a row) on the default model, the two
implementations in turn, several rounds; the ratio of each pair is what counts, because the machine's speed drifts.

    python benchmarks/attention.py --out benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import featherweight as fw
from featherweight import provenance
from featherweight.engine.loss import logits_at

SHAPES = ((8, 32), (8, 56), (8, 256))


def step_seconds(model: Any, embeds: torch.Tensor, at: torch.Tensor) -> float:
    """One step's time."""
    start = time.perf_counter()
    logits_at(model, {"inputs_embeds": embeds}, at).logsumexp(-1).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure every shape and store the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model = fw.load_base().model
    model.requires_grad_(False)
    results = []
    for batch, length in SHAPES:
        ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        at = torch.arange(batch * length).view(batch, length)[:, -2:].flatten()
        pairs = []
        for round_ in range(args.rounds + 1):
            seconds = {}
            for kind in ("sdpa", "eager"):
                model.set_attn_implementation(kind)
                seconds[kind] = step_seconds(model, embeds, at)
            if round_:  # the first builds kernels
                pairs.append(seconds["sdpa"] / seconds["eager"])
        middle = statistics.median(pairs)
        results.append(
            {"batch": batch, "length": length, "sdpa_over_eager": middle, "min": min(pairs), "max": max(pairs)}
        )
        print(
            f"{batch} × {length}: sdpa takes {middle:.2f}× eager's time ({min(pairs):.2f}–{max(pairs):.2f})", flush=True
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"results": results, "rounds": args.rounds, **provenance.record()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
