"""Rows that nobody has labelled get their labels: the ones that `evaluate` would compare, in the file's order."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
import tiny
from command import Cli, complaint
from featherweight import InputError, predicting
from featherweight.adapter_files import read_about

LABELS = ["bad", "fine", "very bad"]


@pytest.fixture(scope="module", params=["llama", "t5", "bert"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter that has learned a little, for a decoder, an encoder–decoder and an encoder."""
    model = request.getfixturevalue(request.param)
    reviews = tiny.write(tmp_path_factory.mktemp("data") / "reviews.csv", tiny.reviews())
    task = fw.load_task(str(reviews), test_fraction=0.3)
    base = fw.load_base(str(model), task.labels if request.param == "bert" else None, dtype="float32", device="cpu")
    fw.train(base, task, fw.LoRA(r=4), steps=4, lr=3e-2)
    folder = tmp_path_factory.mktemp("adapters") / request.param
    fw.save(base.model, str(folder), base=str(model))
    return model, folder


def opened(trained: tuple[Path, Path]) -> fw.Base:
    return fw.load_adapted(trained[1], dtype="float32", device="cpu")  # an encoder's labels are in the folder


def test_the_labels_are_those_that_evaluating_compares(trained: tuple[Path, Path], reviews: Path) -> None:
    base = opened(trained)
    task = fw.load_task(str(reviews), test_only=True, labels=LABELS)
    texts = [row.texts[0] for row in task.test]
    found = fw.predict(base, texts)
    assert [p.label for p in found] == fw.evaluate(base, task).predictions
    assert all(sum(p.probabilities.values()) == pytest.approx(1, abs=1e-5) for p in found)
    assert all(p.probability == max(p.probabilities.values()) for p in found)
    assert len({p.probability for p in found}) > 1
    one_by_one = [fw.predict(base, [text])[0].probabilities for text in texts]
    assert one_by_one == [pytest.approx(p.probabilities, abs=1e-4) for p in found]


def test_a_file_gets_two_columns_more_and_keeps_its_own(
    fw_cli: Cli, in_tmp: Path, trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "BLOCK", 4)  # several blocks
    rows = [
        (str(i), f'the {word} of a film, "good" or bad\nand so on')
        for i, word in enumerate(("plot", "cast", "end", "music", "year"))
    ]
    with Path("new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *rows])
    for ending in ("csv", "tsv", "jsonl"):
        result = fw_cli("predict", "--adapter", trained[1], "--data", "new.csv", "--out", f"labelled.{ending}")
        assert result.code == 0
        assert f"labelled 5 of 5 rows; they are in labelled.{ending}" in result.err
    with Path("labelled.csv").open(newline="") as file:
        got = list(csv.DictReader(file))
    assert [(row["id"], row["text"]) for row in got] == rows
    assert [row["prediction"] for row in got] == [
        p.label for p in fw.predict(opened(trained), [text for _, text in rows])
    ]
    assert all(0 < float(row["probability"]) <= 1 for row in got)
    with Path("labelled.tsv").open(newline="") as file:
        assert list(csv.DictReader(file, delimiter="\t")) == got
    lines = [json.loads(line) for line in Path("labelled.jsonl").read_text().splitlines()]
    assert [{**line, "probability": f"{line['probability']:.4f}"} for line in lines] == got


def test_texts_on_standard_input_get_a_line_each(fw_cli: Cli, trained: tuple[Path, Path]) -> None:
    result = fw_cli("predict", "--adapter", trained[1], stdin="a fine film\n\na bad plot\n")
    given = [line.split("\t") for line in result.out.splitlines()]
    assert [label for label, _ in given] == [
        p.label for p in fw.predict(opened(trained), ["a fine film", "a bad plot"])
    ]
    assert all(0 < float(p) <= 1 for _, p in given)


def test_a_row_without_a_text_gets_no_label_and_holds_up_no_other(fw_cli: Cli, adapter: Path) -> None:
    result = fw_cli("predict", "--adapter", adapter, "--data", "empty.csv", "--out", "labelled.csv")
    assert result.code == 0
    assert "rows without a text, which get no label: 1; the first is empty.csv:3" in result.err
    full, empty = Path("labelled.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert full.startswith("a fine film,3,")
    assert empty == ",0,,"


def test_an_adapter_that_was_attached_before_it_is_trained_knows_its_labels_too(llama: Path, reviews: Path) -> None:
    base = fw.load_base(str(llama), dtype="float32", device="cpu")
    fw.attach(base.model, fw.LoRA(r=2))
    fw.train(base, fw.load_task(str(reviews), test_fraction=0.3), steps=1)
    assert fw.predict(base, ["a fine film"])[0].label in LABELS
    fw.save(base.model, "mine")
    assert read_about("mine")["labels"] == LABELS


@pytest.fixture
def adapter(llama: Path, reviews: Path, in_tmp: Path) -> Path:
    base = fw.load_base(str(llama), dtype="float32", device="cpu")
    fw.train(base, fw.load_task(str(reviews), test_fraction=0.3), fw.IA3(), steps=1)
    fw.save(base.model, "adapter", base=str(llama))
    Path("new.csv").write_text("text,length\na fine film,3\n", encoding="utf-8")
    Path("other.csv").write_text("letter\na fine film\n", encoding="utf-8")
    Path("empty.csv").write_text("text,length\na fine film,3\n,0\n", encoding="utf-8")
    Path("blank.csv").write_text("text,length\n,0\n  ,2\n", encoding="utf-8")
    Path("done.csv").write_text("text,prediction\na fine film,bad\n", encoding="utf-8")
    return Path("adapter")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--data", "none.csv"], "there is no file none.csv"),
        (["--data", "other.csv"], "other.csv has no column 'text', which the adapter reads; its columns are: letter; name the one"),
        (["--data", "new.csv", "--text-column", "txt"], "new.csv has no column 'txt'"),
        (["--data", "blank.csv"], "blank.csv has no text in any row, so there is nothing to label"),
        (["--data", "new.csv", "--out", "x.xlsx"], "labelled rows are written as .csv, .tsv, .jsonl"),
        (["--data", "new.csv", "--out", "./new.csv"], "is the file of --data, which would be lost"),
        (["--data", "done.csv", "--out", "x.csv"], "done.csv has a column 'prediction' already"),
        (["--data", "new.csv", "--out", "none/x.csv"], "cannot write none/x.csv"),
    ],
)  # fmt: skip
def test_what_cannot_be_labelled_is_refused_before_the_model_loads(
    fw_cli: Cli, adapter: Path, args: list[str], wanted: str
) -> None:
    assert wanted in complaint(fw_cli("predict", "--adapter", adapter, *args))
    assert Path("new.csv").read_text(encoding="utf-8") == "text,length\na fine film,3\n"


@pytest.mark.usefixtures("no_model", "adapter")
def test_an_adapter_is_needed_and_something_to_label(fw_cli: Cli) -> None:
    assert "give --adapter" in complaint(fw_cli("predict", "--data", "new.csv"))
    assert "standard input is empty" in complaint(fw_cli("predict", "--adapter", "adapter", stdin="\n\n"))


def test_an_adapter_that_writes_text_is_sent_to_generate(fw_cli: Cli, llama: Path, in_tmp: Path) -> None:
    Path("chats.jsonl").write_text(
        "".join(json.dumps({"prompt": f"what is {i}", "response": "a film"}) + "\n" for i in range(6)), encoding="utf-8"
    )
    base = fw.load_base(str(llama), dtype="float32", device="cpu")
    fw.train(base, fw.load_task("chats.jsonl", test_fraction=0.3), fw.LoRA(r=2), steps=1)
    with pytest.raises(InputError, match="was not trained to tell labels apart, so it has none to give; use generate"):
        fw.predict(base, ["what"])
    fw.save(base.model, "writes", base=str(llama))
    assert "use featherweight generate" in complaint(fw_cli("predict", "--adapter", "writes", "--data", "chats.jsonl"))


def test_several_columns_are_read_by_their_names(fw_cli: Cli, llama: Path, in_tmp: Path) -> None:
    table = "title,text,label\n" + "".join(f"film {i},a {w} plot,{w}\n" for i in range(6) for w in ("bad", "fine"))
    Path("films.csv").write_text(table, encoding="utf-8")
    result = fw_cli(
        "train", "--model", llama, "--data", "films.csv", "--template", "{title}\\n{text}\\nLabel:", "--steps", 1, "--out", "two",
        "--dtype", "float32",
    )  # fmt: skip
    assert result.code == 0, result
    assert [name for name in ("title", "text") if f"{{{name}}}" in read_about("two")["template"]] == ["title", "text"]
    base = fw.load_base(str(llama), dtype="float32", device="cpu")
    fw.load(base.model, "two")
    with pytest.raises(InputError, match="text 1: this adapter reads several columns \\(title, text\\)"):
        fw.predict(base, ["a plot"])
    asked: list[dict[str, Any]] = [{"title": "", "text": "a plot"}, {"title": "film 3", "text": "a plot"}]
    first, second = fw.predict(base, asked)
    assert first.probabilities != second.probabilities
    with pytest.raises(InputError, match="text 1: the column 'text' is empty"):
        fw.predict(base, [{"title": "x", "text": ""}])
    Path("new.csv").write_text("text,title\na plot,\na plot,film 3\n", encoding="utf-8")
    out = fw_cli("predict", "--adapter", "two", "--data", "new.csv", "--dtype", "float32").out
    assert out == "".join(f"{p.label}\t{p.probability:.4f}\n" for p in (first, second))
