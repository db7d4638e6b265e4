"""What is kept of the forward pass for the backward pass, and where.

* `none`: everything autograd asks for. Fastest.
* `layer`: of each layer only its input; the layer is computed again when its gradient is wanted. About a third more work,
  a small part of the memory (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174).
* `offload`: as `layer`, and on an accelerator the inputs wait in the host's memory. The copies run beside the computation.
  On a CPU there is nowhere else to put them: there it is `layer`.

What is computed again is computed by the same operations with the same random numbers, so gradients are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

CHOICES = ("none", "layer", "offload")
SMALL = 2**16  # numbers; what is smaller is not worth a copy


@contextmanager
def activations(model: Any, kept: str) -> Iterator[None]:
    """Inside, layers keep what `kept` says. Raises `InputError` where the model's layers cannot be computed again."""
    if kept not in CHOICES:
        raise InputError(f"checkpoint_activations {kept!r} is unknown; there are: {', '.join(CHOICES)}")
    if kept == "none":
        yield
        return
    if not model.supports_gradient_checkpointing:
        raise InputError(f"--checkpoint-activations: the layers of {type(model).__name__} cannot be computed again")
    before = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    _switch(model, "enable", {"use_reentrant": False})
    away = _on_host(model) if kept == "offload" and model.device.type != "cpu" else nullcontext()
    try:
        with away:
            yield
    finally:
        if not before:
            _switch(model, "disable")


def _switch(model: Any, to: str, *given: Any) -> None:
    """transformers renames it: gradient checkpointing, then activation checkpointing."""
    named = (
        "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    )
    getattr(model, f"{named}_{to}")(*given)


def _on_host(model: Any) -> Any:
    """Saved tensors go to pinned host memory on a stream of their own, and come back when they are asked for.

    Only a layer's input reaches these hooks: within a layer, checkpointing has hooks of its own, further inside.
    """
    beside = torch.Stream(torch.accelerator.current_accelerator())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}  # they are there anyway

    def pack(t: Tensor) -> Any:
        if t.device.type == "cpu" or t.numel() < SMALL or t.untyped_storage().data_ptr() in weights:
            return t
        host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
        beside.wait_stream(torch.accelerator.current_stream())
        with beside:
            host.copy_(t, non_blocking=True)
        t.record_stream(beside)  # its memory is not given away before it is copied
        return host, t.device

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        host, device = kept
        torch.accelerator.current_stream().wait_stream(beside)
        back: Tensor = host.to(device, non_blocking=True)
        return back

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
