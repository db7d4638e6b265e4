"""The layers' small steps, in fewer passes over memory and with less kept for the backward pass.

Two things that almost every modern layer does are written in `transformers` for clarity, and cost more than they look:

* RMSNorm, y = w · x / √(mean(x²) + ε): eight operations forward and fourteen backward, which keep three copies of x.
  Here: the backward pass by its formula, from x and one number a token.

      dx = r · (w·dy − x̂ · mean(w·dy · x̂))        x̂ = r · x,  r = 1 / √(mean(x²) + ε)

* The gated feed-forward, down(silu(gate) · up): keeps silu(gate) as well, which can be had again from gate.

On an accelerator each is one kernel, where Triton is there and it is faster (`kernels.py`); else, and on a CPU, the formulas below.

`lean` puts them in place for as long as a model trains: a module's class is swapped for a subclass whose `forward` does
the same, found out by trying it on a small copy of the module with numbers of ours (so also where the module has none, as in
a simulation). What is not recognised stays as it is. Results are at least as exact: sums are
in float32 and rounded once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .kernels import Way, best


def _norm_formula(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    exact = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    r = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    return exact.mul_(r).to(x.dtype).mul_(w), r


def _norm_gradient(dy: Tensor, x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor]:
    x_hat = x.to(r.dtype, copy=True).mul_(r)
    dx = dy.to(r.dtype, copy=True).mul_(w)
    mean = (dx * x_hat).sum(-1, keepdim=True).div_(x.shape[-1])
    return (dx.addcmul_(x_hat, mean, value=-1).mul_(r).to(x.dtype),)


def _gate_formula(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (F.silu(gate).mul_(up),)


def _gate_gradient(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


NORM, GATE = Way(_norm_formula, _norm_gradient), Way(_gate_formula, _gate_gradient)


class _RMSNorm(torch.autograd.Function):
    """y = w · x / √(mean(x²) + ε) over the last dimension, w frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*batch d"], w: Float[Tensor, " d"], eps: float
    ) -> Float[Tensor, "*batch d"]:
        ctx.way = best("norm", NORM, x, w, eps)
        y, r = ctx.way.forward(x, w, eps)
        ctx.save_for_backward(x, w, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        [dx] = ctx.way.backward(dy, *ctx.saved_tensors)
        return dx, None, None


class _SiLUGate(torch.autograd.Function):
    """silu(gate) · up, keeping the two only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.way = best("gate", GATE, gate, up)
        ctx.save_for_backward(gate, up)
        [y] = ctx.way.forward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = ctx.way.backward(dy, *ctx.saved_tensors)
        return dgate, dup


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, self.weight, _epsilon(self))


def _mlp(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(_SiLUGate.apply(self.gate_proj(x), self.up_proj(x)))
    return out


def _gelu(self: Any, input: Tensor) -> Tensor:
    return F.gelu(input, approximate="tanh")


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _candidate(module: nn.Module) -> Callable[..., Tensor] | None:
    """What a module may be by its looks."""
    names, weight = set(module._modules), module._parameters.get("weight")
    if not names and list(module._parameters) == ["weight"] and isinstance(_epsilon(module), float):
        return _norm if isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad else None
    if (
        {"gate_proj", "up_proj", "down_proj"} <= names
        and "parts" not in names
        and isinstance(getattr(module, "gate_proj", None), nn.Linear)
    ):
        return _mlp
    return _gelu if type(module).__name__ == "NewGELUActivation" else None


def _small_copy(module: nn.Module) -> Any:
    """The same module with few and other weights: what it does depends on its code, not on them. It shares all else."""
    twin = copy.copy(module)
    numbers = {n: torch.linspace(0.5, 1.5, p.numel()) for n, p in module._parameters.items() if p is not None}
    twin.__dict__["_parameters"] = {n: nn.Parameter(t, requires_grad=False) for n, t in numbers.items()}
    if "gate_proj" in module._modules:
        thin = {"gate_proj": _linear(16, 24), "up_proj": _linear(16, 24), "down_proj": _linear(24, 16)}
        twin.__dict__["_modules"] = {**module._modules, **thin}
    return twin


def _linear(d_in: int, d_out: int) -> nn.Linear:
    """A layer with known numbers: drawing them would change what the training draws. They are small enough to tell activations apart."""
    layer = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False)
    layer.weight = nn.Parameter(torch.arange(d_in * d_out).sin().view(d_out, d_in) * 0.3, requires_grad=False)
    return layer


@torch.no_grad()
def _does_the_same(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether `forward` is what the module does: tried on numbers that are far from 0 and 1."""
    twin = _small_copy(module)
    width = twin.weight.shape[0] if "weight" in twin._parameters else 16
    x = torch.linspace(-3, 3, 2 * width).reshape(1, 2, width) * 1.3
    try:
        expected = twin(x)
    except (TypeError, RuntimeError, ValueError):
        return False
    found = forward(twin, x)
    return found.shape == expected.shape and bool((found - expected).norm() <= 0.01 * expected.norm())


@functools.cache
def _leaner(cls: Any, forward: Callable[..., Tensor]) -> Any:
    return type(cls.__name__, (cls,), {"forward": functools.wraps(cls.forward)(forward), "__module__": cls.__module__})


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Inside, the model's norms and gated feed-forwards are those of this file, where they do the same."""
    known: dict[tuple[type, Any], bool] = {}
    swapped: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        forward = _candidate(module)
        cls: Any = type(module)
        if forward is None or "forward" in module.__dict__:
            continue
        kind = (cls, _epsilon(module))
        if kind not in known:
            known[kind] = _does_the_same(module, forward)
        if known[kind]:
            swapped.append((module, cls))
            module.__class__ = _leaner(cls, forward)
    try:
        yield
    finally:
        for module, cls in swapped:
            module.__class__ = cls
