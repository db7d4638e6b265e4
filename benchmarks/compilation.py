"""Does `torch.compile` pay in fine-tuning?

Each decoder layer is compiled by itself (`dynamic=True`, as lengths differ), which is the cheapest way to compile a model of
many equal layers. Compiled and plain steps on the same batches alternate in one process; the ratio of each round's times is what
counts. What compiling costs is the first compiled round, with an empty cache and, in a second process, with the cache that the
first one left. After how many steps the gain has paid for it follows from both.

    OMP_NUM_THREADS=1 python benchmarks/compilation.py --out benchmarks/results/compilation.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import featherweight as fw
from featherweight import provenance
from featherweight.demo import MODEL
from featherweight.engine.train import Settings, fit
from speed_work import rows_of

STEPS = 4
"""Of eight rows, in each round."""


def measure(model: str, work: str, rounds: int) -> dict[str, Any]:
    """Seconds of the plain and the compiled steps of each round, losses, and of the first compiled round."""
    base = fw.load_base(model)
    rows = rows_of(work, base, 8 * STEPS)
    torch.manual_seed(0)
    fw.attach(base.model, fw.LoRA(r=8))
    settings = Settings(steps=STEPS, batch_size=8, lr=1e-12)  # nothing is learned: every round does the same
    layers = list(base.model.model.layers)
    for layer in layers:
        layer.compile(dynamic=True)
    compiled_calls = [layer._compiled_call_impl for layer in layers]

    def trained(compiled: bool) -> tuple[float, list[float]]:
        for layer, call in zip(layers, compiled_calls, strict=True):
            layer._compiled_call_impl = call if compiled else None
        report = fit(base, rows, settings)
        return report.seconds, report.losses

    trained(False)
    start = time.perf_counter()
    trained(True)
    first = time.perf_counter() - start
    pairs = [(trained(False), trained(True)) for _ in range(rounds)]
    return {
        "first": first, "plain": [plain for (plain, _), _ in pairs], "compiled": [compiled for _, (compiled, _) in pairs],
        "losses": [pairs[0][0][1], pairs[0][1][1]],
    }  # fmt: skip


def apart(model: str, work: str, rounds: int, cache: str) -> dict[str, Any]:
    """The same in a process of its own, with a cache of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", model, work, str(rounds)],
        capture_output=True, text=True, check=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(model: str, work: str, rounds: int) -> dict[str, Any]:
    """One work: what compiling costs, what it gives, and when it has paid."""
    with tempfile.TemporaryDirectory() as cache:
        cold = apart(model, work, rounds, cache)
        warm = apart(model, work, 1, cache)
    ratios = [compiled / plain for plain, compiled in zip(cold["plain"], cold["compiled"], strict=True)]
    step = statistics.median(cold["plain"]) / STEPS
    costs = {
        name: found["first"] - statistics.median(cold["compiled"]) for name, found in (("cold", cold), ("cached", warm))
    }
    saved = step * (1 - statistics.median(ratios))
    pays = {name: cost / saved if saved > 0 else None for name, cost in costs.items()}
    off = max(abs(a - b) / abs(a) for a, b in zip(*cold["losses"], strict=True))
    return {
        "work": work,
        "ratios": ratios,
        "step_seconds": step,
        "cost_seconds": costs,
        "pays_after_steps": pays,
        "losses_off": off,
    }


def main() -> None:
    """Every work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--works", default="reviews", help="of `speed_work`: reviews, answers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, work, rounds = args.child
        print(json.dumps(measure(model, work, int(rounds))))
        return
    assert args.out, "give --out"
    found = []
    for work in args.works.split(","):
        found.append(row(args.model, work, args.rounds))
        print(json.dumps(found[-1]), flush=True)
        args.out.write_text(json.dumps({"rows": found, "rounds": args.rounds, **provenance.record()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
