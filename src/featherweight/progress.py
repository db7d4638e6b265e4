"""Progress a person can read: loss, speed, memory and time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .redaction import clean

console = Console(stderr=True)
LINES = 4  # without a terminal: so many progress lines per bar


class Bar:
    """One bar: `update(done, "loss 0.41 · 3.2 it/s")`."""

    def __init__(self, title: str, total: int, progress: Progress | None = None) -> None:
        self.title, self.total, self.start, self.progress = title, total, time.perf_counter(), progress
        self.task: Any = progress.add_task(title, total=total, detail="") if progress else None

    def update(self, done: int, detail: str) -> None:
        """Show how far it is, and the figures."""
        if self.progress is not None:
            self.progress.update(self.task, completed=done, detail=detail)
        elif done == self.total or (done * LINES) // self.total > ((done - 1) * LINES) // self.total:
            left = (time.perf_counter() - self.start) / done * (self.total - done)
            console.print(f"{self.title}: {done}/{self.total} · {detail} · {left:.0f} s left", highlight=False)


class _Told(Bar):
    """A bar that somebody else shows."""

    def update(self, done: int, detail: str) -> None:
        """Tell how far it is."""
        if _listeners:
            _listeners[-1]({"bar": self.title, "total": self.total, "done": done, "detail": detail})


_listeners: list[Callable[[dict[str, Any]], None]] = []


@contextmanager
def told_to(listener: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Inside, what would be shown is told to `listener` instead: a process that works for another has no terminal of its own."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar for the time of the block."""
    if _listeners:
        yield _Told(title, total)
    elif not console.is_terminal:
        yield Bar(title, total)
    else:
        with _progress() as progress:
            yield Bar(title, total, progress)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class Board:
    """Many bars at once, of several processes: one per worker, and one over all of them."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self._bars: dict[tuple[int, str], Bar] = {}
        self._whole: Any = None

    def show(self, worker: int, told: Mapping[str, Any]) -> None:
        """What a worker has told: a line, or how far it is with something."""
        if "note" in told:
            note(told["note"])
            return
        key = (worker, told["bar"])
        if key not in self._bars:
            self.forget(worker)
            self._bars[key] = Bar(told["bar"], told["total"], self.progress)
        self._bars[key].update(told["done"], told["detail"])

    def forget(self, worker: int) -> None:
        """A worker has begun something else, or ended."""
        for key in [k for k in self._bars if k[0] == worker]:
            if self.progress is not None:
                self.progress.remove_task(self._bars[key].task)
            del self._bars[key]

    def whole(self, done: int, total: int, detail: str) -> None:
        """How far all of it is."""
        if self.progress is None:
            if done < total:
                note(f"{done} of {total} runs are done{detail and ' · '}{detail}")
            return
        if self._whole is None:
            self._whole = self.progress.add_task("all runs", total=total, detail="")
        self.progress.update(self._whole, completed=done, detail=detail)


@contextmanager
def board() -> Iterator[Board]:
    """Bars for the time of the block."""
    if not console.is_terminal:
        yield Board(None)
        return
    with _progress() as progress:
        yield Board(progress)


def note(message: str) -> None:
    """A line for the person watching; results go to standard output instead."""
    if _listeners:
        _listeners[-1]({"note": message})
        return
    console.print(clean(message), highlight=False, markup=False, soft_wrap=True)


def mebibytes(n: int) -> str:
    """1,234 MiB."""
    return f"{n / 2**20:,.0f} MiB"


def spell_seconds(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
