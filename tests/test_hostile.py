"""Files that mean harm: pickles under any name, configurations that name code, indices that point elsewhere. Nothing of it runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import featherweight as fw
import tiny
from command import Cli, complaint
from featherweight import InputError, gate
from featherweight.base import load_config, load_tokenizer


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def plain(canary: Path) -> bytes:
    return pickle.dumps({"model.embed_tokens.weight": Harm(canary)}, protocol=2)


def torch_zip(canary: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"model.embed_tokens.weight": Harm(canary)}, out)
    return out.getvalue()


def torch_old(canary: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"model.embed_tokens.weight": Harm(canary)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


PICKLES = {"a plain pickle": plain, "torch's zip": torch_zip, "torch's old format": torch_old}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "harm was done"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file, which need not be there."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | fields))


def only_weights(folder: Path, name: str, content: bytes) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    return folder


def sharded(folder: Path, name: str, content: bytes) -> Path:
    only_weights(folder, name, content)
    change(folder / "model.safetensors.index.json", metadata={}, weight_map={"model.embed_tokens.weight": name})
    return folder


def with_adapter(folder: Path, name: str, content: bytes) -> Path:
    change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder))
    (folder / name).write_bytes(content)
    return folder


def named_weights(folder: Path, name: str, content: bytes) -> Path:
    change(folder / "config.json", transformers_weights=name)
    (folder / name).write_bytes(content)
    return folder


PLACES: dict[str, tuple[Callable[[Path, str, bytes], Path], str, str]] = {
    "as weights": (only_weights, "pytorch_model.bin", "not in safetensors"),
    "as safetensors": (only_weights, "model.safetensors", "is no safetensors file, whatever its name"),
    "as a shard": (sharded, "model-00001-of-00001.safetensors", "is no safetensors file, whatever its name"),
    "as a shard of its own name": (sharded, "weights.bin", "names 'weights.bin', which is no safetensors file"),
    "as an adapter beside the model": (with_adapter, "adapter_model.bin", "there is an adapter beside the model"),
    "as an adapter's safetensors there": (with_adapter, "adapter_model.safetensors", "an adapter beside the model"),
    "as the weights a config names": (named_weights, "adapter_model.bin", "field transformers_weights names"),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_is_not_read_where_weights_belong(model: Path, canary: Path, kind: str, place: str) -> None:
    spoil, name, said = PLACES[place]
    spoil(model, name, PICKLES[kind](canary))
    with pytest.raises(InputError, match=said) as caught:
        fw.load_base(str(model))
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_not_read_as_gguf(tmp_path: Path, canary: Path, kind: str) -> None:
    (tmp_path / "model.gguf").write_bytes(PICKLES[kind](canary))
    with pytest.raises(InputError, match=r"model.gguf is no GGUF file, whatever its name: it looks like a pickle"):
        fw.load_base(str(tmp_path / "model.gguf"))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_not_read_as_an_adapter(llama: Path, tmp_path: Path, canary: Path, kind: str, name: str) -> None:
    base = fw.load_base(str(llama), dtype="float32")
    fw.attach(base.model, fw.LoRA(r=2))
    fw.save(base.model, tmp_path / "adapter")
    fw.detach(base.model)
    tiny.unseal(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / name).write_bytes(PICKLES[kind](canary))
    with pytest.raises(InputError, match=r"no safetensors file|is a pickled file, which can run code"):
        fw.load(base.model, tmp_path / "adapter")
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json"]
)
def test_a_pickle_is_not_read_as_a_tokenizer(model: Path, canary: Path, name: str) -> None:
    (model / "tokenizer.json").unlink()
    (model / name).write_bytes(plain(canary))
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(model))
    assert "\n" not in str(caught.value)
    assert not canary.exists()


# --- code that a configuration names -----------------------------------------------------------------------------------------

CODE = "import pathlib\npathlib.Path({canary!r}).mkdir()\nclass Mine: pass\n"
NAMED = {
    "a configuration of its own": ("config.json", {"auto_map": {"AutoConfig": "mine.Mine"}}, "auto_map"),
    "a model of its own": ("config.json", {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "auto_map"),
    "another repository's model": ("config.json", {"auto_map": {"AutoModelForCausalLM": "a/b--mine.Mine"}}, "auto_map"),
    "one in a part of it": ("config.json", {"text_config": {"auto_map": {"AutoConfig": "mine.Mine"}}}, "text_config.auto_map"),
    "a tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, "auto_map"),
    "a tokenizer, as of old": ("tokenizer_config.json", {"auto_map": ["mine.Mine", None]}, "auto_map"),
    "a processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "mine.Mine"}}, "auto_map"),
    "an image processor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "mine.Mine"}}, "auto_map"),
    "a way to generate": ("generation_config.json", {"custom_generate": "a/b"}, "custom_generate"),
    "attention": ("config.json", {"attn_implementation": "kernels-community/flash-attn2"}, "attn_implementation"),
    "attention, privately": ("config.json", {"_attn_implementation": "a/b@main:f"}, "_attn_implementation"),
    "attention of a part": ("config.json", {"attn_implementation": {"": "sdpa", "text_config": "a/b"}}, "attn_implementation"),
    "attention in a part": ("config.json", {"text_config": {"_attn_implementation": "paged|a/b"}}, "text_config._attn_implementation"),
    "attention of a package that is not here": ("config.json", {"attn_implementation": "flash_attention_3"}, "attn_implementation"),
    "experts": ("config.json", {"experts_implementation": "sonicmoe"}, "experts_implementation"),
    "kernels": ("config.json", {"use_kernels": True}, "use_kernels"),
}  # fmt: skip


@pytest.mark.parametrize("what", NAMED)
def test_a_configuration_that_names_code_is_refused_by_file_and_field(model: Path, canary: Path, what: str) -> None:
    file, fields, path = NAMED[what]
    for name in ("mine.py", "modeling_mine.py", "generate.py"):
        (model / name).write_text(CODE.format(canary=str(canary)))
    change(model / file, **fields)
    for load in (load_config, load_tokenizer, lambda name: fw.load_base(name)):
        with pytest.raises(InputError) as caught:
            load(str(model))
        assert f"{model}/{file}: the field {path} names" in str(caught.value)
    assert not canary.exists()


def test_a_configuration_for_another_version_is_looked_at_too(model: Path) -> None:
    shutil.copy(model / "config.json", model / "config.5.0.0.json")
    change(model / "config.json", configuration_files=["config.5.0.0.json"])
    load_config(str(model))
    change(model / "config.5.0.0.json", auto_map={"AutoConfig": "mine.Mine"})
    with pytest.raises(InputError, match=r"config\.5\.0\.0\.json: the field auto_map names code"):
        load_config(str(model))


def test_a_configuration_alone_is_looked_at_too(model: Path) -> None:
    change(model / "config.json", auto_map={"AutoConfig": "mine.Mine"})
    with pytest.raises(InputError, match="the field auto_map names code"):
        load_config(str(model / "config.json"))


def test_python_files_and_ways_to_generate_in_a_models_folder_are_not_imported(model: Path, canary: Path) -> None:
    (model / "custom_generate").mkdir()
    for name in ("config.py", "modeling_llama.py", "torch.py", "custom_generate/generate.py"):
        (model / name).write_text(CODE.format(canary=str(canary)))
    base = fw.load_base(str(model))
    assert len(fw.generate(base, ["say film"], max_new_tokens=2)) == 1
    assert not canary.exists()


def test_attention_by_transformers_itself_may_be_named(model: Path) -> None:
    change(model / "config.json", _attn_implementation="sdpa", auto_map={}, use_kernels=False)
    fw.load_base(str(model))


def test_a_way_of_quantising_that_fetches_code_is_refused_where_it_could(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "kernels.py").touch()
    change(model / "config.json", quantization_config={"quant_method": "mxfp4"})
    gate.inspect(str(model))  # without the package nothing is fetched
    monkeypatch.delitem(gate.importlib.sys.modules, "kernels", raising=False)  # type: ignore[attr-defined]
    monkeypatch.syspath_prepend(str(model))
    with pytest.raises(InputError, match="quant_method is 'mxfp4', for which the package `kernels` would fetch code"):
        load_config(str(model))


# --- paths -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(llama: Path, tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    return Path(shutil.copy(llama / "model.safetensors", tmp_path / "outside" / "w.safetensors"))


def index_of(folder: Path, shard: str) -> Path:
    """A folder whose weights are all in this shard, if one believes its index."""
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").unlink()
    change(folder / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, shard))
    return folder


@pytest.mark.parametrize("way", ["absolute", "upwards", "through a link", "through a linked folder"])
def test_an_index_that_points_out_of_the_folder_is_refused(model: Path, outside: Path, way: str) -> None:
    (model / "linked").symlink_to(outside.parent)
    (model / "link.safetensors").symlink_to(outside)
    shard = {
        "absolute": str(outside), "upwards": "../outside/w.safetensors", "through a link": "link.safetensors",
        "through a linked folder": "linked/w.safetensors",
    }[way]  # fmt: skip
    index_of(model, shard)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: it names .* outside the model's folder"):
        fw.load_base(str(model))


def test_links_inside_a_hubs_cache_are_as_they_should_be(llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    index_of(Path(shutil.copytree(llama, tmp_path / "made")), "w.safetensors")
    shutil.copy(llama / "model.safetensors", tmp_path / "made" / "w.safetensors")
    for file in (tmp_path / "made").iterdir():
        shutil.move(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    fw.load_base(str(snapshot))


def test_weights_that_are_cut_short_are_called_damaged(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"is damaged: it has [\d,]+ bytes, and by its own table [\d,]+"):
        fw.load_base(str(model))


def test_an_empty_safetensors_file_is_one(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    gate.check_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["../model", "https://u:p@host/model", "a/b/c", "a b", "C:\\model", "a--b", "a/../b"])
def test_a_name_that_no_hub_can_have_is_refused(name: str, in_tmp: Path, fw_cli: Cli) -> None:
    assert "no folder or file here, and no hub id either" in complaint(fw_cli("plan", "--model", name))


def test_a_data_set_of_another_format_is_refused(in_tmp: Path, canary: Path) -> None:
    import tarfile

    (in_tmp / "data").mkdir()
    with tarfile.open(in_tmp / "data" / "train.tar", "w") as tar:
        for name, content in (("1.pth", torch_zip(canary)), ("1.json", b'{"text": "a", "label": "b"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match="of the format webdataset; tables are read"):
        fw.load_task("data")
    assert not canary.exists()


@pytest.mark.parametrize("template", ["{text.__class__}", "{text[0]}", "{0.__init__}", "{text:{label.__class__}}"])
def test_a_tasks_template_reaches_no_attribute(reviews: Path, template: str) -> None:
    """It is read by hand, never formatted."""
    if template.startswith("{text:"):
        row = fw.load_task(str(reviews), template=template).train[0]
        assert row.spans[0][0] == row.texts[0]
        return
    with pytest.raises(InputError, match="has no column"):
        fw.load_task(str(reviews), template=template)
