"""Quantise a base while it is loaded, so that it is never in memory in full.

    --quantize   each linear layer is kept as                                 bits a weight
    nf4          4-bit NormalFloat, its block scales quantised once more      4.13
    int8         LLM.int8(): whole numbers and one scale per row              8

Sources: QLoRA (arXiv 2305.14314, NF4 and double quantisation) and LLM.int8() (arXiv 2208.07339), as bitsandbytes has them.
transformers' own loader does the work: it reads one tensor at a time, quantises it, and drops the original.

Quantised are the linear layers of the stack, GPT-2's transposed ones too. Kept as they are: embeddings, norms, the output
head, what a classifier may have to train (its head and pooler), fused experts, and what transformers keeps in float32
for fear of overflow — T5's `wo`, whose weight tells T5 what to cast its input to. In NF4 also layers whose inputs are no
multiple of 64: bitsandbytes 0.50 unpacks them wrongly on a CPU (it starts a new block with each row; the error is 26 % instead
of 9 % for 96 inputs), though few models have such.

A GGUF file is unpacked to bfloat16 once and kept in the cache, because transformers quantises safetensors only. That first time
the whole model is in memory; afterwards it loads like any other.

When: the base does not fit, or only just. It is no faster: each product first unpacks its matrix. What it costs in memory,
time and gradients: `benchmarks/quantised_load.py`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from .encoder import head_modules
from .errors import InputError
from .sites import features, is_classifier, is_linear

KINDS = ("none", "nf4", "int8")
BLOCK = 64
"""Weights that share a scale in NF4."""


def refuse_quantising(config: Any, quantize: str) -> None:
    """Raise `InputError` for what cannot be quantised so, judged by a model's configuration: no weights are needed."""
    if quantize not in KINDS:
        raise InputError(f"quantize {quantize!r} is unknown; there are: {', '.join(KINDS)}")
    if quantize == "none":
        return
    if (kind := stored_kind(config)) not in (None, quantize):
        raise InputError(
            f"--quantize {quantize}: this model is stored quantised already ({kind}), which cannot be changed; leave "
            f"--quantize out, or take the model that it was made from"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f'--quantize {quantize} needs bitsandbytes: pip install "featherweight[quant]"')


def stored_kind(config: Any) -> str | None:
    """How a checkpoint is quantised in its file: `nf4`, `int8`, or another way's name; None where it is not."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    told = told if isinstance(told, dict) else told.to_dict()
    if told.get("load_in_8bit"):
        return "int8"
    if told.get("load_in_4bit"):
        return str(told.get("bnb_4bit_quant_type", "fp4"))
    method = told.get("quant_method", "in a way that it does not name")
    return str(getattr(method, "value", method))


def quantising(quantize: str, dtype: torch.dtype, device: torch.device, skeleton: Any) -> dict[str, Any]:
    """What `from_pretrained` must be told to quantise while loading. `skeleton` is the model without weights.

    Raises `InputError` where nothing would be quantised.
    """
    from transformers import BitsAndBytesConfig

    kept = kept_dense(skeleton, quantize)
    if len(kept) == sum(map(is_linear, skeleton.modules())):
        raise InputError(
            f"--quantize {quantize}: this {type(skeleton).__name__} has no linear layer that could be quantised"
        )
    ways: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "int8": {"load_in_8bit": True},
    }  # fmt: skip
    config = BitsAndBytesConfig(**ways[quantize], llm_int8_skip_modules=kept)
    return {"quantization_config": config, "device_map": {"": device}}


def kept_dense(skeleton: Any, quantize: str) -> list[str]:
    """Paths of the linear layers that stay as they are, those that transformers keeps in float32 among them."""
    exact = tuple(getattr(skeleton, "_keep_in_fp32_modules", None) or ())
    heads = head_modules(skeleton) if is_classifier(skeleton) else ()
    head = skeleton.get_output_embeddings()
    return [
        path
        for path, m in skeleton.named_modules()
        if is_linear(m)
        and (
            m is head
            or path.endswith(exact)
            or any(f"{path}.".startswith(f"{h}.") for h in heads)
            or (quantize == "nf4" and features(m)[0] % BLOCK)
        )
    ]
