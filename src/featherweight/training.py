"""`featherweight train`: from a configuration to an adapter, whatever happens on the way.

What can be checked is checked before the model loads. A run that was interrupted goes on; see `run_folder` and `checkpoints`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from . import caveats, tables
from .adapter import count, facts, remember
from .adapter_folder import CONFIG, OURS, WEIGHTS, save
from .api import begin
from .base import DTYPES, Base, load_config, pick_device, pick_dtype
from .checkpoints import Checkpoints, finite
from .config import TrainConfig
from .encoder import is_encoder
from .engine.stopping import stoppable
from .engine.train import Report, Settings
from .errors import InputError
from .identity import check_base, identity_of
from .methods.options import build_method
from .on_disk import make_safe
from .plan.before import before_the_run
from .prepare import announce, base_for, describe, new_folder, prepare, settings_of
from .progress import mebibytes, note
from .run_folder import RunFolder, asked_for, at_work, decided, decisive, find_run
from .task import Task
from .tokens import Writer, writer_for
from .watched import ADVICE, evaluate_with_bar, fit_with_bar


def run_train(config: TrainConfig) -> int:
    """`featherweight train`; the exit code."""
    folder, asked = find_run(config), asked_for(config)
    if folder is not None:
        config = decided(config, folder)
    method = build_method(config.method, config.options.get(config.method, {}))
    task, _, _ = prepare(config, [method], [config.method])
    shape = load_config(config.model)
    if folder is None:
        folder = new_folder(config.out, config.method)
    with at_work(folder) as run:
        try:
            settings = settings_of(config, len(task.train), lr=config.lr or method.rate(is_encoder(shape)))
            if not any(run.checkpoints.glob("step-*")):
                config, settings = before_the_run(config, shape, task, method, settings)
            run.begin(asked)
            dtype = pick_dtype(config.dtype, pick_device(config.device))  # decided once: `auto` is measured
            name = next(name for name, known in DTYPES.items() if known == dtype)
            config = config.model_copy(
                update={"steps": settings.steps, "epochs": None, "lr": settings.lr, "dtype": name}
            )
            announce(config, folder)
            base, writer, result = _learn(config, run, task, settings)
        except InputError:
            run.put_back()
            raise
        return _finish(config, run, task, settings, base, writer, result)


def _learn(config: TrainConfig, run: RunFolder, task: Task, settings: Settings) -> tuple[Base, Writer, Report]:
    """Train. What raises `InputError` after the first step keeps its checkpoints."""
    method = build_method(config.method, config.options.get(config.method, {}))
    base = base_for(config, config.model, task.labels)
    writer = writer_for(base, config.max_length, task.labels, [method])
    examples = describe(base, task, writer, config.metric)
    begin(base, method, task, writer, seed=config.seed)
    identity = identity_of(base, task, decisive(config) | {"device": base.device.type})
    remember(base.model, identity=identity)

    def check() -> None:
        check_base(base, identity)

    checkpoints = Checkpoints(
        run.checkpoints, identity, check=check, every_steps=config.save_steps, every_seconds=60 * config.save_minutes,
        keep=config.save_total_limit, stop_if_unsaved=config.if_save_fails == "stop", force=config.force, tell=note,
    )  # fmt: skip
    total, trained = count(base.model)
    note(f"{method.title}: {trained:,} of {total:,} parameters are trained ({100 * trained / total:.4f} %)")
    validation = writer.examples(task.validation)[0]
    result = fit_with_bar(base, examples, settings, method.title, checkpoints=checkpoints, validation=validation)
    return base, writer, result


def _finish(
    config: TrainConfig, run: RunFolder, task: Task, settings: Settings, base: Base, writer: Writer, result: Report
) -> int:
    """Save the adapter, say how the run ended, and measure it if it is complete; the exit code."""
    check_base(base, facts(base.model)["identity"])
    with stoppable() as late:  # a signal here must not cost the result
        saved = _save(base, run, result)
        try:
            run.end("not saved" if saved != run.path else result.stopped or "complete")
        except InputError as e:  # the disk is full: what follows must be said all the same
            note(str(e))
    code = _explain(result, settings, run.path)
    if saved is None:
        note("the adapter could not be saved; free some space: the same command goes on from the last checkpoint")
    elif saved != run.path:
        note(f"the adapter has been saved in {saved} instead; copy it before the system cleans up there")
    if saved != run.path:
        return code or 1
    if code == 0 and (number := result.signal or late.signal):
        note(f"the adapter is in {run.path}; it was not evaluated: `featherweight evaluate --adapter {run.path}` does")
        return 128 + number
    if code:
        return code
    score = evaluate_with_bar(base, task, writer, config.metric, build_method(config.method, {}).title)
    print(tables.score_line(score.correct, score.n, score.interval, score.macro_f1, score.metric))
    for words in caveats.of_result(score, task, result.losses):
        note(words)
    if result.saves:
        share = result.saving_seconds / (result.seconds + result.saving_seconds)
        note(f"{result.saves} checkpoints took {result.saving_seconds:.1f} s, {100 * share:.1f} % of the training time")
    note(
        f"{result.examples_per_second:.1f} examples/s, peak {mebibytes(result.peak_bytes)}; adapter saved in {run.path}"
    )
    return 0


def _save(base: Base, run: RunFolder, result: Report) -> Path | None:
    """Save the adapter, if need be to another folder than the run's; where it is."""
    about: dict[str, Any] = {"steps": result.steps, "losses": finite(result.losses)}
    if result.validation:
        steps, losses = zip(*result.validation, strict=True)
        about["validation"] = [list(pair) for pair in zip(steps, finite(losses), strict=True)]
    for folder in (run.path, Path(tempfile.gettempdir()) / f"featherweight-{run.path.name}"):
        try:
            save(base.model, folder, about=about)
            for file in (*(folder / name for name in (WEIGHTS, CONFIG, OURS)), folder):
                make_safe(file)
            return folder
        except (InputError, OSError) as e:
            note(str(e))
    return None


def _explain(result: Report, settings: Settings, folder: Path) -> int:
    """Say why a run ended early, and what to do; the exit code, 0 for a run that is complete."""
    again = f"`featherweight train --resume {folder}`, or the same command, goes on from the last checkpoint"
    if result.nonfinite:
        rows = f", because of {', '.join(dict.fromkeys(result.bad_rows))}" if result.bad_rows else ""
        note(f"{result.nonfinite} updates were left out: their loss or gradient was not finite{rows}")
    if result.stopped == "diverged":
        cause = "every row of the batch is, so lower --lr"
        if result.bad_rows:
            cause = f"by themselves these rows are: {', '.join(result.bad_rows)}; mend or remove them, lower --lr, or --skip-nonfinite"
        note(
            f"stopped: the loss or its gradient was not finite at step {result.steps + 1} ({cause}); "
            f"the last good adapter is in {folder}"
        )
        return 1
    if result.stopped == "out of memory":
        note(f"stopped after {result.steps} steps: {ADVICE}; the adapter so far is in {folder}")
        return 1
    if result.stopped == "not saved":
        note(
            f"stopped after {result.steps} steps, as asked, because a checkpoint could not be written; free some space: {again}"
        )
        return 1
    if result.stopped == "interrupted":
        note(f"interrupted after {result.steps} of {settings.steps} steps; the adapter so far is in {folder}; {again}")
        return 128 + (result.signal or 2)
    return 0
