"""The numbers that the pages show: read from `benchmarks/results`, each with where it comes from. None is typed."""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from featherweight import stats

from .links import ROOT

RESULTS = ROOT / "benchmarks/results"
Record = dict[str, Any]
SUMMED = ("train_steps", "train_seconds", "train_examples", "eval_seconds", "eval_batches", "eval_examples")


@functools.cache
def records(file: str) -> tuple[Record, ...]:
    """The lines of a results file."""
    return tuple(json.loads(line) for line in (RESULTS / file).read_text(encoding="utf-8").splitlines())


def of_method(file: str, name: str) -> Record | None:
    """A method's row in a comparison, over all its seeds, if it took part."""
    runs = [row for row in records(file) if row["name"] == name]
    if len(runs) < 2:
        return runs[0] if runs else None
    found = stats.accuracy(np.array([run["right"] for run in runs]))
    summed = {key: sum(run[key] for run in runs) for key in SUMMED}
    largest = {"peak_bytes": max(run["peak_bytes"] for run in runs)}
    return {
        **runs[0],
        **summed,
        **largest,
        "accuracy": found.mean,
        "interval": list(found.interval),
        "n": found.n,
        "seeds": found.seeds,
    }


def of_methods(file: str) -> list[Record]:
    """The methods' rows of a comparison, without its references."""
    names = dict.fromkeys(row["name"] for row in records(file) if row.get("kind", "method") == "method")
    return [row for name in names if (row := of_method(file, name))]


def trials(name: str, file: str = "tune.jsonl") -> list[Record]:
    """The search of a method's learning rate, smallest first."""
    return sorted((t for t in records(file) if t["method"] == name), key=lambda t: (str(t["options"]), t["lr"]))


def against_peft(name: str) -> Record | None:
    """The same training with the real peft."""
    return next((row for row in records("peft_accuracy.jsonl") if row["method"] == name), None)


def experiment(name: str) -> Record | None:
    """One of the experiments of `benchmarks/speed.py`."""
    return next((row for row in records("speed.jsonl") if row["name"] == name), None)


def speedup(name: str, work: str) -> float | None:
    """How many times as fast as PEFT + Trainer: the median over the steps."""
    found = experiment(f"train {work} {name}")
    return statistics.median(found["ratios"]["trainer"]) if found else None


def memory(name: str, work: str) -> tuple[float, float] | None:
    """Peak bytes above the weights: ours and PEFT + Trainer's."""
    found = experiment(f"memory {work} {name}")
    return (above(found["bytes"]["ours"]), above(found["bytes"]["trainer"])) if found else None


def above(taken: Record) -> float:
    """What a run took above the weights."""
    return float(taken["resident"])


SMALL, LARGE = "smollm2-135m-instruct", "Llama-3.2-1B's shape, random weights"
"""The models that the tricks were measured with."""


def tricks_of(model: str) -> Record:
    """What was measured of the tricks with a model."""
    return next(found for found in records("tricks.jsonl") if found["name"] == model)


def trick(name: str, model: str = SMALL) -> Record:
    """Peak and shortest step with one of the tricks for small machines, and their shares of those without any."""
    rows = tricks_of(model)["rows"]

    peak, plain_peak = (statistics.median(r["peak"] for r in rows[which]) for which in (name, "none"))
    time = statistics.median(min(r["seconds"]) / min(r["plain_seconds"]) for r in rows[name])
    return {
        "name": name, "mib": peak / 2**20, "memory": peak / plain_peak, "time": time,
        "loss": rows[name][0]["losses"][-1],
    }  # fmt: skip


def percent(share: float, digits: int = 1) -> str:
    """A share as a reader wants it."""
    return f"{100 * share:.{digits}f}\u00a0%"


def accuracy(row: Record) -> str:
    """An accuracy with its interval and n."""
    low, high = (100 * x for x in row["interval"])
    n = row.get("n") or row["eval_examples"]
    value = row["accuracy"] if "accuracy" in row else row["validation_accuracy"]
    seeds = f", {row['seeds']} seeds" if row.get("seeds") else ""
    return f"{percent(value)} [{low:.1f}, {high:.1f}], n\u00a0=\u00a0{n}{seeds}"


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:,.0f} MiB"


def provenance(row: Record) -> str:
    """Machine, versions and date in a line."""
    told = row.get("provenance", row)
    versions = told["versions"]
    return f"{told['machine']}, torch {versions['torch']}, transformers {versions['transformers']}, {told['date']}"


def source(file: str, script: str = "") -> str:
    """A link to where a number comes from."""
    made = f" (made by [`{script}`](/benchmarks/{script}))" if script else ""
    return f"[`benchmarks/results/{Path(file).as_posix()}`](/benchmarks/results/{file}){made}"


def result(file: str) -> Record:
    """A results file that is one JSON object."""
    found: Record = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def trick_source(model: str = SMALL) -> str:
    """Where the numbers of the tricks come from."""
    found = tricks_of(model)
    kind = found["rows"]["none"][0]["dtype"]
    work = f"{model} in {kind}, LoRA, {found['size']} rows of up to 400 tokens an update, one round"
    return footnote(f"{work}; {provenance(found)}; {source('tricks.jsonl', 'tricks.py')}")


def footnote(text: str) -> str:
    """A line in small print: where something comes from."""
    return f"*{text}*\n{{ .caught }}"
