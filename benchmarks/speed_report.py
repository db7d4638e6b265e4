"""The table of what `speed.py` measured: what was wanted, what was reached, and what the machine itself would allow.

    python benchmarks/speed_report.py benchmarks/results/speed.jsonl > benchmarks/results/speed.md

"At most" is the ratio that ours would have if its products ran at the measured matrix-multiply rate and all else were free.
"""

from __future__ import annotations

import json
import re
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
SHAPE = re.compile(r"(train|memory) (\w+)-(bf16|nf4)-(\d+)(-mixed)? lora")
SIDES = {"trainer": "PEFT + Trainer", "liger": "PEFT + Trainer + Liger", "unsloth": "Unsloth"}


def spread(values: list[float]) -> str:
    """Median and the middle half of some values."""
    if len(values) < 4:
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.2f} ({low:.2f}–{high:.2f})"


def ratio_line(what: str, target: float, result: dict[str, Any], kinds: list[str], note: str = "") -> str:
    """One row of the table from the ratios to the fastest of `kinds`."""
    kind = min(kinds, key=lambda k: statistics.median(result["ratios"][k]))
    ratios = result["ratios"][kind]
    fractions = result.get("limit", {}).get("fractions")
    most = ""
    if fractions:
        most = f"{statistics.median(r / f for r, f in zip(ratios, fractions, strict=True)):.1f}×"
    return line(what, f"≥ {target:g}×{note}", spread(ratios) + "×", statistics.median(ratios) >= target, most)


def line(what: str, target: str, reached: str, held: bool, most: str = "") -> str:
    """A row of the table."""
    return f"| {what} | {target} | {reached} | {'yes' if held else '**no**'} | {most} |"


def title(work: str) -> str:
    """A work in words: `8b-nf4-2048` is a Llama of 8B in NF4, rows of 2,048 tokens."""
    if work in WORK:
        return WORK[work]
    shape, kind, length, *mixed = work.split("-")
    rows_ = f"rows of {int(length) // 4:,}–{int(length):,} tokens" if mixed else f"rows of {int(length):,} tokens"
    return f"Llama {shape.upper() if shape[0].isdigit() else shape}, {kind.upper()}, {rows_}"


def speed_rows(found: Found) -> list[str]:
    """The shapes of accelerators: seconds of the same steps, against each rival, and tokens a second."""
    table = []
    for name, result in found.items():
        if not SHAPE.match(name) or "ratios" not in result:
            continue
        [kind] = result["ratios"]
        of = {
            k: statistics.median(n / s for n, s in zip(result["tokens"], result["seconds"][k], strict=True))
            for k in ("ours", kind)
        }
        what = (
            f"{title(name.split()[1])}, LoRA, against {SIDES[kind]}: {of['ours']:,.0f} tokens/s against {of[kind]:,.0f}"
        )
        note = " (for information)" if kind == "liger" else ""
        table.append(ratio_line(what, 2 if kind == "trainer" else 1, result, [kind], note))
    return table


def memory_rows(found: Found) -> list[str]:
    """Peak memory above the weights, of each rival's."""
    table = []
    for name, result in found.items():
        if not name.startswith("memory"):
            continue
        _, work, method = name.split()
        ours = result["bytes"]["ours"]
        for kind, theirs in result["bytes"].items():
            if kind == "ours":
                continue
            most, share = 0.5 if kind == "trainer" else 1, ours["resident"] / theirs["resident"]
            tensors = f"; tensors alone {ours['tensors'] / theirs['tensors']:.2f}×" if "tensors" in ours else ""
            table.append(
                line(
                    f"{title(work)}, {NAMES[method]}: peak memory above the weights, of {SIDES[kind]}'s",
                    f"≤ {most:g}×" + (" (for information)" if kind == "liger" else ""),
                    f"{share:.2f}× ({ours['resident'] / 2**20:,.0f} of {theirs['resident'] / 2**20:,.0f} MiB{tensors})",
                    share <= most,
                )
            )
    return table


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
    add("train mt0 lora", lambda r: ratio_line("(c) LoRA, against PEFT + Trainer", 2, r, ["trainer"]))
    add("train mt0 lora reference", lambda r: ratio_line("(c) LoRA, against the reference recipe", 5, r, ["reference"]))
    table += speed_rows(found) + memory_rows(found)
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
        constant = max(bytes_.values()) <= 1.1 * min(
            bytes_.values()
        )  # a piece of the head is never larger than the largest
        table.append(line("(d) memory that the loss takes for a while", "the same for any length", each, constant))
    if "first step" in found:
        seconds_ = found["first step"]["seconds"]
        table.append(
            line("from the command to the end of the first step, s", "≤ 15", spread(seconds_), max(seconds_) <= 15)
        )
    return table


def main() -> None:
    """Print the table, how far the loss curves are apart, and where the figures come from."""
    file = sys.argv[1]
    found = {r["name"]: r for r in map(json.loads, Path(file).read_text().splitlines())}
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
    sides = {kind for r in found.values() for kind in (*r.get("ratios", {}), *r.get("bytes", {}))}
    missing = {
        k: why
        for r in found.values()
        for k, why in (r.get("left_out", {}) | r.get("failed", {})).items()
        if k not in sides
    }
    if missing:
        print("\nLeft out: " + "; ".join(f"{SIDES.get(kind, kind)}: {why}" for kind, why in missing.items()) + ".")
    others = {module: version for r in found.values() for module, version in r.get("installed", {}).items()}
    rates = [r["limit"]["rate"] / 1e9 for r in found.values() if "limit" in r]
    versions = ", ".join(f"{k} {v}" for k, v in (one["versions"] | others).items())
    rate = f"; matrix-multiply rate {min(rates):.0f}–{max(rates):.0f} GFLOP/s in bfloat16" if rates else ""
    print(f"\nMachine: {one['machine']}{rate}.")
    print(f"Versions: {versions}. Date: {one['date']}. Command: `python benchmarks/speed.py --out {file}`.")


if __name__ == "__main__":
    main()
