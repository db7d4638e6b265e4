"""What prompt methods share: learned embeddings in front of a frozen stack, and text to start them from.

The site is a stack (the decoder, or in an encoder–decoder the encoder), not the whole model: the head then sees only
real tokens, and `generate` works through the same code — the prompt is prepended once, on an empty cache.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .adapter import Part
from .errors import InputError


def argument_names(stack: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of a stack's `forward` (some models call their stack positionally)."""
    return tuple(inspect.signature(type(stack).forward).parameters)[1:]


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


def widen(mask: Tensor | None, n: int) -> Tensor | None:
    """Put `n` visible positions in front of a (batch, seq) attention mask."""
    if mask is None or n == 0:
        return mask
    if mask.dim() != 2:
        raise InputError(f"prompt methods need a (batch, seq) attention mask, not {mask.dim()} dimensions")
    return torch.cat([mask.new_ones(mask.shape[0], n), mask], dim=1)


def past_length(cache: Any) -> int:
    """How many positions a key–value cache holds; 0 when there is none."""
    return int(cache.get_seq_length()) if cache is not None else 0


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
        kw = dict(zip(self.names, args, strict=False)) | kwargs
        embeds, ids = kw.pop("inputs_embeds", None), kw.pop("input_ids", None)
        embeds = self.__dict__["embed"](ids) if embeds is None else embeds
        first = past_length(kw.get("past_key_values")) == 0
        prompt = self.prompt().to(embeds.dtype)
        batch, n = embeds.shape[0], prompt.shape[0]
        if first:
            embeds = torch.cat([prompt.expand(batch, -1, -1), embeds], dim=1)
        kw["attention_mask"] = widen(kw.get("attention_mask"), n)
        if (positions := kw.get("position_ids")) is not None:
            kw["position_ids"] = positions + n
            if first:
                own = torch.arange(n, device=positions.device).expand(positions.shape[0], -1)
                kw["position_ids"] = torch.cat([own, kw["position_ids"]], dim=1)
        if first and (types := kw.get("token_type_ids")) is not None:
            kw["token_type_ids"] = torch.cat([types.new_zeros(batch, n), types], dim=1)
        out = call(inputs_embeds=embeds, **kw)
        if first and self.cut:
            out.last_hidden_state = out.last_hidden_state[:, n:]
        return out


class WidenCrossMask(Part):
    """At a decoder: make room in the cross-attention mask for the prompt that its encoder has prepended."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.names = argument_names(stack)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lengthen `encoder_attention_mask` to the length of `encoder_hidden_states`."""
        kw = dict(zip(self.names, args, strict=False)) | kwargs
        mask, states = kw.get("encoder_attention_mask"), kw.get("encoder_hidden_states")
        if mask is not None and states is not None:
            kw["encoder_attention_mask"] = widen(mask, states.shape[1] - mask.shape[1])
        return call(**kw)
