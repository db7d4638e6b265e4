"""Ten thousand broken inputs: data files, recipes, flags and adapter folders, each made from a seed and driven through the command line.

Each must be refused with exit code 2 and one line that names the place, before the model loads, within 200 MiB above the baseline and
without a write outside the out folder — or be accepted, where it may be. What a case is, and what counts as broken, is in
`tests/fuzzing.py`; the monsters (a gigabyte in a line, a million columns …) are in `tests/fuzz_monsters.py`.

    python benchmarks/fuzz.py --cases 10000 --seed 0 --workers 2 --out benchmarks/results/fuzz.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import fuzz_adapters
from featherweight import provenance
from fuzz_monsters import MONSTERS
from fuzzing import MORE_BYTES, SECONDS, Fuzzer, Outcome

Work = Callable[[Fuzzer], Outcome]
_TURN = threading.Lock()


def works(seeds: range) -> Iterator[Work]:
    """The monsters, then the seeds."""
    for monster in MONSTERS:
        yield lambda fuzzer, monster=monster: fuzzer.drive(monster(fuzzer.fresh(), fuzzer.good))  # type: ignore[misc]
    for seed in seeds:
        yield lambda fuzzer, seed=seed: fuzzer.seeded(seed)  # type: ignore[misc]


def run(folder: Path, queue: Iterator[Work], good: fuzz_adapters.Good, tell: Callable[[Outcome], None]) -> None:
    """Work until nothing is left to do."""
    with Fuzzer(folder, good) as fuzzer:
        while True:
            with _TURN:
                work = next(queue, None)
            if work is None:
                return
            outcome = work(fuzzer)
            with _TURN:
                tell(outcome)


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """What came of it."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for o in outcomes:
        kinds[o.case.kind if o.case.seed >= 0 else f"monster: {o.case.kind}"][o.verdict] += 1
    most, slowest = max(outcomes, key=lambda o: o.more_bytes), max(outcomes, key=lambda o: o.seconds)
    broken = sorted((o for o in outcomes if o.verdict == "broken"), key=lambda o: o.case.seed)
    return {
        "cases": len(outcomes),
        **{verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("refused", "accepted", "broken")},
        "that_must_be_refused": sum(o.case.must is True for o in outcomes),
        "that_must_be_accepted": sum(o.case.must is False for o in outcomes),
        "most_mib_above_baseline": round(most.more_bytes / 2**20, 1),
        "most_mib_by": f"{most.case.kind} (seed {most.case.seed})",
        "slowest_cpu_seconds": slowest.seconds,
        "slowest": f"{slowest.case.kind} (seed {slowest.case.seed})",
        "limits": {"mib": MORE_BYTES // 2**20, "cpu_seconds": SECONDS},
        "first_broken": [
            {"seed": o.case.seed, "kind": o.case.kind, "why": o.why, "said": o.said[-400:]} for o in broken[:10]
        ],
        "kinds": {kind: dict(found) for kind, found in sorted(kinds.items())},
    }


def table(told: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"{told['cases']:,} cases: {told['refused']:,} refused, {told['accepted']:,} accepted, {told['broken']:,} broken. "
        f"Most memory above the baseline: {told['most_mib_above_baseline']} MiB ({told['most_mib_by']}); "
        f"slowest: {told['slowest_cpu_seconds']} s of computing ({told['slowest']}).",
        "",
        f"`{told['command']}`, {told['date']}, {told['machine']}",
        "",
        "| kind | tried | refused | accepted | broken |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, found in told["kinds"].items():
        counts = [found.get(verdict, 0) for verdict in ("refused", "accepted", "broken")]
        lines.append(f"| {kind} | {sum(counts)} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fuzz, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="Seeded cases, besides the monsters.")
    parser.add_argument("--seed", type=int, default=0, help="The first seed.")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    start, outcomes = time.monotonic(), list[Outcome]()
    queue = works(range(given.seed, given.seed + given.cases))

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.verdict == "broken":
            print(f"broken: {outcome.case.kind}, seed {outcome.case.seed}: {outcome.why}", file=sys.stderr, flush=True)
        if len(outcomes) % 200 == 0:
            broken = sum(o.verdict == "broken" for o in outcomes)
            minutes = (time.monotonic() - start) / 60
            print(f"{len(outcomes):,} cases, {broken} broken, {minutes:.1f} min", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.workers) as pool:
        good = fuzz_adapters.good(Path(folder) / "good")
        jobs = [pool.submit(run, Path(folder) / str(i), queue, good, tell) for i in range(given.workers)]
        for job in jobs:
            job.result()
    told = (
        summary(outcomes)
        | {"minutes": round((time.monotonic() - start) / 60, 1), "seed": given.seed}
        | provenance.record()
    )
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
        given.out.with_suffix(".md").write_text(table(told), encoding="utf-8")
    print(table(told))
    sys.exit(told["broken"] > 0)


if __name__ == "__main__":
    main()
