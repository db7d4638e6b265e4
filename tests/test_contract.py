"""Every method × every family × every promise of `contract.py`, one test each."""

from __future__ import annotations

from pathlib import Path

import pytest

import featherweight as fw
from contract import EVERYWHERE, METHODS, OURS, PROMISES, Promise, refusal
from featherweight.methods import METHODS as REGISTRY

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def test_every_method_of_the_registry_signs_the_contract() -> None:
    assert METHODS.keys() == REGISTRY.keys()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", EVERYWHERE)
def test_promise(family: str, method: str, promise: Promise, tmp_path: Path, record_property: pytest.Function) -> None:
    if message := refusal(promise.name, family, method):
        with pytest.raises(fw.InputError, match=message):
            promise.check(OURS, family, method, tmp_path)
        return
    deviation = promise.check(OURS, family, method, tmp_path)
    if deviation is None:
        return
    assert deviation <= promise.limit, f"off by {deviation:.2g}"
