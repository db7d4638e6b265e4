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
from dataclasses import dataclass, field, replace
from typing import Any

from . import data
from .errors import InputError, nearest

TEXT_NAMES = ("text", "sentence", "review", "content", "snippet", "tweet", "title", "question", "input")
LABEL_NAMES = ("label", "labels", "sentiment", "class", "category", "target", "intent", "emotion", "topic")
PROMPT_NAMES = ("prompt", "instruction", "question", "input", "query")
RESPONSE_NAMES = ("response", "completion", "output", "answer", "target")
CONTEXT_NAMES = ("input", "context")  # what an instruction is about (Alpaca's input, a question's context)
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
    held_out: dict[str, Any] = field(default_factory=dict)
    """What finds the same test rows again: seed and test_fraction, or test_data; empty where the data has its own split."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which columns were read, by the name of their flag."""
    leaked: int = 0
    """Training rows that were left out because their text is among the given test rows."""

    @property
    def about(self) -> dict[str, Any]:
        """What an adapter must know of its task to be used again."""
        return {
            "kind": self.kind,
            "template": self.template,
            "labels": self.labels,
            "columns": self.columns,
            "data": data.named(self.source),
            "held_out": self.held_out,
        }

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

    Where test rows are given, training rows with the same text are left out (`Task.leaked` counts them).
    `test_only` puts every row into the test side (for evaluating on a file); `labels` fixes the label set then.
    """
    splits = data.read(source)
    main = splits.get("train") or next(iter(splits.values()))
    reader = _Reader(main, text_column, label_column, prompt_column, response_column, template, labels)
    rows, made = reader.rows(main), dict[str, Any]()
    if test_only:
        train, test = [], [row for part in splits.values() for row in reader.rows(part)]
    elif test_data is not None:
        made = {"test_data": data.named(test_data)}
        train, test = rows, reader.rows(next(iter(data.read(test_data).values())))
    elif held_out := splits.get("test") or splits.get("validation"):
        train, test = rows, reader.rows(held_out)
    else:
        made = {"seed": seed, "test_fraction": test_fraction}
        train, test = split(rows, test_fraction, seed)
    tested = {_key(row) for row in test}
    leaked = sum(_key(row) in tested for row in train)
    train = [row for row in train if _key(row) not in tested] if leaked else train
    if test_rows is not None:
        test = _sample(test, test_rows, seed)
    known: list[str] = []
    if reader.label_column:
        known = list(labels) if labels else sorted({r.answer for r in train or test})
        _check_labels(known, source)
    task = Task(
        reader.kind,
        source,
        _labelled(train, known),
        _labelled(test, known),
        known,
        reader.template,
        made,
        reader.columns,
        leaked,
    )
    if not task.test:
        raise InputError(f"data: {source} leaves no rows to test on; give more rows, --test-fraction or --test-data")
    if not test_only and not task.train:
        raise InputError(f"data: {source} leaves no rows to train on; give more rows, --test-fraction or --test-data")
    return task


def _check_labels(labels: list[str], source: str) -> None:
    if len(labels) < 2:
        raise InputError(
            f"data: {source} has one class only ({', '.join(map(repr, labels))}); classification needs at least two"
        )
    if len(labels) > MAX_LABELS:
        raise InputError(
            f"data: {source} has {len(labels)} different labels; more than {MAX_LABELS} look like free text: "
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
    return [replace(r, label=number[r.answer]) for r in rows]


def split(rows: list[Row], test_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, test): seeded; rows whose text is the same but for case and spaces stay together.

    Classification is stratified by label, and every label keeps a text to train on.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_key(row)].append(row)
    strata: dict[str, list[list[Row]]] = defaultdict(list)
    for group in groups.values():
        strata[group[0].answer if group[0].messages is None else ""].append(group)
    rng = random.Random(seed)
    train: list[Row] = []
    test: list[Row] = []
    for key in sorted(strata):
        stratum = strata[key]
        rng.shuffle(stratum)
        wanted = test_fraction * sum(map(len, stratum))
        taken = 0
        for i, group in enumerate(stratum, 1):
            if taken + len(group) / 2 <= wanted and i < len(stratum):
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


def _key(row: Row) -> str:
    """Rows with the same key have the same text, but for case and spaces."""
    return " ".join(_text_of(row).casefold().split())


def _sample(rows: list[Row], n: int, seed: int) -> list[Row]:
    """At most `n` rows, every label keeping its share."""
    if n >= len(rows):
        return rows
    rest, sampled = split(rows, n / len(rows), seed + 1)
    return (sampled + rest)[:n]  # the rest fills up where labels are too rare for a share of their own


def _no_column(source: str, wanted: str, columns: list[str]) -> str:
    """What exists, and what was probably meant."""
    hint = nearest(wanted, columns)
    near = f"; {hint}" if hint.startswith("did you mean") else ""
    return f"{source} has no column {wanted!r}{near}; its columns are: {', '.join(columns)}"


def pieces(template: str) -> tuple[list[tuple[str, str]], str]:
    """A template as its (text before, column) pairs and the text after the last column; doubled braces are plain ones.

    Raises `ValueError` for braces that do not match.
    """
    columns: list[tuple[str, str]] = []
    text = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            columns.append((text, name))
            text = ""
    return columns, text


def pick(columns: Iterable[str], names: Sequence[str], flag: str, wanted: str | None, source: str) -> str | None:
    """The wanted column, checked, or the first of the usual names that exists."""
    columns = list(columns)
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"{flag}: {_no_column(source, wanted, columns)}")
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
        self.messages_column = self.label_column = self.prompt_column = self.response_column = self.context_column = (
            None
        )
        wants_instructions = prompt is not None or response is not None
        wants_labels = text is not None or label is not None
        if wants_instructions and wants_labels:
            raise InputError(
                "give --text-column and --label-column, or --prompt-column and --response-column, not both kinds"
            )
        if not wants_instructions:
            self.label_column = pick(columns, LABEL_NAMES, "--label-column", label, source)
            self.text_column = pick(columns, TEXT_NAMES, "--text-column", text, source)
        if self.label_column and (self.text_column or template):
            self.kind = "classification"
            self.template = template or f"{{{self.text_column}}}\n{self.label_column.replace('_', ' ').capitalize()}:"
            self._check_template(columns, source)
            return
        if wants_labels:
            lacking = "--text-column" if self.label_column else "--label-column"
            raise InputError(f"data: name the {lacking} too; the columns of {source} are: {', '.join(columns)}")
        self.label_column, self.kind, self.template = None, "instructions", template or "{prompt}"
        if "{prompt}" not in self.template:
            raise InputError(
                f"--template {template!r} needs {{prompt}} in it: without labels, it is written around the prompt"
            )
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

        others = [c for c in columns if c not in (self.prompt_column, self.response_column)]
        self.context_column = pick(others, CONTEXT_NAMES, "", None, source)

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the name of their flag."""
        flags = ("text_column", "label_column", "prompt_column", "response_column")
        return {flag: column for flag in flags if (column := getattr(self, flag, None))}

    def _check_template(self, columns: list[str], source: str) -> None:
        try:
            self.head, self.tail = pieces(self.template)
        except ValueError as e:
            raise InputError(f"--template {self.template!r} is malformed: {e}; write columns as {{name}}") from None
        if not self.head:
            raise InputError(f"--template {self.template!r} names no column; write one as {{{columns[0]}}}")
        if unknown := [name for _, name in self.head if name not in columns]:
            raise InputError(f"--template: {_no_column(source, unknown[0], columns)}")
        if any(name == self.label_column for _, name in self.head):
            raise InputError(
                f"--template {self.template!r} gives the answer away: it holds the label {self.label_column!r}"
            )

    def rows(self, table: data.Rows) -> list[Row]:
        """All rows of a table, written out."""
        write = self._classified if self.label_column else self._chat if self.messages_column else self._instructed
        return [write(row, place) for row, place in zip(table.rows, table.places, strict=True)]

    def _value(self, row: dict[str, Any], column: str | None, place: str) -> str:
        if column not in row:
            raise InputError(f"data: {place}: there is no column {column!r}; there are: {', '.join(row)}")
        if not (value := _text(row[column])):
            raise InputError(f"data: {place}: the column {column!r} is empty")
        return value

    def _classified(self, row: dict[str, Any], place: str) -> Row:
        label = self._value(row, self.label_column, place)
        head = ""
        for before, column in self.head:  # further columns (a title, a second sentence) may be empty, the text may not
            needed = column == self.text_column or len(self.head) == 1 or column not in row
            head += before + (self._value(row, column, place) if needed else _text(row[column]))
        return Row(((head, False), (self.tail, False), (label, True)), label, place)

    def _instructed(self, row: dict[str, Any], place: str) -> Row:
        prompt = self._value(row, self.prompt_column, place)
        if context := _text(row.get(self.context_column or "")):
            prompt += "\n\n" + context
        prompt = self.template.replace("{prompt}", prompt)
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


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


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
