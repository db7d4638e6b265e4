"""What is said besides an accuracy."""

from __future__ import annotations

from pathlib import Path

import pytest

import featherweight as fw
import tiny
from command import Cli
from featherweight.caveats import of_labels, of_result, unlearned
from featherweight.scoring import Score


def task_with(folder: Path, **counts: int) -> fw.Task:
    rows = [{"text": f"{label} {i}", "label": label} for label, n in counts.items() for i in range(n)]
    return fw.load_task(str(tiny.write(folder / "rows.csv", rows)), test_fraction=0.3)


def scored(task: fw.Task, right: int) -> Score:
    n = len(task.test)
    answers = [row.answer for row in task.test]
    return Score(right, n, answers, answers, [""] * n, 1.0, 1, "labels")


def test_a_label_that_looks_misspelt_is_named_with_what_was_meant(tmp_path: Path) -> None:
    assert of_labels(task_with(tmp_path, fees=20, feees=1, loans=20, zoo=2)) == [
        "the label 'feees' has 1 row in all; did you mean 'fees'?",
        "the label 'zoo' has 2 rows in all",
    ]
    assert of_labels(task_with(tmp_path, fees=20, loans=20)) == []


def test_a_loss_above_that_of_a_lot_has_learned_nothing_yet() -> None:
    assert unlearned([9.0, 8.0, 7.0, 1.5], ["a", "b", "c", "d"]) == (
        "its loss at the end was 1.50, and drawing a label by lot would give 1.39"
    )
    assert unlearned([9.0, 8.0, 7.0, 1.3], ["a", "b", "c", "d"]) is None
    assert unlearned([None, None], ["a", "b"]) is None
    assert unlearned([], ["a", "b"]) is None
    assert unlearned([9.0], []) is None  # a task without labels


def test_an_accuracy_is_held_against_the_most_frequent_label(tmp_path: Path) -> None:
    task = task_with(tmp_path, fees=60, loans=40)
    n = len(task.test)
    always = "always answering 'fees' would be right for 60.0 %"
    assert of_result(scored(task, n), task, [0.1]) == [always]
    assert of_result(scored(task, n // 2), task, [0.1]) == [
        always, "this adapter is not better than that: train longer (--steps), with more rows, or at another rate (--lr)",
    ]  # fmt: skip
    assert (
        of_result(scored(task, round(0.7 * n)), task, [0.1])[1] == "with so few test rows the two cannot be told apart"
    )
    assert "has not learned enough yet: its loss at the end was 3.00" in of_result(scored(task, n), task, [3.0])[1]


@pytest.mark.parametrize("steps", [1])
def test_train_says_how_a_row_is_written_and_what_needs_no_model(
    fw_cli: Cli, llama: Path, in_tmp: Path, steps: int
) -> None:
    task_with(in_tmp, fees=20, feees=1, loans=20)
    done = fw_cli("train", "--model", llama, "--data", "rows.csv", "--steps", steps, "--test-fraction", 0.3)
    assert r"a row is written as '{text}\nLabel:', and its label after it" in done.err
    assert "the label 'feees' has 1 row in all; did you mean 'fees'?" in done.err
    assert "it has not learned enough yet" in done.err
    assert "would be right for" in done.err
