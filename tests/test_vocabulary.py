"""A vocabulary that stays on the host: the same results, a model that is on its device otherwise, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import featherweight as fw
import models
from command import Cli, complaint
from featherweight import vocabulary
from featherweight.adapter import attached, trainable
from featherweight.base import fingerprint
from featherweight.engine.batches import Batch
from featherweight.engine.loss import _HeadLoss, _HeadLossFromHost, labelled_loss
from featherweight.engine.train import Settings, fit
from featherweight.full import FullFineTuning
from featherweight.plan.before import leave_vocabulary
from featherweight.vocabulary import Waiting, keep_on_host, on_host
from models import random_inputs, shake
from subjects import METHODS, a_base, examples
from test_methods import every_method

CPU, ELSEWHERE = torch.device("cpu"), torch.device("lazy:0")
FAMILIES = ("llama", "gpt2", "gemma3", "t5")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few words, and a table that is often too small."""
    monkeypatch.setattr(vocabulary, "PIECE", 5 * 4 * 32)
    monkeypatch.setattr(vocabulary, "TABLE", 12 * 4 * 32)


def adapted(family: str, method: str, *, host: bool) -> Any:
    model = models.FAMILIES[family]()
    if host:
        keep_on_host(model, CPU)
    torch.manual_seed(1)
    fw.attach(model, METHODS[method])
    shake(trainable(model))
    return model


@pytest.mark.usefixtures("small")
@every_family
@every_method
def test_training_gives_the_same_losses_and_the_same_adapter(family: str, method: str) -> None:
    losses, learned = list[list[float]](), list[list[Tensor]]()
    for host in (False, True):
        model = adapted(family, method, host=host)
        losses.append(fit(a_base(model), examples(model), Settings(steps=4, batch_size=3)).losses)
        learned.append(trainable(model))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 7])
def test_a_loss_from_pieces_is_as_exact_as_one_from_all_logits(
    n: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, against PyTorch's own; in float32 with logits of which one is far above the others, in the first piece or the last."""
    monkeypatch.setattr(vocabulary, "PIECE", 11 * 16 * 8)
    head = nn.Linear(16, 64, bias=bias).double().requires_grad_(False)
    hidden, targets = torch.randn(n, 16).double().requires_grad_(), torch.arange(n) * 9 % 64
    waiting = Waiting(head.weight, CPU)
    found = _HeadLossFromHost.apply(hidden, waiting, head.bias, targets)
    wanted = nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (found, wanted)))
    for loud in (0, 63):
        weight = nn.Parameter(torch.randn(64, 16), requires_grad=False)
        weight[loud] *= 100
        h = torch.randn(n, 16, requires_grad=True)
        found = _HeadLossFromHost.apply(h, Waiting(weight, CPU), None, targets)
        wanted = _HeadLoss.apply(h, weight, None, targets)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x, h)[0] for x in (found, wanted)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small")
@every_family
def test_logits_gradients_and_written_texts_are_the_same(family: str) -> None:
    found = []
    for host in (False, True):
        model = adapted(family, "lora", host=host)
        inputs = random_inputs(model, seed=3)
        logits = model(**inputs, use_cache=False).logits
        grads = torch.autograd.grad(logits.square().mean(), trainable(model))
        read = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        found.append([logits, *grads, model.eval().generate(**read, max_new_tokens=6, do_sample=False)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_words_that_were_seen_are_not_brought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.randn(50, 4), requires_grad=False)
    monkeypatch.setattr(vocabulary, "TABLE", 8 * 4 * 4)  # eight words
    waiting, brought = Waiting(weight, CPU), list[list[int]]()
    original = Waiting._bring
    monkeypatch.setattr(Waiting, "_bring", lambda self, words: brought.append(words.tolist()) or original(self, words))

    def asked(*ids: int) -> None:
        table, places = waiting.look_up(torch.tensor(ids)[None])
        assert torch.equal(table[places], weight[torch.tensor(ids)[None]])

    asked(3, 1, 3)
    asked(1, 2, 40)
    asked(3, 40)
    assert brought == [[1, 3], [2, 40], []]
    asked(10, 11, 12, 13, 14)  # they do not fit besides: the table begins again
    asked(1, 10)
    assert brought[3:] == [[10, 11, 12, 13, 14], [1]]
    asked(*range(20, 32))  # more than the table holds
    asked(14)
    assert brought[5:] == [list(range(20, 32)), []]


class _Stream:
    """A stream that tells what it is asked to wait for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def record_event(self) -> str:
        self.events += 1
        self.log.append(event := f"{self.name}{self.events}")
        return event

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_a_buffer_is_filled_again_when_the_device_is_through_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pieces in two buffers: each waits for the event behind the last use of its own buffer, and is waited for."""
    log = list[str]()
    here, weight = _Stream("main", log), nn.Parameter(torch.randn(50, 4), requires_grad=False)
    monkeypatch.setattr(vocabulary, "PIECE", 11 * 4 * 4)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: here)
    monkeypatch.setattr(Waiting, "_slots", lambda self, n: [torch.empty(n, 4) for _ in range(2)])
    monkeypatch.setattr(Waiting, "_pin", lambda self: None)
    waiting = Waiting(weight, CPU)
    waiting.beside = _Stream("side", log)
    found, buffers = list[Tensor](), set[int]()
    for at, piece in waiting.pieces():
        assert at == 11 * len(found)
        found.append(piece.clone())
        buffers.add(piece.data_ptr())
        log.append(f"use {len(found)}")
    assert torch.equal(torch.cat(found), weight)
    assert len(buffers) == 2
    assert log == [
        "main1", "side waits for main1", "side1", "side waits for main1", "side2", "main waits for side1", "use 1", "main2",
        "side waits for main2", "side3", "main waits for side2", "use 2", "main3",
        "side waits for main3", "side4", "main waits for side3", "use 3", "main4",
        "side waits for main4", "side5", "main waits for side4", "use 4", "main5",
        "main waits for side5", "use 5", "main6",
    ]  # fmt: skip


# --- where tensors are ----------------------------------------------------------------------------------------------


@contextmanager
def without_numbers() -> Iterator[None]:
    """Tensors without numbers, which know their device: operations on tensors of two devices are errors, as on a GPU."""

    def to(self: nn.Module, device: Any = None, *args: Any, **kwargs: Any) -> nn.Module:
        """`Module.to` refuses such tensors."""
        stay, made = on_host(self), dict[int, nn.Parameter]()
        for module in self.modules() if isinstance(device, torch.device) else ():
            for name, p in module._parameters.items():
                if p is not None and id(p) not in stay:
                    moved = nn.Parameter(p.data.to(device), requires_grad=p.requires_grad)
                    module._parameters[name] = made.setdefault(id(p), moved)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        return self

    def look_up(self: Waiting, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How many words are different is a question of numbers."""
        return self.table, torch.zeros_like(ids).to(self.device)

    def solve(a: Tensor, b: Tensor, **_: Any) -> Any:
        return SimpleNamespace(solution=a.new_empty(a.shape[1], b.shape[1]))

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(nn.Module, "to", to)
        patch.setattr(torch.linalg, "lstsq", solve)
        patch.setattr(Waiting, "look_up", look_up)
        yield


@every_family
@every_method
def test_all_but_the_vocabulary_is_on_the_device_and_nothing_computes_across(family: str, method: str) -> None:
    with without_numbers():
        model = models.FAMILIES[family]()
        keep_on_host(model, ELSEWHERE)
        model.to(ELSEWHERE).train()
        fw.attach(model, METHODS[method])
        ids, some = (torch.zeros(*shape, dtype=torch.long, device=ELSEWHERE) for shape in ((2, 7), (4,)))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= {"decoder_input_ids": ids[:, :3]} if family == "t5" else {}
        loss = labelled_loss(model, Batch(inputs, some, some, []))
        loss.backward()
        assert {loss.device, model(**inputs).logits.device, model.device} == {ELSEWHERE}
        assert {p.device for p in trainable(model)} == {ELSEWHERE}
        assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in trainable(model) if p.requires_grad)
        left = {name for name, p in model.named_parameters() if p.device != ELSEWHERE}
        assert left
        assert all(
            "embed" in name or name in ("lm_head.weight", "shared.weight", "transformer.wte.weight") for name in left
        )


def test_such_tensors_do_find_what_is_in_the_wrong_place() -> None:
    with without_numbers():
        model = models.llama()
        model.to(ELSEWHERE)
        model.lm_head._parameters["weight"] = nn.Parameter(model.lm_head.weight.data.to(CPU))
        ids = torch.zeros(2, 7, dtype=torch.long, device=ELSEWHERE)
        with pytest.raises(RuntimeError, match="same device"):
            model(input_ids=ids)


# --- a base with it -------------------------------------------------------------------------------------------------


@every_family
def test_the_model_keeps_its_names_its_count_and_its_fingerprint(family: str) -> None:
    plain, kept = models.FAMILIES[family](), models.FAMILIES[family]()
    keep_on_host(kept, CPU)
    assert on_host(kept)
    assert fingerprint(kept) == fingerprint(plain)
    assert list(kept.state_dict()) == list(plain.state_dict())
    assert [type(m).__name__ for m in kept.modules()] == [type(m).__name__ for m in plain.modules()]
    fw.attach(plain, fw.LoRA(r=2))
    fw.attach(kept, fw.LoRA(r=2))
    assert fw.count(kept) == fw.count(plain)


def test_it_is_not_moved_with_the_model() -> None:
    model = models.llama()
    keep_on_host(model, CPU)
    model.to(torch.float64)
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float64


def test_a_vocabulary_that_is_trained_is_refused() -> None:
    model = models.llama()
    keep_on_host(model, CPU)
    with pytest.raises(fw.InputError, match="leave --offload-vocabulary out"):
        fw.attach(model, FullFineTuning())
    for method in (fw.LoRA(r=2, modules_to_save=("lm_head",)), fw.LoRA(r=2, target_modules=("lm_head", "q_proj"))):
        with pytest.raises(fw.InputError, match="lm_head is to be trained, so it must be where the model computes"):
            fw.attach(model, method)
        assert not attached(model)


def test_it_is_not_chosen_for_a_method_that_trains_the_head() -> None:
    shape = models.llama().config
    assert leave_vocabulary(shape, None, [fw.LoRA(r=2), fw.PromptTuning()])
    assert not leave_vocabulary(shape, None, [fw.LoRA(r=2), fw.LoRA(r=2, target_modules=("lm_head",))])
    assert not leave_vocabulary(shape, None, [FullFineTuning()])


def test_a_model_with_it_can_be_copied_and_used_in_inference_mode_first() -> None:
    model = models.llama()
    keep_on_host(model, CPU)
    inputs = random_inputs(model, seed=0)
    with torch.inference_mode():
        expected = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_on_a_cpu_it_is_refused_before_anything_is_loaded(verb: str, fw_cli: Cli, tmp_path: Path) -> None:
    done = fw_cli(verb, "--offload-vocabulary", "--device", "cpu", "--out", str(tmp_path / "out"))
    assert "use --stream-base disk" in complaint(done)
    assert not (tmp_path / "out").exists()
