"""Before anything of ours is imported: no network, and every shape in a signature is enforced while the tests run."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # what tests start: there is a process of tests on every core already

import jaxtyping

with jaxtyping.install_import_hook("featherweight", "shapes.checked"):
    import featherweight.run  # noqa: F401  (reaches every module but the command line, which imports nothing heavy)

import pytest
import torch

import tiny
from command import Cli, Result
from featherweight import cli, prepare, run
from forked import Forked

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore Ctrl-C
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, its tokenizer and a chat template."""
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random T5 and its tokenizer."""
    return tiny.save_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stack of a tiny random BERT and its tokenizer."""
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that `runs/` does not land in the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fw_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command line in this process."""

    def call(*args: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["featherweight", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        # `--offline` is said to everything that comes after it, by the environment.
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights fails the test."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    for verbs in (run, prepare):
        monkeypatch.setattr(verbs, "load_base", loaded)


@pytest.fixture
def reviews(in_tmp: Path) -> Path:
    return tiny.write(in_tmp / "reviews.csv", tiny.reviews())


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    """Starts command lines in processes of their own."""
    with Forked() as server:
        yield server


@pytest.fixture
def line(llama: Path, reviews: Path) -> Callable[..., tuple[Any, ...]]:
    """A command line that trains the tiny Llama on the reviews."""
    return lambda *more: ("train", "--model", llama, "--data", reviews, *more)
