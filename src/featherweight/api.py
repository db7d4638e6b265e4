"""Training, evaluating, predicting and generating in one call each: what the command line does, from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .adapter import attach, attached, facts, remember
from .base import Base
from .engine.train import Report, Settings, fit
from .errors import InputError
from .identity import identity_of
from .method import Method
from .rows import Row, pieces, unlabelled
from .scoring import EVAL_BATCH, Score, generate_from, probabilities
from .scoring import evaluate as score
from .task import Task
from .tokens import Writer, writer_for


def begin(base: Base, method: Method, task: Task, writer: Writer, *, seed: int = 0, name: str = "default") -> Method:
    """Attach a method to learn a task: seeded, starting from the task's instruction, knowing what `save` should tell."""
    torch.manual_seed(seed)
    if base.fresh:  # what started random must go with the adapter
        method = replace(method, modules_to_save=(*(method.modules_to_save or ()), *base.fresh))
    method = attach(base.model, method.starting_from(task.instruction), name, encode=writer.plain)
    _know(base, task, name)
    return method


def _know(base: Base, task: Task, name: str) -> None:
    """Keep with an adapter what it is trained on: `save` tells it, and `predict` and `generate` write rows the same way."""
    known = {"base": base.name, "dtype": str(base.model.dtype).removeprefix("torch."), **task.about}
    remember(base.model, name, **known, identity=identity_of(base, task, {}, name))


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
    is attached as `name`. `settings` are those of `engine.train.Settings`, such as `steps` and `batch_size`; the rate
    defaults to the method's own. `on_step(report so far)` is called after each step.
    """
    methods = [method] if method is not None else attached(base.model).values()
    writer = writer_for(base, max_length, task.labels, methods)
    examples, cut = writer.examples(task.train)
    if method is not None:
        begin(base, method, task, writer, seed=seed, name=name)
    elif name not in attached(base.model):
        raise InputError("nothing to train: pass a method, such as LoRA(r=8)")
    else:
        _know(base, task, name)
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


@dataclass(frozen=True)
class Prediction:
    """The label that a classifier gives to a text, and how it divides its belief among all of them."""

    label: str
    probabilities: dict[str, float]
    """For each label; they sum to 1. They say what the model holds for likelier, not how often it is right."""

    @property
    def probability(self) -> float:
        """Of the label that was chosen."""
        return self.probabilities[self.label]


def predict(
    base: Base,
    texts: Sequence[str | Mapping[str, Any]],
    *,
    about: dict[str, Any] | None = None,
    batch_size: int = EVAL_BATCH,
    max_length: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Label texts that nobody has labelled, with the adapter that is attached: one `Prediction` a text, always one of the trained labels.

    A text is written as the adapter was trained, which `about` says (an adapter's `featherweight.json`; by default what the
    attached one knows of itself). Where its template has several columns, give mappings: `{"title": …, "text": …}`. Raises
    `InputError` for an adapter that was not trained to classify. `on_batch(texts done)` reports progress.
    """
    about = facts(base.model) if about is None else about
    if not about.get("labels") or not about.get("template"):
        raise InputError("this adapter was not trained to tell labels apart, so it has none to give; use generate")
    template, labels = about["template"], list(about["labels"])
    columns = [name for _, name in pieces(template)[0]]
    rows = []
    for number, text in enumerate(texts, 1):
        if isinstance(text, str) and len(columns) > 1:
            raise InputError(
                f"text {number}: this adapter reads several columns ({', '.join(columns)}); give a mapping of them"
            )
        row = {columns[0]: text} if isinstance(text, str) else text
        rows.append(unlabelled(template, row, f"text {number}", about.get("columns", {}).get("text_column")))
    writer = writer_for(base, max_length, labels, attached(base.model).values())
    return label_rows(base, rows, labels, writer, batch_size=batch_size, on_batch=on_batch)


def label_rows(
    base: Base,
    rows: list[Row],
    labels: list[str],
    writer: Writer,
    *,
    batch_size: int = EVAL_BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """The same for rows that are written out already."""
    found = probabilities(base, rows, labels, writer, batch_size=batch_size, on_batch=on_batch).tolist()
    divided = [dict(zip(labels, row, strict=True)) for row in found]
    return [Prediction(max(labels, key=each.__getitem__), each) for each in divided]


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
        raise InputError(f"{base.name} is an encoder: it answers with a class and writes no text; use predict")
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
