"""Training, evaluating and generating in one call each: what the command line does, from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .adapter import attach, attached, facts, remember
from .base import Base
from .engine.train import Report, Settings, fit
from .errors import InputError
from .identity import identity_of
from .method import Method
from .rows import Row, pieces
from .scoring import EVAL_BATCH, Score, generate_from
from .scoring import evaluate as score
from .task import Task
from .tokens import Writer, writer_for


def begin(base: Base, method: Method, task: Task, writer: Writer, *, seed: int = 0, name: str = "default") -> Method:
    """Attach a method to learn a task: seeded, starting from the task's instruction, knowing what `save` should tell."""
    torch.manual_seed(seed)
    if base.fresh:  # what started random must go with the adapter
        method = replace(method, modules_to_save=(*(method.modules_to_save or ()), *base.fresh))
    method = attach(base.model, method.starting_from(task.instruction), name, encode=writer.plain)
    known = {"base": base.name, "dtype": str(base.model.dtype).removeprefix("torch."), **task.about}
    remember(base.model, name, **known, identity=identity_of(base, task, {}, name))
    return method


def train(
    base: Base,
    task: Task,
    method: Method | None = None,
    *,
    name: str = "default",
    lr: float | None = None,
    max_length: int | None = None,
    seed: int = 0,
    on_step: Callable[[Report], None] | None = None,
    **settings: Any,
) -> Report:
    """Train an adapter on the task's training rows.

    Attaches `method` first, seeded and starting from the task's instruction; without one, trains the adapter that
    is attached as `name`. `settings` are those of `engine.train.Settings`; the rate defaults to the method's own.
    """
    methods = [method] if method is not None else attached(base.model).values()
    writer = writer_for(base, max_length, task.labels, methods)
    examples, cut = writer.examples(task.train)
    if method is not None:
        begin(base, method, task, writer, seed=seed, name=name)
    elif name not in attached(base.model):
        raise InputError("nothing to train: pass a method, such as LoRA(r=8)")
    method = attached(base.model)[name]
    chosen = Settings(lr=lr if lr is not None else method.rate(base.classifies), seed=seed, **settings)
    report = fit(base, examples, chosen, name=name, on_step=on_step)
    report.cut = cut
    return report


def evaluate(
    base: Base, task: Task, *, metric: str = "auto", batch_size: int = EVAL_BATCH, max_length: int | None = None
) -> Score:
    """Accuracy, with n and a 95 % interval, of the base with its live adapters on the task's test rows."""
    writer = writer_for(base, max_length, task.labels, attached(base.model).values())
    return score(base, task, writer, metric=metric, batch_size=batch_size)


def generate(
    base: Base,
    prompts: Sequence[str],
    *,
    about: dict[str, Any] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    raw: bool = False,
) -> list[str]:
    """Texts that follow the prompts. A prompt is written as the adapter was trained, which
    `about` says (an adapter's `featherweight.json`; by default what the attached one knows of itself).

    Without it the model's chat template is used where it has one; `raw` sends the text as it is.
    """
    if base.classifies:
        raise InputError(f"{base.name} is an encoder: it answers with a class and writes no text; use evaluate")
    about = facts(base.model) if about is None else about
    writer = writer_for(base, None, methods=attached(base.model).values())
    ids = []
    for prompt in prompts:
        if not raw and about.get("kind") == "classification":
            head, tail = pieces(about["template"])
            if len(head) > 1:
                columns = ", ".join(name for _, name in head)
                raise InputError(
                    f"this adapter's template has several columns ({columns}); write the prompt out and pass --raw"
                )
            row = Row(((head[0][0] + prompt, False), (tail, False), ("", True)), "", "prompt", label=0)
        elif raw:
            row = Row(((prompt, False), ("", True)), "", "prompt")
        else:
            if about.get("kind") == "instructions":
                prompt = about["template"].replace("{prompt}", prompt)
            chat = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""})
            row = Row(((prompt, False), ("", True)), "", "prompt", messages=chat)
        ids.append(writer.prompt(row))
    return generate_from(base, ids, max_new_tokens, temperature)
