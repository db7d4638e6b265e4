"""The house itself: names, registry, docs and examples agree."""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest

import featherweight
from contract import PROMISES
from featherweight.method import Method, Part
from featherweight.methods import METHODS, method_class, method_name

ROOT = Path(__file__).parent.parent


def test_every_public_name_exists_and_no_other_is_promised():
    for name in featherweight.__all__:
        assert getattr(featherweight, name) is not None
    mirrored = {
        alias.name
        for node in ast.walk(ast.parse((ROOT / "src/featherweight/__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert mirrored == set(featherweight.__all__) - {"__version__"}


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = featherweight.nope


@pytest.mark.parametrize("name", METHODS)
def test_every_method_explains_itself_and_has_an_example(name):
    cls = method_class(name)
    assert issubclass(cls, Method)
    assert method_name(cls()) == name
    text = importlib.import_module(cls.__module__).__doc__ or ""
    for heading in ("Paper:", "Trainable parameters:", "When to use it:", "When not:", "What it costs:", "The idea."):
        assert heading in text, f"{name}: its docstring lacks {heading!r}"
    assert re.search(r"arXiv:\d{4}\.\d{5}", cls.paper)
    assert (ROOT / f"examples/{name}.py").is_file()


def test_examples_are_at_most_forty_lines():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


def test_the_readme_starts_with_the_two_commands():
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    assert blocks[0] == "pip install . && featherweight compare\n"
    assert blocks[1] == 'pip install -e ".[dev]" && pytest\n'


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_promises_lists_every_promise_as_it_is_tested():
    page = (ROOT / "docs/what-you-can-rely-on.md").read_text()
    for promise in PROMISES:
        allowed = "bit for bit" if promise.limit == 0 else f"≤ {promise.limit:g}"
        assert f"| {promise.number} | {promise.text} | {allowed} | [`{promise.name}`]" in page


def test_no_device_is_spelled_out_in_the_engine():
    for path in (ROOT / "src/featherweight/engine").glob("*.py"):
        assert "cuda" not in path.read_text(), path.name


def test_one_room_knows_what_transformers_calls_a_cache():
    """Its name has changed once; a warning of its old one is not an error in these tests, because HF PEFT causes it."""
    for path in (ROOT / "src/featherweight").rglob("*.py"):
        assert path.name == "calls.py" or "past_key_values" not in path.read_text(), path.name


def test_a_part_that_adds_nothing_is_the_call_itself():
    assert Part()(lambda x, y=0: x + y, 2, y=3) == 5


@pytest.mark.parametrize("name", METHODS)
def test_the_default_rate_is_the_best_of_the_stored_search(name):
    trials = [json.loads(line) for line in (ROOT / "benchmarks/results/tune.jsonl").read_text().splitlines()]
    own = [t for t in trials if t["method"] == name and t["options"] == {}]
    assert len(own) >= 4
    best = max(own, key=lambda t: t["validation_accuracy"])
    assert method_class(name).learning_rate == best["lr"]


@pytest.mark.parametrize("name", METHODS)
def test_the_default_rate_on_an_encoder_cannot_be_told_from_the_best_of_the_stored_search(name):
    trials = [json.loads(line) for line in (ROOT / "benchmarks/results/tune_encoder.jsonl").read_text().splitlines()]
    own = {t["lr"]: t for t in trials if t["method"] == name}
    assert len(own) >= 4
    best = max(own.values(), key=lambda t: t["validation_accuracy"])
    assert own[method_class(name).encoder_learning_rate]["interval"][1] >= best["interval"][0]


def test_the_readme_shows_the_table_that_was_stored():
    table, notes, *_ = (ROOT / "benchmarks/results/default/table.md").read_text().split("\n\n")
    _, found, after = (ROOT / "README.md").read_text().partition(f"{table}\n\n")
    shown = after.partition("\n\n")[0].splitlines()
    assert found
    assert set(shown) <= set(notes.splitlines())
    assert [line.partition(":")[0] for line in shown][::2] == ["- best", "- advice"]


def test_what_a_gguf_base_needs_comes_with_the_package():
    """Transformers asks for accelerate only when it loads one; in development it hides behind peft."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=]", line)[0] for line in needed}
    assert {"gguf", "accelerate", "sentencepiece"} <= names
