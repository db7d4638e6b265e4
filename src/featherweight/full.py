"""Full fine-tuning: every weight is trained. Not a method of this house, but what its methods are measured against.

Each module that has weights of its own gets a part that holds them in float32 and puts them, in the base's type, in the
place of the frozen ones for the time of a call: the usual mixed precision, 4 bytes a parameter for the weight, 4 for its gradient, 8 for
Adam's two moments, beside the base's own 2 or 4. A weight that is used in two places (tied embeddings) is one weight here too.

    y = W x,   W ← W + ΔW        all of ΔW is free: d_out × d_in numbers, where LoRA has r · (d_in + d_out)

Trainable parameters: all of them. Its result is a model, not an adapter: `compare` measures it and keeps no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from .errors import InputError
from .method import Method, Part
from .quant import is_quantised
from .vocabulary import on_host


class Whole(Part):
    """A module's own weights, trained in float32. `shared` are those that another part trains already."""

    def __init__(self, weights: dict[str, nn.Parameter], shared: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = (*weights, *shared)
        for name, weight in weights.items():
            self.register_parameter(name, weight)
        self.__dict__.update(shared)  # not registered: they must be trained, counted and saved once

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the module with these weights in the place of its own."""
        site: Any = call.__self__  # type: ignore[attr-defined]
        site.__dict__.update({name: getattr(self, name).to(site._parameters[name].dtype) for name in self.names})
        try:  # what lies in an instance goes before what `nn.Module` looks up
            return call(*args, **kwargs)
        finally:
            for name in self.names:
                del site.__dict__[name]


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Every weight of the base is trained."""

    peft_type: ClassVar[str] = "FULL"
    title: ClassVar[str] = "Full fine-tuning"
    paper: ClassVar[str] = "Devlin et al. 2018, arXiv:1810.04805, §3.2"
    learning_rate: ClassVar[float] = 5e-5
    encoder_learning_rate: ClassVar[float] = 1e-4

    weights: tuple[tuple[str, nn.Parameter], ...] = ()
    """Filled in by `resolve`: one float32 weight for each of the base's, by its first name."""

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> FullFineTuning:
        """Make the trained weights: a tied one is one."""
        if any(is_quantised(module) for module in model.modules()):
            raise InputError(
                "full fine-tuning needs the base's own weights, and these are quantised; leave --quantize out"
            )
        if on_host(model):
            raise InputError(
                "full fine-tuning trains the embeddings and the head too, so they must be there; leave --offload-vocabulary out"
            )
        own = [(name, p) for name, p in model.named_parameters() if ".parts." not in f".{name}"]
        return replace(self, weights=tuple((name, nn.Parameter(p.detach().float().clone())) for name, p in own))

    def sites(self, model: nn.Module) -> list[str]:
        """Every module that has weights of its own."""
        return [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]

    def part(self, model: nn.Module, path: str) -> Part:
        """Those of the weights that this module is the first to have, and those that it shares."""
        trained, first = dict(self.weights), {id(p): name for name, p in model.named_parameters()}
        own, shared = dict[str, nn.Parameter](), dict[str, nn.Parameter]()
        for name, p in model.get_submodule(path).named_parameters(recurse=False):
            whole = first[id(p)]
            (own if whole == f"{path}.{name}".lstrip(".") else shared)[name] = trained[whole]
        return Whole(own, shared)

    def config(self, model: nn.Module, parts: Any) -> dict[str, Any]:
        """There is no adapter to describe."""
        raise InputError("full fine-tuning makes a model, not an adapter")
