"""Prompt Tuning: learn the words in front of the input — as vectors, not as words.

The idea. A good instruction steers a frozen model. Instead of searching for its words, learn `num_virtual_tokens`
embeddings P directly by gradient descent and prepend them to every input:

    y = model([P; E(x)])

P starts as the embeddings of a text (ours: the task's own instruction) or of words drawn from the vocabulary, which the
paper (section 3.2) finds better than random vectors, most of all on small models.

Symbols:
    x: the tokens of the input
    E: the model's own table of embeddings, frozen
    P: the learned prompt (`prompt_embeddings`), num_virtual_tokens vectors as wide as the model
    [ ; ]: one after the other
    y: what the model computes, at the positions of the real tokens only

Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.

Trainable parameters: num_virtual_tokens × width. In an encoder–decoder HF PEFT counts and stores twice that, though
only the encoder's half is ever used; we keep its count and format.
When to use it: many tasks served by one model in one batch; the smallest files of all.
When not: the paper's gap to full fine-tuning closes only at its largest model, 11B parameters, so on a small one measure
first (on the default task it is level with the others).
What it costs: every row grows by num_virtual_tokens, in training and for ever after. It takes a high learning rate.
How to choose:
    num_virtual_tokens: 20; beyond that the paper finds only small gains (section 3.2).
    prompt_tuning_init: TEXT. Random starts learn, but more slowly (the search of learning rates below has both).
    prompt_tuning_init_text: say what is wanted, with the labels' names in it; by default the task's instruction is taken.
Pitfalls:
    * With a learning rate that suits LoRA it hardly moves: it wants about a hundred times as much.
    * It cannot be merged: a prompt is positions, not weights, and lengthens every input.
    * Its vectors are no words: what it has learned cannot be read.
The paper's claim: as models grow past billions of parameters it "closes the gap" and matches tuning the whole model; on smaller ones
it stays behind (abstract, figure 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import sites
from ..errors import InputError
from ..method import Method, Part
from ..soft_prompt import Prepend, WidenCrossMask, starting_ids, text_ids


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Hyper-parameters of Prompt Tuning."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    title: ClassVar[str] = "Prompt Tuning"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv:2104.08691"
    learning_rate: ClassVar[float] = 1e-1
    encoder_learning_rate: ClassVar[float] = 3e-2
    sizes: ClassVar[tuple[dict[str, Any], ...]] = ({"num_virtual_tokens": 5}, {"num_virtual_tokens": 50})

    num_virtual_tokens: int = 20
    """Length of the learned prompt."""
    prompt_tuning_init: str = "TEXT"
    """Where it starts: TEXT, SAMPLE_VOCAB (embeddings of random words) or RANDOM (normal, as spread as the words)."""
    prompt_tuning_init_text: str | None = None
    """The text to start from; by default the task's own instruction."""
    init_ids: tuple[int, ...] | None = field(default=None, metadata={"local": True})
    """Token ids of that text; filled in by itself."""

    def errors(self) -> Iterator[str]:
        """Check ranges."""
        if self.num_virtual_tokens < 1:
            yield f"num_virtual_tokens must be at least 1, not {self.num_virtual_tokens}"
        if self.prompt_tuning_init not in ("TEXT", "SAMPLE_VOCAB", "RANDOM"):
            yield f"prompt_tuning_init must be TEXT, SAMPLE_VOCAB or RANDOM, not {self.prompt_tuning_init!r}"

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> PromptTuning:
        """Tokenise the text to start from; without any, start from random words."""
        if self.prompt_tuning_init != "TEXT" or self.init_ids is not None:
            return self
        if self.prompt_tuning_init_text is None:
            return replace(self, prompt_tuning_init="SAMPLE_VOCAB")
        if encode is None:
            raise InputError("prompt_tuning_init_text needs a tokenizer: pass encode=… to attach")
        return replace(self, init_ids=text_ids(self.prompt_tuning_init_text, self.num_virtual_tokens, encode))

    def starting_from(self, text: str) -> PromptTuning:
        """Start from this text unless another was chosen."""
        return self if self.prompt_tuning_init_text is not None else replace(self, prompt_tuning_init_text=text)

    def sites(self, model: nn.Module) -> list[str]:
        """The stack that reads the input; in an encoder–decoder also the decoder, whose mask must make room."""
        return [path for path in sites.prompted(model) if path is not None]

    def part(self, model: nn.Module, path: str) -> Part:
        """The prompt in front of the reading stack."""
        _, writer = sites.prompted(model)
        stack = model.get_submodule(path)
        if path == writer:
            return WidenCrossMask(stack)
        return PromptTuningPart(stack, self, encoder=writer is not None)

    def config(self, model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Any]:
        """A start from token ids alone is not told: HF PEFT loads no TEXT without its text."""
        told = super().config(model, parts)
        if self.prompt_tuning_init == "TEXT" and self.prompt_tuning_init_text is None:
            told["prompt_tuning_init"] = "RANDOM"
        return told

    def key(self, path: str, name: str) -> str:
        """Prompts are stored without a path."""
        return name


class PromptTuningPart(Prepend):
    """[P; E(x)] with P learned."""

    def __init__(self, stack: nn.Module, method: PromptTuning, encoder: bool) -> None:
        super().__init__(stack, cut=not encoder and not sites.is_classifier(stack))
        self.n = method.num_virtual_tokens
        embed = self.__dict__["embed"]
        words: Tensor = embed.weight
        rows = self.n * (2 if encoder else 1)
        self.prompt_embeddings = nn.Parameter(torch.empty(rows, words.shape[1], device=words.device))
        if words.is_meta:
            return
        with torch.no_grad():  # the module is called, not indexed: Gemma's scales its rows
            if method.prompt_tuning_init == "RANDOM":
                sample = embed(starting_ids(None, 1000, words.shape[0], words.device))
                self.prompt_embeddings.normal_(std=float(sample.float().std()))
            else:
                ids = starting_ids(method.init_ids, self.n, words.shape[0], words.device)
                self.prompt_embeddings.copy_(embed(ids).repeat(rows // self.n, 1))

    def prompt(self) -> Float[Tensor, "n d"]:
        """The encoder's half, where there are two."""
        return self.prompt_embeddings[: self.n]
