"""The real peft, to compare with: the same methods configured as its users would, and as a side of the contract."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.calls import argument_names, cache_name
from featherweight.sites import is_classifier


def theirs(method: fw.Method, model: Any) -> Any:
    """One of our methods as HF PEFT configures it, with its own default modules."""
    kind: dict[str, Any] = {"task_type": peft.TaskType.CAUSAL_LM}
    if is_classifier(model):
        kind = {"task_type": peft.TaskType.SEQ_CLS}
    elif model.config.is_encoder_decoder:
        kind = {"task_type": peft.TaskType.SEQ_2_SEQ_LM}
    match method:
        case fw.LoRA():
            named = targets("lora", model)
            if method.target_modules:
                named["target_modules"] = method.target_modules
            return peft.LoraConfig(
                **kind, r=method.r, lora_alpha=method.lora_alpha, use_rslora=method.use_rslora, **named
            )
        case fw.AdaLoRA():
            sizes = {"init_r": method.init_r, "target_r": method.target_r, "lora_alpha": method.lora_alpha}
            return peft.AdaLoraConfig(**kind, **sizes, total_step=10, **targets("adalora", model))
        case fw.PromptTuning():
            return peft.PromptTuningConfig(**kind, num_virtual_tokens=method.num_virtual_tokens)
        case fw.PTuning():
            width = method.encoder_hidden_size
            return peft.PromptEncoderConfig(
                **kind, num_virtual_tokens=method.num_virtual_tokens, encoder_hidden_size=width
            )
        case fw.PrefixTuning():
            return peft.PrefixTuningConfig(**kind, num_virtual_tokens=method.num_virtual_tokens, **geometry(model))
        case fw.IA3():
            return peft.IA3Config(**kind, **targets("ia3", model))
    raise ValueError(f"peft has no {method}")


def targets(method: str, model: Any) -> dict[str, Any]:
    """Modules for the few architectures that HF PEFT has no default names for, or names that no longer exist."""
    kind = model.config.model_type
    if kind == "phi3":
        both = {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        return both if method == "ia3" else {"target_modules": ["qkv_proj"]}
    if kind == "modernbert":
        both = {"target_modules": ["Wqkv", "mlp.Wo"], "feedforward_modules": ["mlp.Wo"]}
        return both if method == "ia3" else {"target_modules": ["Wqkv"]}
    if kind == "mixtral" and method == "lora":  # without names HF PEFT 0.21 finds none: it looks for experts first
        return {"target_modules": ["q_proj", "v_proj"]}
    if kind == "mixtral" and method == "ia3":
        return {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    if kind in ("mistral", "mixtral") and method == "adalora":
        return {"target_modules": ["q_proj", "v_proj"]}
    return {"fan_in_fan_out": kind == "gpt2"}  # GPT-2 keeps its weights transposed; HF PEFT wants to be told


def geometry(model: Any) -> dict[str, Any]:
    """HF PEFT takes the width for heads × head size; where that is wrong (T5's `d_kv`) its user must say so."""
    size = getattr(model.config, "d_kv", None)
    return {} if size is None else {"token_dim": model.config.num_heads * size}


def cannot(model: Any, method: str) -> str | None:
    """Why HF PEFT 0.21 has no such adapter for this model, where it has one with an older transformers; None: it has."""
    if method == "prefix_tuning" and is_classifier(model) and cache_name(argument_names(model.base_model)) == "cache":
        return "HF PEFT looks for past_key_values, which transformers calls cache from 5.24 on"
    return None


class Theirs:
    """The real peft as a side of the contract."""

    def adapt(self, base: Any, method: str, seed: int = 1) -> Any:
        from subjects import METHODS

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.get_peft_model(base, theirs(METHODS[method], base)).eval()

    def learned(self, model: Any) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def logits(self, model: Any, **inputs: Any) -> Tensor:
        """Without the virtual tokens, whose logits it returns in front of a decoder's."""
        out: Tensor = model(**inputs).logits
        decoder = not model.config.is_encoder_decoder and out.dim() == 3
        return out[:, -inputs["input_ids"].shape[1] :] if decoder else out

    def plain(self, model: Any) -> AbstractContextManager[None]:
        disabled: AbstractContextManager[None] = model.disable_adapter()
        return disabled

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, base: Any, folder: Path) -> Any:
        return peft.PeftModel.from_pretrained(base, folder)

    def merge(self, model: Any) -> None:
        model.merge_adapter()

    def unmerge(self, model: Any) -> None:
        model.unmerge_adapter()


THEIRS = Theirs()
