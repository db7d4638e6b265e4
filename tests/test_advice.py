"""What is said of the numbers follows from the numbers."""

from __future__ import annotations

from featherweight.advice import advice, points, standings, verdict
from featherweight.results import Line
from featherweight.stats import Difference

MIB = 2**20
GOOD = [i % 10 != 0 for i in range(600)]
NEARLY = [right and i != 1 for i, right in enumerate(GOOD)]
BAD = [right and i % 3 != 0 for i, right in enumerate(GOOD)]


def a_line(
    name: str, right: list[bool], seed: int = 0, *, above: int = 100, seconds: float = 60, **more: object
) -> Line:
    trained = {} if more.get("kind") == "reference" else {"train_steps": 9, "train_seconds": float(seconds)}
    told = {
        "method": name.upper(), "correct": sum(right), "accuracy": sum(right) / len(right), "eval_seconds": 1.0,
        "tested": "rows", "before_bytes": 500 * MIB, "peak_bytes": (500 + above) * MIB, **trained, **more,
    }  # fmt: skip
    return Line(name=name, right=right, seed=seed, **told)  # type: ignore[arg-type]


def test_the_best_those_like_it_and_those_that_are_worse() -> None:
    words = verdict([a_line("a", NEARLY), a_line("b", GOOD), a_line("c", BAD)])
    assert words[0] == "best: B; not to be told apart from it (one seed, the same rows): A"
    assert words[1].startswith("worse than B: C (-30.0 points [-33.7, -26.3])")
    assert points(Difference(0.0125, (-0.02, 0.045), 0.5)) == "+1.2 points [-2.0, +4.5]"


def test_rows_with_other_seeds_or_tested_on_other_rows_are_not_compared() -> None:
    right = [True, False, True]
    assert [s.entry.first.name for s in standings([a_line("a", right), a_line("a", right, 1), a_line("b", right)])] == [
        "a"
    ]
    assert [s.entry.first.name for s in standings([a_line("a", right), a_line("b", right, tested="other")])] == ["a"]
    assert verdict([]) == []
    assert advice([]) == []


def test_what_no_seed_changes_is_compared_beside_several_seeds() -> None:
    lines = [a_line("a", GOOD, seed) for seed in range(3)] + [a_line("untouched", BAD, kind="reference")]
    assert "worse than A: UNTOUCHED (-30.0 points" in verdict(lines)[1]


def test_of_methods_that_cannot_be_told_apart_the_one_that_needs_least_memory_is_advised() -> None:
    lines = [a_line("a", GOOD, above=300), a_line("b", NEARLY, above=100), a_line("c", BAD, above=1)]
    use, cost, unknown = advice(lines)
    assert use.startswith(
        "advice: use B: 89.8 % right; of the 2 methods that cannot be told apart here it needs least memory"
    )
    assert "60 s of training, 100 MiB beyond what is held without training" in cost
    assert "A, B are one group; more test rows and seeds see more" in unknown


def test_where_memory_hardly_differs_the_fastest_is_advised() -> None:
    lines = [a_line("a", GOOD, above=105, seconds=10), a_line("b", NEARLY, above=100, seconds=50)]
    assert advice(lines)[0].startswith("advice: use A: ")
    assert "10 s of training" in advice(lines)[1]


def test_one_that_is_measurably_the_best_is_called_so() -> None:
    use, _, unknown = advice([a_line("a", GOOD), a_line("b", BAD)])
    assert use == "advice: use A: 90.0 % right, measurably the best method here after 9 steps"
    assert (
        unknown
        == "advice: with 600 test rows and one seed the best row is told apart from every other; of other seeds it is not known"
    )


def test_where_training_has_not_been_shown_to_help_that_comes_first() -> None:
    lines = [a_line("a", GOOD), a_line("untouched", NEARLY, kind="reference", general_loss=4.0)]
    assert advice(lines)[0].startswith(
        "advice: no method is measurably better here than this, which trains nothing: UNTOUCHED; if one, use A"
    )


def test_what_was_forgotten_and_what_is_kept_on_disk_are_part_of_the_cost() -> None:
    before = a_line("untouched", BAD, kind="reference", general_loss=4.0)
    cost = advice([a_line("a", GOOD, general_loss=4.25, adapter_bytes=1_860_000), before])[1]
    assert cost.endswith(
        "an adapter of 1.86 MB; the loss on text that has nothing to do with the task goes from 4.000 to 4.250"
    )


def test_full_fine_tuning_may_be_best_but_is_not_advised() -> None:
    lines = [a_line("full", GOOD, kind="reference", train_steps=9), a_line("a", NEARLY), a_line("b", BAD)]
    assert verdict(lines)[0].startswith("best: FULL; not to be told apart from it")
    assert advice(lines)[0].startswith("advice: use A: ")
