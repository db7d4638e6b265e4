"""P-Tuning: a learned prompt whose vectors come out of a small network.

The idea. Neighbouring virtual tokens should depend on each other, and raw embeddings are hard to optimise. So learn
them through a reparametrisation — a small MLP over trainable embeddings e — and prepend its outputs:

    P_i = MLP(e_i)        y = model([P; E(x)])

The MLP has three layers, width → h → h → width, with ReLU between them. The network starts where a text is: its last layer
is fitted so that the first P are the embeddings of the task's own instruction. (From the usual random start the first P is
noise; benchmarks/results/tune.md has both.)

After training only P is kept: the network is scaffolding. (So a loaded adapter has the same output but goes on
training as plain Prompt Tuning; HF PEFT's format has it so.)

Symbols:
    x: the tokens of the input
    E: the model's own table of embeddings, frozen
    e_i: the trainable embedding of virtual token i
    MLP: the small network, trained with them and thrown away afterwards
    P: the prompt it makes, num_virtual_tokens vectors as wide as the model
    h: encoder_hidden_size, the network's inner width

Paper: Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385 (there an LSTM in front of the MLP; the MLP
alone is HF PEFT's default).

Trainable parameters: n·d (embeddings; twice that in an encoder–decoder) + d·h + h + h·h + h + h·d + d with
n = num_virtual_tokens, d the width and h = encoder_hidden_size.
When to use it: as Prompt Tuning, where that is slow or unstable to train.
When not: when the prompt must stay readable or tiny while training: the network is many times the prompt.
What it costs: Prompt Tuning's longer rows; the network runs once per step, not per row.
How to choose:
    num_virtual_tokens: as in Prompt Tuning; 20 is a good start.
    encoder_hidden_size: 128. The network only shapes the training, and what is saved does not depend on it.
    init_text: say what is wanted; by default the task's instruction is taken.
Pitfalls:
    * It trains many more parameters than it saves: the size of the file is no measure of the memory while training.
    * Going on from a saved adapter is plain Prompt Tuning, for which this method's learning rate is too low.
    * It cannot be merged, and lengthens every input, as every prompt does.
The paper's claim: GPTs, thought poor at understanding, become as good as BERTs of their size on SuperGLUE (with the
model's weights trained too, say Lester et al. 2021, section 4); on LAMA the best GPT recalls 64 % of the facts, more than 20
points above the best before (abstract of the first version).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
class PTuning(Method):
    """Hyper-parameters of P-Tuning."""

    peft_type: ClassVar[str] = "P_TUNING"
    title: ClassVar[str] = "P-Tuning"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv:2103.10385"
    learning_rate: ClassVar[float] = 3e-3
    encoder_learning_rate: ClassVar[float] = 1e-2
    sizes: ClassVar[tuple[dict[str, Any], ...]] = ({"num_virtual_tokens": 5}, {"num_virtual_tokens": 50})

    num_virtual_tokens: int = 20
    """Length of the learned prompt."""
    encoder_hidden_size: int = 128
    """Width h of the reparametrising network."""
    encoder_reparameterization_type: str = "MLP"
    """Kind of network; MLP only."""
    init_text: str | None = field(default=None, metadata={"local": True})
    """Text whose embeddings the first P are; by default the task's own instruction."""
    init_ids: tuple[int, ...] | None = field(default=None, metadata={"local": True})
    """Token ids of that text; filled in by itself."""

    def errors(self) -> Iterator[str]:
        """Check ranges."""
        if self.num_virtual_tokens < 1:
            yield f"num_virtual_tokens must be at least 1, not {self.num_virtual_tokens}"
        if self.encoder_hidden_size < 1:
            yield f"encoder_hidden_size must be at least 1, not {self.encoder_hidden_size}"
        if self.encoder_reparameterization_type != "MLP":
            yield f"encoder_reparameterization_type must be MLP, not {self.encoder_reparameterization_type!r}"

    def resolve(self, model: nn.Module, encode: Callable[[str], list[int]] | None) -> PTuning:
        """Tokenise the text to start from, if any."""
        if self.init_text is None or self.init_ids is not None:
            return self
        if encode is None:
            raise InputError("init_text needs a tokenizer: pass encode=… to attach")
        return replace(self, init_ids=text_ids(self.init_text, self.num_virtual_tokens, encode))

    def starting_from(self, text: str) -> PTuning:
        """Start from this text unless another was chosen."""
        return self if self.init_text is not None else replace(self, init_text=text)

    def sites(self, model: nn.Module) -> list[str]:
        """The stack that reads the input; in an encoder–decoder also the decoder, whose mask must make room."""
        return [path for path in sites.prompted(model) if path is not None]

    def part(self, model: nn.Module, path: str) -> Part:
        """The prompt and its network in front of the reading stack."""
        _, writer = sites.prompted(model)
        stack = model.get_submodule(path)
        if path == writer:
            return WidenCrossMask(stack)
        return PTuningPart(stack, self, encoder=writer is not None)

    def key(self, path: str, name: str) -> str:
        """Prompts are stored without a path."""
        return name


class PTuningPart(Prepend):
    """[MLP(e); E(x)] with e and the MLP learned."""

    prompt_embeddings: nn.Parameter | None

    def __init__(self, stack: nn.Module, method: PTuning, encoder: bool) -> None:
        super().__init__(stack, cut=not encoder and not sites.is_classifier(stack))
        self.n, h = method.num_virtual_tokens, method.encoder_hidden_size
        words: Tensor = self.__dict__["embed"].weight
        rows, d = self.n * (2 if encoder else 1), words.shape[1]
        device: Any = stack.device  # that of the words may be another: vocabulary.py
        self.embedding = nn.Embedding(rows, d, device=device)
        self.mlp_head = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d)).to(
            device
        )
        self.prompt_embeddings = None  # takes the place of e and the MLP in an adapter that was loaded
        if not words.is_meta and method.init_ids is not None:
            ids = starting_ids(method.init_ids, self.n, words.shape[0], device)
            self._start_from(self.__dict__["embed"](ids).float().repeat(rows // self.n, 1))

    @torch.no_grad()
    def _start_from(self, wanted: Float[Tensor, "rows d"]) -> None:
        """Fit the last layer by least squares, so that the network's first outputs are the wanted embeddings.

        There are fewer rows than hidden units, as a rule, so the fit is exact.
        """
        *hidden, last = self.mlp_head
        activations = nn.Sequential(*hidden)(self.embedding.weight)
        assert isinstance(last, nn.Linear)
        # By singular values: the default (gelsy) reads uninitialised memory for its pivots and may be far off.
        fit = torch.linalg.lstsq(activations.cpu().double(), (wanted - last.bias).cpu().double(), driver="gelsd")
        last.weight.copy_(fit.solution.T)

    def _all(self) -> Float[Tensor, "rows d"]:
        if self.prompt_embeddings is not None:
            return self.prompt_embeddings
        encoded: Tensor = self.mlp_head(self.embedding.weight)
        return encoded

    def prompt(self) -> Float[Tensor, "n d"]:
        """The encoder's half, where there are two."""
        return self._all()[: self.n]

    def saved(self) -> dict[str, Tensor]:
        """Only the prompt: the network is scaffolding."""
        return {"prompt_embeddings": self._all().detach()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the prompt and drop the network."""
        self.prompt_embeddings = nn.Parameter(tensors["prompt_embeddings"].to(self.embedding.weight))
        del self.embedding, self.mlp_head
