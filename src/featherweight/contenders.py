"""Who takes part in a comparison: methods, variants of them such as `lora:r=64`, and references, which are what there is to beat."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, nearest
from .full import FullFineTuning
from .method import Method
from .methods import METHODS
from .methods.options import build_method, parse_options

REFERENCES = {
    "untouched": "Untouched model", "few_shot": "Few-shot", "majority": "Majority class", "full": FullFineTuning.title,
}  # fmt: skip
SHOTS = 4
OWN = {"lr": float, "batch_size": int}
"""Settings of a run, not of a method, that a variant may have of its own."""


@dataclass(frozen=True)
class Contender:
    """One row of the table: `name` is how it was asked for, such as `lora:r=64`."""

    name: str
    method: Method | None
    """None for a reference that trains nothing."""
    lr: float | None = None
    batch_size: int | None = None
    shots: int = 0
    """Training rows that a few-shot prompt shows."""

    @property
    def kind(self) -> str:
        """`method` or `reference`."""
        return "reference" if self.name.split(":")[0] in REFERENCES else "method"

    @property
    def title(self) -> str:
        """What the table calls it: `LoRA`, or `LoRA (r=64)`."""
        first, *options = self.name.split(":")
        if self.shots:
            return f"{REFERENCES[first]} ({self.shots} examples)"
        return REFERENCES.get(first) or getattr(self.method, "title", first) + (
            f" ({', '.join(options)})" if options else ""
        )

    @property
    def folder(self) -> str:
        """Its name as every file system takes it."""
        return re.sub(r"[^\w.=+-]", "-", self.name)


def contenders(asked: str, options: Mapping[str, Mapping[str, Any]]) -> list[Contender]:
    """Those named in `lora,lora:r=64,prefix_tuning:num_virtual_tokens=50:init_weights=none`, once each.

    `options` of a method (from --set or a recipe) hold for all its variants; a variant's own go before them. `lr` and `batch_size` are
    a variant's too: `lora:lr=2e-3`.
    """
    words = list(dict.fromkeys(word.strip() for word in asked.split(",") if word.strip()))
    if not words:
        raise InputError(f"--methods names none; there are: {', '.join(METHODS)}")
    found = [contender(word, options) for word in words]
    folders = [contender.folder for contender in found]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise InputError(f"--methods: two variants would share the folder {min(twice)}; leave one away")
    return found


def contender(word: str, options: Mapping[str, Mapping[str, Any]]) -> Contender:
    """The one that this word names, a method's variant or a reference."""
    name, *more = word.split(":")
    if name in REFERENCES:
        return _reference(word)
    settings: dict[str, Any] = {}
    for option in list(more):
        if "=" not in option:
            raise InputError(f"--methods {word!r}: write options as NAME:OPTION=VALUE, such as lora:r=64")
        key, _, value = option.partition("=")
        if key in OWN:
            settings[key] = _positive(word, key, value)
            more.remove(option)
    own: dict[str, Any] = dict(options.get(name, {}))
    own.update(parse_options([f"{name}.{option}" for option in more], name).get(name, {}) if more else {})
    return Contender(word, build_method(name, own), **settings)


def references(asked: str) -> list[Contender]:
    """Those named in `untouched,few_shot:n=8,majority,full`, or none at all for `none`."""
    words = list(dict.fromkeys(word.strip() for word in asked.split(",") if word.strip()))
    return [] if words == ["none"] else [_reference(word) for word in words]


def _reference(word: str) -> Contender:
    name, *more = word.split(":")
    if name not in REFERENCES:
        raise InputError(f"--references {word!r}: there is no such reference; {nearest(name, REFERENCES)}")
    if name == "few_shot":
        shots = [o.partition("=")[2] for o in more if o.startswith("n=")]
        if len(shots) != len(more) or len(more) > 1:
            raise InputError(f"--references {word!r}: write how many examples as few_shot:n=8")
        return Contender(word, None, shots=int(_positive(word, "n", shots[0], int)) if shots else SHOTS)
    settings: dict[str, Any] = {}
    for option in more:
        key, _, value = option.partition("=")
        if name != "full" or key not in OWN:
            raise InputError(f"--references {word!r}: {name} has no option {key!r}")
        settings[key] = _positive(word, key, value)
    return Contender(word, FullFineTuning() if name == "full" else None, **settings)


def _positive(word: str, key: str, value: str, kind: Any = None) -> Any:
    kind = kind or OWN[key]
    try:
        number = kind(value)
    except ValueError:
        number = 0
    most = 100 if kind is float else 2**16
    if not 0 < number <= most:
        raise InputError(
            f"{word!r}: {key} must be {'a number' if kind is float else 'a whole number'} above 0, not {value!r}"
        )
    return number
