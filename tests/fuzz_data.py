"""Data files: sound rows in every format, spoilt in one place that is known."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from fuzz_case import Case, mutated, write

TEXTS = (".csv", ".tsv", ".jsonl", ".json")
FORMATS = (*TEXTS, ".parquet")
Rows = list[dict[str, Any]]
Spoil = Callable[[random.Random, Rows, Path], tuple[bool | None, str]]
"""Writes a file and says whether it must be refused, and the place that must be named."""


def place(path: Path, row: int) -> str:
    """Where row `row` (from 0) of a file that `tiny.write` wrote is."""
    if path.suffix == ".parquet":
        return f"{path.name}:row {row + 1}"
    return f"{path.name}:{2 + 4 * row if path.suffix == '.json' else row + 1 + (path.suffix != '.jsonl')}"


def sound(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    """Nothing is wrong."""
    tiny.write(path, rows)
    if path.suffix != ".parquet" and rng.random() < 0.3:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return False, ""


def _value(column: str, *values: Any) -> Spoil:
    """One cell is one of these."""

    def spoil(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
        k = rng.randrange(len(rows))
        rows[k][column] = rng.choice(values)
        tiny.write(path, rows)
        return True, place(path, k)

    return spoil


def empty_text(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    return _value("text", "", "   ", "\u3000", *([None] if path.suffix != ".csv" else []))(rng, rows, path)


def empty_label(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    return _value("label", "", " ")(rng, rows, path)


def other_than_text(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path.with_suffix(rng.choice([".jsonl", ".json"]))
    values = ({"a": 1}, [1, 2], [], {}, [["x"]], float("nan"), {"role": "user"}, None)
    return _value(rng.choice(["text", "label"]), *values)(rng, rows, path)


def half_a_character(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path, k = path.with_suffix(rng.choice([".jsonl", ".json"])), rng.randrange(len(rows))
    rows[k][rng.choice(["text", "label"])] = rng.choice(["a \ud83d b", "\udcff", "x\u0000y"])
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".jsonl":
        write(path, "\n".join(lines))
        return True, f"{path.name}:{k + 1}"
    write(path, "[\n" + ",\n".join(lines) + "\n]")
    return True, f"{path.name}:{k + 2}"


def one_class(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    for row in rows:
        row["label"] = "fine"
    tiny.write(path, rows)
    return True, path.name


def too_many_labels(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    rows *= 6
    tiny.write(
        path,
        [{"text": f"{row['text']} {i}", "label": f"{i} {'x' * rng.choice([1, 300])}"} for i, row in enumerate(rows)],
    )
    return True, path.name


def one_column(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    kept = rng.choice(["text", "label", "other"])
    tiny.write(path, [{kept: row.get(kept, "x")} for row in rows])
    return True, path.name


def many_columns(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    more = {f"c{i}": "x" for i in range(rng.choice([500, 3000]))}
    named = rng.random() < 0.5
    tiny.write(path, [({**row} if named else {}) | more for row in rows])
    return not named, "" if named else path.name


def duplicate_ids(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    tiny.write(path, [{"id": rng.choice([1, "1", "a"]) if path.suffix != ".parquet" else 1} | row for row in rows])
    return False, ""


def over_long(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    rows[rng.randrange(len(rows))]["text"] = "a film " * rng.choice([1000, 30_000])
    tiny.write(path, rows)
    return False, ""


def empty(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    if path.suffix == ".parquet":
        tiny.write(path, rows)
        write(path, b"")
    else:
        blank = ["", "\n", "\r\n\r\n", "\ufeff"] + (["text\tlabel\n"] if path.suffix == ".tsv" else [])
        write(path, rng.choice([*blank, "text,label\n"] if path.suffix == ".csv" else blank))
    return True, path.name


def _bytes_in_line(rng: random.Random, rows: Rows, path: Path, bad: bytes) -> str:
    path = path if path.suffix in TEXTS else path.with_suffix(".csv")
    tiny.write(path, rows)
    k = rng.randrange(len(rows))
    rows[k]["text"] = "MARK" + str(rows[k]["text"])
    tiny.write(path, rows)
    content = path.read_bytes()
    write(path, content.replace(b"MARK", bad))
    return f"{path.name}:{content[: content.index(b'MARK')].count(10) + 1}"


def not_utf8(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    return True, _bytes_in_line(
        rng, rows, path, rng.choice([b"caf\xe9", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf8"])
    )


def nul(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    return True, _bytes_in_line(rng, rows, path, b"a\x00b")


def other_encoding(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path if path.suffix in TEXTS else path.with_suffix(".csv")
    tiny.write(path, rows)
    code = rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-16-be"])
    write(path, path.read_text().encode(code))
    return True, f"{path.name}:1"


def quotes(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path.with_suffix(rng.choice([".csv", ".tsv"]))
    return True, _bytes_in_line(rng, rows, path, rng.choice([b'"never closed ', b'"a" b ', b'"" ""c']))


def _lines(rng: random.Random, rows: Rows, path: Path) -> tuple[list[str], int]:
    """The lines of a file, and the number (from 0) of one to spoil."""
    lines = tiny.write(path, rows).read_text().splitlines()
    return lines, rng.randrange(path.suffix != ".jsonl", len(lines))


def ragged(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path.with_suffix(rng.choice([".csv", ".tsv"]))
    lines, k = _lines(rng, rows, path)
    mark = "\t" if path.suffix == ".tsv" else ","
    lines[k] = rng.choice([lines[k] + mark + "x", "alone", lines[k] + mark * 2000, lines[k] + mark])
    write(path, "\n".join(lines) + "\n")
    return True, f"{path.name}:{k + 1}"


def ragged_objects(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path, k = path.with_suffix(rng.choice([".jsonl", ".json"])), rng.randrange(len(rows))
    if rng.random() < 0.3:
        rows[k]["more"] = 1
        tiny.write(path, rows)
        return False, ""
    for other in rows:
        other["more"] = 1  # else the line of a later row would be another
    name = rng.choice(["text", "label"])
    rows[k]["txt"] = rows[k].pop(name)
    tiny.write(path, rows)
    return True, f"{path.name}:{2 + 5 * k if path.suffix == '.json' else k + 1}"


def broken_line(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path.with_suffix(".jsonl")
    lines, k = _lines(rng, rows, path)
    depth = rng.choice([500, 3000, 50_000])
    lines[k] = rng.choice([
        lines[k][:-1], lines[k][:7], lines[k] + ",", "[1, 2]", "null", "5", '"text"', "{'text': 'x'}", "{text: 1}", "[" * depth,
        '{"text": ' * depth, '{"text": ' + "9" * 5000 + ', "label": "bad"}', lines[k] + lines[k], "\\", "{}",
        '{"text": "a", "text": "b", "label": "bad"}', '{"text": "a\tb"}', '{"text": ' + "[" * depth + "]" * depth + "}",
    ])  # fmt: skip
    write(path, "\n".join(lines) + "\n")
    return True, f"{path.name}:{k + 1}"


def broken_list(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path.with_suffix(".json")
    good = [json.dumps(row) for row in rows]
    k = rng.randrange(1, len(rows))
    depth = rng.choice([500, 3000, 50_000])
    good[k] = rng.choice([
        good[k][:-1], "5", "null", '"x"', "[]", "[" * depth, '{"a":' * depth, "{'a': 1}", "", good[k] + " " + good[k], "9" * 5000,
        '{"text": "a", "label": "bad", "label": "fine"}',
    ])  # fmt: skip
    write(path, "[" + ",\n".join(good) + "]")
    return True, path.name


def no_list(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path.with_suffix(".json")
    text = tiny.write(path, rows).read_text()
    write(
        path,
        rng.choice(
            [text[:-1], text + "]", text + text, "{}", "5", "null", '{"data": ' + text + "}", "[", "[,]", text[1:]]
        ),
    )
    return True, path.name


def doubled_column(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    path = path.with_suffix(rng.choice([".csv", ".tsv"]))
    mark = "\t" if path.suffix == ".tsv" else ","
    head = rng.choice([["text", "label", "text"], ["text", "label", " label "], ["text", "label", "", ""]])
    write(path, mark.join(head) + "\n" + (mark.join("a" * len(head)) + "\n") * len(rows))
    return True, f"{path.name}:1"


def of_another_format(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    other = rng.choice([s for s in FORMATS if s != path.suffix])
    content = tiny.write(path.with_suffix(other), rows).read_bytes()
    path.with_suffix(other).unlink()
    write(path, content)
    return {(".csv", ".tsv"): None}.get((path.suffix, other), True), path.name


def no_file(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    how = rng.randrange(6)
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.symlink_to(path.name)
    elif how == 2:
        path.symlink_to("nowhere" + path.suffix)
    elif how == 3:
        os.mkfifo(path)
    elif how == 4:
        write(path.with_suffix(".xls"), "PK")
        path.symlink_to(path.with_suffix(".xls").name)
    return True, path.name


def parquet(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    """Columns of kinds that are no texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, n = path.with_suffix(".parquet"), len(rows)
    labels = pa.array([row["label"] for row in rows])
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    texts, must = rng.choice([
        (pa.array([b"\xff"] * n), True), (pa.array([["x"]] * n), True), (pa.array([{"a": 1}] * n), True), (pa.nulls(n), True),
        (pa.array([2**62] * n, pa.timestamp("us")), True), (pa.array([2**62] * n, pa.duration("us")), None),
        (pa.array([i + 0.5 for i in range(n)]), False), (pa.array(list(range(n))), False),
        (pa.array([row["text"] for row in rows]).dictionary_encode(), False), (pa.concat_arrays([bad] * n), True),
        (pa.array([float("nan")] * n), True),
    ])  # fmt: skip
    pq.write_table(pa.table({"text": texts, "label": labels}), path)
    return must, path.name


def bytes_flipped(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    tiny.write(path, rows)
    write(path, mutated(rng, path.read_bytes()))
    return None, path.name


def truncated(rng: random.Random, rows: Rows, path: Path) -> tuple[bool | None, str]:
    content = tiny.write(path, rows).read_bytes()
    write(path, content[: rng.randrange(len(content))])
    return True if path.suffix == ".parquet" else None, path.name


SPOILS: tuple[Spoil, ...] = (
    sound, empty_text, empty_label, other_than_text, half_a_character, one_class, too_many_labels, one_column, many_columns,
    duplicate_ids, over_long, empty, not_utf8, nul, other_encoding, quotes, ragged, ragged_objects, broken_line, broken_list, no_list,
    doubled_column, of_another_format, no_file, parquet, bytes_flipped, bytes_flipped, bytes_flipped, truncated, truncated,
)  # fmt: skip


def make(rng: random.Random, folder: Path, good: Any) -> Case:
    """A file to train on, to evaluate on, or to test on."""
    rows: Rows = [dict(row) for row in tiny.reviews(rng.randint(30, 45))]
    path = folder / "in" / f"rows{rng.choice(FORMATS)}"
    if rng.random() < 0.15:
        return _two_files(rng, rows, folder, path, good.model)
    spoil = rng.choice(SPOILS)
    must, where = spoil(rng, rows, path)
    [path] = [p for p in (folder / "in").iterdir() if p.stem == "rows" and p.suffix in FORMATS] or [path]
    return Case(spoil.__name__, [*_verb(rng, good.model), "--data", f"in/{path.name}"], must, where)


def _verb(rng: random.Random, model: Path) -> list[str]:
    """Mostly the verb that reaches the model soonest."""
    verb = rng.choice(["evaluate"] * 8 + ["train", "compare"])
    extra = ["--out", "out/run"] if verb != "evaluate" else ["--split", "all"]
    extra += ["--no-isolate"] if verb == "compare" else []
    return [verb, "--model", str(model), *extra]


def _two_files(rng: random.Random, rows: Rows, folder: Path, path: Path, model: Path) -> Case:
    """Sound rows to train on, and something about the rows to test on."""
    train = tiny.write(folder / "in" / "train.csv", tiny.reviews(30))
    how = rng.randrange(6)
    must, where, kind = True, path.name, "test rows"
    fresh: Rows = [{"text": f"new {row['text']}", "label": row["label"]} for row in rows]
    if how == 0:
        k = rng.randrange(len(fresh))
        fresh[k]["label"] = rng.choice(["splendid", "Bad", "x" * 5000])
        tiny.write(path, fresh)
        where, kind = place(path, k), "test label unseen"
    elif how == 1:
        tiny.write(path, [{"txt": row["text"], "label": row["label"]} for row in fresh])
        kind = "test rows without the column"
    elif how == 2:
        tiny.write(path, [*fresh, *tiny.reviews(10)])
        must, where, kind = False, "", "train and test overlap"
    elif how == 3:
        tiny.write(path, tiny.reviews(30))
        must, where, kind = True, "", "all training rows are tested on"
    else:
        spoil = rng.choice([empty_text, not_utf8, nul, empty, bytes_flipped])
        must, where = spoil(rng, fresh, path)
        [path] = [p for p in (folder / "in").iterdir() if p.stem == "rows"]
        kind = f"test rows, {spoil.__name__}"
    verb = rng.choice([["evaluate"], ["evaluate"], ["train", "--out", "out/run"]])
    return Case(
        kind,
        [*verb, "--model", str(model), "--data", f"in/{train.name}", "--test-data", f"in/{path.name}"],
        must,
        where,
    )
