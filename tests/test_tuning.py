"""`compare --tune`: an equal search for every method, on rows that are neither trained on nor tested on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
from command import BARE, Cli
from featherweight import tuning
from featherweight.methods import METHODS, method_class
from featherweight.methods.options import build_method
from featherweight.results import read
from featherweight.tuning import Trial, candidates, hopeless


@pytest.fixture
def line(llama: Path, reviews: Path) -> Any:
    short = ("--steps", 10, "--dtype", "float32")
    return lambda *more: ("compare", *BARE, "--model", llama, "--data", reviews, *short, *more)


def trials(folder: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (Path(folder) / "trials.jsonl").read_text().splitlines()]


# --- what is tried ----------------------------------------------------------------------------------------------------------


def test_the_first_trial_is_the_method_as_it_is_and_the_others_spread_around_it() -> None:
    found = candidates(fw.LoRA(), 1e-3, 9, ())
    assert found[0] == ({}, 1e-3)
    assert len(found) == len({str(c) for c in found}) == 9
    rates = sorted(rate for _, rate in found)
    assert rates[0] >= 1e-4
    assert rates[-1] <= 1e-2
    assert sum(rate < 1e-3 for rate in rates) in (4, 5)
    assert {options.get("r", 8) for options, _ in found} == {2, 8, 32}
    assert candidates(fw.LoRA(), 1e-3, 4, ()) == found[:4]  # more trials fill the gaps


def test_what_somebody_has_chosen_is_not_searched() -> None:
    assert {str(options) for options, _ in candidates(fw.LoRA(r=64), 1e-3, 9, ("r",))} == {"{}"}
    assert {rate for _, rate in candidates(fw.LoRA(), 1e-3, 9, ("lr",))} == {1e-3}
    assert len(candidates(fw.IA3(), 1e-3, 9, ("lr",))) == 1  # nothing is left to search


@pytest.mark.parametrize("name", METHODS)
def test_the_sizes_of_a_method_are_options_that_it_has(name: str) -> None:
    for options in method_class(name).sizes:
        build_method(name, options)


# --- when a trial is given up -----------------------------------------------------------------------------------------------


def test_a_trial_behind_the_median_of_the_others_is_given_up_but_not_too_soon() -> None:
    others = [Trial({}, 1.0, [3, 2, 1, 1]), Trial({}, 1.0, [3, 2.5, 2, 2])]
    assert hopeless([9, 9, 1.6], others)
    assert not hopeless([9, 9], others)
    assert not hopeless([9, 1.4, 9], others)  # it was better before
    assert not hopeless([9, 9, 9], others[:1])  # one other is no median
    assert not hopeless([9, 9, 9], [*others[:1], Trial({}, 1.0, [3, 2])])  # nor one that never came so far
    assert hopeless([math.inf, math.inf, math.inf], others)


# --- in a comparison ----------------------------------------------------------------------------------------------------------


def test_every_method_gets_the_same_number_of_trials_and_the_best_is_what_runs(fw_cli: Cli, line: Any) -> None:
    done = fw_cli(*line("--methods", "lora,ia3", "--tune", 4, "--out", "table"))
    assert done.code == 0, done.err
    for row in read(Path("table")):
        tried = trials(f"table/{row.name}")
        assert len(tried) == 4
        best = min(tried, key=lambda t: min(x for x in t["losses"] if x is not None))
        assert row.lr == best["lr"]
        for option, value in best["options"].items():
            assert row.provenance["identity"]["options"][option] == value
        assert row.provenance["identity"]["lr"] == row.lr
        assert f"lr={row.lr:g}" in done.err
    adapter = json.loads(Path("table/lora/adapter_config.json").read_text())
    assert adapter["r"] == read(Path("table"))[0].provenance["identity"]["options"]["r"]


def test_the_search_sees_no_test_row_and_trains_on_no_row_it_validates_on(
    fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[str], set[str]]] = []
    first = tuning.fit_with_bar

    def fit(base: Any, examples: Any, settings: Any, title: str, *, validation: Any, **more: Any) -> Any:
        seen.append(({e.row.place for e in examples}, {e.row.place for e in validation}))
        return first(base, examples, settings, title, validation=validation, **more)

    monkeypatch.setattr(tuning, "fit_with_bar", fit)
    assert fw_cli(*line("--methods", "ia3", "--tune", 2, "--out", "table")).code == 0
    tested = {json.loads(r)["place"] for f in Path("table").glob("tested-*") for r in f.read_text().splitlines()}
    assert len(seen) == 2
    for trained, validated in seen:
        assert not trained & validated
        assert not (trained | validated) & tested
        assert len(trained) + len(validated) + len(tested) == 60


def test_trials_are_not_made_twice(fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    first = tuning.fit_with_bar

    def fit(base: Any, examples: Any, settings: Any, title: str, **more: Any) -> Any:
        made.append(title)
        if len(made) == 2:
            raise KeyboardInterrupt
        return first(base, examples, settings, title, **more)

    monkeypatch.setattr(tuning, "fit_with_bar", fit)
    assert fw_cli(*line("--methods", "ia3", "--tune", 3)).code == 130
    assert len(trials("runs/compare-001/ia3")) == 1
    done = fw_cli(*line("--methods", "ia3", "--tune", 3))
    assert done.code == 0, done.err
    assert made[2:] == ["(IA)³, trial 2 of 3", "(IA)³, trial 3 of 3"]
    assert len(read(Path("runs/compare-001"))) == 1


def test_a_trial_that_diverges_does_not_win(fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda *_: [({}, 1e-2), ({}, 50.0)])
    assert fw_cli(*line("--methods", "lora", "--tune", 2, "--out", "table")).code == 0
    assert read(Path("table"))[0].lr == 1e-2


def test_a_search_is_made_with_the_settings_of_the_run_it_is_for(
    fw_cli: Cli, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own batch and budget; and a trial under other settings is another trial."""
    seen: list[tuple[int, int]] = []
    first = tuning.fit_with_bar

    def fit(base: Any, examples: Any, settings: Any, title: str, **more: Any) -> Any:
        seen.append((settings.batch_size, settings.steps))
        return first(base, examples, settings, title, **more)

    monkeypatch.setattr(tuning, "fit_with_bar", fit)
    asked = line("--methods", "ia3:batch_size=2", "--tune", 2, "--tokens", 200, "--out", "table")
    assert fw_cli(*(word for word in asked if word not in ("--steps", 10))).code == 0
    [row] = read(Path("table"))
    assert seen == [(2, row.train_steps)] * 2
    asked = (*asked, "--warmup", 0.5)
    assert fw_cli(*(word for word in asked if word not in ("--steps", 10))).code == 0
    assert len(seen) == 4
