"""The handbook's machinery: pages out of docstrings, equations, links, figures, numbers — all but the built site."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from featherweight import cli  # noqa: E402
from featherweight.methods import METHODS, method_class  # noqa: E402
from handbook import contents, equation, explained, links, measured, method_page, pages, sizes  # noqa: E402
from handbook.draw import block, field, zoom  # noqa: E402


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_docstring_answers_every_question_of_its_page(name):
    it = explained.explained(name)
    assert it.sections.keys() == set(explained.SECTIONS)
    assert it.tagline
    assert any(kind == "equation" for kind, _ in explained.prose_and_equations(it.sections["The idea"]))
    assert it.sections["Pitfalls"].count("* ") >= 2


@pytest.mark.parametrize("name", METHODS)
def test_every_letter_of_a_methods_first_equation_is_explained(name):
    it = explained.explained(name)
    first = next(text for kind, text in explained.prose_and_equations(it.sections["The idea"]) if kind == "equation")
    named = " ".join(words for words, _ in explained.entries(it.sections["Symbols"]))
    for letter in re.findall(r"(?<![\w√])[A-Za-zΛ](?:_[A-Z])?(?!\w)", first.split("     ")[0]):
        assert re.search(rf"(?<!\w){letter}(?!\w)", named), f"{name}: {letter}"


@pytest.mark.parametrize("name", METHODS)
def test_advice_is_given_for_options_that_exist(name):
    it = explained.explained(name)
    known = {option.name for option in it.options}
    advised = {n for names, _ in explained.entries(it.sections["How to choose"]) for n in names.split(", ")}
    assert advised
    assert advised <= known


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_explained_under_its_field(name):
    it = explained.explained(name)
    fields = {f.name for f in dataclasses.fields(it.cls)} - set(explained.HIDDEN)
    assert fields == {option.name for option in it.options}
    assert all(option.text for option in it.options)


@pytest.mark.parametrize("name", ["lora", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_docstrings_formula_gives_the_count(name):
    assert "= **" in method_page.worked_example(explained.explained(name))


def test_a_formula_that_does_not_give_the_count_is_an_error():
    it = explained.explained("lora")
    wrong = dataclasses.replace(
        it, sections={**it.sections, "Trainable parameters": "r · (d_in + d_out + 1) per layer."}
    )
    with pytest.raises(ValueError, match="lora: the docstring's formula gives 9,224, but 9,216"):
        method_page.worked_example(wrong)


def test_the_counts_shown_are_those_of_the_stored_comparison():
    for row in measured.of_methods("default/rows.jsonl"):
        assert sizes.count(row["name"], sizes.DEFAULT) == (row["total_params"], row["trainable_params"])


def test_places_add_up_to_the_count():
    for name in METHODS:
        together = sum(place.sites * place.parameters for place in sizes.places(name, sizes.DEFAULT))
        assert together == sizes.count(name, sizes.DEFAULT)[1], name


def test_a_page_shows_the_measured_accuracy_and_no_other():
    row = measured.of_method("default/rows.jsonl", "ia3")
    page = method_page.page(explained.explained("ia3"))
    assert row is not None
    assert measured.accuracy(row) in page
    assert f"[{100 * row['interval'][0]:.1f}, {100 * row['interval'][1]:.1f}]" in page


def test_a_page_has_its_example_word_for_word():
    page = method_page.page(explained.explained("p_tuning"))
    assert (ROOT / "examples/p_tuning.py").read_text().rstrip() in page


@pytest.mark.parametrize("name", METHODS)
def test_an_example_on_a_methods_page_is_short(name):
    assert len((ROOT / f"examples/{name}.py").read_text().splitlines()) <= 20


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("y = W x + s · B A x", r"y = W x + s \cdot B A x"),
        ("A: r × d_in", r"A \in \mathbb{R}^{r \times d_{\mathrm{in}}}"),
        ("Ī ← β₁ Ī + (1 − β₁) I", r"\bar{I} \leftarrow \beta _{1} \bar{I} + (1 - \beta _{1}) I"),
        ("(rsLoRA: lora_alpha / √r)", r"(\text{rsLoRA: }\mathrm{lora\_alpha} / \sqrt{r})"),
        ("keys, values:  y = l ⊙ x", r"\text{keys, values:}\quad  \qquad y = l \odot x"),
    ],
)
def test_an_equation_of_a_docstring_becomes_tex(text, tex):
    assert equation.display(text) == tex


def test_a_link_to_code_becomes_a_page_beside_the_others():
    wanted = set()
    text = "see [`lora.py`](../src/featherweight/methods/lora.py#L3) and [fit](fit.md#x)\n```\n[not](a-link.md)\n```\n"
    done = links.relinked(text, ROOT / "docs/guide.md", Path("guide.md"), wanted)
    assert "](repository/src/featherweight/methods/lora.py.md#L3)" in done
    assert "](fit.md#x)" in done
    assert "[not](a-link.md)" in done
    assert wanted == {ROOT / "src/featherweight/methods/lora.py"}


def test_a_link_that_leads_nowhere_stops_the_build():
    with pytest.raises(FileNotFoundError, match=re.escape("docs/guide.md: the link gone.md leads nowhere")):
        links.relinked("[x](gone.md)", ROOT / "docs/guide.md", Path("guide.md"), set())


def figures():
    yield "map", field.field({"LoRA": "lora.html"})
    for name in METHODS:
        leaves = [place.name for place in sizes.places(name, sizes.DEFAULT)]
        yield name, block.block(name, method_class(name).title, leaves)
        if close := zoom.zoom(name, method_class(name).title):
            yield f"{name}, closely", close


def test_every_figure_is_whole_says_what_it_shows_and_stays_on_its_sheet():
    for what, sheet in figures():
        svg = sheet.svg()
        assert "\n\n" not in svg, what
        root = ElementTree.fromstring(svg)
        assert root.find("{*}title").text, what
        assert root.find("{*}desc").text, what
        for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
            x, y, w, h = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
            assert min(x, y, sheet.width - x - w, sheet.height - y - h) >= 0, f"{what}: {x} {y} {w} {h}"


def test_a_figure_is_drawn_the_same_twice():
    assert [s.svg() for _, s in figures()] == [s.svg() for _, s in figures()]


def test_a_figure_marks_the_layers_that_the_method_adapts_and_no_other():
    adapted = block.block("lora", "LoRA", ["q_proj", "v_proj"]).svg().count(">BA<")
    assert adapted == 2
    assert block.block("lora", "LoRA", ["down_proj"]).svg().count(">BA<") == 1


def test_every_method_stands_on_the_map_at_its_paper():
    at = {place.title: place for place in field.PLACES}
    for name in METHODS:
        cls = method_class(name)
        assert at[cls.title].arxiv in cls.paper, name
        assert str(at[cls.title].year) in cls.paper, name


def test_boxes_on_the_map_do_not_overlap():
    w, h = field.CELL
    for i, a in enumerate(field.PLACES):
        for b in field.PLACES[:i]:
            assert abs(a.x - b.x) >= w or abs(a.y - b.y) >= h, f"{a.title} and {b.title}"


def test_a_method_stands_in_the_regions_of_its_families_and_in_no_other():
    w, h = field.CELL
    for place in field.PLACES:
        x, y, right, bottom = place.x, place.y, place.x + w, place.y + h
        stands_in = {
            "additive": right <= 392 or (right <= 524 and y >= 232),
            "selective": x >= 402 and (bottom <= 272 or (right <= 530 and bottom <= 358)),
            "reparametrisation": x >= 402 and y >= 286,
        }
        for family, stands in stands_in.items():
            assert stands == (family in place.family or place.family == "all three"), f"{place.title}: {family}"


def commands_shown():
    """Every command line of ours in a code block of the docs."""
    by_hand = [*(ROOT / "docs").glob("*.md"), *pages.WORDS.rglob("*.md")]
    for path in by_hand:
        for code in re.findall(r"^```bash\n(.*?)^```", path.read_text(), flags=re.S | re.M):
            for line in code.splitlines():
                if line.startswith("featherweight "):
                    yield path.name, line


def test_every_command_in_the_docs_is_one_that_the_command_line_takes():
    verbs = typer.main.get_command(cli.app).commands
    shown = list(commands_shown())
    assert len(shown) >= 20
    for page, line in shown:
        verb, *words = shlex.split(line, comments=True)[1:]
        verbs[verb].make_context(verb, words), page  # raises where a flag is unknown or a value of a wrong type


def test_what_was_caught_is_what_the_list_of_scenes_asks_for():
    told = tomllib.loads((pages.CAPTURED / "scenes.toml").read_text())
    assert {path.stem for path in pages.CAPTURED.glob("*.txt")} == told.keys()
    for name, scene in told.items():
        found, when = pages.scenes(name)
        assert [command for command, _ in found] == scene["commands"], f"{name}: run docs/capture.py {name}"
        assert re.match(r"\d{4}-\d\d-\d\d, ", when), name


def test_what_was_caught_names_no_folder_of_the_machine_it_was_caught_on():
    for path in pages.CAPTURED.glob("*.txt"):
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users)/", path.read_text()), path.name


def test_a_page_that_asks_for_something_unknown_stops_the_build():
    with pytest.raises(Exception, match="nothing_like_it"):
        pages.filled("{{ nothing_like_it() }}")


def test_a_tricks_numbers_are_those_of_the_stored_table():
    stored = (measured.RESULTS / "tricks.md").read_text()
    for name in ("one row at a time, accumulated", "layers computed again", "base in nf4", "base streamed from disk"):
        trick = measured.trick(name)
        assert f"| {name} | {trick['mib']:,.0f} | {trick['memory']:.2f}× | {trick['time']:.2f}× |" in stored


@pytest.mark.real
@pytest.mark.slow
def test_the_example_in_peft_runs_and_finds_the_same_logits(tmp_path):
    """Warnings are let be: those of HF PEFT under a newer transformers are not ours to mend."""
    script = ROOT / "examples/elsewhere/in_peft.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


NEW = '''"""Scaling: one factor for a whole layer.

The idea. Make a layer louder or quieter as a whole:

    y = g · W x

Symbols:
    x, y: input and output of the layer
    W: its frozen weight
    g: the factor (`gain`)

Paper: Nobody et al. 2026, arXiv:2601.00001.

Trainable parameters: 1 · 1 per adapted layer.
When to use it: in a test.
When not: elsewhere.
What it costs: nothing to speak of.
How to choose:
    layers: one is enough.
Pitfalls:
    * It learns little.
    * It is not there.
The paper's claim: none.
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from featherweight import sites
from featherweight.method import Method, Part


class GainPart(Part):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))


@dataclass(frozen=True, kw_only=True)
class Gain(Method):
    peft_type: ClassVar[str] = "GAIN"
    title: ClassVar[str] = "Gain"
    paper: ClassVar[str] = "Nobody et al. 2026, arXiv:2601.00001"
    learning_rate: ClassVar[float] = 1e-2
    encoder_learning_rate: ClassVar[float] = 1e-2
    layers: str = "o_proj|o"
    """Which layers, as a regular expression of their last name."""

    def sites(self, model):
        return sites.linear_sites(model, rf".*[.]({self.layers})")

    def part(self, model, path):
        return GainPart()
'''


def test_a_method_that_is_registered_has_a_page_and_a_place_in_the_navigation(tmp_path, monkeypatch):
    path = tmp_path / "gain.py"
    path.write_text(NEW)
    spec = importlib.util.spec_from_file_location("featherweight.methods.gain", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "featherweight.methods.gain", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "gain", "gain:Gain")
    page = method_page.page(explained.explained("gain"))
    assert contents.summary().count("[Gain](methods/gain.md)") == 1
    assert "| `o_proj` | 30 | 576 → 576 | 1 | 30 |" in page
    assert "1 · 1 = **1**" in page
    assert "Nothing has been measured with it yet." in page
    assert "no search of it is stored yet" in page
    assert page.count("<svg") == 1  # the block; nobody has drawn it closely
    assert "## Try it" not in page


def test_what_the_welcome_page_says_of_the_table_is_so():
    rows = measured.of_methods("default/rows.jsonl")
    assert len(rows) == 5
    assert max(row["interval"][0] for row in rows) < min(row["interval"][1] for row in rows)  # the intervals overlap
    untouched = measured.of_method("default/rows.jsonl", "untouched")
    assert untouched is not None
    assert all(row["interval"][0] > untouched["accuracy"] for row in rows)
