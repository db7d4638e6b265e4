"""A thousand kills: a training run is ended by SIGKILL at random instants and started again, until it is complete, again and again.

Every process is a real `featherweight train` of a tiny random Llama with dropout, accumulation, validation and a checkpoint every
other step, so that many kills fall inside a save. Every completed run must have the bytes of one that was never killed.

    python benchmarks/kills.py --kills 1000 --jobs 3 --out benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny
from featherweight import provenance
from forked import Forked
from killing import Toll, Victim


def main() -> None:
    """Kill, and write down what came of it, after every run that was completed: this script may be killed, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="victims at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    start, tolls, one_by_one = time.monotonic(), [Toll() for _ in range(given.jobs)], Lock()
    with tempfile.TemporaryDirectory() as folder:
        model, data = tiny.save_llama(Path(folder, "llama")), tiny.write(Path(folder, "reviews.csv"), tiny.reviews())

        def kill(job: int) -> None:
            rng = random.Random(given.seed + job)
            with Forked() as server:
                victim = Victim(server, Path(folder, str(job)), model, data)
                while sum(t.kills for t in tolls) < given.kills and not any(t.troubles for t in tolls):
                    victim.kill_until_complete(tolls[job], rng)
                    with one_by_one:
                        tell(tolls, given, start)

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(kill, range(given.jobs)))
    whole = tell(tolls, given, start)
    sys.exit(whole.same < whole.runs or whole.partial > 0 or bool(whole.troubles))


def tell(tolls: Sequence[Toll], given: argparse.Namespace, start: float) -> Toll:
    """Write what it has come to so far."""
    whole = Toll(
        **{
            f.name: sum((getattr(t, f.name) for t in tolls), start=type(getattr(tolls[0], f.name))())
            for f in fields(Toll)
        }
    )
    minutes = round((time.monotonic() - start) / 60, 1)
    told = asdict(whole) | {"jobs": given.jobs, "seed": given.seed, "minutes": minutes} | provenance.record()
    if given.out:
        beside = given.out.with_name(f".{given.out.name}")
        beside.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(given.out)
    print(
        f"{whole.kills} kills, {whole.inside_saves} inside saves, {whole.same} of {whole.runs} runs the same",
        flush=True,
    )
    return whole


if __name__ == "__main__":
    main()
