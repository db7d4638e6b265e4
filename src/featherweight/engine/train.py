"""The one training loop: every method, every command, every benchmark goes through it."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..adapter import attached, folded, know, living, rewind, trainable
from ..attention import rows_apart
from ..base import Base
from ..errors import InputError
from ..method import Part, Retrained
from ..tokens import Example
from .activations import activations
from .batches import Batch, check_packing, collate, keeps_apart, pack, schedule
from .lean import lean
from .memory import LEARNED, hand_back, peak_bytes, reset_peak, within
from .stopping import StopRequested, stoppable
from .update import Collate, DivergedError, Learner, OutOfMemoryError
from .validation import put_tensors, validate

if TYPE_CHECKING:
    from ..checkpoints import Checkpoints


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. Units: steps are optimiser updates, rates are per update."""

    steps: int = 100
    batch_size: int = 8
    micro_batch: int | None = None
    """Rows of a batch read at a time, with the same result; None: all of them."""
    accumulate: int = 1
    """Batches whose gradients make one update: the same result as one batch of all their rows, in less memory."""
    checkpoint_activations: str = "none"
    """What layers keep for the backward pass: `none`, `layer` or `offload`; see `engine.activations`."""
    optimizer: str = "adamw"
    """See `engine.optimizers`."""
    memory: int | None = None
    """Bytes that the run may take in all (on an accelerator: of the device); None: what there is."""
    packing: bool | None = None
    """Put a batch's texts into one row instead of padding them; None: wherever the model can keep them apart."""
    lean: bool = True
    """Norms and gates of our own in place of transformers', where they do the same: see `engine.lean`. For debugging."""
    lr: float = 1e-3
    warmup: float = 0.06
    """Share of the steps over which the rate rises; it then falls linearly to zero."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    skip_nonfinite: bool = False
    """Leave out updates whose loss or gradient is not finite, and count them, where a run would otherwise end."""
    seed: int = 0


@dataclass
class Report:
    """What a training run did. Times are of the steps alone: no loading, no tokenising."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    peak_bytes: int = 0
    micro_batch: int = 0
    """Rows read at a time: `batch_size`, or fewer where memory ran out; the result is the same."""
    compact: bool = False
    """Whether memory ran out with one row at a time, so that what is freed has gone back to the system at once: slower."""
    skipped: int = 0
    """Updates left out because a float16 base's gradients were infinite at the loss scale of the time."""
    nonfinite: int = 0
    """Updates left out because a loss or gradient was not finite, where `skip_nonfinite` asks for that."""
    bad_rows: list[str] = field(default_factory=list)
    """Places of the rows that made a loss or gradient not finite, each by itself; none: the parts themselves did."""
    cut: int = 0
    """Rows that were longer than the context and were cut."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss over the validation rows), where there are any; the parts are then those of the smallest."""
    saves: int = 0
    """Checkpoints written, and the seconds that took, which are not among `seconds`."""
    saving_seconds: float = 0.0
    stopped: str | None = None
    """None, `interrupted` (by `signal`), `diverged` (a loss or gradient that is not finite), `out of memory` (for one row), or
    `not saved` (a checkpoint could not be written, and the run was asked to stop then)."""
    signal: int | None = None
    """The number of the signal that ended the run: 2 for Ctrl-C."""

    def add(self, loss: float, batches: Sequence[Batch], seconds: float, peak: int) -> None:
        """Account for one finished step."""
        self.losses.append(loss)
        self.seconds += seconds
        self.examples += sum(len(b.examples) for b in batches)
        self.tokens += sum(b.tokens for b in batches)
        self.peak_bytes = peak

    @property
    def steps(self) -> int:
        """Steps that were completed."""
        return len(self.losses)

    @property
    def best(self) -> tuple[int, float]:
        """(step, loss) of the smallest validation loss that is finite; (0, infinity) where there is none."""
        return min((v for v in self.validation if math.isfinite(v[1])), key=lambda v: v[1], default=(0, math.inf))

    @property
    def steps_per_second(self) -> float:
        """Speed of the steps."""
        return self.steps / self.seconds if self.seconds else 0.0

    @property
    def examples_per_second(self) -> float:
        """Speed in rows."""
        return self.examples / self.seconds if self.seconds else 0.0


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then linear decay to zero at the last step."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * (settings.steps - step) / max(1, settings.steps - warm)


def fit(
    base: Base,
    examples: Sequence[Example],
    settings: Settings,
    *,
    name: str = "default",
    on_step: Callable[[Report], None] | None = None,
    checkpoints: Checkpoints | None = None,
    validation: Sequence[Example] = (),
) -> Report:
    """Train the parts of adapter `name` on the examples; the base stays as it is.

    Ctrl-C, SIGTERM and a loss that is not finite end the run early with the last good adapter in place; `Report.stopped` says
    so. With `checkpoints` the run goes on from the newest that is whole, and writes more. With `validation` rows, their loss is
    measured ten times on the way, and the adapter with the smallest is the result.
    Raises `InputError` when there is nothing to learn from, or a checkpoint is of another run.
    """
    _check_trainable(base, examples, name)
    know(base.model, attached(base.model)[name].scheduled(settings.steps), name)
    report = Report()
    reset_peak(base.device)
    others = [p for other in living(base.model) if other != name for p in trainable(base.model, other)]
    for p in others:  # they run along, frozen
        p.requires_grad_(False)
    learner: Learner | None = None
    try:
        with prepared(base, settings) as tensors, within(base.device, settings.memory), stoppable() as stop:
            learner = Learner(base, settings, tensors, name, stop)
            try:
                _steps(learner, examples, report, _Watch(on_step, checkpoints, validation))
                report.signal = stop.signal  # one that came too late to stop anything
            except (StopRequested, OutOfMemoryError) as end:  # with all as before the update: a place to go on from
                report.stopped, report.signal = _REASONS[type(end)], stop.signal
                if checkpoints:
                    checkpoints.save(learner, report)
    except (KeyboardInterrupt, DivergedError) as end:
        report.stopped = _REASONS[type(end)]
        report.signal = int(signal.SIGINT) if report.stopped == "interrupted" else None
        report.bad_rows += [row.row.place for row in getattr(end, "rows", ())]
        if learner is not None:  # an interrupted update may have been cut in the middle
            rewind(base.model, learner.before.tensors, name)
    finally:
        if learner is not None and learner.compact:
            hand_back(LEARNED)
        for p in others:
            p.requires_grad_(True)
        for p in trainable(base.model, name):
            p.grad = None
    return report


_REASONS: dict[type[BaseException], str] = {
    KeyboardInterrupt: "interrupted",
    StopRequested: "interrupted",
    DivergedError: "diverged",
    OutOfMemoryError: "out of memory",
}


def _check_trainable(base: Base, examples: Sequence[Example], name: str) -> None:
    """Raise `InputError` where there is nothing to learn, or nothing to learn from."""
    if name not in attached(base.model):
        raise InputError(f"nothing to train: no adapter named {name!r} is attached")
    if name not in living(base.model):
        raise InputError(f"nothing to train: the adapter {name!r} is attached but not live")
    if name in folded(base.model):
        raise InputError(f"nothing to train: the adapter {name!r} is merged into the weights; unmerge it first")
    if not examples:
        raise InputError("nothing to train on: no rows")
    if base.random:
        raise InputError(
            f"the {base.random[0]} of {base.name} is random and must be trained too: name it in modules_to_save"
        )


@dataclass(frozen=True)
class _Watch:
    """Who looks on while a run trains."""

    on_step: Callable[[Report], None] | None
    checkpoints: Checkpoints | None
    validation: Sequence[Example]


def _steps(learner: Learner, examples: Sequence[Example], report: Report, watch: _Watch) -> None:
    """All updates of a run, or those that are left of it. The batch that needs most memory comes first, for a rehearsal: no
    late row can end the run. What is rehearsed is what goes on, so that a signal in the middle of it leaves just that.
    """
    settings, base = learner.settings, learner.base
    packing = learner.tensors is pack
    begin = watch.checkpoints.resume(learner, report) if watch.checkpoints else 0
    if begin + 1 < settings.steps:
        learner.rehearse([heaviest(examples, settings, packing)])
    if begin:
        validate(learner, report, watch.validation)  # a signal may have come before it
    stream = itertools.islice(batches(examples, settings, packing), begin * settings.accumulate, None)
    for step in range(begin, settings.steps):
        learner.stop.check()
        start = time.perf_counter()
        for group in learner.optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        rows = list(itertools.islice(stream, settings.accumulate))
        done = learner.skipped + learner.nonfinite
        loss, read = learner.update(rows, check=partial(_check_reached, learner.own) if step == begin else None)
        if learner.skipped + learner.nonfinite == done:
            learner.method.after_step(learner.own, step + 1)
        report.micro_batch, report.skipped, report.compact = learner.micro, learner.skipped, learner.compact
        report.nonfinite, report.bad_rows = learner.nonfinite, learner.left_out
        report.add(loss, read, time.perf_counter() - start, peak_bytes(base.device))
        improved = validate(learner, report, watch.validation)
        if watch.on_step:
            watch.on_step(report)
        if watch.checkpoints and not watch.checkpoints.after_step(learner, report, improved):
            return
    if not all(bool(p.isfinite().all()) for p in learner.parameters):
        raise DivergedError
    if learner.best:
        put_tensors(learner.own, learner.best)


def batches(examples: Sequence[Example], settings: Settings, packing: bool) -> Iterator[list[Example]]:
    """The rows of every batch of a run, in order."""
    n = settings.steps * settings.accumulate
    return schedule(examples, settings.batch_size, n, settings.seed, by_length=not packing)


def heaviest(examples: Sequence[Example], settings: Settings, packing: bool) -> list[Example]:
    """The batch of a run that needs most memory."""
    return max(batches(examples, settings, packing), key=lambda rows: sum(len(e.ids) + len(e.targets) for e in rows))


@contextmanager
def prepared(base: Base, settings: Settings = Settings()) -> Iterator[Collate]:
    """Inside, the model trains; what it is given are batches made by the function that this yields: `pack` or `collate`.

    Raises `InputError` where the model cannot be trained so: packed, or with its layers computed again.
    """
    packing = settings.packing
    if packing:
        check_packing(base)
    elif packing is None:
        packing = keeps_apart(base)
    with training(base, settings, packing) as tensors:
        yield tensors


@contextmanager
def training(base: Base, settings: Settings, packing: bool) -> Iterator[Collate]:
    """`prepared` for one who knows whether this model can be packed, without trying."""
    base.model.train()
    try:
        with (
            lean(base.model) if settings.lean else nullcontext(),
            rows_apart(base.model) if packing else nullcontext(),
            activations(base.model, settings.checkpoint_activations),
        ):
            yield pack if packing else collate
    finally:
        base.model.eval()


def _check_reached(own: Mapping[str, Part]) -> None:
    """A module that is trained as a whole must be called: another adapter's copy of it may run in its place."""
    for path, part in own.items():
        if isinstance(part, Retrained) and all(p.grad is None for p in part.parameters()):
            raise InputError(
                f"{path} is to be trained as a whole, but the model never calls it, or another live adapter's copy runs "
                f"instead: train one at a time, with live(model, name)"
            )
