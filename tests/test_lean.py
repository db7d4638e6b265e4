"""The engine's own norms, gates and correction: what the model computes and learns is what it is without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
import models
from featherweight.adapter import trainable
from featherweight.engine.lean import _RMSNorm, _SiLUGate, lean
from featherweight.engine.train import Settings, fit
from featherweight.methods.lora import _Corrected
from models import random_inputs, shake
from subjects import a_base, examples


def learned(model: Any) -> list[Tensor]:
    """Gradients of something that depends on every output."""
    out = model(**random_inputs(model), use_cache=False)
    parameters = trainable(model)
    loss = (out.logits * torch.linspace(-1, 1, out.logits.shape[-1], dtype=out.logits.dtype)).square().sum()
    return [out.logits, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_lean_model_computes_and_learns_the_same(family: str) -> None:
    torch.manual_seed(0)  # of T5's and mT5's one start in 25 is off by up to 4e-6
    model = models.FAMILIES[family]().double()
    fw.attach(model, fw.LoRA(r=2, target_modules="all-linear"))
    shake(trainable(model))
    expected, classes = learned(model), [type(m) for m in model.modules()]
    with lean(model):
        found = learned(model)
    assert [type(m) for m in model.modules()] == classes
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()  # transformers' norms are in float32


@pytest.mark.parametrize(("family", "swapped"), [("llama", 7), ("qwen3", 11), ("gemma3", 0), ("gpt2", 2)])
def test_what_is_not_recognised_stays(family: str, swapped: int) -> None:
    model = models.FAMILIES[family]()
    model.requires_grad_(False)
    before = [type(m) for m in model.modules()]
    with lean(model):
        assert sum(type(m) is not t for m, t in zip(model.modules(), before, strict=True)) == swapped


def test_a_norm_that_is_trained_is_left_alone() -> None:
    model = models.FAMILIES["llama"]()
    norm = model.model.norm
    norm.weight.requires_grad_(True)
    before = type(norm)
    with lean(model):
        assert type(norm) is before


def test_after_an_error_the_model_is_as_it_was() -> None:
    model = models.FAMILIES["llama"]()
    model.requires_grad_(False)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), lean(model):
        raise ZeroDivisionError
    assert [type(m) for m in model.modules()] == before


def test_the_formulas_have_the_gradients_of_what_they_compute() -> None:
    torch.manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    w = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _RMSNorm.apply(x, w, 1e-5), numbers(2, 3, 6))
    assert torch.autograd.gradcheck(_SiLUGate.apply, (numbers(2, 5), numbers(2, 5)))
    correction = (numbers(2, 3, 4), numbers(2, 3, 5), numbers(2, 5), numbers(4, 2))
    assert torch.autograd.gradcheck(lambda *t: _Corrected.apply(*t, 0.7), correction)


def test_in_bfloat16_the_lean_norm_is_no_less_exact() -> None:
    torch.manual_seed(0)
    model = copy.deepcopy(models.FAMILIES["llama"]()).bfloat16()
    model.requires_grad_(False)
    norm: nn.Module = model.model.norm
    norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    x = torch.randn(64, norm.weight.shape[0]).bfloat16().requires_grad_(True)
    upstream = torch.randn_like(x)

    def both(forward: Any, given: Tensor, dy: Tensor) -> list[Tensor]:
        y = forward(given)
        return [y, *torch.autograd.grad(y, given, dy)]

    theirs = both(norm, x, upstream)
    with lean(model):
        ours = both(norm, x, upstream)
    exact = copy.deepcopy(norm).double()
    truth = both(
        lambda t: exact.weight * t / (t.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt(),
        x.detach().double().requires_grad_(True), upstream.double(),
    )  # fmt: skip
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert (a - c).norm() <= 1.05 * (b - c).norm()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_learns_the_same_without_them(family: str) -> None:
    def trained(own_layers: bool) -> tuple[list[float], list[type]]:
        torch.manual_seed(0)
        base = a_base(models.FAMILIES[family]().double())
        fw.attach(base.model, fw.LoRA(r=2))
        shake(trainable(base.model))
        seen: list[type] = []
        report = fit(
            base, examples(base.model), Settings(steps=3, batch_size=2, lean=own_layers),
            on_step=lambda _: seen.extend(type(m) for m in base.model.modules()),
        )  # fmt: skip
        return report.losses, seen

    (ours, swapped), (theirs, plain) = trained(True), trained(False)
    assert swapped != plain
    assert ours == pytest.approx(theirs, rel=2e-6)
