"""Models without numbers, to run the engine on: built from a configuration alone, in a second, whatever their size."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from .. import attention, attention_blocks, attention_kernel, hardware
from ..adapter import attach, know
from ..base import Base, skeleton
from ..encoder import is_encoder, own_labels
from ..engine.activations import SMALL
from ..engine.batches import Batch, keeps_apart
from ..method import Method
from ..vocabulary import Waiting, keep_on_host
from .follow import Follower
from .packed import pack_weights

PATTERN = 8  # layers of different kinds alternate with at most this period


def imagined(
    config: Any,
    method: Method,
    *,
    dtype: torch.dtype,
    quantize: str = "none",
    labels: Sequence[str] | None = None,
    on_cpu: bool = True,
    steps: int = 100,
    vocabulary_on_host: bool = False,
) -> Base:
    """A base with a method attached, all of whose tensors are fake ones that say they are on the CPU."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    if labels is None and is_encoder(config):
        labels = own_labels(config)
    model: Any = skeleton(config, labels)
    if on_cpu:
        with suppress(ValueError, KeyError):
            model.set_attn_implementation("eager")  # as `load_base` does
    pack_weights(model, quantize)
    know(model, attach(model, method, encode=lambda _: [0]).scheduled(steps))
    _forget_numbers(model)
    if vocabulary_on_host:
        with model.__dict__["_imagined"]:
            keep_on_host(model, torch.device("cpu"))
    tokenizer = SimpleNamespace(pad_token_id=_pad(model.config), eos_token_id=0)
    return Base(model.eval(), tokenizer, "a simulation", torch.device("cpu"))


def _pad(config: Any) -> int:
    config = config if config.is_encoder_decoder else config.get_text_config()
    return getattr(config, "pad_token_id", None) or 0


def _forget_numbers(model: nn.Module) -> None:
    """Make every tensor of a model a fake one; what is tied stays tied."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()
    model.__dict__["_imagined"] = mode

    def fake(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if id(t) not in made:
            with mode:
                empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
            made[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
        return made[id(t)]

    before = []  # alive until the end: else another tensor may get the same id
    for module in model.modules():
        for place in (module._parameters, module._buffers, module.__dict__):
            for name, t in list(place.items()):
                before.append(t)
                place[name] = fake(t)


def entered(base: Base) -> Any:
    """A context in which operations are simulated, if the base's tensors are fake."""
    return base.model.__dict__.get("_imagined") or nullcontext()


def without_numbers(
    base: Base, tensors: Callable[[Base, list[Any]], Batch], told: Callable[[list[Tensor], str], None]
) -> Callable[[Base, list[Any]], Batch]:
    """The same batches for an imagined base: they are made of real numbers, which are forgotten then."""
    mode: FakeTensorMode | None = base.model.__dict__.get("_imagined")

    def fake(t: Tensor) -> Tensor:
        assert mode is not None
        found: Any = mode.from_tensor(t)
        if layout := getattr(t, "rows_layout", None):
            found.rows_layout = layout
        told([found], "activations")
        return found

    def made(base: Base, rows: list[Any]) -> Batch:
        if mode is None:
            return tensors(base, rows)
        with unset_fake_temporarily():
            real = tensors(base, rows)
        inputs = {name: fake(t) for name, t in real.inputs.items()}
        return Batch(inputs, None if real.at is None else fake(real.at), fake(real.targets), rows)

    return made


@contextmanager
def as_on(follower: Follower, *, cpu: bool, offload: bool) -> Iterator[None]:
    """Inside, the engine does what it would do on a CPU, or on an accelerator. Nothing fake stays in its caches.

    Where packed rows sit is worked out with real numbers. The engine keeps that for many batches: it is a part of its own. What comes
    from a vocabulary on the host is as large as if it were copied.
    """
    seats, rows, takes, kind_of = attention_blocks.seats_of, attention_kernel.rows_of, attention.takes, hardware.kind_of
    look_up, slots_of = Waiting.look_up, Waiting._slots

    def real(function: Any) -> Any:
        def with_numbers(*given: Any) -> Any:
            before, follower.part = follower.part, "seats"
            with unset_fake_temporarily():
                found = function(*given)
            follower.part = before
            return found

        return with_numbers

    def clear() -> None:
        for cached in (seats, rows, attention_blocks.visible, attention._visible_afar):
            cached.cache_clear()

    clear()
    attention_blocks.seats_of, attention_kernel.rows_of = real(seats), real(rows)
    Waiting.look_up = lambda self, ids: (self.table, torch.zeros_like(ids))  # type: ignore[method-assign]
    Waiting._slots = lambda self, n: [torch.empty(n, *self.weight.shape[1:], dtype=self.weight.dtype) for _ in range(2)]  # type: ignore[method-assign]
    if not cpu:
        hardware.kind_of = lambda device: "other"
        attention.takes = attention_kernel.fits
    try:
        with _kept_on_host() if offload and not cpu else nullcontext():
            yield
    finally:
        attention_blocks.seats_of, attention_kernel.rows_of, attention.takes = seats, rows, takes
        Waiting.look_up, Waiting._slots = look_up, slots_of  # type: ignore[method-assign]
        hardware.kind_of = kind_of
        clear()


def _kept_on_host() -> Any:
    """What `activations` does for `offload`: large saved tensors leave the device and come back as new ones."""

    def pack(t: Tensor) -> Any:
        return t if t.numel() < SMALL else (t.shape, t.dtype)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def packs(config: Any, packing: bool | None) -> bool:
    """Whether a run of this model packs its rows: as told, else as found out on a small real model of the same kind."""
    if packing is not None:
        return packing
    if config.is_encoder_decoder or is_encoder(config):
        return False
    kind: Any = type(config)
    return _keeps_apart(kind, config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=8)
def _keeps_apart(kind: Any, written: str) -> bool:
    try:
        return keeps_apart(tiny(kind.from_dict(json.loads(written)), torch.device("cpu")))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
        return False  # what cannot be made small is taken to be padded, which needs more


def tiny(config: Any, device: torch.device) -> Base:
    """A small real model of the same architecture, with random weights."""
    config = _small(copy.deepcopy(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = type(skeleton(config, own_labels(config) if is_encoder(config) else None))(config)
    if device.type == "cpu":
        with suppress(ValueError, KeyError):
            model.set_attn_implementation("eager")
    return Base(model.eval().to(device), SimpleNamespace(pad_token_id=0), "small", device)


def _small(config: Any) -> Any:
    """The same architecture with little in it: each kind of layer once or twice, heads of the same size but few."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["all"]))
    chosen = {
        "vocab_size": 64, "hidden_size": 2 * size, "intermediate_size": 64, "num_hidden_layers": max(2, len(kinds)),
        "num_attention_heads": 2, "num_key_value_heads": 2 if groups == heads else 1, "initializer_range": 0.2,
        "layer_types": (kinds * 2)[: max(2, len(kinds))], "num_local_experts": 4, "num_experts": 4, "dtype": torch.float32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    for name, value in chosen.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    return config


def depth_of(config: Any) -> int | None:
    """How many layers the model has; None where that is not one number, or their pattern is not simple."""
    writer = next((n for n in ("num_decoder_layers", "decoder_layers") if getattr(config, n, None) is not None), None)
    depth = int(config.num_hidden_layers)
    return None if config.is_encoder_decoder and (writer is None or getattr(config, writer) != depth) else depth


def at_depth(config: Any, depth: int) -> Any:
    """The same model with so many layers."""
    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, depth)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    return config


def period_of(config: Any) -> int:
    """After how many layers their kinds repeat."""
    kinds = getattr(config, "layer_types", None) or []
    return next((p for p in range(1, PATTERN + 1) if kinds[p:] == kinds[: len(kinds) - p]), len(kinds) or 1)


__all__ = ["as_on", "at_depth", "depth_of", "entered", "imagined", "packs", "period_of", "tiny", "without_numbers"]
