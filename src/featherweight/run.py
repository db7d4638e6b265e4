"""What the verbs do: check everything that can be checked before the model loads, then run, then save. `train` is in `training`.

Each function returns the exit code: 0, 128 + a signal's number when that ended it early with its work saved, or 1 when it diverged.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from . import tables
from .adapted import told_by
from .adapter import attach, attached, count
from .adapter_folder import check_fit, load, read_method
from .api import generate
from .base import DTYPES, load_base, load_config, pick_device, pick_dtype, save_base, skeleton
from .compare import compare
from .config import (
    CompareConfig,
    EvaluateConfig,
    GenerateConfig,
    MergeConfig,
)
from .contenders import Contender, contenders, references
from .data import named
from .demo import ARCHITECTURE, DATA, MODEL
from .encoder import head_order, is_encoder, own_labels
from .errors import InputError
from .foreign import path_of
from .forgetting import general_texts
from .identity import check_tokens, data_print
from .merging import merge, refuse_unmergeable
from .methods import METHODS, method_class, method_name
from .methods.options import build_method
from .plan.before import before_the_comparison
from .prepare import (
    adapted_base,
    announce,
    check_writable,
    new_folder,
    prepare,
    refuse_own_input,
    settings_of,
    task_of,
)
from .progress import note
from .report import write_page
from .run_folder import asked_for, at_work, find_comparison
from .task import Task
from .tokens import writer_for
from .watched import evaluate_with_bar


def run_compare(config: CompareConfig) -> int:
    """`featherweight compare`."""
    start, all_asked = time.perf_counter(), asked_for(config)
    found, beside = contenders(config.methods, config.options), references(config.references)
    if config.fill and config.memory is None:
        raise InputError("--fill needs --memory, such as --memory 8GB: how much each method may use")
    general_texts(config.general_text)
    # Of the default list, what does not work on this model is left out; what somebody asked for must work.
    by_hand = "methods" in config.model_fields_set
    must = [method_name(c.method) for c in found if c.method] if by_hand else list(config.options)
    task, methods, left_out = prepare(config, [c.method for c in found if c.method], must)
    found = [c for c in found if c.method in methods]
    folder = find_comparison(config) or new_folder(config.out, "compare")
    with at_work(folder) as run:
        run.begin(all_asked)
        try:
            config = _decided(config, task, found)
            who, settings = [*beside, *found], settings_of(config, len(task.train), lr=0.0)
            config, at_a_time = before_the_comparison(config, load_config(config.model), task, who, settings)
            announce(config, folder)
            done = compare(config, task, who, folder, at_a_time)
        except InputError:
            run.put_back()
            raise
        lines, ended = done.lines, done.signal
        done.notes += left_out
        runs = sum(line.whole_seconds for line in lines)
        done.notes.append(
            f"the whole command took {time.perf_counter() - start:.0f} s, downloads not counted where they were cached; "
            f"its runs took {runs:.0f} s in all, those that were done before included"
        )
        done.save()
        write_page(folder, lines, done.notes)
        run.end("complete" if ended is None else "interrupted")
    if lines:
        print()
        tables.show(lines, done.notes)
    note(
        f"\nsaved in {folder} (report.html, table.md, table.csv, table.tex, rows.jsonl, figures/, one adapter folder per run)"
    )
    if ended is not None:
        return 128 + ended
    missing = {done.runs[i].name for i in done.todo} - {c.name for c in beside}
    return int(any(line.stopped for line in lines) or bool(missing))


def _decided(config: CompareConfig, task: Task, found: list[Contender]) -> CompareConfig:
    """With everything decided that `auto` and defaults leave open, so that every process decides alike."""
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    name = next(name for name, known in DTYPES.items() if known == dtype)
    own: dict[str, Any] = {"methods": ",".join(c.name for c in found), "dtype": name}
    if config.tokens is None and config.minutes is None:
        own |= {"steps": config.steps_for(len(task.train)), "epochs": None}
    return config.model_copy(update=own)


def run_evaluate(config: EvaluateConfig) -> int:
    """`featherweight evaluate`."""
    saved = told_by(config.adapter)
    labels = saved.get("labels") or None
    columns = {k: v for k, v in (saved.get("columns") or {}).items() if getattr(config, k) is None}
    if not (config.text_column or config.label_column or config.prompt_column or config.response_column):
        config = config.model_copy(update=columns)
    own = config.test_data is None and (saved.get("data") == named(config.data) or _moved(config, saved))
    held_out = own or config.data == DATA or config.test_data is not None or not path_of(config.data).exists()
    every = config.split == "all" or (config.split == "auto" and not held_out)
    if own and not every:  # another seed would hold out other rows, most of which it has been trained on
        config = config.model_copy(update=saved.get("held_out") or {})
    task = task_of(config, labels=labels, template=saved.get("template") or None, test_only=every)
    if config.out:
        refuse_own_input(config.out, {"--data": config.data, "--test-data": config.test_data})
        check_writable(config.out)
    name = config.model or saved.get("base") or MODEL
    if not labels:  # else they are in the adapter's order
        task = task.in_order(head_order(load_config(name), task.labels))
    base = adapted_base(config, name, task.labels)
    if own and every:
        note("these rows include the ones that the adapter was trained on: its accuracy on new rows may be lower")
    elif own:
        note("the adapter was trained on rows of this data: it is asked those that were held out")
    writer = writer_for(base, config.max_length, task.labels, attached(base.model).values())
    score = evaluate_with_bar(
        base, task, writer, config.metric, "adapter" if config.adapter else "bare model", config.batch_size
    )
    if config.out:
        rows = zip(score.places, score.answers, score.predictions, strict=True)
        text = "".join(
            json.dumps({"place": p, "answer": a, "prediction": g}, ensure_ascii=False) + "\n" for p, a, g in rows
        )
        path_of(config.out).write_text(text, encoding="utf-8")
    print(tables.score_line(score.correct, score.n, score.interval, score.macro_f1, score.metric))
    return 0


def _moved(config: EvaluateConfig, saved: dict[str, Any]) -> bool:
    """Whether these are the rows that the adapter was trained on, in a file of another name or place: split as then, they tell."""
    split, told = saved.get("held_out") or {}, (saved.get("identity") or {}).get("data")
    if "seed" not in split or told is None or not path_of(config.data).is_file():
        return False
    with suppress(InputError):  # what is wrong with them is said later
        as_then = config.model_copy(update=split)
        task = task_of(as_then, labels=saved.get("labels") or None, template=saved.get("template") or None)
        return data_print(task.train) == told
    return False


def _prompts() -> Iterator[str]:
    """The lines of standard input."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text; convert it to UTF-8") from None


def run_generate(config: GenerateConfig) -> int:
    """`featherweight generate`."""
    saved = told_by(config.adapter)
    if config.prompt is None and sys.stdin.isatty():
        raise InputError("give --prompt, or prompts on standard input, one a line")
    name = config.model or saved.get("base") or MODEL
    base = adapted_base(config, name, saved.get("labels"))
    torch.manual_seed(config.seed)
    prompts = [config.prompt] if config.prompt is not None else _prompts()
    for prompt in prompts:
        if prompt.strip():
            [text] = generate(
                base,
                [prompt],
                about=saved,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                raw=config.raw,
            )
            print(text.strip(), flush=True)
    return 0


def run_merge(config: MergeConfig) -> int:
    """`featherweight merge`."""
    if config.adapter is None:
        raise InputError("give --adapter, the folder of the adapter to merge")
    pick_device(config.device)
    saved = told_by(config.adapter)
    name, labels = config.model or saved.get("base") or MODEL, saved.get("labels")
    told = load_config(name)
    skeletal = skeleton(told, labels)
    check_fit(skeletal, config.adapter)
    attach(skeletal, read_method(config.adapter), encode=lambda _: [0])
    refuse_unmergeable(skeletal)
    folder = new_folder(config.out, "merge")
    stored = str(told.dtype).removeprefix("torch.") if told.dtype in DTYPES.values() else "float32"
    base = load_base(name, labels, dtype=stored if config.dtype == "auto" else config.dtype, device=config.device)
    load(base.model, config.adapter, force=config.force)
    check_tokens(base, saved, force=config.force)
    merge(base.model, keep=False)
    save_base(base, folder)
    note(
        f"merged into {base.name} in {str(base.model.dtype).removeprefix('torch.')}; transformers loads it from {folder}"
    )
    return 0


def list_methods(model: str | None, options: dict[str, dict[str, Any]]) -> None:
    """`featherweight methods`."""
    from transformers import LlamaConfig

    config = load_config(model, "its config.json") if model else LlamaConfig(**ARCHITECTURE)
    for name in METHODS:
        cls, method = method_class(name), build_method(name, options.get(name, {}))
        summary = (inspect.getdoc(sys.modules[cls.__module__]) or "").splitlines()[0].split(": ", 1)[1]
        print(f"{name:14} {cls.title}: {summary}")
        print(f"{'':14} {cls.paper}")
        if model is None:
            fields = [
                f for f in dataclasses.fields(cls) if f.name not in ("init_ids", "fan_in_fan_out", "rank_pattern")
            ]
            print(f"{'':14} --set " + ", ".join(f"{f.name}={f.default}" for f in fields))
            print(
                f"{'':14} default learning rate {cls.learning_rate:g}; {cls.encoder_learning_rate:g} on an encoder that classifies"
            )
        skeletal: Any = skeleton(config, own_labels(config) if is_encoder(config) else None)
        try:
            attach(skeletal, method, encode=lambda _: [0])
        except InputError as e:
            print(f"{'':14} not on this model: {e}")
        else:
            total, trained = count(skeletal)
            where = "" if model else f"on the default model, {MODEL}: "
            where = f"with a head for {config.num_labels} labels: " if is_encoder(config) else where
            print(f"{'':14} {where}{total:,} parameters, {trained:,} of them trained ({100 * trained / total:.4f} %)")
        print()
