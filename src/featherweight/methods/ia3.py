"""(IA)³: rescale what the model already computes.

The idea. Learn one factor per channel for the keys, the values and the feed-forward's hidden units — "Infused
Adapter by Inhibiting and Amplifying Inner Activations". Nothing is added, only made louder or quieter:

    keys, values:     y = l ⊙ W x
    feed-forward:     y = W (l ⊙ x)           (where l scales the input of the second projection)

All l start at one, so the adapted model starts as the base.

Symbols:
    x: the input of an adapted layer
    y: its output
    W: the layer's own weight, frozen
    l: the factors that are trained (`ia3_l`), one for each channel
    ⊙: multiplication channel by channel

Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3.

Trainable parameters: d_out per scaled output, d_in per scaled input: about 0.01–0.1 % of the model.
When to use it: little data, many tasks, tiny files. It takes a learning rate
some twenty times LoRA's (on an encoder, where LoRA's is higher, twice).
When not: when the task needs new behaviour rather than a new emphasis.
What it costs: one multiplication per adapted layer; otherwise LoRA's costs.
How to choose:
    target_modules: leave the default; it is the paper's choice (keys, values, feed-forward) for each architecture.
    feedforward_modules: those of the targets that lead out of the feed-forward, so that its hidden units are scaled.
Pitfalls:
    * With LoRA's learning rate it hardly moves: a factor has to travel far from one to matter.
    * There is no rank to raise. If it stops learning too early, another method is the way to more capacity.
The paper's claim: the most accurate with few examples among the methods compared (section 3.3), for "a relatively tiny amount of new
parameters"; the recipe around it (T-Few) was the first above human level on RAFT, 6 points above the best before (abstract).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import sites
from ..method import Method, Part


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Hyper-parameters of (IA)³: only where the factors sit."""

    peft_type: ClassVar[str] = "IA3"
    title: ClassVar[str] = "(IA)³"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"
    learning_rate: ClassVar[float] = 2e-2
    encoder_learning_rate: ClassVar[float] = 1e-2

    target_modules: str | tuple[str, ...] | None = None
    """Layers to rescale; by default those of HF PEFT (keys, values, feed-forward)."""
    feedforward_modules: str | tuple[str, ...] | None = None
    """Those of them whose input is scaled instead of their output."""
    fan_in_fan_out: bool = False
    """Whether the base keeps its weights transposed (GPT-2); set by itself."""

    def errors(self) -> Iterator[str]:
        """Check that inputs to scale are named among the targets."""
        if self.feedforward_modules is not None and self.target_modules is None:
            yield "feedforward_modules needs target_modules: it says which of those are scaled at their input"
        both = isinstance(self.target_modules, tuple) and isinstance(self.feedforward_modules, tuple)
        if both and (extra := set(self.feedforward_modules or ()) - set(self.target_modules or ())):
            yield f"feedforward_modules must be among target_modules: {', '.join(sorted(extra))} is not"

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> IA3:
        """Name the target modules of this architecture."""
        if self.target_modules is None:
            targets, inputs = sites.default_ia3_targets(model)
        else:
            targets, inputs = sites.named(self.target_modules), sites.named(self.feedforward_modules or ())  # type: ignore[assignment]
        found = sites.linear_sites(model, targets)
        transposed = isinstance(model.get_submodule(found[0]), sites.Conv1D)
        return replace(self, target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=transposed)

    def sites(self, model: nn.Module) -> list[str]:
        """The linear layers that `target_modules` names."""
        assert self.target_modules is not None, "resolve first"
        return sites.linear_sites(model, self.target_modules)

    def part(self, model: nn.Module, path: str) -> Part:
        """One vector of factors."""
        d_in, d_out = sites.features(model.get_submodule(path))
        scales_input = bool(self.feedforward_modules) and sites.matches(path, self.feedforward_modules or ())
        return IA3Part(d_in if scales_input else d_out, scales_input)


class IA3Part(Part):
    """y = l ⊙ call(x), or call(l ⊙ x) at a feed-forward's input."""

    def __init__(self, width: int, scales_input: bool) -> None:
        super().__init__()
        self.scales_input = scales_input
        # HF PEFT's shapes on disk: a row for inputs, a column for outputs.
        self.ia3_l = nn.Parameter(torch.ones((1, width) if scales_input else (width, 1)))

    def forward(self, call: Callable[..., Tensor], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Scale before or after the frozen call."""
        l = self.ia3_l.flatten()  # noqa: E741 (the paper's name)
        if self.scales_input:
            return call(x * l.to(x.dtype))
        y = call(x)
        return y * l.to(y.dtype)

    def merged(
        self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
    ) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"] | None]:
        """Scaling an input scales W's columns; scaling an output scales its rows, and the bias."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        l = self.ia3_l.flatten().to(exact)  # noqa: E741
        if self.scales_input:
            return (weight.to(exact) * l).to(weight.dtype), bias
        scaled = None if bias is None else (bias.to(exact) * l).to(bias.dtype)
        return (weight.to(exact) * l[:, None]).to(weight.dtype), scaled
