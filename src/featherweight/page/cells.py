"""The columns of the page's table: the reference's eight first, then everything else that was measured.

They stand in the reference's order but for the accuracy, which follows the name: a phone shows two columns, and these are what one
looks for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..advice import Standing
from ..merged import estimate
from ..plain import plain
from ..progress import spell_seconds
from ..results import Entry, Line
from ..tables import COLUMNS

MIB = 2**20
NONE = "–"


@dataclass(frozen=True)
class Row:
    """One row of the table, with what its cells need to know of the others."""

    entry: Entry
    standing: Standing | None
    """None: it cannot be compared with the best row."""
    before: float | None
    """Loss on general text before any training, on the same machine."""
    machine: str

    @property
    def alike(self) -> bool:
        """It is the best row, or cannot be told apart from it."""
        return self.standing is not None and not self.standing.apart

    def mean(self, figure: Callable[[Line], float | None]) -> float | None:
        """The mean over the seeds; None where one is missing."""
        found = [value for value in map(figure, self.entry.runs) if value is not None]
        return statistics.fmean(found) if len(found) == len(self.entry.runs) else None


@dataclass(frozen=True)
class Cell:
    """What stands in it, smaller what belongs to it, and by what it is sorted: None goes last."""

    words: str
    more: str = ""
    key: float | str | None = None


EMPTY = Cell(NONE)


@dataclass(frozen=True)
class Column:
    """One column; `group` is what stands above it."""

    heading: str
    group: str
    cell: Callable[[Row], Cell]
    always: bool = False
    """It is there even where it has nothing to say."""
    numeric: bool = True


def columns(rows: Sequence[Row]) -> list[Column]:
    """Those that have something to say, after the reference's, which are always there."""
    several = len({row.machine for row in rows}) > 1
    machine = [Column("Machine", "", lambda row: Cell(row.machine, key=row.machine), True, False)] if several else []
    name, *rest, accuracy = REFERENCE
    more = [column for column in MORE if any(column.cell(row) != EMPTY for row in rows)]
    return [name, accuracy, *machine, *rest, *more]


def mebibytes(figure: Callable[[Row], float | None]) -> Callable[[Row], Cell]:
    """A cell of bytes; those that are 0 were not measured."""

    def cell(row: Row) -> Cell:
        value = figure(row)
        return Cell(f"{value / MIB:,.0f} MiB", key=value) if value else EMPTY

    return cell


def seconds(figure: Callable[[Line], float | None]) -> Callable[[Row], Cell]:
    """A cell of time: the mean over the seeds."""

    def cell(row: Row) -> Cell:
        value = row.mean(figure)
        return Cell(f"{value:.1f} s" if value < 10 else spell_seconds(value), key=value) if value else EMPTY

    return cell


def rate(count: str, took: str, unit: str) -> Callable[[Row], Cell]:
    """So many a second, over all seeds."""

    def cell(row: Row) -> Cell:
        value = row.entry.rate(count, took)
        return Cell(f"{value:,.0f} {unit}", key=value) if value else EMPTY

    return cell


def largest(name: str) -> Callable[[Row], float | None]:
    """The largest of the seeds; None where one has none."""

    def figure(row: Row) -> float | None:
        found = [getattr(run, name) for run in row.entry.runs]
        return None if None in found else max(found)

    return figure


def _method(row: Row) -> Cell:
    early = next((run for run in row.entry.runs if run.stopped), None)
    return Cell(
        row.entry.first.method,
        f"{plain(early.stopped, 60)} at step {early.train_steps}" if early else "",
        row.entry.first.method,
    )


def _batch(row: Row) -> Cell:
    size = row.entry.first.batch_size
    return Cell(str(size), key=size) if size and row.entry.first.train_steps else EMPTY


def _total(row: Row) -> Cell:
    total = row.entry.first.total_params
    return Cell(f"{total:,}", key=total) if total else EMPTY


def _trainable(row: Row) -> Cell:
    first = row.entry.first
    if not first.total_params:
        return EMPTY
    share = f"{100 * first.trainable_params / first.total_params:.4f} %"
    return Cell(f"{first.trainable_params:,}", share, first.trainable_params)


def _speed(steps: str, examples: str, took: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value, more = row.entry.rate(steps, took), row.entry.rate(examples, took)
        return Cell(f"{value:.2f} it/s", f"{more:,.1f} ex/s", value) if value and more else EMPTY

    return cell


def _accuracy(row: Row) -> Cell:
    known = estimate(row.entry)
    if known is None:
        return EMPTY
    low, high = known.interval
    seeds = f", {known.seeds} seeds" if known.seeds > 1 else ""
    return Cell(f"{100 * known.mean:.1f} %", f"[{100 * low:.1f}, {100 * high:.1f}], n = {known.n:,}{seeds}", known.mean)


def _macro_f1(row: Row) -> Cell:
    value = row.mean(lambda run: run.macro_f1 if run.metric == "labels" else None)
    return Cell(f"{100 * value:.1f} %", key=value) if value is not None else EMPTY


def _difference(row: Row) -> Cell:
    standing = row.standing
    if standing is None:
        return EMPTY
    if standing.behind is None:
        return Cell("best row", key=0.0)
    low, high = (f"{100 * edge:+.1f}" for edge in standing.behind.interval)
    verdict = "told apart" if standing.apart else "not told apart"
    return Cell(f"{100 * standing.behind.mean:+.1f} points", f"[{low}, {high}], {verdict}", standing.behind.mean)


def _forgotten(row: Row) -> Cell:
    after = row.mean(lambda run: run.general_loss)
    if after is None:
        return EMPTY
    if row.before is None or not row.entry.first.train_steps:
        return Cell(f"{after:.3f}", key=after)
    return Cell(f"{row.before:.3f} → {after:.3f}", f"{after - row.before:+.3f}", after)


def _above(row: Row) -> float | None:
    known = all(run.before_bytes and run.peak_bytes for run in row.entry.runs)
    return max(run.peak_bytes - run.before_bytes for run in row.entry.runs) if known else None


def _predicted(row: Row) -> Cell:
    first = row.entry.first
    if first.predicted_bytes is None:
        return EMPTY
    words, measured = f"{first.predicted_bytes / MIB:,.0f} MiB", max(run.peak_bytes for run in row.entry.runs)
    if first.predicted_interval is None:
        return Cell(words, key=first.predicted_bytes)
    low, high = first.predicted_interval
    held = "it was inside" if low <= measured <= high else f"it was {measured / MIB:,.0f}"
    return Cell(words, f"[{low / MIB:,.0f}, {high / MIB:,.0f}], {held}", first.predicted_bytes)


def _adapter(row: Row) -> Cell:
    size = largest("adapter_bytes")(row)
    return Cell(f"{size / 1e6:.2f} MB", key=size) if size else EMPTY


def _energy(row: Row) -> Cell:
    joules = row.mean(lambda run: run.joules)
    return Cell(f"{joules / 3600:.2f} Wh", f"{joules:,.0f} J", joules) if joules is not None else EMPTY


REFERENCE = tuple(
    Column(heading, "", cell, True, cell is not _method)
    for heading, cell in zip(
        COLUMNS,
        (
            _method, _batch, _total, _trainable, mebibytes(largest("peak_bytes")),
            _speed("train_steps", "train_examples", "train_seconds"), _speed("eval_batches", "eval_examples", "eval_seconds"), _accuracy,
        ),
        strict=True,
    )
)  # fmt: skip
MORE = (
    Column("Macro-F1", "How good", _macro_f1),
    Column("Difference to the best row", "How good", _difference),
    Column("Loss on general text", "What was forgotten", _forgotten),
    Column("Memory of evaluation", "Memory", mebibytes(largest("eval_peak_bytes"))),
    Column("Above the weights", "Memory", mebibytes(_above)),
    Column("Predicted", "Memory", _predicted),
    Column("Reserved", "Memory", mebibytes(largest("reserved_bytes"))),
    Column("Whole process", "Memory", mebibytes(largest("host_bytes"))),
    Column("Adapter", "Memory", _adapter),
    Column("Tokens, training", "Speed", rate("train_tokens", "train_seconds", "tok/s")),
    Column("Tokens, evaluation", "Speed", rate("eval_tokens", "eval_seconds", "tok/s")),
    Column("Load", "Time", seconds(lambda run: run.load_seconds)),
    Column("Tokenise", "Time", seconds(lambda run: run.tokenise_seconds)),
    Column("Train", "Time", seconds(lambda run: run.train_seconds)),
    Column("Evaluate", "Time", seconds(lambda run: run.eval_seconds)),
    Column("Whole", "Time", seconds(lambda run: run.whole_seconds)),
    Column("Energy", "Energy", _energy),
)
