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

from . import on_disk
from .checkpoints import differing
from .config import CompareConfig, TrainConfig, TrainingConfig, merge
from .data import named
from .errors import InputError
from .foreign import path_of, read_json, similar
from .provenance import command
from .recipe import read_recipe
from .redaction import HIDDEN, clean

ABOUT, RECIPE, CHECKPOINTS, LOCK = "run.json", "recipe.toml", "checkpoints", ".lock"
SAME_RESULT = frozenset({
    "out", "resume", "fresh", "force", "memory", "checkpoint_activations", "lean", "stream_base", "offload_vocabulary",
    "micro_batch",
    "metric", "test_rows", "save_steps", "save_minutes", "save_total_limit", "if_save_fails", "offline",
    "jobs", "isolate", "general_text",
})  # fmt: skip
"""Settings that a run may go on with changed: they do not say what is learned, but for rounding."""
UNTOUCHED = frozenset({LOCK, f".{ABOUT}", f".{RECIPE}", ".writable"})
"""What a process leaves that is killed before it has begun."""
PLACES = frozenset({"data", "model", "test_data"})
"""Settings that `--resume` may change: what is there is recognised by its content."""
UNFINISHED = (None, "interrupted", "not saved", "out of memory")


@dataclass
class RunFolder:
    """A run's folder, with this process at work in it."""

    path: Path
    before: dict[str, str | None]
    """What run.json and recipe.toml said when this process came."""

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.path / CHECKPOINTS

    def begin(self, asked: dict[str, Any]) -> None:
        """Write down what was asked for."""
        told = {"asked": asked, "command": command(), "host": platform.node(), "pid": os.getpid(), "started": _now()}
        _write(self.path / ABOUT, told | {"ended": None})

    def put_back(self) -> None:
        """Leave the folder as it was found, or none if it was new: a run that is refused changes nothing.

        One that has work to show already keeps what says what it is.
        """
        begun = any(file.name not in (*UNTOUCHED, *self.before) for file in self.path.iterdir())
        for name, text in self.before.items():
            file = self.path / name
            if text is None:
                if not begun:
                    file.unlink(missing_ok=True)
            elif file.read_text(encoding="utf-8") != text:
                on_disk.write(file, text)
        if untouched(self.path):
            shutil.rmtree(self.path, ignore_errors=True)

    def end(self, how: str) -> None:
        """Write down how it ended: `complete`, or why not."""
        _write(self.path / ABOUT, _read(self.path) | {"ended": how, "at": _now()})


def decisive(config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide what is learned; where the data is does not: what is in it does."""
    return config.model_dump(
        mode="json", exclude={*SAME_RESULT, "data", "test_data", "model", "template"}, exclude_none=True
    )


def asked_for(config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide what is learned, as they can be compared from any folder and read by anyone."""
    told = config.model_dump(mode="json", exclude=set(SAME_RESULT))
    places = {key: named(told[key]) for key in sorted(PLACES) if told.get(key)}
    return clean(told | places)


def find_run(config: TrainConfig) -> Path | None:
    """The folder of an interrupted run that this configuration goes on with; None: a new one begins.

    Raises `InputError` where the folder that was named holds another run, or a complete one.
    """
    asked, wanted = asked_for(config), config.resume or config.out
    if config.resume and config.out not in (None, config.resume):
        raise InputError(f"--resume {config.resume} goes on in its own folder; leave --out {config.out} away")
    if wanted is None:
        return None if config.fresh else _last_of(asked, config.method)
    folder = path_of(wanted)
    if not _is_run(folder):
        if config.resume:
            raise _no_run(wanted)
        return None
    told, flag = _read(folder), "--resume" if config.resume else "--out"
    if told.get("ended") == "complete":
        raise InputError(
            f"{flag} {wanted}: the run in this folder is complete; `featherweight evaluate --adapter {wanted}` measures it; "
            f"choose a new folder for another"
        )
    then, moved = told.get("asked") or {}, PLACES if config.resume else frozenset()
    if other := differing(_without(then, moved), _without(asked, moved)):
        if not (config.force and config.resume):
            raise InputError(
                f"{flag} {wanted} holds a run with other settings: {'; '.join(other)}; choose a new folder, or go on all the same "
                f"with --resume {wanted} --force (the result is then that of neither)"
            )
    elif config.fresh:
        raise InputError(f"{flag} {wanted} is in use: it has files; choose a new folder, or leave --fresh out to go on")
    return folder


def find_comparison(config: CompareConfig) -> Path | None:
    """The folder of a comparison that this one goes on with, or adds to; None: a new one begins.

    A folder that is named may hold any comparison: its runs know what they are of.
    """
    if config.out is None:
        return None if config.fresh else _last_of(asked_for(config), "compare")
    folder = path_of(config.out)
    if not _is_run(folder):
        return None
    if config.fresh:
        raise InputError(
            f"--out {config.out} is in use: it has files; choose a new folder, or leave --fresh out to go on"
        )
    return folder


def _without(asked: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in asked.items() if key not in keys}


def _no_run(wanted: str | None) -> InputError:
    hint = similar(wanted, folder=True) if wanted and not path_of(wanted).exists() else ""
    return InputError(f"--resume {wanted}: there is no run in this folder (no {ABOUT}){hint}")


def _is_run(folder: Path) -> bool:
    try:
        return (folder / ABOUT).is_file()
    except OSError:  # a name that cannot be: whoever makes the folder says so
        return False


def _last_of(asked: dict[str, Any], verb: str) -> Path | None:
    """The newest unfinished run under runs/ that was asked for like this one, and that nobody is at work on."""
    for folder in sorted(Path("runs").glob(f"{verb}-*"), key=lambda p: (len(p.name), p.name), reverse=True):
        if not _is_run(folder):
            continue
        try:
            told = _read(folder)
        except InputError:
            continue
        if told.get("ended") in UNFINISHED and told.get("asked") == asked and not _held(folder):
            return folder
    return None


def settings_in(wanted: str) -> dict[str, Any]:
    """What was asked for in a run's folder, as a recipe: `--resume` needs no other flag."""
    folder = path_of(wanted)
    if not _is_run(folder):
        raise _no_run(wanted)
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
    changed |= {key for key, value in recipe.items() if HIDDEN in str(value)}  # a secret that the recipe does not tell
    if changed & {"steps", "epochs"}:  # the one decides the other
        changed |= {"steps", "epochs"}
    kept = {key: value for key, value in recipe.items() if key not in changed}
    own = config.model_dump(exclude_none=True, exclude={"epochs"} if "steps" in kept else None)
    return merge(TrainConfig, own | kept, {})


@contextmanager
def at_work(folder: Path) -> Iterator[RunFolder]:
    """Inside, this process alone works in a run's folder. Raises `InputError`, naming the other, where one does already."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(_at_work_already(folder)) from None
    except (OSError, NotImplementedError) as e:  # the latter: a file system without locks
        raise InputError(f"--out: cannot write {folder}: {getattr(e, 'strerror', None) or e}") from None
    try:
        for left in folder.glob(".saving-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        files = {name: folder / name for name in (ABOUT, RECIPE)}
        yield RunFolder(folder, {n: f.read_text(encoding="utf-8") if f.is_file() else None for n, f in files.items()})
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


def untouched(folder: Path) -> bool:
    """Whether nothing is in a folder but what a process leaves that is killed before it has begun."""
    return all(file.name in UNTOUCHED for file in folder.iterdir())


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
    on_disk.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
