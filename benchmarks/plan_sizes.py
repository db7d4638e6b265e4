"""Which sizes of model can be trained on a card of 8 GB, and how: LoRA, eight rows an update, short rows and long ones.

    python benchmarks/plan_sizes.py > benchmarks/results/plan_sizes.json

Planned from the models' configurations alone (`shapes/qwen3-*.json`), as `featherweight plan` does it; nothing is run on a card.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import featherweight as fw
from featherweight import provenance
from featherweight.base import load_config, skeleton
from featherweight.engine.train import Settings
from featherweight.plan.cards import find_card
from featherweight.plan.clock import rates_of
from featherweight.plan.estimate import choose
from featherweight.plan.verb import row_of

CARD = "RTX 4060 8GB"
SHAPES = Path(__file__).parent / "shapes"
LENGTHS = (512, 2048)


def main() -> None:
    """Every size at every length."""
    card, found = find_card(CARD), []
    for size in ("0.6b", "1.7b", "4b", "8b"):
        shape = load_config(str(SHAPES / f"qwen3-{size}.json"))
        parameters = sum({id(p): p.numel() for p in skeleton(shape, None).parameters()}.values())
        for length in LENGTHS:
            rows, settings = [row_of(length, i, shape) for i in range(8)], Settings(batch_size=8)
            plan = choose(shape, [fw.LoRA(r=8)], settings, rows, card.memory_bytes, rates=rates_of(card))
            row = {
                "model": f"qwen3-{size}", "parameters": parameters, "length": length, "fits": plan.fits(card.memory_bytes),
                "tricks": str(plan.tricks), "at_once": plan.micro, "bytes": plan.bytes, "high": plan.high, "seconds": plan.seconds,
            }  # fmt: skip
            print(row, file=sys.stderr)
            found.append(row)
    print(json.dumps({"card": CARD, "memory_bytes": card.memory_bytes, "rows": found, **provenance.record()}, indent=1))


if __name__ == "__main__":
    main()
