"""Parameter counts of a model as large as mt0-large, without its weights; and heads that are not the embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import MT5Config, PreTrainedTokenizerFast

import featherweight as fw
import models
from featherweight.base import skeleton
from models import logits, random_inputs

BASE = 1_229_581_312

ROWS: dict[str, tuple[fw.Method, int, int]] = {
    "lora": (fw.LoRA(), 1_231_940_608, 2_359_296),
    "prompt_tuning": (fw.PromptTuning(), 1_229_622_272, 40_960),
    "p_tuning": (fw.PTuning(), 1_229_902_080, 320_768),
    "prefix_tuning": (fw.PrefixTuning(), 1_230_564_352, 983_040),
    "ia3": (fw.IA3(), 1_229_863_936, 282_624),
}


def mt0_large() -> Any:
    """The shape of bigscience/mt0-large."""
    return MT5Config(
        d_model=1024, d_ff=2816, d_kv=64, num_heads=16, num_layers=24, num_decoder_layers=24, vocab_size=250112,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One skeleton for all rows: `attach` and `detach` leave it as it was."""
    return skeleton(mt0_large())


@pytest.mark.parametrize("method", ROWS)
def test_mt0_large_has_the_counts_that_are_published(model: nn.Module, method: str) -> None:
    assert sum(p.numel() for p in model.parameters()) == BASE
    adapter, total, trained = ROWS[method]
    fw.attach(model, adapter)
    assert fw.count(model) == (total, trained)
    assert all(p.is_meta for p in model.parameters())  # nothing was computed
    fw.detach(model)


def test_a_count_of_the_base_alone_has_nothing_to_train(model: nn.Module) -> None:
    assert fw.count(model) == (BASE, 0)


def test_a_skeleton_leaves_its_configuration_alone() -> None:
    config = mt0_large()
    before = config.to_dict()
    assert skeleton(config).config is not config
    assert config.to_dict() == before


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_skeleton_counts_what_the_model_counts(family: str) -> None:
    real = models.FAMILIES[family]()
    bare = skeleton(real.config)
    if family == "mt5":  # the real one's head was tied away: `skeleton` gives it back
        assert fw.count(bare)[0] == fw.count(real)[0] + models.VOCABULARY * models.WIDTH
    else:
        assert fw.count(bare) == fw.count(real)
    for method in (fw.LoRA(), fw.PromptTuning(), fw.PTuning(), fw.PrefixTuning(), fw.IA3()):
        fw.attach(real, method)
        fw.attach(bare, method)
        assert fw.count(bare)[1] == fw.count(real)[1]
        fw.detach(real)
        fw.detach(bare)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of as many words as the tiny models have."""
    vocabulary = {"<pad>": models.PAD, "</s>": models.EOS, "<s>": models.BOS}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), models.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<s>"
    ).save_pretrained(folder)


@pytest.fixture
def untied(tmp_path: Path) -> tuple[Any, Path]:
    """An mT5 with a head of its own, and the folder with its checkpoint."""
    model = models.mt5()
    head = torch.randn(models.VOCABULARY, models.WIDTH, generator=torch.Generator().manual_seed(3))
    model.lm_head.weight = nn.Parameter(head)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return model, tmp_path


def test_a_checkpoint_with_a_head_of_its_own_keeps_it(untied: tuple[Any, Path]) -> None:
    model, folder = untied
    assert not torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], model.shared.weight)
    base = fw.load_base(str(folder), dtype="float32", device="cpu")
    assert base.encoder_decoder
    assert fw.count(base.model)[0] == fw.count(model)[0]
    model.set_attn_implementation(base.model.config._attn_implementation)
    inputs = random_inputs(model)
    assert torch.equal(logits(base.model, **inputs), logits(model, **inputs))


def test_a_head_of_its_own_survives_a_claim_that_it_is_tied(untied: tuple[Any, Path]) -> None:
    model, folder = untied
    config = model.config
    config.tie_word_embeddings = True  # as the mT5 checkpoints on the hub say
    config.save_pretrained(folder)
    base = fw.load_base(str(folder), dtype="float32", device="cpu")
    assert torch.equal(base.model.get_output_embeddings().weight, model.lm_head.weight)
    assert base.model.get_output_embeddings().weight is not base.model.get_input_embeddings().weight


def test_a_head_of_its_own_is_found_in_a_checkpoint_of_several_files(untied: tuple[Any, Path]) -> None:
    model, folder = untied
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    base = fw.load_base(str(folder), dtype="float32", device="cpu")
    assert torch.equal(base.model.get_output_embeddings().weight, model.lm_head.weight)


def test_a_tied_checkpoint_stays_tied(tmp_path: Path) -> None:
    model = models.t5()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": model.shared.weight.detach().clone()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    base = fw.load_base(str(tmp_path), dtype="float32", device="cpu")
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
