"""One configuration: defaults < recipe < flag.

Each command's settings are one pydantic model; its fields are the flags, the keys of a recipe (TOML), and what is
printed and saved as `recipe.toml` beside a result, so that every run can be repeated from its own folder. A field's
description is its help, and the group that it is declared in (`groups.py`) the heading above it. Options of a method live in
a table of the method's name: `[lora] r = 16`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from . import synonyms
from .demo import DATA, ENCODER, GENERAL, MODEL
from .errors import InputError, nearest, shown
from .groups import (
    in_answers,
    in_data,
    in_measuring,
    in_memory,
    in_method,
    in_model,
    in_output,
    in_running,
    in_training,
)
from .methods import METHODS, REFERENCE
from .redaction import clean

C = TypeVar("C", bound="Config")
Positive = Annotated[int, Field(gt=0, le=10**9)]
AtATime = Annotated[int, Field(gt=0, le=2**16)]
"""Rows or batches at a time."""


class Config(BaseModel):
    """What all commands share."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    model: str = in_model(
        MODEL,
        description="Base model: a hub id, a folder, a .gguf file, or an embedded one: " + MODEL + ", " + ENCODER + ".",
    )
    device: str = in_running("auto", description="Where to run: auto, cpu, cuda, cuda:1, mps, xpu …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = in_running(
        "auto", description="Type of the frozen base; auto takes bfloat16 where this device multiplies it faster."
    )
    seed: int = in_running(
        0, ge=-(2**63), lt=2**63, description="Seed of the split, the order of rows and the initialisation."
    )
    offline: bool = in_running(
        False, description="Open no connection: only folders, files, and what is in the caches already."
    )

    @field_validator("*", mode="after")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text must not hold a NUL character")
        return value


class BaseConfig(Config):
    """What the verbs share that let the base compute; merging writes one, in full."""

    quantize: Literal["none", "nf4", "int8"] = in_memory(
        "none", description="Keep the base's linear layers in 4 or 8 bits, from loading on; needs bitsandbytes."
    )
    stream_base: Literal["none", "ram", "disk"] = in_memory(
        "none",
        description="Bring in a base that is larger than the memory layer by layer: ram for an accelerator, disk for any device.",
    )
    offload_vocabulary: bool = in_memory(
        False,
        description="Keep embeddings and output head in the host's memory, for an accelerator that has no room for a large vocabulary.",
    )


class DataConfig(BaseConfig):
    """Which rows, and how they are written."""

    data: str = in_data(
        DATA,
        description="Data set: .csv, .tsv, .jsonl, .json, .parquet, a hub data set, or an embedded one: movie-reviews, tweets.",
    )
    test_data: str | None = in_data(
        None, description="File with the test rows; by default a part of --data is held out."
    )
    test_fraction: float = in_data(
        0.1, gt=0, lt=1, description="Share of the rows to hold out, where no test rows are given."
    )
    test_rows: Positive | None = in_data(None, description="Test on at most so many rows.")
    text_column: str | None = in_data(None, description="Column with the text to classify; found by its usual names.")
    label_column: str | None = in_data(None, description="Column with the label; found by its usual names.")
    prompt_column: str | None = in_data(None, description="Column with the prompt of an instruction data set.")
    response_column: str | None = in_data(None, description="Column with the response of an instruction data set.")
    template: str | None = in_data(None, description="How a row is written, columns in braces: '{text}\\nSentiment:'.")
    max_length: Annotated[int, Field(ge=8, le=10**9)] | None = in_data(
        None,
        description="Longest row in tokens; longer texts are cut so that the answer survives. Default: the model's context.",
    )
    metric: Literal["auto", "labels", "exact_match"] = in_measuring(
        "auto",
        description="labels scores every label's tokens; exact_match compares generated text; auto chooses by task.",
    )


class TrainingConfig(DataConfig):
    """How to train."""

    steps: Positive | None = in_training(None, description="Optimiser steps (100 unless --epochs is given).")
    epochs: float | None = in_training(
        None, gt=0, le=10**6, description="Passes over the training rows, instead of --steps."
    )
    batch_size: AtATime = in_training(8, description="Rows read at a time.")
    micro_batch: AtATime | None = in_memory(
        None, description="Rows of a batch read at a time: the same result in less memory. Default: all of them."
    )
    accumulate: AtATime = in_training(
        1, description="Batches per optimiser step: the same result as one batch of all their rows, in less memory."
    )
    checkpoint_activations: Literal["none", "layer", "offload"] = in_memory(
        "none",
        description="Keep only each layer's input and compute the rest again: a third more time, far less memory; "
        "offload also keeps the inputs in the host's memory.",
    )
    memory: str | None = in_memory(
        None,
        description="Use at most so much, such as 8GB. `train` plans first and chooses tricks and rows at a time for it; "
        "`compare` too, the same tricks for every method.",
    )
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "sgd", "lion"] = in_training(
        "adamw", description="What moves the parts; the default rates are tuned for adamw."
    )
    packing: bool | None = in_training(
        None,
        description="Put a batch's texts into one row instead of padding them; by default where the model can (decoders).",
    )
    lean: bool = in_training(
        True,
        description="Norms and gates in fewer passes over memory; --no-lean leaves transformers' own, for debugging.",
    )
    lr: float | None = in_training(
        None, gt=0, le=100, description="Learning rate; by default each method's own, chosen by measurement."
    )
    warmup: float = in_training(
        0.06, ge=0, le=1, description="Share of the steps over which the rate rises; it then falls to zero."
    )
    weight_decay: float = in_training(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = in_training(1.0, gt=0, description="Gradients are scaled down to this norm.")
    skip_nonfinite: bool = in_training(
        False,
        description="Leave out updates whose loss or gradient is not finite, and count them, instead of stopping.",
    )
    options: dict[str, dict[str, Any]] = in_method(
        default_factory=dict, description="Options per method, from --set or a recipe's tables."
    )

    def steps_for(self, rows: int) -> int:
        """The number of steps for a training set of this size."""
        if self.epochs is not None:
            return max(1, round(self.epochs * rows / (self.batch_size * self.accumulate)))
        return self.steps or 100


class TrainConfig(TrainingConfig):
    """`featherweight train`."""

    method: str = in_method("lora", description="Method: " + ", ".join(METHODS) + ".")
    out: str | None = in_output(None, description="Folder for the adapter; by default a new one under runs/.")
    validation_rows: Annotated[int, Field(ge=0, le=10**9)] = in_data(
        0,
        description="Set so many training rows apart: their loss is measured ten times, and the adapter with the smallest is kept.",
    )
    save_minutes: float = in_output(5.0, gt=0, description="Minutes between checkpoints.")
    save_steps: Positive | None = in_output(None, description="Steps between checkpoints, besides those by time.")
    save_total_limit: Positive = in_output(2, description="Checkpoints to keep; the best one stays besides.")
    if_save_fails: Literal["continue", "stop"] = in_output(
        "continue", description="What to do when a checkpoint cannot be written, because the disk is full."
    )
    resume: str | None = in_output(
        None,
        description="Folder of an interrupted run to go on with, with its own settings. Rerunning its command does the same.",
    )
    fresh: bool = in_output(False, description="Begin anew, even if the same command was interrupted before.")
    force: bool = in_output(
        False,
        description="With --resume: go on although settings, base or data have changed; the result is that of neither run.",
    )


class CompareConfig(TrainingConfig):
    """`featherweight compare`."""

    methods: str = in_method(
        ",".join(REFERENCE),
        description="Methods to compare, separated by commas: "
        + ", ".join(METHODS)
        + "; variants too, such as lora:r=64:lora_alpha=64.",
    )
    references: str = in_measuring(
        "untouched,majority",
        description="What there is to beat, as rows of the table: untouched, few_shot (or few_shot:n=8), majority, full (full "
        "fine-tuning); or none.",
    )
    seeds: Positive = in_training(
        1,
        description="Train each method so many times, with --seed and those after it; the split of the rows stays the same.",
    )
    tune: Annotated[int, Field(ge=2, le=1000)] | None = in_training(
        None,
        description="Search each method's rate and size first, with so many trials for each, on validation rows cut from the "
        "training rows.",
    )
    tokens: Positive | None = in_training(
        None, description="Train each method on so many tokens of text, instead of --steps."
    )
    minutes: float | None = in_training(
        None, gt=0, le=10**5, description="Train each method for so long, instead of --steps."
    )
    fill: bool = in_memory(
        False,
        description="With --memory: each method reads the largest batch that the plan says fits, and as many rows in all as the others.",
    )
    jobs: Annotated[int, Field(gt=0, le=64)] = in_running(
        1,
        description="Runs side by side, as many as memory allows by the plan; speeds are then of runs that share the machine.",
    )
    isolate: bool = in_running(
        True,
        description="Make each run in a process of its own, so that its memory and speed do not depend on the runs before it.",
    )
    general_text: str = in_measuring(
        "auto",
        description="Data set whose texts tell what is forgotten: the loss on them before and after. auto: "
        + GENERAL
        + ", where they have been fetched with the embedded data; none leaves it out.",
    )
    fresh: bool = in_output(
        False, description="Begin a new comparison, even where one that was interrupted could go on."
    )
    test_rows: Positive | None = in_data(600, description="Test on at most so many rows.")
    out: str | None = in_output(
        None,
        description="Folder for the table; by default a new one under runs/. One that holds a comparison is added to.",
    )


class PlanConfig(TrainingConfig):
    """`featherweight plan`."""

    model: str = in_model(
        MODEL, description="Base model: a hub id, a folder, a .gguf file, or a config.json alone. No weights are read."
    )
    data: str | None = in_data(  # type: ignore[assignment]
        None, description="Data set whose rows' lengths count; without it, rows have --length tokens."
    )
    length: Annotated[int, Field(ge=2, le=2**20)] = in_data(
        128, description="Tokens of a row, where no --data is given."
    )
    method: str = in_method(
        "lora", description="Methods, separated by commas; the first is spelled out: " + ", ".join(METHODS) + "."
    )
    gpu: str | None = in_memory(None, description="A card of the catalogue, such as 'RTX 4060 8GB'.")
    memory: str | None = in_memory(
        None, description="How much memory there is, such as 12GB: a card's, or with --device cpu this machine's."
    )
    calibrate: bool = in_running(
        False, description="Measure this machine first (under half a minute), to predict times."
    )


class EvaluateConfig(DataConfig):
    """`featherweight evaluate`."""

    model: str | None = in_model(
        None, description="Base model; by default the adapter's own, else the embedded default."
    )  # type: ignore[assignment]
    adapter: str | None = in_model(
        None, description="Adapter folder (ours or HF PEFT's); without it the bare model is evaluated."
    )
    force: bool = in_model(
        False,
        description="Use the adapter even on another base or tokenizer than it was made for; answers may then mean nothing.",
    )
    batch_size: AtATime = in_memory(32, description="Rows per forward pass.")
    split: Literal["auto", "test", "all"] = in_data(
        "auto",
        description="test: the rows that were held out; all: every row of --data; auto: test for the data that the adapter "
        "was trained on, hub data and the default data, else all.",
    )
    out: str | None = in_output(None, description="File for the predictions, one JSON object a line.")


class PredictConfig(BaseConfig):
    """`featherweight predict`."""

    model: str | None = in_model(None, description="Base model; by default the adapter's own.")  # type: ignore[assignment]
    adapter: str | None = in_model(None, description="Folder of an adapter that was trained on labels.")
    force: bool = in_model(
        False,
        description="Use the adapter even on another base or tokenizer than it was made for; answers may then mean nothing.",
    )
    data: str | None = in_data(
        None,
        description="Rows to label: .csv, .tsv, .jsonl, .json, .parquet; without it every line of standard input is a text.",
    )
    text_column: str | None = in_data(
        None, description="Column with the text; by default the one the adapter was trained on."
    )
    batch_size: AtATime = in_memory(32, description="Rows per forward pass.")
    max_length: Positive | None = in_data(
        None, description="Cut rows to so many tokens; by default the model's context."
    )
    out: str | None = in_output(
        None,
        description="File for the rows with their labels (.csv, .tsv or .jsonl); without it each label is printed.",
    )


class GenerateConfig(BaseConfig):
    """`featherweight generate`."""

    model: str | None = in_model(
        None, description="Base model; by default the adapter's own, else the embedded default."
    )  # type: ignore[assignment]
    adapter: str | None = in_model(
        None, description="Adapter folder (ours or HF PEFT's); without it the bare model writes."
    )
    force: bool = in_model(
        False,
        description="Use the adapter even on another base or tokenizer than it was made for; answers may then mean nothing.",
    )
    prompt: str | None = in_answers(None, description="Text to answer; without it every line of standard input is one.")
    max_new_tokens: Positive = in_answers(128, description="Longest answer in tokens.")
    temperature: float = in_answers(
        0.0, ge=0, description="0 takes the likeliest token; higher values draw more freely."
    )
    raw: bool = in_answers(False, description="Send the text as it is: no chat template, no task template.")


class MergeConfig(Config):
    """`featherweight merge`."""

    model: str | None = in_model(
        None, description="Base model; by default the adapter's own, else the embedded default."
    )  # type: ignore[assignment]
    adapter: str | None = in_model(None, description="Adapter folder (ours or HF PEFT's) to fold into the base.")
    force: bool = in_model(
        False,
        description="Use the adapter even on another base or tokenizer than it was made for; answers may then mean nothing.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = in_output(
        "auto", description="Type of the merged weights; auto keeps the one that the base is stored in."
    )
    out: str | None = in_output(None, description="Folder for the merged model; by default a new one under runs/.")


LENGTHS = ("steps", "epochs", "tokens", "minutes")
"""Settings of which one says how long to train."""
VERBS: tuple[type[Config], ...] = (
    TrainConfig,
    CompareConfig,
    PlanConfig,
    EvaluateConfig,
    PredictConfig,
    GenerateConfig,
    MergeConfig,
)


def merge(cls: type[C], recipe: dict[str, Any], flags: dict[str, Any], places: Mapping[str, str] | None = None) -> C:
    """Defaults < recipe < flags, validated; one error names every field that is wrong, and its place in the recipe."""
    places = {key: f"{place}: " for key, place in (places or {}).items() if key not in flags}
    options = {k: dict(v) for k, v in recipe.get("options", {}).items()}
    for name, values in flags.get("options", {}).items():
        options.setdefault(name, {}).update(values)
    chosen = {**recipe, **flags, **({"options": options} if options else {})}
    elsewhere = {
        name for kind in VERBS for name in kind.model_fields
    } - flags.keys()  # one recipe can serve several verbs
    chosen = {k: v for k, v in chosen.items() if k in cls.model_fields or k not in elsewhere}
    if unknown := [k for k in chosen if k not in cls.model_fields]:
        ours = synonyms.as_key(unknown[0], cls.model_fields)
        hint = f"did you mean {ours}?" if ours else nearest(unknown[0], cls.model_fields)
        raise InputError(f"{places.get(unknown[0], '')}{shown(unknown[0])} is not a setting here; {hint}")
    told = flags if any(name in flags for name in LENGTHS) else chosen
    lengths = [name for name in LENGTHS if told.get(name) is not None]
    if len(lengths) > 1:
        raise InputError(f"give --{lengths[0]} or --{lengths[1]}, not both")
    for name in LENGTHS:
        if lengths and name != lengths[0]:
            chosen.pop(name, None)
    try:
        return cls(**chosen)
    except ValidationError as e:
        problems = [
            f"{places.get(str(p['loc'][0]), '')}--{str(p['loc'][0]).replace('_', '-')}: {p['msg'].lower()} (got {shown(p['input'])})"
            for p in e.errors()
        ]
        raise InputError("; ".join(dict.fromkeys(problems))) from None


def to_toml(config: Config) -> str:
    """The resolved configuration as a recipe that repeats the run."""
    values = clean(config.model_dump(exclude_none=True))
    tables = values.pop("options", {})
    lines = [f"{k} = {_toml(v)}" for k, v in values.items()]
    for name, options in tables.items():
        lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in options.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in JSON and TOML
