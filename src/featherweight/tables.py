"""The table: terminal, Markdown, CSV and LaTeX. First the columns of the reference table, in its order, then what else was measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from . import on_disk
from .advice import points, standings
from .progress import spell_seconds
from .redaction import clean
from .results import Entry, Line, entries, write
from .stats import Estimate

COLUMNS = (
    "Fine-Tuning Method", "Batch Size", "Number of total params", "Trainable params", "Required memory",
    "Speed (Train)", "Speed (Eval)", "Accuracy",
)  # fmt: skip
MORE = (
    "Method", "Macro-F1", "Against the best", "Loss on general text", "Memory above what is held", "Memory of evaluation",
    "Predicted memory", "Tokens/s", "Adapter", "Load + tokenise + train + evaluate",
)  # fmt: skip
NONE = "–"
MIB = 2**20


def cells(entry: Entry) -> tuple[str, ...]:
    """A row as text, one cell per column. Speeds are over all its seeds, the memory is the largest."""
    runs = entry.runs
    first, early = runs[0], next((run for run in runs if run.stopped), None)
    share = 100 * first.trainable_params / first.total_params if first.total_params else 0.0
    trained = bool(first.train_steps)
    return (
        first.method + (f" ({early.stopped} at step {early.train_steps})" if early else ""),
        str(first.batch_size) if trained else NONE,
        f"{first.total_params:,}" if first.total_params else NONE,
        f"{first.trainable_params:,} ({share:.4f} %)" if trained else "0",
        f"{max(run.peak_bytes for run in runs) / MIB:,.0f} MiB" if trained else NONE,
        _speed(entry, "train_steps", "train_examples", "train_seconds"),
        _speed(entry, "eval_batches", "eval_examples", "eval_seconds"),
        estimate_cell(entry.accuracy) if first.right else NONE,
    )


def _speed(entry: Entry, iterations: str, examples: str, seconds: str) -> str:
    its, rows = entry.rate(iterations, seconds), entry.rate(examples, seconds)
    return f"{its:.2f} it/s, {rows:.1f} ex/s" if its and rows else NONE


def more_cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The second table's rows, in the order of the first."""
    behind = {s.entry.first.name: s for s in standings(lines)}
    before = next((line.general_loss for line in lines if line.name == "untouched"), None)
    return [_more(entry, behind.get(entry.first.name), before) for entry in entries(lines)]


def _more(entry: Entry, standing: object, before: float | None) -> tuple[str, ...]:
    first, runs = entry.first, entry.runs
    trained, difference = bool(first.train_steps), getattr(standing, "behind", None)
    words = "best" if standing is not None and difference is None else NONE
    if difference is not None:
        words = points(difference) + ("" if getattr(standing, "apart", False) else ", not told apart")
    f1, loss = entry.mean(lambda r: r.macro_f1), entry.mean(lambda r: r.general_loss)
    general = (
        NONE if loss is None else f"{loss:.3f}" + (f" ({loss - before:+.3f})" if trained and before is not None else "")
    )
    predicted = NONE
    if first.predicted_bytes is not None and first.predicted_interval is not None:
        low, high = (edge / MIB for edge in first.predicted_interval)
        predicted = f"{first.predicted_bytes / MIB:,.0f} [{low:,.0f}, {high:,.0f}] MiB"
    tokens, took = entry.rate("train_tokens", "train_seconds"), ("load", "tokenise", "train", "eval")
    seconds = [entry.mean(lambda r, name=name: getattr(r, f"{name}_seconds")) or 0.0 for name in took]  # type: ignore[misc]
    above, largest = max(r.peak_bytes - r.before_bytes for r in runs), max(r.eval_peak_bytes for r in runs)
    return (
        first.method,
        f"{100 * f1:.1f} %" if f1 is not None and first.metric == "labels" else NONE,
        words,
        general,
        f"{above / MIB:,.0f} MiB" if trained else NONE,
        f"{largest / MIB:,.0f} MiB" if largest else NONE,
        predicted,
        f"{tokens:,.0f}" if tokens else NONE,
        f"{first.adapter_bytes / 1e6:.2f} MB" if first.adapter_bytes else NONE,
        " + ".join(map(spell_seconds, seconds)) if first.load_seconds else NONE,
    )


def accuracy_cell(correct: int, n: int, interval: tuple[float, float]) -> str:
    """`81.2 % [77.9, 84.1], n = 600`."""
    return f"{100 * correct / n:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}], n = {n}"


def estimate_cell(found: Estimate) -> str:
    """The same, and of how many seeds, if of more than one."""
    low, high = found.interval
    seeds = f", {found.seeds} seeds" if found.seeds > 1 else ""
    return f"{100 * found.mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}], n = {found.n}{seeds}"


def score_line(correct: int, n: int, interval: tuple[float, float], macro_f1: float, metric: str) -> str:
    """One model's accuracy in a line."""
    f1 = f", macro-F1 {100 * macro_f1:.1f} %" if metric == "labels" else ""
    return f"accuracy {accuracy_cell(correct, n, interval)}{f1}, metric {metric}"


def markdown(lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The tables as Markdown, with the notes between them."""
    found = [_table([COLUMNS, *map(cells, entries(lines))]), "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join([*found, *([_table([MORE, *more_cells(lines)])] if lines else [])]) + "\n"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "| " + " | ".join("---" for _ in rows[0]) + " |", *body])


def comma_separated(lines: Sequence[Line]) -> str:
    """Both tables as one, as CSV: the same cells."""
    out, found = (
        io.StringIO(),
        [[*cells(e), *more[1:]] for e, more in zip(entries(lines), more_cells(lines), strict=True)],
    )
    csv.writer(out, lineterminator="\n").writerows([[*COLUMNS, *MORE[1:]], *found])
    return out.getvalue()


def latex(lines: Sequence[Line]) -> str:
    """The table as LaTeX (booktabs): the same cells."""
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in (COLUMNS, *map(cells, entries(lines)))]
    middle = "\n".join([rows[0], r"\midrule", *rows[1:]])
    return f"\\begin{{tabular}}{{l{'r' * (len(COLUMNS) - 1)}}}\n\\toprule\n{middle}\n\\bottomrule\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    for letter in "&%$#_{}":
        text = text.replace(letter, "\\" + letter)
    return text.replace("³", "$^3$").replace("–", "--")


def save(folder: Path, lines: Sequence[Line], notes: Sequence[str], keep: Sequence[Line] | None = None) -> None:
    """Write table.md, table.csv and table.tex of `lines`, and rows.jsonl of those to `keep`: by default the same."""
    notes = clean(list(notes))
    on_disk.write(folder / "table.md", markdown(lines, notes))
    on_disk.write(folder / "table.csv", comma_separated(lines))
    on_disk.write(folder / "table.tex", latex(lines))
    write(folder, lines if keep is None else keep)


def show(lines: Sequence[Line], notes: Sequence[str]) -> None:
    """Print the table for a person: boxed in a terminal that is wide enough, as Markdown elsewhere."""
    from rich.console import Console
    from rich.table import Table

    out, notes = Console(), clean(list(notes))
    if not out.is_terminal:
        print(markdown(lines, notes), end="")
        return
    table = Table(*COLUMNS, show_lines=True)
    for entry in entries(lines):
        table.add_row(*cells(entry))
    out.print(table)
    for note in notes:
        out.print(f"· {note}", highlight=False, markup=False)
