"""Where a layer keeps its weight: as a matrix, transposed, or packed into few bits.

An adapter calls the frozen layer, so it need not know. Those that need the matrix itself (merging, methods that look at W)
ask here: one arm per kind, M methods + N kinds instead of M × N classes.

    kind                       kept as                             its matrix
    nn.Linear                  W                                   W
    GPT-2's Conv1D             Wᵀ                                  transposed
    bitsandbytes Linear4bit    4-bit codes, a scale per block      scale · code[index]
    bitsandbytes Linear8bitLt  int8, a scale per row               scale · int8 / 127
    torchao int8 weight-only   int8, a scale per row or group      scale · int8

bitsandbytes and torchao are optional and never imported from here: a layer of theirs is there only after they are.

What bitsandbytes computes with them is changed in two places, by `make_dependable`:

* Linear8bitLt is LLM.int8(): it rounds its *inputs* too, by what all rows of a batch have in common. So an answer depends on
  the rows around it (by 9 % of the logits' norm: `benchmarks/int8_neighbours.py`). And it keeps every input, though
  going back through a frozen weight does not need it. Here it multiplies with its own matrix, unpacked for the product; nothing is kept.
* Linear4bit has a kernel without a gradient on some CPUs, which is switched off.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .sites import Conv1D, features, is_linear

AT_ONCE = 2**18
"""Weights of an int8 matrix that are unpacked together."""


def _is_4bit(site: Any) -> bool:
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(site, bnb.nn.Linear4bit)


def _is_8bit(site: Any) -> bool:
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(site, bnb.nn.Linear8bitLt) and not site.state.has_fp16_weights


def _is_torchao(site: Any) -> bool:
    torchao = sys.modules.get("torchao.utils")
    return torchao is not None and isinstance(getattr(site, "weight", None), torchao.TorchAOBaseTensor)


def _is_plain(site: Any) -> bool:
    weight = getattr(site, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and not _is_torchao(site)


def is_quantised(site: nn.Module) -> bool:
    """Whether a linear layer keeps its weight packed, so that storing another one rounds it."""
    return _is_4bit(site) or _is_8bit(site) or _is_torchao(site) or (is_linear(site) and not _is_plain(site))


def kind(site: nn.Module) -> str:
    """What a layer's weight is kept as, in a word: the class of the layer, or of its tensor where that tells more."""
    return type(site.weight).__name__ if _is_torchao(site) else type(site).__name__


@torch.no_grad()
def dense_weight(site: Any) -> Tensor:
    """The matrix of a linear layer, (d_out, d_in), whatever it is kept as. A plain layer's own weight, not a copy.

    It has the type that the layer was quantised from; int8 of bitsandbytes has forgotten it and gives float32.
    Raises `InputError` for a kind of layer that is not known here.
    """
    if isinstance(site, Conv1D):
        return site.weight.T
    if _is_4bit(site):
        _undo_cpu_packing(site)
        functional = sys.modules["bitsandbytes"].functional
        dense: Tensor = functional.dequantize_4bit(site.weight.data, site.weight.quant_state)
        return dense
    if _is_8bit(site):
        return _int8_matrix(site, torch.float32)
    if _is_torchao(site):
        return site.weight.dequantize()
    if _is_plain(site):
        return site.weight
    raise _unknown(site)


def _int8_matrix(site: Any, dtype: torch.dtype) -> Tensor:
    # bitsandbytes' own forward pass moves the scale.
    scale = site.weight.SCB if site.weight.SCB is not None else site.state.SCB
    packed, scale = site.weight.data, (scale.float() / 127)[:, None]
    matrix: Tensor = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    rows = (
        len(packed) if dtype == torch.float32 or packed.device.type != "cpu" else max(1, AT_ONCE // packed.shape[1])
    )  # a CPU rounds by way of two copies in float32
    for out, some, its in zip(matrix.split(rows), packed.split(rows), scale.split(rows), strict=True):
        out.copy_(some).mul_(its)
    return matrix


@torch.no_grad()
def store_weight(site: Any, w: Tensor) -> None:
    """Make `w`, (d_out, d_in), the layer's weight, in its own type. A quantised layer is quantised anew: that rounds."""
    if isinstance(site, Conv1D):
        site.weight.copy_(w.T)
    elif _is_4bit(site):
        _undo_cpu_packing(site)
        old = site.weight.quant_state
        site.weight.data, site.weight.quant_state = sys.modules["bitsandbytes"].functional.quantize_4bit(
            w.to(old.dtype).contiguous(), blocksize=old.blocksize, compress_statistics=old.nested,
            quant_type=old.quant_type, quant_storage=site.weight.dtype,
        )  # fmt: skip
        site.quant_state = site.weight.quant_state
    elif _is_8bit(site):
        quantise = sys.modules["bitsandbytes"].functional.int8_vectorwise_quant
        site.weight.data, scale, _ = quantise(w.to(torch.float16).contiguous())
        site.weight.CB, site.weight.SCB = site.weight.data, scale
        site.state.CB = site.state.SCB = None  # the next forward pass takes them from the weight
    elif _is_torchao(site):
        site.weight = nn.Parameter(_int8_like(site.weight, w), requires_grad=False)
    elif _is_plain(site):
        site.weight.copy_(w)
    else:
        raise _unknown(site)


def _int8_like(old: Any, w: Tensor) -> Tensor:
    if type(old).__name__ != "Int8Tensor" or old.act_quant_kwargs is not None:
        raise InputError(f"torchao's {type(old).__name__} cannot be quantised anew here: only int8 weight-only can")
    granularity = sys.modules["torchao.quantization"].PerGroup(old.block_size[-1])
    new: Tensor = type(old).from_hp(w.to(old.dtype).contiguous(), granularity)
    return new


def _unknown(site: nn.Module) -> InputError:
    return InputError(
        f"{type(site).__name__} keeps its weight in a form that is not known here: known are nn.Linear, Conv1D, "
        f"Linear4bit and Linear8bitLt of bitsandbytes, and torchao's int8"
    )


def dense_shape(site: nn.Module) -> torch.Size:
    """The shape of a layer's weight as it would be kept unquantised."""
    if not is_quantised(site):
        return site.weight.shape  # type: ignore[return-value]
    wide, high = features(site)
    transposed = getattr(site, "source_cls", None) is Conv1D  # transformers notes what a layer was before
    return torch.Size((wide, high) if transposed else (high, wide))


def make_dependable(model: nn.Module) -> None:
    """Have the layers of bitsandbytes compute each row by itself, with gradients; it stays so after `detach`.

    In 8 bits: products with the layer's own matrix. In 4 bits: on CPUs with AVX512-BF16 a forward pass in evaluation mode
    repacks the weights for a kernel that has no gradient (and stops at layers whose width it does not like), `.train()` does not
    undo it, and from then on training goes on with no gradients at all. So that kernel is switched off. Weights that were
    repacked before are packed back by bitsandbytes' own inverse, but their scales have been rounded to bfloat16: call this
    before the first evaluation, as `load_base` does, to lose nothing.
    """
    for module in model.modules():
        if _is_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            _undo_cpu_packing(module)
        elif _is_8bit(module) and not hasattr(module, "multiplies_exactly"):
            own: Any = type(module)
            module.__class__ = _exact(own)


@functools.cache
def _exact(cls: Any) -> Any:
    """An 8-bit layer of bitsandbytes that multiplies with its own matrix."""

    @functools.wraps(cls.forward)
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler finds its own gradients
            return F.linear(x, _int8_matrix(self, x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        out: Tensor = _Int8Product.apply(x, self)
        return out

    return type(cls.__name__, (cls,), {"forward": forward, "multiplies_exactly": True, "__module__": cls.__module__})


class _Int8Product(torch.autograd.Function):
    """x Wᵀ + b, all but x frozen. W is unpacked for the product, dropped, and unpacked again on the way back: dx = dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Any) -> Tensor:
        ctx.site = site
        return F.linear(x, _int8_matrix(site, x.dtype), None if site.bias is None else site.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ _int8_matrix(ctx.site, dy.dtype), None


def _undo_cpu_packing(site: Any) -> None:
    state = site.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        undo = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
        site.weight.data, site.weight.quant_state = undo(site.weight.data, state)
        site.quant_state = site.weight.quant_state
