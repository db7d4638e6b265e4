"""The workbench of a comparison: what all runs share, and one run on it, trained, saved and measured.

A run is `attach` + `fit` + `evaluate` + `detach` on the base, and everything that is told of it is measured on the way: see
`results.Line`. Where nothing is trained (the references) only the evaluation is left.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import budget, provenance
from .adapter import count, detach
from .adapter_folder import WEIGHTS, save
from .api import begin
from .base import Base, fingerprint
from .checkpoints import Checkpoints, finite
from .config import CompareConfig
from .contenders import Contender, contender
from .engine.memory import held_bytes, host_peak_bytes, peak_bytes, reserved_bytes, reset_peak
from .engine.train import Report, Settings
from .errors import InputError
from .forgetting import general_loss, general_texts
from .full import FullFineTuning
from .identity import check_base, data_print, hashed, identity_of, template_print, tokenizer_print
from .measure import StepMemory, energy_meter
from .prepare import base_for, settings_of, task_of
from .progress import note
from .results import Line, line_of
from .run_folder import CHECKPOINTS, decisive
from .scoring import Score, majority
from .task import Task
from .tokens import Example, Writer, writer_for
from .watched import ADVICE, evaluate_with_bar, fit_with_bar

UNTOLD = frozenset({
    "methods", "references", "seeds", "seed", "options", "lr", "epochs", "steps", "batch_size", "jobs", "isolate", "tune",
    "tokens", "minutes", "fill",
})  # fmt: skip
"""Settings that a run's own figures tell, or that do not change its result."""
LEARNING = frozenset({
    "warmup", "weight_decay", "max_grad_norm", "optimizer", "accumulate", "skip_nonfinite", "packing",
})  # fmt: skip
"""Settings that mean nothing where nothing is trained."""


@dataclass(frozen=True)
class Run:
    """One contender with one seed, and all that was decided for it."""

    name: str
    seed: int
    place: str
    """Its folder, inside the comparison's."""
    lr: float = 0.0
    steps: int = 0
    batch_size: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Of the method, where a search has chosen them."""
    micro_batch: int | None = None
    """Rows at a time, where `--memory` has chosen."""
    predicted: tuple[int, int, int] | None = None
    """(bytes, low, high) by `plan`."""
    titled: str = ""

    def contender(self, config: CompareConfig) -> Contender:
        """Who runs."""
        found = contender(self.name, config.options)
        return replace(found, method=replace(found.method, **self.options)) if found.method and self.options else found

    def settings(self, shared: Settings) -> Settings:
        """The shared ones, with what is this run's."""
        micro = self.micro_batch or shared.micro_batch
        return replace(
            shared, lr=self.lr, seed=self.seed, steps=self.steps, batch_size=self.batch_size, micro_batch=micro
        )


@dataclass
class Outcome:
    """How a run ended: with a line for the table, with a word why not, or by a signal."""

    line: Line | None = None
    notes: list[str] = field(default_factory=list)
    signal: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For a process that made the run, to tell the one that asked for it."""
        return asdict(self)

    @staticmethod
    def from_json(told: Mapping[str, Any]) -> Outcome:
        """The other end."""
        line = line_of(told["line"]) if told["line"] else None
        return Outcome(line, list(told["notes"]), told["signal"])


@dataclass
class Bench:
    """The base, the rows as tokens, and what it took to get them."""

    config: CompareConfig
    base: Base
    task: Task
    writer: Writer
    examples: list[Example]
    general: list[str]
    load_seconds: float
    tokenise_seconds: float
    host_bytes: int
    command: str
    """What somebody typed."""

    @staticmethod
    def open(config: CompareConfig, task: Task | None = None, command: str | None = None) -> Bench:
        """Load the base and tokenise the rows. `config` has its steps decided, and names the contenders that take part."""
        task = task or task_of(config)
        start = time.perf_counter()
        base = base_for(config, config.model, task.labels)
        loaded = time.perf_counter()
        if base.classifies:
            task = task.in_order(base.labels)
        asked = [contender(word, config.options) for word in config.methods.split(",")]
        writer = writer_for(base, config.max_length, task.labels, [c.method for c in asked if c.method])
        examples = writer.examples(task.train)[0]
        done = time.perf_counter()
        general = general_texts(config.general_text)
        return Bench(
            config, base, task, writer, examples, general, loaded - start, done - loaded, host_peak_bytes(),
            command or provenance.command(),
        )  # fmt: skip

    @property
    def tested(self) -> str:
        """Tells which rows are tested on."""
        return data_print(self.task.test)

    @property
    def settings(self) -> Settings:
        """Those that all runs share."""
        return settings_of(self.config, len(self.task.train), lr=0.0)

    @property
    def shared(self) -> dict[str, Any]:
        """What decides the result of every run alike."""
        told = {k: v for k, v in decisive(self.config).items() if k not in UNTOLD}
        return told | {"device": self.base.device.type}

    def identity(self, run: Run) -> dict[str, Any]:
        """All that decides a run's result. A method is attached."""
        method = run.contender(self.config).method
        told = {**self.shared, "method": run.name}
        told |= {"tested": self.tested, "metric": self.config.metric}
        if method is None:
            writes = template_print(self.base.tokenizer, self.task.template, self.task.kind)
            base = {"base": fingerprint(self.base.model), "tokenizer": tokenizer_print(self.base.tokenizer)}
            # A majority is of the training rows, and so are examples.
            drawn = {"seed": self.config.seed, "data": data_print(self.task.train)}
            return {**{k: v for k, v in told.items() if k not in LEARNING}, **base, "template": writes, **drawn}
        options = {} if isinstance(method, FullFineTuning) else asdict(method)
        own = {"options": options, "lr": run.lr, "steps": run.steps, "batch_size": run.batch_size, "seed": run.seed}
        if self.config.minutes is not None:
            own |= {"steps": None, "minutes": self.config.minutes}
        return identity_of(self.base, self.task, told | own)

    def key(self, run: Run) -> str:
        """A hash of `identity`; the method is attached for it, and gone again."""
        if (method := run.contender(self.config).method) is None:
            return hashed(self.identity(run))
        begin(self.base, method, self.task, self.writer, seed=run.seed)
        try:
            return hashed(self.identity(run))
        finally:
            detach(self.base.model)

    def make(self, run: Run, folder: Path, started: float) -> Outcome:
        """The run, from its beginning or its last checkpoint to its line. `started`: when its process did, by `time.time()`."""
        who = run.contender(self.config)
        try:
            made = self._untrained if who.method is None else self._trained
            outcome = made(run, who, folder)
        except InputError as e:
            return Outcome(notes=[f"{run.titled} was left out: {e}"])
        except KeyboardInterrupt:
            return Outcome(signal=int(signal.SIGINT))
        if outcome.line is not None:
            outcome.line.whole_seconds = time.time() - started
        return outcome

    def _untrained(self, run: Run, who: Contender, _: Path) -> Outcome:
        """A reference: what the base does as it is, or what it would be to answer the same to everything."""
        task = self.task
        if who.name == "majority":
            if not task.labels:
                return Outcome(notes=["there is no majority class: the answers are texts"])
            line = self._line(run, who, self.identity(run))
            self._judge(line, majority(task))
            line.method = f"Majority class ({line.predictions[0]})"
            return Outcome(line)
        if self.base.random:
            return Outcome(
                notes=[
                    f"{who.title}: none, the model's head for these labels is random; every method trains the head as well"
                ]
            )
        if who.shots and self.base.classifies:
            return Outcome(notes=[f"{who.title}: none, the model answers with a class and reads no examples"])
        line = self._line(run, who, self.identity(run))
        line.total_params = count(self.base.model)[0]
        shown = shots(task, who.shots, self.config.seed) if who.shots else task
        self._evaluate(line, shown)
        return Outcome(line)

    def _trained(self, run: Run, who: Contender, folder: Path) -> Outcome:
        place, method = folder / run.place, who.method
        assert method is not None
        begin(self.base, method, self.task, self.writer, seed=run.seed)
        try:
            identity = self.identity(run)
            key = hashed(identity)
            if self.config.minutes is not None:
                run = replace(run, steps=budget.steps_in(self, run, place / f"steps-{key}.json"))
                detach(self.base.model)
                begin(self.base, method, self.task, self.writer, seed=run.seed)
            line = self._line(run, who, identity)
            meter = energy_meter(self.base.device)
            result = self._train(line, run, place, identity)
            if result.signal is not None:
                return Outcome(signal=result.signal)
            if result.stopped == "out of memory":
                return Outcome(notes=[f"{run.titled} was left out: {ADVICE}"])
            self._evaluate(line, self.task)
            line.joules = meter() if meter else None
            shutil.rmtree(place / f"{CHECKPOINTS}-{key}", ignore_errors=True)
            return Outcome(line)
        finally:
            detach(self.base.model)

    def _train(self, line: Line, run: Run, place: Path, identity: dict[str, Any]) -> Report:
        """Train what is attached, save it, and write down what that took."""
        settings = run.settings(self.settings)
        check = partial(check_base, self.base, identity)
        # By identity: one that was interrupted under other settings may lie beside it, and is not this run's.
        checkpoints = Checkpoints(place / f"{CHECKPOINTS}-{line.identity}", identity, check=check, tell=note)
        line.before_bytes, memory = held_bytes(self.base.device), StepMemory(self.base.device, run.steps)
        try:
            result = fit_with_bar(
                self.base, self.examples, settings, run.titled, checkpoints=checkpoints, also=memory.on_step
            )
        finally:
            memory.stop()
        line.total_params, line.trainable_params = count(self.base.model)
        line.train_steps, line.train_examples, line.train_tokens = result.steps, result.examples, result.tokens
        line.train_seconds, line.peak_bytes, line.stopped = result.seconds, result.peak_bytes, result.stopped
        line.losses, line.memory_over_step = finite(result.losses), memory.samples
        line.reserved_bytes = reserved_bytes(self.base.device)
        line.host_bytes = max(line.host_bytes, host_peak_bytes())
        if line.kind == "reference":  # all weights were trained: they are counted once
            line.total_params = line.trainable_params
        else:
            save(self.base.model, place)
            line.adapter_bytes = (place / WEIGHTS).stat().st_size
        return result

    def _line(self, run: Run, who: Contender, identity: dict[str, Any]) -> Line:
        """What is known before anything has been measured."""
        told = {
            **provenance.record(),
            "command": self.command,
            "threads": torch.get_num_threads(),
            "dtype": str(self.base.model.dtype),
            "device": str(self.base.device),
            "base": self.base.name,
        }
        told |= {"data": self.task.about["data"], "identity": identity}
        own = ((name, p) for name, p in self.base.model.named_parameters() if ".parts." not in f".{name}")
        weights = sum(p.nbytes for _, p in own)
        return Line(
            name=run.name, method=who.title, kind=who.kind, seed=run.seed, lr=run.lr, batch_size=run.batch_size,
            identity=hashed(identity), load_seconds=self.load_seconds, tokenise_seconds=self.tokenise_seconds, weights_bytes=weights,
            host_bytes=self.host_bytes, provenance=told,
            predicted_bytes=run.predicted[0] if run.predicted else None,
            predicted_interval=run.predicted[1:] if run.predicted else None,
        )  # fmt: skip

    def _evaluate(self, line: Line, task: Task) -> None:
        reset_peak(self.base.device)
        self._judge(line, evaluate_with_bar(self.base, task, self.writer, self.config.metric, line.method))
        line.eval_peak_bytes = peak_bytes(self.base.device)
        line.eval_tokens = sum(len(self.writer.prompt(row)) for row in task.test)
        line.host_bytes = max(line.host_bytes, host_peak_bytes())
        line.general_loss = general_loss(self.base, self.general)

    def _judge(self, line: Line, score: Score) -> None:
        line.eval_batches, line.eval_seconds, line.eval_examples = score.batches, score.seconds, score.n
        line.correct, line.accuracy, line.interval = score.correct, score.accuracy, score.interval
        line.macro_f1, line.metric, line.predictions = score.macro_f1, score.metric, score.predictions
        line.right = [p == a for p, a in zip(score.predictions, score.answers, strict=True)]
        line.tested = self.tested


def shots(task: Task, n: int, seed: int) -> Task:
    """The task with `n` training rows written out before each text, the labels in turn."""
    by_label: dict[str, list[Any]] = {}
    for row in sorted(task.train, key=lambda row: hashlib.sha256(f"{seed}{row.spans}".encode()).digest()):
        by_label.setdefault(row.answer if task.labels else "", []).append(row)
    rows = [rows[i] for i in range(n) for rows in by_label.values() if i < len(rows)][:n]
    read = ["".join(text for text, trained in r.spans if not trained) for r in rows]
    written = "".join(f"{text} {r.answer.strip()}\n\n" for text, r in zip(read, rows, strict=True))
    talk = (turn for row in rows for turn in row.messages or ())
    turns = tuple(turn for turn in talk if turn["role"] != "system")  # the row's own goes before the first of them
    shown = [replace(r, spans=((written, False), *r.spans), messages=_before(turns, r.messages)) for r in task.test]
    return replace(task, test=shown)


def _before(turns: tuple[dict[str, str], ...], messages: tuple[dict[str, str], ...] | None) -> Any:
    """A conversation with earlier turns, which follow what its system says."""
    if messages is None:
        return None
    system = tuple(turn for turn in messages if turn["role"] == "system")
    return (*system, *turns, *messages[len(system) :])
