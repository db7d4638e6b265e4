"""AdaLoRA: a low-rank correction whose rank moves, while training, to the layers that need it.

The idea. LoRA gives every layer the same rank, though some need more of it than others. Write the correction like a
singular value decomposition, start with too much rank everywhere, and cut the least important singular values away,
over all layers at once, until the mean rank is `target_r`:

    y = W x + s · B (Λ ⊙ (A x))       A: init_r × d_in,  B: d_out × init_r,  s = lora_alpha / init_r

Λ starts at zero, A and B random; a penalty keeps the rows of A and the columns of B orthonormal (`orth_reg_weight`).
Λᵢ, row i of A and column i of B are a triplet. It is as important as Λᵢ is, plus the mean over its row, plus the mean over its
column, where one number w has

    I = |w · ∂L/∂w|    Ī ← β₁ Ī + (1 − β₁) I    U ← β₂ U + (1 − β₂) |I − Ī|    importance of w = Ī · U

After update t the b(t) most important triplets of all layers together keep their Λ, the others' is set to zero:

    b(t) = b_target + (b_init − b_target) · (1 − (t − tinit) / (total_step − tfinal − tinit))³    b = mean rank × layers

Nothing is cut in the first `tinit` updates. A cut Λ still gets gradients and may come back, until the last `tfinal`
updates, in which the ranks stand. On disk only the triplets that are left remain; `rank_pattern` says which.

Symbols:
    x: the input of an adapted layer, d_in numbers wide
    y: its output, d_out numbers wide
    W: the layer's own weight, frozen
    A, B: two thin matrices that are trained (`lora_A`, `lora_B`)
    Λ: init_r trained numbers (`lora_E`), the singular values of the correction
    s: how loud the correction is
    w: any trained number; L is the loss
    Ī, U: the running importance of w and its uncertainty
    t: the number of the update
    b: how many triplets are left in all layers together

Paper: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512,
section 3 and, for b(t), appendix A; as in HF PEFT the fraction starts from zero, where the paper takes tfinal from t too.
The penalty is HF PEFT's: the mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖, where the paper sums their squares.

Trainable parameters: init_r · (d_in + d_out + 1) per adapted layer; about target_r / init_r of them are saved.
When to use it: a small budget of parameters and a run of hundreds of steps; it shows which layers matter to a task.
When not: for short runs (the ranks are decided from noise), or where LoRA's one rank does well enough. It takes a
higher learning rate than LoRA, because A, Λ and B are all small at the start.
What it costs: LoRA's costs at init_r, two products of thin matrices per layer and update for the penalty, and two more
numbers for each trained one, beside Adam's two.
How to choose:
    target_r: the rank that LoRA would get.
    init_r: half as much again, as in the paper: room to choose from.
    tinit, tfinal: leave them; a tenth of the run to warm up, three tenths to settle.
    orth_reg_weight: leave it, or try 0.1 and 0.3: the paper chooses among these three.
Pitfalls:
    * In too short a run the ranks are cut before the importance means anything.
    * Another number of steps is another schedule: a longer run is not a continued shorter one.
    * The trained parameters are init_r's; only the saved ones are target_r's.
The paper's claim: better than LoRA and adapters at the same number of parameters, most of all where that number is small
(abstract).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .. import sites
from ..errors import InputError
from ..method import Method, Part


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Hyper-parameters of AdaLoRA."""

    peft_type: ClassVar[str] = "ADALORA"
    title: ClassVar[str] = "AdaLoRA"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv:2303.10512"
    learning_rate: ClassVar[float] = 5e-3
    encoder_learning_rate: ClassVar[float] = 2e-2
    sizes: ClassVar[tuple[dict[str, Any], ...]] = ({"init_r": 6, "target_r": 4}, {"init_r": 24, "target_r": 16})

    init_r: int = 12
    """Rank of every layer at the start."""
    target_r: int = 8
    """Mean rank of the layers at the end."""
    lora_alpha: float = 8
    """Scale: the correction is multiplied by lora_alpha / init_r."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    target_modules: str | tuple[str, ...] | None = None
    """Layers to adapt: names, a regular expression, or all-linear; by default those of HF PEFT."""
    fan_in_fan_out: bool = False
    """Whether the base keeps its weights transposed (GPT-2); set by itself."""
    beta1: float = 0.85
    """Inertia of the importance."""
    beta2: float = 0.85
    """Inertia of its uncertainty."""
    orth_reg_weight: float = 0.5
    """Weight of the penalty that keeps A and B orthonormal."""
    tinit: int | None = None
    """Updates before the first cut; by default a tenth of the run."""
    tfinal: int | None = None
    """Updates after the last cut; by default three tenths of the run."""
    deltaT: int = 1  # noqa: N815 (HF PEFT's name)
    """Updates from one cut to the next."""
    total_step: int | None = None
    """Updates that tinit and tfinal count on; a run of another length stretches or shortens them."""
    rank_pattern: dict[str, list[bool]] | None = None
    """Which triplets are left at each layer: what training writes and a loaded adapter has, not an option."""

    def errors(self) -> Iterator[str]:
        """Check ranges, and that the schedule leaves a step to cut in."""
        least = {
            "init_r": 1,
            "target_r": 1,
            "orth_reg_weight": 0,
            "tinit": 0,
            "tfinal": 0,
            "deltaT": 1,
            "total_step": 1,
        }
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                yield f"{name} must be at least {low}, not {value}"
        if (
            self.target_r > self.init_r and self.total_step is None
        ):  # HF PEFT saves such ones; only training cannot go on
            yield f"target_r must be at most init_r={self.init_r}, not {self.target_r}"
        if self.lora_alpha <= 0:
            yield f"lora_alpha must be above 0, not {self.lora_alpha}"
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout must be in [0, 1), not {self.lora_dropout}"
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                yield f"{name} must be between 0 and 1, not {getattr(self, name)}"
        if self.total_step is not None and (self.tinit or 0) + (self.tfinal or 0) >= self.total_step >= 1:
            phases = f"tinit={self.tinit or 0} and tfinal={self.tfinal or 0}"
            yield f"{phases} leave none of {self.total_step} steps to allocate ranks in; lower them or train longer"
        if any(len(kept) != self.init_r for kept in (self.rank_pattern or {}).values()):
            yield f"rank_pattern must have init_r={self.init_r} values for every layer"

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> AdaLoRA:
        """Name the target modules of this architecture."""
        targets = sites.spelled_out(model, sites.named(self.target_modules or sites.default_adalora_targets(model)))
        found = sites.linear_sites(model, targets)
        if unknown := [key for key in self.rank_pattern or {} if key.removesuffix(".lora_E") not in found]:
            raise InputError(f"rank_pattern: this model has no adapted layer {unknown[0].removesuffix('.lora_E')!r}")
        transposed = isinstance(model.get_submodule(found[0]), sites.Conv1D)
        return replace(self, target_modules=targets, fan_in_fan_out=transposed)

    def sites(self, model: nn.Module) -> list[str]:
        """The linear layers that `target_modules` names."""
        assert self.target_modules is not None, "resolve first"
        return sites.linear_sites(model, self.target_modules)

    def part(self, model: nn.Module, path: str) -> Part:
        """One (A, Λ, B), with the triplets that `rank_pattern` leaves."""
        kept = (self.rank_pattern or {}).get(f"{path}.lora_E")
        return AdaLoRAPart(*sites.features(model.get_submodule(path)), self, kept)

    def scheduled(self, steps: int) -> AdaLoRA:
        """Fit the phases to the run. An adapter that was loaded with its ranks keeps them, and its old schedule."""
        if self.rank_pattern is not None:
            return self
        if self.target_r > self.init_r:
            raise InputError(f"AdaLoRA: target_r must be at most init_r={self.init_r} to train, not {self.target_r}")
        stretch = steps / (self.total_step or steps)
        tinit = steps // 10 if self.tinit is None else round(self.tinit * stretch)
        tfinal = 3 * steps // 10 if self.tfinal is None else round(self.tfinal * stretch)
        return replace(self, tinit=tinit, tfinal=tfinal, total_step=steps)

    def penalty(self, parts: Mapping[str, Part]) -> Float[Tensor, ""] | None:
        """How far rows of A and columns of B are from orthonormal: the mean of ‖AAᵀ − I‖ and ‖BᵀB − I‖, weighted."""
        if not self.orth_reg_weight:
            return None
        thin = [m for part in _own(parts) for m in (part.lora_A, part.lora_B.T)]
        eye = torch.eye(self.init_r, device=thin[0].device)
        return torch.stack([torch.linalg.matrix_norm(m @ m.T - eye) for m in thin]).mean() * self.orth_reg_weight

    @torch.no_grad()
    def after_step(self, parts: Mapping[str, Part], step: int) -> None:
        """Follow the importance, and cut where the schedule says so. Once the ranks stand, keep them."""
        own = _own(parts)
        if bool(own[0].allocated):
            for part in own:
                part.cut()
            return
        if self.tinit is None or self.tfinal is None or self.total_step is None:
            raise InputError("AdaLoRA: after_step needs a schedule: scheduled(steps)")
        last = self.total_step - self.tfinal
        if step < last:
            for part in own:
                part.follow(self.beta1, self.beta2)
        if step >= last or (step > self.tinit and step % self.deltaT == 0):
            first, target = self.init_r * len(own), self.target_r * len(own)
            remaining = max(0.0, 1 - (step - self.tinit) / (last - self.tinit))
            _allocate(own, int((first - target) * remaining**3 + target), final=step >= last)

    def config(self, model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Any]:
        """With the triplets that are left, as HF PEFT writes them; it takes no adapter without a schedule."""
        told = super().config(model, parts)
        held = {f"{path}.lora_E": part.held().tolist() for path, part in parts.items() if isinstance(part, AdaLoRAPart)}
        told["rank_pattern"] = None if all(map(all, held.values())) else held
        if self.total_step is None:
            some = self.scheduled(10 * (1 + (self.tinit or 0) + (self.tfinal or 0)))
            told |= {"tinit": some.tinit, "tfinal": some.tfinal, "total_step": some.total_step}
        return told


class AdaLoRAPart(Part):
    """y = call(x) + s · B (Λ ⊙ (A x)). It stays init_r wide in memory, where a cut triplet's Λ is zero.

    `kept` says which triplets the last cut left, `allocated` whether that was the last cut of all.
    """

    importance: Float[Tensor, "init_r widths"]
    uncertainty: Float[Tensor, "init_r widths"]
    kept: Bool[Tensor, " init_r"]
    allocated: Bool[Tensor, ""]

    def __init__(self, d_in: int, d_out: int, method: AdaLoRA, kept: Sequence[bool] | None = None) -> None:
        super().__init__()
        r = method.init_r
        self.lora_A = nn.Parameter(torch.empty(r, d_in).normal_(std=0.02))
        self.lora_E = nn.Parameter(torch.zeros(r, 1))
        self.lora_B = nn.Parameter(torch.empty(d_out, r).normal_(std=0.02))
        self.dropout = nn.Dropout(method.lora_dropout)
        self.s = method.lora_alpha / (r + 1e-5)  # the last term is HF PEFT's
        self.widths = [1, d_in, d_out]
        self.register_buffer("importance", torch.zeros(r, sum(self.widths)), persistent=False)
        self.register_buffer("uncertainty", torch.zeros(r, sum(self.widths)), persistent=False)
        self.register_buffer("kept", torch.tensor(kept or [True] * r, dtype=torch.bool), persistent=False)
        self.register_buffer("allocated", torch.tensor(kept is not None), persistent=False)

    def forward(self, call: Callable[..., Tensor], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Scale the thin matrix, not the wide output; cast as LoRA does."""
        y = call(x)
        dropped = self.dropout(x) if self.dropout.p else x
        h = F.linear(dropped, (self.lora_A * (self.lora_E * self.s)).to(x.dtype))
        return y + F.linear(h, self.lora_B.to(x.dtype)).to(y.dtype)

    def merged(
        self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
    ) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"] | None]:
        """W + s · B (Λ ⊙ A), added before it is rounded to W's type."""
        delta = self.lora_B @ (self.lora_A * (self.lora_E * self.s))
        return (weight + delta.detach()).to(weight.dtype), bias

    def follow(self, beta1: float, beta2: float) -> None:
        """Average the importance of every weight, and its uncertainty, over the updates. One row is one triplet."""
        trained = (self.lora_E, self.lora_A, self.lora_B)
        e, a, b = (torch.zeros_like(p) if p.grad is None else p * p.grad for p in trained)
        now = torch.cat((e, a, b.T), 1).abs()
        self.importance.mul_(beta1).add_((1 - beta1) * now)
        self.uncertainty.mul_(beta2).add_((1 - beta2) * (now - self.importance).abs())

    def scores(self) -> Float[Tensor, " init_r"]:
        """The importance of each triplet: that of Λ plus the means of those of A's row and B's column."""
        each = (self.importance * self.uncertainty).split(self.widths, dim=1)
        return torch.stack([w.mean(1) for w in each]).sum(0)

    def cut(self) -> None:
        """Λ of what is not kept becomes zero."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0)

    def held(self) -> Bool[Tensor, " init_r"]:
        """The triplets that matter to the output or may still: not cut, or alive again since the last cut."""
        return self.kept | (self.lora_E.detach()[:, 0] != 0)

    def saved(self) -> dict[str, Tensor]:
        """Only the triplets that are left."""
        i = self.held()
        return {"lora_A": self.lora_A[i], "lora_E": self.lora_E[i], "lora_B": self.lora_B[:, i]}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put them back in their places. The others are zero: so a loaded adapter computes in the shapes of the saved one."""
        i = self.held()
        for name, tensor in tensors.items():
            full = getattr(self, name).zero_()
            full[(slice(None), i) if name == "lora_B" else i] = tensor


def _own(parts: Mapping[str, Part]) -> list[AdaLoRAPart]:
    """A retrained head has no rank."""
    return [part for part in parts.values() if isinstance(part, AdaLoRAPart)]


def _allocate(parts: Sequence[AdaLoRAPart], budget: int, *, final: bool) -> None:
    """Keep the `budget` most important triplets of all parts together."""
    scores = torch.cat([part.scores() for part in parts])
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.sort(stable=True).indices[: len(scores) - budget]] = False
    for part, own in zip(parts, kept.split(len(parts[0].kept)), strict=True):
        part.kept.copy_(own)
        part.allocated.fill_(final)
        part.cut()
