"""The norm and the gate of `lean.py` in Triton: one kernel forward, one backward. Imported by `kernels.py` only, where it is tried.

A norm's row is one program, which holds it whole: its `block` is the width rounded up to a power of two. A gate is elementwise. Everything
is computed in float32 and rounded once at the end, except w · x̂, where x̂ is rounded first, as in `lean.py` and `transformers`.

Numbers are converted to float32 before anything is done with them: the interpreter (`TRITON_INTERPRET=1`) has bfloat16 as bits, and adds
and multiplies those as integers. Offsets are in 64 bits. Sizes that change from batch to batch make no new program (only an
address that is no multiple of 16 would), so the one that was tried is the one that runs.
"""

# mypy: allow-untyped-defs
# (the compiler looks up what annotates an argument of a kernel, and knows its own names only)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import Way

WIDEST = 65_536  # bytes of a row: what one program can hold
BLOCK = 1024  # of elementwise kernels


@triton.jit
def _norm_forward(x_at, w_at, y_at, r_at, eps, width: tl.constexpr, block: tl.constexpr):
    """y = w · x̂, x̂ = r · x, r = 1 / √(mean(x²) + ε), for one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    here, inside = row * width + column, column < width
    x = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_at + column, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    x_hat = (x * r).to(y_at.dtype.element_ty).to(tl.float32)
    tl.store(y_at + here, (x_hat * w).to(y_at.dtype.element_ty), mask=inside)
    tl.store(r_at + row, r)


@triton.jit
def _norm_backward(dy_at, x_at, w_at, r_at, dx_at, width: tl.constexpr, block: tl.constexpr):
    """dx = r · (w·dy − x̂ · mean(w·dy · x̂)), for one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    here, inside = row * width + column, column < width
    dy = tl.load(dy_at + here, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_at + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_at + row)
    x_hat, wdy = x * r, w * dy
    dx = r * (wdy - x_hat * (tl.sum(wdy * x_hat, axis=0) / width))
    tl.store(dx_at + here, dx.to(dx_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _gate_forward(gate_at, up_at, y_at, n, block: tl.constexpr):
    """y = silu(gate) · up, silu(z) = z · σ(z) = z / (1 + e^−z)."""
    here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = here < n
    gate = tl.load(gate_at + here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_at + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at + here, (gate / (1 + tl.exp(-gate)) * up).to(y_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _gate_backward(dy_at, gate_at, up_at, dgate_at, dup_at, n, block: tl.constexpr):
    """dup = dy · silu(gate), dgate = dy · up · silu′(gate), silu′(z) = σ(z) · (1 + z · (1 − σ(z)))."""
    here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = here < n
    dy = tl.load(dy_at + here, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_at + here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_at + here, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_at + here, dgate.to(dgate_at.dtype.element_ty), mask=inside)
    tl.store(dup_at + here, (dy * gate * sigmoid).to(dup_at.dtype.element_ty), mask=inside)


def _run(program: Any, programs: int, of: Tensor, *given: Any, warps: int = 4, **sizes: int) -> None:
    with torch.accelerator.device_index(of.device.index):  # Triton asks which one is current
        program[(programs,)](*given, **sizes, num_warps=warps, enable_fp_fusion=True)


def _by_rows(program: Any, of: Tensor, *given: Any) -> None:
    width = of.shape[-1]
    block = triton.next_power_of_2(width)
    if block * of.element_size() > WIDEST:
        raise ValueError(f"a row of {width} numbers is too wide for one program")
    warps = 4 if block < 2048 else 8 if block < 8192 else 16
    _run(program, of.numel() // width, of, *given, warps=warps, width=width, block=block)


def _by_blocks(program: Any, of: Tensor, *given: Any) -> None:
    n = of.numel()
    _run(program, triton.cdiv(n, BLOCK), of, *given, n, block=BLOCK)


def _norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, w = x.contiguous(), w.contiguous()
    y, r = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _by_rows(_norm_forward, x, x, w, y, r, eps)
    return y, r


def _norm_gradient(dy: Tensor, x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor]:
    dy, x, w = dy.contiguous(), x.contiguous(), w.contiguous()
    dx = torch.empty_like(x)
    _by_rows(_norm_backward, x, dy, x, w, r, dx)
    return (dx,)


def _gate(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _by_blocks(_gate_forward, y, gate, up, y)
    return (y,)


def _gate_gradient(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _by_blocks(_gate_backward, dy, dy, gate, up, dgate, dup)
    return dgate, dup


norm, gate = Way(_norm, _norm_gradient), Way(_gate, _gate_gradient)
