"""The plan: what is simulated is what happens, and it says so in one line when it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import featherweight as fw
import models
from featherweight.adapter import attach
from featherweight.base import Base
from featherweight.engine.batches import keeps_apart
from featherweight.engine.train import Settings
from featherweight.plan.follow import Follower
from featherweight.plan.simulate import simulate, watch_update
from subjects import METHODS, examples

FAMILIES = ("llama", "t5", "bert")


def real(family: str, method: fw.Method, implementation: str = "eager") -> Base:
    model = models.FAMILIES[family]() if family in models.FAMILIES else models.CLASSIFIERS[family]()
    model.requires_grad_(False)
    model.set_attn_implementation(implementation)
    attach(model, method)
    return Base(model, SimpleNamespace(pad_token_id=0), "tiny", torch.device("cpu"))


def followed(base: Base, rows: Any, settings: Settings, packing: bool, **kwargs: Any) -> Follower:
    follower = Follower()
    watch_update(base, settings, rows, follower, packing, settings.batch_size, **kwargs)
    return follower


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kept", ["none", "layer"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_simulated_tensors_are_those_of_a_real_step(family: str, name: str, kept: str) -> None:
    base = real(family, METHODS[name])
    rows = examples(base.model, lengths=(40, 31, 64, 50, 22, 37, 48, 60))
    settings = Settings(batch_size=8, checkpoint_activations=kept)
    packing = keeps_apart(base)
    happened = followed(base, rows, settings, packing)
    found = simulate(base.model.config, METHODS[name], settings, rows, dtype=torch.float32, whole=True)
    for phase, parts in happened.peaks().items():
        assert sum(found.phases[phase].values()) == pytest.approx(sum(parts.values()), rel=0.01), phase
