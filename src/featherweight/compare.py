"""`compare`: train and evaluate every contender the same way, with every seed.

Nothing here trains or measures: `bench` makes a run, by itself or in a process of its own (`worker`). Here is decided which runs there
are, with which rate and budget, in which order, and which are on disk already. What is on disk is rewritten after every run, and a run
that is there is not repeated: a comparison that was interrupted goes on where it stopped, and one with a method or a seed more
adds only those.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import tables
from .advice import advice, verdict
from .base import load_config, pick_device
from .bench import Bench, Outcome, Run
from .budget import foreseen, largest_batch, steps_for_tokens
from .caveats import unlearned
from .config import CompareConfig
from .contenders import Contender
from .engine.memory import free, left_bytes
from .engine.stopping import stoppable
from .errors import InputError
from .plan.before import asked_tricks
from .plan.cards import read_bytes
from .plan.estimate import Tricks
from .prepare import describe
from .progress import board, note, spell_seconds
from .results import Line, entries, read, write_tested
from .task import Task
from .tuning import search
from .worker import job_of, together


@dataclass
class Comparison:
    """A comparison under way: its runs, what has come of them, and its folder."""

    config: CompareConfig
    folder: Path
    task: Task
    runs: list[Run] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """The runs' identities."""
    known: dict[str, Line] = field(default_factory=dict)
    """Every line on disk, by identity."""
    notes: list[str] = field(default_factory=list)
    signal: int | None = None
    """The one that ended it."""

    @property
    def lines(self) -> list[Line]:
        """Those of this comparison, in its order; a folder may hold others besides."""
        return [self.known[key] for key in self.keys if key in self.known]

    @property
    def todo(self) -> list[int]:
        """The numbers of the runs that are not done."""
        return [i for i, key in enumerate(self.keys) if key not in self.known]

    def took(self, number: int, outcome: Outcome) -> bool:
        """Write down what came of a run; whether to go on."""
        run = self.runs[number]
        self.notes += outcome.notes
        if outcome.line is not None:
            self.known[self.keys[number]] = outcome.line
        if outcome.signal is not None:
            self.signal = self.signal or outcome.signal
            self.notes.append(f"interrupted during {run.titled}; the rows above are complete; the same command goes on")
        self.save()
        return outcome.signal is None

    def save(self) -> None:
        """Everything that is there so far."""
        keys = set(self.keys)
        others = [line for key, line in self.known.items() if key not in keys]
        tables.save(self.folder, self.lines, self.notes, [*self.lines, *others])


def compare(
    config: CompareConfig,
    task: Task,
    who: Sequence[Contender],
    folder: Path,
    at_a_time: Mapping[str, int] | None = None,
) -> Comparison:
    """Make all runs that are not on disk yet. Ctrl-C and SIGTERM end it: what is in training is saved, and goes on the next time.

    `at_a_time` says of contenders, by name, how many rows they read at a time.
    """
    config = config.model_copy(update={"methods": ",".join(c.name for c in who)})
    bench = Bench.open(config, task)
    describe(bench.base, bench.task, bench.writer, config.metric)
    asked = Comparison(config, folder, bench.task, known={line.identity: line for line in read(folder)})
    try:
        _decide(asked, bench, who, at_a_time or {})
    except KeyboardInterrupt:
        asked.signal = 2
        asked.notes.append("interrupted before the first run; the same command goes on")
        return asked
    for number in sorted(set(range(len(asked.keys))) - set(asked.todo)):
        note(f"{asked.runs[number].titled}: done before")
    for number in asked.todo:
        if asked.runs[number].name == "majority":  # needs no model
            asked.took(number, bench.make(asked.runs[number], folder, time.time()))
    if config.isolate:
        _release(bench)
        _apart(asked)
    else:
        for number in asked.todo:
            if not asked.took(number, bench.make(asked.runs[number], folder, time.time())):
                break
    asked.notes += [*blind_spots(asked.lines, task), *verdict(asked.lines), *advice(asked.lines)]
    return asked


def _decide(asked: Comparison, bench: Bench, who: Sequence[Contender], at_a_time: Mapping[str, int]) -> None:
    """The runs, seed by seed, so that a comparison that ends early has something of every method."""
    config = asked.config
    decided = [(c, _settled(bench, c, asked.folder, at_a_time.get(c.name))) for c in who]
    for i in range(config.seeds):
        for contender, run in decided:
            if i > 0 and contender.method is None:  # no seed changes it
                continue
            own = replace(run, seed=config.seed + i, titled=_title(config, contender, config.seed + i))
            if config.seeds > 1 and contender.method is not None:
                own = replace(own, place=f"{contender.folder}/seed-{own.seed}")
            asked.runs.append(own)
            asked.keys.append(bench.key(own))
    write_tested(asked.folder, bench.tested, bench.task.test)
    for name in {asked.runs[i].name for i in asked.todo}:
        contender = next(c for c in who if c.name == name)
        if contender.method is not None and (found := _foreseen(bench, contender, asked)):
            asked.runs = [replace(run, predicted=found) if run.name == name else run for run in asked.runs]


def _title(config: CompareConfig, who: Contender, seed: int) -> str:
    return who.title + (f", seed {seed}" if config.seeds > 1 and who.method is not None else "")


def _settled(bench: Bench, who: Contender, folder: Path, at_a_time: int | None) -> Run:
    """What a contender trains with: its own rate or the one that a search finds, and its budget."""
    config, settings, method = bench.config, bench.settings, who.method
    run = Run(who.name, config.seed, who.folder)
    if method is None:
        return run
    lr = who.lr or config.lr or method.rate(bench.base.classifies)
    options: dict[str, Any] = {}
    settings = replace(settings, lr=lr, batch_size=who.batch_size or settings.batch_size)
    if at_a_time is not None and not config.fill:
        settings = replace(settings, micro_batch=min(at_a_time, settings.micro_batch or at_a_time))
    if config.tokens is not None:
        settings = replace(settings, steps=steps_for_tokens(bench.examples, settings, config.tokens))
    budget = _filled(bench, method, settings) if config.fill else settings
    if config.tune is not None:
        best = search(bench, who, budget, config.tune, folder / who.folder)
        lr, options = best.lr, best.options
        if config.fill:  # another size leaves room for another batch
            budget = _filled(bench, replace(method, **options), settings)
    return replace(
        run, lr=lr, steps=budget.steps, batch_size=budget.batch_size, options=options, micro_batch=budget.micro_batch
    )


def _tricks(config: CompareConfig) -> Tricks:
    return asked_tricks(config, load_config(config.model))


def _given(bench: Bench) -> dict[str, Any]:
    base = bench.base
    labels = bench.task.labels if base.classifies else None
    tricks = _tricks(bench.config)
    return {"cpu": base.device.type == "cpu", "dtype": base.model.dtype, "labels": labels, "tricks": tricks}


def _filled(bench: Bench, method: Any, settings: Any) -> Any:
    assert bench.config.memory is not None
    shape, limit = load_config(bench.config.model), read_bytes(bench.config.memory)
    return largest_batch(shape, method, settings, bench.examples, limit, **_given(bench))


def _foreseen(bench: Bench, who: Contender, asked: Comparison) -> tuple[int, int, int] | None:
    """What `plan` says of a contender's memory; None where it does not know such a run."""
    config, run = bench.config, next(run for run in asked.runs if run.name == who.name)
    method = run.contender(config).method
    if method is None or not _tricks(config).whole:
        return None
    settings = run.settings(bench.settings)
    plan = foreseen(load_config(config.model), method, settings, bench.examples, **_given(bench))
    return plan.bytes, plan.low, plan.high


def _release(bench: Bench) -> None:
    """The base is for the workers now."""
    device = bench.base.device
    del bench.base, bench.examples
    free(device)


def _apart(asked: Comparison) -> None:
    """Make the runs in processes of their own, one by one or side by side."""
    config, todo = asked.config, asked.todo
    if not todo:
        return
    jobs = [job_of(config, asked.folder, asked.runs[i]) for i in todo]
    room, took, begun = left_bytes_here(config), list[float](), dict[int, float]()
    threads = max(1, (os.cpu_count() or 1) // config.jobs) if config.jobs > 1 else None
    if config.jobs > 1 and not _tricks(config).whole:
        note(
            "one run at a time: how much a quantised, streamed or offloaded base takes is not foreseen well enough for --jobs"
        )

    def side_by_side(running: list[int], following: int) -> bool:
        if len(running) >= config.jobs or room is None:
            return False
        wanted = [asked.runs[todo[i]].predicted for i in (*running, following)]
        return all(w is not None for w in wanted) and sum(w[2] for w in wanted if w) <= room

    with stoppable() as stop, board() as screen:

        def show(number: int, told: dict[str, Any]) -> None:
            begun.setdefault(number, time.monotonic())
            screen.show(number, told)

        def ended(number: int, answer: dict[str, Any] | InputError) -> bool:
            screen.forget(number)
            titled = asked.runs[todo[number]].titled
            failed = isinstance(answer, InputError)
            outcome = Outcome(notes=[f"{titled} was left out: {answer}"]) if failed else Outcome.from_json(answer)  # type: ignore[arg-type]
            if stop.signal is not None and outcome.line is None:
                outcome = replace(outcome, signal=stop.signal, notes=[])
            took.append(time.monotonic() - begun.get(number, time.monotonic()))
            left = statistics.fmean(took) * (len(todo) - len(took)) / config.jobs
            screen.whole(len(took), len(todo), f"about {spell_seconds(left)} left" if left else "")
            return asked.took(todo[number], outcome)

        together(jobs, side_by_side, show, ended, lambda: stop.signal, threads)
        if stop.signal is not None and asked.signal is None:  # between two runs
            asked.signal = stop.signal
            asked.notes.append("interrupted between two runs; the same command goes on")


def left_bytes_here(config: CompareConfig) -> int | None:
    """How much memory all runs together may take."""
    left = left_bytes(pick_device(config.device))
    limit = None if config.memory is None else read_bytes(config.memory) * config.jobs
    return min((n for n in (left, limit) if n is not None), default=None)


def blind_spots(lines: Sequence[Line], task: Task) -> list[str]:
    """What an accuracy hides: classes that no row of the table ever answers, and methods that had no time to learn."""
    found = [e for e in entries(lines) if e.first.kind == "method"]
    if not task.labels or not found:
        return []
    answers, notes = [row.answer for row in task.test], list[str]()
    for label in task.labels:
        if share := answers.count(label) / len(answers):
            blind = [e.first.method for e in found if not any(label in run.predictions for run in e.runs)]
            if blind:
                never = "never answers" if len(blind) == 1 else "never answer"
                who = "no method answers" if len(blind) == len(found) else f"{', '.join(blind)} {never}"
                notes.append(f"{who} {label!r}, which {100 * share:.1f} % of the test rows are")
    for entry in found:
        if why := unlearned(entry.first.losses, task.labels):
            notes.append(f"{entry.first.method} has not learned enough yet, and may be better after more steps: {why}")
    return notes
