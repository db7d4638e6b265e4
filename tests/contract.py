"""The contract: what every method promises on every architecture, one function per promise.

`check_method("lora", "llama")` goes through them all, in the spirit of scikit-learn's `check_estimator`; `test_contract.py`
runs every method × family × promise by itself. A new method is checked by being in the registry.

A promise takes a side (ours, or the real `peft` where it can be asked the same), a family and a method, and returns the
worst deviation that it saw, 0.0 for "bit for bit", or None where the question makes no sense. `Promise.limit` is what is
allowed. Deviations are relative to the size of what is compared; models compute in float64 unless a promise says otherwise.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import featherweight as fw
import models
from featherweight.adapter import parts, trainable
from featherweight.attention import rows_apart
from featherweight.base import Base
from featherweight.engine.batches import Batch, check_packing, collate, pack
from featherweight.engine.loss import labelled_loss
from featherweight.engine.update import gradients
from featherweight.layout import layout_of
from featherweight.tokens import IGNORE, Example
from models import padded, random_inputs, shake, words
from subjects import (
    EVERYWHERE,
    MERGEABLE,
    METHODS,
    OURS,
    PROMPTS,
    Side,
    a_base,
    a_loss,
    adapted,
    base_state,
    build,
    examples,
    fingerprint,
    gradients_off,
    grads,
    in_both_attentions,
    in_float64,
    off,
    writes,
)  # fmt: skip

# --- 1: where an adapter starts -----------------------------------------------------------------------------------


def starts_as_the_base(side: Side, family: str, method: str, folder: Path) -> float | None:
    """A correction starts as nothing: the output of a fresh adapter is the base's."""
    if method in PROMPTS:
        return None
    model = build(family, torch.float32)
    inputs = random_inputs(model)
    before = models.logits(model, **inputs)
    model = side.adapt(model, method).eval()
    with torch.no_grad():
        return off(side.logits(model, **inputs), before)


def starts_as_its_text(side: Side, family: str, method: str, folder: Path) -> float | None:
    """A prompt or prefix starts as the base that has read its text. (In an encoder–decoder a prefix cannot: layers share.)"""
    kind = writes(family)
    if method not in PROMPTS or kind == "classifier" or (kind == "encoder-decoder" and method == "prefix_tuning"):
        return None
    model = build(family, torch.float32)
    inputs = random_inputs(model)
    inputs.pop("attention_mask")
    text = METHODS[method].init_ids  # type: ignore[attr-defined]
    whole = inputs | {"input_ids": torch.cat([torch.tensor(text).expand(2, -1), inputs["input_ids"]], dim=1)}
    expected = models.logits(model, **whole)
    expected = expected[:, len(text) :] if kind == "decoder" else expected
    model = side.adapt(model, method)
    with torch.no_grad():
        return off(side.logits(model, **inputs), expected)


# --- 2: the base is left alone ------------------------------------------------------------------------------------


def without_a_live_adapter_it_is_the_base(side: Side, family: str, method: str, folder: Path) -> float | None:
    """With no adapter live the output is the base's, also after training; the base's bytes are what they were."""
    model = build(family, torch.float32)
    inputs = random_inputs(model)
    before, bytes_before = models.logits(model, **inputs), fingerprint(model.state_dict())
    model = side.adapt(model, method)
    learned = [p for p in side.learned(model) if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        a_loss(side, model.train(), inputs).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad(), side.plain(model):
        worst = off(side.logits(model, **inputs), before)
    if side is OURS:
        assert fingerprint(base_state(model)) == bytes_before
    return worst


def detach_leaves_no_trace(side: Side, family: str, method: str, folder: Path) -> float | None:
    """`detach` gives back classes, keys, hooks, attributes and `requires_grad`."""

    def traces(model: Any) -> Any:
        return [
            (path, type(m), set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for path, m in model.named_modules()
        ], [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]

    model = build(family)
    next(model.parameters()).requires_grad_(False)  # what was frozen before stays so
    before, keys = traces(model), list(model.state_dict())
    side.adapt(model, method)
    assert list(base_state(model)) == keys
    fw.detach(model)
    assert traces(model) == before
    assert list(model.state_dict()) == keys
    return 0.0


# --- 3: what learns -----------------------------------------------------------------------------------------------

HALF_UNUSED = {
    ("prompt_tuning", "encoder-decoder"),
    ("p_tuning", "encoder-decoder"),
    ("prefix_tuning", "encoder-decoder"),
}
"""HF's layout for encoder–decoders has as many entries again that nothing reads; we keep it, so that counts and files agree."""


def only_the_parts_learn(side: Side, family: str, method: str, folder: Path) -> float | None:
    """On a bfloat16 base what is trained is float32: in a few steps nine tenths of every tensor of it move, nothing frozen does."""
    model = build(family, torch.bfloat16)
    frozen = fingerprint(model.state_dict())
    base_parameters = list(model.parameters())
    side.adapt(model, method)
    learned = side.learned(model)
    assert learned
    assert not any(p.requires_grad for p in base_parameters)
    before = [p.detach().clone() for p in learned]
    optimizer = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(4):
        optimizer.zero_grad()
        a_loss(side, model, random_inputs(model, rows=6, seed=step)).backward()
        optimizer.step()
    assert all(p.grad is None for p in base_parameters)
    assert {p.dtype for p in learned} == {torch.float32}
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}
    assert fingerprint(base_state(model)) == frozen
    wanted = 0.45 if (method, writes(family)) in HALF_UNUSED else 0.9
    for name, now, then in zip(names_of(model), learned, before, strict=True):
        share = float((now != then).float().mean())
        assert share > (wanted if "embedding" in name else 0.9), f"only {share:.0%} of {name} has moved"
    return 0.0


def names_of(model: Any) -> list[str]:
    return [f"{path}.{n}" for path, part in parts(model).items() for n, p in part.named_parameters() if p.requires_grad]


# --- 4: gradients -------------------------------------------------------------------------------------------------


@in_float64
def gradients_are_those_of_the_output(side: Side, family: str, method: str, folder: Path) -> float | None:
    """`gradcheck` in float64, and the slope along a random direction against a difference quotient."""
    model = adapted(side, family, method)
    learned = [p for p in side.learned(model) if p.requires_grad]
    for p in learned:
        p.data = p.data.double()
    inputs = random_inputs(model, rows=2, length=4)

    def value(*_: Tensor) -> Tensor:
        return side.logits(model, **inputs).log_softmax(-1).square().mean()

    assert torch.autograd.gradcheck(value, learned, fast_mode=True, eps=1e-6, atol=1e-6, rtol=1e-4)
    slopes = torch.autograd.grad(value(), learned, allow_unused=True)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in learned]
    step, ends = 1e-7, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(learned, directions, strict=True):
                p.add_(d, alpha=sign * step)
            ends.append(value())
    quotient = (ends[0] - ends[1]) / (2 * step)
    slope = sum((g * d).sum() for g, d in zip(slopes, directions, strict=True) if g is not None)
    return off(torch.as_tensor(slope), quotient)


@in_both_attentions
def checkpointing_changes_no_gradient(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Recomputing activations in the backward pass gives the same gradients (float32)."""
    model = adapted(side, family, method, torch.float32).train()
    inputs = random_inputs(model, rows=3)
    inputs["attention_mask"][0, -2:] = 0  # with padding
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first, second = a_loss(side, model, inputs), a_loss(side, model, random_inputs(model, seed=9))
        results.append(grads(first + second, side.learned(model)))  # two readings before one backward pass
    return gradients_off(results[1], results[0])


# --- 5: padding ---------------------------------------------------------------------------------------------------


def padding_sides(family: str) -> tuple[bool, ...]:
    """Left and right, where the base itself does not depend on it: BART and encoders count positions from the row's start."""
    return (False,) if writes(family) == "classifier" or family == "bart" else (False, True)


@in_both_attentions
@in_float64
def padding_changes_nothing(side: Side, family: str, method: str, folder: Path) -> float | None:
    """A row gives the same logits alone, in any batch, and with any amount of padding on either side."""
    model = adapted(side, family, method)
    kind = writes(family)
    rows = [words(1, n, seed=n)[0] for n in (9, 4, 7)]
    written = random_inputs(model)["decoder_input_ids"][:1] if kind == "encoder-decoder" else None
    worst = 0.0
    with torch.no_grad():
        for more, left in itertools.product((0, 5, 70), padding_sides(family)):
            inputs = padded([*rows, words(1, 9 + more, seed=77)[0]], left)
            together = read(side, model, inputs, written, left)
            for i, row in enumerate(rows):
                alone = read(
                    side, model, {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}, written, left
                )
                scores = together[i]
                if kind == "decoder":
                    scores = scores[-len(row) :] if left else scores[: len(row)]
                worst = max(worst, off(scores, alone[0]))
    return worst


def read(side: Side, model: Any, inputs: dict[str, Tensor], written: Tensor | None, left: bool) -> Tensor:
    """Logits as the engine asks for them: positions from the mask for decoders, the same beginning written for all rows."""
    if written is not None:
        inputs = inputs | {"decoder_input_ids": written.expand(len(inputs["input_ids"]), -1)}
    elif left:
        inputs = inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    return side.logits(model, **inputs)


# --- 6 and 7: packing and accumulation ----------------------------------------------------------------------------


@in_both_attentions
@in_float64
def packed_rows_are_alone(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Rows in one packed row give each row's loss and gradients; altering one changes nothing in another."""
    model = adapted(side, family, method)
    base, rows = a_base(model), examples(model)
    together = words(1, 5, seed=91)[0].tolist()  # rows that begin alike, one of them longer than Gemma 3's window
    alike = [begun(e, together) for e in [*rows[:3], *examples(model, (70,))]]
    if side is OURS:
        check_packing(base)
    with rows_apart(model) if side is OURS else nullcontext():
        return max(alone_when_packed(side, base, rows), alone_when_packed(side, base, alike))


def begun(row: Example, ids: list[int]) -> Example:
    """The row with more to read in front."""
    return replace(row, ids=[*ids, *row.ids], targets=[*[IGNORE] * len(ids), *row.targets], prompt=[*ids, *row.prompt])


def alone_when_packed(side: Side, base: Base, rows: list[Example]) -> float:
    """How far packing moves losses, gradients, and one text's outputs when another text is altered."""
    model = base.model
    learned = side.learned(model)
    whole = pack(base, rows) if side is OURS else packed_by_position(rows)
    total = whole.targets.numel()
    alone: list[Tensor | None] = [torch.zeros_like(p) for p in learned]
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        one = plain_loss(side, model, unpadded(row)) * (unpadded(row).targets.numel() / total)
        loss += one.detach()
        alone = [None if g is None or a is None else a + g for a, g in zip(alone, grads(one, learned), strict=True)]
    together = labelled_loss(model, whole) if side is OURS else plain_loss(side, model, whole)
    worst = max(gradients_off(grads(together, learned), alone), off(together.detach(), loss))
    with torch.no_grad():
        before = side.logits(model, **whole.inputs, use_cache=False)
        layout = layout_of(whole.inputs.get("attention_mask"))
        begin, first = (layout.shared, layout.shared + layout.lengths[0]) if layout else (0, len(rows[0].ids) - 1)
        ids = whole.inputs["input_ids"].clone()
        ids[0, begin:first] = ids[0, begin:first].flip(0)
        after = side.logits(model, **{**whole.inputs, "input_ids": ids}, use_cache=False)
        assert side is not OURS or not torch.equal(after[0, begin:first], before[0, begin:first])
        return max(worst, off(after[0, first:], before[0, first:]))


def packed_by_position(rows: list[Example]) -> Batch:
    """A packed row as `transformers` is told of it: positions begin again at 0 with every text, and there is no mask."""
    targets = torch.tensor([t for e in rows for t in e.targets[1:]])[None]
    ids = torch.tensor([i for e in rows for i in e.ids[:-1]])[None]
    positions = torch.cat([torch.arange(len(e.ids) - 1) for e in rows])[None]
    at = (targets[0] != IGNORE).nonzero()[:, 0]
    return Batch({"input_ids": ids, "position_ids": positions}, at, targets[0, at], rows)


def unpadded(row: Example) -> Batch:
    """One row by itself."""
    ids, targets = torch.tensor([row.ids[:-1]]), torch.tensor([row.targets[1:]])
    at = (targets[0] != IGNORE).nonzero()[:, 0]
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, at, targets[0, at], [row])


def plain_loss(side: Side, model: Any, batch: Batch) -> Tensor:
    """The mean loss at the labels, from all logits: what a plain loop computes."""
    return nn.functional.cross_entropy(
        side.logits(model, **batch.inputs, use_cache=False).flatten(0, 1)[batch.at].float(), batch.targets
    )


@in_float64
def small_batches_add_up(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Batches of unequal rows and token counts give the loss and gradients of one batch of all, a partial last one too."""
    model = adapted(side, family, method)
    base, rows = a_base(model), examples(model)
    learned = side.learned(model)
    results = []
    for cuts in ((0, 6), (0, 3, 6), (0, 2, 4, 5), (0, 5)):
        batches = [collate(base, rows[a:b]) for a, b in itertools.pairwise(cuts)]
        loss = gradients(base, batches, learned)
        results.append((loss.double(), [p.grad for p in learned]))
    whole, halves, partial, five = results
    pairs = ((halves, whole), (partial, five))
    return max(max(off(x[0], y[0]), gradients_off(x[1], y[1])) for x, y in pairs)


# --- 8: on disk ---------------------------------------------------------------------------------------------------


def saved_and_loaded_it_is_the_same(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Loaded under another seed the logits are equal bit for bit; saved again, the files are."""
    model = adapted(side, family, method, torch.float32).eval()
    inputs = random_inputs(model)
    with torch.no_grad():
        expected = side.logits(model, **inputs)
        side.save(model, folder / "one")
        torch.manual_seed(1234)
        again = side.load(build(family, torch.float32), folder / "one").eval()
        worst = off(side.logits(again, **inputs), expected)
    side.save(again, folder / "two")
    files = sorted(p.name for p in (folder / "one").iterdir() if p.name != "README.md")
    assert files == sorted(p.name for p in (folder / "two").iterdir() if p.name != "README.md")
    for name in files:
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), f"{name} differs"
    return worst


# --- 9: merging ---------------------------------------------------------------------------------------------------


def merged_it_is_the_same(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Folded into the weights, the output is the adapter's (float32)."""
    model = adapted(side, family, method, torch.float32).eval()
    inputs = random_inputs(model)
    with torch.no_grad():
        expected = side.logits(model, **inputs)
        side.merge(model)
        return off(side.logits(model, **inputs), expected)


def unmerged_the_base_is_back(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Merging is undone exactly: how far the base's weights are from what they were."""
    model = build(family, torch.float32)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    model = side.adapt(model, method)
    shake(side.learned(model))
    side.merge(model)
    side.unmerge(model)
    now = {id(p): p for p in model.parameters()}
    return max(off(now[i].detach(), then) for i, then in before.items() if i in now)


# --- 10: several adapters -----------------------------------------------------------------------------------------


def several_adapters_keep_to_themselves(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Attached together, switched, composed, renamed, detached: each gives what it gave alone."""
    model = adapted(side, family, method)
    inputs = random_inputs(model)
    one = models.logits(model, **inputs)
    other = models.logits(adapted(side, family, method, seed=2), **inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        fw.attach(model, METHODS[method], "other")
    shake(trainable(model, "other"), seed=8)
    both = models.logits(model, **inputs)
    assert off(both, one) > 1e-3
    assert off(both, other) > 1e-3
    fw.live(model, "other")
    worst = off(models.logits(model, **inputs), other)
    fw.rename(model, "other", "second")
    worst = max(worst, off(models.logits(model, **inputs), other))
    fw.live(model, "default", "second")
    worst = max(worst, off(models.logits(model, **inputs), both))
    fw.live(model, "default")
    worst = max(worst, off(models.logits(model, **inputs), one))
    fw.detach(model, "default")
    fw.live(model, "second")
    return max(worst, off(models.logits(model, **inputs), other))


# --- 11: generating -----------------------------------------------------------------------------------------------


@in_both_attentions
@in_float64
def generates_the_same_without_a_cache(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Greedy and beam search write the same tokens with and without a cache."""
    return generated(side, family, method, lambda model, rows, beams: write(model, rows, beams, use_cache=False))


@in_both_attentions
@in_float64
def generates_the_same_in_a_batch(side: Side, family: str, method: str, folder: Path) -> float | None:
    """A batch of unequal rows is continued as each row alone, greedily and by beams."""
    return generated(
        side, family, method, lambda model, rows, beams: torch.cat([write(model, [row], beams) for row in rows])
    )


def generated(
    side: Side, family: str, method: str, otherwise: Callable[[Any, list[Tensor], int], Tensor]
) -> float | None:
    """0.0 where a batch with a cache, greedily and by beams, is continued as it is `otherwise`; tokens are the same or not."""
    if writes(family) == "classifier":
        return None
    model = adapted(side, family, method).eval()
    rows = [words(1, n, seed=n)[0] for n in (9, 4, 6)]
    same = all(torch.equal(otherwise(model, rows, beams), write(model, rows, beams)) for beams in (1, 3))
    return 0.0 if same else math.inf


def write(model: Any, rows: list[Tensor], beams: int, use_cache: bool = True) -> Tensor:
    """Eight new tokens; the end token is not allowed to cut them short."""
    reads_on = not model.config.is_encoder_decoder  # a decoder goes on from its input, which is padded on the left
    inputs = padded(rows, left=reads_on)
    new = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams, "use_cache": use_cache}
    out: Tensor = model.generate(**inputs, **new)
    return out[:, inputs["input_ids"].shape[1] :] if reads_on else out


# --- 12: what PyTorch's users do ----------------------------------------------------------------------------------


def compiles_where_the_base_does(side: Side, family: str, method: str, folder: Path) -> float | None:
    """`torch.compile(fullgraph=True)` traces the adapted model in one piece if it does the base, to the same output."""
    if not _base_compiles(family):
        return None
    inputs = random_inputs(EVERYWHERE[family]())
    model = adapted(side, family, method)
    with torch.no_grad():
        expected = side.logits(model, **inputs)
    return off(_traced(model, inputs), expected)


def _traced(model: Any, inputs: dict[str, Any]) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        out: Tensor = torch.compile(model, fullgraph=True, backend="eager")(**inputs, use_cache=False).logits
    return out


@functools.cache
def _base_compiles(family: str) -> bool:
    """Whether the base alone does: found out once for all methods."""
    try:
        _traced(build(family), random_inputs(EVERYWHERE[family]()))
    except Exception:
        return False
    return True


def copies_and_moves(side: Side, family: str, method: str, folder: Path) -> float | None:
    """A deep copy is independent; `.to(dtype)` there and back."""
    model = adapted(side, family, method, torch.float32)
    inputs = random_inputs(model)
    before = models.logits(model, **inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(models.logits(twin, **inputs), before)
    shake(trainable(twin), seed=8)
    assert not torch.equal(models.logits(twin, **inputs), before)
    worst = off(models.logits(model, **inputs), before)
    wide = models.logits(model.to(torch.float64), **inputs)
    assert wide.dtype == torch.float64
    assert off(wide.float(), before) < 1e-3
    worst = max(worst, off(models.logits(model.to(torch.float32), **inputs), before))
    narrow = models.logits(model.to(torch.bfloat16), **inputs)
    assert narrow.dtype == torch.bfloat16
    assert narrow.isfinite().all()
    return worst


def dropout_is_for_training(side: Side, family: str, method: str, folder: Path) -> float | None:
    """Dropout changes the output in training, never in evaluation."""
    if not hasattr(METHODS[method], "lora_dropout"):
        return None
    model = build(family)
    expected = models.logits(adapted(side, family, method), **random_inputs(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fw.attach(model, replace(METHODS[method], lora_dropout=0.5))  # type: ignore[call-arg]
    shake(trainable(model), seed=7)
    inputs = random_inputs(model)
    model.train()
    assert not torch.equal(models.logits(model, **inputs), models.logits(model, **inputs))
    return off(models.logits(model.eval(), **inputs), expected)


# --- the list -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """One promise: its number in the contract, how far the result may be off, and whether peft can be asked the same."""

    number: str
    check: Callable[[Side, str, str, Path], float | None]
    limit: float
    ask_peft: bool = False

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def text(self) -> str:
        return (self.check.__doc__ or "").splitlines()[0]


PROMISES = [
    Promise("1", starts_as_the_base, 0.0, ask_peft=True),
    Promise("1", starts_as_its_text, 1e-5),
    Promise("2", without_a_live_adapter_it_is_the_base, 0.0, ask_peft=True),
    Promise("2", detach_leaves_no_trace, 0.0),
    Promise("3", only_the_parts_learn, 0.0),
    Promise("4", gradients_are_those_of_the_output, 1e-5, ask_peft=True),
    Promise("4", checkpointing_changes_no_gradient, 1e-6, ask_peft=True),
    Promise("5", padding_changes_nothing, 1e-12, ask_peft=True),
    Promise("6", packed_rows_are_alone, 1e-6, ask_peft=True),
    Promise("7", small_batches_add_up, 1e-6),
    Promise("8", saved_and_loaded_it_is_the_same, 0.0, ask_peft=True),
    Promise("9", merged_it_is_the_same, 1e-5, ask_peft=True),
    Promise("9", unmerged_the_base_is_back, 0.0, ask_peft=True),
    Promise("10", several_adapters_keep_to_themselves, 0.0),
    Promise("11", generates_the_same_without_a_cache, 0.0, ask_peft=True),
    Promise("11", generates_the_same_in_a_batch, 0.0, ask_peft=True),
    Promise("12", compiles_where_the_base_does, 1e-12),
    Promise("12", copies_and_moves, 0.0),
    Promise("12", dropout_is_for_training, 0.0),
]


def refusal(promise: str, family: str, method: str) -> str | None:
    """What a combination that makes no sense is refused with (a regular expression), or None where it must work."""
    if (family, method) == ("modernbert", "prefix_tuning") and not promise.startswith(
        ("starts", "generates", "dropout")
    ):
        return "needs a model whose layers take keys and values from a cache"
    if promise in ("merged_it_is_the_same", "unmerged_the_base_is_back") and method not in MERGEABLE:
        return "cannot be merged"
    if promise == "packed_rows_are_alone" and writes(family) != "decoder":
        return "packing"
    return None


def hold(promise: Promise, method: str, family: str, folder: Path) -> float | None:
    """The deviation of one promise of ours; None where it is not asked, or refused in the words that are expected.

    Raises `AssertionError` where it is broken.
    """
    words_of_refusal = refusal(promise.name, family, method)
    try:
        deviation = promise.check(OURS, family, method, folder)
    except fw.InputError as e:
        if words_of_refusal is None or not re.search(words_of_refusal, str(e)):
            raise AssertionError(f"{promise.name} was refused: {e}") from e
        return None
    assert words_of_refusal is None, f"{promise.name} should have been refused"
    assert deviation is None or deviation <= promise.limit, f"{promise.name}: off by {deviation:.2g}"
    return deviation


def check_method(method: str, family: str, folder: Path) -> dict[str, float | None]:
    """All promises of one method on one family: the worst deviation of each. Raises where one is broken."""
    return {promise.name: hold(promise, method, family, folder / promise.name) for promise in PROMISES}
