"""Streaming a base: its blocks come and go, and nothing that is computed or learned is different by a bit."""

from __future__ import annotations

import functools
import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import featherweight as fw
import models
from command import BARE, Cli, complaint
from featherweight.adapter import trainable
from featherweight.engine.train import Settings, fit
from featherweight.pages import _is_clean, _mapped_files, drop, drop_files_of, move_to_files, whole_pages
from featherweight.slots import Slots
from featherweight.stream import Stream, find_blocks, start, streamed
from models import random_inputs, shake
from subjects import METHODS, a_base, examples

CPU = torch.device("cpu")
FAMILIES = ("llama", "t5", "gpt2")
STREAMED = ("lora", "prompt_tuning", "prefix_tuning")


class Poisoned(Slots):
    """A slot is filled with NaN as soon as its block may go, and is filled again late."""

    def _let_go(self, i: int | None) -> None:
        super()._let_go(i)
        if i is not None:
            self.slots[i % 2].fill_(0xFF)  # NaN in every floating type

    def _copy(self, i: int, queued: Any) -> Any:
        time.sleep(0.002)
        return super()._copy(i, queued)


@contextmanager
def in_slots(model: nn.Module, pinned: bool = True, place: type[Slots] = Poisoned) -> Iterator[Stream]:
    stream = Stream(model, functools.partial(place, device=CPU, pinned=pinned))
    try:
        yield stream
    finally:
        stream.stop()


def deep(family: str, layers: int = 5) -> Any:
    """A model of that family with an odd number of layers: what follows the last one wants its own slot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "LAYERS", layers)
        for name in ("_LLAMA_LIKE", "_T5_LIKE"):
            shape = dict(getattr(models, name))
            shape.update({k: layers for k in shape if k.startswith("num_") and k.endswith("_layers")})
            patch.setattr(models, name, shape if "num_layers" not in shape else {**shape, "num_layers": layers})
        return models.FAMILIES[family]()


def adapted(family: str, method: str) -> Any:
    model = deep(family)
    torch.manual_seed(1)
    fw.attach(model, METHODS[method])
    shake(trainable(model))
    return model


def learned(model: Any) -> list[Tensor]:
    """Logits, and gradients of something that depends on all of them; twice, as streaming learns the order."""
    found = []
    for seed in range(3):
        logits = model(**random_inputs(model, seed=seed), use_cache=False).logits
        loss = (logits * torch.linspace(-1, 1, logits.shape[-1])).square().mean()
        found += [logits.detach(), *torch.autograd.grad(loss, trainable(model))]
    return found


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", STREAMED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_nothing_reads_a_slot_that_is_not_its_own(family: str, method: str, checkpointed: bool) -> None:
    model = adapted(family, method)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    expected = learned(model)
    with in_slots(model):
        assert same(learned(model), expected)
    assert same(learned(model), expected)


@pytest.mark.parametrize("method", STREAMED)
def test_training_from_slots_gives_the_same_losses(method: str) -> None:
    def losses(place: Callable[[nn.Module], Any]) -> list[float]:
        base = a_base(adapted("llama", method))
        with place(base.model):
            return fit(base, examples(base.model), Settings(steps=4, batch_size=2)).losses

    plain = losses(lambda _: torch.enable_grad())
    assert losses(in_slots) == plain
    assert losses(lambda model: streamed(model, CPU, "disk")) == plain


def test_without_the_signal_from_the_gradients_stale_slots_would_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "lora")
    expected = learned(model)
    monkeypatch.setattr(Stream, "_watch_gradient", lambda *_: None)
    with in_slots(model):
        assert not same(learned(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_written_the_same(family: str) -> None:
    model = adapted(family, "lora")
    ids = models.words(2, 6)
    mask = torch.ones_like(ids)
    ask = functools.partial(model.generate, ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = ask()
    with in_slots(model):
        assert torch.equal(ask(), expected)


def test_an_adapter_may_be_attached_while_its_base_is_streamed() -> None:
    def run(place: Callable[[nn.Module], Any]) -> list[Tensor]:
        model = deep("llama").requires_grad_(False)
        with place(model):
            torch.manual_seed(1)
            fw.attach(model, METHODS["prefix_tuning"])  # runs the base to start from what it computes
            return learned(model)

    assert same(run(in_slots), run(lambda _: torch.enable_grad()))


def test_blocks_are_fetched_ahead_once_the_order_is_known() -> None:
    model = adapted("llama", "lora")
    late: list[int] = []

    class Watched(Slots):
        def bring(self, here: int, coming: int | None) -> None:
            late.extend([here] if self.held[here % 2] != here else [])
            super().bring(here, coming)

    with in_slots(model, place=Watched):
        learned(model)
    assert late == [0]


def test_at_rest_every_weight_has_its_value() -> None:
    model = adapted("llama", "lora")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with in_slots(model):
        learned(model)
        inside = model.state_dict()
        assert all(torch.equal(inside[k], v) for k, v in before.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_four_bit_weights_are_streamed_and_their_scales_stay() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = deep("llama")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and module is not model:
                packed = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                packed.load_state_dict(child.state_dict())
                setattr(module, name, packed.to("cpu"))
    torch.manual_seed(1)
    fw.attach(model, METHODS["lora"])
    shake(trainable(model))
    expected = learned(model)
    with in_slots(model):
        assert same(learned(model), expected)


# --- pages of files -----------------------------------------------------------------------------------------------


def wide(folder: Path) -> Any:
    """A saved Llama of six layers, each many pages large, loaded as a base is: it lies in its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_LLAMA_LIKE", {**models._LLAMA_LIKE, "hidden_size": 256, "num_hidden_layers": 6})
        models.llama().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def resident(block: nn.Module) -> int:
    """Bytes of a block's matrices whose pages this process has mapped now."""
    total = 0
    with Path("/proc/self/pagemap").open("rb") as table:
        for p in block.parameters():
            first, size = whole_pages(p)
            table.seek(first // mmap.PAGESIZE * 8)
            entries = struct.unpack(f"{size // mmap.PAGESIZE}Q", table.read(size // mmap.PAGESIZE * 8))
            total += sum(entry >> 63 for entry in entries) * mmap.PAGESIZE
    return total


def test_pages_come_when_they_are_needed_and_go(tmp_path: Path) -> None:
    model = wide(tmp_path)
    fw.attach(model, METHODS["lora"])
    shake(trainable(model))
    blocks, seen = find_blocks(model), list[list[bool]]()
    expected = learned(model)
    whole = [resident(b) for b in blocks]
    assert min(whole) > 500_000

    def look(*_: Any) -> None:  # a page that is touched brings a few of its neighbours
        seen.append([resident(b) > full / 3 for b, full in zip(blocks, whole, strict=True)])

    with streamed(model, CPU, "disk"):
        for block in blocks:  # at the end of its pass, and when a gradient in it is there
            a_trained = next(p for p in block.parameters() if p.requires_grad)
            a_trained.register_hook(look)
            block.register_forward_hook(look)
        assert same(learned(model), expected)
    assert len(seen) == 3 * 2 * 6
    for n, there in enumerate(seen):
        here = n % 12 if n % 12 < 6 else 11 - n % 12
        assert there[here]
        assert sum(there) <= 2


def test_loaded_weights_stay_in_their_own_file(tmp_path: Path) -> None:
    model = wide(tmp_path)
    where = [p.data_ptr() for p in model.parameters()]
    assert move_to_files(model.parameters()) == 0
    assert [p.data_ptr() for p in model.parameters()] == where


def test_a_files_pages_are_given_back_unless_one_was_written_to(tmp_path: Path) -> None:
    model, block = wide(tmp_path), 3
    before = [p.clone() for p in model.parameters()]  # every page is read
    assert resident(find_blocks(model)[block]) > 500_000
    drop_files_of([next(iter(model.parameters()))])  # one view of the file is enough
    assert resident(find_blocks(model)[block]) == 0
    assert same(list(model.parameters()), before)
    changed = find_blocks(model)[block].mlp.up_proj.weight
    changed.zero_()
    drop_files_of(model.parameters())
    assert not changed.any()


def test_weights_that_are_in_no_file_or_were_changed_are_written_to_one_and_keep_their_values(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(64, 512, dtype=torch.bfloat16), requires_grad=False)
    model = wide(tmp_path)
    changed = find_blocks(model)[0].mlp.up_proj.weight
    assert _is_clean(changed, _mapped_files())
    changed[40:].zero_()
    assert not _is_clean(changed, _mapped_files())
    before = [weight.clone(), changed.clone()]
    assert move_to_files([weight, changed]) == weight.nbytes + changed.nbytes
    assert all(_is_clean(p, _mapped_files()) for p in (weight, changed))
    drop(map(whole_pages, [weight, changed]))
    assert same([weight, changed], before)


@pytest.mark.parametrize("method", STREAMED)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_from_pages_are_equal_to_the_bit(family: str, method: str) -> None:
    model = adapted(family, method)
    expected = learned(model)
    with streamed(model, CPU, "disk"):
        assert same(learned(model), expected)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_streamed_base_is_read_only() -> None:
    model = adapted("llama", "lora")
    with streamed(model, CPU, "disk"):
        learned(model)
        fw.merge(model)
        with pytest.raises(fw.InputError, match="read-only"):
            learned(model)


def test_ram_on_a_cpu_is_refused_before_anything_is_loaded(
    fw_cli: Cli, reviews: Path, llama: Path, no_model: None
) -> None:
    args = ("--model", llama, "--device", "cpu", "--data", reviews, "--stream-base", "ram")
    assert "in RAM anyway" in complaint(fw_cli("train", *args))
    assert not Path("runs").exists()


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(fw.InputError, match="Linear has no list of layers"):
        start(nn.Linear(2, 2), CPU, "disk")


def test_a_model_that_is_trained_as_a_whole_is_refused() -> None:
    with pytest.raises(fw.InputError, match="frozen"):
        start(models.llama(), CPU, "disk")


def test_merging_knows_no_such_flag(fw_cli: Cli) -> None:
    assert "No such option" in complaint(fw_cli("merge", "--stream-base", "disk"))


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_the_command_line_trains_the_same_from_disk(verb: str, fw_cli: Cli, reviews: Path, llama: Path) -> None:
    some = ("--method", "lora") if verb == "train" else ("--methods", "lora,prompt_tuning", *BARE)
    args = (verb, "--model", llama, "--data", reviews, "--steps", 3, "--device", "cpu", "--dtype", "float32", *some)
    assert fw_cli(*args, "--out", "plain").code == 0
    assert fw_cli(*args, "--out", "streamed", "--stream-base", "disk").code == 0
    [plain, found] = [sorted(p.relative_to(f) for p in Path(f).rglob("*.safetensors")) for f in ("plain", "streamed")]
    assert plain == found
    assert plain
    for file in plain:
        assert ("plain" / file).read_bytes() == ("streamed" / file).read_bytes()
    if verb == "train":
        args = ("--adapter", "streamed", "--stream-base", "disk", "--device", "cpu", "--dtype", "float32")
        assert fw_cli("evaluate", *args, "--data", reviews).code == 0
        assert fw_cli("generate", *args, "--prompt", "a film", "--max-new-tokens", 3).code == 0
