"""A comparison that is killed in the middle, with everything that works for it, and asked again: is the result that of one never killed?

    python benchmarks/interrupted_comparison.py --out benchmarks/results/interrupted_comparison.json     # about ten minutes

The real model and data, three runs; `kill -9` on the command and on its worker in the middle of each run in turn. Compared are every loss
and answer of every run, and the bytes of every adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from featherweight import on_disk, provenance
from featherweight.results import read

METHODS = ("lora", "prompt_tuning", "ia3")
WEIGHTS = "adapter_model.safetensors"


def command(steps: int, folder: Path) -> list[str]:
    """The comparison."""
    return [sys.executable, "-u", "-m", "featherweight.cli", "compare", "--methods", ",".join(METHODS), "--steps", str(steps),
            "--test-rows", "64", "--references", "none", "--general-text", "none", "--out", str(folder)]  # fmt: skip


def killed_at(words: str, line: list[str]) -> bool:
    """Start it, and kill it and its workers when it says these words; whether it came to that."""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for said in run.stderr:
            if words in said:
                workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
                for pid in (run.pid, *map(int, workers)):
                    os.kill(pid, signal.SIGKILL)
                return True
    return False


def result(folder: Path) -> dict[str, tuple[object, ...]]:
    """What must be the same, by run."""
    return {
        line.name: (line.losses, line.predictions, line.identity, (folder / line.name / WEIGHTS).read_bytes())
        for line in read(folder)
    }


def main() -> None:
    """One comparison that is left alone, one that is killed three times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        subprocess.run(command(args.steps, whole), check=True, stdout=subprocess.DEVNULL)
        kills = 0
        for title in ("LoRA", "Prompt Tuning", "(IA)³"):
            kills += killed_at(f"{title}: train: {args.steps // 2}/{args.steps}", command(args.steps, broken))
        finished = len(read(broken))
        subprocess.run(command(args.steps, broken), check=True, stdout=subprocess.DEVNULL)
        same = result(whole) == result(broken)
    found = {"kills": kills, "runs": len(METHODS), "finished_before_the_last_start": finished, "same_in_the_end": same}
    on_disk.write(args.out, json.dumps({**found, "steps": args.steps, **provenance.record()}, indent=1) + "\n")
    print(found)
    if not same or kills != len(METHODS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
