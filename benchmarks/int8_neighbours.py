"""How far does another row in the batch move a row's answer, when the base is in int8?

    OMP_NUM_THREADS=1 python benchmarks/int8_neighbours.py > benchmarks/results/int8_neighbours.json

Eight words of the default model alone and beside eight others, in evaluation mode: the difference of their logits, as a share of their
norm, with bitsandbytes' own layers (LLM.int8()), with the same layers as we run them, and with the dense base.
"""

from __future__ import annotations

import json

import torch

import featherweight as fw
from featherweight import provenance


@torch.no_grad()
def moved(base: fw.Base) -> float:
    """Of the row's logits."""
    row = torch.tensor([[0, 1, 6, 7, 8, 9, 10, 11]])
    alone = base.model(input_ids=row, use_cache=False).logits[0]
    beside = base.model(input_ids=torch.cat([row, row.flip(1)]), use_cache=False).logits[0]
    return float((alone - beside).norm() / alone.norm())


def main() -> None:
    """All three."""
    found = {"dense": moved(fw.load_base(dtype="float32"))}
    base = fw.load_base(dtype="float32", quantize="int8")
    found["int8, here"] = moved(base)
    for module in base.model.modules():
        if hasattr(module, "multiplies_exactly"):
            module.__class__ = type(module).__mro__[1]
    found["int8, bitsandbytes"] = moved(base)
    print(json.dumps({"moved": found, **provenance.record()}, indent=1))


if __name__ == "__main__":
    main()
