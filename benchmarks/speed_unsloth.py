"""Unsloth: its own loading, its own LoRA, and the `Trainer`, padded. For `speed.py`, in a process of its own.

As for the other sides, activations are not computed again; Unsloth's own notebooks switch that on (`use_gradient_checkpointing="unsloth"`),
for less memory and more time, and use TRL's trainer.

It reads a model from a folder, so the random weights are written to one first, with a tokenizer of single bytes that nobody uses.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

import featherweight as fw
import speed_shapes
from speed_sides import HFTrainer


class Unsloth(HFTrainer):
    """The Trainer of `HFTrainer` around a model of Unsloth's."""

    def __init__(self, name: str, start: Path | None = None) -> None:
        from unsloth import FastLanguageModel

        work = speed_shapes.parsed(name)
        assert work, f"{name} is not of speed_shapes.py"
        with tempfile.TemporaryDirectory() as folder:
            base = speed_shapes.base_of(speed_shapes.Work(work.shape, "bf16", work.length, work.mixed))
            base.model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            device, tokenizer = base.device, base.tokenizer
            del base
            model, _ = FastLanguageModel.from_pretrained(
                folder, max_seq_length=work.length, dtype=torch.bfloat16, load_in_4bit=work.kind == "nf4"
            )
        self.base, self.more, self.bf16 = fw.Base(model, tokenizer, "Unsloth's", device), {}, True
        self.model = FastLanguageModel.get_peft_model(
            model, r=8, lora_alpha=8, lora_dropout=0, bias="none", target_modules=["q_proj", "v_proj"],
            use_gradient_checkpointing=False, random_state=0,
        )  # fmt: skip
        if start is not None:
            set_peft_model_state_dict(self.model, load_file(start / "adapter_model.safetensors"))


def byte_tokenizer() -> Any:
    """A tokenizer that needs no file: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")
