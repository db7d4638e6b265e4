"""What a checkpoint costs: seconds and megabytes, and the share of the training time, on the embedded model with LoRA.

One run saves every few steps, eleven times in all, for the median of a save; a second saves as often as the rule allows
that checkpoints take at most 2 % of the time, which is the worst case without `--save-steps`.

    python benchmarks/checkpoint_cost.py --out benchmarks/results/checkpoint_cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import featherweight as fw
from featherweight import provenance
from featherweight.api import begin
from featherweight.checkpoints import Checkpoints
from featherweight.engine.train import Report, Settings, fit
from featherweight.identity import check_base, identity_of
from featherweight.tokens import writer_for


class Timed(Checkpoints):
    """Writes down what each save took."""

    seconds: list[float]

    def save(self, *given: Any) -> bool:
        """As always."""
        start, before = time.monotonic(), self._at
        done = super().save(*given)
        if self._at != before:
            self.seconds.append(time.monotonic() - start)
        return done


def train(folder: Path, steps: int, **when: Any) -> tuple[Report, Timed]:
    """LoRA on the movie reviews."""
    base, task, method = fw.load_base(), fw.load_task("movie-reviews"), fw.LoRA()
    writer = writer_for(base, None, task.labels, [method])
    begin(base, method, task, writer, seed=0)
    identity = identity_of(base, task, {})
    checkpoints = Timed(folder, identity, check=lambda: check_base(base, identity), **when)
    checkpoints.seconds = []
    report = fit(base, writer.examples(task.train[:800])[0], Settings(steps=steps), checkpoints=checkpoints)
    return report, checkpoints


def share(report: Report) -> float:
    """Of the training time."""
    return report.saving_seconds / (report.seconds + report.saving_seconds)


def main() -> None:
    """Two runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        often, checkpoints = train(Path(folder, "often"), 36, every_steps=3)
        size = sum(f.stat().st_size for f in checkpoints.all()[0].iterdir())
        ruled, _ = train(Path(folder, "ruled"), 40, every_seconds=0.0)
    median = statistics.median(checkpoints.seconds)
    told = {
        "saves": len(checkpoints.seconds), "median_seconds": round(median, 3), "slowest_seconds": round(max(checkpoints.seconds), 3),
        "bytes": size, "seconds_per_step": round(often.seconds / often.steps, 3),
        "share_at_5_minutes": round(median / (300 + median), 6),
        "share_as_often_as_the_rule_lets_it": round(share(ruled), 4), "saves_by_the_rule": ruled.saves, "steps_by_the_rule": ruled.steps,
        "share_every_3_steps": round(share(often), 4), **provenance.record(),
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
