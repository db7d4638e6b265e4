"""From examples to tensors, with little padding.

Rows of similar length share a batch, and lengths are rounded up to a multiple of 8: every new shape costs the CPU
libraries new kernels. A decoder's rows are padded on the left, so that the place where it answers is the end of the
row for all; an encoder's on the right, where positions are counted from the start.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ..attention import rows_apart
from ..base import Base
from ..errors import InputError
from ..layout import Layout
from ..tokens import IGNORE, Example
from .memory import out_of_memory

ROUND = 8
ROUND_ANSWERS = 4  # an encoder–decoder's: they are short, and each place in them is a pass through the decoder
WINDOW = 32  # batches whose rows are sorted by length together; within a window the order of batches is random


@dataclass(frozen=True)
class Batch:
    """Tensors of one step: the model's inputs, and at which outputs which token is the answer.

    `at` counts outputs row by row, from 0. Where it is None, the model has a head of its own, and the targets are one class
    per row.
    """

    inputs: dict[str, Tensor]
    at: Int[Tensor, " labelled"] | None
    targets: Int[Tensor, " labelled"]
    examples: list[Example]

    @property
    def tokens(self) -> int:
        """How many tokens the model reads, padding not counted."""
        return sum(len(e.ids) - (self.at is not None and "decoder_input_ids" not in self.inputs) for e in self.examples)


def schedule(
    examples: Sequence[Example], batch_size: int, steps: int, seed: int, *, by_length: bool = True
) -> Iterator[list[Example]]:
    """Batches for `steps` steps: epochs shuffled anew, every batch full; similar lengths together where they are padded."""
    rng = random.Random(seed)
    stream: list[Example] = []
    done = 0
    while done < steps:
        within = max(1, len(examples) // batch_size)  # an epoch: sorting would put a row next to its own copy
        window = min(WINDOW, steps - done, within)
        while len(stream) < window * batch_size:
            stream += rng.sample(examples, len(examples))
        rows, stream = stream[: window * batch_size], stream[window * batch_size :]
        if by_length:
            rows.sort(key=lambda e: len(e.ids) + len(e.targets))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from batches
        done += window


def pad(rows: Sequence[list[int]], value: int, left: bool, to: int = ROUND) -> Int[Tensor, "batch seq"]:
    """Rows of different lengths as one tensor, its length rounded up to a multiple of `to`."""
    width = -(-max(map(len, rows)) // to) * to
    fill = [[value] * (width - len(r)) for r in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)])


def readable(
    base: Base, ids: Sequence[list[int]], types: Sequence[list[int] | None] | None = None
) -> dict[str, Tensor]:
    """What the model reads: ids, mask and, for decoders that take them, positions that do not count the padding.

    `types` tells the texts of a pair apart, for the encoders that look at it.
    """
    left = not (base.encoder_decoder or base.classifies)
    input_ids = pad(ids, base.tokenizer.pad_token_id, left)
    mask = pad([[1] * len(i) for i in ids], 0, left)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    taken = inspect.signature(type(base.model).forward).parameters
    if left and "position_ids" in taken:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if types and "token_type_ids" in taken and any(types):
        inputs["token_type_ids"] = pad([t or [0] * len(i) for t, i in zip(types, ids, strict=True)], 0, left)
    return {k: v.to(base.device) for k, v in inputs.items()}


def collate(base: Base, examples: list[Example]) -> Batch:
    """One training batch. The last token of a decoder's row is only ever an answer, so it is not read."""
    if base.classifies:
        classes = torch.tensor([e.targets[0] for e in examples], device=base.device)
        return Batch(readable(base, [e.ids for e in examples], [e.types for e in examples]), None, classes, examples)
    if base.encoder_decoder:
        inputs = readable(base, [e.ids for e in examples])
        targets = pad([e.targets for e in examples], IGNORE, left=False, to=ROUND_ANSWERS)
        start = base.model.config.decoder_start_token_id
        shifted = torch.cat([targets.new_full((len(examples), 1), start), targets[:, :-1]], dim=1)
        inputs["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORE, base.tokenizer.pad_token_id).to(
            base.device
        )
    else:
        inputs = readable(base, [e.ids[:-1] for e in examples])
        targets = pad([e.targets[1:] for e in examples], IGNORE, left=True)
    return _answered(base, inputs, targets, examples)


def _answered(
    base: Base, inputs: dict[str, Tensor], targets: Int[Tensor, "batch seq"], examples: list[Example]
) -> Batch:
    """A batch whose answers are the targets that are not `IGNORE`."""
    flat = targets.flatten()
    at = (flat != IGNORE).nonzero()[:, 0]
    return Batch(inputs, at.to(base.device), flat[at].to(base.device), examples)


def pack(base: Base, examples: list[Example]) -> Batch:
    """One training batch as a single row without padding, where no text sees another: see `attention`.

    What all texts begin with is read once. `check_packing` says whether a model can be told.
    """
    rows, targets = [e.ids[:-1] for e in examples], [e.targets[1:] for e in examples]
    inputs, layout = packed(base, rows, targets)
    answers = [t for row in targets for t in row[layout.shared :]]
    filled = [IGNORE] * layout.shared + answers
    filled += [IGNORE] * (inputs["input_ids"].shape[1] - len(filled))
    return _answered(base, inputs, torch.tensor([filled]), examples)


def pack_prompts(base: Base, prompts: Sequence[list[int]]) -> tuple[dict[str, Tensor], Int[Tensor, " prompts"]]:
    """The same for texts that are to be answered: what the model reads, and where each text ends."""
    targets = [[IGNORE] * (len(prompt) - 1) + prompt[-1:] for prompt in prompts]  # the last token is its row's own
    inputs, layout = packed(base, prompts, targets)
    ends = list(itertools.accumulate(layout.lengths, initial=layout.shared))[1 : len(prompts) + 1]
    return inputs, torch.tensor(ends, device=base.device) - 1


def packed(base: Base, rows: Sequence[list[int]], targets: Sequence[list[int]]) -> tuple[dict[str, Tensor], Layout]:
    """Texts one after the other, behind what all of them begin with as far as it has no targets."""
    shared = _shared(rows, targets)
    lengths = [len(row) - shared for row in rows]
    if rest := -(shared + sum(lengths)) % ROUND:  # a last text of padding rounds the length up
        lengths.append(rest)
    layout = Layout(shared, tuple(lengths))
    ids = [*rows[0][:shared], *(i for row in rows for i in row[shared:]), *[base.tokenizer.pad_token_id] * rest]
    inputs = {
        "input_ids": torch.tensor([ids], device=base.device),
        "attention_mask": layout.mask(base.device),
        "position_ids": layout.positions(base.device),
    }
    return inputs, layout


def _shared(rows: Sequence[list[int]], targets: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, none of which has a label; 0 where it is not worth a segment of its own."""
    alike = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    same = sum(1 for _ in itertools.takewhile(bool, alike)) if len(rows) > 1 else 0
    first = min(next((i for i, t in enumerate(row) if t != IGNORE), len(row)) for row in targets)
    n = min(same, first, min(map(len, rows)) - 1)
    return n if n * (len(rows) - 1) >= ROUND else 0


def keeps_apart(base: Base) -> bool:
    """Whether `check_packing` has nothing to say against this model."""
    try:
        check_packing(base)
    except InputError:
        return False
    return True


@torch.no_grad()
def check_packing(base: Base) -> None:
    """Raise `InputError` where texts in one row would see each other, or mean something else: found out by trying."""
    if base.encoder_decoder or base.classifies:
        raise InputError("packing is for decoders: an encoder's positions cannot begin again within a row")
    model = base.model
    reason = f"packing: in this {type(model).__name__} packed texts are not kept apart; train it without"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise InputError(reason)
    ids = torch.arange(12, device=base.device)[None] % model.get_input_embeddings().num_embeddings
    other = ids.clone()
    other[0, 2:6] = ids[0, 2:6].flip(0)
    layout = Layout(2, (4, 6))
    told = {"attention_mask": layout.mask(base.device), "position_ids": layout.positions(base.device)}
    training, by_itself = model.training, torch.cat([ids[:, :2], ids[:, 6:]], dim=1)
    model.eval()  # dropout would look like texts that see each other
    try:
        alone = model(input_ids=by_itself, use_cache=False).logits[0, 2:].float()
        with rows_apart(model):
            both = [model(input_ids=i, **told, use_cache=False).logits[0, 6:].float() for i in (ids, other)]
    except (TypeError, ValueError, RuntimeError, KeyError) as e:
        if out_of_memory(e):
            raise
        raise InputError(reason) from e
    finally:
        model.train(training)
    off = max((x - y).norm() for x, y in ((both[0], alone), (both[1], alone), both)) / alone.norm()
    if not off < 0.03:  # what bfloat16 rounds away
        raise InputError(reason)
