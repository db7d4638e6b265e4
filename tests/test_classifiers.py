"""Encoders: a task's labels become a head, which is trained with every method and travels with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

import featherweight as fw
import models
import tiny
from command import BARE, Cli, complaint
from featherweight.adapter import facts, trainable
from featherweight.base import Base, fingerprint, skeleton
from featherweight.encoder import is_encoder
from featherweight.engine.batches import collate, readable
from featherweight.engine.loss import class_logits, labelled_loss
from featherweight.engine.update import gradients
from featherweight.rows import Row
from featherweight.tokens import Writer, writer_for

METHODS = {
    "lora": fw.LoRA(r=2),
    "ia3": fw.IA3(),
    "prompt_tuning": fw.PromptTuning(num_virtual_tokens=3),
    "p_tuning": fw.PTuning(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix_tuning": fw.PrefixTuning(num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> fw.Task:
    return fw.load_task(str(tiny.write(tmp_path_factory.mktemp("data") / "r.csv", tiny.reviews())))


@pytest.fixture
def base(bert: Path, task: fw.Task) -> Base:
    return fw.load_base(str(bert), task.labels, dtype="float32")


@pytest.fixture(scope="session")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stack of a tiny random ModernBERT: it has no key–value cache."""
    folder, words = tmp_path_factory.mktemp("models") / "modernbert", tiny.tokenizer(bos=True, eos=True)
    config = models.modernbert().config
    config.vocab_size = len(words)
    models.build(type(models.modernbert().model), config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def written(base: Base, task: fw.Task, rows: list[Row] | None = None, **options: Any) -> list[Any]:
    return writer_for(base, options.get("max_length"), task.labels).examples(rows or task.train)[0]


# --- the model ------------------------------------------------------------------------------------------------------


def test_a_new_head_is_the_same_in_every_load(base: Base, bert: Path, task: fw.Task) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = fw.load_base(str(bert), task.labels, dtype="float32")
    assert torch.equal(torch.get_rng_state(), state)
    assert base.fresh == ("classifier",)
    assert base.labels == task.labels
    assert torch.equal(base.model.classifier.weight, again.model.classifier.weight)
    assert base.model.classifier.weight.std() > 0


@pytest.mark.parametrize("family", models.CLASSIFIERS)
def test_encoders_are_told_from_models_that_write(family: str) -> None:
    assert is_encoder(models.CLASSIFIERS[family]().config)
    assert not any(is_encoder(build().config) for build in models.FAMILIES.values())


def test_a_bert_that_writes_is_no_encoder() -> None:
    config = models.bert().config
    config.is_decoder = True
    assert not is_encoder(config)


def test_a_checkpoint_with_a_head_for_as_many_labels_keeps_it(tmp_path: Path, task: fw.Task) -> None:
    folder = tiny.save_bert(tmp_path, cls=BertForSequenceClassification, num_labels=3)
    head = load_file(folder / "model.safetensors")["classifier.weight"]
    base = fw.load_base(str(folder), task.labels, dtype="float32")
    assert base.fresh == ()
    assert torch.equal(base.model.classifier.weight, head)
    assert fw.evaluate(base, task).n == len(task.test)  # it can answer as it is
    two = fw.load_base(str(folder), ["no", "yes"], dtype="float32")
    assert two.fresh == ("classifier",)
    assert two.model.classifier.weight.shape == (2, 32)


def test_a_head_that_has_the_labels_in_another_order_is_answered_in_its_own(
    fw_cli: Cli, reviews: Path, tmp_path: Path
) -> None:
    own = {0: "Very bad", 1: "FINE", 2: "bad"}
    folder = tiny.save_bert(tmp_path / "m", cls=BertForSequenceClassification, num_labels=3, id2label=own)
    with pytest.raises(fw.InputError, match="labels in another order: very bad, fine, bad"):
        fw.load_base(str(folder), ["bad", "fine", "very bad"])
    base = fw.load_base(str(folder), ["very bad", "fine", "bad"], dtype="float32")
    task = fw.load_task(str(reviews), test_only=True).in_order(base.labels)
    result = fw_cli("evaluate", "--model", folder, "--data", reviews, "--dtype", "float32")
    assert result.out.startswith(f"accuracy {100 * fw.evaluate(base, task).accuracy:.1f} %")
    trained = fw_cli("train", "--model", folder, "--data", reviews, "--steps", 1, "--dtype", "float32", "--out", "mine")
    assert trained.code == 0, trained.err
    assert json.loads(Path("mine/featherweight.json").read_text())["labels"] == ["very bad", "fine", "bad"]


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved_with_the_head(tmp_path: Path, task: fw.Task) -> None:
    folder = tiny.save_bert(tmp_path / "m", cls=BertForMaskedLM)
    base = fw.load_base(str(folder), task.labels, dtype="float32")
    assert set(base.fresh) == {"classifier", "pooler"}
    fw.train(base, task, fw.LoRA(r=2), steps=2, lr=1e-2)
    fw.save(base.model, tmp_path / "a")
    assert "base_model.model.bert.pooler.dense.weight" in load_file(tmp_path / "a/adapter_model.safetensors")
    again = fw.load_base(str(folder), task.labels, dtype="float32")
    with torch.no_grad():
        again.model.bert.pooler.dense.weight.normal_()  # whatever it starts from
    fw.load(again.model, tmp_path / "a")
    assert fw.evaluate(again, task).predictions == fw.evaluate(base, task).predictions
    fw.detach(base.model)
    fw.attach(base.model, fw.LoRA(r=2))
    with pytest.raises(fw.InputError, match=r"the pooler of .* is random and must be trained too"):
        fw.train(base, task, steps=1)


def test_an_encoder_that_lacks_more_than_its_head_is_refused(tmp_path: Path, task: fw.Task) -> None:
    folder = tiny.save_bert(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = next(k for k in tensors if k.endswith("layer.1.output.dense.weight"))
    save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fw.InputError, match=r"lacks bert.encoder.layer.1.output.dense.weight \(1 tensors"):
        fw.load_base(str(folder), task.labels)


def test_an_encoder_without_labels_is_refused(bert: Path) -> None:
    with pytest.raises(fw.InputError, match=r"an encoder \(bert\): it answers with a class and writes no text"):
        fw.load_base(str(bert))
    with pytest.raises(fw.InputError, match="an encoder"):
        skeleton(BertModel.config_class())


def test_a_base_is_recognised_whatever_its_random_head(base: Base, tmp_path: Path, task: fw.Task) -> None:
    fw.train(base, task, fw.LoRA(r=2), steps=1)
    fw.save(base.model, tmp_path)
    fw.detach(base.model)
    with torch.no_grad():
        base.model.classifier.weight.normal_()
    fw.load(base.model, tmp_path)
    fw.detach(base.model)
    with torch.no_grad():
        base.model.bert.pooler.dense.weight.normal_()
    with pytest.raises(fw.InputError, match="made for another base"):
        fw.load(base.model, tmp_path)
    assert fingerprint(base.model, without=["bert", "classifier"]) != fingerprint(base.model, without=["classifier"])


def test_an_adapter_for_other_labels_is_refused(base: Base, tmp_path: Path, bert: Path, task: fw.Task) -> None:
    fw.train(base, task, fw.LoRA(r=2), steps=1)
    fw.save(base.model, tmp_path)
    other = fw.load_base(str(bert), ["no", "yes"], dtype="float32")
    with pytest.raises(fw.InputError, match=r"classifier.weight has the shape \(3, 32\), this base needs \(2, 32\)"):
        fw.load(other.model, tmp_path)
    with pytest.raises(fw.InputError, match="loaded for the labels no, yes, and this task has bad, fine, very bad"):
        fw.train(other, task, fw.LoRA(r=2), steps=1)


@pytest.mark.parametrize(("family", "context"), [("bert", 128), ("roberta", 127), ("modernbert", 128)])
def test_no_row_is_longer_than_the_positions_that_a_model_has(family: str, context: int) -> None:
    model = models.CLASSIFIERS[family]()
    base = Base(model, None, "", torch.device("cpu"))
    assert base.context == context
    inputs = {"input_ids": models.words(1, context), "attention_mask": torch.ones(1, context, dtype=torch.long)}
    assert models.logits(model, **inputs).shape == (1, models.CLASSES)


# --- what it reads and learns ---------------------------------------------------------------------------------------


def test_an_encoder_reads_the_text_and_no_label_cue(base: Base, task: fw.Task) -> None:
    row = task.train[0]
    [example] = written(base, task, [row])
    assert example.ids == base.tokenizer(row.texts[0]).input_ids
    assert example.ids == example.prompt
    assert example.ids[0] == tiny.BOS
    assert example.ids[-1] == tiny.EOS
    assert example.targets == [row.label]
    assert example.types is None


def test_two_columns_are_read_as_a_pair_and_more_as_lines(base: Base, task: fw.Task, tmp_path: Path) -> None:
    table = [{"a": f"film {i}", "b": f"cast {i}", "c": "plot", "label": tiny.LABELS[i % 3]} for i in range(30)]
    file = str(tiny.write(tmp_path / "p.csv", table))
    pairs = fw.load_task(file, template="One: {a}\nTwo: {b}\nLabel:", label_column="label")
    [example] = written(base, task, pairs.train[:1])
    expected = base.tokenizer(*pairs.train[0].texts)
    assert example.ids == expected.input_ids
    assert example.types == expected.token_type_ids
    assert set(example.types) == {0, 1}
    batch = collate(base, written(base, task, pairs.train[:3]))
    assert torch.equal(batch.inputs["token_type_ids"][0][: len(example.types)], torch.tensor(example.types))
    three = fw.load_task(file, template="{a} {b} {c}", label_column="label")
    [example] = written(base, task, three.train[:1])
    assert example.ids == base.tokenizer("\n".join(three.train[0].texts)).input_ids


def test_a_long_text_loses_its_end_and_keeps_the_special_tokens(base: Base, task: fw.Task) -> None:
    row = Row((("", False), ("", False), ("bad", True)), "bad", "x:1", label=0, texts=("film cast " * 100,))
    example, cut = writer_for(base, 16, task.labels).example(row)
    assert cut
    assert len(example.ids) == 16
    assert example.ids[:15] == base.tokenizer(row.texts[0], verbose=False).input_ids[:15]
    assert example.ids[-1] == tiny.EOS
    short, cut = writer_for(base, None, task.labels, [METHODS["prefix_tuning"]]).example(row)
    assert cut
    assert len(short.ids) == 64 - 3  # the prefix takes positions too


def test_the_loss_is_the_mean_cross_entropy_over_the_rows(base: Base, task: fw.Task) -> None:
    fw.attach(base.model, fw.LoRA(r=2))
    rows = written(base, task)[:6]
    batch = collate(base, rows)
    one_by_one = torch.cat([class_logits(base.model, readable(base, [r.ids])) for r in rows])
    wanted = F.cross_entropy(one_by_one, torch.tensor([r.targets[0] for r in rows]))
    torch.testing.assert_close(labelled_loss(base.model, batch), wanted)
    parameters = trainable(base.model)
    whole = gradients(base, [batch], parameters)
    kept = [p.grad.clone() for p in parameters if p.grad is not None]
    parts = gradients(base, [collate(base, rows[:1]), collate(base, rows[1:])], parameters)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=0)
    for a, p in zip(kept, parameters, strict=True):
        torch.testing.assert_close(a, p.grad)


@pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in models.CLASSIFIERS for m in METHODS if f + m != "modernbertprefix_tuning"]
)
def test_padding_changes_no_answer(family: str, method: str) -> None:
    model = models.CLASSIFIERS[family]()
    fw.attach(model, METHODS[method])
    models.shake(trainable(model))
    rows = [models.words(1, n, n)[0] for n in (4, 9, 7)]
    together = models.logits(model, **models.padded(rows, left=False))
    alone = [models.logits(model, **models.padded([row], left=False)) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_answers_the_same_after_saving_and_loading(
    base: Base, bert: Path, task: fw.Task, method: str, tmp_path: Path
) -> None:
    head = base.model.classifier.weight.clone()
    fw.train(base, task, METHODS[method], steps=3)
    fw.save(base.model, tmp_path)
    again = fw.load_base(str(bert), task.labels, dtype="float32")
    fw.load(again.model, tmp_path)
    assert facts(again.model)["labels"] == task.labels
    inputs = readable(base, [e.ids for e in written(base, task)[:5]])
    assert torch.equal(models.logits(base.model, **inputs), models.logits(again.model, **inputs))
    assert fw.evaluate(base, task).predictions == fw.evaluate(again, task).predictions
    fw.detach(base.model)
    assert torch.equal(base.model.classifier.weight, head)  # the base's own head was never touched


def test_lora_learns_rows_that_name_their_label(base: Base, task: fw.Task) -> None:
    report = fw.train(base, task, fw.LoRA(), steps=80, lr=1e-2)
    assert report.losses[-1] < report.losses[0] / 1.3
    assert fw.evaluate(base, task).accuracy == 1


def test_an_encoder_trains_in_bfloat16(bert: Path, task: fw.Task) -> None:
    base = fw.load_base(str(bert), task.labels, dtype="bfloat16")
    report = fw.train(base, task, fw.LoRA(r=2), steps=2)
    assert report.stopped is None
    assert {p.dtype for p in trainable(base.model)} == {torch.float32}


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_model_without_a_cache_has_no_place_for_a_prefix() -> None:
    with pytest.raises(
        fw.InputError, match=r"Prefix-Tuning needs a model whose layers take .*ModernBertModel has none"
    ):
        fw.attach(models.modernbert(), fw.PrefixTuning())


def test_a_random_head_is_not_evaluated(base: Base, task: fw.Task) -> None:
    with pytest.raises(fw.InputError, match=r"the classifier of .* is random"):
        fw.evaluate(base, task)
    fw.attach(base.model, fw.LoRA(r=2))
    fw.live(base.model)
    with pytest.raises(fw.InputError, match="is random"):
        fw.evaluate(base, task)


def test_an_encoder_writes_no_text(base: Base, task: fw.Task) -> None:
    fw.attach(base.model, fw.LoRA(r=2))
    with pytest.raises(fw.InputError, match="writes no text; use predict"):
        fw.generate(base, ["a film"])
    with pytest.raises(fw.InputError, match="exact_match needs a model that writes text"):
        fw.evaluate(base, task, metric="exact_match")


def test_an_encoder_cannot_be_packed(base: Base, task: fw.Task) -> None:
    with pytest.raises(fw.InputError, match="packing is for decoders"):
        fw.train(base, task, fw.LoRA(r=2), steps=1, packing=True)


def test_a_writer_without_a_head_is_as_it_was(llama: Path) -> None:
    assert not writer_for(fw.load_base(str(llama), ["ignored"]), None).classifies
    assert not Writer(tiny.tokenizer(), False, 16).classifies


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_train_and_evaluate_an_encoder(fw_cli: Cli, bert: Path, reviews: Path, method: str) -> None:
    trained = fw_cli(
        "train", "--model", bert, "--data", reviews, "--method", method, "--steps", 4, "--dtype", "float32", "--out", "mine"
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert json.loads(Path("mine/featherweight.json").read_text())["labels"] == list(tiny.LABELS)
    held_out = fw_cli("evaluate", "--adapter", "mine", "--data", reviews, "--dtype", "float32")
    assert held_out.out == trained.out
    every = fw_cli(
        "evaluate", "--adapter", "mine", "--data", reviews, "--split", "all", "--dtype", "float32", "--out", "p.jsonl"
    )  # fmt: skip
    assert "n = 60" in every.out
    lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert {line["prediction"] for line in lines} <= set(tiny.LABELS)
    assert "writes no text" in complaint(fw_cli("generate", "--adapter", "mine", "--prompt", "a film"))
    new = tiny.write(Path("new.csv"), [*tiny.reviews(5), {"text": "x", "label": "superb"}])
    message = complaint(fw_cli("evaluate", "--adapter", "mine", "--data", new, "--split", "all"))
    assert "the label 'superb' is not among" in message


def test_a_merged_encoder_is_a_classifier_that_transformers_loads(
    fw_cli: Cli, bert: Path, reviews: Path, base: Base, task: fw.Task
) -> None:
    fw.train(base, task, fw.LoRA(r=2), steps=3, lr=1e-2)
    fw.save(base.model, "mine")
    answers = fw.evaluate(base, task).predictions
    fw.merge(base.model, keep=False)
    assert fw.evaluate(base, task).predictions == answers  # its head is no longer random
    merged = fw_cli("merge", "--adapter", "mine", "--out", "whole")
    assert merged.code == 0, merged.err
    model = BertForSequenceClassification.from_pretrained("whole").eval()
    assert [model.config.id2label[i] for i in range(3)] == task.labels
    assert fw.evaluate(fw.load_base("whole", task.labels, dtype="float32"), task).predictions == answers


def test_an_adapter_of_hf_peft_without_labels_takes_those_of_the_data(
    fw_cli: Cli, bert: Path, reviews: Path, base: Base, task: fw.Task
) -> None:
    fw.train(base, task, fw.LoRA(r=2), steps=1)
    fw.save(base.model, "theirs")
    Path("theirs/featherweight.json").unlink()
    result = fw_cli("evaluate", "--model", bert, "--adapter", "theirs", "--data", reviews, "--dtype", "float32")
    assert result.code == 0, result.err


def test_a_comparison_on_an_encoder_has_no_untouched_model(fw_cli: Cli, bert: Path, reviews: Path) -> None:
    args = ("--model", bert, "--data", reviews, "--steps", 2, "--dtype", "float32", "--out", "table")
    result = fw_cli("compare", "--no-isolate", *args)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in Path("table/rows.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {*METHODS, "majority"}
    assert "Untouched model: none, the model's head for these labels is random" in result.out
    assert "| Majority class (bad) | – | – | 0 | – | – | – | 33.3 %" in result.out


def test_a_method_that_does_not_work_is_left_out_of_the_default_list_with_a_note(
    fw_cli: Cli, modernbert: Path, reviews: Path
) -> None:
    args = ("compare", *BARE, "--model", modernbert, "--data", reviews, "--steps", 1, "--dtype", "float32")
    result = fw_cli(*args, "--out", "table")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in Path("table/rows.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == set(METHODS) - {"prefix_tuning"}
    assert "Prefix-Tuning was left out: Prefix-Tuning needs a model whose layers" in result.out
    again = fw_cli(
        "compare", "--no-isolate", "--recipe", "table/recipe.toml", "--out", "again"
    )  # its list has what ran
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (("compare", "--methods", "lora,prefix_tuning"), "Prefix-Tuning needs a model"),
        (("train", "--method", "prefix_tuning"), "Prefix-Tuning needs a model"),
        (("train", "--metric", "exact_match"), "exact_match needs a model that writes text"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_an_encoder_cannot_do_is_refused_before_it_loads(
    fw_cli: Cli, modernbert: Path, reviews: Path, args: tuple[str, ...], wanted: str
) -> None:
    assert wanted in complaint(fw_cli(*args, "--model", modernbert, "--data", reviews))
    assert not Path("runs").exists()


@pytest.mark.usefixtures("no_model")
def test_instructions_are_nothing_for_an_encoder(fw_cli: Cli, bert: Path, in_tmp: Path) -> None:
    data = tiny.write(in_tmp / "a.jsonl", tiny.requests())
    assert "it answers with a class and writes no text" in complaint(fw_cli("train", "--model", bert, "--data", data))


def test_a_bare_encoder_cannot_be_evaluated(fw_cli: Cli, bert: Path, reviews: Path) -> None:
    assert "is random: it has no head" in complaint(fw_cli("evaluate", "--model", bert, "--data", reviews))


def test_methods_counts_an_encoder_with_its_head(fw_cli: Cli, modernbert: Path, bert: Path) -> None:
    result = fw_cli("methods", "--model", bert)
    model = skeleton(fw.load_base(str(bert), ["a", "b"]).model.config, ["a", "b"])
    fw.attach(model, fw.LoRA())
    total, trained = fw.count(model)
    assert f"with a head for 2 labels: {total:,} parameters, {trained:,} of them trained" in result.out
    assert "not on this model: Prefix-Tuning needs" in fw_cli("methods", "--model", modernbert).out
