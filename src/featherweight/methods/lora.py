"""LoRA: learn a low-rank correction of a frozen weight.

The idea. A layer multiplies what comes in, x, by a large matrix of weights W. Full fine-tuning changes every number of W.
But what it changes, ΔW, is simple: of low *rank*, which means that it could be done by two thin matrices, one that squeezes x into a few
numbers, and one that spreads those out again. So leave W as it is — *frozen* — and learn the two thin ones, the *adapter*:

    y = W x + s · B A x        A: r × d_in,  B: d_out × r,  s = lora_alpha / r  (rsLoRA: lora_alpha / √r)

B starts at zero, so the adapted model starts as the base. A starts random, else nothing would ever move.

Symbols:
    x: the input of an adapted layer, d_in numbers wide
    y: its output, d_out numbers wide
    W: the layer's own weight, frozen
    A, B: the two thin matrices that are trained (`lora_A`, `lora_B`); B A is the correction ΔW
    r: their rank: how many numbers the correction passes through
    s: how loud the correction is

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3;
rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.

Trainable parameters: r · (d_in + d_out) per adapted layer.
When to use it: the safe first choice; the paper finds it level with full fine-tuning on most tasks.
When not: when thousands of adapters must be tiny (on the default model (IA)³ is 8 and a prompt 40 times smaller).
What it costs: two thin matrix products per adapted layer; the backward pass walks the whole model but computes
no gradient for W. Memory is that of activations: gradients and Adam states are for the thin matrices only.
How to choose:
    r: 8 is a good start. The paper's section 7.2 finds that even 1 to 4 can do; raise it when more rows do not help any more.
    lora_alpha: as r, then tune the learning rate instead: the two do nearly the same (the paper's section 4.1).
    target_modules: more kinds of layers at a lower r rather than one kind at a higher r (the paper's section 7.1); try
        all-linear before a higher rank.
    lora_dropout: try 0.05 to 0.1 when a small data set is read many times; else 0, which is faster.
    use_rslora: for high ranks, where lora_alpha / r would make the correction too quiet to learn.
Pitfalls:
    * Doubling r without lora_alpha halves s: a "larger" adapter that learns more slowly.
    * Merged into bfloat16 weights the correction is rounded once; kept beside them it is not (`examples/merge.py`).
    * A high rank at the default rate may learn nothing: with r = lora_alpha = 32 the embedded encoder stayed at the most frequent
      label of the tweets (benchmarks/results/tweets/table.md). Lower the rate with it.
    * A learning rate from full fine-tuning is too low for it; the search of rates below shows where it learns.
The paper's claim: on GPT-3 175B, 10,000 times fewer trained parameters than full fine-tuning and a third of its memory, with
quality on a par or better, and no slower inference once merged (abstract).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import sites
from ..method import Method, Part


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Hyper-parameters of LoRA."""

    peft_type: ClassVar[str] = "LORA"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"
    learning_rate: ClassVar[float] = 1e-3
    encoder_learning_rate: ClassVar[float] = 5e-3
    sizes: ClassVar[tuple[dict[str, Any], ...]] = ({"r": 2, "lora_alpha": 2}, {"r": 32, "lora_alpha": 32})

    r: int = 8
    """Rank of the correction."""
    lora_alpha: float = 8
    """Scale: the correction is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / √r instead, which keeps high ranks learning."""
    target_modules: str | tuple[str, ...] | None = None
    """Layers to adapt: names, a regular expression, or all-linear; by default those of HF PEFT."""
    fan_in_fan_out: bool = False
    """Whether the base keeps its weights transposed (GPT-2); set by itself."""

    def errors(self) -> Iterator[str]:
        """Check ranges."""
        if self.r < 1:
            yield f"r must be at least 1, not {self.r}"
        if self.lora_alpha == 0:
            yield "lora_alpha must not be 0: the correction would be multiplied by it"
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout must be in [0, 1), not {self.lora_dropout}"

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> LoRA:
        """Name the target modules of this architecture."""
        targets = sites.spelled_out(model, sites.named(self.target_modules or sites.default_lora_targets(model)))
        found = sites.linear_sites(model, targets)
        transposed = isinstance(model.get_submodule(found[0]), sites.Conv1D)
        return replace(self, target_modules=targets, fan_in_fan_out=transposed)

    def sites(self, model: nn.Module) -> list[str]:
        """The linear layers that `target_modules` names."""
        assert self.target_modules is not None, "resolve first"
        return sites.linear_sites(model, self.target_modules)

    def part(self, model: nn.Module, path: str) -> Part:
        """One pair (A, B)."""
        return LoRAPart(*sites.features(model.get_submodule(path)), self)


class _Corrected(torch.autograd.Function):
    """y + s · B A x, keeping x, which the neighbouring layers share, and the r numbers of A x.

    With g the gradient of the result, and h = A x:  dB = s · gᵀ h,  dA = s · (g B)ᵀ x,  dx = s · (g B) A.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:  # noqa: N803
        a, b = A.to(x.dtype), B.to(x.dtype)
        h = F.linear(x, a).mul_(s)
        ctx.save_for_backward(x, h, a, b)
        ctx.s, ctx.dtype = s, A.dtype
        ctx.set_materialize_grads(False)  # where a layer further on loses the gradient, ours is none, not zeros
        return torch.add(y, F.linear(h, b)) if y.dtype != x.dtype else _plus_product(y, h, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        x, h, a, b = ctx.saved_tensors
        flat = g.flatten(0, -2).to(x.dtype)
        gb = (flat @ b).mul_(ctx.s)
        dx = (gb @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        da = (gb.T @ x.flatten(0, -2)).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        db = (flat.T @ h.flatten(0, -2)).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        return g, dx, da, db, None


def _plus_product(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """y + h Bᵀ in one pass."""
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.T).view(y.shape)


class LoRAPart(Part):
    """y = call(x) + s · B A x."""

    def __init__(self, d_in: int, d_out: int, method: LoRA) -> None:
        super().__init__()
        self.lora_A = nn.Linear(d_in, method.r, bias=False)
        self.lora_B = nn.Linear(method.r, d_out, bias=False)
        self.dropout = nn.Dropout(method.lora_dropout)
        self.s = method.lora_alpha / (math.sqrt(method.r) if method.use_rslora else method.r)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, call: Callable[..., Tensor], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Cast the thin matrices to x's type rather than x to theirs: they are smaller; gradients stay float32."""
        y = call(x)
        dropped = self.dropout(x) if self.dropout.p else x
        if torch.compiler.is_compiling():  # the compiler finds its own gradients
            h = F.linear(dropped, self.lora_A.weight.to(x.dtype)) * self.s
            return y + F.linear(h, self.lora_B.weight.to(x.dtype)).to(y.dtype)
        return _Corrected.apply(y, dropped, self.lora_A.weight, self.lora_B.weight, self.s)

    def merged(
        self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
    ) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"] | None]:
        """W + s · B A, added up in float32 and rounded once."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        delta = self.s * self.lora_B.weight.to(exact) @ self.lora_A.weight.to(exact)
        return (weight.to(exact) + delta).to(weight.dtype), bias
