"""The figures of a comparison: what is on the front, what is drawn of which runs, and that the same runs are the same bytes."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from subprocess import run
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from comparisons import METHODS, TESTED, comparison, diverged, line, majority, provenance, rows, stored, untouched
from featherweight import figures, merged
from featherweight.figures import accuracies, confusion, drawing, front, placing, trails
from featherweight.results import Line, read

ALL = {
    "accuracy", "accuracy-parameters", "accuracy-memory", "accuracy-time", "learning-curves", "memory-over-a-step", "confusion",
}  # fmt: skip
KNOWN = {TESTED: rows()}


def words(shown: figures.Shown) -> list[str]:
    """The texts of a figure's drawings, and the names of its panels."""
    nodes = [node for part in shown.parts for node in ElementTree.fromstring(part.svg).iter()]
    return [part.name for part in shown.parts] + ["".join(n.itertext()) for n in nodes if n.tag.endswith("text")]


def svg(shown: figures.Shown) -> str:
    """All its drawings, one after the other."""
    return "".join(part.svg for part in shown.parts)


def drawn(lines: list[Line], known: figures.Tested = KNOWN) -> dict[str, figures.Shown]:
    return {shown.name: shown for shown in figures.show(lines, known)}


# --- the front ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([], []),
        ([(1, 0.5)], [0]),
        ([(1, 0.5), (2, 0.6), (3, 0.55)], [0, 1]),
        ([(3, 0.9), (2, 0.8), (1, 0.7)], [2, 1, 0]),
        ([(1, 0.9), (2, 0.9)], [0]),
        ([(1, 0.8), (1, 0.9)], [1]),
        ([(1, 0.9), (1, 0.9)], [0, 1]),
    ],
)
def test_the_front_holds_what_nothing_beats_in_both(points: list[tuple[float, float]], best: list[int]) -> None:
    assert front.pareto(points) == best


def test_the_caption_names_the_front() -> None:
    lines = [line("a", "Alpha", 0.7, 10), line("b", "Beta", 0.9, 100), line("c", "Gamma", 0.8, 1000)]
    assert "(Alpha, Beta)" in drawn(lines)["accuracy-parameters"].caption


def test_what_was_not_trained_is_a_level_and_no_point() -> None:
    lines = comparison(1)
    assert {p.title for p in front.points(lines, front.PARAMETERS)} >= {"LoRA", "full fine-tuning"}
    assert not {"untouched model", "majority class"} & {p.title for p in front.points(lines, front.PARAMETERS)}
    assert [name for name, _ in front.levels(lines)] == ["untouched model", "majority class"]
    told = words(drawn(lines)["accuracy-time"])
    assert {f"untouched model {100 * untouched().accuracy:.1f}", "↓ majority class 45.0"} <= set(told)


def test_accuracy_is_drawn_of_every_row_however_far_below_the_best_first() -> None:
    lines = [*comparison(1), diverged()]
    told = words(drawn(lines)["accuracy"])
    rows_of = accuracies.accuracies(lines)
    assert {"majority class", "untouched model", "LoRA (r=1)", "Prefix-Tuning (num_virtual_tokens=50)"} <= set(told)
    assert len(rows_of) == len(lines)
    assert [row.mean for row in rows_of] == sorted((row.mean for row in rows_of), reverse=True)
    assert {f"{100 * row.mean:.1f}" for row in rows_of} <= set(told)


def test_rows_below_the_others_have_their_place_where_that_does_not_flatten_the_others() -> None:
    low = [line(f"low{i}", f"Low {i}", 0.58, 1000 * (i + 1)) for i in range(3)]
    found = front.points([*comparison(1)[:5], *low], front.PARAMETERS)
    assert min(p.accuracy for p in found) < 0.62
    told = words(drawn([*comparison(1)[:5], *low])["accuracy-parameters"])
    assert {"Low 0", "Low 1", "Low 2"} <= set(told)  # at the edge it would have its number too


def test_a_row_far_below_or_far_dearer_is_told_at_the_edge_and_does_not_flatten_the_others() -> None:
    broken = [line("lora:r=1", "LoRA (r=1)", 0.1, 57_000, 1200, seed=seed) for seed in range(3)]
    told = words(drawn([*comparison(3), *broken])["accuracy-memory"])
    assert any(re.fullmatch(r"LoRA \(r=1\) \d+\.\d", word) for word in told)
    assert "full fine-tuning → 2,350" in told


# --- names ----------------------------------------------------------------------------------------------------------------


def apart(boxes: list[placing.Box]) -> bool:
    """No box lies on another."""
    return not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in combinations(boxes, 2))


@pytest.mark.parametrize("seed", range(5))
def test_names_do_not_lie_on_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in zip(rng.uniform(150, 300, 12), rng.uniform(100, 200, 12), strict=True)]
    sizes = [(float(width), 12.0) for width in rng.uniform(30, 130, 12)]
    boxes = placing.place(points, sizes, [], (0, 0, 480, 300))
    assert apart(boxes)
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 480 and box[3] <= 300 for box in boxes)


STORED = Path(__file__).parent.parent / "benchmarks/results"


@pytest.mark.parametrize(
    "lines",
    [comparison(1), comparison(3), read(STORED / "default"), read(STORED / "tweets"), stored()],
    ids=["one seed", "three seeds", "default", "tweets", "encoder"],
)
def test_no_name_is_crossed_by_a_line_or_lies_on_another(monkeypatch: pytest.MonkeyPatch, lines: list[Line]) -> None:
    """On a page and on a phone: neither by the front nor by an interval, a reference or what leads to another's name."""
    seen: list[list[placing.Box]] = []
    place, freest = placing.place, placing.freest

    def placed(points: Any, sizes: Any, marks: Any, frame: Any) -> list[placing.Box]:
        boxes = place(points, sizes, marks, frame)
        seen.append(boxes)
        assert all(apart([box, mark]) for box in boxes for mark in marks)
        crossed = placing._inside(leaders(boxes, points), np.array(boxes)).any(1)
        assert not (crossed & ~np.eye(len(boxes), dtype=bool)).any()
        return boxes

    def written(boxes: Any, marks: Any) -> placing.Box:
        box = freest(boxes, marks)
        assert all(apart([box, mark]) for mark in marks)
        return box

    monkeypatch.setattr(placing, "place", placed)
    monkeypatch.setattr(placing, "freest", written)
    figures.show(lines, {})
    assert len(seen) == 6
    assert all(boxes and apart(boxes) for boxes in seen)


def leaders(boxes: list[placing.Box], points: list[tuple[float, float]]) -> np.ndarray:
    """Places on the way from each point to its name."""
    return np.concatenate([placing._line(np.array([box]), point) for box, point in zip(boxes, points, strict=True)])


# --- curves ---------------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_smoothed_mean_of_its_seeds() -> None:
    lines = [line("a", "A", 0.8, losses=[level] * 40, seed=seed) for seed, level in enumerate((1.0, 2.0, 6.0))]
    [curve] = trails.curves(lines)
    assert curve.mean == pytest.approx(3.0)
    assert curve.runs.shape == (3, 40)
    assert (curve.at[0], curve.at[-1]) == (1, 40)


def test_a_loss_that_is_not_finite_is_a_gap_with_words() -> None:
    [curve] = trails.curves([diverged()])
    assert curve.lost == 41
    assert np.isfinite(curve.mean[:40]).all()
    assert np.isnan(curve.mean[40:]).all()
    assert "no finite loss at step 41" in words(drawn([diverged(), *comparison(1)])["learning-curves"])


def test_runs_of_different_length_and_a_run_without_any_finite_loss_are_drawn() -> None:
    lines = [line("a", "A", 0.8, losses=[1.0] * 10), line("a", "A", 0.8, losses=[3.0] * 20, seed=1)]
    [curve] = trails.curves(lines)
    assert (curve.mean[0], curve.mean[-1]) == (2.0, 3.0)
    assert "learning-curves" in drawn([line("b", "B", 0.8, losses=[None] * 10)])


def test_memory_is_of_the_run_whose_peak_is_the_middle_one() -> None:
    lines = [line("a", "A", 0.8, mib=mib, seed=seed) for seed, mib in enumerate((900, 1500, 1000))]
    [step] = trails.steps(lines)
    assert max(step.mebibytes) == pytest.approx(1000, abs=1)


# --- confusion ------------------------------------------------------------------------------------------------------------


def test_a_confusion_matrix_is_shares_of_each_right_answer_over_all_seeds() -> None:
    known = {"t": [{"text": "", "answer": answer} for answer in "aabb"]}
    lines = [
        Line("m", "M", tested="t", predictions=list("abbb"), right=[True, False, True, True]),
        Line("m", "M", tested="t", predictions=list("aabb"), right=[True] * 4, seed=1),
    ]
    [matrix] = confusion.matrices(lines, known)
    assert matrix.labels == ["a", "b"]
    assert matrix.share.tolist() == [[0.75, 0.25], [0.0, 1.0]]


def test_without_labels_or_right_answers_there_is_no_confusion() -> None:
    texts = [line("a", "A", 0.8, metric="exact_match"), line("b", "B", 0.7, metric="exact_match")]
    assert "confusion" not in drawn(texts)
    assert "confusion" not in drawn(comparison(1), {})


@pytest.mark.parametrize("name", ["learning-curves", "memory-over-a-step", "confusion"])
def test_a_page_has_every_panel_by_itself_under_its_whole_name(name: str) -> None:
    parts = drawn(comparison(1))[name].parts
    assert "Prefix-Tuning (num_virtual_tokens=50)" in [part.name for part in parts]
    assert len(parts) == len({x.name for x in comparison(1) if x.losses or name == "confusion"})


def test_what_is_crowded_is_drawn_once_more_for_a_phone() -> None:
    broad, narrow = drawn(comparison(1))["accuracy-time"].parts
    assert (broad.screen, narrow.screen) == ("broad", "narrow")
    assert 'viewBox="0 0 344' in narrow.svg


# --- what is drawn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_figure_is_there_and_names_every_method(seeds: int) -> None:
    found = drawn(comparison(seeds))
    assert set(found) == ALL
    for name in (
        "accuracy",
        "accuracy-parameters",
        "accuracy-memory",
        "accuracy-time",
        "learning-curves",
        "memory-over-a-step",
        "confusion",
    ):
        told = " ".join(words(found[name]))
        assert all(title.split(" (num")[0] in told for _, title, *_ in METHODS), name


def test_one_line_and_rows_of_an_older_version_are_drawn() -> None:
    assert "accuracy-parameters" in drawn([line("a", "A", 0.8)])
    old = [replace(x, right=[], memory_over_step=[], tested="", peak_bytes=0) for x in comparison(1)]
    assert set(drawn(old)) == {"accuracy", "accuracy-parameters", "accuracy-time", "learning-curves"}
    assert drawn([]) == {}
    assert drawn([untouched(), majority()]).keys() == {"accuracy", "confusion"}


def test_the_stored_comparison_is_drawn() -> None:
    """Of a version that stored fewer figures."""
    assert {"accuracy", "accuracy-parameters", "accuracy-memory", "accuracy-time", "learning-curves"} <= set(
        drawn(stored())
    )


def test_two_machines_never_share_a_front() -> None:
    other = [replace(x, provenance=provenance("another machine")) for x in comparison(1) if x.name in ("lora", "ia3")]
    found = drawn([*comparison(1), *other])
    assert {"accuracy-memory-a", "accuracy-memory-b", "accuracy-time-a", "accuracy-time-b"} <= set(found)
    on_b = words(found["accuracy-time-b"])
    assert {"LoRA", "(IA)³"} <= set(on_b)
    assert not any(title in on_b for _, title, *_ in METHODS if title not in ("LoRA", "(IA)³"))
    assert {"LoRA · A", "LoRA · B", "AdaLoRA"} <= set(words(found["accuracy-parameters"]))


def test_a_method_has_the_same_colour_on_every_machine() -> None:
    other = [replace(x, provenance=provenance("another machine")) for x in comparison(1)[3:5]]
    lines = [*comparison(1)[:5], *other]
    assert [c.title for c in trails.curves(merged.kept_apart(lines))][-2:] == ["Prompt Tuning · B", "P-Tuning · B"]
    on_b = svg(drawn(lines)["accuracy-memory-b"])
    assert "var(--series-3)" in on_b
    assert "var(--series-0)" not in on_b


# --- the files ------------------------------------------------------------------------------------------------------------


def test_every_figure_is_saved_as_png_and_svg(tmp_path: Path) -> None:
    (tmp_path / f"tested-{TESTED}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    assert {shown.name for shown in figures.save(tmp_path, comparison(1)[:3])} == ALL
    for name in ALL:
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        root = ElementTree.fromstring((tmp_path / f"figures/{name}.svg").read_bytes())
        assert root.tag.endswith("svg")
        assert not [node for node in root.iter() if node.tag.endswith("image")]
    assert not list((tmp_path / "figures").glob(".*"))


def test_the_same_runs_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from comparisons import comparison, rows, TESTED; from featherweight import figures;"
        "figures.save(pathlib.Path(sys.argv[1]), comparison(1)[:3], {TESTED: rows()})"
    )
    run([sys.executable, "-c", code, tmp_path / "a"], check=True, cwd=Path(__file__).parent)
    figures.save(tmp_path / "b", comparison(1)[:3], KNOWN)
    for file in (tmp_path / "a/figures").iterdir():
        assert file.read_bytes() == (tmp_path / "b/figures" / file.name).read_bytes(), file.name


def test_a_figure_for_a_page_takes_its_colours_and_shares_no_name_with_another() -> None:
    found = drawn(comparison(1))
    names: set[str] = set()
    for name, text in ((shown.name, part.svg) for shown in found.values() for part in shown.parts):
        assert "var(--soft)" in text
        assert re.search(r"var\(--series-\d\)|currentColor", text) or name == "confusion"
        assert not re.search(r"#[0-9a-f]{6}", text), name
        assert not re.search(r"<style|<metadata|https?:", text)
        own = re.findall(r'\bid="([^"]+)"', text)
        assert len(own) == len(set(own))
        assert not names & set(own)
        assert {found[1:] for found in re.findall(r'href="([^"]+)"', text)} <= set(own)
        names |= set(own)


def test_drawing_leaves_the_settings_of_matplotlib_as_they_are() -> None:
    import matplotlib

    def now() -> dict[str, object]:  # to look at "backend" is to choose one
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = now()
    figures.show(comparison(1)[:2], KNOWN)
    assert now() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_importing_figures_does_not_import_matplotlib() -> None:
    run([sys.executable, "-c", "import sys, featherweight.page; assert 'matplotlib' not in sys.modules"], check=True)


def test_hostile_names_are_drawn_as_text() -> None:
    bad = '</svg><script>alert(1)</script> $x^2$ "&\u202e\x00'
    for shown in drawn([line("x", bad, 0.8), line("y", "語" * 40, 0.7)]).values():
        assert "<script" not in svg(shown)
        assert "\u202e" not in "".join(words(shown))


# --- the colours ----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [drawing.LIGHT, drawing.DARK], ids=["light", "dark"])
def test_colours_have_the_contrast_that_wcag_aa_asks_for(colours: dict[str, str]) -> None:
    for name in ("ink", "soft", "accent"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for i in range(drawing.SERIES):
        assert contrast(colours[f"series-{i}"], colours["paper"]) >= 3, i
    mixed = [
        round(
            confusion.DARKEST * int(colours["accent"][i : i + 2], 16)
            + (1 - confusion.DARKEST) * int(colours["paper"][i : i + 2], 16)
        )
        for i in (1, 3, 5)
    ]
    assert contrast(colours["ink"], "#{:02x}{:02x}{:02x}".format(*mixed)) >= 4.5
