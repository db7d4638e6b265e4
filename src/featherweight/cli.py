"""The command line: one verb per function. A verb's flags are the fields of its configuration class.

Nothing heavy is imported before a verb runs, so `--help` answers at once. What the user can mend is printed as one
line with exit code 2; Ctrl-C saves what is there and exits with 130.
"""

from __future__ import annotations

import faulthandler
import inspect
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic_core import PydanticUndefined

from . import __version__, groups, synonyms
from .config import (
    CompareConfig,
    Config,
    EvaluateConfig,
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    PredictConfig,
    TrainConfig,
    merge,
)
from .errors import InputError
from .methods.options import parse_options
from .network import go_offline, keep_quiet
from .recipe import places_in, read_recipe
from .redaction import clean

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Fine-tune language models on the hardware you own.\n\n"
    "Start with `featherweight compare`: it trains five methods on a small real model and prints which is best.",
)  # fmt: skip
RECIPE = Annotated[
    str | None,
    typer.Option(help="TOML file that holds any of these settings; flags win over it.", rich_help_panel=groups.RECIPE),
]
SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="An option of a method, such as r=16 or lora.r=16; `featherweight methods` lists them.",
        rich_help_panel=groups.METHOD,
    ),
]


def _flag(name: str, field: Any) -> inspect.Parameter:
    """A configuration field as a typer option. Its default stays None, so that a recipe can be told from a flag."""
    kind = field.annotation
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        words = f" One of: {', '.join(typing.get_args(kind))}."
        kind = str
    else:
        words = ""
    default = (
        "" if field.default is False or field.default in (None, PydanticUndefined) else f" [default: {field.default}]"
    )
    flag = "--" + name.replace("_", "-")
    if kind is bool and field.default is not False:  # what is not off by itself can be switched off
        flag += "/--no-" + name.replace("_", "-")
    told = (field.description or "") + words + default
    option = typer.Option(flag, help=told, show_default=False, rich_help_panel=groups.group_of(field))
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _place(flag: inspect.Parameter) -> int:
    """Where a flag's group comes in the help."""
    [option] = flag.annotation.__metadata__
    return groups.GROUPS.index(option.rich_help_panel)


def verb(config_class: type[Config]) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register `function(config)` as a command whose flags are the configuration's fields, group by group."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def command(recipe: str | None = None, set_: list[str] | None = None, **flags: Any) -> None:
            given = {k: v for k, v in flags.items() if v is not None}
            base, places = (read_recipe(recipe), places_in(recipe)) if recipe else ({}, {})
            if given.get("resume"):
                from .run_folder import settings_in

                base = settings_in(given["resume"]) | base
            if set_:
                method = (
                    given.get("method", base.get("method", config_class.model_fields["method"].default))
                    if "method" in config_class.model_fields
                    else None
                )
                given["options"] = parse_options(set_, method)
            config = merge(config_class, base, given, places)
            if config.offline:
                go_offline()
            try:
                function(config)
            except KeyboardInterrupt:  # where nothing is there to save; training catches its own
                print("featherweight: interrupted", file=sys.stderr)
                raise typer.Exit(130) from None

        named = [_flag(n, f) for n, f in config_class.model_fields.items() if n != "options"]
        named.append(inspect.Parameter("recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RECIPE))
        if "options" in config_class.model_fields:
            named.append(inspect.Parameter("set_", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=SET))
        named.sort(key=_place)
        command.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        command.__doc__ = function.__doc__
        app.command(function.__name__.rstrip("_"))(command)
        return function

    return register


@verb(CompareConfig)
def compare(config: CompareConfig) -> None:
    """Train several methods on the same rows and print the table: size, memory, speed, accuracy.

    Without any flag: LoRA, Prompt Tuning, P-Tuning, Prefix-Tuning and (IA)³ on SmolLM2-135M and 10,605 movie-review
    snippets. The table is also saved as Markdown, CSV and JSONL, with every adapter beside it.

    Example: `featherweight compare --data my.csv --methods lora,ia3 --steps 300`
    """
    from .run import run_compare

    raise typer.Exit(run_compare(config))


@verb(TrainConfig)
def train(config: TrainConfig) -> None:
    """Train one method and save the adapter in HF PEFT's format.

    Example: `featherweight train --method lora --data my.csv --model Qwen/Qwen3-0.6B --set r=16 --set lora_alpha=16 --out my-adapter`
    """
    from .training import run_train

    raise typer.Exit(run_train(config))


@verb(PlanConfig)
def plan(config: PlanConfig) -> None:
    """Say before a run how much memory and time it needs, from the model's configuration alone: no weights, no GPU.

    The table lists methods and tricks (fewer rows at a time, activation checkpointing, quantisation), best first.
    Example: `featherweight plan --model Qwen/Qwen3-8B --gpu "RTX 4060 8GB" --length 512`
    """
    from .plan.verb import run_plan

    raise typer.Exit(run_plan(config))


@verb(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Measure the accuracy of an adapter, or of the bare model, on a data file: with n and a 95 % interval.

    Example: `featherweight evaluate --adapter my-adapter --data new.csv --split all --out predictions.jsonl`
    """
    from .run import run_evaluate

    raise typer.Exit(run_evaluate(config))


@verb(PredictConfig)
def predict(config: PredictConfig) -> None:
    """Label rows that have no label yet, with an adapter that was trained on labels: each answer is one of them, with its probability.

    Example: `featherweight predict --adapter my-adapter --data new.csv --out labelled.csv`
    """
    from .predicting import run_predict

    raise typer.Exit(run_predict(config))


@verb(GenerateConfig)
def generate(config: GenerateConfig) -> None:
    """Write text with the base model or an adapter, from --prompt or one prompt a line on standard input.

    A prompt is written as the adapter was trained (its template), else with the model's chat template; --raw sends it
    as it is. Example: `featherweight generate --adapter my-adapter --prompt "How do I cook beans?"`
    """
    from .run import run_generate

    raise typer.Exit(run_generate(config))


@verb(MergeConfig)
def merge_(config: MergeConfig) -> None:
    """Fold an adapter into its base and save a plain model: a folder that transformers loads, tokenizer included.

    For LoRA, AdaLoRA and (IA)³; prompts and prefixes are no weights and stay adapters. The base must be unquantised.
    Example: `featherweight merge --adapter my-adapter --out my-model`
    """
    from .run import run_merge

    raise typer.Exit(run_merge(config))


@app.command()
def report(
    folders: Annotated[
        list[str], typer.Argument(help="Folders of comparisons, as `compare` leaves them.", show_default=False)
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for the report; by default a new one under runs/.",
            show_default=False,
            rich_help_panel=groups.OUTPUT,
        ),
    ] = None,
) -> None:
    """Put several comparisons into one table and one page: other days, other machines, other data.

    Times and memory of different machines are kept apart, and so are answers to different rows.
    Example: `featherweight report runs/compare-001 runs/compare-002 --out all`
    """
    from .report import run_report

    raise typer.Exit(run_report(folders, out))


@app.command()
def methods(
    model: Annotated[
        str | None,
        typer.Option(
            help="Count parameters for this model: hub id, folder, .gguf or a config.json. No weights are loaded.",
            rich_help_panel=groups.MODEL,
        ),
    ] = None,
    set_: SET = None,
    offline: Annotated[
        bool,
        typer.Option("--offline", help=Config.model_fields["offline"].description, rich_help_panel=groups.RUNNING),
    ] = False,
) -> None:
    """List the methods: what each is, its paper, its options, and its size on a model.

    Example: `featherweight methods --model google/mt5-large`
    """
    if offline:
        go_offline()
    from .run import list_methods

    list_methods(model, parse_options(set_ or [], None))


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Fine-tune language models on the hardware you own."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of `featherweight` and `fw`."""
    faulthandler.enable(2)  # a mapped file that is cut ends the process with a signal, else without a word
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_quiet()
    for chatty in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # once installed, they remark on every start
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
    except InputError as e:
        code = _complain(str(e))
    except Exception as e:
        if not hasattr(e, "format_message"):
            sys.excepthook = _fall  # typer has put its own there
            raise
        code = _complain(_told(e)) if sys.argv[1:] else 2  # without a verb, the help has been printed
    sys.exit(code)


def _told(error: Any) -> str:
    """What the parser says is wrong; of an option that other tools have, what it is here."""
    if hasattr(error, "possibilities") and error.ctx is not None:
        settings = {"options" if param.name == "set_" else param.name for param in error.ctx.command.params}
        if ours := synonyms.as_flag(error.option_name, settings):
            return f"{error.message}; did you mean {ours}?"
    return str(error.format_message())


def _complain(message: str) -> int:
    """One line; an unknown option or a word where a number belongs is put like everything else."""
    line = re.sub(r"\S{400,}", lambda word: f"{word[0][:200]}…{word[0][-100:]}", clean(" ".join(message.split())))
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)  # a terminal obeys some characters
    print(f"featherweight: error: {line}", file=sys.stderr)
    return 2


def _fall(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """What nobody expected is told in full, but for the secrets in it."""
    print(clean("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


if __name__ == "__main__":
    main()
