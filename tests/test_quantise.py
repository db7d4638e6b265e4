"""Quantising at load time: every source and family, with every method; what is not quantised; what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import featherweight as fw
import subjects
import tiny
from command import Cli
from featherweight.adapter import count, trainable
from featherweight.base import fingerprint, same_base
from featherweight.config import MergeConfig, merge
from featherweight.engine.lean import lean
from featherweight.quant import dense_weight, is_quantised
from models import words
from test_methods import every_method

WIDTH = 64
LAYERS: dict[str, type[nn.Module]] = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
COUNTS = {"nf4": 12, "int8": 14}
"""Quantised layers of the tiny Llama; two read 48 values, no multiple of 64."""
every_kind = pytest.mark.parametrize("quantize", LAYERS)
METHODS = subjects.METHODS | {"adalora": fw.AdaLoRA(init_r=4, target_r=2, tinit=0, tfinal=0)}


def llama(folder: Path) -> Path:
    return tiny.save_llama(folder, width=WIDTH)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": llama,
    "mt5": lambda folder: tiny.save_mt5(folder, width=WIDTH),
    "bert": lambda folder: tiny.save_bert(folder, width=WIDTH),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def load(folder: Path, quantize: str = "none") -> fw.Base:
    return fw.load_base(str(folder), tiny.LABELS, dtype="float32", quantize=quantize)


@pytest.fixture
def task(tmp_path: Path) -> Any:
    return fw.load_task(str(tiny.write(tmp_path / "reviews.csv", tiny.reviews())), labels=tiny.LABELS)


@every_method
@every_family
@every_kind
def test_a_step_trains_all_of_an_adapter_and_its_file_fits_the_dense_base(
    tmp_path: Path, task: Any, quantize: str, family: str, method: str
) -> None:
    base = load(folder := FAMILIES[family](tmp_path / "base"), quantize)
    if not base.classifies:  # its head is random yet
        fw.evaluate(base, task)  # with bitsandbytes' own kernel, no gradients would be left after it
    seen: list[bool] = []

    def look(report: Any) -> None:
        seen.extend(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable(base.model))

    fw.train(base, task, METHODS[method], steps=1, batch_size=4, lr=1e-3, on_step=look)
    assert len(seen) == len(trainable(base.model))
    assert all(seen)
    fw.save(base.model, tmp_path / "adapter")
    expected = fw.evaluate(base, task).predictions
    again = load(folder, quantize)
    fw.load(again.model, tmp_path / "adapter")
    assert fw.evaluate(again, task).predictions == expected
    dense = load(folder)
    fw.load(dense.model, tmp_path / "adapter")
    fw.save(dense.model, tmp_path / "again")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one | two)


@every_family
@every_kind
def test_linear_layers_are_quantised_and_heads_are_not(tmp_path: Path, quantize: str, family: str) -> None:
    dense, packed = load(FAMILIES[family](tmp_path)), load(tmp_path, quantize)
    left = {p for p, m in packed.model.named_modules() if isinstance(m, nn.Linear) and not is_quantised(m)}
    heads = {"llama": {"lm_head"}, "mt5": {"lm_head"}, "bert": {"classifier", "bert.pooler.dense"}}[family]
    in_float32 = {p for p in left if p.endswith(".wo")}  # T5 casts inputs to the type of this weight
    odd = {p for p in left if isinstance(m := packed.model.get_submodule(p), nn.Linear) and m.in_features % 64}
    assert left == heads | in_float32 | odd
    assert bool(in_float32) == (family == "mt5")
    assert bool(odd) == (quantize == "nf4" and family != "mt5")  # bitsandbytes unpacks these wrongly on a CPU
    for path, module in packed.model.named_modules():
        weight = getattr(dense.model.get_submodule(path), "weight", None)
        if is_quantised(module):
            assert isinstance(module, LAYERS[quantize])
            error = (dense_weight(module) - weight).abs().max() / weight.abs().max()
            assert 1e-4 < error < (0.2 if quantize == "nf4" else 0.01)
        elif isinstance(weight, torch.Tensor):
            assert torch.equal(module.weight, weight)
    if quantize == "nf4":
        state: Any = next(m for m in packed.model.modules() if is_quantised(m)).weight
        assert (state.quant_state.quant_type, state.quant_state.nested) == ("nf4", True)
    assert same_base(fingerprint(dense.model, dense.fresh), fingerprint(packed.model, packed.fresh))
    assert count(packed.model) == count(dense.model)


HELD = """
import sys
from pathlib import Path
import bitsandbytes
import featherweight as fw
from featherweight.base import load_config, skeleton

def held():
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(found[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")]

skeleton(load_config(sys.argv[1]))
before = held()
base = fw.load_base(sys.argv[1], dtype="bfloat16", device="cpu", quantize=sys.argv[2])
print(sum(p.nbytes for p in base.model.parameters()), *(b - a for a, b in zip(before, held())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@every_kind
def test_after_loading_a_process_holds_little_more_than_what_is_kept(tmp_path: Path, quantize: str) -> None:
    """It was five times as much, and the file's pages besides: glibc keeps what is freed between the layers that stay."""
    tiny.save_llama(tmp_path, width=1024, layers=12, inner=2816)
    child = [sys.executable, "-c", HELD, str(tmp_path), quantize]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    weights, own, of_files = map(int, done.stdout.split()[-3:])
    assert weights > 50 << 20
    assert own < 1.2 * weights + (16 << 20)
    assert of_files < 32 << 20  # code of libraries; the model's file has more than 200 MB


@every_kind
def test_transposed_layers_are_quantised_and_recognised(tmp_path: Path, quantize: str) -> None:
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(tiny.tokenizer()), n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, **still)
    dense = load(tiny._save(GPT2LMHeadModel, config, tiny.tokenizer(), tmp_path, 0))
    packed = load(tmp_path, quantize)
    assert sum(is_quantised(m) for m in packed.model.modules()) == 8
    assert same_base(fingerprint(dense.model), fingerprint(packed.model))
    wanted, found = (base.model.train()(words(2, 7)).logits for base in (dense, packed))
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.1


@every_kind
def test_a_gguf_file_is_unpacked_once_and_quantised(
    tmp_path: Path, quantize: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    file = tiny.save_gguf(llama(tmp_path / "base"), tmp_path / "tiny.gguf")
    dense = load(file)
    for again in (False, True):
        packed = load(file, quantize)
        assert ("unpacking tiny.gguf" in capsys.readouterr().err) is not again
    assert sum(isinstance(m, LAYERS[quantize]) for m in packed.model.modules()) == COUNTS[quantize]
    assert packed.name == str(file)
    assert same_base(fingerprint(dense.model), fingerprint(packed.model))
    assert len(list((tmp_path / "cache/featherweight/unpacked").iterdir())) == 1


@every_kind
def test_gates_of_a_quantised_base_are_lean_too(tmp_path: Path, quantize: str) -> None:
    model = load(llama(tmp_path), quantize).model
    mlp = model.model.layers[0].mlp
    own = type(mlp)
    with lean(model):
        assert type(mlp) is not own


@pytest.mark.parametrize(("kind", "other"), [("nf4", "int8"), ("int8", "nf4")])
def test_what_is_stored_quantised_is_loaded_so_and_not_otherwise(tmp_path: Path, kind: str, other: str) -> None:
    base = load(llama(tmp_path / "plain"), kind)
    base.model.save_pretrained(tmp_path / kind)
    base.tokenizer.save_pretrained(tmp_path / kind)
    for quantize in ("none", kind):
        again = load(tmp_path / kind, quantize).model
        assert sum(isinstance(m, LAYERS[kind]) for m in again.modules()) == COUNTS[kind]
    with pytest.raises(fw.InputError, match=rf"--quantize {other}: this model is stored quantised already .{kind}."):
        load(tmp_path / kind, other)


@pytest.mark.parametrize("verb", ["train", "compare", "evaluate", "generate"])
def test_the_flag_reaches_the_base(
    fw_cli: Cli, reviews: Path, verb: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, quantize: str, **__: Any) -> None:
        raise fw.InputError(f"asked for {quantize}")

    monkeypatch.setattr("featherweight.prepare.load_base", refuse)
    data = ["--prompt", "a"] if verb == "generate" else ["--data", reviews]
    assert "asked for nf4" in fw_cli(verb, "--model", llama, *data, "--quantize", "nf4").err


@pytest.mark.usefixtures("no_model")
def test_without_bitsandbytes_one_line_says_what_to_install(
    fw_cli: Cli, reviews: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    result = fw_cli("train", "--model", llama, "--data", reviews, "--quantize", "int8")
    wanted = '--quantize int8 needs bitsandbytes: pip install "featherweight[quant]"'
    assert (result.code, result.err) == (2, f"featherweight: error: {wanted}\n")
    assert not Path("runs").exists()


def test_other_ways_are_refused_and_merging_takes_none(fw_cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(fw.InputError, match="quantize 'fp4' is unknown; there are: none, nf4, int8"):
        load(llama(tmp_path), "fp4")
    assert "--quantize" in fw_cli("merge", "--adapter", "a", "--quantize", "nf4").err
    assert merge(MergeConfig, {"quantize": "nf4"}, {}) == MergeConfig()  # one recipe can serve several verbs
