"""Before anything of ours is imported: no network, and every shape in a signature is enforced while the tests run."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping

with jaxtyping.install_import_hook("featherweight", "beartype.beartype"):
    import featherweight.run  # noqa: F401  (reaches every module but the command line, which imports nothing heavy)

import pytest
import torch

import tiny

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, its tokenizer and a chat template."""
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random T5 and its tokenizer."""
    return tiny.save_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that `runs/` does not land in the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
