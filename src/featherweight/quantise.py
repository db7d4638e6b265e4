"""Quantise a base while it is loaded, so that it is never in memory in full.

    --quantize   each linear layer is kept as                                 bits a weight
    nf4          4-bit NormalFloat, its block scales quantised once more      4.13
    int8         LLM.int8(): whole numbers and one scale per row              8

Sources: QLoRA (arXiv 2305.14314, NF4 and double quantisation) and LLM.int8() (arXiv 2208.07339), as bitsandbytes has them.
transformers' own loader does the work: it reads one tensor at a time, quantises it, and drops the original.

Quantised are the linear layers of the stack, GPT-2's transposed ones too. Kept as they are: embeddings, norms, the output
head, what a classifier may have to train (its head and pooler), fused experts, and what transformers keeps in float32
for fear of overflow — T5's `wo`, whose weight tells T5 what to cast its input to.

When: the base does not fit, or only just. It is no faster: each product first unpacks its matrix. What it costs in memory,
time and gradients: `benchmarks/quantised_load.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from .errors import InputError

KINDS = ("none", "nf4", "int8")


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


def quantising(quantize: str, dtype: torch.dtype, device: torch.device, keep: Sequence[str]) -> dict[str, Any]:
    """What `from_pretrained` must be told to quantise while loading; nothing for `none`.

    `keep` are paths of modules that stay as they are, besides those that transformers leaves alone; none: the output head.
    """
    if quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    ways: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "int8": {"load_in_8bit": True},
    }  # fmt: skip
    config = BitsAndBytesConfig(**ways[quantize], llm_int8_skip_modules=list(keep) or None)
    return {"quantization_config": config, "device_map": {"": device}}
