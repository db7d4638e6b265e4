"""Every method × every family × every promise of `contract.py`, one test each; some of them on the real model too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import featherweight as fw
from contract import PROMISES, Promise, check_method, hold
from featherweight.methods import METHODS as REGISTRY
from featherweight.methods.lora import LoRAPart
from subjects import EVERYWHERE, METHODS

# Its successor is younger than the oldest transformers that we support.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def test_every_method_of_the_registry_signs_the_contract() -> None:
    assert METHODS.keys() == REGISTRY.keys()


TWINS = ("mistral", "mt5", "roberta")
"""Families that differ little from one that a plain `pytest` tests: Llama, T5, BERT."""


def cases() -> Any:
    """Tracing takes seconds, so outside of the full run only one family is traced, and twins are left out."""
    for family in EVERYWHERE:
        for method in METHODS:
            for promise in PROMISES:
                slow = family in TWINS or (promise.name == "compiles_where_the_base_does" and family != "llama")
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(family, method, promise, id=f"{family}-{method}-{promise.name}", marks=marks)


@pytest.mark.parametrize(("family", "method", "promise"), list(cases()))
def test_promise(family: str, method: str, promise: Promise, tmp_path: Path) -> None:
    hold(promise, method, family, tmp_path)


class Leaking(LoRAPart):
    """A method with a fault: it looks at the whole batch."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return super().forward(call, x) + self.lora_B.weight.mean().to(x.dtype) * x.mean()


def test_a_method_with_a_fault_does_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The contract is worth something only if it can be broken."""
    check_method("lora", "llama", tmp_path / "good")
    monkeypatch.setattr("featherweight.methods.lora.LoRAPart", Leaking)
    broken = []
    for promise in PROMISES:
        try:
            hold(promise, "lora", "llama", tmp_path / promise.name)
        except AssertionError:
            broken.append(promise.name)
    assert {"padding_changes_nothing", "packed_rows_are_alone", "small_batches_add_up", "merged_it_is_the_same"} <= {
        *broken
    }


REAL = [
    p
    for p in PROMISES
    if p.number in ("1", "2", "3", "5", "8", "9") or p.name == "generates_the_same_in_a_batch"  # with a cache
]


@pytest.fixture(scope="module")
def smollm() -> Any:
    """The embedded default as a family; each promise gets a copy."""
    loaded = fw.load_base(dtype="float32", device="cpu").model
    EVERYWHERE["smollm2"] = lambda: copy.deepcopy(loaded)
    yield loaded
    del EVERYWHERE["smollm2"]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("promise", REAL, ids=lambda p: p.name)
@pytest.mark.parametrize("method", METHODS)
def test_promise_on_the_real_model(smollm: Any, method: str, promise: Promise, tmp_path: Path) -> None:
    test_promise("smollm2", method, promise, tmp_path)
