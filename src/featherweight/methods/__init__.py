"""The registry: every method, explicitly. Adding one = one new file + one line here.

Values are `module:class` strings, so that listing the names (for `--help`) imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import InputError, nearest

if TYPE_CHECKING:
    from ..method import Method

METHODS: dict[str, str] = {
    "lora": "lora:LoRA",
    "prompt_tuning": "prompt_tuning:PromptTuning",
    "p_tuning": "p_tuning:PTuning",
    "prefix_tuning": "prefix_tuning:PrefixTuning",
    "ia3": "ia3:IA3",
    "adalora": "adalora:AdaLoRA",
}
REFERENCE = ("lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3")
"""The methods of the reference table: what `compare` takes when nothing is said."""


def method_class(name: str) -> type[Method]:
    """The class of a method by its registry name; raises `InputError` with the nearest name."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    module, cls = METHODS[name].split(":")
    loaded: type[Method] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return loaded


def method_name(method: Method) -> str:
    """The registry name of a method's instance."""
    return next(n for n, where in METHODS.items() if where.split(":")[1] == type(method).__name__)
