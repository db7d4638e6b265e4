"""The table: terminal, Markdown, CSV and LaTeX, always with the same columns in the same order."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from . import on_disk
from .redaction import clean
from .results import Entry, Line, entries, write
from .stats import Estimate

COLUMNS = (
    "Fine-Tuning Method", "Batch Size", "Number of total params", "Trainable params", "Required memory",
    "Speed (Train)", "Speed (Eval)", "Accuracy",
)  # fmt: skip


def cells(entry: Entry) -> tuple[str, ...]:
    """A method's row as text, one cell per column. Speeds are over all its seeds, the memory is the largest."""
    runs = entry.runs
    first, early = runs[0], next((run for run in runs if run.stopped), None)
    share = 100 * first.trainable_params / first.total_params
    return (
        first.method + (f" ({early.stopped} at step {early.train_steps})" if early else ""),
        str(first.batch_size),
        f"{first.total_params:,}",
        f"{first.trainable_params:,} ({share:.4f} %)",
        f"{max(run.peak_bytes for run in runs) / 2**20:,.0f} MiB",
        _speed(
            sum(r.train_steps for r in runs), sum(r.train_examples for r in runs), sum(r.train_seconds for r in runs)
        ),
        _speed(
            sum(r.eval_batches for r in runs), sum(r.eval_examples for r in runs), sum(r.eval_seconds for r in runs)
        ),
        estimate_cell(entry.accuracy),
    )


def _speed(iterations: int, examples: int, seconds: float) -> str:
    return f"{iterations / seconds:.2f} it/s, {examples / seconds:.1f} ex/s" if seconds else "–"


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
    """The table as Markdown, with the notes below it."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *map(cells, entries(lines))]
    table = "\n".join("| " + " | ".join(r) + " |" for r in rows)
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def comma_separated(lines: Sequence[Line]) -> str:
    """The table as CSV: the same cells."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *map(cells, entries(lines))])
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


def save(folder: Path, lines: Sequence[Line], notes: Sequence[str], others: Sequence[Line] = ()) -> None:
    """Write table.md, table.csv, table.tex and rows.jsonl, where `others` are kept too: runs of an earlier comparison here."""
    notes = clean(list(notes))
    on_disk.write(folder / "table.md", markdown(lines, notes))
    on_disk.write(folder / "table.csv", comma_separated(lines))
    on_disk.write(folder / "table.tex", latex(lines))
    write(folder, [*lines, *others])


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
