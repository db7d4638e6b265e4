"""From columns to rows: which are read, how they are written, and which of them are held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tiny
from featherweight import InputError, Task, load_task
from featherweight.rows import pieces
from featherweight.task import split


def refused(path: Path, **columns: Any) -> str:
    """The one line that this data set is refused with."""
    with pytest.raises(InputError) as caught:
        load_task(str(path), **columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(task: Task) -> list[str]:
    return [row.spans[0][0] for row in task.train + task.test]


@pytest.mark.parametrize("columns", [("text", "label"), ("Review", "Sentiment"), ("sentence", "class")])
def test_text_and_label_are_found_by_their_usual_names(tmp_path: Path, columns: tuple[str, str]) -> None:
    rows = [{"id": str(i), columns[0]: r["text"], columns[1]: r["label"]} for i, r in enumerate(tiny.reviews())]
    task = load_task(str(tiny.write(tmp_path / "a.csv", rows)))
    assert task.kind == "classification"
    assert task.labels == ["bad", "fine", "very bad"]
    row = next(r for r in task.train if r.place.endswith(":2"))
    assert row.spans == ((rows[0][columns[0]], False), (f"\n{columns[1].capitalize()}:", False), ("bad", True))
    assert (row.answer, row.label) == ("bad", 0)


def test_named_columns_win_over_the_usual_names(tmp_path: Path) -> None:
    rows = [{"text": "no", "label": "no", "body": r["text"], "mark": r["label"]} for r in tiny.reviews()]
    task = load_task(str(tiny.write(tmp_path / "a.csv", rows)), text_column="body", label_column="mark")
    assert set(texts(task)) == {r["body"] for r in rows}
    assert task.labels == ["bad", "fine", "very bad"]


@pytest.mark.parametrize("flag", ["text_column", "label_column", "prompt_column", "response_column"])
def test_a_missing_column_is_refused_with_the_columns_and_the_nearest(tmp_path: Path, flag: str) -> None:
    message = refused(tiny.write(tmp_path / "a.csv", tiny.reviews()), **{flag: "lable"})
    assert f"--{flag.replace('_', '-')}" in message
    assert "no column 'lable'; did you mean 'label'?; its columns are: text, label" in message


def test_columns_that_say_nothing_are_listed(tmp_path: Path) -> None:
    message = refused(tiny.write(tmp_path / "a.csv", [{"foo": "x", "bar": "y"}] * 4))
    assert "has the columns foo, bar" in message
    assert "--text-column" in message
    assert "--prompt-column" in message


def test_a_named_label_without_a_text_is_not_taken_for_something_else(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "response": "y", "mark": "z"}] * 9
    assert "name the --text-column too" in refused(tiny.write(tmp_path / "a.csv", rows), label_column="mark")
    assert "name the --label-column too" in refused(tmp_path / "a.csv", text_column="prompt")
    assert "not both kinds" in refused(tmp_path / "a.csv", label_column="mark", prompt_column="prompt")


def test_a_template_takes_several_columns_and_braces(tmp_path: Path) -> None:
    rows = [{"title": f"T{i}", "text": f"words {i}", "label": "ab"[i % 2]} for i in range(20)]
    rows[0]["title"] = ""  # not every row has a title
    task = load_task(str(tiny.write(tmp_path / "a.csv", rows)), template="{{{title}}} {text}\n{{x}} is:")
    spans = {r.place.rsplit(":", 1)[1]: r.spans for r in task.train + task.test}
    assert spans["3"] == (("{T1} words 1", False), ("\n{x} is:", False), ("b", True))
    assert spans["2"][0] == ("{} words 0", False)
    assert pieces("a {x}{y} b {{c}}") == ([("a ", "x"), ("", "y")], " b {c}")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{text", "is malformed"),
        ("text:", "names no column; write one as {text}"),
        ("{txet}:", "has no column 'txet'; did you mean 'text'?; its columns are: text, label"),
        ("{}:", "has no column ''"),
        ("{text} is {label}:", "gives the answer away"),
    ],
)
def test_a_broken_template_is_refused(tmp_path: Path, template: str, wanted: str) -> None:
    message = refused(tiny.write(tmp_path / "a.csv", tiny.reviews()), template=template)
    assert message.startswith("--template")
    assert wanted in message


def test_a_template_of_instructions_needs_the_prompt(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "a.jsonl", tiny.requests())
    assert "needs {prompt}" in refused(path, template="Question:")
    task = load_task(str(path), template="Q: {prompt}")
    assert all(t.startswith("Q: say ") for t in texts(task))


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "a.csv", [{"text": f"t{i}", "label": "fine"} for i in range(30)])
    assert "has one class only ('fine')" in refused(path)


def test_more_than_fifty_labels_are_taken_for_free_text(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": f"l{i % 51}"} for i in range(300)]
    message = refused(tiny.write(tmp_path / "a.csv", rows))
    assert "51 different labels" in message
    assert "--prompt-column" in message
    assert len(load_task(str(tiny.write(tmp_path / "b.csv", [r for r in rows if r["label"] != "l0"]))).labels) == 50


def test_a_label_unseen_in_training_is_refused_by_line(tmp_path: Path) -> None:
    train = tiny.write(tmp_path / "train.csv", tiny.reviews())
    test = tiny.write(tmp_path / "test.csv", [*tiny.reviews(3), {"text": "x", "label": "superb"}])
    message = refused(train, test_data=str(test))
    assert f"{test}:5: the label 'superb' is not among those of the training rows: bad, fine, very bad" in message


def test_an_empty_text_or_label_is_refused_by_line(tmp_path: Path) -> None:
    rows = tiny.reviews()
    path = tiny.write(tmp_path / "a.csv", [*rows[:4], {"text": " ", "label": "bad"}, *rows[4:]])
    assert f"{path}:6: the column 'text' is empty" in refused(path)
    path = tiny.write(tmp_path / "b.jsonl", [*rows[:4], {"text": "x", "label": None}])
    assert f"{path}:5: the column 'label' is empty" in refused(path)


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ({"a": 1}, "holds a dict, not a text"), (["x"], "holds a list, not a text"), (float("nan"), "is empty"),
        ("a \ud83d b", "holds half a character"), ("a\0b", "holds a NUL character"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_cell_that_is_no_text_is_refused_by_line(tmp_path: Path, column: str, cell: Any, wanted: str) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in tiny.reviews()]
    rows[4][column] = cell
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"rows.jsonl:5: the column '{column}' {wanted}"):
        load_task(str(path))


def test_training_rows_that_are_all_tested_on_are_refused_as_such(tmp_path: Path) -> None:
    path = str(tiny.write(tmp_path / "rows.csv", tiny.reviews()))
    with pytest.raises(InputError, match=r"every row of .* has the text of a test row"):
        load_task(path, test_data=path)


def test_a_complaint_is_short_however_long_what_it_is_about(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "rows.csv", [{f"c{i}": "x" * 1000 for i in range(2000)}] * 3)
    with pytest.raises(InputError) as caught:
        load_task(str(path))
    assert len(str(caught.value)) < 1000


def test_a_column_that_one_row_or_the_test_file_lacks_is_named(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "a.jsonl", [*tiny.reviews(), {"label": "bad", "words": "x"}])
    assert f"{path}:61: there is no column 'text'; there are: label, words" in refused(path)
    rows = [{**r, "title": "t"} for r in tiny.reviews()]
    train, test = tiny.write(tmp_path / "train.csv", rows), tiny.write(tmp_path / "test.csv", tiny.reviews(6))
    message = refused(train, test_data=str(test), template="{title}: {text}\nLabel:")
    assert f"{test}:2: there is no column 'title'; there are: text, label" in message


def test_the_split_is_seeded(tmp_path: Path) -> None:
    path = str(tiny.write(tmp_path / "a.csv", tiny.reviews()))
    first, again, other = (load_task(path, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert {r.place for r in first.test} != {r.place for r in other.test}
    assert sorted(r.place for r in first.train + first.test) == sorted(r.place for r in other.train + other.test)


def test_the_split_keeps_every_label_in_its_share(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "rare" if i % 10 == 0 else "common"} for i in range(400)]
    task = load_task(str(tiny.write(tmp_path / "a.csv", rows)), test_fraction=0.25)
    assert Counter(r.answer for r in task.test) == {"common": 90, "rare": 10}
    assert Counter(r.answer for r in task.train) == {"common": 270, "rare": 30}


def test_every_label_keeps_a_row_to_train_on(tmp_path: Path) -> None:
    rows = [*({"text": f"t{i}", "label": "common"} for i in range(20)), {"text": "one", "label": "single"}]
    task = load_task(str(tiny.write(tmp_path / "a.csv", rows)), test_fraction=0.9)
    assert task.labels == ["common", "single"]
    assert "single" in {r.answer for r in task.train}


@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_up_to_case_and_spaces_are_on_one_side(tmp_path: Path, seed: int) -> None:
    rows = [{"text": f"Some Text {i // 4}", "label": "ab"[i // 4 % 2]} for i in range(120)]
    for i in range(0, 120, 4):
        rows[i]["text"] = rows[i]["text"].upper()
        rows[i + 1]["text"] = rows[i + 1]["text"].replace(" ", "  ") + " "
    task = load_task(str(tiny.write(tmp_path / "a.csv", rows)), test_fraction=0.4, seed=seed)

    def seen(side: list[Any]) -> set[str]:
        return {" ".join(r.spans[0][0].lower().split()) for r in side}

    assert len(task.train) + len(task.test) == 120
    assert len(task.test) == 48
    assert not seen(task.train) & seen(task.test)


def test_fewer_test_rows_keep_the_shares(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "rare" if i % 5 == 0 else "common"} for i in range(400)]
    path = str(tiny.write(tmp_path / "a.csv", rows))
    full, task = (load_task(path, test_fraction=0.5, test_rows=n) for n in (None, 50))
    assert task.train == full.train
    assert Counter(r.answer for r in task.test) == {"common": 40, "rare": 10}
    assert {r.place for r in task.test} <= {r.place for r in full.test}


def test_a_few_test_rows_of_many_labels_are_still_some(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": f"l{i % 40}"} for i in range(400)]
    assert len(load_task(str(tiny.write(tmp_path / "a.csv", rows)), test_rows=8).test) == 8


def test_a_given_test_file_is_used_whole(tmp_path: Path) -> None:
    train = tiny.write(tmp_path / "train.csv", tiny.reviews())
    test = tiny.write(tmp_path / "test.jsonl", tiny.reviews(7))
    task = load_task(str(train), test_data=str(test))
    assert (len(task.train), task.leaked) == (53, 7)  # its seven texts are not trained on
    assert not {r.spans[0] for r in task.train} & {r.spans[0] for r in task.test}
    assert [r.place for r in task.test] == [f"{test}:{i}" for i in range(1, 8)]


def test_every_row_of_a_file_can_be_tested_on(tmp_path: Path) -> None:
    path = str(tiny.write(tmp_path / "a.csv", tiny.reviews(9)))
    bare = load_task(path, test_only=True)
    assert (len(bare.train), len(bare.test), bare.labels) == (0, 9, ["bad", "fine", "very bad"])
    fixed = load_task(path, test_only=True, labels=["very bad", "bad", "fine", "good"])
    assert fixed.labels == ["very bad", "bad", "fine", "good"]
    assert [r.label for r in fixed.test[:3]] == [1, 2, 0]
    with pytest.raises(InputError, match=r"a\.csv:4: the label 'very bad' is not among"):
        load_task(path, test_only=True, labels=["bad", "fine"])


def test_too_few_rows_to_test_on_are_refused(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "a.csv", tiny.reviews(6))
    assert "leaves no rows to test on" in refused(path)
    assert len(load_task(str(path), test_fraction=0.5).test) == 3


def test_a_few_requests_can_be_split_though_every_response_differs(tmp_path: Path) -> None:
    task = load_task(str(tiny.write(tmp_path / "a.jsonl", tiny.requests(30))))
    assert (task.kind, len(task.train), len(task.test)) == ("instructions", 27, 3)


@pytest.mark.parametrize("columns", [("prompt", "response"), ("instruction", "output"), ("question", "answer")])
def test_prompt_and_response_are_found_by_their_usual_names(tmp_path: Path, columns: tuple[str, str]) -> None:
    rows = [{columns[0]: r["prompt"], columns[1]: r["response"]} for r in tiny.requests()]
    task = load_task(str(tiny.write(tmp_path / "a.jsonl", rows)))
    row = next(r for r in task.train + task.test if r.place.endswith(":1"))
    assert row.spans == (("say film 0", False), ("film 0", True))
    assert row.messages == ({"role": "user", "content": "say film 0"}, {"role": "assistant", "content": "film 0"})
    assert (row.answer, row.label, task.labels) == ("film 0", None, [])


def test_labels_are_read_as_text_when_the_columns_are_named_so(tmp_path: Path) -> None:
    path = str(tiny.write(tmp_path / "a.csv", tiny.reviews()))
    task = load_task(path, prompt_column="text", response_column="label")
    assert (task.kind, task.labels) == ("instructions", [])


@pytest.mark.parametrize("style", ["openai", "sharegpt"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_are_read_in_both_styles(tmp_path: Path, style: str, suffix: str) -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    talk = [("system", "be kind"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    if style == "openai":
        rows = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in talk]} for i in range(10)]
    else:
        rows = [{"conversations": [{"from": names[r], "value": f"{c} {i}"} for r, c in talk]} for i in range(10)]
    task = load_task(str(tiny.write(tmp_path / f"a{suffix}", rows)), test_fraction=0.2)
    row = next(r for r in task.train + task.test if r.answer == "four 3")
    assert row.messages == tuple({"role": r, "content": f"{c} 3"} for r, c in talk)


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ("hello", "must be a list of messages"),
        ([], "must be a list of messages"),
        ([{"role": "user", "content": "x"}], "the last message must be the assistant's"),
        ([{"role": "assistant", "content": "x"}], "the last message must be the assistant's, after another's"),
        ([{"role": "robot", "content": "x"}], "a message needs a role"),
        ([{"role": "user"}], "a message needs a role"),
        (["x"], "a message needs a role"),
    ],
)
def test_broken_messages_are_refused_by_line(tmp_path: Path, messages: Any, wanted: str) -> None:
    fine = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = tiny.write(tmp_path / "a.jsonl", [{"messages": fine}, {"messages": messages}])
    message = refused(path)
    assert f"{path}:2: " in message
    assert wanted in message


def test_split_puts_the_wanted_share_of_groups_aside(tmp_path: Path) -> None:
    rows = load_task(str(tiny.write(tmp_path / "a.csv", tiny.reviews(300))), test_only=True).test
    for fraction in (0.1, 0.5, 0.9):
        train, test = split(rows, fraction, 0)
        assert len(test) == round(300 * fraction)
        assert sorted(r.place for r in train + test) == sorted(r.place for r in rows)


def test_an_instructions_input_is_part_of_its_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{i} and 1", "output": str(i + 1)} for i in range(20)]
    task = load_task(str(tiny.write(tmp_path / "alpaca.jsonl", rows)))
    assert task.kind == "instructions"
    assert len(task.train) + len(task.test) == 20
    assert all(r.spans[0][0].startswith("Add.\n\n") for r in task.train)
