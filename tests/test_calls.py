"""What a cache is called, whatever the version of transformers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from featherweight.calls import argument_names, cache_in, cache_name, named_arguments


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> None: ...


class Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...


class Plain(nn.Module):
    def forward(self, x: Any) -> None: ...


@pytest.mark.parametrize(("module", "name"), [(New(), "cache"), (Old(), "past_key_values"), (Plain(), None)])
def test_a_cache_is_found_by_either_name(module: nn.Module, name: str | None) -> None:
    assert cache_name(argument_names(module)) == name


@pytest.mark.parametrize("given", ["cache", "past_key_values"])
@pytest.mark.parametrize("module", [New(), Old()])
def test_a_cache_given_by_either_name_arrives_by_the_models_own(module: nn.Module, given: str) -> None:
    names = argument_names(module)
    kw = named_arguments(names, (1,), {given: 2})
    assert kw == {"input_ids": 1, names[1]: 2}
    assert cache_in(kw) == 2


def test_without_a_cache_nothing_is_renamed() -> None:
    assert named_arguments(argument_names(Plain()), (), {"cache": 3}) == {"cache": 3}
    assert cache_in({"x": 1, "cache": None}) is None
