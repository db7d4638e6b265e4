"""The table: terminal, Markdown, CSV and JSONL, always with the same columns in the same order."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .redaction import clean

COLUMNS = (
    "Fine-Tuning Method", "Batch Size", "Number of total params", "Trainable params", "Required memory",
    "Speed (Train)", "Speed (Eval)", "Accuracy",
)  # fmt: skip


@dataclass
class Line:
    """One method's results, in plain units: bytes, seconds, shares."""

    name: str
    method: str
    batch_size: int
    total_params: int
    trainable_params: int
    peak_bytes: int
    train_steps: int
    train_seconds: float
    train_examples: int
    eval_batches: int
    eval_seconds: float
    eval_examples: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float
    metric: str
    lr: float
    losses: list[float] = field(default_factory=list)
    predictions: list[str] = field(default_factory=list)
    stopped: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell per column."""
        share = 100 * self.trainable_params / self.total_params
        return (
            self.method + (f" ({self.stopped} at step {self.train_steps})" if self.stopped else ""),
            str(self.batch_size),
            f"{self.total_params:,}",
            f"{self.trainable_params:,} ({share:.4f} %)",
            f"{self.peak_bytes / 2**20:,.0f} MiB",
            _speed(self.train_steps, self.train_examples, self.train_seconds),
            _speed(self.eval_batches, self.eval_examples, self.eval_seconds),
            accuracy_cell(self.correct, self.eval_examples, self.interval),
        )


def _speed(iterations: int, examples: int, seconds: float) -> str:
    return f"{iterations / seconds:.2f} it/s, {examples / seconds:.1f} ex/s" if seconds else "–"


def accuracy_cell(correct: int, n: int, interval: tuple[float, float]) -> str:
    """`81.2 % [77.9, 84.1], n = 600`."""
    return f"{100 * correct / n:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}], n = {n}"


def score_line(correct: int, n: int, interval: tuple[float, float], macro_f1: float, metric: str) -> str:
    """One model's accuracy in a line."""
    f1 = f", macro-F1 {100 * macro_f1:.1f} %" if metric == "labels" else ""
    return f"accuracy {accuracy_cell(correct, n, interval)}{f1}, metric {metric}"


def markdown(lines: list[Line], notes: list[str]) -> str:
    """The table as Markdown, with the notes below it."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(line.cells() for line in lines)]
    table = "\n".join("| " + " | ".join(r) + " |" for r in rows)
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def comma_separated(lines: list[Line]) -> str:
    """The table as CSV: the same cells."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *(line.cells() for line in lines)])
    return out.getvalue()


def save(folder: Path, lines: list[Line], notes: list[str]) -> None:
    """Write table.md, table.csv and rows.jsonl (every figure, the loss of every step, every prediction)."""
    notes = clean(notes)
    (folder / "table.md").write_text(markdown(lines, notes), encoding="utf-8")
    (folder / "table.csv").write_text(comma_separated(lines), encoding="utf-8")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(clean(asdict(r)), ensure_ascii=False) + "\n" for r in lines), encoding="utf-8"
    )


def show(lines: list[Line], notes: list[str]) -> None:
    """Print the table for a person: boxed in a terminal that is wide enough, as Markdown elsewhere."""
    notes = clean(notes)
    from rich.console import Console
    from rich.table import Table

    out = Console()
    if not out.is_terminal:
        print(markdown(lines, notes), end="")
        return
    table = Table(*COLUMNS, show_lines=True)
    for line in lines:
        table.add_row(*line.cells())
    out.print(table)
    for note in notes:
        out.print(f"· {note}", highlight=False, markup=False)
