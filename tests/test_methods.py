"""Targets, hyper-parameters and the ways of calling an adapted model that the contract (`contract.py`) does not ask about."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, OPTConfig, OPTForCausalLM

import featherweight as fw
import models
from featherweight import sites
from featherweight.adapter import parts, trainable
from featherweight.calls import argument_names, cache_name
from models import (
    DECODERS,
    FAMILIES,
    logits,
    padded,
    random_inputs,
    shake,
    words,
)
from subjects import METHODS

every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_decoder = pytest.mark.parametrize("family", DECODERS)


def adapted(family: str, method: str) -> Any:
    """A model with an adapter that is as if it had been trained: its output is not the base's."""
    model = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fw.attach(model, METHODS[method])
    shake(trainable(model))
    return model


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- attaching, switching, detaching ------------------------------------------------------------------------------


def test_two_adapters_of_one_model_are_told_apart_and_composed() -> None:
    model = adapted("llama", "lora")
    inputs = random_inputs(model)
    one = logits(model, **inputs)
    fw.attach(model, fw.IA3(), "other")
    shake(trainable(model, "other"))
    both = logits(model, **inputs)
    fw.live(model, "other")
    other = logits(model, **inputs)
    assert not torch.equal(both, one)
    assert not torch.equal(both, other)
    fw.live(model, "default")
    assert torch.equal(logits(model, **inputs), one)
    fw.detach(model, "other")
    assert torch.equal(logits(model, **inputs), one)
    assert list(fw.attached(model)) == ["default"]


def test_a_taken_name_and_an_unknown_name_are_refused() -> None:
    model = adapted("llama", "lora")
    with pytest.raises(fw.InputError, match="already attached"):
        fw.attach(model, fw.IA3())
    with pytest.raises(fw.InputError, match=r"no adapter named 'x'; attached: default"):
        fw.live(model, "x")
    with pytest.raises(fw.InputError, match=r"no adapter named 'x'; attached: default"):
        fw.detach(model, "x")


# --- generating ---------------------------------------------------------------------------------------------------


def greedy(model: Any, inputs: dict[str, Tensor], *, use_cache: bool = True) -> Tensor:
    """Eight new tokens; the end token is not allowed to cut them short."""
    new = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    out: Tensor = model.generate(**inputs, **new, use_cache=use_cache)
    return out if model.config.is_encoder_decoder else out[:, inputs["input_ids"].shape[1] :]


@every_method
@every_family
def test_generation_writes_what_the_forward_pass_ranks_first(family: str, method: str) -> None:
    model = adapted(family, method)
    ids = words(2, 6)
    written = greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if family in DECODERS:
        scores = logits(model, input_ids=torch.cat([ids, written], dim=1))[:, ids.shape[1] - 1 : -1]
    else:
        scores = logits(model, input_ids=ids, decoder_input_ids=written)[:, :-1]
        written = written[:, 1:]
    scores[..., models.EOS] = -torch.inf  # not allowed within the first eight
    assert torch.equal(scores.argmax(-1), written)


@every_method
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_generation_outgrows_a_sliding_window_in_the_same_way_with_and_without_a_cache(
    family: str, method: str
) -> None:
    config = FAMILIES[family]().config
    config.sliding_window = 6  # shorter than the prompts and prefixes too
    model = models.build(type(FAMILIES[family]()), config)
    fw.attach(model, METHODS[method])
    shake(trainable(model))
    ids = words(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))


# --- padding and positions ----------------------------------------------------------------------------------------


@every_method
@every_decoder
def test_embeddings_may_be_given_in_place_of_tokens(family: str, method: str) -> None:
    model = adapted(family, method)
    ids = words(2, 7)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    assert torch.equal(logits(model, inputs_embeds=embeds), logits(model, input_ids=ids))


@every_method
@every_decoder
def test_a_row_read_in_two_pieces_gives_the_same_logits(family: str, method: str) -> None:
    model = adapted(family, method)
    ids = words(2, 8)
    whole = logits(model, input_ids=ids)
    cache = cache_name(argument_names(model)) or ""
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(
            input_ids=ids[:, 5:],
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(5, 8).expand(2, -1),
            **{cache: first[cache]},
        )
    close(torch.cat([first.logits, second.logits], dim=1), whole)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_prompt_refuses_a_mask_that_it_cannot_lengthen(method: str) -> None:
    model = adapted("llama", method)
    with pytest.raises(fw.InputError, match="attention mask"):
        model(input_ids=words(1, 3), attention_mask=torch.ones(1, 1, 3, 3))


# --- hyper-parameters and targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        (fw.LoRA, {"r": 0}, "r must be at least 1, not 0"),
        (fw.LoRA, {"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), not 1.0"),
        (fw.LoRA, {"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), not -0.1"),
        (fw.PromptTuning, {"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, not 0"),
        (fw.PromptTuning, {"prompt_tuning_init": "ZERO"}, "prompt_tuning_init must be TEXT, SAMPLE_VOCAB or RANDOM"),
        (fw.PTuning, {"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, not 0"),
        (fw.PTuning, {"encoder_hidden_size": 0}, "encoder_hidden_size must be at least 1, not 0"),
        (fw.PTuning, {"encoder_reparameterization_type": "LSTM"}, "must be MLP, not 'LSTM'"),
        (fw.PrefixTuning, {"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, not 0"),
        (fw.PrefixTuning, {"init_weights": "one"}, "init_weights must be text, zero or none, not 'one'"),
        (fw.AdaLoRA, {"init_r": 4}, "target_r must be at most init_r=4, not 8"),
        (fw.AdaLoRA, {"beta1": 1.0}, "beta1 must be between 0 and 1, not 1.0"),
        (fw.AdaLoRA, {"deltaT": 0}, "deltaT must be at least 1, not 0"),
        (fw.AdaLoRA, {"tinit": 60, "tfinal": 40, "total_step": 100}, "tinit=60 and tfinal=40 leave none of 100 steps"),
        (fw.AdaLoRA, {"rank_pattern": {"q.lora_E": [True]}}, "rank_pattern must have init_r=12 values for every layer"),
        (fw.IA3, {"target_modules": ("k",), "feedforward_modules": ("wo",)}, "must be among target_modules: wo is not"),
    ],
)
def test_wrong_hyper_parameters_are_refused_by_name(method: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(fw.InputError, match=message):
        method(**wrong)


def test_all_errors_of_a_method_are_told_at_once() -> None:
    with pytest.raises(fw.InputError, match=r"LoRA: r must be at least 1, not 0; lora_dropout must be in \[0, 1\)"):
        fw.LoRA(r=0, lora_dropout=2)


def test_a_prompt_that_starts_from_a_text_asks_for_a_tokenizer() -> None:
    for method in (
        fw.PromptTuning(prompt_tuning_init_text="Hi"),
        fw.PTuning(init_text="Hi"),
        fw.PrefixTuning(init_text="Hi"),
    ):
        with pytest.raises(fw.InputError, match="needs a tokenizer"):
            fw.attach(models.llama(), method)


def test_a_short_text_is_repeated_and_a_long_one_cut() -> None:
    method = fw.attach(
        models.llama(), fw.PromptTuning(num_virtual_tokens=5, prompt_tuning_init_text="x"), encode=list_of
    )
    assert method.init_ids == (7, 8, 7, 8, 7)
    method = fw.attach(models.llama(), fw.PTuning(num_virtual_tokens=1, init_text="x"), encode=list_of)
    assert method.init_ids == (7,)


def list_of(_: str) -> list[int]:
    return [7, 8]


def test_an_unknown_target_is_refused_with_the_names_that_are_near() -> None:
    with pytest.raises(fw.InputError, match=r"no module 'q_prj'; did you mean 'q_proj'"):
        fw.attach(models.llama(), fw.LoRA(target_modules=("q_prj",)))
    with pytest.raises(fw.InputError, match=r"no module 'zzz'; there are: .*k_proj.*v_proj.*\(or \"all-linear\"\)"):
        fw.attach(models.llama(), fw.LoRA(target_modules=("q_proj", "zzz")))


def test_a_refused_adapter_leaves_the_model_as_it_was() -> None:
    model = models.llama()
    with pytest.raises(fw.InputError):
        fw.attach(model, fw.LoRA(target_modules=("q_proj", "zzz")))
    assert not fw.attached(model)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model) is type(models.llama())


def test_a_target_that_is_not_linear_is_refused() -> None:
    with pytest.raises(fw.InputError, match="only linear layers can be adapted"):
        fw.attach(models.llama(), fw.LoRA(target_modules=("self_attn",)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("down_proj", "'down_proj' is one fused tensor of all experts of model.layers"),
        ("experts", "is a MixtralExperts"),
    ],
)
def test_fused_experts_are_refused_by_name(target: str, message: str) -> None:
    with pytest.raises(fw.InputError, match=message):
        fw.attach(models.mixtral(), fw.LoRA(target_modules=(target,)))


def test_a_regular_expression_matches_whole_paths() -> None:
    model = models.llama()
    fw.attach(model, fw.LoRA(target_modules=r".*layers\.1\..*_proj"))
    assert set(parts(model)) == {
        f"model.layers.1.{block}_proj" for block in
        ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }  # fmt: skip


def test_a_regular_expression_that_matches_nothing_or_is_broken_is_refused() -> None:
    with pytest.raises(fw.InputError, match="this model has no module 'layers"):
        fw.attach(models.llama(), fw.LoRA(target_modules=r"layers\..*"))
    with pytest.raises(fw.InputError, match="not a valid regular expression"):
        fw.attach(models.llama(), fw.LoRA(target_modules="(q_proj"))


@every_family
def test_all_linear_adapts_every_linear_layer_but_the_head(family: str) -> None:
    model = FAMILIES[family]()
    head = model.get_output_embeddings()
    expected = {p for p, m in model.named_modules() if isinstance(m, (nn.Linear, sites.Conv1D)) and m is not head}
    inputs = random_inputs(model)
    before = logits(model, **inputs)
    fw.attach(model, fw.LoRA(r=2, target_modules="all-linear"))
    assert set(parts(model)) == expected
    assert torch.equal(logits(model, **inputs), before)


def test_an_unknown_architecture_is_told_what_could_be_targeted() -> None:
    model = nn.Module()
    model.__dict__["config"] = SimpleNamespace(model_type="newcomer", is_encoder_decoder=False)
    model.mix, model.out = nn.Linear(4, 4), nn.Linear(4, 4)
    for method in (fw.LoRA(), fw.IA3(), fw.AdaLoRA()):
        with pytest.raises(fw.InputError, match=r"architecture 'newcomer'; set target_modules .*: mix, out"):
            fw.attach(model, method)
    for method in (METHODS["prompt_tuning"], METHODS["p_tuning"], METHODS["prefix_tuning"]):
        with pytest.raises(fw.InputError, match="not a transformers model"):
            fw.attach(model, method)
    fw.attach(model, fw.LoRA(target_modules=("mix",)))
    assert set(parts(model)) == {"mix"}


def test_a_newcomer_with_the_usual_names_is_adapted_where_they_are() -> None:
    model = models.llama()
    model.config.model_type = "newcomer"
    fw.attach(model, fw.LoRA())
    assert {p.rsplit(".", 1)[-1] for p in parts(model)} == {"q_proj", "v_proj"}
    fw.detach(model)
    fw.attach(model, fw.IA3())
    assert {p.rsplit(".", 1)[-1] for p in parts(model)} == {"k_proj", "v_proj", "down_proj"}


# --- on disk ------------------------------------------------------------------------------------------------------


def test_a_loaded_p_tuning_goes_on_training_its_prompt_alone(tmp_path: Path) -> None:
    fw.save(adapted("llama", "p_tuning"), tmp_path / "adapter")
    model = models.llama()
    fw.load(model, tmp_path / "adapter")
    assert [tuple(p.shape) for p in trainable(model)] == [(24, models.WIDTH)]
    model(**random_inputs(model)).logits.sum().backward()
    assert all(p.grad is not None for p in trainable(model))


@pytest.mark.parametrize("method", [fw.LoRA(target_modules="v_proj"), fw.IA3(target_modules="v_proj")])
def test_a_single_word_is_a_name_not_a_pattern(method: fw.Method) -> None:
    model = FAMILIES["llama"]()
    resolved = fw.attach(model, method)
    assert resolved.target_modules == ("v_proj",)
    assert all(path.endswith(".v_proj") for path in parts(model))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_going_on_from_an_earlier_generation_is_refused_rather_than_skipping_words(method: str, rows: int) -> None:
    model, ids = adapted("llama", method), words(rows, 9)
    mask = torch.ones_like(ids)
    mask[1:, 0] = 0
    new: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **new)
    more = torch.cat([out.sequences, words(rows, 4, seed=1)], dim=1)
    mask = torch.cat([mask, mask.new_ones(rows, 7)], dim=1)
    cache = cache_name(argument_names(model)) or ""
    with pytest.raises(fw.InputError, match="leave the cache out"):
        model.generate(more, attention_mask=mask, **{cache: out[cache]}, **new)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_prompt_sits_where_opt_really_runs(method: str) -> None:
    config = OPTConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128, dropout=0.0, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = models.build(OPTForCausalLM, config)
    before = logits(model, **random_inputs(model))
    fw.attach(model, METHODS[method])
    assert not torch.equal(logits(model, **random_inputs(model)), before)
    model(**random_inputs(model)).logits.sum().backward()
    assert any(p.grad is not None for p in trainable(model))


def test_a_decoder_with_a_class_head_does_not_see_the_padding_through_a_prompt() -> None:
    config = models.llama().config
    config.num_labels = 3
    for method in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        model = models.build(LlamaForSequenceClassification, config).double()
        fw.attach(model, METHODS[method])
        shake(trainable(model))
        rows = [words(1, n, seed=n)[0] for n in (9, 4)]
        together = logits(model, **padded(rows, left=False))
        for row, scores in zip(rows, together, strict=True):
            close(scores, logits(model, input_ids=row[None])[0])


def test_embeddings_can_be_trained_as_a_whole() -> None:
    model = models.llama().bfloat16()
    inputs = random_inputs(model)
    before = logits(model, **inputs)
    fw.attach(model, fw.LoRA(r=2, modules_to_save=("embed_tokens",)))
    assert torch.equal(logits(model, **inputs), before)
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in parts(model)["model.embed_tokens"].parameters())


def test_a_row_of_padding_alone_is_refused_where_it_would_be_read_in_pieces() -> None:
    model = adapted("llama", "prefix_tuning").eval()
    inputs = padded([words(1, n, seed=n)[0] for n in (9, 4)], left=True)
    with pytest.raises(fw.InputError, match="no row may be padding alone"):
        model.generate(**inputs, max_new_tokens=4, prefill_chunk_size=3)
    with pytest.raises(fw.InputError, match="static cache"):
        model.generate(**inputs, max_new_tokens=4, cache_implementation="static")
