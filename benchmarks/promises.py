"""The contract as a matrix: every promise of tests/contract.py × method × family, and what the real peft gives for the same.

    python benchmarks/promises.py > benchmarks/results/contract.md

Writes every single result to benchmarks/results/contract.jsonl on the way. About ten minutes on two cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import torch  # noqa: E402

import featherweight as fw  # noqa: E402
import reference  # noqa: E402
from contract import PROMISES, Promise, refusal  # noqa: E402
from featherweight.provenance import record  # noqa: E402
from subjects import EVERYWHERE, METHODS, OURS, Side, writes  # noqa: E402


@dataclass
class Result:
    """One promise × method × family × side. `outcome`: held, refused, broken or not asked."""

    side: str
    promise: str
    family: str
    method: str
    outcome: str
    deviation: float | None = None
    error: str | None = None


def ask(side: Side, name: str, promise: Promise, family: str, method: str) -> Result:
    """Try one promise."""
    result = Result(name, promise.name, family, method, "held")
    wanted = refusal(promise.name, family, method)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            result.deviation = promise.check(side, family, method, Path(folder))
    except Exception as e:  # whatever it is that a user would see
        expected = isinstance(e, fw.InputError) and wanted is not None
        result.outcome, result.error = (
            "refused" if expected else "broken",
            f"{type(e).__name__}: {str(e).splitlines()[0]}"[:200],
        )
        if name == "peft" and wanted is not None:
            result.outcome = "refused"
        return result
    if result.deviation is None:
        result.outcome = "not asked"
    elif result.deviation > promise.limit or (wanted is not None and name != "peft"):
        result.outcome = "broken"
    return result


def cells(counts: Counter[str]) -> str:
    """Counts in words."""
    return ", ".join(f"{counts[k]} {k}" for k in ("held", "refused", "not asked", "broken") if counts[k])


def worst(results: Iterable[Result]) -> str:
    """The largest deviation, and where."""
    seen = [r for r in results if r.deviation is not None]
    if not seen:
        return ""
    top = max(seen, key=lambda r: r.deviation or 0.0)
    if not top.deviation:
        return "0"
    size = "differs" if math.isinf(top.deviation) else f"{top.deviation:.1e}"
    return f"{size} ({top.method}, {top.family})"


def main() -> None:
    """Ask everything, print the tables."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: list[Result] = []
    with (HERE / "results" / "contract.jsonl").open("w", encoding="utf-8") as file:
        for promise in PROMISES:
            for family in EVERYWHERE:
                for method in METHODS:
                    asked = [ask(OURS, "ours", promise, family, method)]
                    if promise.ask_peft:
                        asked.append(ask(reference.THEIRS, "peft", promise, family, method))
                    for result in asked:
                        file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                    results += asked
            print(promise.name, file=sys.stderr, flush=True)
    report(results)


def report(results: list[Result]) -> None:
    """Markdown: per promise, per method × family, and what broke."""
    ours = [r for r in results if r.side == "ours"]
    theirs = [r for r in results if r.side == "peft"]
    made = record()
    print("# The contract, measured\n")
    print(
        f"`python benchmarks/promises.py`, {made['date']}, {made['machine']}; "
        + ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        + ".\n"
    )
    print(f"featherweight: {cells(Counter(r.outcome for r in ours))} of {len(ours)} combinations.")
    print("A deviation is relative; 0 is bit for bit; «differs» means other tokens or shapes.\n")
    print("| # | promise | allowed | featherweight | worst deviation | the real peft | worst deviation |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for p in PROMISES:
        own, other = ([r for r in side if r.promise == p.name] for side in (ours, theirs))
        row = [p.number, p.text, f"{p.limit:g}", cells(Counter(r.outcome for r in own)), worst(own)]
        row += [cells(Counter(r.outcome for r in other)), worst(other)] if other else ["", ""]
        print("| " + " | ".join(row) + " |")
    print("\n## Method × family: promises held / refused / not asked / broken\n")
    print("| family | " + " | ".join(METHODS) + " |\n| --- |" + " --- |" * len(METHODS))
    for family in EVERYWHERE:
        row = []
        for method in METHODS:
            counts = Counter(r.outcome for r in ours if (r.family, r.method) == (family, method))
            row.append(" / ".join(str(counts[k]) for k in ("held", "refused", "not asked", "broken")))
        print(f"| {family} ({writes(family)}) | " + " | ".join(row) + " |")
    print("\n## What breaks in the real peft\n")
    for p in PROMISES:
        broken = [r for r in theirs if r.promise == p.name and r.outcome == "broken"]
        for method in METHODS:
            if mine := [r for r in broken if r.method == method]:
                how = Counter(r.error or "another result" for r in mine).most_common(1)[0][0]
                print(f"- {p.name}, {method}: {', '.join(r.family for r in mine)} — {how}")
    if broken := [r for r in ours if r.outcome == "broken"]:
        print("\n## Known failures of ours\n")
        for r in broken:
            print(f"- {r.promise}, {r.method}, {r.family}: {r.error or r.deviation}")


if __name__ == "__main__":
    main()
