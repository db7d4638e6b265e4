"""What a method is: hyper-parameters (`Method`) that put trainable code (`Part`) around frozen calls.

`part(call, *args, **kwargs)`: `call` is the frozen module (or the next adapter inwards). A `Part` does something before the
call, after it, or instead of it. A `Method` says which part goes where. A new method is one file with one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .errors import InputError


class Part(nn.Module):
    """Trainable tensors at one site. Attribute names are the on-disk names (`lora_A`, `ia3_l`, …)."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the frozen `call`, with something around it. The default adds nothing."""
        return call(*args, **kwargs)

    def saved(self) -> dict[str, Tensor]:
        """The tensors that go to disk. They differ from the trained ones where a method reparametrises."""
        return dict(self.state_dict())

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `saved` gave; shapes have been checked by then."""
        self.load_state_dict(tensors)

    def merged(
        self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
    ) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"] | None]:
        """The dense weight and bias with which the bare site would do what it does with this part."""
        raise NotImplementedError


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Numbers in another type; what is not a tensor of numbers as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Retrained(Part):
    """A trainable copy that runs instead of the frozen module: what `modules_to_save` names, such as a new task's head."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.float().requires_grad_(True)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Leave `call` out. The copy works in its own type, and answers in the frozen module's."""
        own = next(self.module.parameters()).dtype
        wanted = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if not wanted and hasattr(call, "__self__"):  # words go in, not numbers: an embedding
            wanted = [p.dtype for p in call.__self__.parameters()]
        out = self.module(*(_cast(a, own) for a in args), **{k: _cast(v, own) for k, v in kwargs.items()})
        return _cast(out, wanted[0] if wanted else own)

    def saved(self) -> dict[str, Tensor]:
        """The module's tensors under the module's own names."""
        return dict(self.module.state_dict())

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take them back."""
        self.module.load_state_dict(tensors)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyper-parameters of a method. Fields are the keys of `adapter_config.json`, as HF PEFT spells them.

    A field marked `metadata={"local": True}` is ours alone and stays out of that file.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    learning_rate: ClassVar[float]
    """The default learning rate, measured per method by `benchmarks/tune.py`: one rate for all is unfair."""
    encoder_learning_rate: ClassVar[float]
    """The same for an encoder that classifies, whose new head learns along."""

    sizes: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Options that make it smaller or larger than its defaults do, for a search to try (`compare --tune`)."""

    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained as a whole and saved with the adapter; a classifier's head always is."""

    def __post_init__(self) -> None:
        if errors := list(self.errors()):
            raise InputError(f"{self.title}: " + "; ".join(errors))

    def errors(self) -> Iterator[str]:
        """Yield what is wrong with the hyper-parameters, one sentence each."""
        yield from ()

    def rate(self, classifies: bool) -> float:
        """The default learning rate for an encoder that classifies, or for a model that writes."""
        return self.encoder_learning_rate if classifies else self.learning_rate

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> Method:
        """Fill in what depends on the model (its default target modules, the tokens of a text)."""
        return self

    def starting_from(self, text: str) -> Method:
        """The same method starting from a text, where it starts from text and none was chosen; else itself."""
        return self

    def sites(self, model: nn.Module) -> list[str]:
        """Paths of the modules that get a part, in the model's order."""
        raise NotImplementedError

    def part(self, model: nn.Module, path: str) -> Part:
        """Build the part for the site at `path`: initialised, in float32."""
        raise NotImplementedError

    def penalty(self, parts: Mapping[str, Part]) -> Float[Tensor, ""] | None:
        """What is added to the loss of every update, where the method has a regulariser."""
        return None

    def scheduled(self, steps: int) -> Method:
        """The same method knowing that it is trained for `steps` updates: called once, before the first."""
        return self

    def after_step(self, parts: Mapping[str, Part], step: int) -> None:
        """Called after update `step` (from 1), gradients still in place, by methods that change more than weights."""

    def config(self, model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Any]:
        """This method's part of `adapter_config.json`; `model` and `parts` are for what HF PEFT wants to read of them."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("local")}
        if self.modules_to_save is None:
            del told["modules_to_save"]  # not every method of HF PEFT knows the word
        return told

    def key(self, path: str, name: str) -> str:
        """The on-disk name of tensor `name` of the part at `path`, as HF PEFT writes it."""
        return f"base_model.model.{path}.{name}"
