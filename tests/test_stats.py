"""Intervals and tests do what their names promise: shown on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.stats import accuracy, difference, told_apart, wilson

TIMES = 300


def answers(
    rng: np.random.Generator, seeds: int, n: int, *, accuracy: float = 0.8, between_seeds: float = 0.0
) -> np.ndarray:
    """Right answers where rows are of different difficulty, and seeds of different luck."""
    difficulty, luck = rng.normal(0, 1.0, n), rng.normal(0, between_seeds, (seeds, 1))
    threshold = np.sqrt(1 + between_seeds**2 + 0.25) * _quantile(accuracy)
    return difficulty + luck + rng.normal(0, 0.5, (seeds, n)) < threshold


def _quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, table I (method 3): 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for correct, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    low, high = wilson(20, 20)
    assert high == pytest.approx(1)
    assert low == pytest.approx(1 - 0.1611, abs=5e-5)


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (3, 0.0), (3, 0.3), (5, 0.3)])
def test_a_95_percent_interval_holds_the_truth_about_95_times_in_100(seeds: int, luck: float) -> None:
    rng = np.random.default_rng(1)
    found = [accuracy(answers(rng, seeds, 300, between_seeds=luck)).interval for _ in range(TIMES)]
    held = sum(low <= 0.8 <= high for low, high in found) / TIMES
    assert 0.92 <= held <= 0.995


def test_an_interval_of_the_rows_alone_would_be_too_narrow_where_seeds_differ() -> None:
    """Why seeds are counted: the same data, as if all answers were one seed's."""
    rng = np.random.default_rng(2)
    found = [answers(rng, 3, 300, between_seeds=0.3) for _ in range(TIMES)]
    pooled = [wilson(int(right.sum()), right.size) for right in found]
    assert sum(low <= 0.8 <= high for low, high in pooled) / TIMES < 0.85


@pytest.mark.parametrize("seeds", [1, 3])
def test_two_equal_methods_are_told_apart_about_5_times_in_100(seeds: int) -> None:
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(TIMES):
        both = answers(rng, 2 * seeds, 300, between_seeds=0.2)  # of one kind: rows are alike, seeds are not
        if seeds == 1:  # one seed says nothing of seeds: equal means equal but for the rows
            both = answers(rng, 2, 300)
        wrong += difference(both[:seeds], both[seeds:]).p < 0.05
    assert wrong / TIMES <= (0.07 if seeds == 1 else 0.09)  # three seeds: 7.5 seen; what they differ by is hardly known


def test_a_difference_on_the_same_rows_is_seen_where_two_intervals_overlap() -> None:
    rng = np.random.default_rng(4)
    hard = rng.random(600) < 0.2
    a = ~hard[None]
    b = a & (rng.random(600) > 0.03)
    (_, low_a), (_, high_b) = (accuracy(a).interval[1], accuracy(a).interval[0]), accuracy(b).interval
    assert low_a < high_b  # they overlap
    found = difference(a, b)
    assert found.p < 0.01
    assert found.interval[0] > 0


def test_mcnemars_exact_test_counts_the_rows_that_differ() -> None:
    a, b = np.zeros((1, 20), bool), np.zeros((1, 20), bool)
    a[0, :8], b[0, 8:10] = True, True
    assert difference(a, b).p == pytest.approx(0.109375)  # 2 · P(X ≤ 2), X of 10 fair coins


def test_what_never_differs_is_not_told_apart() -> None:
    right = np.random.default_rng(5).random((3, 50)) < 0.7
    same = difference(right, right)
    assert (same.mean, same.p) == (0, 1)
    assert told_apart([right, right]) == [False, False]


def test_many_comparisons_with_the_best_do_not_make_chance_a_finding() -> None:
    """Holm's correction: of nine equal methods and the best of them, one is seldom called worse."""
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(200):
        wrong += any(told_apart(list(answers(rng, 10, 200)[:, None])))
    assert wrong / 200 <= 0.15  # the best of ten is the luckiest too, which no pairwise correction knows


def test_methods_that_are_worse_are_told_apart_and_others_are_not() -> None:
    rng = np.random.default_rng(7)
    hard = rng.random(600) < 0.15
    good = [~hard & (rng.random(600) > 0.01) for _ in range(2)]
    bad = ~hard & (rng.random(600) > 0.2)
    assert told_apart([np.array([x]) for x in (*good, bad)]) == [False, False, True]


def test_rows_of_different_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same rows and seeds"):
        difference(np.ones((1, 3)), np.ones((1, 4)))
