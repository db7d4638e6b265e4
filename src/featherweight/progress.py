"""Progress a person can read: loss, speed, memory and time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .redaction import clean

console = Console(stderr=True)
LINES = 4  # without a terminal: so many progress lines per bar


class Bar:
    """One bar: `update(done, "loss 0.41 · 3.2 it/s")`."""

    def __init__(self, progress: Progress | None, title: str, total: int) -> None:
        self.progress, self.title, self.total, self.start = progress, title, total, time.perf_counter()
        self.task: Any = progress.add_task(title, total=total, detail="") if progress else None

    def update(self, done: int, detail: str) -> None:
        """Show how far it is, and the figures."""
        if self.progress is not None:
            self.progress.update(self.task, completed=done, detail=detail)
        elif done == self.total or (done * LINES) // self.total > ((done - 1) * LINES) // self.total:
            left = (time.perf_counter() - self.start) / done * (self.total - done)
            console.print(f"{self.title}: {done}/{self.total} · {detail} · {left:.0f} s left", highlight=False)


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar for the time of the block."""
    if not console.is_terminal:
        yield Bar(None, title, total)
        return
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, title, total)


def note(message: str) -> None:
    """A line for the person watching; results go to standard output instead."""
    console.print(clean(message), highlight=False, markup=False, soft_wrap=True)


def mebibytes(n: int) -> str:
    """1,234 MiB."""
    return f"{n / 2**20:,.0f} MiB"
