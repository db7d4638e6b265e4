"""A recipe: a TOML file that holds any of the settings, and a table for the options of a method.

Whatever is wrong in it is named by `file:line`.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

from .errors import InputError, nearest, shown
from .foreign import path_of, plain_errors, read_text, similar
from .methods import METHODS

_KEY = re.compile(r"""\s*\[*\s*(?:"([^"]*)"|'([^']*)'|([\w-]+))\s*[=.\]]""")
_TOO_DEEP = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){50}""")
"""A key of fifty parts: the parser's memory grows with the square of their number."""


def read_recipe(path: str) -> dict[str, Any]:
    """A recipe's settings; tables named like methods become their options."""
    try:
        text = read_text(path_of(path), most_bytes=2**20)
        with plain_errors():
            if _TOO_DEEP.search(text):
                raise RecursionError
            recipe = tomllib.loads(text)
    except OSError as e:
        hint = similar(path, folder=False) if isinstance(e, FileNotFoundError) else ""
        raise InputError(f"--recipe {path}: {e.strerror or e}{hint}") from None
    except ValueError as e:
        found = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", str(e), flags=re.DOTALL)
        words, where = (found[1], f":{found[2]}") if found else (str(e), "")
        raise InputError(f"--recipe {path}{where} is not valid TOML: {words}") from None
    tables = {k: v for k, v in recipe.items() if isinstance(v, dict)}
    for name in tables:
        if name not in METHODS:
            raise InputError(
                f"--recipe {path}:{_line_of(text, name)}: the table [{shown(name)[1:-1]}] is no method; {nearest(name, METHODS)}"
            )
        _check_table(tables[name], name, path, text)
    flat = {k.replace("-", "_"): v for k, v in recipe.items() if k not in tables}
    if isinstance(flat.get("methods"), list):
        flat["methods"] = ",".join(map(str, flat["methods"]))
    if "options" in flat:
        raise InputError(
            f"--recipe {path}:{_line_of(text, 'options')}: options of a method go into a table of its name, such as [lora]"
        )
    return {**flat, **({"options": tables} if tables else {})}


def _check_table(options: dict[str, Any], method: str, path: str, text: str) -> None:
    """Refuse a method's options by the line of the one that is wrong by itself, else by the head of the table."""
    from .methods.options import build_method  # not before a recipe is read: it imports PyTorch

    try:
        build_method(method, options)
    except InputError as together:
        for key, value in options.items():
            try:
                build_method(method, {key: value})
            except InputError as alone:
                if str(alone) not in str(together):
                    continue  # it goes with another option
                raise InputError(f"--recipe {path}:{_line_of(text, key, method)}: {alone}") from None
        raise InputError(f"--recipe {path}:{_line_of(text, method)}: {together}") from None


def places_in(path: str) -> dict[str, str]:
    """Where a recipe has each of its settings: `file:line`."""
    text = read_text(path_of(path))
    keys = {key for line in text.splitlines() if (key := _key_in(line)) is not None}
    return {key.replace("-", "_"): f"{path}:{_line_of(text, key)}" for key in keys}


def _key_in(line: str) -> str | None:
    """The key that a line of a recipe sets, or the table that it begins."""
    found = _KEY.match(line)
    return None if found is None else next(name for name in found.groups() if name is not None)


def _line_of(text: str, key: str, table: str = "") -> int:
    """The line of a recipe in which a key is set or a table begins, the key behind the head of its table; 1 where it is not found."""
    behind = not table
    for number, line in enumerate(text.splitlines(), 1):
        name = _key_in(line)
        if behind and name == key:
            return number
        behind = behind or name == table
    return _line_of(text, table) if table else 1
