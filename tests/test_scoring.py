"""Labels are scored as the full forward pass would, and figures are what their formulas say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import featherweight as fw
import tiny
from featherweight import Base, InputError, Task, load_task
from featherweight.adapter import trainable
from featherweight.attention import rows_apart
from featherweight.scoring import Score, evaluate, first_token_scores, label_scores, majority
from featherweight.tokens import Example, writer_for

LABEL_SETS = {
    "one token each": ["bad", "fine"],
    "unequal lengths": ["bad", "very bad", "a fine film"],
    "a shared beginning": ["very bad", "very fine", "very bad acting and plot"],
    "one begins another": ["very", "very bad", "fine"],
}
EQUALLY_LONG = ["a film", "the plot", "the cast", "a year", "bad music", "fine end"]
ADAPTERS: dict[str, fw.Method | None] = {
    "bare": None,
    "lora": fw.LoRA(r=4),
    "prefix_tuning": fw.PrefixTuning(num_virtual_tokens=5),
    "prompt_tuning": fw.PromptTuning(num_virtual_tokens=5),
}


@pytest.fixture(scope="module")
def bases(llama: Path, t5: Path) -> dict[str, Base]:
    return {
        name: fw.load_base(str(path), dtype="float32", device="cpu") for name, path in (("llama", llama), ("t5", t5))
    }


@pytest.fixture(params=["llama", "t5"])
def base(request: pytest.FixtureRequest, bases: dict[str, Base]) -> Any:
    chosen = bases[request.param]
    yield chosen
    for name in list(fw.attached(chosen.model)):
        fw.detach(chosen.model, name)


def adapt(base: Base, method: fw.Method | None) -> None:
    """Attach a method and move it, as training would."""
    if method is None:
        return
    torch.manual_seed(0)
    fw.attach(base.model, method)
    with torch.no_grad():
        for p in trainable(base.model):
            p += 0.3 * torch.randn_like(p)


def task_with(tmp_path: Path, labels: list[str], n: int = 40) -> Task:
    """Rows of many lengths, all of them to test on."""
    draw = random.Random(0)
    rows = [
        {"text": " ".join(draw.choices(tiny.WORDS, k=1 + i % 9)) + f" {i}", "label": labels[i % len(labels)]}
        for i in range(n)
    ]
    return load_task(str(tiny.write(tmp_path / "a.jsonl", rows)), test_only=True)


@torch.no_grad()
def one_by_one(base: Base, rows: list[Example], labels: list[list[int]]) -> torch.Tensor:
    """Every label after every prompt in a forward pass of its own: no padding, no cache."""
    scores = torch.zeros(len(rows), len(labels))
    for i, row in enumerate(rows):
        for j, ids in enumerate(labels):
            if base.encoder_decoder:
                written = torch.tensor([[base.model.config.decoder_start_token_id, *ids[:-1]]])
                logits = base.model(input_ids=torch.tensor([row.prompt]), decoder_input_ids=written).logits[0]
            else:
                logits = base.model(input_ids=torch.tensor([[*row.prompt, *ids]])).logits[0, len(row.prompt) - 1 : -1]
            scores[i, j] = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
    return scores


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", LABEL_SETS)
def test_a_labels_score_is_the_full_log_probability_of_its_tokens(
    base: Base, tmp_path: Path, adapter: str, kind: str
) -> None:
    adapt(base, ADAPTERS[adapter])
    task = task_with(tmp_path, LABEL_SETS[kind], n=6)
    writer = writer_for(base, None, task.labels)
    rows, _ = writer.examples(task.test)
    labels = writer.label_ids(task.labels)
    with torch.inference_mode():
        scores = label_scores(base, rows, labels)
    wanted = one_by_one(base, rows, labels)
    assert wanted.std() > 0.1  # else a wrong place would not show
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-5)
    if not base.encoder_decoder and all(len(ids) == 1 for ids in labels):
        with torch.inference_mode(), rows_apart(base.model):
            torch.testing.assert_close(first_token_scores(base, rows, labels), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_batch_size_does_not_change_a_prediction(base: Base, tmp_path: Path, adapter: str) -> None:
    adapt(base, ADAPTERS[adapter])
    task = task_with(tmp_path, EQUALLY_LONG)
    writer = writer_for(base, None, task.labels)
    one, many = (evaluate(base, task, writer, batch_size=size) for size in (1, 16))
    assert len(set(one.predictions)) > 1  # else nothing could have changed
    assert one.predictions == many.predictions
    assert (one.batches, many.batches, many.n) == (40, 3, 40)


def test_predictions_are_in_the_order_of_the_rows(base: Base, tmp_path: Path) -> None:
    task = task_with(tmp_path, EQUALLY_LONG)
    writer = writer_for(base, None, task.labels)
    score = evaluate(base, task, writer, batch_size=7)
    rows, _ = writer.examples(task.test)
    best = one_by_one(base, rows, writer.label_ids(task.labels)).argmax(1)
    assert score.predictions == [task.labels[b] for b in best]
    assert score.answers == [r.answer for r in task.test]
    assert score.places == [r.place for r in task.test]
    assert score.correct == sum(p == a for p, a in zip(score.predictions, score.answers, strict=True))


def test_progress_is_reported_with_what_is_right_so_far(base: Base, tmp_path: Path) -> None:
    task = task_with(tmp_path, ["bad", "fine"])
    told: list[tuple[int, int]] = []
    score = evaluate(
        base, task, writer_for(base, None), batch_size=16, on_batch=lambda done, right: told.append((done, right))
    )
    assert [done for done, _ in told] == [16, 32, 40]
    assert told[-1][1] == score.correct


def test_exact_match_compares_what_the_model_writes(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(str(tiny.write(tmp_path / "a.jsonl", tiny.requests(6))), test_only=True)
    answers = iter([f" {r['response']}\n" if i else "nonsense" for i, r in enumerate(tiny.requests(6))])
    monkeypatch.setattr("featherweight.scoring.generate_from", lambda base, rows, n: [next(answers) for _ in rows])
    score = evaluate(base, task, writer_for(base, None), batch_size=1)
    assert (score.metric, score.n) == ("exact_match", 6)
    assert sorted(score.predictions).count("nonsense") == 1
    assert score.predictions.count("nonsense") == 6 - score.correct


def test_scoring_labels_needs_labels(base: Base, tmp_path: Path) -> None:
    task = load_task(str(tiny.write(tmp_path / "a.jsonl", tiny.requests(6))), test_only=True)
    with pytest.raises(InputError, match="needs a task with labels"):
        evaluate(base, task, writer_for(base, None), metric="labels")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_texts_longer_than_learned_positions_are_trained_and_scored(tmp_path: Path, adapter: str) -> None:
    words = tiny.tokenizer()
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=40, pad_token_id=0, eos_token_id=1, bos_token_id=1
    )  # fmt: skip
    base = Base(GPT2LMHeadModel(config).eval(), words, "tiny-gpt2", torch.device("cpu"))
    rows = [{**r, "text": r["text"] * 9} for r in tiny.reviews(12)]
    task = load_task(str(tiny.write(tmp_path / "a.jsonl", rows)), test_fraction=0.5)
    if method := ADAPTERS[adapter]:
        assert fw.train(base, task, method, steps=2, batch_size=2).stopped is None
    assert fw.evaluate(base, task).n == 6


def score_of(predictions: str, answers: str) -> Score:
    right = sum(p == a for p, a in zip(predictions, answers, strict=True))
    return Score(right, len(answers), list(predictions), list(answers), [""] * len(answers), 1.0, 1, "labels")


def test_macro_f1_is_the_mean_over_the_classes() -> None:
    # a: precision 2/3, recall 2/3 → 2/3; b: precision 1/2, recall 1/1 → 2/3; c: nothing found → 0.
    score = score_of("aaabb", "aacba")
    assert score.accuracy == pytest.approx(3 / 5)
    assert score.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert score_of("abc", "abc").macro_f1 == 1
    assert score_of("bbb", "aaa").macro_f1 == 0


def test_the_majority_class_is_that_of_the_training_rows(tmp_path: Path) -> None:
    train = [{"text": f"t{i}", "label": "fine" if i % 3 else "bad"} for i in range(30)]
    test = [{"text": f"u{i}", "label": "bad" if i % 3 else "fine"} for i in range(30)]
    paths = [str(tiny.write(tmp_path / f"{n}.csv", rows)) for n, rows in (("train", train), ("test", test))]
    score = majority(load_task(paths[0], test_data=paths[1]))
    assert set(score.predictions) == {"fine"}
    assert (score.correct, score.n) == (10, 30)


@pytest.mark.parametrize("method", [None, fw.PromptTuning(num_virtual_tokens=5), fw.PrefixTuning(num_virtual_tokens=5)])
def test_generating_stops_at_the_end_of_the_context(tmp_path: Path, method: fw.Method | None) -> None:
    words = tiny.tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    config.eos_token_id = config.bos_token_id = None
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    base = fw.load_base(str(tmp_path), dtype="float32", device="cpu")
    if method is not None:
        fw.attach(base.model, method)
    assert len(fw.generate(base, ["a film with a plot"], raw=True, max_new_tokens=100)) == 1
