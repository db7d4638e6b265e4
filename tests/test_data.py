"""Reading rows: every format gives the same, and every broken file one line that says where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from featherweight import InputError, data

ROWS = [
    {"text": "a film, with a comma", "label": "fine"},
    {"text": 'she said "no"\nand left', "label": "bad"},
    {"text": "Žluťoučký 猫 — ½", "label": "fine"},
]


def complaint(path: Path) -> str:
    """The one line that reading this file is refused with."""
    with pytest.raises(InputError) as caught:
        data.read(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", data.FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    table = data.read(str(tiny.write(tmp_path / f"rows{suffix}", ROWS)))["train"]
    assert table.rows == ROWS
    assert table.columns == ["text", "label"]


def test_the_case_of_the_suffix_does_not_matter(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "rows.tsv", ROWS).rename(tmp_path / "rows.TSV")
    assert data.read(str(path))["train"].rows == ROWS


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path, suffix: str) -> None:
    path = tiny.write(tmp_path / f"rows{suffix}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert data.read(str(path))["train"].rows == ROWS


def test_windows_line_ends_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\r\nx,1\r\n\r\ny,2\r\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x", "label": "1"}\r\n\r\n{"text": "y", "label": "2"}\r\n')
    wanted = [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]
    for name, lines in (("a.csv", ["2", "4"]), ("a.jsonl", ["1", "3"])):
        table = data.read(str(tmp_path / name))["train"]
        assert table.rows == wanted
        assert [p.rsplit(":", 1)[1] for p in table.places] == lines


def test_a_row_is_placed_where_it_begins_even_when_it_runs_over_lines(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "rows.csv", ROWS)
    assert data.read(str(path))["train"].places == [f"{path}:2", f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.csv", "text,label\nx,1\ny,2,3\n", "a.csv:3: 3 fields where the header has 2 (text, label)"),
        ("a.csv", 'text,label\n"x\ny",1\nz\n', "a.csv:4: 1 fields where the header has 2"),
        ("a.tsv", "text\tlabel\nx 1\n", "a.tsv:2: 1 fields"),
        ("a.csv", 'text,label\nx,1\n"y,2\nz,3\n', "a.csv:3: broken line"),
        ("a.csv", 'text,label\n"x" y,1\n', "a.csv:2: broken line"),
        ("a.csv", "text,label,text\nx,1,y\n", "a.csv:1: a column name occurs twice: 'text'"),
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.jsonl", "\n\n", "a.jsonl has no rows"),
        ("a.json", "", "a.json has no rows"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n\n["x", "y"]\n', "a.jsonl:3: expected an object"),
        ("a.json", '[{"text": "x"},\n {"text" "y"}]', "a.json:2: not valid JSON"),
        ("a.json", '{"text": "x"}', "a.json:1: expected a list of objects"),
        ("a.json", '[{"text": "x"}, 5]', "a.json:1: expected an object such as"),
        ("a.json", '[{"text": "x"}\n {"text": "y"}]', "a.json:2: not valid JSON: a comma or the end of the list is missing"),
        ("a.json", '[{"text": "x"}]\n]', "a.json:2: not valid JSON: something follows the list"),
        ("a.json", '[\n' + "[" * 5000, "a.json:2: not valid JSON: it is nested too deeply"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 5000, "a.jsonl:2: not valid JSON: it is nested too deeply"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "a.jsonl:1: not valid JSON: it holds a number of thousands of digits"),
        ("a.jsonl", '{"text": "x", "text": "y"}', "a.jsonl:1: not valid JSON: the name 'text' occurs twice in an object"),
        ("a.csv", "text,label\nx\0y,1\n", "a.csv:2: a NUL character"),
        ("a.json", '[{"text": "x"},\n {"text": "\0"}]', "a.json:2: a NUL character"),
        ("a.csv", ",".join(map(str, range(20_000))), "a.csv:1: 20,000 columns"),
        ("a.jsonl", json.dumps(dict.fromkeys(map(str, range(20_000)))), "a.jsonl:1: 20,000 columns"),
        ("a.csv", "text,label\n" + "x" * 5_000_000, "a.csv:2: a line of more than 2,097,152 characters"),
        ("a.csv", 'text,label\nx,1\n"' + ("x" * 99 + "\n") * 25_000, "a.csv:3: a text of more than 2,097,152 characters: is a quote never"),
        ("a.parquet", "text,label", "a.parquet is not a readable parquet file"),
        ("a.txt", "hello", "a.txt is not one of the known formats: .csv, .tsv"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_by_file_and_line(tmp_path: Path, name: str, content: str, wanted: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert wanted in complaint(tmp_path / name)


def test_a_long_text_is_no_broken_line(tmp_path: Path) -> None:
    rows = [{"text": "a film " * 100_000, "label": "fine"}]
    for suffix in data.FORMATS:
        assert data.read(str(tiny.write(tmp_path / f"rows{suffix}", rows)))["train"].rows == rows


def test_a_list_of_objects_is_placed_by_line_however_it_is_laid_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n[ {"text": "x"},\n\n{"text":\n"y"} , {"text": "z"}\n]\n')
    assert data.read(str(path))["train"].places == [f"{path}:2", f"{path}:4", f"{path}:5"]
    rows = [{"text": f"{i} " + "x" * 60_000} for i in range(300)]  # more than is looked at at a time
    path.write_text(json.dumps(rows))
    assert data.read(str(path))["train"].rows == rows


def test_a_parquet_file_made_to_fill_memory_is_refused(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "bomb.parquet", [{"text": "x" * 2**20, "label": "bad"}] * 100)
    assert "unpacked it is 100 times its size" in complaint(path)


def test_a_pipe_and_a_name_that_cannot_be_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    assert "is no file but a device or a pipe" in complaint(tmp_path / "a.csv")
    assert "cannot be the name of a file" in complaint(tmp_path / ("x" * 5000 + ".csv"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_text_that_is_not_utf_8_is_refused_by_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latin{suffix}"
    lines = {".csv": b"text,label\nfine,1\ncaf\xe9,2\n", ".json": b'[{"text": "x"},\n\n{"text": "caf\xe9"}]'}
    path.write_bytes(lines.get(suffix, b'{"text": "x"}\n\n{"text": "caf\xe9"}\n'))
    assert f"{path}:3: not UTF-8" in complaint(path)


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "./none", "/none/none.txt", "~/none.xyz"])
def test_a_missing_file_is_said_to_be_missing(in_tmp: Path, name: str) -> None:
    with pytest.raises(InputError, match="there is no file"):
        data.read(name)


def test_a_name_that_is_neither_a_file_nor_a_hub_data_set_is_refused_in_one_line(in_tmp: Path) -> None:
    message = complaint(Path("nobody/nothing"))
    assert "'nobody/nothing' is neither a file here nor a hub data set" in message


def test_a_folder_of_files_keeps_its_own_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        tiny.write(tmp_path / "set" / f"{split}.jsonl", [{"text": split, "label": "x"}])
    splits = data.read(str(tmp_path / "set"))
    assert {name: table.rows[0]["text"] for name, table in splits.items()} == {"train": "train", "test": "test"}
    assert splits["test"].places == [f"{tmp_path / 'set'}[test]:1"]


def test_a_parquet_file_with_any_byte_damaged_is_read_or_refused(tmp_path: Path) -> None:
    """In a process of its own: where some descriptions of columns are asked for, Arrow ends the process instead of raising."""
    table = [{"text": f"film number {i}", "label": "good" if i % 2 else "bad"} for i in range(40)]
    tiny.write(tmp_path / "good.parquet", table)
    every_byte = (
        "import sys\n"
        "from pathlib import Path\n"
        "from featherweight.errors import InputError\n"
        "from featherweight.formats import read_parquet\n"
        "good, path = Path('good.parquet').read_bytes(), Path('bad.parquet')\n"
        "for at in range(len(good)):\n"
        "    for bit in (1, 4, 64):\n"
        "        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1:])\n"
        "        try: list(read_parquet(path))\n"
        "        except InputError: pass\n"
    )
    run = subprocess.run([sys.executable, "-c", every_byte], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-500:]
