"""Logits only where a label is, and never all of them.

With 49,000–250,000 words in the vocabulary, the output head and its float32 softmax cost more than the layers — and all
but a few positions of a row carry no label. So the head is shown the labelled positions only: a hook in front of it
gathers them, (batch, seq, width) → (labelled, width). Where the model's output is what its head gives, and the head is
frozen, even those logits are never kept: the loss and its gradient are computed for a few positions at a time (`_HeadLoss`).
Else whatever the model does after its head (soft-capping, scaling) works on the gathered positions.

The loss is the mean over all labelled tokens of the batch, in float32. (A classifier has a head of its own and one label a
row: its loss is the mean over the rows.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import hardware
from ..vocabulary import Waiting, waiting_at
from .batches import Batch

AT_ONCE = {"cpu": 2**23, "other": 2**26}  # logits computed together: 32 MiB in float32, and 256 MiB on an accelerator
LEAST = 256  # words of a piece of a head that stays on the host
SHARE = 4  # on a CPU also as many as a quarter of the head's weights: for fewer, reading those would take longer than computing


@contextmanager
def head_at(model: Any, at: Int[Tensor, " labelled"]) -> Iterator[None]:
    """Inside, the model's output head sees only the positions `at`, counted row by row, as one flat row."""

    def gather(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, at), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


def logits_at(model: Any, inputs: dict[str, Tensor], at: Int[Tensor, " labelled"]) -> Float[Tensor, "labelled vocab"]:
    """Float32 logits at the positions `at`, counted row by row."""
    with head_at(model, at):
        out: Tensor = model(**inputs, use_cache=False).logits
    if out.dim() == 3:  # a model whose head is not called as a module
        out = out.flatten(0, 1).index_select(0, at)
    return out.float()


def class_logits(model: Any, inputs: dict[str, Tensor]) -> Float[Tensor, "rows classes"]:
    """Float32 logits of a classifier's own head."""
    logits: Tensor = model(**inputs).logits
    return logits.float()


def rows_at_once(weight: Float[Tensor, "vocab width"], kind: str) -> int:
    """How many positions' logits are computed together."""
    return max(16, AT_ONCE[kind] // weight.shape[0], weight.shape[1] // SHARE if kind == "cpu" else 0)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy summed over positions, from what goes into a frozen head: logits live for one chunk at a time.

    The gradient with respect to the logits is softmax(z) - 1[target]; what the head sends back of it is computed with the
    loss, while the chunk's logits are there, and kept: labelled × width instead of labelled × vocab.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad = torch.empty_like(hidden)
        kind = hardware.kind_of(hidden.device)
        pieces = max(1, -(-hidden.shape[0] // rows_at_once(weight, kind)))
        for h, t, g in zip(*(x.tensor_split(pieces) for x in (hidden, targets[:, None], grad)), strict=True):
            logits = F.linear(h, weight, bias)
            if kind == "cpu":  # in place, which has been tried there only
                logits = logits.to(exact)
                log_p = torch.log_softmax(logits, -1, out=logits)
            else:
                log_p = logits.log_softmax(-1, dtype=exact)
                del logits
            total -= log_p.gather(1, t).sum()
            if ctx.needs_input_grad[0]:
                softmax = log_p.exp_()
                softmax.scatter_add_(1, t, softmax.new_full(t.shape, -1.0))
                torch.mm(softmax.to(weight.dtype), weight, out=g)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        [grad] = ctx.saved_tensors
        return grad * upstream, None, None, None


class _HeadLossFromHost(torch.autograd.Function):
    """The same, where the head stays on the host and passes through in pieces of its words (`vocabulary.py`), once.

    That is attention from the positions to the words, with W for keys and for values: beside the loss, what is wanted is the mean of
    W's rows, weighted by softmax. So it is done as attention is piece by piece (FlashAttention, arXiv:2205.14135, section 3.1), with
    m the largest logit so far, s the sum and g the weighted sum, both relative to m:

        z = h Wⱼᵀ     m' = max(m, max z)     s ← s · e^(m − m') + Σ e^(z − m')     g ← g · e^(m − m') + e^(z − m') Wⱼ

    In the end the loss is m + log s − z[target], and its gradient g / s − W[target].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, waiting: Waiting, bias: Tensor | None, targets: Tensor) -> Tensor:
        n, exact = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        at_target, row_at_target = hidden.new_zeros(n, 1, dtype=exact), torch.zeros_like(hidden)
        m, s = hidden.new_full((n, 1), -torch.inf, dtype=exact), hidden.new_zeros(n, 1, dtype=exact)
        g, learns = torch.zeros_like(hidden, dtype=exact), ctx.needs_input_grad[0]
        for first, piece in waiting.pieces(max(LEAST, AT_ONCE["other"] // max(1, n))):
            words = len(piece)
            z = F.linear(hidden, piece, None if bias is None else bias[first : first + words]).to(exact)
            target = (targets - first)[:, None]
            here, target = (target >= 0) & (target < words), target.clamp(0, words - 1)
            at_target = torch.where(here, z.gather(1, target), at_target)
            before, m = m, torch.maximum(m, z.amax(1, keepdim=True))
            p, shrink = z.sub_(m).exp_(), before.sub_(m).exp_()
            s.mul_(shrink).add_(p.sum(1, keepdim=True))
            if learns:
                row_at_target = torch.where(here, piece[target[:, 0]], row_at_target)
                g.mul_(shrink).add_(p.to(piece.dtype) @ piece)
        ctx.save_for_backward(g.div_(s).sub_(row_at_target).to(hidden.dtype))
        return (m + s.log() - at_target).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        [grad] = ctx.saved_tensors
        return grad * upstream, None, None, None


_ENDS_WITH_HEAD: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def hidden_at(
    model: Any, inputs: dict[str, Tensor], at: Int[Tensor, " labelled"]
) -> Float[Tensor, "labelled width"] | None:
    """What goes into the head at the positions `at`; None where that does not tell the logits.

    It does where the head is a plain frozen matrix and nothing comes after it, found out on the first call for a model.
    """
    head = model.get_output_embeddings()
    known = _ENDS_WITH_HEAD.get(model)
    plain = type(head) is torch.nn.Linear or waiting_at(head) is not None  # on neither is an adapter
    if known is False or not plain or head.weight.requires_grad:
        return None
    seen, given = list[Tensor](), list[Tensor]()

    def take(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].flatten(0, 1).index_select(0, at))
        return (seen[0][: 0 if known else 1], *args[1:])

    hooks = (
        head.register_forward_pre_hook(take),
        head.register_forward_hook(lambda _module, _args, out: given.append(out)),
    )
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if known is None:
        _ENDS_WITH_HEAD[model] = known = len(given) == 1 and logits is given[0]
    return seen[0] if known else None


def labelled_loss(model: Any, batch: Batch, labelled: int | None = None) -> Float[Tensor, ""]:
    """Cross-entropy summed over the labelled tokens (or rows) of the batch, in nats, over `labelled`: by default its own."""
    labelled = labelled or batch.targets.numel()
    if batch.at is None:
        logits = class_logits(model, batch.inputs)
    elif (hidden := hidden_at(model, batch.inputs, batch.at)) is not None:
        head = model.get_output_embeddings()
        if waiting := waiting_at(head):
            total: Tensor = _HeadLossFromHost.apply(hidden, waiting, head.bias, batch.targets)
        else:
            total = _HeadLoss.apply(hidden, head.weight, head.bias, batch.targets)
        return total / labelled
    else:
        logits = logits_at(model, batch.inputs, batch.at)
    return F.cross_entropy(logits, batch.targets, reduction="sum") / labelled
