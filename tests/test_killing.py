"""A run that is killed, at whatever instant, goes on and ends in the same bytes. `benchmarks/kills.py` does this a thousand times."""

from __future__ import annotations

import random
from pathlib import Path

import tiny
from forked import Forked
from killing import Toll, Victim


def test_a_run_killed_at_random_instants_ends_in_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "reviews.csv", tiny.reviews())
    with Forked() as server:
        victim, toll, rng = Victim(server, tmp_path / "work", llama, data), Toll(), random.Random(0)
        while (toll.kills < 8 or not toll.inside_saves) and toll.kills < 40 and not toll.troubles:
            victim.kill_until_complete(toll, rng)
    assert not toll.troubles
    assert toll.partial == 0
    assert toll.same == toll.runs
    assert toll.inside_saves > 0
