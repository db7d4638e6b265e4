"""Options of a method: from `--set` and the tables of a recipe to a checked `Method`."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import TYPE_CHECKING, Any

from .. import synonyms
from ..errors import InputError, nearest, shown
from ..foreign import plain_errors
from . import METHODS, method_class

MOST = 1_000_000
"""No number of a method's is larger: more would be a slip, and would fill the memory before it is noticed."""

if TYPE_CHECKING:
    from ..method import Method


def parse_options(settings: list[str], method: str | None) -> dict[str, dict[str, Any]]:
    """`--set r=16` (for `--method`) or `--set lora.r=16` → options per method. Values are TOML, or plain words."""
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        owner, dot, option = key.rpartition(".")
        owner = owner if dot else method or ""
        if not equals or not option:
            raise InputError(f"--set {shown(setting)}: write OPTION=VALUE, such as r=16")
        if owner not in METHODS:
            hint = nearest(owner, METHODS) if owner else "write METHOD.OPTION=VALUE, such as lora.r=16"
            raise InputError(f"--set {shown(setting)}: no such method; {hint}")
        try:
            with plain_errors():
                parsed = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            parsed = value  # a plain word
        except ValueError as e:
            raise InputError(f"--set {shown(setting)}: {e}") from None
        options.setdefault(owner, {})[option] = parsed
    return options


def build_method(name: str, options: dict[str, Any]) -> Method:
    """A method with its options from flags and recipe, checked: names, types and ranges."""
    cls = method_class(name)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in ("init_ids", "rank_pattern")}
    for key in options:
        if key not in fields:
            ours = synonyms.as_option(key, name)
            hint = f"did you mean {ours!r}?" if ours else nearest(key, fields)
            raise InputError(f"{name} has no option {shown(key)}; {hint}")
    values = {key: typed(name, key, str(fields[key].type), value) for key, value in options.items()}
    return cls(**values)


def typed(owner: str, key: str, wanted: str, value: Any) -> Any:
    """A value as a field of the type `wanted` (as it is written) takes it, or an `InputError` that names the field.

    Lists, and words with commas, become tuples of words; `none` becomes None.
    """
    kinds = {kind.split("[")[0] for kind in wanted.split(" | ")}
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and "," in value and "tuple" in kinds:
        value = tuple(word.strip() for word in value.split(","))
    if value == "none" and "None" in kinds:
        return None
    kind = type(value).__name__
    fits = kind in kinds or (kind == "int" and "float" in kinds)
    if kind in ("int", "float"):  # not NaN either
        fits = fits and -MOST <= value <= MOST
    if not fits or (kind == "tuple" and not all(isinstance(word, str) for word in value)):
        raise InputError(f"{owner}: {key} must be {wanted.replace(' | None', '')}, not {shown(value)}")
    return value
