"""Saving harms nothing, and loading refuses what it cannot honour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import featherweight as fw
import models
import tiny
from featherweight.adapter import facts, trainable
from featherweight.base import fingerprint, same_base
from models import shake


def adapted(seed: int = 0) -> torch.nn.Module:
    model = models.llama()
    fw.attach(model, fw.LoRA(r=2))
    shake(trainable(model), seed=seed)
    return model


def test_saving_into_a_folder_leaves_its_other_files_alone(in_tmp: Path) -> None:
    Path("notes.txt").write_text("mine")
    Path(".git").mkdir()
    fw.save(adapted(), ".")
    fw.save(adapted(1), ".")  # over the first
    found = {p.name for p in Path().iterdir()}
    assert found == {"notes.txt", ".git", "adapter_config.json", "adapter_model.safetensors", "featherweight.json"}
    assert Path("notes.txt").read_text() == "mine"


def test_saving_through_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fw.save(adapted(), tmp_path / "link")
    assert (tmp_path / "real/adapter_config.json").is_file()
    fw.load(models.llama(), tmp_path / "link")


def test_a_start_that_changed_the_base_is_refused(tmp_path: Path) -> None:
    fw.save(adapted(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    tiny.unseal(tmp_path)
    with pytest.raises(fw.InputError, match="init_lora_weights='pissa' changes the base's weights"):
        fw.load(models.llama(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_is_recognised_in_every_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    fw.save(adapted(), tmp_path)
    fw.load(models.llama().to(dtype), tmp_path)
    other = models.llama().to(dtype)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    same = same_base(fingerprint(models.llama()), fingerprint(other))
    assert same == (dtype == torch.float16)  # whose values cannot be compared


def test_an_adapter_knows_its_task_after_training_from_python(tmp_path: Path, llama: Path) -> None:
    data = tiny.write(tmp_path / "r.csv", tiny.reviews())
    base, task = fw.load_base(str(llama), dtype="float32"), fw.load_task(str(data))
    fw.train(base, task, fw.LoRA(r=2), steps=1)
    fw.save(base.model, tmp_path / "mine")
    about = json.loads((tmp_path / "mine/featherweight.json").read_text())
    assert about["labels"] == task.labels
    assert about["template"] == task.template
    assert about["base"] == str(llama)
    again = fw.load_base(str(llama), dtype="float32")
    fw.load(again.model, tmp_path / "mine")
    assert facts(again.model)["template"] == task.template
    texts = fw.generate(base, ["a film"], max_new_tokens=3)
    assert texts == fw.generate(again, ["a film"], max_new_tokens=3)
    assert texts == fw.generate(base, ["a film\nLabel:"], raw=True, max_new_tokens=3)


def test_an_adapters_name_must_be_a_word(tmp_path: Path) -> None:
    model = models.llama()
    with pytest.raises(fw.InputError, match="must be a word"):
        fw.attach(model, fw.LoRA(), name="v1.0")
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_that_is_not_live_is_not_trained(tmp_path: Path, llama: Path) -> None:
    base = fw.load_base(str(llama), dtype="float32")
    task = fw.load_task(str(tiny.write(tmp_path / "r.csv", tiny.reviews())))
    fw.attach(base.model, fw.LoRA(r=2))
    fw.live(base.model)
    with pytest.raises(fw.InputError, match="attached but not live"):
        fw.train(base, task, steps=1)


def test_a_model_whose_weights_are_missing_is_refused(tmp_path: Path) -> None:
    models.llama().model.save_pretrained(tmp_path)  # the stack without its head
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(fw.InputError, match=r"lm_head.weight .* would stay random"):
        fw.load_base(str(tmp_path), dtype="float32")


def test_a_wrong_type_is_named_as_such(llama: Path) -> None:
    with pytest.raises(fw.InputError, match="dtype 'bf16' is unknown"):
        fw.load_base(str(llama), dtype="bf16")
