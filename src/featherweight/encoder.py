"""Encoders (BERT, RoBERTa, ModernBERT …): models that read a text and answer with a class instead of words.

What a checkpoint of theirs holds is the stack that reads; the head that chooses a class belongs to a task and is new with
each. So a task's labels are needed to build the model, a new head starts random (the same in every load), and whatever
starts random is trained and saved with the adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import InputError


def is_encoder(config: Any) -> bool:
    """Whether a configuration is of a model that only reads: trained to fill gaps, not to go on writing."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    writes = writes or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ())
    reads = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return reads and config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and not writes


def with_labels(config: Any, labels: Sequence[str] | None) -> Any:
    """The configuration of this encoder with a head for these labels, row by row."""
    if not labels:
        raise InputError(
            f"this model is an encoder ({config.model_type}): it answers with a class and writes no text, so it needs data with "
            f"a text and a label column (from Python: load_base(…, labels=task.labels)); to write text, choose a decoder"
        )
    if (order := head_order(config, labels)) != list(labels):
        raise InputError(
            f"this model's head has these labels in another order: {', '.join(order)}; give them in that order"
        )
    config = copy.deepcopy(config)
    config.num_labels = len(labels)  # before the names, which it would overwrite
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    return config


def own_labels(config: Any) -> list[str]:
    """The labels of a configuration's head."""
    return [config.id2label[i] for i in range(config.num_labels)]


def head_order(config: Any, labels: Sequence[str]) -> list[str]:
    """The labels in the order of the rows of the checkpoint's head, where it has one for just these; else as they are."""
    if any(a.endswith("ForSequenceClassification") for a in config.architectures or ()):
        spelled, own = {label.casefold(): label for label in labels}, [o.casefold() for o in own_labels(config)]
        if len(own) == len(labels) and set(own) == spelled.keys():
            return [spelled[o] for o in own]
    return list(labels)


def head_modules(model: Any) -> tuple[str, ...]:
    """Paths of all that `fresh_modules` may find fresh."""
    stack = model.base_model_prefix
    return (*(name for name, _ in model.named_children() if name != stack), f"{stack}.pooler")


def fresh_modules(model: Any, missing: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """What a checkpoint lacks: modules of the head and what feeds it, by name, and tensors that nothing can replace.

    The first start random and can be trained: all that is outside the stack, and the stack's pooler.
    """
    stack = model.base_model_prefix + "."
    fresh, lost = dict[str, None](), list[str]()
    for key in sorted(missing):
        if not key.startswith(stack):
            fresh[key.split(".")[0]] = None
        elif key.startswith(stack + "pooler."):
            fresh["pooler"] = None
        else:
            lost.append(key)
    return tuple(fresh), lost
