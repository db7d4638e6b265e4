"""Tiny random models of every family that the methods are tested on: built in code, nothing is fetched.

Weights are drawn ten times wider than usual, so that the models are far from linear and a wrong position, mask or
scale moves the logits by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MT5Config,
    MT5ForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, EOS, BOS = 0, 1, 2
VOCABULARY, WIDTH, LAYERS, HEADS, GROUPS = 97, 32, 2, 4, 2
SPREAD = 0.2
CLASSES = 3

_SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "max_position_embeddings": 128,
    "initializer_range": SPREAD, **_SPECIAL,
}  # fmt: skip
_T5_LIKE = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_ff": 48, "num_layers": LAYERS, "num_decoder_layers": LAYERS,
    "num_heads": HEADS, "dropout_rate": 0.0, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD,
}  # fmt: skip


def build(cls: Callable[[Any], Any], config: Any) -> Any:
    """The same random weights every time, ready to evaluate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval()
    if model.can_generate():
        model.generation_config.pad_token_id = PAD
    return model


def llama() -> Any:
    """Grouped queries: fewer key–value heads than heads."""
    return build(LlamaForCausalLM, LlamaConfig(**_LLAMA_LIKE))


def mistral() -> Any:
    return build(MistralForCausalLM, MistralConfig(**_LLAMA_LIKE))


def mixtral() -> Any:
    """Four experts, two of them for each token; their weights are fused, no linear layers of their own."""
    config = MixtralConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"  # the fused kernel knows no float64
    return build(MixtralForCausalLM, config)


def qwen3() -> Any:
    """Heads × head size is not the width."""
    return build(Qwen3ForCausalLM, Qwen3Config(**_LLAMA_LIKE, head_dim=16))


def gemma3() -> Any:
    """Scaled embeddings; one layer of sliding and one of full attention."""
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**_LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=64, layer_types=layers)
    return build(Gemma3ForCausalLM, config)


def phi3() -> Any:
    """q, k and v in one projection, gate and up in another."""
    return build(Phi3ForCausalLM, Phi3Config(**_LLAMA_LIKE))


def gpt2() -> Any:
    """Transposed weights (`Conv1D`) and learned positions."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=128, initializer_range=SPREAD,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **_SPECIAL,
    )  # fmt: skip
    return build(GPT2LMHeadModel, config)


def gpt_neox() -> Any:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=128, initializer_range=SPREAD, **_SPECIAL,
    )  # fmt: skip
    return build(GPTNeoXForCausalLM, config)


def t5() -> Any:
    return build(T5ForConditionalGeneration, T5Config(**_T5_LIKE, d_kv=8))


def mt5() -> Any:
    """A gated feed-forward; heads × head size is not the width."""
    return build(MT5ForConditionalGeneration, MT5Config(**_T5_LIKE, d_kv=16, feed_forward_proj="gated-gelu"))


def bart() -> Any:
    """Learned positions on both sides."""
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, max_position_embeddings=128,
        init_std=SPREAD, dropout=0.0, decoder_start_token_id=EOS, forced_eos_token_id=None, **_SPECIAL,
    )  # fmt: skip
    return build(BartForConditionalGeneration, config)


_ENCODER_LIKE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 128, "initializer_range": SPREAD, "num_labels": CLASSES, **_SPECIAL,
}  # fmt: skip
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> Any:
    """A pooler, and one linear layer that chooses the class."""
    return build(BertForSequenceClassification, BertConfig(**_ENCODER_LIKE, **_NO_DROPOUT))


def roberta() -> Any:
    """A head of two layers; positions are counted from behind the padding's."""
    return build(RobertaForSequenceClassification, RobertaConfig(**_ENCODER_LIKE, **_NO_DROPOUT))


def modernbert() -> Any:
    """Rotary positions, local and global attention, and a mean over the tokens that the head reads."""
    config = ModernBertConfig(
        **_ENCODER_LIKE, cls_token_id=BOS, sep_token_id=EOS, classifier_pooling="mean", global_attn_every_n_layers=2,
        local_attention=8,
    )  # fmt: skip
    return build(ModernBertForSequenceClassification, config)


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "phi3": phi3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
}
ENCODER_DECODERS: dict[str, Callable[[], Any]] = {"t5": t5, "mt5": mt5, "bart": bart}
CLASSIFIERS: dict[str, Callable[[], Any]] = {"bert": bert, "roberta": roberta, "modernbert": modernbert}
FAMILIES = DECODERS | ENCODER_DECODERS


def words(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(BOS + 1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_inputs(model: Any, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Full rows of random words, and for an encoder–decoder what its decoder has written so far."""
    ids = words(rows, length, seed)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        written = words(rows, 5, seed + 1)
        written[:, 0] = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = written
    return inputs


def padded(rows: list[Tensor], left: bool) -> dict[str, Tensor]:
    """Rows of unequal length as one batch with its mask."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    """The model's logits, without gradients."""
    out: Tensor = model(**inputs).logits
    return out


@torch.no_grad()
def shake(parameters: Any, spread: float = 0.1, seed: int = 7) -> None:
    """Add noise, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=generator) * spread)
