"""The one idea: an adapter is trainable code around a frozen call.

A method (method.py) says which part goes where; here the parts are put in place, switched and taken away.

    attach(model, LoRA(r=8))           # freezes the base, puts one part at every matching site
    live(model)                        # no name: the plain base, bit for bit
    live(model, "default")             # and back
    detach(model, "default")           # gone: original classes, original keys

How a site calls its parts: its class is swapped for a run-time subclass of the same name whose `forward` goes
through the live parts. Nothing is renamed and no weight is touched, so a quantised layer works like any other.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .method import Method, Part, Retrained
from .quant import dense_shape, is_quantised, make_dependable
from .sites import whole_names, whole_sites
from .vocabulary import refuse_training


@dataclass
class _Attached:
    """What `attach` remembers on the model: its methods, which of them run, what is known of them, and what it froze."""

    methods: dict[str, Method] = field(default_factory=dict)
    live: tuple[str, ...] = ()
    merged: dict[str, Any] = field(default_factory=dict)
    """What `merge` needs to undo itself, per merged adapter in the order of merging; they are the first of `live`."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    frozen: list[nn.Parameter] = field(default_factory=list)


def attached(model: nn.Module) -> dict[str, Method]:
    """The methods attached to a model, by adapter name."""
    state: _Attached | None = getattr(model, "_featherweight", None)
    return dict(state.methods) if state else {}


@functools.cache
def _adapted(cls: Any) -> Any:
    """A subclass of `cls`, with the same name and signature, that calls through its live parts."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = super(sub, self).forward
        for name in self._live:
            if name in self.parts:
                call = functools.partial(self.parts[name], call)
        return call(*args, **kwargs)

    sub: Any = type(cls.__name__, (cls,), {"forward": forward, "_live": (), "__module__": cls.__module__})
    return sub


def _is_site(module: nn.Module) -> bool:
    return "parts" in module._modules and hasattr(type(module), "_live")


def _check_name(model: nn.Module, name: str) -> None:
    if not name.isidentifier():
        raise InputError(f"an adapter's name must be a word of letters, digits and _, not {name!r}")
    if name in attached(model):
        raise InputError(f"an adapter named {name!r} is already attached; detach it or choose another name")


def _plain_copy(module: nn.Module) -> nn.Module:
    """A copy as the plain module that it was before other adapters sat on it or inside it."""
    twin = copy.deepcopy(module)
    for site in sites(twin):
        site.__class__ = type(site).__mro__[1]
        del site.parts, site.__dict__["_live"]
    return twin


def _built(
    model: nn.Module, method: Method, encode: Callable[[str], list[int]] | None
) -> tuple[Method, dict[str, Part]]:
    """The resolved method and all its parts, before any class is swapped."""
    whole = whole_names(model, method.modules_to_save)
    method = replace(method.resolve(model, encode), modules_to_save=whole or None)
    retrained = whole_sites(model, whole)
    refuse_training(model, [*retrained, *method.sites(model)])
    built: dict[str, Part] = {path: Retrained(_plain_copy(model.get_submodule(path))) for path in retrained}
    for path in method.sites(model):
        if not any(f"{path}.".startswith(f"{head}.") for head in retrained):
            built[path] = method.part(model, path)
    return method, built


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    encode: Callable[[str], list[int]] | None = None,
) -> Method:
    """Freeze the base, put one part of `method` at every matching site, and make it live.

    `encode` turns an initialisation text into token ids, for the methods that start from text.
    Returns the resolved method: the one whose fields say which modules were really targeted.
    Raises `InputError` when no site matches or the name is taken; the model is then as it was.
    """
    _check_name(model, name)
    make_dependable(model)  # before the base runs: some methods start from what it computes
    others = living(model)
    live(model, *folded(model))  # an adapter starts from the base, not from what others make of it
    try:
        method, built = _built(model, method, encode)
    finally:
        live(model, *others)

    state: _Attached = model.__dict__.setdefault("_featherweight", _Attached())
    if not state.methods:
        state.frozen = [p for p in model.parameters() if p.requires_grad]
        for p in state.frozen:
            p.requires_grad_(False)
    for path, part in built.items():
        site = model.get_submodule(path)
        if not _is_site(site):
            original: Any = type(site)
            site.__class__ = _adapted(original)
            site.parts = nn.ModuleDict()
        device = getattr(site, "device", None) or next((p.device for p in site.parameters()), None)
        site.get_submodule("parts").register_module(name, part.to(device))
    state.methods[name] = method
    live(model, *state.live, name)
    return method


def sites(model: nn.Module) -> list[nn.Module]:
    """Every adapted module of a model."""
    return [m for m in model.modules() if _is_site(m)]


def living(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that run."""
    state: _Attached | None = getattr(model, "_featherweight", None)
    return state.live if state else ()


def live(model: nn.Module, *names: str) -> None:
    """Choose which adapters run: none is the plain base, several are composed, the first innermost.

    Merged adapters are in the weights and run whatever is chosen, so a choice without them is refused.
    """
    if unknown := [n for n in names if n not in attached(model)]:
        raise InputError(f"no adapter named {unknown[0]!r}; attached: {', '.join(attached(model)) or 'none'}")
    inside = folded(model)
    if names[: len(inside)] != inside:
        raise InputError(
            f"{', '.join(map(repr, inside))} is merged into the weights and cannot be left out; unmerge it first"
        )
    if state := model.__dict__.get("_featherweight"):
        state.live = names
    _run(model, names)


def folded(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that `merge` has folded into the weights, in that order."""
    state: _Attached | None = getattr(model, "_featherweight", None)
    return tuple(state.merged) if state else ()


def _run(model: nn.Module, names: tuple[str, ...]) -> None:
    called = tuple(n for n in names if n not in folded(model))
    for site in sites(model):
        site.__dict__["_live"] = called


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove an adapter. With the last one gone, classes, keys and `requires_grad` are the original ones."""
    if name not in attached(model):
        raise InputError(f"no adapter named {name!r}; attached: {', '.join(attached(model)) or 'none'}")
    if name in folded(model):
        raise InputError(
            f"the adapter {name!r} is merged: unmerge it before detaching it, or merge it for good with keep=False"
        )
    state: _Attached = model.__dict__["_featherweight"]
    del state.methods[name]
    state.facts.pop(name, None)
    state.live = tuple(n for n in state.live if n != name)
    for site in sites(model):
        parts = site.get_submodule("parts")
        parts._modules.pop(name, None)
        if not parts._modules:
            site.__class__ = type(site).__mro__[1]
            del site.parts, site.__dict__["_live"]
    _run(model, state.live)
    if not state.methods:
        for p in state.frozen:
            p.requires_grad_(True)
        del model.__dict__["_featherweight"]


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; it stays live if it was."""
    _check_name(model, new)
    if old not in attached(model):
        raise InputError(f"no adapter named {old!r}; attached: {', '.join(attached(model)) or 'none'}")
    state: _Attached = model.__dict__["_featherweight"]
    state.methods = {new if n == old else n: m for n, m in state.methods.items()}
    state.merged = {new if n == old else n: m for n, m in state.merged.items()}
    if old in state.facts:
        state.facts[new] = state.facts.pop(old)
    for site in sites(model):
        own = site.get_submodule("parts")._modules
        if old in own:
            own[new] = own.pop(old)
    live(model, *(new if n == old else n for n in state.live))


def know(model: nn.Module, method: Method, name: str = "default") -> None:
    """Put another version of an adapter's method in its place, such as one that knows its schedule; parts stay."""
    model.__dict__["_featherweight"].methods[name] = method


def remember(model: nn.Module, name: str = "default", **known: Any) -> None:
    """Keep facts about an adapter with it (its base, template, labels): `save` writes them beside it."""
    model.__dict__["_featherweight"].facts.setdefault(name, {}).update(known)


def facts(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """What `remember` kept."""
    return dict(model.__dict__["_featherweight"].facts.get(name, {})) if name in attached(model) else {}


def parts(model: nn.Module, name: str = "default") -> dict[str, Part]:
    """The parts of one adapter by the path of their site."""
    return {
        path: site.get_submodule("parts")._modules[name]
        for path, site in model.named_modules()
        if _is_site(site) and name in site.get_submodule("parts")._modules
    }


def trainable(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for part in parts(model, name).values() for p in part.parameters() if p.requires_grad]


def count(model: nn.Module, name: str = "default") -> tuple[int, int]:
    """(total, trainable) parameters; a tied tensor counts once, a quantised weight as many as it stands for."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    sizes |= {id(m.weight): dense_shape(m).numel() for m in model.modules() if is_quantised(m) and hasattr(m, "weight")}
    return sum(sizes.values()), sum(p.numel() for p in trainable(model, name))


def snapshot(model: nn.Module, name: str = "default") -> list[Tensor]:
    """A copy of the trained tensors, to come back to with `rewind`."""
    return [p.detach().clone() for p in trainable(model, name)]


@torch.no_grad()
def rewind(model: nn.Module, tensors: list[Tensor], name: str = "default") -> None:
    """Put a `snapshot` back."""
    for p, saved in zip(trainable(model, name), tensors, strict=True):
        p.copy_(saved)


__all__ = [
    "attach", "attached", "count", "detach", "facts", "folded", "know", "live", "living", "parts",
    "remember", "rename", "rewind", "sites", "snapshot", "trainable",
]  # fmt: skip
