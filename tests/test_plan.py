"""The plan: what is simulated is what happens, and it says so in one line when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import featherweight as fw
import models
import tiny
from command import Cli, complaint
from featherweight.adapter import attach
from featherweight.base import Base
from featherweight.engine.batches import keeps_apart
from featherweight.engine.lean import lean
from featherweight.engine.optimizers import OPTIMIZERS
from featherweight.engine.train import Settings
from featherweight.plan import simulate as simulation
from featherweight.plan.cards import CARDS, find_card, read_bytes
from featherweight.plan.estimate import Target, Tricks, choose, predict, sets_for
from featherweight.plan.follow import Follower
from featherweight.plan.simulate import simulate, watch_update, watch_writing
from featherweight.scoring import NEW_TOKENS, generate_from
from featherweight.vocabulary import PIECE, TABLE
from subjects import METHODS, examples

FAMILIES = ("llama", "t5", "bert")


def real(family: str, method: fw.Method, implementation: str = "eager") -> Base:
    model = models.FAMILIES[family]() if family in models.FAMILIES else models.CLASSIFIERS[family]()
    model.requires_grad_(False)
    model.set_attn_implementation(implementation)
    attach(model, method)
    return Base(model, SimpleNamespace(pad_token_id=0), "tiny", torch.device("cpu"))


def followed(base: Base, rows: Any, settings: Settings, packing: bool, **kwargs: Any) -> Follower:
    follower = Follower()
    watch_update(base, settings, rows, follower, packing, settings.batch_size, **kwargs)
    return follower


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kept", ["none", "layer"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_simulated_tensors_are_those_of_a_real_step(family: str, name: str, kept: str) -> None:
    base = real(family, METHODS[name])
    rows = examples(base.model, lengths=(40, 31, 64, 50, 22, 37, 48, 60))
    settings = Settings(batch_size=8, checkpoint_activations=kept)
    packing = keeps_apart(base)
    happened = followed(base, rows, settings, packing)
    found = simulate(base.model.config, METHODS[name], settings, rows, dtype=torch.float32, whole=True)
    for phase, parts in happened.peaks().items():
        assert sum(found.phases[phase].values()) == pytest.approx(sum(parts.values()), rel=0.01), phase


def highest(follower: Follower) -> int:
    return max(sum(parts.values()) for parts in follower.peaks().values())


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5"])
def test_writing_answers_needs_what_is_simulated(family: str, name: str) -> None:
    base = real(family, METHODS[name])
    base.model.generation_config.eos_token_id = None  # it writes to the end
    base.model.generation_config.pad_token_id = 0
    base.tokenizer.batch_decode = lambda ids, **_: [""] * len(ids)
    rows = examples(base.model, lengths=(40, 31, 22, 37))
    watched, wrote = Follower(), Follower()
    watch_writing(base, rows, watched)
    found = simulate(
        base.model.config, METHODS[name], Settings(), rows, dtype=torch.float32, whole=True, evaluation="texts"
    )
    assert found.bytes == pytest.approx(highest(watched), rel=0.01)
    with torch.no_grad(), lean(base.model), simulation._telling(base, wrote), wrote:
        generate_from(base, [row.prompt for row in rows], NEW_TOKENS)
    assert found.bytes == pytest.approx(highest(wrote), rel=0.05)


def test_answers_that_are_texts_are_planned_as_texts(
    fw_cli: Cli, llama: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[Any]()

    def watch(base: Base, rows: Any, follower: Follower) -> None:
        seen.extend(rows)
        watch_writing(base, rows, follower)

    monkeypatch.setattr(simulation, "watch_writing", watch)
    monkeypatch.setattr("featherweight.plan.verb.sets_for", lambda _: [Tricks()])
    tiny.write(in_tmp / "talk.jsonl", tiny.requests())
    tiny.write(in_tmp / "reviews.csv", tiny.reviews())
    for data, writes in (("reviews.csv", False), ("talk.jsonl", True)):
        done = fw_cli("plan", "--model", llama, "--data", data, "--memory", "4GB", "--method", "ia3")
        assert done.code == 0, done.err
        assert bool(seen) == writes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_planned(name: str) -> None:
    config = models.FAMILIES["llama"]().config
    rows = examples(models.FAMILIES["llama"]())
    states = {
        kind: simulate(config, fw.LoRA(r=8), Settings(optimizer=kind), rows).parts.get("optimiser", 0)
        for kind in ("adamw", name)
    }
    assert states[name] <= states["adamw"]
    assert (states[name] == 0) == (name == "sgd")


def llama(layers: int = 12, **more: Any) -> Any:
    """A Llama deep enough for its layers to be worth something."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        **{"intermediate_size": 160, **more},
    )  # fmt: skip


def test_a_deep_model_is_the_line_through_two_shallow_ones() -> None:
    rows = examples(models.FAMILIES["llama"]())
    drawn = simulate(llama(), fw.LoRA(r=8), Settings(), rows)
    whole = simulate(llama(), fw.LoRA(r=8), Settings(), rows, whole=True)
    assert drawn.bytes == pytest.approx(whole.bytes, rel=0.005)
    assert drawn.parameters == whole.parameters
    assert drawn.trained == whole.trained


def test_more_rows_need_more_and_computing_again_needs_less() -> None:
    rows = examples(models.FAMILIES["llama"]())

    def needed(**more: Any) -> int:
        settings = Settings(**{"batch_size": 6, "checkpoint_activations": "none", **more})
        return simulate(llama(), fw.LoRA(r=8), settings, rows[: settings.batch_size]).bytes

    assert needed(batch_size=1) < needed(batch_size=3) < needed()
    assert needed(checkpoint_activations="layer") < needed()


def test_quantised_and_streamed_weights_are_smaller() -> None:
    rows, target = examples(models.FAMILIES["llama"]()), Target("a card", 2**30, cpu=False)

    def weights(tricks: Tricks) -> int:
        return predict(llama(), fw.LoRA(r=8), Settings(), rows, target, tricks).parts["weights"]

    assert weights(Tricks(quantize="nf4")) < 0.6 * weights(Tricks())
    assert weights(Tricks(quantize="int8")) < 0.8 * weights(Tricks())
    assert weights(Tricks(stream="ram")) < 0.3 * weights(Tricks())  # two layers of twelve, and the embeddings


def test_what_is_quantised_on_a_card_must_be_there_while_it_is_loaded() -> None:
    shape, rows = llama(12, intermediate_size=4096), examples(models.FAMILIES["llama"]())[:1]
    whole, card = (
        predict(shape, fw.LoRA(), Settings(), rows, Target("a card", 8 << 30, cpu=False), tricks)
        for tricks in (Tricks("layer", "nf4"), Tricks("layer", "nf4", "ram"))
    )
    assert card.parts["weights"] < whole.parts["weights"] / 2
    assert card.high >= whole.parts["weights"] + card.parts["process"] > card.bytes


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_on_the_host_leaves_a_table_of_words_and_pieces_of_the_head(tied: bool) -> None:
    shape, rows = llama(2, tie_word_embeddings=tied), examples(models.FAMILIES["llama"]())
    shape.vocab_size, shape.hidden_size, shape.head_dim = 200_000, 512, 128
    target = Target("a card", 8 << 30, cpu=False)
    there, away = (
        predict(shape, fw.LoRA(), Settings(batch_size=2), rows[:2], target, tricks)
        for tricks in (Tricks(), Tricks(vocabulary=True))
    )
    matrix = 200_000 * 512 * 2
    gone = there.parts["weights"] - away.parts["weights"]
    assert gone == (matrix if tied else 2 * matrix) - TABLE
    assert away.parts["loss"] - there.parts["loss"] < 2 * PIECE + (32 << 20)
    assert away.parts["loss"] > 2 * PIECE
    assert away.flags == "--offload-vocabulary"
    assert away.parameters == there.parameters
    assert not any(t.vocabulary for t in sets_for(Target("this machine", 8 << 30, cpu=True)))


def test_what_is_chosen_fits_and_is_exact_where_that_is_possible() -> None:
    rows, settings = examples(models.FAMILIES["llama"]())[:2], Settings(batch_size=2)
    target = Target("a card", 0, cpu=False)
    highs = {
        tricks: predict(llama(4), fw.LoRA(r=8), settings, rows, target, tricks, micro=1).high
        for tricks in sets_for(target)
    }
    plenty = choose(llama(4), [fw.LoRA(r=8)], settings, rows, 2 * max(highs.values()))
    assert plenty.tricks == Tricks()
    tight = max(high for tricks, high in highs.items() if tricks.exact and tricks.stream == "none")
    found = choose(llama(4), [fw.LoRA(r=8)], settings, rows, tight)
    assert found.high <= tight
    assert found.tricks.exact
    least = choose(llama(4), [fw.LoRA(r=8)], settings, rows, min(highs.values()) // 2)
    assert least.high == min(highs.values())  # nothing fits


@pytest.mark.parametrize(("asked", "found"), [("RTX 4060 8GB", "RTX 4060 8GB"), ("rtx4090", "RTX 4090 24GB")])
def test_cards_are_found_however_they_are_written(asked: str, found: str) -> None:
    assert find_card(asked).name == found


def test_an_unknown_card_or_size_is_one_line() -> None:
    with pytest.raises(fw.InputError, match="RTX"):
        find_card("RTX 9999")
    with pytest.raises(fw.InputError, match="write it as 12GB"):
        read_bytes("much")
    assert read_bytes("1.5 GB") == 3 * 2**29
    assert len(CARDS) >= 20


def test_the_command_needs_a_configuration_alone(fw_cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(llama(3).to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    done = fw_cli("plan", "--model", file, "--gpu", "RTX 4060 8GB", "--length", "32", "--method", "lora,ia3")
    assert done.code == 0, done.err
    assert "It fits into the 8.0 GiB of RTX 4060 8GB." in done.out
    for word in ("weights", "activations", "optimiser", "nf4 + checkpoint layer", "(IA)³", "Best: featherweight train"):
        assert word in done.out
    ample = fw_cli("plan", "--model", file, "--memory", "8GB", "--length", "32", "--method", "lora")
    [best] = [line for line in ample.out.splitlines() if line.startswith("Best:")]
    assert best.endswith("--method lora")  # times are not known here, and no trick is needed
    small = fw_cli("plan", "--model", file, "--memory", "100MB", "--length", "32", "--method", "ia3")
    assert small.code == 1
    assert "does not fit into the 0.1 GiB" in small.out
    assert "give its folder or hub id" in complaint(fw_cli("plan", "--model", file, "--data", "rows.csv"))
