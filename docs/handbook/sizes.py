"""How many parameters a method trains, counted by the library itself on models without weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

import featherweight as fw
from featherweight.base import skeleton
from featherweight.demo import ARCHITECTURE
from featherweight.method import Method
from featherweight.methods import method_class

DEFAULT, LARGE = "SmolLM2-135M", "mt0-large"


@dataclass(frozen=True)
class Place:
    """Sites of one kind: how many there are, how wide, and what each trains."""

    name: str
    sites: int
    d_in: int | None
    d_out: int | None
    parameters: int


@functools.cache
def shape(name: str) -> nn.Module:
    """One of the two models that the counts are shown on; their shapes are published, and no weight is needed."""
    from transformers import LlamaConfig, MT5Config

    if name == DEFAULT:
        return skeleton(LlamaConfig(**ARCHITECTURE))
    large: dict[str, Any] = {
        "d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_heads": 16, "num_layers": 24, "num_decoder_layers": 24,
        "vocab_size": 250112, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    }  # fmt: skip
    return skeleton(MT5Config(**large))


@functools.cache
def count(name: str, model: str) -> tuple[int, int]:
    """(all parameters with the adapter, those that are trained) of a method with its default hyper-parameters."""
    base = shape(model)
    fw.attach(base, method_class(name)())
    counted = fw.count(base)
    fw.detach(base)
    return counted


def resolved(name: str, model: str) -> Method:
    """A method with its defaults, spelled out for a model."""
    return method_class(name)().resolve(shape(model), None)


@functools.cache
def places(name: str, model: str) -> tuple[Place, ...]:
    """Where a method's parts sit in a model, sites of one kind together."""
    base = shape(model)
    method = resolved(name, model)
    kinds: dict[tuple[str, int], list[nn.Module]] = {}
    for path in method.sites(base):
        trained = sum(p.numel() for p in method.part(base, path).parameters())
        if trained:
            kinds.setdefault((path.rsplit(".", 1)[-1], trained), []).append(base.get_submodule(path))
    return tuple(
        Place(
            leaf, len(found), getattr(found[0], "in_features", None), getattr(found[0], "out_features", None), trained
        )
        for (leaf, trained), found in kinds.items()
    )


def hyperparameters(name: str) -> dict[str, Any]:
    """The defaults that a count depends on."""
    return {f.name: f.default for f in fields(method_class(name)) if type(f.default) is int}
