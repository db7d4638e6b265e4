"""A task: what the model reads, what it should answer, and which rows it is tested on.

Two kinds. Classification has a text and a label: the row is written with a template and every label's tokens are
scored, so the answer is always one of the labels. Instructions have a prompt and a response, or chat messages that
are written with the model's own chat template.

A row is a list of spans, `(text, trained)`: the loss is taken on the trained ones only.
"""

from __future__ import annotations

import random
import string
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import data
from .errors import InputError, nearest

TEXT_NAMES = ("text", "sentence", "review", "content", "snippet", "tweet", "title", "question", "input")
LABEL_NAMES = ("label", "labels", "sentiment", "class", "category", "target", "intent", "emotion", "topic")
PROMPT_NAMES = ("prompt", "instruction", "question", "input", "query")
RESPONSE_NAMES = ("response", "completion", "output", "answer", "target")
MESSAGES_NAMES = ("messages", "conversations", "conversation", "chat")
MAX_LABELS = 50


@dataclass(frozen=True)
class Row:
    """One example. `spans` are (text, trained); `answer` is what a perfect model writes."""

    spans: tuple[tuple[str, bool], ...]
    answer: str
    place: str
    label: int | None = None
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows to test on, with all that is needed to write another row the same way."""

    kind: str  # "classification" or "instructions"
    source: str
    train: list[Row]
    test: list[Row]
    labels: list[str] = field(default_factory=list)
    template: str = ""

    @property
    def instruction(self) -> str:
        """The task in words: what prompts and prefixes start from."""
        if self.kind == "classification":
            return f"Classify the text. Answer with one of: {', '.join(self.labels)}."
        return "Read the request and answer it as well as you can."


def load_task(
    source: str,
    *,
    test_data: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    template: str | None = None,
    test_fraction: float = 0.1,
    test_rows: int | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    test_only: bool = False,
) -> Task:
    """Read a data set and split it, seeded, stratified by label, equal texts always on one side.

    `test_only` puts every row into the test side (for evaluating on a file); `labels` fixes the label set then.
    """
    splits = data.read(source)
    main = splits.get("train") or next(iter(splits.values()))
    reader = _Reader(main, text_column, label_column, prompt_column, response_column, template, labels)
    rows = reader.rows(main)
    if test_only:
        train, test = [], reader.rows(splits["test"]) if "test" in splits else rows
    elif test_data is not None:
        train, test = rows, reader.rows(next(iter(data.read(test_data).values())))
    elif held_out := splits.get("test") or splits.get("validation"):
        train, test = rows, reader.rows(held_out)
    else:
        train, test = split(rows, test_fraction, seed)
    if test_rows is not None:
        test = _sample(test, test_rows, seed)
    known = list(labels) if labels else sorted({r.answer for r in train}) if reader.label_column else []
    task = Task(reader.kind, source, _labelled(train, known), _labelled(test, known), known, reader.template)
    _check(task, test_only)
    return task


def _check(task: Task, test_only: bool) -> None:
    if not task.test:
        raise InputError(f"data: {task.source} leaves no rows to test on; give more rows or --test-data")
    if not test_only and not task.train:
        raise InputError(f"data: {task.source} leaves no rows to train on; give more rows or --test-data")
    if task.kind != "classification":
        return
    if len(task.labels) < 2:
        raise InputError(
            f"data: {task.source} has one class only ({', '.join(map(repr, task.labels))}); classification needs at least two"
        )
    if len(task.labels) > MAX_LABELS:
        raise InputError(
            f"data: {len(task.labels)} different labels; more than {MAX_LABELS} look like free text: "
            f"name the columns as --prompt-column and --response-column instead"
        )


def _labelled(rows: list[Row], labels: list[str]) -> list[Row]:
    if not labels:
        return rows
    number = {label: i for i, label in enumerate(labels)}
    for row in rows:
        if row.answer not in number:
            raise InputError(
                f"data: {row.place}: the label {row.answer!r} is not among those of the training rows: {', '.join(labels)}"
            )
    return [Row(r.spans, r.answer, r.place, number[r.answer]) for r in rows]


def split(rows: list[Row], test_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, test): seeded, stratified by answer; rows whose text is the same but for case and spaces stay together."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[" ".join(_text_of(row).casefold().split())].append(row)
    stratify = len({r.answer for r in rows}) <= MAX_LABELS
    strata: dict[str, list[list[Row]]] = defaultdict(list)
    for group in groups.values():
        strata[group[0].answer if stratify else ""].append(group)
    rng = random.Random(seed)
    train: list[Row] = []
    test: list[Row] = []
    for key in sorted(strata):
        stratum = strata[key]
        rng.shuffle(stratum)
        wanted = test_fraction * sum(map(len, stratum))
        taken = 0
        for group in stratum:
            if taken + len(group) / 2 <= wanted:
                test += group
                taken += len(group)
            else:
                train += group
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _text_of(row: Row) -> str:
    return (
        "\n".join(m["content"] for m in row.messages if m["role"] != "assistant") if row.messages else row.spans[0][0]
    )


def _sample(rows: list[Row], n: int, seed: int) -> list[Row]:
    """At most `n` rows, every label keeping its share."""
    if n >= len(rows):
        return rows
    _, sampled = split(rows, n / len(rows), seed + 1)
    return sampled[:n]


def pick(columns: Iterable[str], names: Sequence[str], flag: str, wanted: str | None, source: str) -> str | None:
    """The wanted column, checked, or the first of the usual names that exists."""
    columns = list(columns)
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"{flag}: {source} has no column {wanted!r}; {nearest(wanted, columns)}")
        return wanted
    lower = {c.lower(): c for c in columns}
    return next((lower[n] for n in names if n in lower), None)


class _Reader:
    """Turns table rows into `Row`s: finds the columns once, then writes each row the same way."""

    def __init__(
        self, rows: data.Rows, text: str | None, label: str | None, prompt: str | None, response: str | None,
        template: str | None, labels: Sequence[str] | None,
    ) -> None:  # fmt: skip
        columns, source = rows.columns, rows.source
        self.messages_column = self.label_column = self.prompt_column = self.response_column = None
        wants_instructions = prompt is not None or response is not None
        if not wants_instructions:
            self.label_column = pick(columns, LABEL_NAMES, "--label-column", label, source)
            self.text_column = pick(columns, TEXT_NAMES, "--text-column", text, source)
        if self.label_column and (self.text_column or template):
            self.kind = "classification"
            self.template = template or f"{{{self.text_column}}}\n{self.label_column.replace('_', ' ').capitalize()}:"
            self._check_template(columns, source)
            return
        self.label_column, self.kind, self.template = None, "instructions", template or "{prompt}"
        if not wants_instructions and (found := pick(columns, MESSAGES_NAMES, "", None, source)):
            self.messages_column = found
            return
        self.prompt_column = pick(columns, PROMPT_NAMES, "--prompt-column", prompt, source)
        self.response_column = pick(columns, RESPONSE_NAMES, "--response-column", response, source)
        if not (self.prompt_column and self.response_column):
            raise InputError(
                f"data: {source} has the columns {', '.join(columns)}; name a text and a label with --text-column and "
                f"--label-column, or a prompt and a response with --prompt-column and --response-column"
            )

    def _check_template(self, columns: list[str], source: str) -> None:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as e:
            raise InputError(f"--template {self.template!r} is malformed: {e}; write columns as {{name}}") from None
        if not names:
            raise InputError(f"--template {self.template!r} names no column; write one as {{{columns[0]}}}")
        if unknown := [n for n in names if n not in columns]:
            raise InputError(f"--template: {source} has no column {unknown[0]!r}; {nearest(unknown[0], columns)}")
        last = self.template.rindex("}") + 1
        self.head, self.tail = self.template[:last], self.template[last:]

    def rows(self, table: data.Rows) -> list[Row]:
        """All rows of a table, written out."""
        write = self._classified if self.label_column else self._chat if self.messages_column else self._instructed
        return [write(row, place) for row, place in zip(table.rows, table.places, strict=True)]

    def _value(self, row: dict[str, Any], column: str | None, place: str) -> str:
        value = row.get(column or "")
        if value is None or not str(value).strip():
            raise InputError(f"data: {place}: the column {column!r} is empty")
        return str(value).strip()

    def _classified(self, row: dict[str, Any], place: str) -> Row:
        label = self._value(row, self.label_column, place)
        if self.text_column and f"{{{self.text_column}}}" in self.head:
            self._value(row, self.text_column, place)
        head = self.head.format_map({k: str(v).strip() for k, v in row.items()})
        return Row(((head, False), (self.tail, False), (label, True)), label, place)

    def _instructed(self, row: dict[str, Any], place: str) -> Row:
        prompt = self.template.replace("{prompt}", self._value(row, self.prompt_column, place))
        response = self._value(row, self.response_column, place)
        chat = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        return Row(((prompt, False), (response, True)), response, place, messages=chat)

    def _chat(self, row: dict[str, Any], place: str) -> Row:
        found = row.get(self.messages_column or "")
        if not isinstance(found, list) or not found:
            raise InputError(f"data: {place}: {self.messages_column!r} must be a list of messages")
        messages = tuple(_message(m, place) for m in found)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise InputError(f"data: {place}: the last message must be the assistant's, after another's")
        prompt = "\n".join(m["content"] for m in messages[:-1])
        return Row(
            ((prompt, False), (messages[-1]["content"], True)), messages[-1]["content"], place, messages=messages
        )


def _message(message: Any, place: str) -> dict[str, str]:
    """`{"role", "content"}`, or ShareGPT's `{"from", "value"}`."""
    if isinstance(message, dict):
        role = message.get("role") or {"human": "user", "gpt": "assistant"}.get(
            str(message.get("from")), message.get("from")
        )
        content = message.get("content", message.get("value"))
        if role in ("system", "user", "assistant") and isinstance(content, str):
            return {"role": role, "content": content}
    raise InputError(f"data: {place}: a message needs a role (system, user or assistant) and a content text")
