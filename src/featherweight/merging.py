"""Fold an adapter into the weights of its base: nothing to call any more, so inference costs what the bare base costs.

    merge(model)               # the adapter's parts are now in the weights; the originals wait in host memory
    unmerge(model)             # the weights as they were, bit for bit, and the adapter live in its old place
    merge(model, keep=False)   # for good: no originals, no parts, the plain classes; ready for save_pretrained

When it works: every part can say the matrix that does what it does (`Part.merged`), and every site keeps its weight
unpacked and for itself. In float32 the merged model's output is the adapter's up to rounding. In bfloat16 the merged
weight is rounded once, to eight bits, while the adapter beside it was not: expect that difference.

Why not into quantised weights: an adapter's correction is mostly smaller than the distance between two of the sixteen or
256 values that a weight can have, so quantising anew would round it away. Load the base unquantised and merge there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import _run, attached, detach, folded, living, parts
from .errors import InputError
from .method import Part, Retrained
from .quant import dense_weight, is_quantised, kind, store_weight

Originals = dict[str, dict[str, Tensor]]
"""What the weights were before: site's path → tensor's name → its copy in host memory."""


@torch.no_grad()
def merge(model: nn.Module, name: str = "default", *, keep: bool = True) -> None:
    """Fold an adapter into the weights. It still counts as live, but costs nothing and is not called.

    `keep` keeps the originals in host memory (as many bytes as the changed weights) for `unmerge`; without it the adapter
    is detached and the weights stay as they are now. It must be the innermost live adapter, for the order of two matters.
    Raises `InputError` where it cannot be done; the model is then as it was.
    """
    _check_place(model, name, keep)
    refuse_unmergeable(model, name)
    _check_sites(model, name)
    originals: Originals = {}
    try:
        for path, part in parts(model, name).items():
            site = model.get_submodule(path)
            originals[path] = {k: site.get_parameter(k).detach().to("cpu", copy=True) for k in _changed(site, part)}
            _fold(site, path, part)
    except BaseException:
        _restore(model, originals)
        raise
    state = model.__dict__["_featherweight"]
    if keep:
        state.merged[name] = originals
        _run(model, state.live)
    else:
        model.__dict__.setdefault("_trained_whole", []).extend(attached(model)[name].modules_to_save or ())
        detach(model, name)


@torch.no_grad()
def unmerge(model: nn.Module, name: str = "default") -> None:
    """Put the original weights back, bit for bit; the adapter runs beside them again, in its old place."""
    merged = folded(model)
    if name not in merged:
        raise InputError(f"the adapter {name!r} is not merged; merged: {', '.join(merged) or 'none'}")
    if merged[-1] != name:
        raise InputError(f"the adapter {merged[-1]!r} was merged after {name!r}: unmerge {merged[-1]!r} first")
    state = model.__dict__["_featherweight"]
    _restore(model, state.merged.pop(name))
    _run(model, state.live)


def refuse_merged(model: nn.Module, doing: str) -> None:
    """For what needs the base's own weights: say that they are not there."""
    if merged := folded(model):
        raise InputError(
            f"cannot {doing} while the adapter {merged[-1]!r} is merged into the weights: unmerge it first"
        )


def refuse_unmergeable(model: nn.Module, name: str = "default") -> None:
    """Refuse a method that does something which no weight of the base can do."""
    for path, part in parts(model, name).items():
        if type(part).merged is Part.merged and not isinstance(part, Retrained):  # which takes its module's place
            raise InputError(
                f"{attached(model)[name].title} cannot be merged: what it adds at {path or 'the model itself'!r} "
                f"depends on the input, and no weight there can do the same"
            )


def _check_place(model: nn.Module, name: str, keep: bool) -> None:
    if name not in attached(model):
        raise InputError(f"no adapter named {name!r}; attached: {', '.join(attached(model)) or 'none'}")
    merged, running = folded(model), living(model)
    if name in merged:
        raise InputError(f"the adapter {name!r} is merged already")
    if name not in running:
        raise InputError(f"the adapter {name!r} is not live, so there is nothing to fold in; make it live first")
    if running[len(merged)] != name:
        raise InputError(
            f"the adapter {running[len(merged)]!r} runs inside {name!r}, and their order matters: merge {running[len(merged)]!r} "
            f"first, or live without it"
        )
    if merged and not keep:
        raise InputError(
            f"{name!r} cannot be merged for good over {merged[-1]!r}, which is not: unmerge {merged[-1]!r} first"
        )


def _check_sites(model: nn.Module, name: str) -> None:
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for own in module.parameters(recurse=False):
            owners.setdefault(_address(own), []).append((path, module))
    for path, part in parts(model, name).items():
        site = model.get_submodule(path)
        within = list(site.modules())
        if packed := next((m for m in within if is_quantised(m)), None):
            raise InputError(
                f"{path} is quantised ({kind(packed)}): quantising the merged weight anew would round the correction away; "
                f"load the base unquantised and merge there"
            )
        for key in _changed(site, part):
            tensor = site.get_parameter(key)
            if tensor.is_meta:
                raise InputError(f"{path} has no weights to merge into: it is on the meta device; load the model first")
            if tied := [p for p, m in owners[_address(tensor)] if not any(m is own for own in within)]:
                raise InputError(
                    f"{path}.{key} is tied to the weight of {tied[0]}, which merging would change too; keep the adapter "
                    f"beside the base, or untie the two"
                )


def _address(tensor: Tensor) -> int:
    """Where a tensor's values are: two parameters can share them without being one object."""
    return (0 if tensor.is_meta or type(tensor) is not nn.Parameter else tensor.data_ptr()) or id(tensor)


def _changed(site: nn.Module, part: Part) -> list[str]:
    """The names of the site's own parameters that merging may change."""
    if isinstance(part, Retrained):
        return [key for key, _ in part.module.named_parameters()]
    return [key for key in ("weight", "bias") if getattr(site, key, None) is not None]


def _fold(site: Any, path: str, part: Part) -> None:
    if isinstance(part, Retrained):
        trained = dict(part.module.named_parameters())
        after = {key: trained[key].to(site.get_parameter(key).dtype) for key in trained}
    else:
        weight, bias = part.merged(dense_weight(site), getattr(site, "bias", None))
        after = {"weight": weight} | ({} if bias is None else {"bias": bias})
    for key, tensor in after.items():
        if not isinstance(part, Retrained) and getattr(site, key, None) is None:
            raise InputError(f"the adapter needs a {key} at {path}, and that layer has none: it cannot be merged")
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"merging would make {path}.{key} infinite or NaN in {str(tensor.dtype).removeprefix('torch.')}"
            )
    for key, tensor in after.items():
        if key == "weight" and not isinstance(part, Retrained):
            store_weight(site, tensor)
        else:
            site.get_parameter(key).copy_(tensor)


def _restore(model: nn.Module, originals: Originals) -> None:
    for path, tensors in originals.items():
        for key, tensor in tensors.items():
            model.get_submodule(path).get_parameter(key).copy_(tensor)
