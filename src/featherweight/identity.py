"""Of what a run or an adapter is: short hashes of its base, tokenizer, template and data, and its settings.

They are written into every checkpoint and adapter. A run goes on only as what it was; an adapter is used only with the
tokenizer that it was trained with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .adapter import parts
from .base import Base, fingerprint
from .errors import InputError
from .method import Retrained
from .rows import Row
from .task import Task

PROBE = "Text:  The naïve café's 12,345 rows\n\tif x != 0: return x**2 — Straße, 東京, Привет 😀 don't"
FORCED = "--force uses it all the same, and its answers may then mean nothing"


def identity_of(base: Base, task: Task, settings: dict[str, Any], name: str = "default") -> dict[str, Any]:
    """What must be the same for a run to go on: an adapter called `name` is attached."""
    told = {
        "base": _base_print(base, name),
        "tokenizer": tokenizer_print(base.tokenizer),
        "template": template_print(base.tokenizer, task.template, task.kind),
        "data": data_print([*task.train, *task.validation]),
        **settings,
    }
    plain: dict[str, Any] = json.loads(json.dumps(told, default=str))  # as it is read back
    return plain


def hashed(identity: Mapping[str, Any]) -> str:
    """An identity in 16 digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _base_print(base: Base, name: str) -> str:
    whole = [path for path, part in parts(base.model, name).items() if isinstance(part, Retrained)]
    return fingerprint(base.model, without=whole)


def check_base(base: Base, identity: dict[str, Any], name: str = "default") -> None:
    """Raise `InputError` where a base is no longer the one that a run began with.

    On a CPU its weights are views of its file: whoever overwrites that (a rename does not) changes them under the run.
    """
    if base.device.type == "cpu" and _base_print(base, name) != identity["base"]:
        raise InputError(
            f"model: the weights of {base.name} have changed since the run began: was its file overwritten? What was learned since "
            f"the last checkpoint is not kept; put the file back, and the same command goes on from there"
        )


def tokenizer_print(tokenizer: Any) -> str:
    """Tells one tokenizer from another by its words and by what it does with a text: not by its file, which versions rewrite."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return _hash([words, tokenizer(PROBE).input_ids, tokenizer.eos_token_id])


def template_print(tokenizer: Any, template: str, kind: str) -> str:
    """Tells one way of writing rows from another: the task's template, and for instructions the model's chat template."""
    chat = tokenizer.chat_template if kind == "instructions" else None
    return _hash([template, chat.strip() if isinstance(chat, str) else chat])


def data_print(rows: Sequence[Row]) -> str:
    """Tells one list of rows from another: their texts and answers, in order; not the place of the file."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps([row.spans, row.answer, row.messages]).encode())
    return whole.hexdigest()[:12]


def check_tokens(base: Base, about: dict[str, Any], *, force: bool) -> None:
    """Raise `InputError` where an adapter was trained with another tokenizer or chat template than this base's.

    `about` is what the adapter says of itself; one of another tool says nothing, and is taken as it is.
    """
    made = about.get("identity") or {}
    here = {"tokenizer": tokenizer_print(base.tokenizer)}
    if about.get("kind") == "instructions":
        here["template"] = template_print(base.tokenizer, about.get("template", ""), "instructions")
    for what, found in here.items():
        if made.get(what, found) != found and not force:
            word = {"tokenizer": "tokenizer", "template": "chat template"}[what]
            raise InputError(
                f"adapter: it was trained with another {word} (fingerprint {made[what]}) than that of {base.name} ({found}); "
                f"{FORCED}"
            )


def _hash(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
