"""Runs of several comparisons in one table: which rows are to be kept apart, and what they are called then.

A time or a number of bytes means something beside others of the same machine; an answer beside others to the same rows. So a method
that was run on two machines, on two sets of rows, with two models, or with two settings, is two rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .plain import plain
from .results import Entry, Line
from .stats import Estimate

UNKNOWN = "unknown machine"
LONGEST_NAME = 120
BETWEEN = " · "
OF = frozenset({"seed", "base", "tokenizer", "template", "data", "tested", "device"})
"""What of a run's identity is no setting."""


def machine(line: Line) -> str:
    """The machine that a run was made on, in words."""
    return plain(line.provenance.get("machine") or UNKNOWN, 200)


def by_machine(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The runs of every machine, in the order in which machines first occur."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(machine(line), []).append(line)
    return found


def letters(lines: Sequence[Line]) -> dict[str, str]:
    """A short name for every machine: A, B, …"""
    return {name: chr(ord("A") + i) if i < 26 else f"M{i}" for i, name in enumerate(by_machine(lines))}


def kept_apart(lines: Sequence[Line]) -> list[Line]:
    """The same runs; where one contender was run on several machines, models or sets of rows, or with several settings, `name` and
    `method` say which. Seeds are of one row.

    The first of a name keeps it, because `advice` looks for references by name.
    """
    called, rows = letters(lines), _rows_called(lines)
    places: dict[str, list[tuple[str, ...]]] = {}
    for line in lines:
        place = (called[machine(line)], _base(line), rows[line.tested], _settings(line, lines))
        if place not in (known := places.setdefault(line.name, [])):
            known.append(place)
    found = []
    for line in lines:
        known, place = (
            places[line.name],
            (called[machine(line)], _base(line), rows[line.tested], _settings(line, lines)),
        )
        marks = [mark for i, mark in enumerate(place) if mark and len({other[i] for other in known}) > 1]
        tail = "".join(BETWEEN + mark for mark in marks)
        name = line.name if place == known[0] else line.name + tail
        found.append(replace(line, name=name, method=plain(line.method, LONGEST_NAME) + tail))
    return found


def _base(line: Line) -> str:
    return plain(Path(str(line.provenance.get("base", ""))).name, 60)


def _rows_called(lines: Sequence[Line]) -> dict[str, str]:
    """What to call each set of test rows: its data set's name, or a number where two are of one."""
    sets = list(dict.fromkeys(line.tested for line in lines))
    names = [
        {plain(Path(str(line.provenance.get("data", ""))).name, 60) for line in lines if line.tested == s} for s in sets
    ]
    single = [next(iter(own)) if len(own) == 1 else "" for own in names]
    alone = all(single) and len(set(single)) == len(single)
    return {s: single[i] if alone else f"rows {i + 1}" for i, s in enumerate(sets)}


def _settings(line: Line, lines: Sequence[Line]) -> str:
    """In what a run differs from others of its name, beside its seed and what it is of."""
    others = [_identity(other) for other in lines if other.name == line.name]
    own = _identity(line)
    keys = sorted({key for other in others for key in (*own, *other) if own.get(key) != other.get(key)})
    return ", ".join(f"{key}={plain(str(own.get(key)), 40)}" for key in keys)


def _identity(line: Line) -> dict[str, Any]:
    told = line.provenance.get("identity")
    return {k: v for k, v in told.items() if k not in OF} if isinstance(told, dict) else {}


def contender(name: str) -> str:
    """As which it was run, wherever that was: `lora` of `lora · B`."""
    return name.split(BETWEEN)[0]


def estimate(entry: Entry) -> Estimate | None:
    """An entry's accuracy; of runs that were stored without every answer, the mean and the widest interval. None: not tested."""
    if entry.first.right and len({len(run.right) for run in entry.runs}) == 1:
        return entry.accuracy
    known = [run for run in entry.runs if run.eval_examples]
    if not known:
        return None
    mean = sum(run.accuracy for run in known) / len(known)
    interval = min(run.interval[0] for run in known), max(run.interval[1] for run in known)
    return Estimate(mean, interval, known[0].eval_examples, len(known))
