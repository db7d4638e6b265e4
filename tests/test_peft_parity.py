"""Adapters go both ways between featherweight and HF PEFT, and mean the same in both.

"The same" is 1e-5 of the logits' size. All methods agree bit for bit, except LoRA by 3e-6: we scale between A and B,
HF PEFT after B, and where lora_alpha / r is no power of two that rounds differently (in float64 they agree to 1e-13).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import featherweight as fw
import models
from featherweight.adapter import trainable
from models import FAMILIES, logits, random_inputs, shake

peft = pytest.importorskip("peft", reason="HF PEFT is the reference of these tests; it is in the dev extra")

# HF PEFT's own calls into transformers, not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

N = 5
OURS: dict[str, fw.Method] = {
    "lora": fw.LoRA(r=4, lora_alpha=12),
    "rslora": fw.LoRA(r=4, use_rslora=True, target_modules="all-linear"),
    "prompt_tuning": fw.PromptTuning(num_virtual_tokens=N, prompt_tuning_init="RANDOM"),
    "p_tuning": fw.PTuning(num_virtual_tokens=N, encoder_hidden_size=8),
    "prefix_tuning": fw.PrefixTuning(num_virtual_tokens=N),
    "ia3": fw.IA3(),
    "adalora": fw.AdaLoRA(init_r=6, target_r=3, lora_alpha=12),
}
every_method = pytest.mark.parametrize("method", OURS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def theirs(method: str, model: Any) -> Any:
    """The same method as HF PEFT configures it."""
    kind = peft.TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM
    if method == "lora":
        return peft.LoraConfig(task_type=kind, r=4, lora_alpha=12, **targets("lora", model))
    if method == "rslora":
        return peft.LoraConfig(task_type=kind, r=4, use_rslora=True, target_modules="all-linear", **transposed(model))
    if method == "prompt_tuning":
        return peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=N)
    if method == "p_tuning":
        return peft.PromptEncoderConfig(task_type=kind, num_virtual_tokens=N, encoder_hidden_size=8)
    if method == "prefix_tuning":
        return peft.PrefixTuningConfig(task_type=kind, num_virtual_tokens=N, **geometry(model))
    if method == "adalora":
        return peft.AdaLoraConfig(
            task_type=kind, init_r=6, target_r=3, lora_alpha=12, total_step=10, **targets("adalora", model)
        )
    return peft.IA3Config(task_type=kind, **targets("ia3", model))


def targets(method: str, model: Any) -> dict[str, Any]:
    """Phi-3 is the one family here without default names in HF PEFT, and for AdaLoRA Mistral."""
    if method == "adalora" and model.config.model_type == "mistral":
        return {"target_modules": ["q_proj", "v_proj"]}
    if model.config.model_type != "phi3":
        return transposed(model)
    named: dict[str, Any] = {"target_modules": ["qkv_proj"]}
    if method == "ia3":
        named = {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return named


def transposed(model: Any) -> dict[str, Any]:
    """GPT-2 keeps its weights transposed; HF PEFT wants to be told."""
    return {"fan_in_fan_out": model.config.model_type == "gpt2"}


def geometry(model: Any) -> dict[str, Any]:
    """HF PEFT takes the width for heads × head size; where that is wrong (T5's `d_kv`) its user must say so."""
    config = model.config
    size = getattr(config, "d_kv", None)
    return {} if size is None else {"token_dim": config.num_heads * size}


def peft_logits(model: Any, like: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """HF PEFT returns logits for the virtual tokens of a decoder too: in front."""
    return logits(model, **inputs)[:, -like.shape[1] :]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.std())))


@every_method
@every_family
def test_hf_peft_loads_what_we_save(family: str, method: str, tmp_path: Path) -> None:
    ours = FAMILIES[family]()
    inputs = random_inputs(ours)
    before = logits(ours, **inputs)
    fw.attach(ours, OURS[method])
    shake(trainable(ours))
    expected = logits(ours, **inputs)
    assert (expected - before).abs().max() > 1e-2
    fw.save(ours, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "adapter").eval()
    same(expected, peft_logits(reference, expected, inputs))


@every_method
@every_family
def test_we_load_what_hf_peft_saves(family: str, method: str, tmp_path: Path) -> None:
    base = FAMILIES[family]()
    inputs = random_inputs(base)
    before = logits(base, **inputs)
    reference = peft.get_peft_model(base, theirs(method, base)).eval()
    shake(p for p in reference.parameters() if p.requires_grad)
    expected = peft_logits(reference, before, inputs)
    assert (expected - before).abs().max() > 1e-2
    reference.save_pretrained(tmp_path / "adapter")
    ours = FAMILIES[family]()
    fw.load(ours, tmp_path / "adapter")
    same(logits(ours, **inputs), expected)


@every_method
@every_family
def test_we_train_as_many_parameters_as_hf_peft(family: str, method: str) -> None:
    base = FAMILIES[family]()
    reference = peft.get_peft_model(base, theirs(method, base))
    ours = FAMILIES[family]()
    fw.attach(ours, OURS[method])
    assert fw.count(ours)[1] == reference.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", ["llama", "t5"])
@every_method
def test_hf_peft_loads_what_we_loaded_from_it(family: str, method: str, tmp_path: Path) -> None:
    base = FAMILIES[family]()
    inputs = random_inputs(base)
    plain = logits(base, **inputs)
    reference = peft.get_peft_model(base, theirs(method, base)).eval()
    shake(p for p in reference.parameters() if p.requires_grad)
    expected = peft_logits(reference, plain, inputs)
    reference.save_pretrained(tmp_path / "theirs")
    ours = FAMILIES[family]()
    fw.load(ours, tmp_path / "theirs")
    fw.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "ours").eval()
    same(peft_logits(again, expected, inputs), expected)


@pytest.mark.parametrize("base", [None, "some/model"])
@pytest.mark.parametrize("text", ["Is this good?", None])
def test_hf_peft_loads_a_prompt_that_started_from_a_text(text: str | None, base: str | None, tmp_path: Path) -> None:
    ours = models.llama()
    inputs = random_inputs(ours)
    method = fw.PromptTuning(num_virtual_tokens=N, prompt_tuning_init_text=text, init_ids=(11, 45, 3, 78, 20))
    fw.attach(ours, method)
    expected = logits(ours, **inputs)
    fw.save(ours, tmp_path / "adapter", base=base)
    reference = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "adapter").eval()
    same(expected, peft_logits(reference, expected, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning", "ia3"])
def test_hf_peft_generates_the_same_tokens(family: str, method: str, tmp_path: Path) -> None:
    ours = FAMILIES[family]()
    inputs = random_inputs(ours)
    inputs.pop("decoder_input_ids", None)
    fw.attach(ours, OURS[method])
    shake(trainable(ours))
    fw.save(ours, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "adapter").eval()
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **new), reference.generate(**inputs, **new))
