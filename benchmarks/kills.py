"""A thousand kills: a training run is ended by SIGKILL at random instants and started again, until it is complete, again and again.

Every process is a real `featherweight train` of a tiny random Llama with dropout, accumulation, validation and a checkpoint every
other step, so that many kills fall inside a save. Every completed run must have the bytes of one that was never killed.

    python benchmarks/kills.py --kills 1000 --out benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny
from featherweight import provenance
from forked import Forked
from killing import Toll, Victim


def main() -> None:
    """Kill, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    start, toll, rng = time.monotonic(), Toll(), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder, Forked() as server:
        work = Path(folder)
        model, data = tiny.save_llama(work / "llama"), tiny.write(work / "reviews.csv", tiny.reviews())
        victim = Victim(server, work / "work", model, data)
        while toll.kills < given.kills and not toll.troubles:
            victim.kill_until_complete(toll, rng)
            print(
                f"{toll.kills} kills, {toll.inside_saves} inside saves, {toll.same} of {toll.runs} runs the same",
                file=sys.stderr,
            )
    told = {
        **asdict(toll),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "seed": given.seed,
        **provenance.record(),
    }
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(toll.same < toll.runs or toll.partial > 0 or bool(toll.troubles))


if __name__ == "__main__":
    main()
