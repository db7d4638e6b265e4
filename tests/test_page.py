"""The page of a comparison: whole, well-formed, asking nothing of anyone, and proof against what is in data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from comparisons import (
    LABELS,
    METHODS,
    TESTED,
    comparison,
    diverged,
    line,
    majority,
    provenance,
    rows,
    stored,
    untouched,
)
from featherweight import figures
from featherweight.page import FILE, examples, page, write
from featherweight.page.origin import flat
from featherweight.plain import plain
from featherweight.results import Line, write_tested
from featherweight.rows import Row
from featherweight.tables import COLUMNS

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
KNOWN = {TESTED: rows()}
SECTIONS = ["In short", "The table", "How to read it", "Figures", "Where they disagree", "Where it comes from", "Notes"]


@dataclass
class Node:
    name: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def all(self, name: str) -> Iterator[Node]:
        """Elements of a name, in order."""
        for child in self.children:
            if isinstance(child, Node):
                if child.name == name:
                    yield child
                yield from child.all(name)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def with_class(self, name: str, kind: str) -> list[Node]:
        return [node for node in self.all(name) if kind in node.attributes.get("class", "").split()]


class Tree(HTMLParser):
    """Parses strictly: every element is closed, by its own end, and no attribute stands twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], f"not closed: {self.open[-1].name}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), f"twice in <{tag}>"
        node = Node(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> in <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def tree(text: str) -> Node:
    return Tree(text).root


def made(
    lines: Sequence[Line], known: figures.Tested = KNOWN, notes: Sequence[str] = ("a note",), title: str = "A title"
) -> Node:
    """A page without figures, which take long to draw."""
    return tree(page(title, lines, known, notes, shown=[]))


def table(root: Node) -> list[list[Node]]:
    """The rows of the table on the screen, as cells."""
    [found] = [node for node in root.all("table") if "data-sortable" in node.attributes]
    body = next(found.all("tbody"))
    return [[cell for cell in row.children if isinstance(cell, Node)] for row in body.all("tr")]


def heads(root: Node) -> list[str]:
    [found] = [node for node in root.all("table") if "data-sortable" in node.attributes]
    return [node.text for node in found.all("th") if "data-sort" in node.attributes]


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of everything, figures too."""
    return page("Eight methods", comparison(3), KNOWN, ["a note"])


# --- the page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_its_parts_are_in_order(whole: str) -> None:
    root = tree(whole)
    assert [node.text for node in root.all("h2")] == SECTIONS
    assert [node.text for node in root.all("h1")] == ["Eight methods"]
    names = [node.attributes["id"] for node in everything(root) if "id" in node.attributes]
    assert len(names) == len(set(names))
    for node in everything(root):
        assert node.attributes.get("aria-labelledby") in (None, *names)


def everything(root: Node) -> Iterator[Node]:
    for child in root.children:
        if isinstance(child, Node):
            yield child
            yield from everything(child)


def test_the_page_asks_nothing_of_anyone(whole: str) -> None:
    assert "http:" not in whole
    assert "https:" not in whole
    for node in everything(tree(whole)):
        assert node.name not in ("img", "iframe", "object", "embed", "form", "base", "image")
        for key, value in node.attributes.items():
            assert "//" not in value, (node.name, key)
            assert key not in ("src", "srcset", "action", "xlink:href") or value.startswith("data:")
            assert key != "href" or value.startswith(("#", "data:"))
            assert not key.startswith("on")
        if node.name == "style" or "style" in node.attributes:
            text = node.text + node.attributes.get("style", "")
            assert "@import" not in text
            assert all(found.startswith(("#", "data:")) for found in re.findall(r"url\(([^)]*)\)", text))


def test_the_policy_forbids_every_request_and_every_script_but_its_own(whole: str) -> None:
    [policy] = [
        n.attributes["content"]
        for n in tree(whole).all("meta")
        if n.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-inline" not in policy.split("script-src", 1)[1].split(";")[0]
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)


def test_every_figure_is_in_the_page_with_a_caption(whole: str) -> None:
    found = list(tree(whole).all("figure"))
    assert [node.attributes["id"] for node in found] == [
        "figure-accuracy", "figure-accuracy-parameters", "figure-accuracy-memory", "figure-accuracy-time", "figure-learning-curves",
        "figure-memory-over-a-step", "figure-confusion",
    ]  # fmt: skip
    for node in found:
        panels, screens = len(node.with_class("p", "panel-name")), len(node.with_class("div", "broad"))
        assert len(list(node.all("svg"))) == (panels or 1) + screens
        assert len(next(node.all("figcaption")).text) > 60
        assert all(drawn.attributes["role"] == "img" for drawn in node.all("svg"))


def test_the_headline_says_what_was_compared_on_what(whole: str) -> None:
    told = next(node.text for node in tree(whole).all("dl"))
    for word in (
        "SmolLM2-135M",
        "movie-reviews",
        "200",
        "11 rows, 29 runs",
        "3",
        "AMD EPYC, 2 cores, 24 GiB",
        "2026-11-27",
    ):
        assert word in told


def test_the_page_is_written_with_its_figures(tmp_path: Path) -> None:
    write_tested(
        tmp_path, TESTED, [Row(((f"text {i}", False),), row["answer"], str(i)) for i, row in enumerate(rows())]
    )
    assert write(tmp_path, "A title", comparison(1)[:3]) == tmp_path / FILE
    root = tree((tmp_path / FILE).read_text(encoding="utf-8"))
    assert len(list(root.all("figure"))) == len(list((tmp_path / "figures").glob("*.png"))) == 7
    assert [node.text for node in root.all("h2")][-2:] == ["Where they disagree", "Where it comes from"]


# --- the table ------------------------------------------------------------------------------------------------------------


def test_the_references_columns_come_first_in_its_order_but_for_the_accuracy_which_follows_the_name() -> None:
    found = heads(made(comparison(1)))
    assert found[:8] == ["Fine-Tuning Method", "Accuracy", *COLUMNS[1:7]]
    assert sorted(found[:8]) == sorted(COLUMNS)
    assert found[8:11] == ["Macro-F1", "Difference to the best row", "Loss on general text"]
    assert "Energy" not in found
    assert "Energy" in heads(made([replace(x, joules=4000.0) for x in comparison(1)]))


def test_every_row_is_there_and_can_be_sorted() -> None:
    found = table(made(comparison(1)))
    assert [row[0].attributes["data-key"] for row in found] == [
        *(title for _, title, *_ in METHODS), "full fine-tuning", "untouched model", "majority class",
    ]  # fmt: skip
    for row in found:
        for cell in row[1:]:
            assert ("data-key" in cell.attributes) == (cell.text != "–")
            assert "data-key" not in cell.attributes or float(cell.attributes["data-key"]) == float(
                cell.attributes["data-key"]
            )
    memory = [float(row[5].attributes["data-key"]) for row in found if "data-key" in row[5].attributes]
    assert memory[0] == 1213 * 2**20


def test_rows_that_cannot_be_told_apart_are_marked_in_words_too() -> None:
    good = [i % 10 != 0 for i in range(600)]
    nearly = [right and i != 1 for i, right in enumerate(good)]
    bad = [right and i % 3 != 0 for i, right in enumerate(good)]
    lines = [
        Line(n, n, right=r, eval_examples=600, train_steps=1, total_params=9)
        for n, r in (("a", nearly), ("b", good), ("c", bad))
    ]
    root = made(lines)
    assert [row.attributes.get("class") for row in next(root.all("tbody")).all("tr")] == ["alike", "alike", None]
    assert [cell.text for row in table(root) for cell in row[:1]] == ["a like the best", "b best row", "c"]
    told = {row[0].text: " ".join(cell.text for cell in row) for row in table(root)}
    assert "-0.2 points [-0.5, +0.2], not told apart" in told["a like the best"]
    assert "-30.0 points [-33.7, -26.3], told apart" in told["c"]


def test_what_was_predicted_stands_beside_what_was_measured() -> None:
    lines = [line("a", "A", 0.8, mib=1000), line("b", "B", 0.8, mib=1000, peak_bytes=3000 * 2**20)]
    told = [" ".join(cell.text for cell in row) for row in table(made(lines))]
    assert "1,040 MiB [940, 1,160], it was inside" in told[0]
    assert "1,040 MiB [940, 1,160], it was 3,000" in told[1]


def test_what_was_forgotten_is_before_and_after() -> None:
    told = [
        " ".join(cell.text for cell in row)
        for row in table(made([line("a", "A", 0.8, general_loss=3.25), untouched()]))
    ]
    assert "3.100 → 3.250 +0.150" in told[0]
    assert "→" not in told[1]


def test_a_run_that_broke_says_so() -> None:
    [broken, *_] = table(made([diverged(), *comparison(1)]))
    assert "diverged at step 100" in broken[0].text


@pytest.mark.parametrize(
    "lines",
    [[], [line("a", "A", 0.8)], [diverged()], [untouched(), majority()], stored(), [Line("a", "A")]],
    ids=["none", "one", "broken", "references", "old", "empty"],
)
def test_whatever_there_is_makes_a_page(lines: list[Line]) -> None:
    root = tree(page("A title", lines, {}, []))
    for one in lines:
        assert one.method in root.text


def test_text_answers_need_no_labels() -> None:
    lines = [line(n, n, accuracy, metric="exact_match") for n, accuracy in (("a", 0.8), ("b", 0.6))]
    root = made(lines)
    assert "Macro-F1" not in heads(root)
    assert len(root.with_class("ol", "examples")) == 1


def test_two_machines_are_two_rows_with_a_column_and_advice_for_each() -> None:
    other = [
        replace(x, provenance=provenance("another machine"), train_seconds=1.0)
        for x in comparison(1)
        if x.name in ("lora", "ia3", "untouched")
    ]
    root = made([*comparison(1), *other])
    assert heads(root)[:3] == ["Fine-Tuning Method", "Accuracy", "Machine"]
    assert [row[2].text for row in table(root) if row[0].attributes["data-key"].startswith("LoRA · ")] == ["A", "B"]
    assert [node.text for node in root.all("h3")] == ["On machine A", "On machine B"]
    assert "B: another machine" in root.text
    assert len(root.with_class("dl", "advice")) == 2
    speeds = {row[0].attributes["data-key"]: row[7].text for row in table(root)}
    assert speeds["LoRA · A"] != speeds["LoRA · B"]


def test_other_rows_are_another_row_of_the_table() -> None:
    other = [replace(x, tested="other", right=x.right[:50], predictions=x.predictions[:50]) for x in comparison(1)[:2]]
    found = [row[0].attributes["data-key"] for row in table(made([*comparison(1), *other]))]
    assert {"LoRA · rows 1", "LoRA · rows 2"} <= set(found)


# --- examples -------------------------------------------------------------------------------------------------------------


def a_run(name: str, answers: str, seed: int = 0, truth: str = "aaaa") -> Line:
    right = [given == true for given, true in zip(answers, truth, strict=True)]
    return Line(name, name, tested="t", predictions=list(answers), right=right, seed=seed, train_steps=1)


FOUR = {"t": [{"text": f"row {i}", "answer": "a", "place": ""} for i in range(4)]}


def test_rows_that_are_answered_most_differently_come_first_and_unanimous_ones_do_not() -> None:
    lines = [a_run("x", "aaab"), a_run("y", "aabc"), a_run("z", "aacd")]
    assert [example.text for example in examples.disagreements(lines, FOUR)] == ["row 2", "row 3"]


def test_seeds_vote_and_a_split_vote_is_told() -> None:
    lines = [a_run("x", "aaaa", 0), a_run("x", "baaa", 1), a_run("x", "baaa", 2), a_run("y", "aaaa", 0)]
    [example] = examples.disagreements(lines, FOUR)
    assert [(v.title, v.answer, v.right, v.share) for v in example.votes] == [
        ("x", "b", False, "2 of 3"),
        ("y", "a", True, ""),
    ]


def test_at_most_twenty_rows_are_shown_and_right_or_wrong_is_a_word() -> None:
    root = made(comparison(1))
    [shown] = root.with_class("ol", "examples")
    answers = [node for node in shown.all("li") if node.attributes.get("class") in ("right", "wrong")]
    assert len([c for c in shown.children if isinstance(c, Node)]) == 20
    assert {(n.attributes["class"], n.text[0], n.attributes["class"] in n.text) for n in answers} == {
        ("right", "✓", True),
        ("wrong", "✗", True),
    }


def test_what_answers_always_the_same_has_no_vote() -> None:
    lines = [
        a_run("x", "aaaa"),
        a_run("y", "aaaa"),
        replace(a_run("majority", "bbbb"), kind="reference", train_steps=0),
    ]
    assert examples.disagreements(lines, FOUR) == []


# --- what is in data ------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "</style><style>*{display:none}</style>", "\"' onload=alert(1) x='", "a\u2028b\u2029c",
    "\u202egnp.exe\u202c", "x" * 10_000, "<!-- ", "]]>", "&lt;b&gt;", "\x00\x07\x1b[31m", "\ud800 alone", "${alert(1)} {{7*7}}",
    "https://example.org/?token=secretsecret", "</title></svg></bdi></main>",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_breaks_out_of_the_page(text: str) -> None:
    """Wherever it stands: as name, answer, test row, note, title, setting."""
    lines = [
        replace(x, method=f"{x.method} {text}", predictions=[text if p == LABELS[0] else p for p in x.predictions], stopped=text,
                provenance=provenance(text) | {text or "x": text})
        for x in comparison(1)[:3]
    ]  # fmt: skip
    known = {
        TESTED: [
            {"text": text, "answer": text if r["answer"] == LABELS[0] else r["answer"], "place": text} for r in rows()
        ]
    }
    made_of = page(text, lines, known, [text], shown=[])
    made_of.encode("utf-8")
    root = tree(made_of)
    assert len(list(root.all("script"))) == 1
    assert len(list(root.all("style"))) == 1
    assert not any(key.startswith("on") for node in everything(root) for key in node.attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028\u2029\u202a-\u202e]", made_of)
    assert "xxxxx" * 200 not in made_of
    assert [node.text for node in root.all("h2")] == [name for name in SECTIONS if name != "Figures"]


def test_secrets_do_not_reach_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefgh12345678")
    lines = [
        replace(x, provenance=provenance() | {"command": "compare --data abcdefgh12345678"}) for x in comparison(1)[:2]
    ]
    assert "abcdefgh12345678" not in page("abcdefgh12345678", lines, {}, ["abcdefgh12345678"], shown=[])


def test_plain_text_is_one_line_of_so_many_characters() -> None:
    assert plain("a\n\tb  c") == "a b c"
    assert plain("x" * 50, 10) == "x" * 9 + "…"
    assert plain("x" * 10, 10) == "x" * 10
    assert len(plain("\u202e" * 10_000 + "x" * 10_000, 10)) <= 10


# --- where it comes from --------------------------------------------------------------------------------------------------


def test_what_all_runs_have_in_common_is_told_once_and_the_rest_for_each() -> None:
    lines = [replace(x, provenance=provenance() | {"own": {"r": x.trainable_params}}) for x in comparison(1)[:3]]
    root = made(lines)
    [common] = root.with_class("dl", "facts-long")
    assert "settings.model" in common.text
    assert "own.r" not in common.text
    [runs] = root.with_class("table", "origin")
    assert [
        row.text
        for row in next(runs.all("tbody")).all("tr")
        if "own.r" in row.text and "settings.model" not in row.text
    ]
    for one in lines:
        assert one.identity in runs.text
    assert flat({"a": {"b": [1, 2]}, "c": None}) == {"a.b": "1, 2", "c": "None"}


def test_notes_that_are_the_verdict_are_not_told_twice() -> None:
    from featherweight.advice import verdict

    lines = comparison(1)[:3]
    [notes] = made(lines, notes=["mine", *verdict(lines)]).with_class("ul", "notes")
    assert notes.text == "mine"


def test_a_path_on_the_machine_is_not_told_to_whoever_reads_the_page() -> None:
    assert flat({"data": "/home/ann/letters.csv", "base": "smollm2-135m-instruct", "settings": {"lr": 0.1}}) == {
        "data": "letters.csv", "base": "smollm2-135m-instruct", "settings.lr": "0.1",
    }  # fmt: skip
