"""Does the plan know what each trick needs? Its predictions beside what `tricks.py` measured, none of which the constants were fitted to.

The rows are those of our own engine in `results/tricks.jsonl`: the peak of the process while it trains, in float32 on a CPU, of the
default model and of a shape of 1.24 billion parameters. The prediction sees the configuration and the rows' lengths.

    python benchmarks/plan_tricks.py > benchmarks/results/plan_tricks.json
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import featherweight as fw
from featherweight import provenance
from featherweight.base import DTYPES, load_config
from featherweight.demo import MODEL
from featherweight.engine.train import Settings
from featherweight.plan.estimate import Target, Tricks, predict
from speed_shapes import config_of
from speed_work import rows_of
from tricks import TRICKS

MEASURED = Path(__file__).parent / "results/tricks.jsonl"


def plans(record: dict[str, Any], shape: Any) -> list[dict[str, Any]]:
    """Every row of one model that the engine made with these tricks, with its plan."""
    rows = sorted(rows_of("answers", fw.load_base(), 64), key=lambda e: len(e.ids))[-record["size"] :]
    settings, found = Settings(steps=record["steps"], batch_size=record["size"]), []
    for name, chosen in TRICKS.items():
        if "trainer" in chosen:
            continue
        measured = record["rows"][name][0]
        tricks = Tricks(
            chosen.get("checkpoint_activations", "none"),
            chosen.get("quantize", "none"),
            chosen.get("stream_base", "none"),
        )
        plan = predict(
            shape, fw.LoRA(r=8), settings, rows, Target("this machine", 2**50, cpu=True), tricks,
            micro=chosen.get("batch_size", record["size"]), dtype=DTYPES[measured["dtype"]],
        )  # fmt: skip
        peaks = [m["peak"] for m in record["rows"][name]]
        found.append({
            "trick": name, "measured": statistics.median(peaks), "planned": plan.bytes, "low": plan.low, "high": plan.high,
        })  # fmt: skip
    return found


def main() -> None:
    """Print one JSON object."""
    models = {}
    for record in map(json.loads, MEASURED.read_text().splitlines()):
        found = plans(record, load_config(MODEL) if record["name"] == MODEL else config_of("1b"))
        off = [f["planned"] / f["measured"] - 1 for f in found]
        models[record["name"]] = {
            "rows": found, "median_error": statistics.median(map(abs, off)), "worst_error": max(off, key=abs),
            "above_the_interval": sum(f["measured"] > f["high"] for f in found),
        }  # fmt: skip
    print(json.dumps({"models": models, **provenance.record()}, indent=1))


if __name__ == "__main__":
    main()
