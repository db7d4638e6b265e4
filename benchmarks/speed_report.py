"""The table of what `speed.py` measured: what was wanted, what was reached, and what the machine itself would allow.

    python benchmarks/speed_report.py benchmarks/results/speed.jsonl > benchmarks/results/speed.md

"At most" is the ratio that ours would have if its products ran at the measured matrix-multiply rate and all else were free.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Found = dict[str, dict[str, Any]]
NAMES = {
    "lora": "LoRA", "prompt_tuning": "Prompt Tuning", "p_tuning": "P-Tuning", "prefix_tuning": "Prefix-Tuning", "ia3": "(IA)³",
}  # fmt: skip
WORK = {"reviews": "(a) reviews", "answers": "(b) answers", "mt0": "(c) mt0's shape", "long": "(d) long rows"}


def spread(values: list[float]) -> str:
    """Median and the middle half of some values."""
    if len(values) < 4:
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.2f} ({low:.2f}–{high:.2f})"


def ratio_line(what: str, target: float, result: dict[str, Any], kinds: list[str]) -> str:
    """One row of the table from the ratios to the fastest of `kinds`."""
    kind = min(kinds, key=lambda k: statistics.median(result["ratios"][k]))
    ratios = result["ratios"][kind]
    fractions = result.get("limit", {}).get("fractions")
    most = ""
    if fractions:
        most = f"{statistics.median(r / f for r, f in zip(ratios, fractions, strict=True)):.1f}×"
    return line(what, f"≥ {target:g}×", spread(ratios) + "×", statistics.median(ratios) >= target, most)


def line(what: str, target: str, reached: str, held: bool, most: str = "") -> str:
    """A row of the table."""
    return f"| {what} | {target} | {reached} | {'yes' if held else '**no**'} | {most} |"


def losses_apart(result: dict[str, Any], kind: str) -> float:
    """Mean distance of the two loss curves, relative to their height."""
    ours, theirs = result["losses"]["ours"], result["losses"][kind]
    return statistics.mean(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / statistics.mean(theirs)


def rows(found: Found) -> list[str]:
    """All rows whose experiments are there."""
    table: list[str] = []

    def add(name: str, make: Callable[[dict[str, Any]], str]) -> None:
        if name in found:
            table.append(make(found[name]))

    add("train reviews lora", lambda r: ratio_line("(a) LoRA, against PEFT + Trainer", 5, r, ["trainer"]))
    add(
        "train reviews lora sorted",
        lambda r: ratio_line(
            "(a) LoRA, against PEFT's best loop, rows sorted by length", 3, r, ["loop_sdpa", "loop_eager"]
        ),
    )
    add(
        "train reviews lora reference",
        lambda r: ratio_line("(a) LoRA, against the reference recipe", 20, r, ["reference"]),
    )
    for work in ("reviews", "answers"):
        for method, title in NAMES.items():
            if (work, method) != ("reviews", "lora"):
                what = f"{WORK[work]}, {title}, against PEFT + Trainer"
                add(f"train {work} {method}", partial(ratio_line, what, 3, kinds=["trainer"]))
    add("train mt0 lora reference", lambda r: ratio_line("(c) LoRA, against the reference recipe", 5, r, ["reference"]))
    for name, result in found.items():
        if name.startswith("memory"):
            _, work, method = name.split()
            sides = result["bytes"]
            share = {k: sides["ours"][k] / sides["trainer"][k] for k in ("resident", "tensors")}
            table.append(
                line(
                    f"{WORK[work]}, {NAMES[method]}: peak memory above the weights, of PEFT + Trainer's",
                    "≤ 0.5×",
                    f"{share['resident']:.2f}× ({sides['ours']['resident'] / 2**20:,.0f} of "
                    f"{sides['trainer']['resident'] / 2**20:,.0f} MiB; tensors alone {share['tensors']:.2f}×)",
                    share["resident"] <= 0.5,
                )
            )
    if "train answers lora" in found:
        fractions = found["train answers lora"]["limit"]["fractions"]
        table.append(
            line(
                "(b) LoRA: fraction of the matrix-multiply limit",
                "≥ 0.5",
                spread(fractions),
                statistics.median(fractions) >= 0.5,
            )
        )
    add("evaluation", lambda r: ratio_line("evaluation by label scoring, against `generate`", 5, r, ["generate"]))
    if "sizes" in found:
        for size, ratios in found["sizes"]["ratios"].items():
            table.append(
                line(
                    f"a step of full fine-tuning takes, of LoRA's, {size} parameters",
                    "> 1×",
                    spread(ratios) + "×",
                    statistics.median(ratios) > 1,
                )
            )
    if "growth lora" in found:
        growth = found["growth lora"]
        rest = {int(n): 1000 * (s - growth["attention"][n]) / int(n) for n, s in growth["seconds"].items()}
        each = ", ".join(f"{n:,} tokens {growth['seconds'][str(n)]:.1f} s, {ms:.2f} ms" for n, ms in rest.items())
        linear = max(rest.values()) <= 1.2 * min(rest.values())
        what = "(d) a step of one row, and its time a token without attention"
        table.append(line(what, "a token costs the same", each, linear))
        bytes_ = {int(n): b / 2**20 for n, b in growth["loss_bytes"].items()}
        each = ", ".join(f"{n:,} tokens {mib:.0f} MiB" for n, mib in bytes_.items())
        constant = max(bytes_.values()) <= 1.05 * min(bytes_.values())
        table.append(line("(d) memory that the loss takes for a while", "the same for any length", each, constant))
    if "first step" in found:
        seconds_ = found["first step"]["seconds"]
        table.append(
            line("from the command to the end of the first step, s", "≤ 15", spread(seconds_), max(seconds_) <= 15)
        )
    return table


def main() -> None:
    """Print the table, how far the loss curves are apart, and where the figures come from."""
    found = {r["name"]: r for r in map(json.loads, Path(sys.argv[1]).read_text().splitlines())}
    print("# Speed and memory, against what people would otherwise run\n")
    print("| what | target | reached: median (middle half) | held | at most on this machine |\n|---|---|---|---|---|")
    print("\n".join(rows(found)))
    print("\nLoss curves on the same rows, mean distance relative to their height:\n")
    for name, result in found.items():
        for kind in result.get("losses", {}):
            if kind not in ("ours", "full"):
                print(f"* {name}, {kind}: {losses_apart(result, kind):.2%}")
    for name, result in found.items():
        if name.startswith("exactness"):
            off = ", ".join(f"{kind} {value:.1%}" for kind, value in result["off"].items())
            print(f"* {name.split()[1]}: gradients in bfloat16 are off those in float32 by {off}")
    one = next(iter(found.values()))
    rates = [r["limit"]["rate"] / 1e9 for r in found.values() if "limit" in r]
    versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
    print(f"\nMachine: {one['machine']}; matrix-multiply rate {min(rates):.0f}–{max(rates):.0f} GFLOP/s in bfloat16.")
    print(
        f"Versions: {versions}. Date: {one['date']}. Command: `python benchmarks/speed.py --out benchmarks/results/speed.jsonl`."
    )


if __name__ == "__main__":
    main()
