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
from reference import peft, theirs

# HF PEFT's own calls into transformers, not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
    ),  # Mixtral's experts
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


def adapts_experts(family: str, method: str) -> bool:
    """HF PEFT takes all-linear to mean fused experts too, which are no linear layers."""
    return (family, method) == ("mixtral", "rslora")


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
    reference = peft.get_peft_model(base, theirs(OURS[method], base)).eval()
    shake(p for p in reference.parameters() if p.requires_grad)
    expected = peft_logits(reference, before, inputs)
    assert (expected - before).abs().max() > 1e-2
    reference.save_pretrained(tmp_path / "adapter")
    ours = FAMILIES[family]()
    if adapts_experts(family, method):
        with pytest.raises(fw.InputError, match=r"alpha_pattern=.* is not supported"):
            fw.load(ours, tmp_path / "adapter")
        return
    fw.load(ours, tmp_path / "adapter")
    same(logits(ours, **inputs), expected)


@every_method
@every_family
def test_we_train_as_many_parameters_as_hf_peft(family: str, method: str) -> None:
    base = FAMILIES[family]()
    reference = peft.get_peft_model(base, theirs(OURS[method], base))
    ours = FAMILIES[family]()
    fw.attach(ours, OURS[method])
    if adapts_experts(family, method):
        return
    assert fw.count(ours)[1] == reference.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", ["llama", "t5"])
@every_method
def test_hf_peft_loads_what_we_loaded_from_it(family: str, method: str, tmp_path: Path) -> None:
    base = FAMILIES[family]()
    inputs = random_inputs(base)
    plain = logits(base, **inputs)
    reference = peft.get_peft_model(base, theirs(OURS[method], base)).eval()
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
def test_hf_peft_would_write_the_same_tokens(family: str, method: str, tmp_path: Path) -> None:
    ours = FAMILIES[family]()
    inputs = random_inputs(ours)
    for given in ("decoder_input_ids", "attention_mask"):
        inputs.pop(given, None)
    fw.attach(ours, OURS[method])
    shake(trainable(ours))
    fw.save(ours, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "adapter").eval()
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    written = ours.generate(**inputs, **new)
    # Not by its `generate`: in peft 0.21 that knows caches by the name that they had before transformers 5.24.
    told = {"decoder_input_ids": written} if ours.config.is_encoder_decoder else {"input_ids": written}
    with torch.no_grad():
        its = peft_logits(reference, written, {**inputs, **told})
    if (end := ours.generation_config.eos_token_id) is not None:
        its[..., end] = -torch.inf
    assert torch.equal(its[:, -7:-1].argmax(-1), written[:, -6:])
