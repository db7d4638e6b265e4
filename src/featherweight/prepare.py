"""Between a configuration and a run: everything that can be checked before the model loads, and the folder for the result."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import caveats, on_disk
from .adapted import load_adapted
from .adapter import attach, detach
from .base import Base, load_base, load_config, pick_device, skeleton
from .config import (
    BaseConfig,
    CompareConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    PredictConfig,
    TrainConfig,
    TrainingConfig,
    to_toml,
)
from .data import named
from .encoder import head_order, is_encoder
from .engine.optimizers import check_optimizer
from .engine.train import Settings
from .errors import InputError
from .foreign import path_of
from .method import Method
from .methods import method_name
from .methods.options import build_method
from .plan.cards import read_bytes
from .progress import note
from .quantise import refuse_quantising
from .run_folder import untouched
from .stream import check_source
from .task import Task, load_task
from .tokens import Example, Writer
from .vocabulary import check_offloading, keep_on_host

NO_TEXTS = "--metric exact_match needs a model that writes text; an encoder answers with a class: use labels"


def base_for(config: BaseConfig, name: str, labels: Sequence[str] | None = None) -> Base:
    """A base, loaded as the configuration says."""
    return load_base(name, labels, **_loading(config))


def adapted_base(
    config: EvaluateConfig | GenerateConfig | PredictConfig, name: str, labels: Sequence[str] | None = None
) -> Base:
    """The same with the adapter on it that the configuration names, if it names one."""
    if config.adapter is None:
        return base_for(config, name, labels)
    return load_adapted(config.adapter, model=name, labels=labels, force=config.force, **_loading(config))


def _loading(config: BaseConfig) -> dict[str, Any]:
    """How a base is loaded."""
    return {key: getattr(config, key) for key in ("dtype", "device", "quantize", "stream_base", "offload_vocabulary")}


def settings_of(config: TrainingConfig, rows: int, lr: float) -> Settings:
    """The engine's settings from a configuration."""
    return Settings(
        steps=config.steps_for(rows), batch_size=config.batch_size, accumulate=config.accumulate,
        micro_batch=config.micro_batch,
        packing=config.packing, lean=config.lean,
        memory=None if config.memory is None else read_bytes(config.memory),
        checkpoint_activations=config.checkpoint_activations, optimizer=config.optimizer, lr=lr, warmup=config.warmup,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, seed=config.seed,
        skip_nonfinite=config.skip_nonfinite,
    )  # fmt: skip


def prepare(
    config: TrainConfig | CompareConfig, methods: Sequence[Method], asked: Sequence[str]
) -> tuple[Task, list[Method], list[str]]:
    """The task and the methods, after everything that can be checked without weights.

    Of the methods, those that do not work on this model are left out if they are not among the `asked`, and the last thing
    returned says why.
    """
    check_source(config.stream_base, pick_device(config.device))
    if config.offload_vocabulary:
        check_offloading(pick_device(config.device))
    for name, options in config.options.items():  # also those of methods that do not run: a slip is a slip
        build_method(name, options)
    check_optimizer(config.optimizer)
    if config.memory is not None:
        read_bytes(config.memory)
    task, shape = task_of(config), load_config(config.model)
    refuse_quantising(shape, config.quantize)
    task = task.in_order(head_order(shape, task.labels))
    if config.metric == "exact_match" and is_encoder(shape):
        raise InputError(NO_TEXTS)
    skeletal, fit, left_out = skeleton(shape, task.labels), list[Method](), list[str]()
    if config.offload_vocabulary:
        keep_on_host(skeletal, torch.device("meta"))
    for method in methods:
        method.scheduled(config.steps_for(len(task.train)))  # are there steps for all it wants to do?
        try:
            attach(skeletal, method, encode=lambda _: [0])  # on the meta device: are there modules of these names?
        except InputError as e:
            if method_name(method) in asked:
                raise
            left_out.append(f"{method.title} was left out: {e}")
        else:
            detach(skeletal)
            fit.append(method)
    if not fit:
        raise InputError(f"no method works on this model; {left_out[0]}")
    return task, fit, left_out


def task_of(
    config: DataConfig, *, labels: Sequence[str] | None = None, template: str | None = None, test_only: bool = False
) -> Task:
    """The task of a configuration; `template` is an adapter's, and used where the configuration has none."""
    task = load_task(
        config.data, test_data=config.test_data, text_column=config.text_column, label_column=config.label_column,
        prompt_column=config.prompt_column, response_column=config.response_column,
        template=config.template.replace("\\n", "\n") if config.template else template,
        test_fraction=config.test_fraction, test_rows=config.test_rows, seed=config.seed, labels=labels, test_only=test_only,
        validation_rows=config.validation_rows if isinstance(config, TrainConfig) else 0,
    )  # fmt: skip
    if config.metric == "labels" and not task.labels:
        raise InputError("--metric labels needs a label column; exact_match compares texts")
    return task


def new_folder(wanted: str | None, verb: str) -> Path:
    """Make the folder for a result: the wanted one, which must be new or empty, or the next free one under runs/."""
    try:
        folder = _next_folder(verb) if wanted is None else _free_folder(wanted)
    except OSError as e:
        where = "under runs/" if wanted is None else wanted
        raise InputError(f"--out: cannot make the folder {where}: {e.strerror or e}") from None
    check_writable(str(folder / ".writable"))
    return folder


def _next_folder(verb: str) -> Path:
    """Made here, so that two processes at the same instant take two."""
    for number in itertools.count(1):
        folder = Path("runs") / f"{verb}-{number:03}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _free_folder(wanted: str) -> Path:
    folder = path_of(wanted)
    if folder.is_dir() and not untouched(folder):
        raise InputError(f"--out {wanted} is in use: it has files; choose a new folder, or empty this one")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {wanted} is a file; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_writable(file: str) -> None:
    """Can this file be written? Found out before the work, not after it; what is there stays."""
    path = path_of(file)
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as e:
        raise InputError(f"--out: cannot write {file}: {e.strerror or e}") from None


def refuse_own_input(out: str, inputs: Mapping[str, str | None]) -> None:
    """What is answered must not be written over what it answers: the files that the flags of `inputs` name."""
    for flag, name in inputs.items():
        if name and path_of(name).is_file() and path_of(name).resolve() == path_of(out).resolve():
            raise InputError(f"--out {out} is the file of {flag}, which would be lost; choose another")


def announce(config: Config, folder: Path) -> None:
    """Print the resolved configuration and save it as a recipe that repeats the run."""
    update: dict[str, Any] = (
        {"data": named(config.data), "model": named(config.model), "out": None}
        if isinstance(config, DataConfig)
        else {}
    )
    if isinstance(config, TrainConfig):  # about one start of it, not about the run
        update |= {"resume": None, "fresh": False, "force": False}
    recipe = to_toml(config.model_copy(update=update))
    on_disk.write(folder / "recipe.toml", recipe)
    note(
        f"configuration (also in {folder / 'recipe.toml'}):\n" + "".join(f"  {line}\n" for line in recipe.splitlines())
    )


def describe(base: Base, task: Task, writer: Writer, metric: str) -> list[Example]:
    """Tokenise the training rows, and say what there is to learn from and what had to be cut."""
    if metric != "exact_match" and not base.classifies:
        writer.label_ids(task.labels)  # labels that this tokenizer cannot tell apart are refused before training
    examples, cut = writer.examples(task.train)
    note(
        f"{base.name} in {str(base.model.dtype).removeprefix('torch.')} on {base.device} · {len(task.train):,} rows to train on, "
        f"{len(task.test):,} to test on" + (f" · labels: {', '.join(task.labels)}" if task.labels else "")
    )
    if task.kind == "classification" and not base.classifies:
        note(f"a row is written as {task.template!r}, and its label after it; --template writes it otherwise")
    for words in caveats.of_labels(task):
        note(words)
    if task.leaked:
        note(f"{task.leaked:,} training rows were left out: their text is among the test rows")
    if cut:
        note(
            f"{cut:,} of {len(examples):,} rows were longer than {writer.max_length} tokens and were cut; the answers survive"
        )
    return examples
