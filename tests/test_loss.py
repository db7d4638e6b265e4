"""The loss at the labels alone, the order of the batches, and how a run ends."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import featherweight as fw
import models
from featherweight.adapter import snapshot, trainable
from featherweight.engine.batches import Batch, check_packing, collate, schedule
from featherweight.engine.loss import head_at, labelled_loss, logits_at
from featherweight.engine.train import Report, Settings, fit, rate_at
from featherweight.rows import Row
from featherweight.tokens import IGNORE, Example
from models import shake


def base_of(family: str) -> fw.Base:
    """A tiny model with a LoRA that has moved, and as much of a tokenizer as batches need."""
    model = models.FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fw.attach(model, fw.LoRA(r=4))
    shake(trainable(model))
    tokenizer = SimpleNamespace(pad_token_id=models.PAD, eos_token_id=models.EOS)
    return fw.Base(model, tokenizer, family, torch.device("cpu"))


def example(number: int, length: int, answered: int, *, encoder_decoder: bool = False) -> Example:
    """A row of random words that ends in some answered tokens."""
    read, answer = models.words(2, length, seed=number).tolist()
    answer = [*answer[: answered - 1], models.EOS]
    row = Row(spans=(("read", False), ("answer", True)), answer="answer", place=f"row {number}")
    if encoder_decoder:
        return Example(read, answer, read, row)
    return Example(read + answer, [IGNORE] * length + answer, read, row)


def batch_of(base: fw.Base) -> Batch:
    """Rows of unequal length, with one to four answered tokens."""
    shapes = ((5, 1), (11, 4), (3, 2))
    return collate(base, [example(i, n, m, encoder_decoder=base.encoder_decoder) for i, (n, m) in enumerate(shapes)])


def full_loss(model: Any, batch: Batch) -> Tensor:
    """The same loss from all logits, as textbooks compute it."""
    scores = model(**batch.inputs, use_cache=False).logits.float().flatten(0, 1)
    targets = torch.full((len(scores),), IGNORE)
    targets[batch.at] = batch.targets
    return F.cross_entropy(scores, targets, ignore_index=IGNORE)


def gradients(base: fw.Base, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trainable(base.model)))


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_loss_at_the_labels_is_the_loss_of_all_logits_and_so_are_its_gradients(family: str) -> None:
    base = base_of(family)
    batch = batch_of(base)
    assert len(batch.targets) == 7
    expected, loss = full_loss(base.model, batch), labelled_loss(base.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(base, loss), gradients(base, expected), strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("kind", ["cpu", "other"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_logits_in_chunks_give_the_loss_and_gradients_of_all_of_them(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU in place, elsewhere not."""
    monkeypatch.setattr("featherweight.engine.loss.AT_ONCE", {kind: 1})
    monkeypatch.setattr("featherweight.hardware.kind_of", lambda device: kind)
    base = base_of(family)
    rows = [example(i, 30, 30, encoder_decoder=base.encoder_decoder) for i in range(2)]  # 60 labels: chunks of 16
    batch = collate(base, rows)
    expected, loss = full_loss(base.model, batch), labelled_loss(base.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(base, loss), gradients(base, expected), strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_no_logits_are_kept() -> None:
    base = base_of("llama")
    batch = batch_of(base)
    labelled_loss(base.model, batch)  # the first call finds out that nothing comes after the head
    seen = []
    hook = base.model.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[0]))
    loss = labelled_loss(base.model, batch)
    hook.remove()
    assert seen == [0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        labelled_loss(base.model, batch)
    width = base.model.config.hidden_size
    assert (7, width) in kept
    assert (7, models.VOCABULARY) not in kept
    assert loss.isfinite()


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    base = base_of("llama")
    fw.detach(base.model)
    fw.attach(base.model, fw.LoRA(r=2, modules_to_save=("lm_head",)))
    batch = batch_of(base)
    expected, loss = full_loss(base.model, batch), labelled_loss(base.model, batch)
    for ours, theirs in zip(gradients(base, loss), gradients(base, expected), strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_gemmas_cap_on_logits_is_kept() -> None:
    base = base_of("gemma3")
    base.model.config.final_logit_softcapping = 0.5
    batch = batch_of(base)
    assert logits_at(base.model, batch.inputs, batch.at).abs().max() <= 0.5
    torch.testing.assert_close(labelled_loss(base.model, batch), full_loss(base.model, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_head_sees_everything_again_after_an_error(family: str) -> None:
    base = base_of(family)
    batch = batch_of(base)
    head = base.model.get_output_embeddings()
    with suppress(ZeroDivisionError), head_at(base.model, batch.at):
        assert head._forward_pre_hooks
        raise ZeroDivisionError
    assert not head._forward_pre_hooks
    with pytest.raises(ValueError, match="input_ids"):
        logits_at(base.model, {}, batch.at)
    assert not head._forward_pre_hooks
    read = batch.inputs.get("decoder_input_ids", batch.inputs["input_ids"])
    assert base.model(**batch.inputs).logits.shape[:2] == read.shape


def test_padding_does_not_change_the_loss() -> None:
    base = base_of("llama")
    rows = [example(0, 5, 2), example(1, 20, 2)]
    together = labelled_loss(base.model, collate(base, rows))
    alone = [labelled_loss(base.model, collate(base, [row])) for row in rows]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=0)


# --- the order of the batches -------------------------------------------------------------------------------------


ROWS = [example(i, 3 + i % 9, 1) for i in range(23)]


def order(batches: list[list[Example]]) -> list[list[str]]:
    return [[e.row.place for e in batch] for batch in batches]


@pytest.mark.parametrize(("rows", "size", "steps"), [(23, 4, 50), (23, 23, 3), (3, 8, 5), (1, 4, 2), (23, 4, 1)])
def test_a_schedule_has_exactly_its_steps_and_every_batch_is_full(rows: int, size: int, steps: int) -> None:
    batches = list(schedule(ROWS[:rows], size, steps, seed=0))
    assert len(batches) == steps
    assert {len(batch) for batch in batches} == {size}


def test_few_rows_are_not_put_next_to_themselves() -> None:
    """Rows are sorted by length within a window: one of many epochs would fill a batch with copies of one row."""
    rows = [example(n, 3 + n, 1) for n in range(40)]
    for batch in schedule(rows, 8, 50, seed=0):
        assert len({id(e) for e in batch}) == 8


def test_a_schedule_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first = order(list(schedule(ROWS, 4, 20, seed=1)))
    assert order(list(schedule(ROWS, 4, 20, seed=1))) == first
    assert order(list(schedule(ROWS, 4, 20, seed=2))) != first


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_every_row_comes_once_per_epoch(epochs: int) -> None:
    rows, size = ROWS[:20], 4
    seen = Counter(e.row.place for batch in schedule(rows, size, epochs * 5, seed=0) for e in batch)
    assert seen == {row.row.place: epochs for row in rows}


def test_rows_of_similar_length_share_a_batch() -> None:
    spreads = [
        max(len(e.ids) for e in batch) - min(len(e.ids) for e in batch) for batch in schedule(ROWS, 4, 23, seed=0)
    ]
    assert sum(spreads) / len(spreads) < 1.5  # drawn blindly it would be about 5


# --- the rate and the run -----------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_decays_to_near_zero() -> None:
    settings = Settings(steps=100, lr=1.0, warmup=0.1)
    rates = [rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_very_few_steps_has_rates_too(steps: int) -> None:
    rates = [rate_at(step, Settings(steps=steps, lr=1.0)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


SETTINGS = Settings(steps=8, batch_size=4, lr=1e-2)


def test_a_run_learns_and_leaves_the_base_as_it_was() -> None:
    base = base_of("llama")
    frozen = {n: p.clone() for n, p in base.model.named_parameters() if ".parts." not in n}
    report = fit(base, ROWS[:4], Settings(steps=30, batch_size=4, lr=2e-2))
    assert report.stopped is None
    assert report.steps == 30
    assert report.examples == 120
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert not base.model.training
    assert all(p.grad is None for p in base.model.parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in base.model.named_parameters() if n in frozen)


def test_two_runs_with_the_same_seed_are_the_same() -> None:
    reports = [fit(base_of("llama"), ROWS, SETTINGS) for _ in range(2)]
    assert reports[0].losses == reports[1].losses


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_last_good_adapter() -> None:
    base = base_of("llama")
    weight = base.model.model.layers[0].mlp.down_proj.weight
    healthy, after = weight.clone(), []

    def break_base(report: Report) -> None:
        after.append(snapshot(base.model))
        if report.steps == 3:
            weight.data[0, 0] = math.nan

    report = fit(base, ROWS, SETTINGS, on_step=break_base)
    assert report.stopped == "diverged"
    assert report.steps == 3
    assert all(math.isfinite(loss) for loss in report.losses)
    weight.data.copy_(healthy)
    left = snapshot(base.model)
    assert any(all(map(torch.equal, left, good)) for good in after[1:])  # of the second or third step
    assert math.isfinite(labelled_loss(base.model, collate(base, ROWS[:4])).item())


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_absurd_rate_ends_the_run_with_an_adapter_that_still_works(family: str, steps: int) -> None:
    base = base_of(family)
    rows = [example(i, 5, 2, encoder_decoder=base.encoder_decoder) for i in range(8)]
    report = fit(base, rows, Settings(steps=steps, batch_size=4, lr=1e30))
    assert report.stopped == "diverged"
    assert all(math.isfinite(loss) for loss in report.losses)
    assert all(bool(p.isfinite().all()) for p in trainable(base.model))
    assert math.isfinite(labelled_loss(base.model, collate(base, rows)).item())


def test_an_interrupted_run_keeps_a_usable_adapter_and_says_so() -> None:
    base = base_of("llama")
    start, after = snapshot(base.model), []

    def interrupt(report: Report) -> None:
        after.append(snapshot(base.model))
        if report.steps == 3:
            raise KeyboardInterrupt

    report = fit(base, ROWS, SETTINGS, on_step=interrupt)
    assert report.stopped == "interrupted"
    assert report.steps == 3
    left = snapshot(base.model)
    assert not all(map(torch.equal, left, start))
    assert any(all(map(torch.equal, left, good)) for good in after[1:])  # at most the last step is lost
    assert not base.model.training
    assert all(p.grad is None for p in base.model.parameters())
    assert fit(base, ROWS, SETTINGS).stopped is None  # it can go on


def test_an_error_of_the_callers_own_is_not_swallowed() -> None:
    base = base_of("llama")

    def fail(_: Report) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(base, ROWS, SETTINGS, on_step=fail)
    assert not base.model.training
    assert all(p.grad is None for p in base.model.parameters())


def test_a_run_without_rows_or_without_an_adapter_is_refused() -> None:
    base = base_of("llama")
    with pytest.raises(fw.InputError, match="no rows"):
        fit(base, [], SETTINGS)
    with pytest.raises(fw.InputError, match="no adapter named 'other'"):
        fit(base, ROWS, SETTINGS, name="other")


def test_packing_is_tried_without_dropout() -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    base = fw.Base(GPT2LMHeadModel(config).train(), SimpleNamespace(pad_token_id=0), "gpt2", torch.device("cpu"))
    check_packing(base)
    assert base.model.training
