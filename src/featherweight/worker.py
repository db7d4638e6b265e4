"""A run in a process of its own, so that neither its memory nor its speed depends on the runs before it.

The process is told one job as a line of JSON, tells what there is to show and at last how it ended, a line each, and is gone. It ends
as if by Ctrl-C where the one that asked for it is no more: its work is saved. On a CPU the base's weights are views of its file
wherever they are used in the type they are stored in, so processes side by side have them in memory once.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CompareConfig
from .errors import InputError
from .provenance import command
from .redaction import clean

if TYPE_CHECKING:
    from .bench import Run

GRACE_SECONDS = 60
"""A process that is left alone has so long to save its work."""


@dataclass
class Worker:
    """A process at work on a job, as seen from the one that asked for it."""

    process: subprocess.Popen[bytes]
    log: Any
    answer: dict[str, Any] | None = None
    _rest: bytes = b""

    @staticmethod
    def start(job: Mapping[str, Any], threads: int | None = None) -> Worker:
        """Start one. In a session of its own: Ctrl-C in the terminal is for the parent, which passes it on."""
        log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "featherweight.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps({**job, "started": time.time()}).encode() + b"\n")
        process.stdin.flush()  # and it stays open: its end would mean that we are gone
        return Worker(process, log)

    def fileno(self) -> int:
        """For `select`."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def hear(self, show: Callable[[dict[str, Any]], None]) -> bool:
        """Take what it has told by now; whether there is more to come."""
        piece = os.read(self.fileno(), 2**16)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "answer" in told:
                self.answer = told["answer"]
            else:
                show(told)
        return bool(piece)

    def end(self) -> dict[str, Any]:
        """Its answer, once it has told all; raises `InputError` where it ended without one."""
        code = self.process.wait()
        words = "" if self.answer is not None else self._last_words()
        self.close()
        if self.answer is None:
            raise InputError(f"its process ended without a result ({_cause(code)}){words}")
        return self.answer

    def close(self) -> None:
        """Let go of its pipes, and of what it has said."""
        pipes: list[Any] = [self.process.stdin, self.process.stdout, self.log]
        for file in pipes:
            with suppress(BrokenPipeError):  # it was told something that it did not live to read
                file.close()

    def stop(self) -> None:
        """Ask it to end. Not by the signal of Ctrl-C, which a process in the background may have been told to ignore."""
        if self.process.poll() is None:
            self.process.terminate()

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"; its last words: {clean(lines[-1])[:300]}" if lines else ""


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    killed = code == -getattr(signal, "SIGKILL", 9)
    return f"signal {-code}" + (": was there enough memory?" if killed else "")


def together(
    jobs: list[dict[str, Any]],
    side_by_side: Callable[[list[int], int], bool],
    show: Callable[[int, dict[str, Any]], None],
    ended: Callable[[int, dict[str, Any] | InputError], bool],
    asked_to_stop: Callable[[], int | None],
    threads: int | None = None,
) -> None:
    """Do the jobs in order, one by one or some side by side.

    `side_by_side(running, next)`: may this one start now? `ended(number, answer)`: what came of it; whether to go on.
    `asked_to_stop()`: the number of a signal that came; those at work are asked to end then, and waited for.
    """
    waiting, running, told = list(range(len(jobs))), dict[int, Worker](), False
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and not told and (not running or side_by_side(list(running), waiting[0])):
                    number = waiting.pop(0)
                    running[number] = Worker.start(jobs[number], threads)
                    selector.register(running[number], selectors.EVENT_READ, number)
                if asked_to_stop() is not None and not told:
                    told, waiting = True, []
                    for worker in running.values():
                        worker.stop()
                for key, _ in selector.select(0.2):
                    number = key.data
                    if running[number].hear(lambda t, n=number: show(n, t)):  # type: ignore[misc]
                        continue
                    selector.unregister(running[number])
                    worker = running.pop(number)
                    try:
                        answer: dict[str, Any] | InputError = worker.end()
                    except InputError as e:
                        answer = e
                    if not ended(number, answer):
                        waiting = []
        finally:
            for worker in running.values():  # something went wrong here, or Ctrl-C was pressed again
                worker.process.kill()
                worker.process.wait()
                worker.close()


# --- the process itself -----------------------------------------------------------------------------------------------------


def job_of(config: CompareConfig, folder: Path, run: Run) -> dict[str, Any]:
    """A job as JSON takes it."""
    return {"config": config.model_dump(mode="json"), "folder": str(folder), "run": asdict(run), "command": command()}


def main() -> None:
    """Do the job that standard input names."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    job = json.loads(sys.stdin.buffer.readline())
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_watch_parent, daemon=True).start()
    lock = threading.Lock()

    def tell(told: dict[str, Any]) -> None:
        with lock, suppress(BrokenPipeError):  # nobody is there to hear it: what has been done is saved all the same
            answers.write(json.dumps(told) + "\n")
            answers.flush()

    from .progress import told_to

    with told_to(tell):
        tell({"answer": _done(job)})


def _done(job: dict[str, Any]) -> dict[str, Any]:
    from filelock import FileLock

    from .bench import Bench, Outcome, Run
    from .network import go_offline, keep_quiet

    keep_quiet()
    config, folder = CompareConfig(**job["config"]), Path(job["folder"])
    if config.offline:
        go_offline()
    place = folder / job["run"]["place"]
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".lock", timeout=GRACE_SECONDS):  # one whose parent was killed may still be saving
            bench = Bench.open(config, command=job["command"])
            told = job["run"]
            run = Run(**{**told, "predicted": tuple(told["predicted"]) if told["predicted"] else None})
            made = bench.make(run, folder, job["started"]).to_json()
            if [file.name for file in place.iterdir()] == [".lock"]:  # a reference leaves nothing
                (place / ".lock").unlink()
                place.rmdir()
            return made
    except InputError as e:
        return Outcome(notes=[str(e)]).to_json()
    except KeyboardInterrupt:
        return Outcome(signal=int(signal.SIGINT)).to_json()


def _interrupt(*_: Any) -> None:
    """Outside of training, which listens itself."""
    raise KeyboardInterrupt


def _watch_parent() -> None:
    """Standard input stays open as long as the parent lives."""
    while sys.stdin.buffer.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
