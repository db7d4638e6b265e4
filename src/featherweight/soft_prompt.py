"""What prompt methods share: learned embeddings in front of a frozen stack, and text to start them from.

The site is a stack (the decoder, or in an encoder–decoder the encoder), not the whole model: the head then sees only
real tokens, and `generate` works through the same code — the prompt is prepended once, on an empty cache.

The prompt stands right in front of the text, wherever the text begins: in a row that is padded on the left it comes
after the padding, and positions are counted from the mask. So the output does not depend on the padding. In a packed
row (several texts in one, told by `position_ids` that begin again at 0, no mask) every text gets its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .calls import argument_names, cache_in, named_arguments
from .errors import InputError
from .layout import Layout, layout_of
from .method import Part


def text_ids(text: str, n: int, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """Exactly `n` token ids of a text: cut when longer, repeated when shorter (as HF PEFT does)."""
    ids = encode(text)
    if not ids:
        raise InputError(f"the initialisation text {text!r} has no tokens")
    return tuple((ids * math.ceil(n / len(ids)))[:n])


def starting_ids(ids: tuple[int, ...] | None, n: int, vocabulary: int, device: torch.device) -> Int[Tensor, " n"]:
    """Token ids to start from: those of a text, or words drawn from the vocabulary."""
    if ids is not None:
        return torch.tensor(ids, device=device)
    return torch.randint(0, vocabulary, (n,)).to(device)


def padding_before(mask: Int[Tensor, "batch seq"]) -> Int[Tensor, " batch"]:
    """How many padded positions each row has in front of its text."""
    return (mask.cumsum(1) == 0).sum(1)


def insert(front: Tensor, rows: Tensor, padding: Int[Tensor, " batch"] | None, dim: int = 1) -> Tensor:
    """`rows` (batch first) with `front` put behind their left padding, along `dim`, where only their lengths differ."""
    joined = torch.cat([front, rows], dim)
    if padding is None:
        return joined
    n, before = front.shape[dim], padding[:, None]
    column = torch.arange(joined.shape[dim], device=rows.device)[None]
    source = torch.where(column < before, column + n, torch.where(column < before + n, column - before, column))
    shape = [1] * joined.dim()
    shape[0], shape[dim] = source.shape
    return joined.gather(dim, source.view(shape).expand_as(joined))


def widen(mask: Tensor, n: int, padding: Int[Tensor, " batch"]) -> Tensor:
    """`n` more visible positions in a (batch, seq) attention mask, where `insert` puts them."""
    return insert(mask.new_ones(mask.shape[0], n), mask, padding)


def mask_and_padding(kw: Mapping[str, Any], n: int) -> tuple[Tensor | None, Tensor | None]:
    """The caller's attention mask with room for `n` more positions, and each row's left padding; none without a mask."""
    if (mask := kw.get("attention_mask")) is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise InputError(
            "prompt methods need a (batch, seq) attention mask, not one that has been expanded already "
            "(as generate does for a static cache: leave cache_implementation out)"
        )
    padding = padding_before(mask)
    reads = cache_in(kw) is not None and not torch.compiler.is_compiling()
    if reads and bool((padding == mask.shape[1]).any()):
        raise InputError(
            "with a prompt or prefix no row may be padding alone, as prefill_chunk_size makes it of a short row's first chunk"
        )
    return widen(mask, n, padding), padding


def text_positions(given: Tensor | None, mask: Tensor | None, n: int, queries: int) -> Tensor | None:
    """Positions of the last `queries` tokens behind a prompt of `n`: the given ones shifted, else counted by the mask."""
    if given is not None:
        return given + n
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, -queries:]


def past_length(cache: Any) -> int:
    """How many positions of earlier reading a key–value cache holds; 0 when there is none."""
    own = getattr(cache, "self_attention_cache", cache)
    return 0 if own is None or getattr(own, "first_reading", False) else int(own.get_seq_length())


def check_continues(kw: Mapping[str, Any], n: int, queries: int, call: Callable[..., Any]) -> None:
    """Refuse to go on from a cache whose length the caller took for the text's alone: words would be skipped, or read twice.

    `generate` does so when it is handed the cache of an earlier call.
    """
    past = past_length(cache_in(kw))
    mask, positions = kw.get("attention_mask"), kw.get("position_ids")
    text = 0  # how many tokens the caller has given in all, this call's included
    if isinstance(mask, Tensor):
        text = mask.shape[1] if mask.dim() == 2 else 0
    elif positions is not None and past and queries > 1 and not torch.compiler.is_compiling():
        text = int(positions.max()) + 1  # one token at a time is not worth waiting for an accelerator
    inner = isinstance(call, functools.partial)  # further prompts inwards, perhaps, of which the cache is longer still
    if past and (not queries or (text and (text + n > past + queries or (text + n < past + queries and not inner)))):
        raise InputError(
            "with a prompt or prefix, generate cannot go on from the cache of an earlier call: leave the cache out"
        )


def refuse_packed(kw: Mapping[str, Any]) -> None:
    """Refuse rows that hold several texts told apart by positions alone: only the first would have the prompt in front."""
    positions = kw.get("position_ids")
    if positions is None or kw.get("attention_mask") is not None or past_length(cache_in(kw)):
        return
    if torch.compiler.is_compiling():
        raise InputError("a compiled model with a prompt or prefix needs an attention mask, or no position_ids")
    if bool((positions[:, 1:] == 0).any()):
        raise InputError(
            "with a prompt or prefix, texts packed into one row need a mask of row numbers: "
            "see featherweight.layout.Layout, or train with packing"
        )


class Prepend(Part):
    """Base of the parts that put `prompt()` (tokens × width) in front of a stack's input embeddings."""

    def __init__(self, stack: nn.Module, cut: bool) -> None:
        super().__init__()
        self.names = argument_names(stack)
        self.cut = cut  # a decoder's outputs are cut back to the real tokens; an encoder's stay visible to its decoder
        self.__dict__["embed"] = stack.get_input_embeddings()  # type: ignore[operator]  # the base's: not registered here

    def prompt(self) -> Float[Tensor, "n d"]:
        """The learned embeddings."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Prepend on an empty cache; afterwards only lengthen the mask and shift the positions."""
        kw = named_arguments(self.names, args, kwargs)
        embeds, ids = kw.pop("inputs_embeds", None), kw.pop("input_ids", None)
        embeds = self.__dict__["embed"](ids) if embeds is None else embeds
        if layout := layout_of(kw.get("attention_mask")):
            return self._packed(call, embeds, layout, kw)
        refuse_packed(kw)
        prompt = self.prompt().to(embeds.dtype)
        first, batch, n = past_length(cache_in(kw)) == 0, embeds.shape[0], prompt.shape[0]
        if self.cut:
            check_continues(kw, n, embeds.shape[1], call)
        mask, padding = mask_and_padding(kw, n)
        kw["attention_mask"] = mask
        given = kw.get("position_ids")
        if given is not None or (self.cut and "position_ids" in self.names):
            positions = text_positions(given, mask, n, embeds.shape[1])
            if first and positions is not None:
                own = torch.arange(n, device=positions.device).expand(batch, -1)
                positions = insert(own, positions.expand(batch, -1), padding)
            kw["position_ids"] = positions
        if first and (types := kw.get("token_type_ids")) is not None:
            kw["token_type_ids"] = torch.cat([types.new_zeros(batch, n), types], dim=1)
        if first:
            embeds = insert(prompt.expand(batch, -1, -1), embeds, padding)
        out = call(inputs_embeds=embeds, **kw)
        if first and self.cut:
            out.last_hidden_state = out.last_hidden_state[:, n:]
        return out

    def _packed(self, call: Callable[..., Any], embeds: Tensor, layout: Layout, kw: dict[str, Any]) -> Any:
        """Several texts in one row: they share the prompt, so it is read once."""
        prompt = self.prompt().to(embeds.dtype)[None]
        n = prompt.shape[1]
        kw["attention_mask"] = layout.after(n).mask(embeds.device)
        own = torch.arange(n, device=embeds.device)[None]
        kw["position_ids"] = torch.cat([own, kw["position_ids"] + n], dim=1)
        out = call(inputs_embeds=torch.cat([prompt, embeds], dim=1), **kw)
        out.last_hidden_state = out.last_hidden_state[:, n:]
        return out


class WidenCrossMask(Part):
    """At a decoder: make room in the cross-attention mask for the prompt that its encoder has prepended."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.names = argument_names(stack)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lengthen `encoder_attention_mask` to the length of `encoder_hidden_states`."""
        kw = named_arguments(self.names, args, kwargs)
        mask, states = kw.get("encoder_attention_mask"), kw.get("encoder_hidden_states")
        if mask is not None and states is not None:
            kw["encoder_attention_mask"] = widen(mask, states.shape[1] - mask.shape[1], padding_before(mask))
        return call(**kw)
