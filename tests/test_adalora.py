"""AdaLoRA: its schedule and allocator against HF PEFT's, its ranks over a run, and its ranks on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
import models
from featherweight.adapter import parts, trainable
from featherweight.method import Part, Retrained
from featherweight.methods.adalora import AdaLoRAPart
from models import FAMILIES, logits, random_inputs, shake
from tiny import reviews, save_llama, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # HF PEFT's call
    # HF PEFT takes the names of AdaLoRA's rank pattern for those of LoRA's, and warns; it then reads them well.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),  # so it calls a rank of 0
]

SITES = 4
"""q and v in two layers."""


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def own(model: Any) -> dict[str, AdaLoRAPart]:
    return {path: part for path, part in parts(model).items() if isinstance(part, AdaLoRAPart)}


def ranks(model: Any) -> list[int]:
    """Triplets with a Λ that is not zero, by layer."""
    return [int((part.lora_E != 0).sum()) for part in own(model).values()]


def cut_to(model: Any, wanted: list[int]) -> None:
    """As if training had allocated these ranks: the last triplets are cut, but in the second layer the first."""
    for i, (part, rank) in enumerate(zip(own(model).values(), wanted, strict=True)):
        order = torch.arange(len(part.kept))
        part.kept.copy_((order if i != 1 else order.flip(0)) < rank)
        part.allocated.fill_(True)
        with torch.no_grad():
            part.cut()


def allocated(family: str = "llama") -> Any:
    """An adapter of unequal ranks, one of them 0."""
    model = FAMILIES[family]()
    fw.attach(model, fw.AdaLoRA(init_r=5, target_r=2, lora_alpha=12).scheduled(20))
    shake(trainable(model))
    cut_to(model, ([0, 2, 5, 1] * len(own(model)))[: len(own(model))])
    return model


# --- the schedule ---------------------------------------------------------------------------------------------------


def test_the_phases_are_shares_of_the_run_unless_they_are_given() -> None:
    method = fw.AdaLoRA().scheduled(100)
    assert (method.tinit, method.tfinal, method.total_step) == (10, 30, 100)
    method = fw.AdaLoRA(tinit=0, tfinal=7).scheduled(50)
    assert (method.tinit, method.tfinal, method.total_step) == (0, 7, 50)


def test_a_schedule_for_another_number_of_steps_is_stretched() -> None:
    method = fw.AdaLoRA(tinit=200, tfinal=500, total_step=1000).scheduled(100)
    assert (method.tinit, method.tfinal, method.total_step) == (20, 50, 100)


@pytest.mark.parametrize("steps", range(1, 40))
def test_every_run_has_a_step_to_allocate_ranks_in(steps: int) -> None:
    method = fw.AdaLoRA().scheduled(steps)
    assert method.tinit is not None
    assert method.tfinal is not None
    assert method.tinit < steps - method.tfinal


def test_a_schedule_without_a_budgeting_phase_is_refused() -> None:
    with pytest.raises(fw.InputError, match="tinit=20 and tfinal=30 leave none of 50 steps to allocate ranks in"):
        fw.AdaLoRA(tinit=20, tfinal=30).scheduled(50)


# --- the allocator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tinit", "tfinal", "delta"), [(0, 0, 1), (3, 6, 1), (2, 5, 4)])
def test_the_allocator_cuts_what_that_of_hf_peft_cuts(tinit: int, tfinal: int, delta: int) -> None:
    """Weights and gradients of every step are the same random ones on both sides."""
    peft = pytest.importorskip("peft")
    schedule: dict[str, Any] = {"init_r": 6, "target_r": 2, "tinit": tinit, "tfinal": tfinal, "deltaT": delta}
    reference = peft.get_peft_model(
        models.llama(), peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=20, **schedule)
    )
    model = models.llama()
    method = fw.attach(model, fw.AdaLoRA(**schedule)).scheduled(20)
    theirs = dict(reference.base_model.model.named_parameters())
    generator, cuts = torch.Generator().manual_seed(0), 0
    for step in range(1, 21):
        for i, (path, part) in enumerate(own(model).items()):
            for name, p in part.named_parameters():
                twin = theirs[f"{path}.{name}.default"]
                move, p.grad = (torch.randn(p.shape, generator=generator) * 0.1 for _ in range(2))
                with torch.no_grad():
                    p.add_(move)
                    twin.copy_(p)
                p.grad *= 1 + i / 4  # some layers matter more
                twin.grad = p.grad.clone()
        reference.base_model.update_and_allocate(step)
        method.after_step(parts(model), step)
        pattern = reference.peft_config["default"].rank_pattern or {}
        for path, part in own(model).items():
            assert torch.equal(part.lora_E, theirs[f"{path}.lora_E.default"]), (step, path)
            assert part.kept.tolist() == pattern.get(f"{path}.lora_E.default", [True] * 6), (step, path)
        cuts += not all(all(part.kept) for part in own(model).values())
    assert cuts >= 12 // delta
    assert sum(ranks(model)) == 2 * SITES
    assert len(set(ranks(model))) > 1


def test_the_budget_is_kept_where_all_are_equally_unimportant() -> None:
    model = models.llama()
    method = fw.attach(model, fw.AdaLoRA(init_r=4, target_r=2)).scheduled(1)
    shake(trainable(model))
    method.after_step(parts(model), 1)
    assert sum(ranks(model)) == 2 * SITES


def test_nothing_is_cut_where_the_target_is_the_start() -> None:
    model = models.llama()
    method = fw.attach(model, fw.AdaLoRA(init_r=4, target_r=4)).scheduled(3)
    shake(trainable(model))
    for step in (1, 2, 3):
        method.after_step(parts(model), step)
    assert ranks(model) == [4] * SITES


def test_the_penalty_is_that_of_hf_peft_and_so_are_its_gradients() -> None:
    peft = pytest.importorskip("peft")
    inputs = random_inputs(models.llama())
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=6, total_step=9, orth_reg_weight=0.3)
    reference = peft.get_peft_model(models.llama(), config)
    model = models.llama()
    method = fw.attach(model, fw.AdaLoRA(init_r=6, target_r=2, orth_reg_weight=0.3))
    shake(trainable(model))
    theirs = dict(reference.base_model.model.named_parameters())
    for path, part in own(model).items():
        for name, p in part.named_parameters():
            theirs[f"{path}.{name}.default"].data.copy_(p)
    reference(**inputs, labels=inputs["input_ids"]).loss.backward()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    penalty = method.penalty(parts(model))
    assert penalty is not None
    (loss + penalty).backward()
    for path, part in own(model).items():
        for name, p in part.named_parameters():
            torch.testing.assert_close(p.grad, theirs[f"{path}.{name}.default"].grad, rtol=1e-4, atol=1e-6)


def test_a_retrained_head_has_neither_rank_nor_penalty() -> None:
    model = models.llama()
    method = fw.attach(model, fw.AdaLoRA(init_r=4, target_r=2)).scheduled(1)
    shake(trainable(model))
    mixed: dict[str, Part] = {"score": Retrained(nn.Linear(3, 2)), **parts(model)}
    assert torch.equal(method.penalty(mixed), method.penalty(parts(model)))  # type: ignore[arg-type]
    method.after_step(mixed, 1)
    assert sum(ranks(model)) == 2 * SITES
    assert method.config(model, mixed)["rank_pattern"].keys() == {f"{path}.lora_E" for path in own(model)}
    assert replace(method, orth_reg_weight=0).penalty(mixed) is None


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> tuple[fw.Base, fw.Task]:
    base = fw.load_base(str(save_llama(tmp_path / "base")), dtype="float32", device="cpu")
    return base, fw.load_task(str(write(tmp_path / "reviews.csv", reviews())))


def test_the_ranks_fall_over_a_run_to_the_target_and_stay_there(run: tuple[fw.Base, fw.Task], tmp_path: Path) -> None:
    base, task = run
    seen: list[int] = []
    by_layer: list[list[int]] = []

    def look(_: Any) -> None:
        by_layer.append(ranks(base.model))
        seen.append(sum(by_layer[-1]))

    report = fw.train(base, task, fw.AdaLoRA(init_r=6, target_r=2), steps=30, batch_size=4, lr=2e-2, on_step=look)
    assert report.stopped is None
    assert seen[:3] == [6 * SITES] * 3  # tinit
    assert seen == sorted(seen, reverse=True)
    assert all(a > b for a, b in pairwise(seen[3:9]))  # not in one blow
    assert seen[20:] == [2 * SITES] * 10  # tfinal, in which every layer keeps its own
    assert by_layer[20:] == [by_layer[20]] * 10
    assert len(set(by_layer[-1])) > 1  # the layers differ: that is the point
    assert sum(report.losses[-5:]) < sum(report.losses[:5])

    known = fw.attached(base.model)["default"]
    assert isinstance(known, fw.AdaLoRA)
    assert (known.tinit, known.tfinal, known.total_step) == (3, 9, 30)
    fw.train(base, task, steps=4, batch_size=4)  # trained on: the ranks stand
    assert ranks(base.model) == by_layer[-1]
    before = fw.evaluate(base, task).predictions
    fw.save(base.model, tmp_path / "adapter")
    fw.detach(base.model)
    fw.load(base.model, tmp_path / "adapter")
    assert fw.evaluate(base, task).predictions == before
    fw.train(base, task, steps=4, batch_size=4)
    assert ranks(base.model) == by_layer[-1]


def test_a_cut_triplet_can_come_back_before_the_ranks_stand() -> None:
    model = models.llama()
    where = r"model\.layers\.0\.self_attn\.q_proj"
    chosen = fw.AdaLoRA(init_r=2, target_r=1, tinit=0, tfinal=1, beta1=0.1, beta2=0.1, target_modules=where)
    method = fw.attach(model, chosen).scheduled(9)
    shake(trainable(model))
    (part,) = own(model).values()
    kept = []
    for step in range(1, 9):
        for p in part.parameters():
            p.grad = torch.full_like(p, 1e-3)
        with torch.no_grad():
            part.lora_E.fill_(0.1)  # as the optimiser may move a cut one
            part.lora_A.grad[0 if step < 6 else 1] = step  # type: ignore[index]
        method.after_step(parts(model), step)
        assert torch.equal(part.lora_E[:, 0] != 0, part.kept)
        kept.append(part.kept.tolist())
    assert kept[4] == [True, False]
    assert kept[7] == [False, True]


def test_an_update_without_a_schedule_is_refused() -> None:
    model = models.llama()
    method = fw.attach(model, fw.AdaLoRA())
    with pytest.raises(fw.InputError, match="needs a schedule"):
        method.after_step(parts(model), 1)


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_comes_back_from_disk_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = allocated(family)
    inputs = random_inputs(model)
    expected = logits(model, **inputs)
    fw.save(model, tmp_path / "once")
    again = FAMILIES[family]()
    fw.load(again, tmp_path / "once")
    assert torch.equal(logits(again, **inputs), expected)
    assert ranks(again) == ranks(model)
    fw.save(again, tmp_path / "twice")
    for file in ("adapter_model.safetensors", "adapter_config.json", "featherweight.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_an_adapter_that_was_interrupted_between_two_cuts_keeps_its_output(tmp_path: Path) -> None:
    model = allocated()
    for part in own(model).values():  # cut ones that came back to life
        part.allocated.fill_(False)
        shake([part.lora_E], seed=3)
    inputs = random_inputs(model)
    expected = logits(model, **inputs)
    fw.save(model, tmp_path)
    again = models.llama()
    fw.load(again, tmp_path)
    assert torch.equal(logits(again, **inputs), expected)


def test_only_the_triplets_that_are_left_are_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = allocated()
    fw.save(model, tmp_path)
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    for path, rank in zip(own(model), [0, 2, 5, 1], strict=True):
        d_out = model.get_submodule(path).out_features
        key = f"base_model.model.{path}"
        assert (shapes[f"{key}.lora_A"], shapes[f"{key}.lora_E"], shapes[f"{key}.lora_B"]) == (
            (rank, models.WIDTH), (rank, 1), (d_out, rank),
        )  # fmt: skip
    assert not any("ranknum" in key for key in shapes)


def test_an_adapter_of_hf_peft_that_aimed_above_its_rank_is_loaded_but_not_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, total_step=9)  # target_r is 8
    reference = peft.get_peft_model(models.llama(), config).eval()
    shake(p for p in reference.parameters() if p.requires_grad)
    reference.save_pretrained(tmp_path)
    ours = models.llama()
    method = fw.load(ours, tmp_path)
    same(logits(ours, **random_inputs(ours)), logits(reference, **random_inputs(ours)))
    with pytest.raises(fw.InputError, match="target_r must be at most init_r=4 to train, not 8"):
        method.scheduled(9)


def test_ranks_for_another_model_are_refused(tmp_path: Path) -> None:
    model = allocated()
    fw.save(model, tmp_path)
    method = replace(fw.AdaLoRA(), rank_pattern={"model.layers.7.self_attn.q_proj.lora_E": [True] * 12})
    with pytest.raises(fw.InputError, match=r"no adapted layer 'model\.layers\.7\.self_attn\.q_proj'"):
        fw.attach(models.llama(), method)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_that_differ_mean_the_same_in_hf_peft_in_both_directions(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = allocated(family)
    inputs = random_inputs(model)
    expected = logits(model, **inputs)
    fw.save(model, tmp_path / "ours")
    reference = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "ours").eval()
    same(logits(reference, **inputs), expected)
    reference.save_pretrained(tmp_path / "theirs")
    again = FAMILIES[family]()
    fw.load(again, tmp_path / "theirs")
    assert torch.equal(logits(again, **inputs), expected)
    assert ranks(again) == ranks(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_we_load_the_ranks_that_hf_peft_allocated(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = FAMILIES[family]()
    inputs = random_inputs(base)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    config = peft.AdaLoraConfig(
        task_type=kind, init_r=4, target_r=1, lora_alpha=6, total_step=8, tinit=2, tfinal=2, fan_in_fan_out=family == "gpt2"
    )  # fmt: skip
    reference = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-1)
    for step in range(1, 9):
        optimizer.zero_grad()
        reference(**inputs, labels=labels).loss.backward()
        optimizer.step()
        reference.base_model.update_and_allocate(step)
    expected = logits(reference.eval(), **inputs)
    reference.save_pretrained(tmp_path)
    ours = FAMILIES[family]()
    fw.load(ours, tmp_path)
    same(logits(ours, **inputs), expected)
    assert sum(ranks(ours)) == len(own(ours))
    assert family == "gpt2" or 0 in ranks(ours)


# --- merging --------------------------------------------------------------------------------------------------------


def test_the_merged_weight_does_what_the_part_does() -> None:
    part = AdaLoRAPart(7, 5, fw.AdaLoRA(init_r=4, target_r=2))
    shake(part.parameters(), spread=0.5)
    base, x = nn.Linear(7, 5), torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    weight, bias = part.merged(base.weight.detach(), base.bias.detach())
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), part(base, x))
    rounded, _ = part.merged(base.weight.detach().bfloat16(), None)
    assert rounded.dtype == torch.bfloat16


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.std())))
