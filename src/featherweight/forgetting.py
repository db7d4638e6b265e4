"""What fine-tuning breaks: the loss on general text that has nothing to do with the task, before and after.

    loss = − 1/N Σ log p(token | the tokens before it in its text)        in nats a token, over N tokens

An adapter that has learned its task by forgetting how to write has a higher loss here than the untouched model. The text is read
as it is, without a template, and with whatever adapter is live: a prompt stands in front of it too, as it does in use.
(Biderman et al. 2024, "LoRA Learns Less and Forgets Less", arXiv:2405.09673, measure it by the accuracy on other tasks.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import Base
from .data import read
from .demo import GENERAL, is_fetched
from .engine.batches import readable
from .engine.memory import free, out_of_memory
from .errors import InputError, listed
from .rows import TEXT_NAMES, pick

TEXTS, LONGEST = 100, 128  # so many texts, of so many tokens at most


def general_texts(wanted: str) -> list[str]:
    """The texts of a data set's text column; those of less than eight words say little and are left out.

    `auto` fetches nothing: it takes the editorials that came with the embedded data, or no texts, like `none`.
    """
    if wanted == "none" or (wanted == "auto" and not is_fetched(GENERAL)):
        return []
    wanted = GENERAL if wanted == "auto" else wanted
    rows = next(iter(read(wanted).values()))
    column = pick(rows.columns, TEXT_NAMES, "--general-text", None, wanted)
    if column is None:
        raise InputError(f"--general-text {wanted}: it needs a column named text; it has: {listed(rows.columns)}")
    texts = [text for row in rows.rows if len((text := str(row.get(column) or "")).split()) >= 8]
    if not texts:
        raise InputError(
            f"--general-text {wanted}: no text has eight words; give a data set of whole sentences, or none"
        )
    return texts[:: max(1, len(texts) // TEXTS)][:TEXTS]


@torch.no_grad()
def general_loss(base: Base, texts: Sequence[str], rows: int = 8) -> float | None:
    """Mean loss of a token of these texts with what is live; None for a model that does not continue texts."""
    if not texts or base.classifies or base.encoder_decoder:
        return None
    ids = [
        base.tokenizer(text, truncation=True, max_length=min(LONGEST, base.context // 2)).input_ids for text in texts
    ]
    ids = sorted((i for i in ids if len(i) > 1), key=len, reverse=True)
    total, tokens, start = 0.0, 0, 0
    while start < len(ids):
        some = ids[start : start + rows]
        try:
            total += _summed(base, some)
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e) or rows == 1:
                raise
            free(base.device)
            rows = (rows + 1) // 2
            continue
        tokens += sum(len(i) - 1 for i in some)
        start += len(some)
    return total / tokens if tokens else None


def _summed(base: Base, ids: list[list[int]]) -> float:
    """The loss summed over the tokens of some texts."""
    inputs: dict[str, Any] = readable(base, ids)
    logits = base.model(**inputs, use_cache=False).logits
    seen, total = inputs["attention_mask"].bool(), 0.0
    for row, words, real in zip(logits, inputs["input_ids"], seen, strict=True):  # one at a time: logits are large
        own = row[real][:-1].float().log_softmax(-1)
        total -= float(own.gather(1, words[real][1:, None]).sum())
    return total
