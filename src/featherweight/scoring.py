"""How good is it? Labels by scoring, texts by generating; accuracy always with n and an interval.

A label's score is the log-probability of all its tokens after the prompt. The prompt is read once: where every label
is one token, a single forward pass answers a row; the further tokens of longer labels continue from its cache. A
classifier has a head that scores the labels itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .adapter import attached
from .attention import rows_apart
from .base import Base
from .calls import cache_name
from .engine.batches import keeps_apart, pack_prompts, readable
from .engine.lean import lean
from .engine.loss import class_logits, logits_at
from .engine.memory import free, out_of_memory, within
from .errors import InputError
from .rows import Row
from .stats import wilson
from .task import Task
from .tokens import Example, Writer

EVAL_BATCH = 32
NEW_TOKENS = 128  # of an answer that is written


@dataclass
class Score:
    """Accuracy of a model on n rows. Times are of the forward passes alone."""

    correct: int
    n: int
    predictions: list[str]
    answers: list[str]
    places: list[str]
    seconds: float
    batches: int
    metric: str
    cut: int = 0
    """Rows that were longer than the context and were cut."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson(self.correct, self.n)

    @property
    def macro_f1(self) -> float:
        """Mean over the classes that occur of their F1."""
        scores = []
        for label in sorted(set(self.answers)):
            hits = sum(p == a == label for p, a in zip(self.predictions, self.answers, strict=True))
            scores.append(2 * hits / (self.predictions.count(label) + self.answers.count(label)))
        return sum(scores) / len(scores)


def evaluate(
    base: Base,
    task: Task,
    writer: Writer,
    *,
    metric: str = "auto",
    batch_size: int = EVAL_BATCH,
    max_new_tokens: int = NEW_TOKENS,
    on_batch: Callable[[int, int], None] | None = None,
) -> Score:
    """Accuracy on the task's test rows with whatever adapter is live.

    `metric`: `labels` scores every label, `exact_match` compares generated text, `auto` takes the first where the task
    has labels. `on_batch(rows done, rows right)` reports progress.
    """
    if base.classifies and metric == "exact_match":
        raise InputError(
            f"metric exact_match needs a model that writes text, and {base.name} answers with a class; use labels"
        )
    if base.random:
        raise InputError(
            f"the {base.random[0]} of {base.name} is random: it has no head for these labels before an adapter has trained one"
        )
    metric = ("labels" if task.labels else "exact_match") if metric == "auto" else metric
    if metric == "labels" and not task.labels:
        raise InputError("metric labels needs a task with labels; use exact_match")
    examples, cut = writer.examples(task.test)
    answers: dict[int, str] = {}
    seconds, batches, right = 0.0, 0, 0
    with _scoring(base, writer, task.labels if metric == "labels" else []) as scores:

        def answered(rows: list[Example]) -> list[str]:
            if metric == "exact_match":
                return generate_from(base, [r.prompt for r in rows], max_new_tokens)
            return [task.labels[best] for best in scores(rows).argmax(dim=1).tolist()]

        for chosen, texts, took in in_batches(base, examples, batch_size, answered):
            seconds += took
            batches += 1
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
                right += answers[i] == task.test[i].answer.strip()
            if on_batch:
                on_batch(len(answers), right)
    predictions = [answers[i] for i in range(len(examples))]
    places = [r.place for r in task.test]
    return Score(
        right, len(examples), predictions, [r.answer.strip() for r in task.test], places, seconds, batches, metric, cut
    )


def probabilities(
    base: Base,
    rows: list[Row],
    labels: list[str],
    writer: Writer,
    *,
    batch_size: int = EVAL_BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "rows labels"]:
    """How the model divides its belief among the labels, for rows whose label nobody has told: each row of the result sums to 1.

    They are the scores that `evaluate` compares, and sum to 1 because nothing but the labels is asked about. They say which label the model
    holds for likelier, not how often it is right. `on_batch(rows done)` reports progress.
    """
    examples, _ = writer.examples(rows)
    found, done = torch.empty(len(rows), len(labels)), 0
    with _scoring(base, writer, labels) as scores:
        for chosen, given, _ in in_batches(base, examples, batch_size, lambda rows: scores(rows).softmax(-1).cpu()):
            found[chosen] = given
            done += len(chosen)
            if on_batch:
                on_batch(done)
    return found


@contextmanager
def _scoring(
    base: Base, writer: Writer, labels: list[str]
) -> Iterator[Callable[[list[Example]], Float[Tensor, "rows labels"]]]:
    """The base made ready to answer, and what scores the labels, where there are any."""
    ids = writer.label_ids(labels) if labels and not base.classifies else []
    packing = bool(ids) and all(len(i) == 1 for i in ids) and keeps_apart(base)
    base.model.eval()
    with torch.no_grad(), lean(base.model), within(base.device), rows_apart(base.model) if packing else nullcontext():
        yield lambda rows: (first_token_scores if packing else label_scores)(base, rows, ids)


def in_batches(
    base: Base, examples: Sequence[Example], batch_size: int, answer: Callable[[list[Example]], Any]
) -> Iterator[tuple[list[int], Any, float]]:
    """(numbers of the rows, what `answer` says of them, its seconds), the longest rows first: if memory runs out, then at once.

    Then the same rows are asked again, fewer at a time.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
    start = 0
    while start < len(order):
        chosen = order[start : start + batch_size]
        clock, found = time.perf_counter(), None
        try:
            found = answer([examples[i] for i in chosen])
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        if found is None:
            free(base.device)
            if batch_size == 1:
                raise InputError(
                    "out of memory while evaluating, one row at a time: shorten rows with --max-length, or use --quantize"
                )
            batch_size = (min(batch_size, len(chosen)) + 1) // 2
            continue
        yield chosen, found, time.perf_counter() - clock
        start += len(chosen)


def first_token_scores(
    base: Base, rows: Sequence[Example], labels: Sequence[list[int]]
) -> Float[Tensor, "rows labels"]:
    """`label_scores` where every label is one token: one packed row, no padding, inside `rows_apart`."""
    log_p = logits_at(base.model, *pack_prompts(base, [r.prompt for r in rows])).log_softmax(-1)
    return log_p[:, [ids[0] for ids in labels]]


def label_scores(base: Base, rows: Sequence[Example], labels: Sequence[list[int]]) -> Float[Tensor, "rows labels"]:
    """Log-probability of every label, all its tokens, given each row's prompt; or what a classifier's own head says."""
    if base.classifies:
        return class_logits(base.model, readable(base, [r.ids for r in rows], [r.types for r in rows])).log_softmax(-1)
    inputs = readable(base, [r.prompt for r in rows])
    if base.encoder_decoder:
        return _decoded_scores(base, inputs, labels)
    n, width = inputs["attention_mask"].shape
    ends = (
        torch.arange(1, n + 1, device=base.device) * width - 1
    )  # padded on the left: every prompt ends in the last column
    scores = torch.empty(len(rows), len(labels), device=base.device)
    if all(len(ids) == 1 for ids in labels):
        start = logits_at(base.model, inputs, ends).log_softmax(-1)
        return start[:, [ids[0] for ids in labels]]
    out = base.model(**inputs, use_cache=True, logits_to_keep=1)
    cache = cache_name(out)
    assert cache is not None  # it was asked for
    start = out.logits[:, -1].float().log_softmax(-1)
    for column, ids in enumerate(labels):
        scores[:, column] = start[:, ids[0]]
        if len(ids) == 1:
            continue
        more = torch.tensor(ids[:-1], device=base.device).expand(len(rows), -1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
        after = {"input_ids": more, "attention_mask": mask, cache: copy.deepcopy(out[cache])}
        if "position_ids" in inputs:
            after["position_ids"] = (mask.cumsum(1) - 1)[:, -more.shape[1] :]
        log_p = base.model(**after, use_cache=True).logits.float().log_softmax(-1)
        wanted = torch.tensor(ids[1:], device=base.device).expand(len(rows), -1)
        scores[:, column] += log_p.gather(2, wanted[..., None]).sum((1, 2))
    return scores


def _decoded_scores(base: Base, inputs: dict[str, Tensor], labels: Sequence[list[int]]) -> Float[Tensor, "rows labels"]:
    """The encoder reads once; the decoder writes each label."""
    encoded = base.model.get_encoder()(**inputs)
    mask, n = inputs["attention_mask"], inputs["attention_mask"].shape[0]
    scores = []
    for ids in labels:
        wanted = torch.tensor(ids, device=base.device).expand(n, -1)
        start = wanted.new_full((n, 1), base.model.config.decoder_start_token_id)
        shifted = torch.cat([start, wanted[:, :-1]], dim=1)
        logits = base.model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=shifted, use_cache=False
        ).logits
        scores.append(logits.float().log_softmax(-1).gather(2, wanted[..., None]).sum((1, 2)))
    return torch.stack(scores, dim=1)


def generate_from(base: Base, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float = 0.0) -> list[str]:
    """Continue every prompt, greedily or by sampling, and decode what was added."""
    inputs = readable(base, prompts)
    inputs.pop("position_ids", None)  # `generate` counts them itself, and goes on counting
    max_new_tokens = room_for(base, inputs["input_ids"].shape[1], max_new_tokens)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = base.model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    added = out if base.encoder_decoder else out[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = base.tokenizer.batch_decode(added, skip_special_tokens=True)
    return texts


def room_for(base: Base, prompt: int, new_tokens: int) -> int:
    """How many tokens can follow a prompt of so many: positions that a decoder has not learned do not exist."""
    if base.encoder_decoder:
        return new_tokens
    virtual = max((getattr(m, "num_virtual_tokens", 0) for m in attached(base.model).values()), default=0)
    return max(1, min(new_tokens, base.context - virtual - prompt))


def majority(task: Task) -> Score:
    """What always answering the most frequent training label would reach."""
    answers = [r.answer for r in task.test]
    seen = [r.answer for r in task.train] or answers
    guess = max(sorted(set(seen)), key=seen.count)
    predictions = [guess] * len(answers)
    return Score(
        answers.count(guess), len(answers), predictions, answers, [r.place for r in task.test], 0.0, 0, "labels"
    )
