"""A damaged, foreign or hostile adapter is refused by name, and the model stays as it was: promise 14 of the contract."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import featherweight as fw
import models
import tiny
from subjects import METHODS, OURS, adapted, base_state, fingerprint

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "featherweight.json"
every_method = pytest.mark.parametrize("method", METHODS)
every_file = pytest.mark.parametrize("file", [CONFIG, WEIGHTS, ABOUT])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good adapter of every method."""
    folder = tmp_path_factory.mktemp("adapters")
    for method in METHODS:
        OURS.save(adapted(OURS, "llama", method, torch.float32), folder / method)
    return {method: folder / method for method in METHODS}


@pytest.fixture
def copy(saved: dict[str, Path], method: str, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved[method], tmp_path / "adapter"))


def refused(folder: Path, message: str) -> None:
    """Loading raises one clear error, and leaves no trace."""
    model = models.llama()
    before = fingerprint(base_state(model))
    with pytest.raises(fw.InputError, match=message):
        fw.load(model, folder)
    assert not fw.attached(model)
    assert fingerprint(model.state_dict()) == before


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    tiny.unseal(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    tiny.unseal(folder)


@every_file
@every_method
def test_a_flipped_bit_anywhere_is_found(copy: Path, method: str, file: str) -> None:
    good = (copy / file).read_bytes()
    for place in range(0, len(good), max(1, len(good) // 23)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        (copy / file).write_bytes(bad)
        refused(copy, "adapter")
    (copy / file).write_bytes(good)
    fw.load(models.llama(), copy)


@every_file
@every_method
def test_a_truncated_or_empty_file_is_refused_by_name(copy: Path, method: str, file: str) -> None:
    good = (copy / file).read_bytes()
    for length in (0, 1, len(good) // 2, len(good) - 2):
        (copy / file).write_bytes(good[:length])
        refused(copy, file)


@every_method
def test_a_missing_tensor_is_refused_by_name(copy: Path, method: str) -> None:
    change_tensors(copy, lambda tensors: tensors.pop(sorted(tensors)[0]))
    refused(copy, "lacks the tensor")


@every_method
def test_an_unexpected_tensor_is_refused_by_name(copy: Path, method: str) -> None:
    change_tensors(copy, lambda tensors: tensors.update({"../../stray": torch.ones(1)}))
    refused(copy, r"unexpected tensor \.\./\.\./stray")


@every_method
def test_a_tensor_of_another_shape_is_refused_by_name(copy: Path, method: str) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = torch.ones(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)

    change_tensors(copy, widen)
    refused(copy, "has the shape")


@every_method
def test_another_base_is_refused(copy: Path, method: str) -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(fw.InputError, match="was made for another base"):
        fw.load(model, copy)


@pytest.mark.parametrize("method", ["lora"])
def test_an_unknown_method_is_refused_with_the_nearest(copy: Path, method: str) -> None:
    edit(copy, peft_type="LORAA")
    refused(copy, "peft_type 'LORAA' is not known here; did you mean 'LORA'")
    edit(copy, peft_type=["LORA"])
    refused(copy, "peft_type")


@pytest.mark.parametrize("method", ["lora"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "8"),
        ("r", 0),
        ("lora_alpha", None),
        ("target_modules", 7),
        ("target_modules", [1]),
        ("r", -1),
        ("modules_to_save", "x"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(copy: Path, method: str, field: str, value: Any) -> None:
    edit(copy, **{field: value})
    if value is None:  # left out: the default
        fw.load(models.llama(), copy)
    else:
        refused(copy, field)


class Hostile:
    """What a pickle can do."""

    def __reduce__(self) -> Any:
        return (Path("hostile-was-here").touch, ())


@every_method
def test_a_pickled_file_is_not_opened_whatever_its_name(copy: Path, method: str, in_tmp: Path) -> None:
    (copy / WEIGHTS).write_bytes(pickle.dumps(Hostile()))
    refused(copy, WEIGHTS)
    tiny.unseal(copy)
    refused(copy, f"{WEIGHTS} is damaged or no safetensors file")
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    refused(copy, "adapter_model.bin is a pickled file, which can run code and is not read")
    assert not Path("hostile-was-here").exists()


@pytest.mark.parametrize("name", ["../out", "a/b", "a.b", "", "a b", ".."])
def test_a_name_that_is_no_word_is_refused(name: str) -> None:
    model = models.llama()
    with pytest.raises(fw.InputError, match="must be a word of letters, digits and _"):
        fw.attach(model, METHODS["lora"], name)
    fw.attach(model, METHODS["lora"])
    with pytest.raises(fw.InputError, match="must be a word of letters, digits and _"):
        fw.rename(model, "default", name)


@pytest.mark.parametrize("method", ["lora"])
def test_what_is_there_when_a_file_is_missing_is_said(copy: Path, method: str) -> None:
    (copy / WEIGHTS).unlink()
    refused(copy, f"has no {WEIGHTS}|{WEIGHTS}")
    (copy / CONFIG).unlink()
    refused(copy, CONFIG)


def folder_of(copy: Path) -> Path:
    """The same adapter as the hub's cache keeps it: links to blobs of its repository."""
    repository = copy.parent / "models--me--mine"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in (CONFIG, WEIGHTS, ABOUT):
        (copy / file).rename(repository / "blobs" / file)
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    return snapshot


@every_file
@pytest.mark.parametrize("method", ["lora"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(copy: Path, method: str, file: str) -> None:
    (copy / file).rename(copy.parent / "elsewhere")
    (copy / file).symlink_to("../elsewhere")
    refused(copy, f"{file} is a link out of its folder and is not followed")


@every_file
@pytest.mark.parametrize("method", ["lora"])
def test_a_link_within_the_repository_of_a_hub_cache_is(copy: Path, method: str, file: str) -> None:
    snapshot = folder_of(copy)
    fw.load(models.llama(), snapshot)
    (snapshot / file).unlink()
    (snapshot / file).symlink_to("/dev/zero")
    refused(snapshot, f"{file} is a link out of its folder")


@every_file
@pytest.mark.parametrize("method", ["lora"])
def test_what_is_no_file_is_refused_by_name(copy: Path, method: str, file: str) -> None:
    (copy / file).unlink()
    (copy / file).symlink_to("nowhere")
    refused(copy, f"{file} is no file")
    (copy / file).unlink()
    (copy / file).symlink_to(file)
    refused(copy, f"{file} (is no file|cannot be read)")


@pytest.mark.parametrize("method", ["lora"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", ["a", 5]), ("labels", ["a", "a"]), ("template", "{"), ("template", 5), ("columns", {"seed": "1"}), ("kind", "x"),
        ("held_out", {"seed": "x"}), ("base", 5), ("fingerprint", "x"), ("identity", {"tokenizer": 5}), ("data", []),
    ],
)  # fmt: skip
def test_a_wrong_word_in_our_own_file_is_refused_by_name(copy: Path, method: str, key: str, value: Any) -> None:
    tiny.unseal(copy)
    told = json.loads((copy / ABOUT).read_text())
    (copy / ABOUT).write_text(json.dumps(told | {key: value}))
    refused(copy, f"{ABOUT}: {key} must be ")


@pytest.mark.parametrize("method", ["lora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(copy: Path, method: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[1]].view(-1)[3] = value

    change_tensors(copy, spoil)
    refused(copy, "lora_B.weight' holds numbers that are NaN or infinite")


@pytest.mark.parametrize("method", ["lora"])
def test_whole_numbers_are_no_weights(copy: Path, method: str) -> None:
    change_tensors(copy, lambda tensors: tensors.update({k: v.long() for k, v in tensors.items()}))
    refused(copy, "is of the type I64")


@pytest.mark.parametrize("method", ["lora"])
@pytest.mark.parametrize(("field", "value"), [("lora_alpha", float("nan")), ("r", 10**30), ("lora_alpha", 10**400)])
def test_a_number_that_is_none_or_absurd_is_refused_by_file(copy: Path, method: str, field: str, value: float) -> None:
    edit(copy, **{field: value})
    refused(copy, f"{CONFIG}: {field} must be ")


@pytest.mark.parametrize("method", ["lora"])
def test_json_that_is_nested_without_end_is_refused_by_name(copy: Path, method: str) -> None:
    for depth in (200, 100_000):
        (copy / CONFIG).write_text('{"r": ' + "[" * depth + "]" * depth + "}")
        tiny.unseal(copy)
        refused(copy, f"{CONFIG} is not valid JSON: it is nested")
