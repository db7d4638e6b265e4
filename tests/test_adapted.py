"""`load_adapted`: a folder is enough to have the base and the adapter back, and what does not fit is refused before it loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import featherweight as fw
import tiny
from featherweight import InputError, adapted


@pytest.fixture(scope="module", params=["llama", "bert"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, fw.Score]:
    """A base, an adapter, and how it answered before it was saved."""
    place = tmp_path_factory.mktemp("adapted")
    model = Path(shutil.copytree(request.getfixturevalue(request.param), place / "base"))
    task = fw.load_task(str(tiny.write(place / "reviews.csv", tiny.reviews())), test_fraction=0.3)
    loaded = fw.load_base(str(model), task.labels, dtype="float32", device="cpu")
    fw.train(loaded, task, fw.IA3(), steps=4, lr=3e-2)
    fw.save(loaded.model, place / "adapter")
    return model, place / "adapter", fw.evaluate(loaded, task)


def answers(again: fw.Base, folder: Path) -> list[str]:
    task = fw.load_task(str(folder.parent / "reviews.csv"), test_fraction=0.3)
    return fw.evaluate(again, task).predictions


def test_the_folder_is_enough(saved: tuple[Path, Path, fw.Score]) -> None:
    _, folder, before = saved
    again = fw.load_adapted(folder, dtype="float32", device="cpu")
    assert isinstance(fw.attached(again.model)["default"], fw.IA3)
    assert answers(again, folder) == before.predictions


def test_the_base_may_have_moved(saved: tuple[Path, Path, fw.Score], tmp_path: Path) -> None:
    model, folder, before = saved
    moved = shutil.copytree(model, tmp_path / "moved")
    again = fw.load_adapted(folder, model=str(moved), dtype="float32", device="cpu")
    assert answers(again, folder) == before.predictions


def test_without_a_base_in_the_folder_one_is_asked_for(saved: tuple[Path, Path, fw.Score], tmp_path: Path) -> None:
    model, folder, before = saved
    folder = Path(shutil.copytree(folder, tmp_path / "theirs"))
    (folder / "featherweight.json").unlink()  # as HF PEFT leaves it
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match=r"theirs does not say which base it is for; name it with model="):
        fw.load_adapted(folder)
    labels = sorted(set(before.answers))
    again = fw.load_adapted(folder, model=str(model), labels=labels, dtype="float32", device="cpu")
    assert isinstance(fw.attached(again.model)["default"], fw.IA3)


def test_another_model_is_refused_before_its_weights_are_read(
    saved: tuple[Path, Path, fw.Score], t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_yet(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(adapted, "load_base", not_yet)
    with pytest.raises(InputError, match="adapter"):
        fw.load_adapted(saved[1], model=str(t5))
    with pytest.raises(InputError, match="there is no folder"):
        fw.load_adapted(saved[1] / "nothing")
