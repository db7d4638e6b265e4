"""What there is to beat: the untouched model, examples in the prompt, the most frequent class, full fine-tuning. And what is forgotten."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight as fw
import tiny
from command import Cli, complaint
from featherweight import demo
from featherweight.adapter import attach, attached, count, detach, trainable
from featherweight.bench import shots
from featherweight.contenders import references
from featherweight.engine.loss import labelled_loss
from featherweight.engine.train import Settings, fit, prepared
from featherweight.forgetting import general_loss, general_texts
from featherweight.full import FullFineTuning
from featherweight.results import Line, read
from featherweight.tokens import writer_for

OPEN = ("--no-isolate", "--general-text", "none", "--steps", 3, "--dtype", "float32")


@pytest.fixture
def line(llama: Path, reviews: Path) -> Any:
    return lambda *more: ("compare", "--model", llama, "--data", reviews, *OPEN, *more)


def rows(folder: str) -> dict[str, Line]:
    return {row.name: row for row in read(Path(folder))}


# --- rows of the table ------------------------------------------------------------------------------------------------------


def test_references_are_rows_below_the_methods(fw_cli: Cli, line: Any) -> None:
    every = "untouched,few_shot:n=2,majority,full"
    done = fw_cli(*line("--methods", "ia3", "--references", every, "--seeds", 2, "--out", "table"))
    assert done.code == 0, done.err
    found = [row.split(" | ")[0] for row in done.out.splitlines() if "n = 6" in row]
    assert found == [
        "| (IA)³", "| Untouched model", "| Few-shot (2 examples)", "| Majority class (bad)", "| Full fine-tuning",
    ]  # fmt: skip
    lines = rows("table")
    assert len(read(Path("table"))) == 2 + 1 + 1 + 1 + 2  # what no seed changes is run once
    assert {row.kind for row in lines.values()} == {"method", "reference"}
    assert lines["full"].trainable_params == lines["full"].total_params == lines["untouched"].total_params
    assert lines["full"].adapter_bytes is None
    assert lines["untouched"].train_steps == lines["majority"].train_steps == 0
    assert lines["majority"].predictions == ["bad"] * 6
    assert lines["few_shot:n=2"].eval_tokens > lines["untouched"].eval_tokens
    assert "best: " in done.out  # the references are compared on the same rows, whatever the number of seeds


def test_the_untouched_row_is_the_bare_model(fw_cli: Cli, line: Any, llama: Path, reviews: Path) -> None:
    assert fw_cli(*line("--methods", "ia3", "--references", "untouched", "--out", "table")).code == 0
    score = fw.evaluate(fw.load_base(str(llama), dtype="float32"), fw.load_task(str(reviews)))
    assert rows("table")["untouched"].predictions == score.predictions


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("all", "there is no such reference"), ("few_shot:n=0", "n must be a whole number above 0"),
        ("few_shot:8", "few_shot:n=8"), ("untouched:n=2", "untouched has no option 'n'"), ("full:lr=x", "lr must be a number"),
    ],
)  # fmt: skip
def test_a_wrong_reference_is_refused(asked: str, words: str, fw_cli: Cli, line: Any) -> None:
    assert words in complaint(fw_cli(*line("--references", asked)))
    assert not Path("runs").exists()


def test_no_references_are_none() -> None:
    assert references("none") == []
    assert references(" untouched , untouched ")[0].title == "Untouched model"


def test_a_task_of_texts_has_no_majority_class(fw_cli: Cli, llama: Path, in_tmp: Path) -> None:
    data = tiny.write(in_tmp / "a.jsonl", tiny.requests())
    common = ("compare", "--model", llama, "--data", data, *OPEN, "--methods", "ia3", "--test-rows", 4)
    done = fw_cli(*common, "--references", "majority,few_shot:n=1", "--out", "table")
    assert "there is no majority class" in done.out
    assert list(rows("table")) == ["few_shot:n=1", "ia3"]


def test_few_shot_prompts_show_training_rows_of_each_label_in_turn(reviews: Path) -> None:
    task = fw.load_task(str(reviews))
    shown = shots(task, 3, seed=0)
    [first] = {row.spans[0][0] for row in shown.test}
    assert all(f" {label}\n\n" in first for label in task.labels)
    assert [row.spans[1:] for row in shown.test] == [row.spans for row in task.test]
    texts = [row.spans[0][0] for row in task.train]
    assert all(any(part.startswith(text) for text in texts) for part in first.strip().split("\n\n"))
    assert shots(task, 3, seed=1).test[0].spans[0] != shown.test[0].spans[0]


def test_examples_for_a_conversation_are_earlier_turns_after_what_the_system_says(in_tmp: Path) -> None:
    says = ("system", "user", "assistant")
    talks = [{"messages": [{"role": role, "content": f"{role} {i}"} for role in says]} for i in range(20)]
    task = fw.load_task(str(tiny.write(in_tmp / "t.jsonl", talks)))
    turns = shots(task, 2, seed=0).test[0].messages[:-2]  # type: ignore[index]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[0] == task.test[0].messages[0]  # type: ignore[index]


# --- full fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_gradients_are_those_of_a_model_whose_weights_are_all_trained(
    family: str, dtype: str, request: pytest.FixtureRequest, reviews: Path
) -> None:
    base = fw.load_base(str(request.getfixturevalue(family)), dtype=dtype)
    task = fw.load_task(str(reviews))
    rows = writer_for(base, None, task.labels).examples(task.train)[0][:6]
    base.model.requires_grad_(True)
    with prepared(base, Settings(lean=False)) as tensors:
        labelled_loss(base.model, tensors(base, rows)).backward()
    plain = {name: p.grad.float() for name, p in base.model.named_parameters()}
    base.model.zero_grad()
    attach(base.model, FullFineTuning())
    with prepared(base, Settings(lean=False)) as tensors:
        labelled_loss(base.model, tensors(base, rows)).backward()
    found = {name: p.grad for name, p in attached(base.model)["default"].weights}  # type: ignore[attr-defined]
    assert set(found) == set(plain)  # a tied weight is one
    for name, grad in plain.items():
        assert torch.allclose(found[name], grad, rtol=1e-6 if dtype == "float32" else 0.02, atol=1e-7), name


def test_it_learns_and_leaves_the_base_as_it_was(llama: Path, reviews: Path) -> None:
    base = fw.load_base(str(llama), dtype="float32")
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    task = fw.load_task(str(reviews))
    rows = writer_for(base, None, task.labels).examples(task.train)[0]
    attach(base.model, FullFineTuning())
    assert sum(p.numel() for p in trainable(base.model)) == sum(p.numel() for p in before.values())
    report = fit(base, rows, Settings(steps=20, lr=1e-2))
    assert report.losses[-1] < 0.5 * report.losses[0]
    detach(base.model)
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    assert count(base.model)[1] == 0


def test_a_quantised_base_cannot_be_trained_whole(llama: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = fw.load_base(str(llama), quantize="int8", dtype="float32")
    with pytest.raises(fw.InputError, match="leave --quantize out"):
        attach(base.model, FullFineTuning())


# --- forgetting -------------------------------------------------------------------------------------------------------------


def test_the_general_loss_is_the_mean_over_all_tokens_of_all_texts(llama: Path) -> None:
    base = fw.load_base(str(llama), dtype="float32")
    texts = ["a film that is long and slow", "bad", "the story is fine and the people are good"]
    total = tokens = 0.0
    for text in texts:
        ids = base.tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] > 1:
            total += base.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    for at_once in (1, 2, 8):
        assert general_loss(base, texts, rows=at_once) == pytest.approx(total / tokens, rel=1e-5)
    fw.attach(base.model, fw.LoRA(r=2))
    assert general_loss(base, texts) == pytest.approx(total / tokens, rel=1e-5)  # it starts as the base
    with torch.no_grad():
        for p in trainable(base.model):
            p.normal_()
    assert abs(general_loss(base, texts) - total / tokens) > 0.01  # type: ignore[operator]


def test_a_model_that_does_not_continue_texts_has_no_general_loss(t5: Path, bert: Path) -> None:
    assert general_loss(fw.load_base(str(t5), dtype="float32"), ["a film that is long"]) is None
    assert general_loss(fw.load_base(str(bert), ["a", "b"], dtype="float32"), ["a film that is long"]) is None


def test_general_texts_are_whole_sentences_of_a_table(in_tmp: Path) -> None:
    data = tiny.write(
        in_tmp / "t.csv", [{"text": f"This is the sentence of number {i} here"} for i in range(300)] + [{"text": "no"}]
    )
    texts = general_texts(str(data))
    assert len(texts) == 100
    assert texts[:2] == ["This is the sentence of number 0 here", "This is the sentence of number 3 here"]
    with pytest.raises(fw.InputError, match="needs a column named text"):
        general_texts(str(tiny.write(in_tmp / "u.csv", [{"words": "a"}])))
    with pytest.raises(fw.InputError, match="no text has eight words"):
        general_texts(str(tiny.write(in_tmp / "v.csv", [{"text": "a"}])))


def test_by_itself_nothing_is_fetched_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_fetch", lambda *_, **__: pytest.fail("something was fetched"))
    assert general_texts("auto") == []
    assert general_texts("none") == []


def test_what_is_forgotten_is_in_the_table(fw_cli: Cli, llama: Path, reviews: Path, in_tmp: Path) -> None:
    text = tiny.write(
        in_tmp / "t.csv", [{"text": f"a film that is {w} and long and slow"} for w in ("bad", "fine", "good")]
    )
    common = (
        "compare",
        "--model",
        llama,
        "--data",
        reviews,
        "--no-isolate",
        "--steps",
        9,
        "--dtype",
        "float32",
        "--lr",
        0.1,
    )
    done = fw_cli(*common, "--methods", "lora", "--references", "untouched", "--general-text", text, "--out", "table")
    assert done.code == 0, done.err
    before, after = (rows("table")[name].general_loss for name in ("untouched", "lora"))
    assert before is not None
    assert after is not None
    assert math.isfinite(after)
    assert f"| {after:.3f} ({after - before:+.3f}) |" in done.out
    assert json.loads(Path("table/rows.jsonl").read_text().splitlines()[0])["general_loss"] == before
