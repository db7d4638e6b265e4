"""A task: what the model reads, what it should answer, and which rows it is tested on.

Two kinds. Classification has a text and a label: the row is written with a template and every label's tokens are
scored, so the answer is always one of the labels. Instructions have a prompt and a response, or chat messages that
are written with the model's own chat template. How one row is read and written is in `rows`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import data
from .errors import InputError, listed, shown
from .rows import Reader, Row

MAX_LABELS = 50


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
    validation: list[Row] = field(default_factory=list)
    """Rows that are neither trained on nor tested on: they say which step was best."""

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

    def in_order(self, labels: Sequence[str]) -> Task:
        """The same task with its labels in this order: that of a head's rows."""
        known = list(labels)
        train, test, validation = (_labelled(rows, known) for rows in (self.train, self.test, self.validation))
        return replace(self, labels=known, train=train, test=test, validation=validation)

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
    validation_rows: int = 0,
) -> Task:
    """Read a data set and split it, seeded, stratified by label, equal texts always on one side.

    Where test rows are given, training rows with the same text are left out (`Task.leaked` counts them).
    `validation_rows` are set apart from the training rows.
    `test_only` puts every row into the test side (for evaluating on a file); `labels` fixes the label set then.
    """
    splits = data.read(source)
    main = splits.get("train") or next(iter(splits.values()))
    reader = Reader(main, text_column, label_column, prompt_column, response_column, template, labels)
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
    train, validation = set_apart(train, validation_rows, seed)
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
        _labelled(validation, known),
    )
    if not task.test:
        raise InputError(f"data: {source} leaves no rows to test on; give more rows, --test-fraction or --test-data")
    if not test_only and not task.train and leaked:
        raise InputError(
            f"data: every row of {source} has the text of a test row, so none is left to train on; give other test rows"
        )
    if not test_only and not task.train:
        raise InputError(f"data: {source} leaves no rows to train on; give more rows, --test-fraction or --test-data")
    return task


def _check_labels(labels: list[str], source: str) -> None:
    if len(labels) < 2:
        raise InputError(
            f"data: {source} has one class only ({shown(labels[0]) if labels else 'none'}); classification needs at least two"
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
                f"data: {row.place}: the label {shown(row.answer)} is not among those of the training rows: {listed(labels)}"
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


def text_of(row: Row) -> str:
    """The text of a row, without template and answer."""
    return (
        "\n".join(m["content"] for m in row.messages if m["role"] != "assistant") if row.messages else row.spans[0][0]
    )


def _key(row: Row) -> str:
    """Rows with the same key have the same text, but for case and spaces."""
    return " ".join(text_of(row).casefold().split())


def set_apart(train: list[Row], n: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows left to train on, validation rows): about `n`, every label keeping its share."""
    if not n:
        return train, []
    if n >= len(train):
        raise InputError(f"--validation-rows {n} leaves none of the {len(train)} training rows; ask for fewer")
    train, validation = split(train, n / len(train), seed + 2)
    if not validation:
        raise InputError(f"--validation-rows {n} is too few for these labels; ask for more")
    return train, validation


def _sample(rows: list[Row], n: int, seed: int) -> list[Row]:
    """At most `n` rows, every label keeping its share."""
    if n >= len(rows):
        return rows
    rest, sampled = split(rows, n / len(rows), seed + 1)
    return (sampled + rest)[:n]  # the rest fills up where labels are too rare for a share of their own
