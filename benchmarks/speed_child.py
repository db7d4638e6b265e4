"""A side of `speed.py` in a process of its own: to measure its memory, or to take turns with a side in another process.

Liger and Unsloth change transformers for the whole process, so they cannot train beside anybody else in one. Yet speeds are only
compared step by step: so their process waits, holding its model, while the other side's step runs on the same device, and the
other way round. Each measures its own step; what is said between them, a line each, is outside both clocks.

Only the standard library is imported here until it is known who runs: Unsloth must come before transformers.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 900  # seconds a side may take in a process of its own: what hangs must not hold the device


def command(*words: str) -> list[str]:
    """The command line of such a process: what it does, work, method, side, and the folder of an adapter to start from."""
    return [sys.executable, __file__, *words]


class Elsewhere:
    """A side that trains in a process of its own, its weights the same: random ones come from the same seed. It drives."""

    def __init__(self, kind: str, work: str, method: str, start: Path | None) -> None:
        self.kind, self.errors = kind, tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        words = command("turns", work, method, kind, *([str(start)] if start else []))
        self.child = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self._answer()  # it has built its model and read `start`

    def _say(self, word: object) -> None:
        assert self.child.stdin
        self.child.stdin.write(f"{word}\n")
        self.child.stdin.flush()

    def _answer(self) -> Any:
        assert self.child.stdout
        if not (line := self.child.stdout.readline()):
            self.errors.seek(0)
            raise RuntimeError(f"{self.kind}: {self.errors.read()[-2000:]}")
        return json.loads(line)

    def run(self, batches: list[Any], between: Callable[[int], None]) -> tuple[list[float], list[float]]:
        """Like `HFTrainer.run`; the process makes the same batches by itself."""
        self._say(len(batches))
        for i in range(len(batches)):
            self._say("step")
            self._answer()
            between(i)
        self._say("end")
        seconds, losses = self._answer()
        self.child.wait()
        return seconds, losses

    def stop(self) -> None:
        """End the process, whatever it is doing: it holds a model."""
        self.child.kill()
        self.child.wait()


def take_turns(side: Any, work: str, answer: Callable[[Any], None]) -> None:
    """The other end of `Elsewhere`: a step, when told."""
    from speed_work import batches_of

    answer("ready")
    batches = batches_of(work, side.base, int(input()))

    def between(i: int) -> None:
        answer(i)
        input()

    input()
    answer(side.run(batches, between))


def main() -> None:
    """Build the side and do what was asked; answers go to what was standard output, whatever else is printed elsewhere."""
    what, work, method, kind, *start = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(given: Any) -> None:
        answers.write(json.dumps(given) + "\n")
        answers.flush()

    if kind == "unsloth":
        os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}  # the model is in a folder
        importlib.import_module("unsloth")
    if what == "memory":
        from speed_memory import memory_child

        answer(memory_child(work, method, kind))
        return
    from speed_sides import side_of

    take_turns(side_of(kind, work, method, Path(start[0]) if start else None), work, answer)


if __name__ == "__main__":
    main()
