"""Who takes part in a comparison: methods, and variants of them such as `lora:r=64`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .method import Method
from .methods import METHODS
from .methods.options import build_method, parse_options


@dataclass(frozen=True)
class Contender:
    """A method as it takes part: `name` is how it was asked for, such as `lora:r=64`."""

    name: str
    method: Method

    @property
    def title(self) -> str:
        """What the table calls it: `LoRA`, or `LoRA (r=64)`."""
        _, *options = self.name.split(":")
        return self.method.title + (f" ({', '.join(options)})" if options else "")

    @property
    def folder(self) -> str:
        """Its name as every file system takes it."""
        return re.sub(r"[^\w.=+-]", "-", self.name)


def contenders(asked: str, options: Mapping[str, Mapping[str, Any]]) -> list[Contender]:
    """Those named in `lora,lora:r=64,prefix_tuning:num_virtual_tokens=50:init_weights=none`, once each.

    `options` of a method (from --set or a recipe) hold for all its variants; a variant's own go before them.
    """
    words = list(dict.fromkeys(word.strip() for word in asked.split(",") if word.strip()))
    if not words:
        raise InputError(f"--methods names none; there are: {', '.join(METHODS)}")
    found = []
    for word in words:
        name, *more = word.split(":")
        own: dict[str, Any] = dict(options.get(name, {}))
        for option in more:
            if "=" not in option:
                raise InputError(f"--methods {word!r}: write options as NAME:OPTION=VALUE, such as lora:r=64")
        own.update(parse_options([f"{name}.{option}" for option in more], name).get(name, {}) if more else {})
        found.append(Contender(word, build_method(name, own)))
    folders = [contender.folder for contender in found]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise InputError(f"--methods: two variants would share the folder {min(twice)}; leave one away")
    return found
