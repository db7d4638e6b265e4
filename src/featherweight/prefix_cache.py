"""How a prefix reaches the attention layers: as keys and values in a cache that nothing has been read into yet.

Attention layers hand their keys and values to a cache and go on with what it returns. `Reading` is a cache that returns
them with the prefix put between a row's left padding and its text, so that no output depends on the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from .calls import argument_names, cache_name
from .soft_prompt import insert


class Reading(Cache):
    """The cache of a first reading: prefix and text. It goes on into the caller's own cache, if there is one."""

    first_reading = True

    def __init__(self, states: list[tuple[Tensor, Tensor]], padding: Tensor | None, kept: Any) -> None:
        super().__init__(layers=[])
        self.states, self.padding, self.kept = states, padding, kept
        self.n = states[0][0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """A layer's keys and values, batch × heads × seq × size, with its prefix."""
        keys, values = self.states[layer_idx]
        keys = insert(keys, key_states, self.padding, dim=2)
        values = insert(values, value_states, self.padding, dim=2)
        return (keys, values) if self.kept is None else self.kept.update(keys, values, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many keys come before the text."""
        return self.n + (int(self.kept.get_seq_length(layer_idx)) if self.kept is not None else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(number of keys, offset of the first)."""
        length = query_length + self.n
        return (length, 0) if self.kept is None else self.kept.get_mask_sizes(length, layer_idx)

    @property
    def is_compileable(self) -> bool:
        """No: its keys grow."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """In a first reading no layer has dropped anything yet."""
        return [False] * len(self.states)


def reading(states: list[tuple[Tensor, Tensor]], padding: Tensor | None, cache: Any, crosses: bool) -> Any:
    """A `Reading` of the kind that the layers expect; what they read is kept in `cache`, if there is one.

    `states`: keys and values per layer, batch × heads × n × size. `crosses`: the layers also attend to an encoder.
    """
    if not crosses:
        return Reading(states, padding, cache)
    own = Reading(states, padding, None if cache is None else cache.self_attention_cache)
    both = EncoderDecoderCache(own, DynamicCache() if cache is None else cache.cross_attention_cache)
    if cache is not None:
        both.is_updated = cache.is_updated
    return both


def _checkpointed(stack: nn.Module) -> dict[Any, str]:
    """Layers that are run twice in training, forward and again in the backward pass, and what each calls its cache."""
    if not stack.training:
        return {}
    layers = (m for m in stack.modules() if m is not stack and getattr(m, "gradient_checkpointing", False))
    names = {m: cache_name(argument_names(m)) for m in layers if hasattr(m, "_gradient_checkpointing_func")}
    return {m: name for m, name in names.items() if name}


def runs_twice(stack: nn.Module) -> bool:
    """Whether the stack's activations are checkpointed: then nothing may be kept, or it would be kept twice."""
    return bool(_checkpointed(stack))


@contextmanager
def handing_on(stack: nn.Module, fresh: Callable[[], Any]) -> Iterator[None]:
    """Inside, checkpointed layers are handed a fresh cache for each run; `transformers` would take any from them.

    It does so because a layer that is run twice stores its keys twice. A `Reading` without a kept cache stores nothing.
    """
    found = _checkpointed(stack)
    before = {layer: layer._gradient_checkpointing_func for layer in found}
    for layer, name in found.items():
        layer._gradient_checkpointing_func = _with_cache(before[layer], argument_names(layer).index(name), name, fresh)
    try:
        yield
    finally:
        for layer, checkpoint in before.items():
            layer._gradient_checkpointing_func = checkpoint


def _with_cache(checkpoint: Callable[..., Any], place: int, name: str, fresh: Callable[[], Any]) -> Callable[..., Any]:
    """`checkpoint(layer, *args)` with a fresh cache as the argument `name`, which some models pass by its place."""

    def run(layer: Callable[..., Any], *args: Any) -> Any:
        def filled(*args: Any) -> Any:
            if len(args) > place:
                return layer(*args[:place], fresh(), *args[place + 1 :])
            return layer(*args, **{name: fresh()})

        return checkpoint(filled, *args)

    return run
