"""What the numbers say, in words: which rows of a comparison can be told apart, and three lines of advice. Nothing else is known here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import stats
from .progress import spell_seconds
from .results import Entry, Line, entries

MIB = 2**20


@dataclass(frozen=True)
class Standing:
    """A row beside the best one: `behind` on the same test rows and seeds, and whether that can be told from nothing."""

    entry: Entry
    behind: stats.Difference | None
    """None for the best row itself."""
    apart: bool


def standings(lines: Sequence[Line]) -> list[Standing]:
    """Every row that was run with the same seeds and tested on the same rows, beside the best of them (Holm at 5 % for all)."""
    found = [e for e in entries(lines) if e.first.right]
    if not found:
        return []
    seeds = max(len(e.runs) for e in found)
    lead = next(e for e in found if len(e.runs) == seeds)
    alike = [e for e in found if e.first.tested == lead.first.tested and len(e.first.right) == len(lead.first.right)]
    alike = [e for e in alike if e.alongside(seeds) is not None and (len(e.runs) < seeds or e.seeds == lead.seeds)]
    rights = [e.alongside(seeds) for e in alike]
    known = [right for right in rights if right is not None]
    apart = stats.told_apart(known)
    best = max(range(len(alike)), key=lambda i: float(known[i].mean()))
    return [
        Standing(e, None if i == best else stats.difference(known[i], known[best]), apart[i])
        for i, e in enumerate(alike)
    ]


def verdict(lines: Sequence[Line]) -> list[str]:
    """In words: which row is best, which cannot be told apart from it, and which are worse, by how much."""
    found = standings(lines)
    if len(found) < 2:
        return []
    best = next(s.entry for s in found if s.behind is None)
    like = [s.entry.first.method for s in found if s.behind and not s.apart]
    worse = [f"{s.entry.first.method} ({points(s.behind)})" for s in found if s.behind and s.apart]
    name, seeds = best.first.method, max(len(s.entry.runs) for s in found)
    tested = f"{'one seed' if seeds == 1 else f'{seeds} seeds'}, the same rows"
    words = [
        f"best: {name}" + (f"; not to be told apart from it ({tested}): {', '.join(like)}" if like else f" ({tested})")
    ]
    return words + ([f"worse than {name}: {', '.join(worse)}"] if worse else [])


def points(difference: stats.Difference) -> str:
    """`-3.1 points [-5.0, -1.2]`."""
    low, high = (100 * edge for edge in difference.interval)
    return f"{100 * difference.mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def advice(lines: Sequence[Line]) -> list[str]:
    """Three lines: what to use, what it costs, and what the numbers do not tell.

    Of the methods that cannot be told apart from the best row, the one that needs least memory beyond the weights is named; where that
    differs by less than a tenth, the fastest of those. Where a reference that trains nothing is among those rows, that comes first:
    nothing has been shown to be worth its training.
    """
    found = standings(lines)
    group = [s for s in found if s.entry.first.kind == "method" and not s.apart]
    if not group:
        return []
    least = min(_above(s.entry) for s in group)
    cheap = [s for s in group if _above(s.entry) <= least + abs(least) / 10]
    chosen = min(cheap, key=lambda s: s.entry.mean(lambda r: r.train_seconds) or math.inf).entry
    name, estimate = chosen.first.method, chosen.accuracy
    what = f"use {name}: {100 * estimate.mean:.1f} % right"
    if len(group) > 1:
        why = "needs least memory" if len(cheap) == 1 else "is the fastest of those that need least memory"
        what += f"; of the {len(group)} methods that cannot be told apart here it {why}"
    elif sum(s.entry.first.kind == "method" for s in found) > 1:
        what += f", measurably the best method here after {chosen.first.train_steps} steps"
    if free := [s.entry.first.method for s in found if not s.entry.first.train_steps and not s.apart]:
        what = f"no method is measurably better here than this, which trains nothing: {', '.join(free)}; if one, {what}"
    return [f"advice: {what}", f"advice: {_cost(chosen, lines)}", f"advice: {_unknown(found)}"]


def _above(entry: Entry) -> float:
    return max(run.peak_bytes - run.before_bytes for run in entry.runs)


def _cost(entry: Entry, lines: Sequence[Line]) -> str:
    """Time, memory, disk, and what was forgotten."""
    first = entry.first
    took = entry.mean(lambda r: r.train_seconds) or 0.0
    words = f"it costs {spell_seconds(took)} of training, {_above(entry) / MIB:,.0f} MiB beyond what is held without training"
    if first.adapter_bytes:
        words += f", an adapter of {first.adapter_bytes / 1e6:.2f} MB"
    before = next((line.general_loss for line in lines if line.name == "untouched"), None)
    after = entry.mean(lambda r: r.general_loss)
    if before is not None and after is not None:
        words += f"; the loss on text that has nothing to do with the task goes from {before:.3f} to {after:.3f}"
    return words


def _unknown(found: Sequence[Standing]) -> str:
    """Which differences are too small to be seen with so many rows and seeds."""
    n, seeds = found[0].entry.accuracy.n, max(len(s.entry.runs) for s in found)
    rows = f"{n:,} test rows and {'one seed' if seeds == 1 else f'{seeds} seeds'}"
    group = [s for s in found if not s.apart]
    widths = [(s.behind.interval[1] - s.behind.interval[0]) / 2 for s in group if s.behind]
    if not widths:
        words = f"with {rows} the best row is told apart from every other"
        return words + ("; of other seeds it is not known" if seeds == 1 else "")
    low, high = group[0].entry.accuracy.interval
    seen = 100 * (max(widths) or (high - low) / 2)
    names = ", ".join(s.entry.first.method for s in group)
    return (
        f"with {rows} a difference below about {seen:.1f} points cannot be seen, so {names} are one group; "
        f"more test rows{' and seeds' if seeds == 1 else ''} see more"
    )
