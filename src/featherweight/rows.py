"""One row of a table as a task's row: which columns are read, and how the template writes them.

A row is a list of spans, `(text, trained)`: the loss is taken on the trained ones only. A row with a label also keeps
the bare texts, for models that have a head for the classes and need no words around them.
"""

from __future__ import annotations

import datetime
import numbers
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import data
from .errors import InputError, listed, nearest, shown

TEXT_NAMES = ("text", "sentence", "review", "content", "snippet", "tweet", "title", "question", "input")
LABEL_NAMES = ("label", "labels", "sentiment", "class", "category", "target", "intent", "emotion", "topic")
PROMPT_NAMES = ("prompt", "instruction", "question", "input", "query")
RESPONSE_NAMES = ("response", "completion", "output", "answer", "target")
CONTEXT_NAMES = ("input", "context")  # what an instruction is about (Alpaca's input, a question's context)
MESSAGES_NAMES = ("messages", "conversations", "conversation", "chat")


@dataclass(frozen=True)
class Row:
    """One example. `spans` are (text, trained); `answer` is what a perfect model writes."""

    spans: tuple[tuple[str, bool], ...]
    answer: str
    place: str
    label: int | None = None
    messages: tuple[dict[str, str], ...] | None = None
    texts: tuple[str, ...] = ()
    """The bare texts of the template's columns: what a classifier with a head of its own reads."""


def _no_column(source: str, wanted: str, columns: list[str]) -> str:
    """What exists, and what was probably meant."""
    hint = nearest(wanted, columns)
    near = f"; {hint}" if hint.startswith("did you mean") else ""
    return f"{source} has no column {shown(wanted)}{near}; its columns are: {listed(columns)}"


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


class Reader:
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
            raise InputError(f"data: name the {lacking} too; the columns of {source} are: {listed(columns)}")
        self.label_column, self.kind, self.template = None, "instructions", template or "{prompt}"
        if "{prompt}" not in self.template:
            raise InputError(
                f"--template {shown(template)} needs {{prompt}} in it: without labels, it is written around the prompt"
            )
        if not wants_instructions and (found := pick(columns, MESSAGES_NAMES, "", None, source)):
            self.messages_column = found
            return
        self.prompt_column = pick(columns, PROMPT_NAMES, "--prompt-column", prompt, source)
        self.response_column = pick(columns, RESPONSE_NAMES, "--response-column", response, source)
        if not (self.prompt_column and self.response_column):
            raise InputError(
                f"data: {source} has the columns {listed(columns)}; name a text and a label with --text-column and "
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
            head, _ = pieces(self.template)
        except ValueError as e:
            raise InputError(
                f"--template {shown(self.template)} is malformed: {e}; write columns as {{name}}"
            ) from None
        if not head:
            raise InputError(f"--template {shown(self.template)} names no column; write one as {{{columns[0][:60]}}}")
        if unknown := [name for _, name in head if name not in columns]:
            raise InputError(f"--template: {_no_column(source, unknown[0], columns)}")
        if any(name == self.label_column for _, name in head):
            raise InputError(
                f"--template {shown(self.template)} gives the answer away: it holds the label {self.label_column!r}"
            )

    def rows(self, table: data.Rows) -> list[Row]:
        """All rows of a table, written out."""
        write = self._classified if self.label_column else self._chat if self.messages_column else self._instructed
        return [write(row, place) for row, place in zip(table.rows, table.places, strict=True)]

    def _classified(self, row: dict[str, Any], place: str) -> Row:
        label = _value(row, self.label_column, place)
        asked = unlabelled(self.template, row, place, self.text_column)
        return replace(asked, spans=(*asked.spans[:-1], (label, True)), answer=label, label=None)

    def _instructed(self, row: dict[str, Any], place: str) -> Row:
        prompt = _value(row, self.prompt_column, place)
        if context := _text(row.get(self.context_column or ""), self.context_column, place):
            prompt += "\n\n" + context
        prompt = self.template.replace("{prompt}", prompt)
        response = _value(row, self.response_column, place)
        chat = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        return Row(((prompt, False), (response, True)), response, place, messages=chat)

    def _chat(self, row: dict[str, Any], place: str) -> Row:
        found = row.get(self.messages_column or "")
        if not isinstance(found, list) or not found:
            raise InputError(f"data: {place}: {shown(self.messages_column)} must be a list of messages")
        messages = tuple(_message(m, place) for m in found)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise InputError(f"data: {place}: the last message must be the assistant's, after another's")
        prompt = "\n".join(m["content"] for m in messages[:-1])
        return Row(
            ((prompt, False), (messages[-1]["content"], True)), messages[-1]["content"], place, messages=messages
        )


def unlabelled(template: str, row: Mapping[str, Any], place: str, needed: str | None = None) -> Row:
    """A row that has no label yet, as a classifier reads it.

    Further columns (a title, a second sentence) may be empty; the text, which is `needed`, may not.
    """
    columns, tail = pieces(template)
    head, texts = "", list[str]()
    for before, column in columns:
        must = column == needed or len(columns) == 1 or column not in row
        texts.append(_value(row, column, place) if must else _text(row[column], column, place))
        head += before + texts[-1]
    return Row(((head, False), (tail, False), ("", True)), "", place, label=0, texts=tuple(texts))


def _value(row: Mapping[str, Any], column: str | None, place: str) -> str:
    if column is None or column not in row:
        raise InputError(f"data: {place}: there is no column {shown(column)}; there are: {listed(row)}")
    if not (value := _text(row[column], column, place)):
        raise InputError(f"data: {place}: the column {shown(column)} is empty")
    return value


def _text(value: Any, column: str | None, place: str) -> str:
    """A cell as a text; empty for what is missing: None, or NaN, as pandas writes it."""
    if value is None or value != value:
        return ""
    if not isinstance(value, (str, numbers.Number, datetime.date, datetime.time, datetime.timedelta)):
        raise InputError(f"data: {place}: the column {shown(column)} holds a {type(value).__name__}, not a text")
    return _sound(str(value).strip(), column, place)


def _sound(text: str, column: str | None, place: str) -> str:
    """This text, which no tokenizer can stumble over."""
    if "\0" in text:
        raise InputError(f"data: {place}: the column {shown(column)} holds a NUL character; take it out")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"data: {place}: the column {shown(column)} holds half a character (a lone surrogate); write it anew as UTF-8"
            ) from None
    return text


def _message(message: Any, place: str) -> dict[str, str]:
    """`{"role", "content"}`, or ShareGPT's `{"from", "value"}`."""
    if isinstance(message, dict):
        by = message.get("from")
        role = message.get("role") or {"human": "user", "gpt": "assistant"}.get(str(by), by)
        content = message.get("content", message.get("value"))
        if role in ("system", "user", "assistant") and isinstance(content, str):
            return {"role": role, "content": _sound(content, "content", place)}
    raise InputError(f"data: {place}: a message needs a role (system, user or assistant) and a content text")
