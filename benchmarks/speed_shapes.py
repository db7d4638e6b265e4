"""What `speed.py` trains on an accelerator: Llamas of known shapes with random weights, on rows of random tokens.

    1b-bf16-512         shape, type of the base, tokens of every row
    8b-nf4-2048-mixed   rows of a quarter to all of that: real data is mixed, and whoever pads pays for it

What a step costs depends on shapes, types and lengths, not on what the weights say; so nothing is fetched and nothing is read
from a disk. Every token but the first 16 of a row is learned. `tiny` is for trying the scripts out on a CPU.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

import featherweight as fw
from featherweight.base import skeleton
from featherweight.quant import make_dependable
from featherweight.quantise import quantising
from featherweight.rows import Row
from featherweight.tokens import IGNORE, Example

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "3b": {  # Llama-3.2-3B
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 16,
        "tie_word_embeddings": True, "vocab_size": 49_152,
    },
}  # fmt: skip
FIRST = ("1b-bf16-512", "8b-bf16-2048", "8b-nf4-2048")
SECOND = ("3b-bf16-1024", "3b-nf4-1024", "1b-bf16-512-mixed", "8b-bf16-2048-mixed", "8b-bf16-4096")
REST = tuple(
    name
    for length, kind, shape in itertools.product((512, 4096, 1024, 2048), ("bf16", "nf4"), ("1b", "8b", "3b"))
    if (name := f"{shape}-{kind}-{length}") not in FIRST + SECOND
)
WORK = FIRST + SECOND + REST
SMOKE = ("tiny-bf16-128", "tiny-bf16-128-mixed", "tiny-nf4-128")
TOKENS = {"8b": 4096}
"""Tokens of a batch, where not 8,192: two such models stand side by side on one card."""
ROWS = 8  # of a batch, at most


@dataclass(frozen=True)
class Work:
    """What a name says."""

    shape: str
    kind: str
    length: int
    mixed: bool

    @property
    def batch(self) -> int:
        """Rows of a batch."""
        return min(ROWS, TOKENS.get(self.shape, 8192) // self.length)


def parsed(name: str) -> Work | None:
    """The work of this name; None where the name is of another kind."""
    shape, _, rest = name.partition("-")
    if shape not in SHAPES:
        return None
    kind, length, *mixed = rest.split("-")
    return Work(shape, kind, int(length), mixed == ["mixed"])


def config_of(shape: str) -> Any:
    """The configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **{"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8192} | SHAPES[shape]
    )


def base_of(work: Work) -> fw.Base:
    """The same random weights in every process: made where they stay, in bfloat16 from the start, and quantised from that."""
    from transformers import LlamaForCausalLM

    config, device = config_of(work.shape), torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if work.kind == "nf4":
        model = in_nf4(model, config, device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # as `load_base` does; the rivals choose their own
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    return fw.Base(model.eval(), tokenizer, f"Llama of the shape {work.shape}, random weights", device)


def in_nf4(dense: Any, config: Any, device: torch.device) -> Any:
    """The same weights as `load_base(quantize="nf4")` would keep them: transformers quantises while it loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    told = quantising("nf4", torch.bfloat16, device, skeleton(config))
    model = type(dense).from_pretrained(
        None, config=config, state_dict=dense.state_dict(), dtype=torch.bfloat16, **told
    )
    make_dependable(model)
    return model


def rows_of(work: Work, base: fw.Base, n: int, seed: int = 0) -> list[Example]:
    """`n` rows of random tokens."""
    rng, words = random.Random(seed), range(2, base.model.config.vocab_size)
    rows = []
    for _ in range(n):
        ids = rng.choices(words, k=rng.randint(work.length // 4, work.length) if work.mixed else work.length)
        rows.append(Example(ids, [IGNORE] * 16 + ids[16:], ids[:16], Row((), "", "random")))
    return rows
