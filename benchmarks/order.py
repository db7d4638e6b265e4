"""Does the order of the rows matter? The same comparison forwards, backwards, and forwards once more, which says what is mere noise:
each run in a process of its own, and all in one.

What a method learns must not depend on the runs before it, whichever way; nor must, in processes of their own, what is measured of its
memory. Speeds are of shared cores and are not compared.

    python benchmarks/order.py --out benchmarks/results/order      # about a quarter of an hour
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from featherweight import on_disk, provenance
from featherweight.results import Line, read

METHODS = ("lora", "prefix_tuning", "ia3")
MIB = 2**20


def compared(methods: tuple[str, ...], isolate: bool, steps: int, folder: Path) -> dict[str, Line]:
    """One comparison's runs, by method."""
    command = [sys.executable, "-m", "featherweight.cli", "compare", "--methods", ",".join(methods), "--steps", str(steps),
               "--test-rows", "32", "--references", "none", "--general-text", "none", "--out", str(folder),
               "--isolate" if isolate else "--no-isolate"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {line.name: line for line in read(folder)}


def table(found: list[dict[str, Any]]) -> str:
    """What was held before the first step, and what training added to it, forwards and backwards."""
    rows = [
        "| each run | method | held before, forwards | backwards | added by training, forwards | backwards | learned the same |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        held, added = [], []
        for way in ("forwards", "backwards"):
            held.append(row[way]["before_bytes"])
            added.append(row[way]["peak_bytes"] - row[way]["before_bytes"])
        where = "in its own process" if row["isolate"] else "after the others, in one process"
        cells = [where, row["method"], *_pair(held), *_pair(added), "yes" if row["same_result"] else "NO"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _pair(values: list[int]) -> tuple[str, str]:
    first, second = values
    return f"{first / MIB:,.0f} MiB", f"{second / MIB:,.0f} MiB ({100 * (second - first) / first:+.1f} %)"


def main() -> None:
    """Four comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without an ending: .json and .md are written")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="only write the table of what was measured")
    args = parser.parse_args()
    if args.table:
        on_disk.write(args.out.with_suffix(".md"), table(json.loads(args.out.with_suffix(".json").read_text())["runs"]))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for isolate in (True, False):
            runs = {
                way: compared(methods, isolate, args.steps, Path(folder) / f"{isolate}-{way}")
                for way, methods in (("forwards", METHODS), ("backwards", METHODS[::-1]))
            }
            for name in METHODS:
                both = [runs[way][name] for way in ("forwards", "backwards")]
                same = both[0].losses == both[1].losses and both[0].predictions == both[1].predictions
                told = {
                    way: {"peak_bytes": runs[way][name].peak_bytes, "before_bytes": runs[way][name].before_bytes}
                    for way in runs
                }
                found.append({"isolate": isolate, "method": name, "same_result": same, **told})
    on_disk.write(
        args.out.with_suffix(".json"),
        json.dumps({**provenance.record(), "steps": args.steps, "runs": found}, indent=1) + "\n",
    )
    on_disk.write(args.out.with_suffix(".md"), table(found))
    print(table(found))


if __name__ == "__main__":
    main()
