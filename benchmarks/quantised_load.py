"""What does quantising while loading save, and what does it cost?

Each kind runs in a process of its own: it loads the base in bfloat16, then takes LoRA's gradients on movie reviews.

* `weight_bytes`: of the parameters, without the scales of quantised ones (about 3 % more in NF4).
* `before`, `peak`, `after` loading, as Linux counts them: `RssAnon` is memory of the process's own, `RssFile` pages of mapped
  files, which the system can take back at any time (what was read to be quantised stays there until all is loaded), `VmHWM` the peak
  of both together. The peaks of the first two are sampled every 5 ms.
* `step_seconds`: forward and backward, every batch but the first.
* `gradient`: that of the first batch against the dense base's, at an adapter away from its start (where half of it is zero).
* `round_trip`: error of bitsandbytes' NF4 for layers of 64 and of 96 inputs; 0.09 is right (see `quantise.py`).

    python benchmarks/quantised_load.py > benchmarks/results/quantised_load.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import featherweight as fw
from featherweight import provenance
from featherweight.adapter import trainable
from featherweight.base import load_config, skeleton
from featherweight.engine.memory import reset_peak
from featherweight.engine.train import prepared
from featherweight.engine.update import gradients
from featherweight.quantise import KINDS
from featherweight.tokens import writer_for

CPU = torch.device("cpu")


def resident() -> dict[str, int]:
    """Bytes of this process."""
    words = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {w[0][:-1]: int(w[1]) * 1024 for w in words if w and w[0] in ("VmHWM:", "RssAnon:", "RssFile:")}


def loaded(model: str, kind: str) -> tuple[fw.Base, dict[str, Any]]:
    """The base, and what the process held before, at most meanwhile, and afterwards."""
    import bitsandbytes  # noqa: F401

    skeleton(load_config(model))  # imports what loading needs
    reset_peak(CPU)
    before, peak, done = resident(), resident(), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.update({field: max(peak[field], size) for field, size in resident().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    base = fw.load_base(model, dtype="bfloat16", device="cpu", quantize=kind)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    peak["VmHWM"] = resident()["VmHWM"]
    reset_peak(CPU)
    size = sum(p.nbytes for p in base.model.parameters())
    return base, {"load_seconds": seconds, "weight_bytes": size, "before": before, "peak": peak, "after": resident()}


def child(model: str, kind: str, steps: int, file: str) -> None:
    """One kind: print what was measured, and save the first gradient."""
    base, told = loaded(model, kind)
    task = fw.load_task("movie-reviews")
    torch.manual_seed(0)
    fw.attach(base.model, fw.LoRA(r=8))
    parameters, seconds = trainable(base.model), list[float]()
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.01)
    rows = writer_for(base, None, task.labels).examples(task.train[: 8 * (steps + 1)])[0]
    with prepared(base) as tensors:
        for i in range(steps + 1):
            start = time.perf_counter()
            gradients(base, [tensors(base, rows[8 * i : 8 * i + 8])], parameters)
            seconds.append(time.perf_counter() - start)
            if i == 0:
                torch.save(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), file)
    print(json.dumps(told | {"step_seconds": seconds[1:]}))


def round_trip(width: int) -> float:
    """How far a matrix of this many inputs is from itself after NF4, as a share of its length."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.randn(128, width, generator=torch.Generator().manual_seed(0))
    return float((dequantize_4bit(*quantize_4bit(w, quant_type="nf4")) - w).norm() / w.norm())


def main() -> None:
    """Measure every kind and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.model, args.child[0], args.steps, args.child[1])
        return
    kinds, own = dict[str, Any](), dict[str, torch.Tensor]()
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:  # the dense base first
            given = ["--model", args.model, "--steps", str(args.steps), "--child", kind, str(Path(folder, kind))]
            done: Any = subprocess.run([sys.executable, __file__, *given], check=True, stdout=subprocess.PIPE)
            kinds[kind], own[kind] = json.loads(done.stdout.splitlines()[-1]), torch.load(Path(folder, kind))
            distance = (own[kind] - own["none"]).norm() / own["none"].norm()
            cosine = torch.cosine_similarity(own[kind], own["none"], dim=0)
            kinds[kind]["gradient"] = {"distance": float(distance), "cosine": float(cosine)}
    trips = {width: round_trip(width) for width in (64, 96)}
    print(json.dumps({"model": args.model, "kinds": kinds, "round_trip": trips, **provenance.record()}, indent=1))


if __name__ == "__main__":
    main()
