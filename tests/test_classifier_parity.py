"""Encoders with a head of their own: the adapter carries the head, and HF PEFT reads and writes the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import featherweight as fw
from featherweight.adapter import trainable
from models import CLASSIFIERS, logits, padded, shake, words
from reference import cannot, peft, theirs
from test_peft_parity import OURS, same

# HF PEFT's own calls into transformers, not ours.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CASES = [
    (family, method) for family in CLASSIFIERS for method in OURS if (family, method) != ("modernbert", "prefix_tuning")
]
every_case = pytest.mark.parametrize(("family", "method"), CASES)


def rows() -> dict[str, torch.Tensor]:
    """Texts of unequal length, padded on the right as encoders want it."""
    return padded([words(1, 9, 1)[0], words(1, 5, 2)[0], words(1, 7, 3)[0]], left=False)


def ask(family: str, method: str) -> Any:
    """A fresh classifier, if the real peft can be asked about it."""
    model = CLASSIFIERS[family]()
    if why := cannot(model, method):
        pytest.skip(why)
    return model


@every_case
def test_hf_peft_loads_what_we_save(family: str, method: str, tmp_path: Path) -> None:
    ours = ask(family, method)
    before = logits(ours, **rows())
    fw.attach(ours, OURS[method])
    shake(trainable(ours))
    expected = logits(ours, **rows())
    assert (expected - before).abs().max() > 1e-2
    fw.save(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    reference = peft.PeftModel.from_pretrained(CLASSIFIERS[family](), tmp_path).eval()
    same(expected, logits(reference, **rows()))


@every_case
def test_we_load_what_hf_peft_saves(family: str, method: str, tmp_path: Path) -> None:
    reference = peft.get_peft_model(ask(family, method), theirs(OURS[method], CLASSIFIERS[family]())).eval()
    shake(p for p in reference.parameters() if p.requires_grad)
    expected = logits(reference, **rows())
    reference.save_pretrained(tmp_path / "theirs")
    ours = CLASSIFIERS[family]()
    fw.load(ours, tmp_path / "theirs")
    same(logits(ours, **rows()), expected)
    fw.save(ours, tmp_path / "ours")
    named = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert named[0].keys() == named[1].keys()


@every_case
def test_we_train_as_many_parameters_as_hf_peft(family: str, method: str) -> None:
    reference = peft.get_peft_model(CLASSIFIERS[family](), theirs(OURS[method], CLASSIFIERS[family]()))
    ours = CLASSIFIERS[family]()
    fw.attach(ours, OURS[method])
    assert fw.count(ours)[1] == reference.get_nb_trainable_parameters()[0]
