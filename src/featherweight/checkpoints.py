"""Checkpoints: a run on disk, from which it goes on as if it had never stopped.

    step-000120/
      adapter_config.json, adapter_model.safetensors, featherweight.json    the adapter at that step, usable as it is
      state.safetensors    parts as they are, optimiser, random numbers, losses
      state.json           step, loss scale, rows at a time, … and of what run it is
      manifest.json        size and SHA-256 of every file, written last

All is written to a folder beside, made safe on the disk (fsync), and only then renamed: what is there is whole, or it is
noticed. Nothing is pickled. A step draws all it needs from this state and the settings — where in the data it is follows from
the step — so a run that goes on ends in the same bytes as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import adapter_folder
from .engine.memory import out_of_memory
from .engine.train import Report
from .engine.update import Learner, random_states, set_random_states
from .engine.validation import put_tensors, tensors_of
from .errors import InputError
from .on_disk import make_safe

MANIFEST, STATE, FACTS = "manifest.json", "state.safetensors", "state.json"
FORMAT = 1
SHARE = 0.02  # of the time at most goes into checkpoints, however short the interval


@dataclass
class Checkpoints:
    """Those of one run, in one folder: when to write them, which to keep, which to go on from."""

    folder: Path
    identity: dict[str, Any]
    """Of what run they are: what must be the same for it to go on. Compared by `differing`."""
    every_steps: int | None = None
    every_seconds: float = 300.0
    keep: int = 2
    stop_if_unsaved: bool = False
    force: bool = False
    check: Callable[[], None] = lambda: None
    """Raises `InputError` where the run is no longer what `identity` says: no checkpoint is written then."""
    tell: Callable[[str], None] = print
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0
    _at: int | None = None
    """The step of the newest one; None before `resume`."""
    _overtaken: list[Path] = field(default_factory=list)
    """Those that the run did not go on from, though they are newer: they are not whole, and take no place of one that is."""

    def all(self) -> list[Path]:
        """The folders of the checkpoints, newest first, whole or not."""
        found = (p for p in self.folder.glob("step-*") if p.is_dir())
        return sorted(found, key=lambda p: (len(p.name), p.name), reverse=True)  # a millionth step has a digit more

    def resume(self, learner: Learner, report: Report) -> int:
        """Put the newest whole checkpoint into a learner and its report; returns the step to go on with: 0 where there is none.

        Raises `InputError` where it is of another run.
        """
        self._sweep()
        self._at, self._last = 0, time.monotonic()
        for path in self.all():
            try:
                facts, tensors = read(path)
            except InputError as e:
                self.tell(f"{e}; it is not used, but the one before it, if there is one")
                self._overtaken.append(path)
                continue
            if (other := differing(facts["identity"], self.identity)) and not self.force:
                raise InputError(
                    f"{path} is of another run: {'; '.join(other)}; take a new --out, or --force to go on all the same "
                    f"(the result is then that of neither run)"
                )
            try:
                _put(learner, report, facts, tensors)
            except (KeyError, RuntimeError, ValueError, TypeError) as e:  # only ever with --force
                raise InputError(f"{path} does not fit this run at all: {reason(e)}; take a new --out") from None
            self._at = report.steps
            self.tell(f"going on from {path}, after step {report.steps} of {learner.settings.steps}")
            return report.steps
        return 0

    def after_step(self, learner: Learner, report: Report, improved: bool) -> bool:
        """Write one if it is time; whether the run should go on."""
        since, step = time.monotonic() - self._last, report.steps
        timely = since >= max(self.every_seconds, self._cost / SHARE)
        if step < learner.settings.steps and (
            improved or timely or (self.every_steps is not None and step % self.every_steps == 0)
        ):
            return self.save(learner, report) or not self.stop_if_unsaved
        return True

    def save(self, learner: Learner, report: Report) -> bool:
        """Write one now and remove those that are too old; whether it could be written. Raises what `check` raises."""
        if self._at is None or report.steps == self._at:  # nothing has been done since
            return True
        start = time.monotonic()
        self.check()
        try:
            while self._overtaken:
                _remove(self._overtaken.pop())
            write(self.folder / f"step-{report.steps:06}", learner, report, self.identity)
        except (OSError, SafetensorError, InputError, RuntimeError, MemoryError) as e:
            if isinstance(e, RuntimeError) and not out_of_memory(e):
                raise
            what = "the run stops" if self.stop_if_unsaved or report.stopped else "the run goes on without it"
            self.tell(f"a checkpoint could not be written at step {report.steps}: {reason(e)}; {what}")
            if self.stop_if_unsaved and report.stopped is None:
                report.stopped = "not saved"
            return False
        finally:
            self._last, self._cost = time.monotonic(), time.monotonic() - start
            report.saving_seconds += self._cost
        self._at, report.saves = report.steps, report.saves + 1
        self._remove_old(report)
        return True

    def _remove_old(self, report: Report) -> None:
        for path in self.all()[self.keep :]:
            if path.name != f"step-{report.best[0]:06}":
                with suppress(OSError):  # one too many does no harm
                    _remove(path)

    def _sweep(self) -> None:
        """Remove what a process that was killed left half-way."""
        for left in (*self.folder.glob(".saving-*"), *self.folder.glob(".removed-*")):
            shutil.rmtree(left, ignore_errors=True)


def _remove(folder: Path) -> None:
    gone = folder.with_name(f".removed-{folder.name}")  # renamed at once: never half a checkpoint by its name
    folder.replace(gone)
    shutil.rmtree(gone)


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same, in words."""
    return [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]


def write(folder: Path, learner: Learner, report: Report, identity: dict[str, Any]) -> None:
    """Write a checkpoint. Raises `OSError`, `SafetensorError` or `InputError` where that fails; nothing is left of it then."""
    stage = folder.with_name(f".saving-{folder.name}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        facts, tensors = _taken(learner, report)
        about = {"steps": report.steps, "losses": finite(report.losses)}
        adapter_folder.save(learner.base.model, stage, learner.name, about=about)
        save_file(tensors, stage / STATE)
        (stage / FACTS).write_bytes(_json(facts | {"identity": identity}))
        files = {file.name: _measured(file) for file in sorted(stage.iterdir())}
        told = {"format": FORMAT, "step": report.steps, "files": files}
        (stage / MANIFEST).write_bytes(_json(told | {"sha256": _sum(told)}))
        for file in stage.iterdir():
            make_safe(file)
        make_safe(stage)
        stage.replace(folder)
        for parent in (folder.parent, folder.parent.parent):  # the outer one: `checkpoints` may be new
            make_safe(parent)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(stage, ignore_errors=True)
        raise


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says, and its tensors. Raises `InputError`, naming the file, where it is not what was written."""
    verify(folder)
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8")), load_file(folder / STATE)
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"checkpoint: {folder} cannot be read: {reason(e)}") from None


def verify(folder: Path) -> None:
    """Raise `InputError` for the first file that is missing, or has another byte than was written."""
    try:
        content = (folder / MANIFEST).read_bytes()
        told = json.loads(content)
        files: dict[str, Any] = told["files"]
        wanted = told.pop("sha256")
        if told["format"] != FORMAT:
            raise InputError(f"checkpoint: {folder} is of another version (format {told['format']}, here {FORMAT})")
        if wanted != _sum(told) or content != _json(told | {"sha256": wanted}):
            raise ValueError("it is not what was written")
    except OSError:
        raise InputError(f"checkpoint: {folder} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"checkpoint: {folder / MANIFEST} is damaged: {reason(e)}") from None
    for name, measured in files.items():
        if not (folder / name).is_file():
            raise InputError(f"checkpoint: {folder / name} is missing")
        if _measured(folder / name) != measured:
            raise InputError(f"checkpoint: {folder / name} is damaged: it is not what was written")


def _taken(learner: Learner, report: Report) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that the next step depends on, apart from the settings and the rows."""
    tensors = {f"parts/{name}": t for name, t in tensors_of(learner.own).items()}
    tensors |= {f"best/{name}": t for name, t in learner.best.items()}
    tensors |= {f"before/{i}": t for i, t in enumerate(learner.before.tensors)}
    tensors |= {f"random/{i}": t for i, t in enumerate(random_states(learner.base.device))}
    plain: dict[str, dict[str, Any]] = {}
    for i, p in enumerate(learner.parameters):
        for key, value in learner.optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{i}/{key}"] = value
            else:
                plain.setdefault(str(i), {})[key] = value
    tensors["losses"] = torch.tensor(report.losses, dtype=torch.float64)  # here, because JSON knows no NaN
    tensors["validation"] = torch.tensor(report.validation, dtype=torch.float64).reshape(-1, 2)
    kept: Any = np.random.get_state(legacy=False)
    facts = {
        "optimizer": plain,
        "micro": learner.micro,
        "scaling": [learner.scale, learner.good, learner.skipped],
        "nonfinite": [learner.nonfinite, learner.bad_in_a_row, learner.left_out],
        "report": {name: getattr(report, name) for name in REPORTED},
        "python_random": random.getstate(),
        "numpy_random": kept | {"state": {k: np.asarray(v).tolist() for k, v in kept["state"].items()}},
    }
    # Apart from each other and in one piece, as the format wants them.
    return facts, {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


REPORTED = ("seconds", "examples", "tokens", "peak_bytes", "saves", "saving_seconds", "cut")


@torch.no_grad()
def _put(learner: Learner, report: Report, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The reverse of `_taken`."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    put_tensors(learner.own, under("parts/"))
    learner.best = {name: t.to(learner.base.device) for name, t in under("best/").items()}
    learner.before.tensors = [tensors[f"before/{i}"].to(p.device) for i, p in enumerate(learner.parameters)]
    for i, p in enumerate(learner.parameters):
        state: dict[str, Any] = dict(facts["optimizer"].get(str(i), {}))
        for key, t in under(f"optimizer/{i}/").items():
            # Counters stay on the CPU, where PyTorch's optimisers keep them.
            state[key] = t if key == "step" else t.to(p.device)
        if state:
            learner.optimizer.state[p] = state
    states = under("random/")
    set_random_states(learner.base.device, [states[str(i)] for i in range(len(states))])
    version, internal, gauss = facts["python_random"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(facts["numpy_random"])
    learner.micro = min(learner.micro, facts["micro"])
    learner.scale, learner.good, learner.skipped = facts["scaling"]
    learner.nonfinite, learner.bad_in_a_row, learner.left_out = facts["nonfinite"]
    for name in REPORTED:
        setattr(report, name, facts["report"][name])
    report.validation = [(int(step), loss) for step, loss in tensors["validation"].tolist()]
    report.losses = tensors["losses"].tolist()
    report.micro_batch, report.skipped, report.nonfinite = learner.micro, learner.skipped, learner.nonfinite
    report.bad_rows = learner.left_out


def finite(losses: Sequence[float]) -> list[float | None]:
    """Losses as JSON has them: it knows no NaN."""
    return [loss if math.isfinite(loss) else None for loss in losses]


def reason(error: BaseException) -> str:
    """What the system says, without the number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_json(content)).hexdigest()


def _measured(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, read in pieces."""
    with file.open("rb") as f:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
