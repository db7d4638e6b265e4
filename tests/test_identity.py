"""An adapter knows what it was made with, and is not used with anything else unless it is forced to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
import tiny
from command import Cli, complaint
from featherweight.identity import data_print, template_print, tokenizer_print

LINE = ("--steps", 2, "--dtype", "float32")


@pytest.fixture
def base(in_tmp: Path, llama: Path) -> Path:
    return Path(shutil.copytree(llama, in_tmp / "base"))


def change_tokenizer(folder: Path) -> None:
    """Two words change places."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    one, other = [w for w in vocab if w.isalpha()][:2]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(content))


def change_chat_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|", "<||"))


def test_another_tokenizer_is_refused_unless_forced(fw_cli: Cli, reviews: Path, base: Path) -> None:
    assert fw_cli("train", "--model", base, "--data", reviews, *LINE, "--out", "mine").code == 0
    change_tokenizer(base)
    for verb in (("evaluate", "--data", reviews), ("generate", "--prompt", "a film", "--max-new-tokens", 2)):
        words = complaint(fw_cli(*verb, "--adapter", "mine", "--dtype", "float32"))
        assert "trained with another tokenizer (fingerprint " in words
        assert "--force uses it all the same" in words
        assert fw_cli(*verb, "--adapter", "mine", "--dtype", "float32", "--force").code == 0


def test_nor_is_it_merged_into_one(fw_cli: Cli, reviews: Path, base: Path) -> None:
    assert fw_cli("train", "--model", base, "--data", reviews, *LINE, "--out", "mine").code == 0
    change_tokenizer(base)
    assert "trained with another tokenizer" in complaint(fw_cli("merge", "--adapter", "mine", "--out", "merged"))


def test_another_chat_template_matters_to_instructions_only(
    fw_cli: Cli, in_tmp: Path, base: Path, reviews: Path
) -> None:
    rows = [{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(30)]
    data = tiny.write(in_tmp / "instructions.csv", rows)
    assert fw_cli("train", "--model", base, "--data", data, *LINE, "--out", "answers").code == 0
    assert fw_cli("train", "--model", base, "--data", reviews, *LINE, "--out", "labels").code == 0
    change_chat_template(base)
    ask = ("generate", "--prompt", "what is 3", "--max-new-tokens", 2, "--dtype", "float32", "--adapter")
    assert "trained with another chat template" in complaint(fw_cli(*ask, "answers"))
    assert fw_cli(*ask, "labels").code == 0


def test_another_base_of_the_same_shapes_can_be_forced(fw_cli: Cli, reviews: Path, base: Path, in_tmp: Path) -> None:
    assert fw_cli("train", "--model", base, "--data", reviews, *LINE, "--out", "mine").code == 0
    other = tiny.save_llama(in_tmp / "other", seed=3)
    ask = ("evaluate", "--model", other, "--adapter", "mine", "--data", reviews, "--dtype", "float32")
    assert "made for another base" in complaint(fw_cli(*ask))
    assert fw_cli(*ask, "--force").code == 0


def test_an_adapter_from_python_knows_the_same(llama: Path, reviews: Path, tmp_path: Path) -> None:
    base, task = fw.load_base(str(llama), dtype="float32"), fw.load_task(str(reviews))
    fw.train(base, task, fw.LoRA(r=2), steps=1)
    fw.save(base.model, tmp_path / "mine")
    known = json.loads((tmp_path / "mine" / "featherweight.json").read_text())["identity"]
    assert known["tokenizer"] == tokenizer_print(base.tokenizer)
    assert known["data"] == data_print(task.train)
    assert known["template"] == template_print(base.tokenizer, task.template, "classification")


def test_a_tokenizer_is_recognised_however_it_was_used_and_saved(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    one: Any = AutoTokenizer.from_pretrained(llama)
    before = tokenizer_print(one)
    one("a film", truncation=True, max_length=2)
    assert tokenizer_print(one) == before
    one.save_pretrained(tmp_path)
    assert tokenizer_print(AutoTokenizer.from_pretrained(tmp_path)) == before


def test_data_is_recognised_by_what_is_in_it_not_by_its_place(reviews: Path, tmp_path: Path) -> None:
    task = fw.load_task(str(reviews))
    copied = fw.load_task(str(shutil.copy(reviews, tmp_path / "copy.csv")))
    assert data_print(task.train) == data_print(copied.train)
    assert data_print(task.train) != data_print(task.train[1:])
    assert data_print(task.train) != data_print(task.train[::-1])
