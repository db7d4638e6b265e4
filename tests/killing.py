"""Killing a run at random instants and going on with it until it is complete: its result must be that of one never killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.checkpoints import verify
from featherweight.errors import InputError
from forked import Forked

RESULT = ("adapter_model.safetensors", "adapter_config.json", "featherweight.json")
SETTINGS = (
    "--steps", 120, "--batch-size", 4, "--accumulate", 2, "--set", "r=4", "--set", "lora_dropout=0.1", "--dtype", "float32",
    "--save-steps", 2, "--validation-rows", 6, "--out", "run",
)  # fmt: skip

SHORT = ("--steps", 30, "--batch-size", 4, "--dtype", "float32", "--set", "lora_dropout=0.1")
"""A run of a second."""


def result_of(folder: Path) -> list[bytes]:
    """The bytes that must be the same."""
    return [(folder / name).read_bytes() for name in RESULT]


def after_step(step: int, do: str) -> str:
    """For `Forked.start`: Python that the run itself executes after this step."""
    return (
        "import os, featherweight.training as t\n"
        "from featherweight.engine.train import fit\n"
        f"def then(report):\n    if report.steps == {step}: exec({do!r}, {{'os': os}})\n"
        "t.fit_with_bar = lambda base, rows, settings, title, **more: fit(base, rows, settings, on_step=then, **more)\n"
    )


@dataclass
class Toll:
    """What the killing came to."""

    kills: int = 0
    inside_saves: int = 0
    """Kills after which something half-written was lying about."""
    runs: int = 0
    same: int = 0
    """Runs that were completed, and those of them whose result has the same bytes as one that was never killed."""
    partial: int = 0
    """Checkpoints that were not whole, under the name of one that is."""
    troubles: list[str] = field(default_factory=list)
    """What a process said that ended in any other way."""


class Victim:
    """A training run that can be repeated: its folder, its command line, and what it ends in if nobody kills it."""

    def __init__(self, server: Forked, folder: Path, model: Path, data: Path) -> None:
        self.server, self.folder = server, folder
        self.line: tuple[Any, ...] = ("train", "--model", model, "--data", data, *SETTINGS)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the server may still be importing during the first
            shutil.rmtree(folder / "run", ignore_errors=True)
            start = time.monotonic()
            code = server.run(folder, *self.line)
            self.seconds = time.monotonic() - start
            assert code == 0, self.said()
        self.wanted = self.result()

    def said(self) -> str:
        """The last words of its process."""
        return (self.folder / "said.txt").read_text()[-2000:]

    def result(self) -> list[bytes]:
        """The bytes that must be the same."""
        return result_of(self.folder / "run")

    def is_complete(self) -> bool:
        """Whether the run says so itself."""
        about = self.folder / "run" / "run.json"
        return about.is_file() and json.loads(about.read_text())["ended"] == "complete"

    def kill_until_complete(self, toll: Toll, rng: random.Random) -> None:
        """Start it, kill it at a random instant, start it again, until it is complete; then compare its result."""
        shutil.rmtree(self.folder / "run")
        before: Path | None = None
        while not (self.folder / "run").exists() or not self.is_complete():
            pid = self.server.start(self.folder, *self.line)
            time.sleep(rng.uniform(0, self.seconds))
            os.kill(pid, signal.SIGKILL)
            code = self.server.wait(pid)
            toll.kills += code == -signal.SIGKILL
            left = self.folder / "run"
            newest = max(left.glob("checkpoints/step-*"), default=None)
            if (
                code == 0
            ):  # too late, and else perhaps too early: how long it takes depends on what else the machine does
                self.seconds *= 0.8
            elif newest == before:
                self.seconds *= 1.1
            before = newest
            toll.inside_saves += any(left.glob("checkpoints/.saving-*")) or any(left.glob(".saving-*"))
            for checkpoint in left.glob("checkpoints/step-*"):
                try:
                    verify(checkpoint)
                except InputError:
                    toll.partial += 1
            if code not in (0, -signal.SIGKILL):
                toll.troubles.append(self.said())
                return
        toll.runs += 1
        toll.same += self.result() == self.wanted
