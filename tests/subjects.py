"""What the contract asks: tiny models with adapters, from us or from the real peft, and how far two answers are apart.

Deviations are relative to the size of what is compared; 0.0 is bit for bit.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import featherweight as fw
import models
from featherweight.adapter import trainable
from featherweight.base import Base
from featherweight.rows import Row
from featherweight.sites import is_classifier
from featherweight.tokens import IGNORE, Example
from models import CLASSIFIERS, ENCODER_DECODERS, FAMILIES, shake, words

TEXT = (11, 45, 3, 78, 20, 31, 9, 60)
"""Token ids of the text that prompts start from."""

METHODS: dict[str, fw.Method] = {
    "lora": fw.LoRA(r=4),
    "prompt_tuning": fw.PromptTuning(num_virtual_tokens=8, init_ids=TEXT),
    "p_tuning": fw.PTuning(num_virtual_tokens=24, encoder_hidden_size=64, init_ids=TEXT * 3),
    "prefix_tuning": fw.PrefixTuning(num_virtual_tokens=8, init_ids=TEXT),
    "ia3": fw.IA3(),
    "adalora": fw.AdaLoRA(init_r=4, target_r=2),
}
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
MERGEABLE = ("lora", "ia3", "adalora")


class Float64(TorchFunctionMode):
    """Inside, what a model casts to float32 on its own (norms, softmax, rotary angles) is float64 as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to and args[0].is_floating_point():
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def in_float64(check: Callable[..., float | None]) -> Callable[..., float | None]:
    """A promise that is checked in float64 throughout."""

    @functools.wraps(check)
    def checked(*args: Any) -> float | None:
        with Float64():
            return check(*args)

    return checked


_attention: ContextVar[str | None] = ContextVar("attention", default=None)


def in_both_attentions(check: Callable[..., float | None]) -> Callable[..., float | None]:
    """A promise that is checked with plain matrix products and with PyTorch's fused kernel; the worse of the two."""

    @functools.wraps(check)
    def checked(*args: Any) -> float | None:
        found = []
        for implementation in (
            ("eager", "sdpa") if args[1] in FAMILIES | CLASSIFIERS else ("eager",)
        ):  # a real model is slow
            token = _attention.set(implementation)
            try:
                found.append(check(*args))
            finally:
                _attention.reset(token)
        return None if None in found else max(d for d in found if d is not None)

    return checked


# --- the two sides ------------------------------------------------------------------------------------------------


class Side(Protocol):
    """Who is asked: featherweight or the real peft."""

    def adapt(self, base: Any, method: str, seed: int = 1) -> Any: ...
    def learned(self, model: Any) -> list[nn.Parameter]: ...
    def logits(self, model: Any, **inputs: Any) -> Tensor: ...
    def plain(self, model: Any) -> Any: ...
    def save(self, model: Any, folder: Path) -> None: ...
    def load(self, base: Any, folder: Path) -> Any: ...
    def merge(self, model: Any) -> None: ...
    def unmerge(self, model: Any) -> None: ...


class Ours:
    """featherweight."""

    def adapt(self, base: Any, method: str, seed: int = 1) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fw.attach(base, METHODS[method])
        return base

    def learned(self, model: Any) -> list[nn.Parameter]:
        return trainable(model)

    def logits(self, model: Any, **inputs: Any) -> Tensor:
        out: Tensor = model(**inputs).logits
        return out

    @contextmanager
    def plain(self, model: Any) -> Iterator[None]:
        names = fw.adapter.living(model)
        fw.live(model)
        yield
        fw.live(model, *names)

    def save(self, model: Any, folder: Path) -> None:
        fw.save(model, folder)

    def load(self, base: Any, folder: Path) -> Any:
        fw.load(base, folder)
        return base

    def merge(self, model: Any) -> None:
        fw.merge(model)

    def unmerge(self, model: Any) -> None:
        fw.unmerge(model)


OURS = Ours()


EVERYWHERE = FAMILIES | CLASSIFIERS


def build(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny random model, without dropout."""
    model = EVERYWHERE[family]().to(dtype)
    if implementation := _attention.get():
        model.set_attn_implementation(implementation)
    return model


def adapted(side: Side, family: str, method: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
    """A model with an adapter that is as if it had been trained: its output is not the base's."""
    model = side.adapt(build(family, dtype), method, seed)
    shake(side.learned(model), seed=seed + 6)
    return model


def writes(family: str) -> str:
    """What kind of model a family is."""
    return "encoder-decoder" if family in ENCODER_DECODERS else "classifier" if family in CLASSIFIERS else "decoder"


def off(a: Tensor, b: Tensor) -> float:
    """How far `a` is from `b`, relative to b's size. Shapes that differ and values that are not finite are infinitely far."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def gradients_off(ones: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> float:
    """The length of the difference of two gradients, relative to the length of the second, which must not be nothing."""
    if [g is None for g in ones] != [g is None for g in others]:
        return math.inf
    a, b = (torch.cat([g.flatten().double() for g in side if g is not None]) for side in (ones, others))
    return float((a - b).norm() / b.norm()) if a.isfinite().all() and b.norm() > 0 else math.inf


def base_state(model: Any) -> dict[str, Tensor]:
    """The base's tensors, those of attached parts left out."""
    return {k: v for k, v in model.state_dict().items() if ".parts." not in f".{k}"}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A hash of every byte."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def a_loss(side: Side, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Something to differentiate that depends on every output."""
    return side.logits(model, **inputs).float().log_softmax(-1).square().mean()


def grads(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, [p for p in parameters if p.requires_grad], allow_unused=True))


def a_base(model: Any) -> Base:
    """What the engine needs to know of a model."""
    return Base(model, SimpleNamespace(pad_token_id=models.PAD), "tiny", torch.device("cpu"))


def examples(model: Any, lengths: Sequence[int] = (9, 4, 7, 5, 8, 6)) -> list[Example]:
    """Rows of unequal length whose last words are labels, unequally many; for a classifier each row has a class."""
    rows = []
    for n, length in enumerate(lengths):
        ids = words(1, length, seed=50 + n)[0].tolist()
        labelled = 1 + n % 3
        unlabelled = 0 if model.config.is_encoder_decoder else length - labelled
        targets = [n % 3] if is_classifier(model) else [IGNORE] * unlabelled + ids[-labelled:]
        rows.append(Example(ids, targets, ids[:-labelled], Row((), "", "tiny")))
    return rows
