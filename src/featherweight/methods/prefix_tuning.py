"""Prefix-Tuning: learned keys and values that every layer can attend to.

The idea. Prompt Tuning speaks only at the input. Prefix-Tuning gives each attention layer its own `num_virtual_tokens`
past positions: keys and values that no text produced, found by gradient descent:

    attention(q, [P_K; K], [P_V; V])        per layer

Where they start decides whether they learn. Random vectors (HF PEFT's default) look like no key that the layer has
ever seen, and derail the model: on the default task, at the one rate that was tried (0.01), they are right on 51 % of the
validation rows after 120 steps, where a start from text is on 79 % (benchmarks/results/tune.md). Ours start as the keys and
values that the frozen model computes for a real text — the task's own instruction — so an adapted decoder starts exactly as
the base that has read this text. The paper's section 7.4 finds the same where rows are few. The paper learns the prefix
through a small network that is thrown away afterwards (section 4.3), because learning it directly was unstable; here, as by
default in HF PEFT, it is learned directly, and the start from a text takes that network's place.

Symbols:
    q: the queries of the real tokens
    K, V: the keys and values of the real tokens, computed by frozen weights
    P_K, P_V: the prefix: learned keys and values (`prompt_embeddings` holds those of all layers)
    [ ; ]: one after the other

Paper: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190.

Trainable parameters: num_virtual_tokens × layers × 2 × (key–value heads × head size).
When to use it: generation, few examples, one model serving many tasks.
When not: with very short contexts or quantised caches; with tools that make a key–value cache of their own and ignore the one
they are given.
What it costs: attention over num_virtual_tokens more positions; no other layer sees longer rows, so it trains faster
than Prompt Tuning. In an encoder–decoder the prefix sits in the decoder's self-attention, as in HF PEFT.
How to choose:
    num_virtual_tokens: 20 for classification; the paper gains up to 200 for summaries, up to 10 for tables (section 7.1).
    init_weights: text, unless an experiment is about the start itself.
    init_text: say what is wanted; by default the task's instruction is taken.
Pitfalls:
    * From a random start it may not learn at all in a short run (`examples/prefix_tuning.py` shows both).
    * It needs layers that read a cache: ModernBERT has none and is refused.
    * In an encoder–decoder HF PEFT's layout makes two layers share a row, and we keep it, so that files mean the same in both.
The paper's claim: with 0.1 % of the parameters about as good as full fine-tuning on full data, better with few examples and on topics
not seen in training (abstract).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .. import sites
from ..calls import argument_names, cache_in, cache_name, named_arguments
from ..errors import InputError
from ..layout import layout_of
from ..method import Method, Part
from ..prefix_cache import handing_on, reading, runs_twice
from ..soft_prompt import (
    check_continues,
    mask_and_padding,
    past_length,
    refuse_packed,
    starting_ids,
    text_ids,
    text_positions,
)


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Hyper-parameters of Prefix-Tuning."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    title: ClassVar[str] = "Prefix-Tuning"
    paper: ClassVar[str] = "Li & Liang 2021, arXiv:2101.00190"
    learning_rate: ClassVar[float] = 3e-3
    encoder_learning_rate: ClassVar[float] = 3e-2
    sizes: ClassVar[tuple[dict[str, Any], ...]] = ({"num_virtual_tokens": 5}, {"num_virtual_tokens": 50})

    num_virtual_tokens: int = 20
    """Number of learned past positions."""
    init_weights: str | None = field(default="text", metadata={"local": True})
    """Where they start: text (keys and values of a real text), zero, or none for random as in HF PEFT."""
    init_text: str | None = field(default=None, metadata={"local": True})
    """The text to start from; by default the task's own instruction."""
    init_ids: tuple[int, ...] | None = field(default=None, metadata={"local": True})
    """Token ids of that text; filled in by itself."""

    def errors(self) -> Iterator[str]:
        """Check ranges."""
        if self.num_virtual_tokens < 1:
            yield f"num_virtual_tokens must be at least 1, not {self.num_virtual_tokens}"
        if self.init_weights not in ("text", "zero", None):
            yield f"init_weights must be text, zero or none, not {self.init_weights!r}"

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> PrefixTuning:
        """Tokenise the text to start from; without any, start from random words."""
        stack = model.get_submodule(self.sites(model)[0])
        if cache_name(argument_names(stack)) is None:
            raise InputError(
                f"Prefix-Tuning needs a model whose layers take keys and values from a cache, and {type(stack).__name__} has "
                f"none; choose LoRA, (IA)³ or Prompt Tuning"
            )
        if self.init_text is None or self.init_ids is not None:
            return self
        if encode is None:
            raise InputError("init_text needs a tokenizer: pass encode=… to attach")
        return replace(self, init_ids=text_ids(self.init_text, self.num_virtual_tokens, encode))

    def starting_from(self, text: str) -> PrefixTuning:
        """Start from this text unless another was chosen."""
        return self if self.init_text is not None else replace(self, init_text=text)

    def sites(self, model: nn.Module) -> list[str]:
        """The stack that writes."""
        reader, writer = sites.stacks(model)
        return [reader if writer is None else writer]

    def part(self, model: nn.Module, path: str) -> Part:
        """Keys and values for all layers of the stack."""
        return PrefixTuningPart(model, path, self)

    def config(self, model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Any]:
        """Also the geometry: HF PEFT would guess it from the width, wrongly where heads × size is another (T5)."""
        layers, heads, size = _geometry(model.config)
        shape = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * size}
        return super().config(model, parts) | shape

    def key(self, path: str, name: str) -> str:
        """Prefixes are stored without a path."""
        return name


def _geometry(config: Any) -> tuple[int, int, int]:
    """(layers, key–value heads, head size) of a writing stack."""
    config = config if config.is_encoder_decoder else config.get_text_config()
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    layers = layers or config.num_hidden_layers
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return layers, getattr(config, "num_key_value_heads", None) or heads, size


class PrefixTuningPart(Part):
    """Fills an empty key–value cache with [P_K; P_V] and shifts what follows."""

    def __init__(self, model: nn.Module, path: str, method: PrefixTuning) -> None:
        super().__init__()
        stack: Any = model.get_submodule(path)
        self.names = argument_names(stack)
        self.cache = cache_name(self.names) or ""
        self.config: Any = model.config
        self.classifies = sites.is_classifier(model)
        self.crosses = sites.is_encoder_decoder(model)
        self.n, self.geometry = method.num_virtual_tokens, _geometry(model.config)
        layers, heads, size = self.geometry
        self.__dict__["embed"] = stack.get_input_embeddings()  # the base's: not registered here
        self.__dict__["stack"] = stack
        words: Tensor = self.__dict__["embed"].weight
        self.prompt_embeddings = nn.Parameter(torch.zeros(self.n, layers * 2 * heads * size, device=words.device))
        if words.is_meta or method.init_weights == "zero":
            return
        with torch.no_grad():
            if method.init_weights is None:
                self.prompt_embeddings.normal_()  # what HF PEFT's embedding starts from
            else:
                ids = starting_ids(method.init_ids, self.n, words.shape[0], words.device)
                self._store(_keys_and_values(stack, ids, self.crosses))

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        kind: torch.dtype = self.__dict__["embed"].weight.dtype
        return kind

    def row(self, layer: int) -> int:
        """Which of the 2·layers rows holds this layer's keys; its values are in the next.

        In an encoder–decoder HF PEFT lays the rows out twice, for a cross-attention that then ignores them, and takes
        every fourth: with an even number of layers, layer i and layer i + layers/2 share a row and half the rows go
        unused. We keep its layout, so that adapters mean the same in both.
        """
        return 4 * layer % (2 * self.geometry[0]) if self.crosses else 2 * layer

    def prefix(self) -> Float[Tensor, "rows heads n size"]:
        """The parameter as rows of keys and values."""
        layers, heads, size = self.geometry
        return self.prompt_embeddings.view(self.n, layers * 2, heads, size).permute(1, 2, 0, 3)

    def _store(self, states: list[tuple[Tensor, Tensor]]) -> None:
        """Write each layer's keys and values to its rows; of two layers that share one, the lower wins."""
        prefix = self.prefix()
        for layer, (keys, values) in reversed(list(enumerate(states))):
            prefix[self.row(layer)] = keys.float()
            prefix[self.row(layer) + 1] = values.float()

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Put the prefix in front while the cache is empty; always lengthen the mask and shift the positions."""
        kw = named_arguments(self.names, args, kwargs)
        x = kw["input_ids"] if kw.get("input_ids") is not None else kw["inputs_embeds"]
        given = kw.get("position_ids")
        if layout_of(kw.get("attention_mask")):  # it says nothing of keys before the tokens: every row sees those
            mask, padding = None, None
        else:
            refuse_packed(kw)
            check_continues(kw, self.n, x.shape[1], call)
            mask, padding = mask_and_padding(kw, self.n)
            kw["attention_mask"] = mask
        if given is not None or ("position_ids" in self.names and not self.classifies):
            kw["position_ids"] = text_positions(given, mask, self.n, x.shape[1])
        cache, stack = cache_in(kw), self.__dict__["stack"]
        if past_length(cache) > 0:
            return call(**kw)
        if runs_twice(stack):
            cache = None
        elif cache is None and kw.get("use_cache") is not False:
            cache = self.empty_cache()
        states = self._states(x.shape[0])
        kw[self.cache] = reading(states, padding, cache, self.crosses)
        with handing_on(stack, lambda: reading(states, padding, None, self.crosses)):
            out = call(**kw)
        if out.get(self.cache) is not None:  # ours was for this reading only
            out[self.cache] = cache
        return out

    def empty_cache(self) -> Any:
        """A cache of the kind that this model's `generate` uses."""
        own = DynamicCache(config=self.config)
        return EncoderDecoderCache(own, DynamicCache(config=self.config)) if self.crosses else own

    def _states(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Each layer's (keys, values), batch × heads × n × size."""
        prefix = self.prefix().to(self.dtype)
        rows = [self.row(layer) for layer in range(self.geometry[0])]
        return [(prefix[row].expand(batch, -1, -1, -1), prefix[row + 1].expand(batch, -1, -1, -1)) for row in rows]


def _keys_and_values(stack: nn.Module, ids: Tensor, crosses: bool) -> list[tuple[Tensor, Tensor]]:
    """The (keys, values) of every layer, heads × n × size, that the frozen stack computes when it reads `ids`."""
    own: Any = DynamicCache()  # without a configuration, so that no layer drops what its window has passed
    training = stack.training
    stack.eval()
    cache = EncoderDecoderCache(own, DynamicCache()) if crosses else own
    stack(input_ids=ids[None], use_cache=True, **{cache_name(argument_names(stack)) or "": cache})
    stack.train(training)
    return [(layer.keys[0], layer.values[0]) for layer in own.layers]
