"""Quantised bases: every method works around packed layers as around the matrices that they hold.

bitsandbytes and torchao round weights, not what adapters do. So the reference is a plain model with the dequantised
weights. In training mode the two agree up to float32's own rounding: the largest differences measured of logits, input
gradients and adapter gradients, as a share of the largest value, are 0 (NF4), 2e-6 (LLM.int8()) and 9e-6 (torchao).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import featherweight as fw
import models
import tiny
from featherweight import quant
from featherweight.adapter import parts, trainable
from featherweight.base import fingerprint, same_base
from featherweight.quant import dense_weight, is_quantised, make_dependable, store_weight
from models import logits, random_inputs, shake, words
from subjects import METHODS
from test_methods import every_method

WIDTH = 64
"""A multiple of 32 and of the 64 values that share a 4-bit scale: narrower layers have no AVX512-BF16 kernel."""


def plain() -> Any:
    config = LlamaConfig(**models._LLAMA_LIKE | {"hidden_size": WIDTH, "intermediate_size": 128})
    return models.build(LlamaForCausalLM, config)


def _replace(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """What transformers does when it loads a model quantised: every linear layer but the head."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            holder, _, leaf = path.rpartition(".")
            quantised = make(module)
            quantised.load_state_dict(module.state_dict())
            setattr(model.get_submodule(holder), leaf, quantised.to("cpu"))  # this quantises
    return model.requires_grad_(False)


def nf4() -> Any:
    """4-bit NormalFloat with double quantisation, QLoRA's."""

    def make(m: nn.Linear) -> nn.Module:
        return bnb.nn.Linear4bit(
            m.in_features, m.out_features, m.bias is not None, torch.float32, compress_statistics=True, quant_type="nf4"
        )

    return _replace(plain(), make).eval()


def int8() -> Any:
    """LLM.int8(), with a threshold that the inputs of so small a model pass as those of a large one pass the usual 6."""

    def make(m: nn.Linear) -> nn.Module:
        return bnb.nn.Linear8bitLt(
            m.in_features, m.out_features, m.bias is not None, has_fp16_weights=False, threshold=1.0
        )

    return _replace(plain(), make).eval()


def torchao_int8() -> Any:
    """Weight-only, a scale per row."""
    model = plain()
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


QUANTISED: dict[str, Callable[[], Any]] = {"nf4": nf4, "int8": int8, "torchao_int8": torchao_int8}
every_kind = pytest.mark.parametrize("kind", QUANTISED)


def dequantised(model: Any) -> Any:
    """A plain model with the weights that a quantised one stands for."""
    dense = plain()
    dense.lm_head.weight = model.lm_head.weight
    for path, module in model.named_modules():
        if is_quantised(module):
            dense.get_submodule(path).weight.data = dense_weight(module).float()
    return dense


def with_adapter(model: Any, method: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fw.attach(model, METHODS[method])
    shake(trainable(model))
    return model


def learned(model: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, the gradient of the inputs and those of the adapter, in training mode."""
    model.train()
    embeddings = model.get_input_embeddings()(words(2, 7)).detach().requires_grad_(True)
    for p in trainable(model):
        p.grad = None
    out = model(inputs_embeds=embeddings).logits
    out.log_softmax(-1)[..., 5].mean().backward()
    assert embeddings.grad is not None
    found = [p.grad for p in trainable(model)]
    assert all(g is not None for g in found), "an adapter without gradients"
    return out.detach(), embeddings.grad, [g for g in found if g is not None]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@every_method
@every_kind
def test_a_quantised_base_gives_the_output_and_gradients_of_its_dequantised_weights(kind: str, method: str) -> None:
    packed = QUANTISED[kind]()
    dense = dequantised(packed)
    with_adapter(packed, method)
    with_adapter(dense, method)
    with torch.no_grad():
        for a, b in zip(trainable(packed), trainable(dense), strict=True):
            b.copy_(a)  # a prefix starts from what the base computes
    out, back, own = learned(packed)
    wanted_out, wanted_back, wanted_own = learned(dense)
    assert apart(out, wanted_out) < 1e-5
    assert apart(back, wanted_back) < 1e-5
    for a, b in zip(own, wanted_own, strict=True):
        assert apart(a, b) < 1e-5


@every_kind
def test_quantising_moved_the_weights_by_what_its_bits_allow(kind: str) -> None:
    """So the test above does not compare a model with itself."""
    moved = [
        apart(dense_weight(m), plain().get_submodule(p).weight)
        for p, m in QUANTISED[kind]().named_modules()
        if is_quantised(m)
    ]
    assert len(moved) == 7 * models.LAYERS
    assert all(1e-4 < d < (0.2 if kind == "nf4" else 0.01) for d in moved)


@every_method
@every_kind
def test_evaluating_and_training_agree_on_a_quantised_base(kind: str, method: str) -> None:
    model = with_adapter(QUANTISED[kind](), method)
    wanted = learned(model)[0]
    model.eval()
    with torch.no_grad():
        out = model(inputs_embeds=model.get_input_embeddings()(words(2, 7))).logits
    assert apart(out, wanted) < 1e-5


@every_kind
def test_a_row_is_answered_the_same_whatever_row_is_beside_it(kind: str) -> None:
    """LLM.int8() by itself rounds inputs by what all rows have in common."""
    model = with_adapter(QUANTISED[kind](), "lora")
    both = model.get_input_embeddings()(words(2, 7)).detach()
    with torch.no_grad():
        together = model(inputs_embeds=both).logits[0]
        alone = model(inputs_embeds=both[:1]).logits[0]
    assert apart(alone, together) < 1e-5


@every_kind
def test_a_frozen_layer_keeps_nothing_of_what_goes_through_it(kind: str) -> None:
    site = with_adapter(QUANTISED[kind](), "ia3").model.layers[0].mlp.gate_proj
    assert is_quantised(site)
    x = torch.ones(3, site.in_features, requires_grad=True) * 1.0
    gone = weakref.ref(x)
    y = site(x)
    del x
    assert y.requires_grad
    assert gone() is None


# --- the kernel without a gradient ----------------------------------------------------------------------------------


@pytest.fixture
def cpu_with_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 4-bit layers believe that the CPU has it: repacking needs no instruction, only the kernel does."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@every_method
@pytest.mark.usefixtures("cpu_with_avx512_bf16")
def test_training_goes_on_after_an_evaluation(method: str) -> None:
    model = with_adapter(nf4(), method)
    never_evaluated = copy.deepcopy(model)
    for step in range(3):
        for m in (model, never_evaluated):
            for p, g in zip(trainable(m), learned(m)[2], strict=True):
                p.data -= 0.1 * g
        model.eval()
        logits(model, **random_inputs(model))
        model.generate(words(1, 4), max_new_tokens=2, do_sample=False)
        for a, b in zip(learned(model)[2], learned(never_evaluated)[2], strict=True):
            assert torch.equal(a, b), f"step {step}"


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="only CPUs with AVX512-BF16 have the trap")
@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
def test_without_the_guard_the_gradients_are_lost() -> None:
    """The day this fails, bitsandbytes has mended it and `make_dependable` can go."""
    model = with_adapter(nf4(), "lora")
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.support_avx512bf16_for_cpu = True
    logits(model, **random_inputs(model))
    with pytest.raises(AssertionError, match="an adapter without gradients"):
        learned(model)


def bnb_packs(layer: Any) -> None:
    """What an evaluation without the guard does to a layer."""
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def test_attaching_to_a_base_that_was_evaluated_before_mends_it() -> None:
    packed = nf4()
    before = dense_weight(packed.model.layers[0].mlp.up_proj)
    for m in packed.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            bnb_packs(m)
    dense = dequantised(copy.deepcopy(packed))
    out, back, own = learned(with_adapter(packed, "lora"))
    wanted_out, wanted_back, wanted_own = learned(with_adapter(dense, "lora"))
    assert apart(out, wanted_out) < 1e-5
    assert apart(back, wanted_back) < 1e-5
    assert max(map(apart, own, wanted_own)) < 1e-5
    drift = apart(dense_weight(packed.model.layers[0].mlp.up_proj), before)
    assert 0 < drift < 0.01  # the scales went through bfloat16


def test_narrow_layers_can_be_evaluated() -> None:
    """The AVX512-BF16 kernel wants multiples of 32 and 64, and stops at others."""
    layer = bnb.nn.Linear4bit(32, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    layer.support_avx512bf16_for_cpu = True
    x = torch.randn(3, 32)
    make_dependable(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ dense_weight(layer).T)


# --- weights out and in ---------------------------------------------------------------------------------------------


def test_a_plain_and_a_transposed_layer_give_and_take_their_own_weight() -> None:
    model = models.gpt2()
    conv, linear = model.transformer.h[0].attn.c_attn, model.lm_head
    x = torch.randn(3, models.WIDTH)
    torch.testing.assert_close(x @ dense_weight(conv).T + conv.bias, conv(x))
    assert dense_weight(linear).data_ptr() == linear.weight.data_ptr()
    for layer in (conv, linear):
        assert not is_quantised(layer)
        new = torch.randn(dense_weight(layer).shape)
        store_weight(layer, new)
        assert torch.equal(dense_weight(layer), new)


@pytest.mark.parametrize("trained_before", [False, True])
@every_kind
def test_a_quantised_layer_takes_a_new_weight(kind: str, trained_before: bool) -> None:
    model = QUANTISED[kind]()
    if trained_before:
        learned(with_adapter(model, "lora"))
        fw.detach(model)
    layer = model.model.layers[0].mlp.up_proj
    new = torch.randn(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(3))
    store_weight(layer, new)
    assert is_quantised(layer)
    kept = dense_weight(layer)
    assert 0 < apart(kept, new) < (0.2 if kind == "nf4" else 0.01)
    x = torch.randn(3, WIDTH)
    layer.train()
    assert apart(layer(x), x @ kept.float().T) < 1e-5
    store_weight(layer, kept)
    assert apart(dense_weight(layer), kept) < (
        0.02 if kind == "nf4" else 0.005
    )  # torchao spans one value more than it uses


def test_a_weight_with_a_scale_per_group_keeps_its_groups() -> None:
    layer = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantize_(layer, Int8WeightOnlyConfig(granularity=PerGroup(32)))
    store_weight(layer[0], torch.randn(32, 64))
    assert layer[0].weight.scale.shape == (32, 2)


def test_an_unknown_kind_of_layer_is_refused() -> None:
    class Exotic(nn.Module):
        in_features, out_features = 3, 4
        qweight = torch.zeros(1, dtype=torch.int32)

    assert is_quantised(Exotic())
    for ask in (lambda: dense_weight(Exotic()), lambda: store_weight(Exotic(), torch.zeros(4, 3))):
        with pytest.raises(fw.InputError, match="Exotic keeps its weight in a form that is not known"):
            ask()


# --- what else must hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "named"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt"), ("torchao_int8", "Int8Tensor")]
)
def test_merging_into_a_quantised_base_is_refused(kind: str, named: str) -> None:
    model = with_adapter(QUANTISED[kind](), "lora")
    before = logits(model, **random_inputs(model))
    with pytest.raises(fw.InputError, match=rf"q_proj is quantised \({named}\): .* load the base unquantised"):
        fw.merge(model)
    assert torch.equal(logits(model, **random_inputs(model)), before)


@every_method
@every_kind
def test_an_adapter_of_a_quantised_base_is_saved_and_loaded(tmp_path: Path, kind: str, method: str) -> None:
    model = with_adapter(QUANTISED[kind](), method)
    before = logits(model, **random_inputs(model))
    fw.save(model, tmp_path)
    again = QUANTISED[kind]()
    fw.load(again, tmp_path)
    assert torch.equal(logits(again, **random_inputs(again)), before)


@every_kind
def test_a_base_is_recognised_quantised_and_not(tmp_path: Path, kind: str) -> None:
    """So that an adapter trained on the one can be merged into the other."""
    here, there = fingerprint(QUANTISED[kind]()), fingerprint(plain())
    assert same_base(here, there)
    assert same_base(there, here)
    assert not same_base(here, fingerprint(models.llama()))
    fw.save(with_adapter(QUANTISED[kind](), "lora"), tmp_path)
    dense = plain()
    fw.load(dense, tmp_path)
    fw.merge(dense)


@every_kind
def test_detaching_from_a_quantised_base_leaves_its_layers(kind: str) -> None:
    model = QUANTISED[kind]()
    make_dependable(model)  # this stays: without it an adapter could not be trained on these layers
    before = logits(model, **random_inputs(model))
    classes = {p: type(m) for p, m in model.named_modules()}
    fw.detach(with_adapter(model, "lora"))
    assert {p: type(m) for p, m in model.named_modules()} == classes
    assert torch.equal(logits(model, **random_inputs(model)), before)
    assert not parts(model)


def test_nothing_is_imported_that_the_user_has_not() -> None:
    assert "import bitsandbytes" not in Path(quant.__file__).read_text()
    assert "import torchao" not in Path(quant.__file__).read_text()


CONFIGS: dict[str, Any] = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao_int8": TorchAoConfig(Int8WeightOnlyConfig()),
}


@every_kind
def test_a_folder_that_transformers_saved_quantised_is_a_base_to_train_and_evaluate(tmp_path: Path, kind: str) -> None:
    tiny.save_llama(tmp_path / "plain", width=WIDTH)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=CONFIGS[kind], dtype=torch.float32, device_map="cpu"
    )
    packed.save_pretrained(tmp_path / "packed")
    tiny.tokenizer(bos=True, chat=True).save_pretrained(tmp_path / "packed")
    base = fw.load_base(str(tmp_path / "packed"), dtype="float32")
    assert sum(is_quantised(m) for m in base.model.modules()) == 14
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in base.model.modules())
    task = fw.load_task(str(tiny.write(tmp_path / "reviews.csv", tiny.reviews())))
    before = fw.evaluate(base, task).predictions
    report = fw.train(base, task, fw.LoRA(r=4, target_modules="all-linear"), steps=40, lr=1e-2)
    assert sum(report.losses[-5:]) < sum(report.losses[:5]) / 2
    fw.live(base.model)
    assert fw.evaluate(base, task).predictions == before
