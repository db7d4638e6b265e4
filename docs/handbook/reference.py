"""The references: every public name, by mkdocstrings; every verb and flag, as the command line itself knows them."""

from __future__ import annotations

import inspect
import itertools
import re

import click
import typer

import featherweight
from featherweight import cli

GROUPS = {
    "Models and data": ("load_base", "Base", "load_task", "Task"),
    "Training and using": ("train", "evaluate", "predict", "generate"),
    "Adapters on a model": ("attach", "attached", "live", "detach", "rename", "count"),
    "Adapters on disk and in the weights": ("save", "load_adapted", "load", "merge", "unmerge"),
    "A method of your own": ("Method", "Part"),
    "Errors": ("InputError",),
}
GIVEN = ("engine.train.Settings", "engine.train.Report", "scoring.Score", "api.Prediction")
"""What `train` takes, and what the verbs give back: no names of the package, but a reader meets them."""


def api() -> str:
    """The page of public names; those that no group names are the methods."""
    named = {name for names in GROUPS.values() for name in names}
    where = featherweight._WHERE
    groups = GROUPS | {"Methods": tuple(name for name in where if name not in named)}
    out = []
    for title, names in groups.items():
        out.append(f"\n## {title}\n")
        out += [
            f"\n::: featherweight.{where[name]}.{name}\n    options:\n      members: {_members(name)}\n"
            for name in names
        ]
    out.append("\n## Settings of training, and what comes back\n")
    out += [f"\n::: featherweight.{path}\n    options:\n      members: true\n" for path in GIVEN]
    return "".join(out)


def _members(name: str) -> str:
    """Whose methods are worth a reader's time: those that one writes a method with."""
    return "true" if name in ("Method", "Part") else "false"


def commands() -> str:
    """The page of verbs: what each does, and its flags with defaults in their groups, as `--help` says it."""
    group = typer.main.get_command(cli.app)
    out = []
    for name, command in vars(group)["commands"].items():
        out.append(f"\n## featherweight {name}\n\n{_help(command.help or '')}\n")
        told = [option for option in command.params if option.name != "help"]
        for title, options in itertools.groupby(told, lambda option: vars(option)["rich_help_panel"] or "Arguments"):
            out.append(f"\n**{title}**\n\n| flag | what it does |\n|---|---|\n")
            out += [_flag(option) for option in options]
    return "".join(out)


def _help(text: str) -> str:
    text = inspect.cleandoc(text)
    return re.sub(r"Example: `([^`]+)`", r"\n\n```bash\n\1\n```", text)


def _flag(option: click.Parameter) -> str:
    names = " / ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    text, _, default = (getattr(option, "help", "") or "").partition(" [default: ")
    text = re.sub(r"(?<![`\w-])(--[a-z][a-z-]+)", r"`\1`", text.replace("|", "\\|").replace("<", "&lt;"))
    told = f" Default: `{default.rstrip(']')}`." if default else ""
    return f"| {names} | {text}{told} |\n"
