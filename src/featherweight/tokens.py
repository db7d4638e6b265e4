"""From rows to token ids: which tokens are read, which are answered, and what is cut when a row is too long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import InputError
from .rows import Row
from .task import Task
from .templates import render

IGNORE = -100
"""The label of a token that is read but not learned."""


@dataclass(frozen=True)
class Example:
    """Token ids of one row. `prompt` is what the model reads before it answers.

    For a decoder `ids` is the whole row and `targets` has its length, `IGNORE` where nothing is learned;
    for an encoder–decoder `ids` is what the encoder reads and `targets` what the decoder writes;
    for a classifier with a head of its own `ids` is the text and `targets` the number of its label.
    """

    ids: list[int]
    targets: list[int]
    prompt: list[int]
    row: Row
    types: list[int] | None = None
    """Which text of a pair each token is of, for tokenizers that say so."""


@dataclass(frozen=True)
class Writer:
    """Writes rows as tokens for one model."""

    tokenizer: Any
    encoder_decoder: bool
    max_length: int
    classifies: bool = False
    """The model has a head for the labels: it reads the texts alone and no label is written."""
    label_room: int = 0
    """Tokens of the longest label: every text is cut as if it had that one, or its length would tell the answer."""

    @property
    def _specials(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        full = self.tokenizer("a").input_ids
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:start], full[start + len(bare) :]

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer: after a space, where it follows a prompt in the same row."""
        return self.plain(text if self.encoder_decoder else " " + text)

    def label_ids(self, labels: list[str]) -> list[list[int]]:
        """Token ids of every label. The end token is part of them only where one label begins another."""
        ids = [self.answer(label) for label in labels]
        ambiguous = any(a is not b and b[: len(a)] == a for a in ids for b in ids)
        if ambiguous:
            ids = [[*i, self.tokenizer.eos_token_id] for i in ids]
        if len({tuple(i) for i in ids}) < len(ids):
            raise InputError(f"two labels have the same tokens in this model: {', '.join(labels)}")
        return ids

    def chats(self, row: Row) -> bool:
        """Whether this row is written with the model's chat template."""
        return row.messages is not None and not self.encoder_decoder and bool(self.tokenizer.chat_template)

    def _spans(self, row: Row) -> list[tuple[list[int], bool]]:
        eos = [self.tokenizer.eos_token_id]
        if self.chats(row):
            assert row.messages is not None
            try:
                turns = _turns(self.tokenizer, row.messages)
            except InputError as e:
                raise InputError(f"data: {row.place}: {e}") from None
            return [(self.plain(text), trained) for text, trained in turns]
        read = [(self.plain(text), False) for text, trained in row.spans if not trained]
        return [*read, (self.answer(row.answer) + eos, True)]

    def example(self, row: Row) -> tuple[Example, bool]:
        """The row's tokens, and whether it had to be cut to `max_length`.

        A classified text loses its end, a conversation its beginning; template and answer survive.
        """
        if self.classifies:
            return self._texts(row)
        before, after = self._specials
        spans = self._spans(row)
        if self.chats(row):
            before, after = [], []
        elif not self.encoder_decoder:
            after = []
        length = len(before) + len(after) + sum(len(ids) for ids, _ in spans[:-1])
        if not self.encoder_decoder:  # else the answer is in a row of its own
            length += max(len(spans[-1][0]), self.label_room if row.label is not None else 0)
        excess = length - self.max_length
        if excess > 0:
            spans = self._cut(spans, excess, row)
        ids = [*before, *(i for span, _ in spans for i in span)]
        if self.encoder_decoder:
            source = [*before, *(i for span, trained in spans if not trained for i in span), *after]
            target = [i for span, trained in spans if trained for i in span]
            too_long = len(target) > self.max_length
            return Example(source, target[: self.max_length], source, row), excess > 0 or too_long
        targets = [IGNORE] * len(before) + [i if trained else IGNORE for span, trained in spans for i in span]
        last = len(ids) - len(spans[-1][0])
        return Example(ids, targets, ids[:last], row), excess > 0

    def _texts(self, row: Row) -> tuple[Example, bool]:
        """One text, or two as the tokenizer's pair, with its own special tokens; more are lines of one text."""
        texts = row.texts if len(row.texts) <= 2 else ("\n".join(row.texts),)
        full = self.tokenizer(*texts, verbose=False)
        cut = len(full.input_ids) > self.max_length
        if cut:
            full = self.tokenizer(*texts, truncation=True, max_length=self.max_length, verbose=False)
        types = full.get("token_type_ids") if len(texts) == 2 else None
        return Example(full.input_ids, [] if row.label is None else [row.label], full.input_ids, row, types), cut

    def prompt(self, row: Row) -> list[int]:
        """The tokens that the model reads before it answers this row."""
        return self.example(row)[0].prompt

    def _cut(self, spans: list[tuple[list[int], bool]], excess: int, row: Row) -> list[tuple[list[int], bool]]:
        if row.label is not None:
            text = spans[0][0]
            if excess >= len(text):
                raise InputError(
                    f"data: {row.place}: template and label alone need more than max_length={self.max_length} tokens; raise --max-length"
                )
            return [(text[: len(text) - excess], False), *spans[1:]]
        *read, (answer, _) = spans
        drop = min(excess, sum(len(ids) for ids, _ in read) - 1)  # one token at least is read
        answer = answer[: len(answer) - (excess - drop)]  # a response longer than the context loses its end
        if not answer:
            raise InputError(
                f"data: {row.place}: nothing of the response fits into max_length={self.max_length} tokens"
            )
        kept = []
        for ids, trained in read:
            kept.append((ids[drop:], trained))
            drop = max(0, drop - len(ids))
        return [*kept, (answer, True)]

    def examples(self, rows: list[Row]) -> tuple[list[Example], int]:
        """All rows' tokens, and how many were cut."""
        written = [self.example(row) for row in rows]
        return [e for e, _ in written], sum(cut for _, cut in written)


def _turns(tokenizer: Any, messages: tuple[dict[str, str], ...]) -> list[tuple[str, bool]]:
    """A conversation as (text, trained) spans: every assistant turn is trained, with its end-of-turn mark.

    An assistant that speaks first answers nobody, so that is not trained.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    texts = render(tokenizer, messages, [ask for i in answers for ask in ((i, True), (i + 1, False))])
    spans: list[tuple[str, bool]] = []
    written = before = ""
    for before, after in zip(texts[::2], (text.rstrip("\n") for text in texts[1::2]), strict=True):
        if not before.startswith(written) or not after.startswith(before):
            # A template that rewrites earlier turns (it may drop their thinking): train on the last answer only.
            spans, written = [], ""
            continue
        spans += [(before[len(written) :], False), (after[len(before) :], True)]
        written = after
    if not spans:
        spans = [(before, False), (messages[-1]["content"] + tokenizer.eos_token, True)]
    return spans


def writer_for(base: Any, max_length: int | None, labels: Sequence[str] = (), methods: Iterable[Any] = ()) -> Writer:
    """The writer of a loaded base. Rows never exceed its context, whatever the methods put in front of them."""
    if base.classifies and list(labels) != base.labels:
        raise InputError(
            f"{base.name} was loaded for the labels {', '.join(base.labels)}, and this task has {', '.join(labels) or 'none'}: "
            f"load it with labels=task.labels"
        )
    context = base.context - max((getattr(m, "num_virtual_tokens", 0) for m in methods), default=0)
    writer = Writer(base.tokenizer, base.encoder_decoder, min(max_length or context, context), base.classifies)
    return replace(writer, label_room=max((len(writer.answer(label)) + 1 for label in labels), default=0))


__all__ = ["IGNORE", "Example", "Task", "Writer", "writer_for"]
