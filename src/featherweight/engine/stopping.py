"""Asked to stop — Ctrl-C, SIGTERM, a closed terminal — a run ends at a place from which it can go on.

The first signal is only noted; the update under way is undone at the next safe place, and all that was done before it is
kept. Ctrl-C after that is an ordinary `KeyboardInterrupt`, wherever the run is: for whoever cannot wait. Other signals say
again what is known: somebody presses Ctrl-C and then closes the window; a shutdown sends SIGTERM, and then the terminal goes.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequested(BaseException):  # no Exception: nothing may take it for an error of its own
    """Raised at a safe place after a signal."""


class Stop:
    """What has been asked for: `signal` is its number, or None."""

    signal: int | None = None

    def check(self) -> None:
        """Raise `StopRequested` if a signal came."""
        if self.signal is not None:
            raise StopRequested

    def _note(self, number: int, _: FrameType | None) -> None:
        closed = hasattr(signal, "SIGHUP") and number == signal.SIGHUP
        if closed:
            _let_go_of_the_terminal()
        if self.signal is None:
            self.signal = number
            if not closed:  # not by `print`: a signal may come in the middle of one
                _write(b"\nfeatherweight: stopping; press Ctrl-C again to stop at once, without saving\n")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, signals are noted in what this yields. In another thread than the main one, Python lets nobody hear them."""
    stop, before = Stop(), dict[int, Any]()
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # `nohup`; None: not Python's
                before[number] = signal.signal(number, stop._note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(words: bytes) -> None:
    with suppress(OSError):
        os.write(2, words)


def _let_go_of_the_terminal() -> None:
    """It is gone, and writing to it is an error: from here on, what is said goes nowhere."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            if not _outlives_a_terminal(stream):
                os.dup2(nowhere, stream)


def _outlives_a_terminal(stream: int) -> bool:
    try:
        kind = os.fstat(stream).st_mode
    except OSError:
        return False
    return stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)
