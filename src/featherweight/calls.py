"""What a model of `transformers` is called with, whatever its version names it.

A key–value cache is `cache` from transformers 5.24 on; before, and in models that come from elsewhere, it is `past_key_values`, and
in some layers `layer_past`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's `forward`, in order (some models call their stack positionally)."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def cache_name(names: Collection[str]) -> str | None:
    """What a cache is called among these arguments; None where there is none."""
    return next((name for name in CACHE_NAMES if name in names), None)


def named_arguments(names: Collection[str], args: Collection[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; a cache by the name that `names` have for it, not by an older one."""
    kw = dict(zip(names, args, strict=False)) | dict(kwargs)
    own, given = cache_name(names), cache_name(kw)
    if own and given and own not in kw:
        kw[own] = kw.pop(given)
    return kw


def cache_in(kw: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments; None where there is none."""
    return next((kw[name] for name in CACHE_NAMES if kw.get(name) is not None), None)
