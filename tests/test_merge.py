"""Merging: the same output without the adapter, and every weight back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import featherweight as fw
import models
from featherweight.adapter import living, parts, rename, trainable
from featherweight.base import Base, fingerprint
from featherweight.engine.train import Settings, fit
from featherweight.method import Part, Retrained
from models import FAMILIES, logits, random_inputs, shake
from subjects import METHODS
from test_methods import adapted


def mergeable(method: str) -> bool:
    model = models.llama()
    fw.attach(model, METHODS[method])
    return all(type(p).merged is not Part.merged for p in parts(model).values())


MERGEABLE = [name for name in METHODS if mergeable(name)]
OTHERS = [name for name in METHODS if name not in MERGEABLE]


def state(model: Any) -> dict[str, Tensor]:
    """A copy of the base's tensors."""
    return {k: v.clone() for k, v in model.state_dict().items() if ".parts." not in f".{k}"}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def test_lora_and_ia3_can_be_merged_and_prompts_cannot() -> None:
    assert {"lora", "ia3"} <= set(MERGEABLE)
    assert {"prompt_tuning", "p_tuning", "prefix_tuning"} <= set(OTHERS)


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_says_the_same_and_unmerging_restores_every_bit(family: str, method: str) -> None:
    model = adapted(family, method)
    inputs = random_inputs(model)
    before, base, mark = logits(model, **inputs), state(model), fingerprint(model)
    fw.merge(model)
    assert apart(logits(model, **inputs), before) < 1e-5
    assert not same(state(model), base)
    fw.unmerge(model)
    assert same(state(model), base)
    assert fingerprint(model) == mark
    assert torch.equal(logits(model, **inputs), before)
    assert living(model) == ("default",)


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_adapter_is_not_called(method: str) -> None:
    model = adapted("llama", method)
    fw.merge(model)
    merged = logits(model, **random_inputs(model))
    shake(trainable(model))
    assert torch.equal(logits(model, **random_inputs(model)), merged)


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_merging_for_good_leaves_a_plain_model(family: str, method: str) -> None:
    plain = FAMILIES[family]()
    model = adapted(family, method)
    inputs = random_inputs(model)
    before = logits(model, **inputs)
    fw.merge(model, keep=False)
    assert not fw.attached(model)
    assert {p: type(m) for p, m in model.named_modules()} == {p: type(m) for p, m in plain.named_modules()}
    plain.load_state_dict(model.state_dict())
    assert apart(logits(plain, **inputs), before) < 1e-5


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_merged_weight_keeps_its_type_and_is_rounded_once(dtype: torch.dtype, method: str) -> None:
    exact = adapted("llama", method)
    model = adapted("llama", method).to(dtype)
    for p in trainable(model):
        p.data = p.data.float()
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    fw.merge(exact)
    fw.merge(model)
    for key, tensor in state(model).items():
        assert tensor.dtype == dtype
        if dtype == torch.float64:  # which the float32 model has rounded, and this one has not
            torch.testing.assert_close(tensor.float(), state(exact)[key], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, state(exact)[key].to(dtype)), key


def test_the_bias_is_scaled_with_the_output_and_put_back() -> None:
    model = models.bart()
    fw.attach(model, fw.IA3(target_modules=("q_proj", "fc1"), feedforward_modules=("fc1",)))
    layer = model.model.decoder.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.bias.fill_(0.5)
        layer.fc1.bias.fill_(0.25)
    shake(trainable(model))
    fw.merge(model)
    scale = layer.self_attn.q_proj.parts["default"].ia3_l.flatten()
    torch.testing.assert_close(layer.self_attn.q_proj.bias, 0.5 * scale)
    assert bool((layer.fc1.bias == 0.25).all())
    fw.unmerge(model)
    assert bool((layer.self_attn.q_proj.bias == 0.5).all())


def test_modules_trained_whole_are_merged_too() -> None:
    config = LlamaConfig(**models._LLAMA_LIKE, tie_word_embeddings=False)
    model = models.build(LlamaForCausalLM, config)
    fw.attach(model, fw.LoRA(r=2, modules_to_save=("lm_head", "mlp")))
    assert sum(isinstance(p, Retrained) for p in parts(model).values()) == 3
    shake(trainable(model))
    inputs = random_inputs(model)
    before, base = logits(model, **inputs), state(model)
    fw.merge(model)
    assert apart(logits(model, **inputs), before) < 1e-5
    fw.unmerge(model)
    assert same(state(model), base)


# --- two adapters ---------------------------------------------------------------------------------------------------


def two() -> Any:
    """A LoRA inside an (IA)³: they do not commute, for both sit on v_proj."""
    model = adapted("llama", "lora")
    fw.attach(model, fw.IA3(), "outer")
    shake(trainable(model, "outer"))
    return model


def test_only_the_innermost_adapter_can_be_merged() -> None:
    model = two()
    inputs = random_inputs(model)
    before, base = logits(model, **inputs), state(model)
    with pytest.raises(fw.InputError, match="'default' runs inside 'outer', and their order matters"):
        fw.merge(model, "outer")
    assert same(state(model), base)
    fw.merge(model)
    assert apart(logits(model, **inputs), before) < 1e-5
    fw.merge(model, "outer")
    assert living(model) == ("default", "outer")
    assert apart(logits(model, **inputs), before) < 1e-5
    with pytest.raises(fw.InputError, match="'outer' was merged after 'default': unmerge 'outer' first"):
        fw.unmerge(model)
    fw.unmerge(model, "outer")
    fw.unmerge(model)
    assert same(state(model), base)
    assert torch.equal(logits(model, **inputs), before)


def test_merging_for_good_over_one_that_can_be_undone_is_refused() -> None:
    model = two()
    fw.merge(model)
    with pytest.raises(fw.InputError, match="'outer' cannot be merged for good over 'default'"):
        fw.merge(model, "outer", keep=False)


def test_a_merged_adapter_cannot_be_switched_off_or_detached_but_renamed() -> None:
    model = two()
    fw.live(model, "default", "outer")
    inputs = random_inputs(model)
    before = logits(model, **inputs)
    fw.merge(model)
    for names in ((), ("outer",), ("outer", "default")):
        with pytest.raises(fw.InputError, match="'default' is merged into the weights and cannot be left out"):
            fw.live(model, *names)
    with pytest.raises(fw.InputError, match=r"'default' is merged: unmerge it .* or merge it for good with keep=False"):
        fw.detach(model)
    rename(model, "default", "inner")
    assert living(model) == ("inner", "outer")
    fw.live(model, "inner")
    alone = logits(model, **inputs)
    fw.detach(model, "outer")
    assert torch.equal(logits(model, **inputs), alone)
    fw.attach(model, fw.IA3(), "outer")
    assert torch.equal(logits(model, **inputs), alone)
    shake(trainable(model, "outer"))
    assert apart(logits(model, **inputs), before) < 1e-5
    fw.unmerge(model, "inner")
    assert apart(logits(model, **inputs), before) < 1e-6


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OTHERS)
def test_a_method_that_no_weight_can_replace_is_refused(method: str) -> None:
    model = adapted("llama", method)
    base = state(model)
    with pytest.raises(fw.InputError, match=r"cannot be merged: what it adds at '\S+' depends on the input"):
        fw.merge(model)
    assert same(state(model), base)


def tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def tied_by_storage(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)


@pytest.mark.parametrize("tie", [tied, tied_by_storage])
def test_a_tied_weight_is_refused_by_name(tie: Callable[[Any], None]) -> None:
    model = models.llama()
    tie(model)
    fw.attach(model, fw.LoRA(r=2, target_modules=("q_proj", "lm_head")))
    shake(trainable(model))
    base = state(model)
    with pytest.raises(fw.InputError, match=r"lm_head.weight is tied to the weight of model.embed_tokens"):
        fw.merge(model)
    assert same(state(model), base)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**models._LLAMA_LIKE))
        fw.attach(model, fw.LoRA(r=2))
    with pytest.raises(fw.InputError, match=r"model.layers.0.self_attn.q_proj has no weights .* load the model first"):
        fw.merge(model)


def test_what_is_not_there_not_live_or_merged_already_is_refused() -> None:
    model = adapted("llama", "lora")
    with pytest.raises(fw.InputError, match=r"no adapter named 'x'; attached: default"):
        fw.merge(model, "x")
    with pytest.raises(fw.InputError, match=r"the adapter 'default' is not merged; merged: none"):
        fw.unmerge(model)
    fw.live(model)
    with pytest.raises(fw.InputError, match="the adapter 'default' is not live"):
        fw.merge(model)
    fw.live(model, "default")
    fw.merge(model)
    with pytest.raises(fw.InputError, match="the adapter 'default' is merged already"):
        fw.merge(model)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused_and_the_model_stays_whole(spoilt: float) -> None:
    model = adapted("llama", "lora")
    base = state(model)
    with torch.no_grad():
        trainable(model)[-1][0, 0] = spoilt
    with pytest.raises(
        fw.InputError, match=r"merging would make model.layers.1.self_attn.v_proj.weight infinite or NaN"
    ):
        fw.merge(model)
    assert same(state(model), base)
    assert living(model) == ("default",)


def test_an_interrupted_merge_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "lora")
    base, calls = state(model), []
    part: Any = type(next(iter(parts(model).values())))
    original = part.merged

    def stops_at_the_third(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(part, "merged", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fw.merge(model)
    assert same(state(model), base)


def test_a_merged_adapter_is_neither_trained_nor_saved(in_tmp: Any) -> None:
    model = adapted("llama", "lora")
    base = Base(model, None, "tiny", torch.device("cpu"))
    fw.merge(model)
    with pytest.raises(fw.InputError, match="'default' is merged into the weights; unmerge it first"):
        fit(base, [], Settings(steps=1))
    with pytest.raises(fw.InputError, match="cannot save an adapter while the adapter 'default' is merged"):
        fw.save(model, "mine")
    fw.unmerge(model)
    fw.save(model, "mine")
    fw.merge(model)
    with pytest.raises(fw.InputError, match="cannot load an adapter while the adapter 'default' is merged"):
        fw.load(model, "mine", "second")
