"""A float16 base: its loss is scaled, so that small gradients survive, and a scale that is too large costs a step, not the run."""

from __future__ import annotations

import copy

import pytest
import torch

import featherweight as fw
import models
from featherweight.adapter import trainable
from featherweight.engine import update
from featherweight.engine.batches import collate
from featherweight.engine.train import Settings, fit
from featherweight.engine.update import Learner
from models import shake
from subjects import a_base, examples, gradients_off

SETTINGS = Settings(steps=12, batch_size=6, lr=1e-2)


def half(faint: float = 1.0) -> fw.Base:
    """A Llama in float16 with LoRA. `faint` scales the output of the last norm, and so every gradient before it."""
    torch.manual_seed(0)
    base = a_base(copy.deepcopy(models.FAMILIES["llama"]()).half())
    fw.attach(base.model, fw.LoRA(r=2))
    shake(trainable(base.model))
    base.model.model.norm.weight.data *= faint
    return base


def one_step(base: fw.Base, scale: float) -> list[torch.Tensor]:
    learner = Learner(base, SETTINGS, collate)
    learner.scale = scale
    learner.gradients([examples(base.model)])
    return [p.grad.clone() for p in learner.parameters]


def test_a_scaled_loss_has_the_same_gradients_where_none_is_small() -> None:
    exact = half()
    exact.model.float()
    wanted = one_step(exact, 1.0)
    assert gradients_off(one_step(half(), 2.0**10), wanted) < 0.02


def test_without_the_scale_small_gradients_are_lost() -> None:
    exact = half(faint=1e-5)
    exact.model.float()
    wanted = one_step(exact, 1.0)
    assert gradients_off(one_step(half(faint=1e-5), 2.0**16), wanted) < 0.1
    assert gradients_off(one_step(half(faint=1e-5), 1.0), wanted) > 0.2


def test_a_scale_that_is_too_large_costs_a_step_each_time_it_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "SCALE", 2.0**24)
    base = half()
    report = fit(base, examples(base.model), SETTINGS)
    assert report.stopped is None
    assert 0 < report.skipped < 12
    assert report.losses[-1] < report.losses[0]
    assert all(torch.tensor(report.losses).isfinite())


def test_the_scale_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "GROW_AFTER", 3)
    monkeypatch.setattr(update, "SCALE", 2.0)
    base = half()
    seen = []
    original = Learner.update

    def watched(self: Learner, *args: object, **kwargs: object) -> object:
        seen.append(self.scale)
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "update", watched)
    fit(base, examples(base.model), SETTINGS)
    assert seen[1] == 2.0
    assert seen[-1] == 2.0 * 2 ** (11 // 3)  # before the twelfth step


def test_a_model_beyond_float16_is_said_to_have_diverged() -> None:
    base = half()
    base.model.model.norm.weight.data.fill_(6e4)
    report = fit(base, examples(base.model), SETTINGS)
    assert report.stopped == "diverged"
