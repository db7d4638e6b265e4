"""On an accelerator: the norm's and the gate's kernels in Triton beside the formulas in PyTorch, forward and backward.

For every type and width: milliseconds of the formula, of the kernel, and how many times as fast the kernel is (medians of rounds in
turn). Both work on the same rows, by default 8 of 512 tokens. A kernel that does not agree with its formula is named, and not timed.

    python benchmarks/small_kernels.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from featherweight.engine.kernels import Way, agree, choose, kernel
from featherweight.engine.lean import GATE, NORM

WIDTHS = {"norm": (576, 2048, 4096, 8192), "gate": (1536, 8192, 14336)}
REPEATS = 20


def milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    """Of one call; the device is waited for."""
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        step()
    torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) * 1e3 / REPEATS


def measured(name: str, formula: Way, inputs: tuple[Any, ...], rounds: int) -> str:
    """One line of the table."""
    _, reason = choose(lambda: kernel(name), formula, inputs)
    if "times as fast" not in reason:
        return reason
    ways, x = (formula, kernel(name)), inputs[0]
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    kept = [way.forward(*inputs)[1:] for way in ways]
    steps: dict[str, list[Callable[[], Any]]] = {
        "forward": [partial(w.forward, *inputs) for w in ways],
        "backward": [partial(w.backward, x, *tensors, *k) for w, k in zip(ways, kept, strict=True)],
    }
    line = "" if all(map(agree, ways[1].both(inputs), ways[0].both(inputs))) else "NOT the formula's numbers! "
    for half, both in steps.items():
        pairs = [[milliseconds(step, x.device) for step in both] for _ in range(1 + rounds)][1:]  # the first warms up
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        line += f"{half}: {theirs:.3f} → {ours:.3f} ms, {theirs / ours:.2f} ×   "
    return line


def main() -> None:
    """Every type and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8 * 512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        print("no accelerator here: nothing to measure")
        return
    print(f"{device}, torch {torch.__version__}, {args.tokens} tokens")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, formula in (("norm", NORM), ("gate", GATE)):
            for width in WIDTHS[name]:
                x, up = (torch.randn(args.tokens, width, device=device, dtype=dtype) for _ in range(2))
                inputs = (x, torch.rand(width, device=device, dtype=dtype) + 0.5, 1e-6) if name == "norm" else (x, up)
                print(f"{name} {dtype} {width}: {measured(name, formula, inputs, args.rounds)}", flush=True)


if __name__ == "__main__":
    main()
