"""`featherweight report`: several comparisons in one table, nothing mixed that does not belong together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from command import BARE, Cli, complaint
from featherweight.merged import kept_apart
from featherweight.report import gathered, title_of
from featherweight.results import Line, read, write


def a_line(name: str = "lora", **more: Any) -> Line:
    provenance = {"machine": "one", "base": "models/small", "data": "films.csv"} | more.pop("provenance", {})
    return Line(name=name, method=name.upper(), right=[True, False], tested="a", provenance=provenance, **more)


def titles(lines: list[Line]) -> list[str]:
    return [line.method for line in kept_apart(lines)]


def test_seeds_are_one_row_and_machines_models_data_and_settings_are_not() -> None:
    one = a_line(identity="x")
    assert titles([one, replace(one, seed=1)]) == ["LORA", "LORA"]
    assert titles([one, a_line(provenance={"machine": "two"})]) == ["LORA · A", "LORA · B"]
    assert titles([one, a_line(provenance={"base": "models/large"})]) == ["LORA · small", "LORA · large"]
    assert titles([one, replace(a_line(provenance={"data": "tweets"}), tested="b")]) == [
        "LORA · films.csv",
        "LORA · tweets",
    ]
    assert titles([one, replace(one, tested="b")]) == ["LORA · rows 1", "LORA · rows 2"]
    few, many = (a_line(provenance={"identity": {"steps": n, "seed": n, "lr": 0.1}}) for n in (100, 200))
    assert titles([few, many]) == ["LORA · steps=100", "LORA · steps=200"]
    assert [line.name for line in kept_apart([few, many])] == ["lora", "lora · steps=200"]


def test_two_comparisons_become_one_report(fw_cli: Cli, llama: Path, reviews: Path) -> None:
    common = ("compare", *BARE, "--model", llama, "--data", reviews, "--dtype", "float32")
    assert fw_cli(*common, "--methods", "lora", "--steps", 2, "--out", "one").code == 0
    assert fw_cli(*common, "--methods", "ia3,lora", "--steps", 3, "--out", "two").code == 0
    done = fw_cli("report", "one", "two", "--out", "all")
    assert done.code == 0, done.err
    for title in ("LoRA · steps=2", "LoRA · steps=3", "(IA)³"):
        assert f"| {title} |" in done.out
        assert title in Path("all/report.html").read_text()
    assert len(read(Path("all"))) == 3
    assert [line.name for line in read(Path("all"))] == ["lora", "ia3", "lora"]  # as they were: it can be merged again
    again = fw_cli("report", "all", "one", "--out", "again")
    assert again.code == 0, again.err
    assert len(read(Path("again"))) == 3
    assert list(Path("again/figures").glob("*.svg"))
    assert list(Path("again").glob("tested-*.jsonl"))
    assert "https://" not in Path("all/report.html").read_text().replace("http://www.w3.org", "")


def test_every_comparison_ends_with_its_page(fw_cli: Cli, llama: Path, reviews: Path) -> None:
    common = (
        "compare",
        "--no-isolate",
        "--general-text",
        "none",
        "--model",
        llama,
        "--data",
        reviews,
        "--dtype",
        "float32",
    )
    assert fw_cli(*common, "--methods", "ia3", "--steps", 2, "--out", "one").code == 0
    page = Path("one/report.html").read_text()
    assert "<title>llama on reviews.csv</title>" in page
    assert "Majority class (bad)" in page
    assert {p.suffix for p in Path("one/figures").iterdir()} == {".png", ".svg"}


def test_a_run_that_is_in_two_folders_counts_once_but_not_one_of_another_machine(tmp_path: Path) -> None:
    for folder, lines in {
        "a": [a_line(identity="x", train_seconds=1.0)],
        "b": [a_line(identity="x", train_seconds=2.0), a_line(identity="x", provenance={"machine": "two"})],
    }.items():
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, lines)
    found = gathered([tmp_path / "a", tmp_path / "b"])
    assert [(line.provenance["machine"], line.train_seconds) for line in found] == [("one", 2.0), ("two", 0.0)]


def test_a_title_says_what_was_compared() -> None:
    assert title_of([a_line()]) == "small on films.csv"
    assert title_of([replace(a_line(), provenance={})]) == "A comparison"


def test_a_folder_without_runs_is_refused(fw_cli: Cli, in_tmp: Path) -> None:
    (in_tmp / "empty").mkdir()
    assert "empty holds no runs of a comparison" in complaint(fw_cli("report", "empty"))
    (in_tmp / "broken").mkdir()
    (in_tmp / "broken/rows.jsonl").write_text(json.dumps({"name": 3}) + "\nnot json\n")
    assert "broken holds no runs of a comparison" in complaint(fw_cli("report", "broken"))
    assert "Missing argument" in complaint(fw_cli("report"))
    assert not Path("runs").exists()
