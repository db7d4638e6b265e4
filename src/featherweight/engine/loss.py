"""Logits only where a label is.

With 49,000–250,000 words in the vocabulary, the output head and its float32 softmax cost more than the layers — and all
but a few positions of a row carry no label. So the head is shown the labelled positions only: a hook in front of it
gathers them, (batch, seq, width) → (labelled, width), and whatever the model does after its head (soft-capping, bias)
works on what is left. The loss is the mean over all labelled tokens of the batch, in float32. (A classifier has a head of
its own and one label a row: its loss is the mean over the rows.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .batches import Batch


@contextmanager
def head_at(model: Any, where: Bool[Tensor, "batch seq"]) -> Iterator[None]:
    """Inside, the model's output head sees only the positions that are true in `where`, as one flat row."""
    index = where.flatten().nonzero().squeeze(1)

    def gather(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, index), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


def logits_at(
    model: Any, inputs: dict[str, Tensor], where: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "labelled vocab"]:
    """Float32 logits at the positions that are true in `where`, row by row."""
    with head_at(model, where):
        out: Tensor = model(**inputs, use_cache=False).logits
    if out.dim() == 3:  # a model whose head is not called as a module
        out = out[where]
    return out.float()


def class_logits(model: Any, inputs: dict[str, Tensor]) -> Float[Tensor, "rows classes"]:
    """Float32 logits of a classifier's own head."""
    logits: Tensor = model(**inputs).logits
    return logits.float()


def labelled_loss(model: Any, batch: Batch, labelled: int | None = None) -> Float[Tensor, ""]:
    """Cross-entropy summed over the labelled tokens (or rows) of the batch, in nats, over `labelled`: by default its own."""
    logits = class_logits(model, batch.inputs) if batch.where is None else logits_at(model, batch.inputs, batch.where)
    return F.cross_entropy(logits, batch.targets, reduction="sum") / (labelled or batch.targets.numel())
