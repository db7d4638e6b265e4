"""A method as its own file explains it: the sections of the docstring, and its fields with what is written under them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
from pathlib import Path

from featherweight.method import Method
from featherweight.methods import method_class

SECTIONS = (
    "The idea", "Symbols", "Paper", "Trainable parameters", "When to use it", "When not", "What it costs", "How to choose",
    "Pitfalls", "The paper's claim",
)  # fmt: skip
HIDDEN = ("init_ids", "rank_pattern")
"""Fields that fill themselves in: no options."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A hyper-parameter."""

    name: str
    kind: str
    default: str
    text: str


@dataclasses.dataclass(frozen=True)
class Explained:
    """What a method's file says of it."""

    name: str
    cls: type[Method]
    tagline: str
    sections: dict[str, str]
    options: list[Option]
    file: Path


def explained(name: str) -> Explained:
    """Read the method of this registry name."""
    cls = method_class(name)
    module = importlib.import_module(cls.__module__)
    head, _, body = inspect.cleandoc(module.__doc__ or "").partition("\n")
    tagline = head.partition(": ")[2].rstrip(".")
    return Explained(name, cls, tagline, sections_of(body), options_of(cls), Path(inspect.getfile(cls)))


def sections_of(body: str) -> dict[str, str]:
    """The docstring's sections: a heading at the start of a line, with a colon or a full stop, up to the next."""
    heads = "|".join(re.escape(head) for head in SECTIONS)
    pieces = re.split(rf"^({heads})[:.][ \n]", body, flags=re.M)
    return {head: textwrap.dedent(text).strip("\n") for head, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def options_of(cls: type[Method]) -> list[Option]:
    """The fields in order, the method's own before those that all share."""
    found: dict[str, Option] = {}
    for owner in (cls, Method):
        for name, text in attribute_docs(owner).items():
            field = {f.name: f for f in dataclasses.fields(owner)}.get(name)
            if field is not None and name not in (*HIDDEN, *found):
                found[name] = Option(name, str(field.type), str(field.default), " ".join(text.split()))
    return list(found.values())


def attribute_docs(cls: type) -> dict[str, str]:
    """The string that stands under each attribute of a class."""
    [body] = [n.body for n in ast.parse(inspect.getsource(cls)).body if isinstance(n, ast.ClassDef)]
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):  # noqa: SIM102
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[field.target.id] = str(text.value.value)
    return docs


def prose_and_equations(text: str) -> list[tuple[str, str]]:
    """A section as ("prose", …), ("equation", …) and ("list", …) blocks: equations are indented, lists have a bullet."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            blocks.append(("equation", textwrap.dedent(block)))
        else:
            blocks.append(("prose", block))
    return blocks


def entries(text: str) -> list[tuple[str, str]]:
    """A section of `name: text` lines, further lines indented: symbols, or hyper-parameters."""
    found: list[tuple[str, str]] = []
    for line in textwrap.dedent(text).split("\n"):
        if match := re.match(r"(\S[^:]*?):\s+(.*)", line):
            found.append((match[1], match[2]))
        elif line.strip() and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found
