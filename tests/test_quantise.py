"""Quantising at load time: every source and family, with every method; what is not quantised; what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MT5Config, MT5ForConditionalGeneration

import featherweight as fw
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
every_kind = pytest.mark.parametrize("quantize", LAYERS)
METHODS: dict[str, fw.Method] = {
    "lora": fw.LoRA(r=4), "adalora": fw.AdaLoRA(init_r=4, target_r=2, tinit=0, tfinal=0), "ia3": fw.IA3(),
    "prompt_tuning": fw.PromptTuning(num_virtual_tokens=4), "prefix_tuning": fw.PrefixTuning(num_virtual_tokens=4),
    "p_tuning": fw.PTuning(num_virtual_tokens=4, encoder_hidden_size=16),
}  # fmt: skip


def llama(folder: Path) -> Path:
    return tiny.save_llama(folder, width=WIDTH)


def mt5(folder: Path) -> Path:
    """With a head of its own, which transformers ties away."""
    words = tiny.tokenizer(eos=True)
    config = MT5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=tiny.PAD, eos_token_id=tiny.EOS, decoder_start_token_id=tiny.PAD,
    )  # fmt: skip
    tiny._save(MT5ForConditionalGeneration, config, words, folder, 0)
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(len(words), WIDTH, generator=torch.Generator().manual_seed(1))
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def bert(folder: Path) -> Path:
    return tiny.save_bert(folder, width=WIDTH)


FAMILIES: dict[str, Callable[[Path], Path]] = {"llama": llama, "mt5": mt5, "bert": bert}
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
    assert seen
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
    assert same_base(
        fingerprint(dense.model, ["classifier", "pooler"]), fingerprint(packed.model, ["classifier", "pooler"])
    )
    assert count(packed.model) == count(dense.model)


@every_kind
def test_transposed_layers_are_quantised_and_recognised(tmp_path: Path, quantize: str) -> None:
    config = GPT2Config(vocab_size=len(tiny.tokenizer()), n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    dense = load(tiny._save(GPT2LMHeadModel, config, tiny.tokenizer(), tmp_path, 0))
    packed = load(tmp_path, quantize)
    assert sum(is_quantised(m) for m in packed.model.modules()) == 8
    assert same_base(fingerprint(dense.model), fingerprint(packed.model))
    wanted, found = (base.model.train()(words(2, 7)).logits for base in (dense, packed))
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.1


def write_gguf(folder: Path, path: Path) -> Path:
    """A tiny Llama and its tokenizer as GGUF, in float32; with as many key heads as heads no row has to be moved."""
    config, tokens = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json"))
    out, layers = GGUFWriter(path, "llama"), config["num_hidden_layers"]
    out.add_context_length(128)
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(layers)
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(4)
    out.add_head_count_kv(4)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_tokenizer_model("gpt2")
    out.add_token_list(sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get))
    out.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    out.add_eos_token_id(tiny.EOS)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        doubled = torch.cat([tensor, tensor]) if name.endswith(("k_proj.weight", "v_proj.weight")) else tensor
        out.add_tensor(names.get_name(name, (".weight",)), doubled.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@every_kind
def test_a_gguf_file_is_unpacked_once_and_quantised(
    tmp_path: Path, quantize: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    file = write_gguf(llama(tmp_path / "base"), tmp_path / "tiny.gguf")
    dense = load(file)
    for again in (False, True):
        packed = load(file, quantize)
        assert ("unpacking tiny.gguf" in capsys.readouterr().err) is not again
    assert sum(isinstance(m, LAYERS[quantize]) for m in packed.model.modules()) == 14
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


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[str], Path]:
    """A folder as transformers saves it quantised."""

    def make(quantize: str) -> Path:
        base = load(llama(tmp_path / "plain"), quantize)
        base.model.save_pretrained(tmp_path / quantize)
        base.tokenizer.save_pretrained(tmp_path / quantize)
        return tmp_path / quantize

    return make


def test_what_is_stored_quantised_is_loaded_so_and_not_otherwise(packed: Callable[[str], Path]) -> None:
    for kind, other in (("nf4", "int8"), ("int8", "nf4")):
        folder = packed(kind)
        for quantize in ("none", kind):
            assert sum(isinstance(m, LAYERS[kind]) for m in load(folder, quantize).model.modules()) == 14
        with pytest.raises(
            fw.InputError, match=rf"--quantize {other}: this model is stored quantised already \({kind}\)"
        ):
            load(folder, other)


@pytest.mark.parametrize("verb", ["train", "evaluate", "generate"])
def test_the_flag_reaches_the_base(
    fw_cli: Cli, reviews: Path, verb: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def note_it(*_: Any, quantize: str, **__: Any) -> None:
        seen.append(quantize)
        raise fw.InputError("that is enough")

    monkeypatch.setattr("featherweight.run.load_base", note_it)
    data = ["--prompt", "a"] if verb == "generate" else ["--data", reviews]
    assert "that is enough" in fw_cli(verb, "--model", llama, *data, "--quantize", "nf4").err
    assert seen == ["nf4"]


@pytest.mark.usefixtures("no_model")
def test_without_bitsandbytes_one_line_says_what_to_install(
    fw_cli: Cli, reviews: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    result = fw_cli("train", "--model", llama, "--data", reviews, "--quantize", "int8")
    assert result.err == (
        'featherweight: error: --quantize int8 needs bitsandbytes: pip install "featherweight[quant]"\n'
    )
    assert result.code == 2
    assert not Path("runs").exists()


def test_other_ways_are_refused_and_merging_takes_none(fw_cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(fw.InputError, match="quantize 'fp4' is unknown; there are: none, nf4, int8"):
        load(llama(tmp_path), "fp4")
    assert "--quantize" in fw_cli("merge", "--adapter", "a", "--quantize", "nf4").err
    assert merge(MergeConfig, {"quantize": "nf4"}, {}) == MergeConfig()  # one recipe can serve several verbs
