"""Bad input by size: a gigabyte in a line, a million columns, headers that claim everything. Few, and each by its name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import fuzz_adapters
import tiny
from fuzz_adapters import CONFIG, OURS, WEIGHTS, Good
from fuzz_case import Case, write

GIGABYTE, DEEP = 2**30, 100_000
Monster = Callable[[Path, Good], Case]


def _long(path: Path, before: bytes, fill: bytes, after: bytes = b"") -> Path:
    """A gigabyte of one thing between two others."""
    block = fill * (2**20 // len(fill))
    with path.open("wb") as f:
        f.write(before)
        for _ in range(GIGABYTE // len(block)):
            f.write(block)
        f.write(after)
    return path


def _data(kind: str, place: str, path: Path, good: Good) -> Case:
    return Case(kind, ["evaluate", "--model", str(good.model), "--data", f"in/{path.name}"], place=place)


def a_line_of_a_gigabyte(folder: Path, good: Good) -> Case:
    path = _long(folder / "in/rows.csv", b"text,label\na film,bad\n", b"x", b",bad\n")
    return _data("a line of a gigabyte", "rows.csv:3", path, good)


def a_quote_that_is_never_closed(folder: Path, good: Good) -> Case:
    path = _long(folder / "in/rows.csv", b'text,label\na film,bad\n"', b"a film\n")
    return _data("a quote never closed before a gigabyte", "rows.csv:3", path, good)


def a_sparse_gigabyte_of_nul(folder: Path, good: Good) -> Case:
    path = write(folder / "in/rows.jsonl", '{"text": "a film", "label": "bad"}\n')
    with path.open("r+b") as f:
        f.truncate(GIGABYTE)
    return _data("a sparse gigabyte of NUL", "rows.jsonl:2", path, good)


def an_object_of_a_gigabyte(folder: Path, good: Good) -> Case:
    path = _long(
        folder / "in/rows.jsonl", b'{"text": "a film", "label": "bad"}\n{"text": "', b"x", b'", "label": "bad"}\n'
    )
    return _data("an object of a gigabyte", "rows.jsonl:2", path, good)


def a_list_with_an_object_of_a_gigabyte(folder: Path, good: Good) -> Case:
    path = _long(
        folder / "in/rows.json", b'[{"text": "a film", "label": "bad"},\n{"text": "', b"x", b'", "label": "bad"}]\n'
    )
    return _data("a list with an object of a gigabyte", "rows.json:2", path, good)


def lists_as_dense_as_can_be(folder: Path, good: Good) -> Case:
    path = _long(folder / "in/rows.json", b"[\n[", b"[],", b"[]]]\n")
    return _data("a gigabyte of empty lists", "rows.json:2", path, good)


def a_million_columns(folder: Path, good: Good) -> Case:
    names = ",".join(f"c{i}" for i in range(1_000_000))
    return _data("a million columns", "rows.csv:1", write(folder / "in/rows.csv", f"{names}\n{names}\n"), good)


def four_million_columns_without_a_name(folder: Path, good: Good) -> Case:
    path = write(folder / "in/rows.csv", "," * 4_000_000 + "\n")
    return _data("four million columns without a name", "rows.csv:1", path, good)


def a_million_keys(folder: Path, good: Good) -> Case:
    row = json.dumps({str(i): 0 for i in range(300_000)})
    return _data("a row of 300,000 keys", "rows.jsonl:1", write(folder / "in/rows.jsonl", row + "\n"), good)


def rows_nested_a_hundred_thousand_deep(folder: Path, good: Good) -> Case:
    path = write(
        folder / "in/rows.jsonl", '{"text": "a film", "label": "bad"}\n{"text": ' + "[" * DEEP + "]" * DEEP + "}\n"
    )
    return _data("rows nested 100,000 deep", "rows.jsonl:2", path, good)


def a_list_nested_a_hundred_thousand_deep(folder: Path, good: Good) -> Case:
    return _data(
        "a list nested 100,000 deep", "rows.json:1", write(folder / "in/rows.json", "[" * DEEP + "]" * DEEP), good
    )


def _parquet(folder: Path, rows: int, text: str, times: int, **options: object) -> Path:
    """A small parquet file of `times` × `rows` copies of a text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "in/rows.parquet"
    table = pa.table({"text": pa.array([text] * rows), "label": pa.array(["bad"] * rows)})
    with pq.ParquetWriter(path, table.schema, **options) as out:
        for _ in range(times):
            out.write_table(table)
    return path


def parquet_pages_that_unpack_to_gigabytes(folder: Path, good: Good) -> Case:
    path = _parquet(
        folder,
        256,
        "x" * 2**20,
        1,
        compression="zstd",
        use_dictionary=False,
        data_page_size=2**30,
        write_batch_size=256,
    )
    return _data("parquet pages that unpack to gigabytes", "rows.parquet", path, good)


def parquet_that_says_one_long_text_a_million_times(folder: Path, good: Good) -> Case:
    path = _parquet(folder, 1000, "x" * 2**18, 8, compression="zstd", use_dictionary=True)
    return _data("parquet with one long text, over and over", "rows.parquet", path, good)


def parquet_of_a_hundred_million_rows(folder: Path, good: Good) -> Case:
    path = _parquet(folder, 1_000_000, "x", 100, compression="zstd", use_dictionary=True)
    return _data("parquet of a hundred million rows", "rows.parquet", path, good)


def _recipe(kind: str, text: str, folder: Path, good: Good) -> Case:
    tiny.write(folder / "in/rows.csv", tiny.reviews())
    write(folder / "in/recipe.toml", text)
    args = [
        "train",
        "--recipe",
        "in/recipe.toml",
        "--model",
        str(good.model),
        "--data",
        "in/rows.csv",
        "--out",
        "out/run",
    ]
    return Case(kind, args, place="recipe.toml")


def a_recipe_nested_a_hundred_thousand_deep(folder: Path, good: Good) -> Case:
    return _recipe("a recipe nested 100,000 deep", "x = " + "[" * DEEP + "]" * DEEP, folder, good)


def a_recipe_with_a_key_of_a_hundred_thousand_parts(folder: Path, good: Good) -> Case:
    return _recipe("a recipe's key of 100,000 parts", ".".join("a" * DEEP) + " = 1", folder, good)


def a_recipe_of_a_gigabyte(folder: Path, good: Good) -> Case:
    case = _recipe("a recipe of a gigabyte", "", folder, good)
    _long(folder / "in/recipe.toml", b"# ", b"x", b"\n")
    return case


def _adapter(kind: str, file: str, folder: Path, good: Good) -> tuple[Path, Case]:
    import shutil

    adapter = Path(shutil.copytree(good.adapters["lora"], folder / "in/adapter"))
    (adapter / OURS).unlink()
    return adapter, Case(
        kind, ["generate", "--prompt", "x", "--adapter", "in/adapter", "--model", str(good.model)], place=file
    )


def a_header_that_claims_everything(folder: Path, good: Good) -> Case:
    adapter, case = _adapter("a header that claims 2^62 bytes", WEIGHTS, folder, good)
    write(adapter / WEIGHTS, struct.pack("<Q", 2**62) + (adapter / WEIGHTS).read_bytes()[8:])
    return case


def a_header_of_ninety_megabytes(folder: Path, good: Good) -> Case:
    adapter, case = _adapter("a header of 95 MB", WEIGHTS, folder, good)
    entries = (f'"t{i:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_600_000))
    head = ("{" + ",".join(entries) + "}").encode()
    assert 90_000_000 < len(head) < 100_000_000  # which the format itself allows
    write(adapter / WEIGHTS, struct.pack("<Q", len(head)) + head)
    return case


def a_header_nested_a_hundred_thousand_deep(folder: Path, good: Good) -> Case:
    adapter, case = _adapter("a header nested 100,000 deep", WEIGHTS, folder, good)
    head = b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"
    write(adapter / WEIGHTS, struct.pack("<Q", len(head)) + head)
    return case


def a_setting_nested_a_hundred_thousand_deep(folder: Path, good: Good) -> Case:
    adapter, case = _adapter("an adapter's setting nested 100,000 deep", CONFIG, folder, good)
    write(adapter / CONFIG, '{"r": ' + "[" * DEEP + "]" * DEEP + "}")
    return case


def settings_of_a_gigabyte(folder: Path, good: Good) -> Case:
    adapter, case = _adapter("an adapter's settings of a gigabyte", CONFIG, folder, good)
    _long(adapter / CONFIG, b'{"peft_type": "LORA", "x": [', b"[],", b"[]]}")
    return case


def weights_of_a_gigabyte_for_another_base(folder: Path, good: Good) -> Case:
    """Sparse: nothing but zeros, which is what such a file may well hold."""
    adapter, case = _adapter("weights of a gigabyte", WEIGHTS, folder, good)
    head = json.dumps({"x": {"dtype": "F32", "shape": [GIGABYTE // 4], "data_offsets": [0, GIGABYTE]}}).encode()
    with write(adapter / WEIGHTS, struct.pack("<Q", len(head)) + head).open("r+b") as f:
        f.truncate(8 + len(head) + GIGABYTE)
    return case


def a_rank_of_a_billion(folder: Path, good: Good) -> Case:
    adapter, case = _adapter("a rank of a billion", CONFIG, folder, good)
    fuzz_adapters.edit(adapter, CONFIG, r=1_000_000_000)
    return case


def a_rank_of_a_million(folder: Path, good: Good) -> Case:
    """Within what a setting may be, and far from what the file holds."""
    adapter, case = _adapter("a rank of a million", WEIGHTS, folder, good)
    fuzz_adapters.edit(adapter, CONFIG, r=1_000_000)
    return case


MONSTERS: tuple[Monster, ...] = (
    a_line_of_a_gigabyte, a_quote_that_is_never_closed, a_sparse_gigabyte_of_nul, an_object_of_a_gigabyte,
    a_list_with_an_object_of_a_gigabyte, lists_as_dense_as_can_be, a_million_columns, four_million_columns_without_a_name, a_million_keys,
    rows_nested_a_hundred_thousand_deep, a_list_nested_a_hundred_thousand_deep, parquet_pages_that_unpack_to_gigabytes,
    parquet_that_says_one_long_text_a_million_times, parquet_of_a_hundred_million_rows, a_recipe_nested_a_hundred_thousand_deep,
    a_recipe_with_a_key_of_a_hundred_thousand_parts, a_recipe_of_a_gigabyte, a_header_that_claims_everything, a_header_of_ninety_megabytes,
    a_header_nested_a_hundred_thousand_deep, a_setting_nested_a_hundred_thousand_deep, settings_of_a_gigabyte,
    weights_of_a_gigabyte_for_another_base, a_rank_of_a_billion, a_rank_of_a_million,
)  # fmt: skip
