"""The folder of a run: who is at work in it, what was asked for, and whether there is something to go on from.

    run.json         what was asked for, by whom, and how it ended
    recipe.toml      the same with everything decided: it repeats the run
    checkpoints/     see `checkpoints`
    .lock            held by the process at work; the system lets go of it however that process ends

Rerunning a command that was interrupted goes on with its run; so does `--resume FOLDER`. A run that is at work, or was asked for
with other settings, is refused with the differences.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoints import differing
from .config import TrainConfig, merge
from .data import named
from .errors import InputError
from .foreign import path_of, read_json
from .provenance import command
from .recipe import read_recipe

ABOUT, RECIPE, CHECKPOINTS, LOCK = "run.json", "recipe.toml", "checkpoints", ".lock"
SAME_RESULT = frozenset({
    "out", "resume", "fresh", "force", "memory", "checkpoint_activations", "packing", "lean", "stream_base", "micro_batch",
    "metric", "test_rows", "save_steps", "save_minutes", "save_total_limit", "if_save_fails", "offline",
})  # fmt: skip
"""Settings that a run may go on with changed: they do not say what is learned, but for rounding."""


@dataclass
class RunFolder:
    """A run's folder, with this process at work in it."""

    path: Path
    going_on: bool

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.path / CHECKPOINTS

    def begin(self, asked: dict[str, Any]) -> None:
        """Write down what was asked for."""
        told = {"asked": asked, "command": command(), "host": platform.node(), "pid": os.getpid(), "started": _now()}
        _write(self.path / ABOUT, told | {"ended": None})

    def end(self, how: str) -> None:
        """Write down how it ended: `complete`, or why not."""
        _write(self.path / ABOUT, _read(self.path) | {"ended": how, "at": _now()})


def asked_for(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is learned, as they can be compared from any folder."""
    told = config.model_dump(mode="json", exclude=set(SAME_RESULT))
    places = {key: named(told[key]) for key in ("data", "model", "test_data") if told.get(key)}
    return told | places


def find_run(config: TrainConfig) -> Path | None:
    """The folder of an interrupted run that this configuration goes on with; None: a new one begins.

    Raises `InputError` where the folder that was named holds another run, or a complete one.
    """
    asked, wanted = asked_for(config), config.resume or config.out
    if wanted is None:
        return None if config.fresh else _last_of(asked, config.method)
    folder = path_of(wanted)
    if not _is_run(folder):
        if config.resume:
            raise InputError(f"--resume {wanted}: there is no run in this folder (no {ABOUT})")
        return None
    told, flag = _read(folder), "--resume" if config.resume else "--out"
    if told.get("ended") == "complete":
        raise InputError(
            f"{flag} {wanted}: the run in this folder is complete; `featherweight evaluate --adapter {wanted}` measures it; "
            f"choose a new folder for another"
        )
    if other := differing(told.get("asked") or {}, asked):
        if not (config.force and config.resume):
            raise InputError(
                f"{flag} {wanted} holds a run with other settings: {'; '.join(other)}; choose a new folder, or go on all the same "
                f"with --resume {wanted} --force (the result is then that of neither)"
            )
    elif config.fresh:
        raise InputError(f"{flag} {wanted} is in use: it has files; choose a new folder, or leave --fresh out to go on")
    return folder


def _is_run(folder: Path) -> bool:
    try:
        return (folder / ABOUT).is_file()
    except OSError:  # a name that cannot be: whoever makes the folder says so
        return False


def _last_of(asked: dict[str, Any], verb: str) -> Path | None:
    """The newest unfinished run under runs/ that was asked for like this one, and that nobody is at work on."""
    for folder in sorted(Path("runs").glob(f"{verb}-*"), reverse=True):
        if not _is_run(folder):
            continue
        try:
            told = _read(folder)
        except InputError:
            continue
        if told.get("ended") in (None, "interrupted", "not saved") and told.get("asked") == asked and not _held(folder):
            return folder
    return None


def settings_in(wanted: str) -> dict[str, Any]:
    """What was asked for in a run's folder, as a recipe: `--resume` needs no other flag."""
    folder = path_of(wanted)
    if not _is_run(folder):
        raise InputError(f"--resume {wanted}: there is no run in this folder (no {ABOUT})")
    recipe = read_recipe(str(folder / RECIPE)) if (folder / RECIPE).is_file() else {}
    asked = _read(folder).get("asked")
    if not isinstance(asked, dict):
        raise InputError(f"{folder / ABOUT} is damaged; choose a new folder")
    told = {key: value for key, value in recipe.items() if key in SAME_RESULT} | asked
    return {key: value for key, value in told.items() if value is not None}


def decided(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings to go on with: what was decided when the run began, but for what has been asked for otherwise now."""
    if not (folder / RECIPE).is_file():
        return config
    recipe, then = read_recipe(str(folder / RECIPE)), _read(folder)["asked"]
    now = asked_for(config)
    changed = {key for key in now if now[key] != then.get(key)} | (SAME_RESULT & config.model_fields_set)
    return merge(TrainConfig, {k: v for k, v in recipe.items() if k not in changed}, config.model_dump(include=changed))


@contextmanager
def at_work(folder: Path, *, going_on: bool) -> Iterator[RunFolder]:
    """Inside, this process alone works in a run's folder. Raises `InputError`, naming the other, where one does already."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(_at_work_already(folder)) from None
    except OSError as e:
        raise InputError(f"--out: cannot write {folder}: {e.strerror or e}") from None
    try:
        yield RunFolder(folder, going_on)
    finally:
        lock.release()


def _held(folder: Path) -> bool:
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _at_work_already(folder: Path) -> str:
    told: dict[str, Any] = {}
    if _is_run(folder):
        told = _read(folder)
    who = (
        f" (process {told['pid']} on {told['host']}, since {told['started']}: {told['command']})"
        if told.get("pid")
        else ""
    )
    return f"{folder} is in use: another run is at work in it{who}; wait for it, or choose another --out"


def forget(folder: Path) -> None:
    """Remove a folder in which nothing was done: a run that was refused leaves no trace."""
    if not any(p.name != LOCK for p in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _read(folder: Path) -> dict[str, Any]:
    try:
        told = read_json(folder / ABOUT)
    except OSError as e:
        raise InputError(f"cannot read {folder / ABOUT}: {e.strerror or e}") from None
    except ValueError as e:
        raise InputError(f"{folder / ABOUT} is damaged ({e}); choose a new folder") from None
    if not isinstance(told, dict):
        raise InputError(f"{folder / ABOUT} is damaged; choose a new folder")
    return told


def _write(path: Path, content: dict[str, Any]) -> None:
    """In one step: whoever reads it sees the old one or the new one."""
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {e.strerror or e}") from None
