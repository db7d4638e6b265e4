"""All pages by their place: those written by hand, with the numbers they ask for, and one a method.

`docs/**/*.md` are read on a code host too, so their links lead to files that are there. `docs/handbook/words/` holds the pages that link
to generated ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from featherweight.demo import ARCHITECTURE
from featherweight.methods import METHODS, method_class

from . import measured, notebook, reference
from .draw.charts import bars, intervals
from .draw.field import PLACES, field
from .explained import explained
from .links import ROOT
from .method_page import figures, methods_measured
from .method_page import page as method_page

DOCS = ROOT / "docs"
WORDS = DOCS / "handbook/words"
CAPTURED = DOCS / "captured"


def pages() -> dict[str, str]:
    """The text of every page; links are written as from `docs/`."""
    by_hand = [(DOCS, path) for path in sorted(DOCS.rglob("*.md")) if not path.is_relative_to(DOCS / "handbook")]
    by_hand += [(WORDS, path) for path in sorted(WORDS.rglob("*.md"))]
    told = {path.relative_to(folder).as_posix(): filled(path.read_text(encoding="utf-8")) for folder, path in by_hand}
    told |= {f"notebooks/{path.stem}.md": notebook.page(path) for path in sorted(notebook.FOLDER.glob("*.ipynb"))}
    return told | {f"methods/{name}.md": method_page(explained(name)) for name in METHODS}


def filled(text: str) -> str:
    """A page with what it asks for in double braces."""
    if "{{" not in text:
        return text
    env = jinja2.Environment(
        undefined=jinja2.StrictUndefined, comment_start_string="{{#", comment_end_string="#}}", autoescape=False,
    )  # fmt: skip
    return env.from_string(text).render(ASKED_FOR)


def field_map() -> str:
    """The map, with a link for each method that we have."""
    drawn = field({method_class(name).title: f"{name}.html" for name in METHODS}).svg()
    return f'<div class="map" tabindex="0">\n{drawn}</div>'


def field_list() -> str:
    """The same as a table, for who cannot see it, and with links to the papers."""
    titles = {method_class(name).title: name for name in METHODS}
    rows = []
    for place in sorted(PLACES, key=lambda p: (p.family, p.year, p.title)):
        title = f"[**{place.title}**]({titles[place.title]}.md)" if place.title in titles else place.title
        paper = f"[arXiv:{place.arxiv}](https://arxiv.org/abs/{place.arxiv})"
        rows.append(f"| {title}{' ∘' if place.ours else ''} | {place.family} | {place.year} | {paper} |")
    return "\n".join(["| method | family | year | paper |", "|---|---|---|---|", *rows])


def our_methods() -> str:
    """Every registered method in a line."""
    return "\n".join(f"* [{method_class(n).title}]({n}.md) — {explained(n).tagline}" for n in METHODS)


def section(file: str, title: str) -> str:
    """What stands under a heading of another page, with links that hold anywhere."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.split(r"^## ", text.split(f"## {title}\n", 1)[1], flags=re.M)[0]
    return re.sub(r"\]\((?![a-z]+:|[/#])", f"](/{Path(file).parent.as_posix()}/", found)


def results_table() -> str:
    """Every file of results and the command that made it, from the list that lies beside the files."""
    listed = (measured.RESULTS / "README.md").read_text(encoding="utf-8")
    table = listed[listed.index("| file |") :]
    table = re.sub(r"\]\(([^)]+)\)", r"](/benchmarks/results/\1)", table)
    return re.sub(r"`benchmarks/(\w+\.(?:py|sh))((?: [^`]*)?)`", lambda m: _script(m[1], m[2]), table)


def _script(name: str, arguments: str) -> str:
    linked = (
        f"[`benchmarks/{name}`](/benchmarks/{name})"
        if (ROOT / "benchmarks" / name).exists()
        else f"`benchmarks/{name}`"
    )
    return linked + (f" `{arguments.strip()}`" if arguments.strip() else "")


def default_table() -> str:
    """The table that `featherweight compare` printed."""
    first, *_ = (measured.RESULTS / "default/table.md").read_text(encoding="utf-8").split("\n\n")
    return first


def methods_drawn() -> str:
    """The accuracies of the default comparison with their intervals, beside what needs no training."""
    file = "default/rows.jsonl"
    rows = [(row["method"], row["accuracy"], *row["interval"]) for row in measured.of_methods(file)]
    words = (("majority", "most frequent label"), ("untouched", "untouched model"))
    marks = [(row["accuracy"], called) for name, called in words if (row := measured.of_method(file, name))]
    return f'<div class="wide">\n{intervals("Accuracy on held-out reviews", rows, marks).svg()}</div>'


def included(path: str, *, link: bool = True) -> str:
    """A file of the repository as a code block: an example that the tests run, or an output that a script caught."""
    kind = {".py": "python", ".toml": "toml", ".sh": "bash"}.get(Path(path).suffix, "text")
    code = f"```{kind}\n{(ROOT / path).read_text(encoding='utf-8').rstrip()}\n```"
    return f"[`{path}`](/{path}):\n\n{code}" if link else code


def memory_of(*names: str, model: str = measured.SMALL) -> str:
    """A picture of the memory of some tricks beside none."""
    found = [measured.trick(name, model) for name in ("none", *names)]
    rows = [
        (
            "as it comes" if t["name"] == "none" else t["name"],
            t["mib"],
            f"{t['mib']:,.0f} MiB, {t['time']:.2f} × the time",
        )
        for t in found
    ]
    return figures(
        bars("Peak memory", rows, [t["name"] != "none" for t in found], "peak memory of the process while training")
    )


def scenes(name: str) -> tuple[list[tuple[str, str]], str]:
    """What a script caught: commands with what they printed, and when on what machine that was."""
    text = (CAPTURED / f"{name}.txt").read_text(encoding="utf-8").rstrip()
    shown, _, told = text.rpartition("\n# ")
    found = [tuple(block.strip("\n").split("\n", 1)) for block in re.split(r"^\$ ", shown, flags=re.M)[1:]]
    return [(pair[0], pair[1] if len(pair) > 1 else "") for pair in found], told.split(", python")[0]


def captured(name: str, only: str = "") -> str:
    """Commands and what they printed, as a terminal shows them."""
    found, told = scenes(name)
    shown = "\n\n".join(f"$ {command}\n{output}" for command, output in found if only in command)
    shown = re.sub(r"((?:^\|.*\n)+)", r"```\n\n\1\n```console\n", shown, flags=re.M)  # a table is shown as one
    return f"```console\n{shown}\n```\n\n" + measured.footnote(
        f"Caught by [`docs/capture.py`](/docs/capture.py), {told}"
    )


def errors() -> str:
    """What is said when something is wrong, and what was asked."""
    found, told = scenes("errors")
    rows = []
    for command, output in found:
        said = output.split("\n")[0].removeprefix("featherweight: error: ").replace("|", "\\|")
        rows.append(f"| {said} | `{command.removeprefix('featherweight ')}` |")
    return "\n".join(["| it says | you asked |", "|---|---|", *rows]) + "\n\n" + measured.footnote(told)


def majority() -> str:
    """The accuracy of always saying the most frequent label."""
    row = measured.of_method("default/rows.jsonl", "majority")
    assert row is not None
    return measured.percent(row["accuracy"])


def what_fits() -> str:
    """For each card of the stored plan, the best way to train on it, and the best without a trick that was never run."""
    rows = []
    plans = (measured.RESULTS / "plan_8b.txt").read_text(encoding="utf-8").split("+ featherweight plan ")[1:]
    for plan in plans:
        [card] = re.findall(r"--gpu '([^']+)'", plan)
        fitting = re.findall(r"^LoRA  +(\S.*?)  +(\d+) +(\S+ GiB) +(\S+ GiB)  +yes +(\S.*)$", plan, flags=re.M)
        tricks, at_once, memory, at_most, took = fitting[0]
        rows.append(f"| {card} | {tricks} | {at_once} | {memory} (at most {at_most}) | {took} |")
    head = "| card | switch on | rows at a time | memory | 100 steps take |\n|---|---|--:|---|--:|"
    return "\n".join([head, *rows]) + "\n\n" + measured.footnote(measured.source("plan_8b.txt", "plan_8b.sh"))


def sizes_that_fit() -> str:
    """For each size of model and length of rows, how it is trained on a small card, as planned."""
    found, rows = measured.result("plan_sizes.json"), []
    for r in found["rows"]:
        model = f"| {r['parameters'] / 1e9:.1f} billion | {r['length']:,} "
        if not r["fits"]:
            rows.append(f"{model}| does not fit | | {r['bytes'] / 2**30:.1f} GiB | |")
            continue
        needed = f"{r['bytes'] / 2**30:.1f} GiB (at most {r['high'] / 2**30:.1f})"
        rows.append(f"{model}| {r['tricks']} | {r['at_once']} | {needed} | {r['seconds'] * 100 / 60:.0f} min |")
    head = "| parameters | tokens a row | switch on | rows at a time | memory | 100 steps take |\n|--:|--:|---|--:|---|--:|"
    told = measured.footnote(f"Shapes of Qwen3; {measured.source('plan_sizes.json', 'plan_sizes.py')}")
    return "\n".join([head, *rows]) + f"\n\n{told}"


def plan_of(card: str) -> str:
    """What `plan` said of one card, word for word."""
    plans = (measured.RESULTS / "plan_8b.txt").read_text(encoding="utf-8").split("+ featherweight plan ")[1:]
    [found] = [plan for plan in plans if f"'{card}'" in plan]
    return f"```console\n$ featherweight plan {found.strip()}\n```"


def steps_until(row: dict[str, Any]) -> str:
    """After how many steps compiling has paid, cold and from its cache."""
    cold, cached = (row["pays_after_steps"][kind] for kind in ("cold", "cached"))
    return "never" if cold is None else f"{cold:,.0f} steps, or {cached:,.0f}"


def compiled_off() -> float:
    """How far compiled losses are from plain ones at most."""
    return max(float(row["losses_off"]) for row in measured.result("compilation.json")["rows"])


def planned_weights() -> str:
    """What the weights of the 8B model take, as planned."""
    [found, *_] = re.findall(
        r"^weights +(\S+ GiB)", (measured.RESULTS / "plan_8b.txt").read_text(encoding="utf-8"), flags=re.M
    )
    return str(found)


ASKED_FOR: dict[str, Any] = {
    "trick": measured.trick, "LARGE": measured.LARGE, "included": included, "memory_of": memory_of,
    "default_table": default_table, "source": measured.source,
    "row": lambda name: measured.of_method("default/rows.jsonl", name), "percent": measured.percent, "accuracy": measured.accuracy,
    "experiment": measured.experiment, "mib": measured.mib, "median": measured.median, "field_map": field_map, "field_list": field_list,
    "our_methods": our_methods, "section": section, "results_table": results_table, "commands": reference.commands, "api": reference.api,
    "methods_measured": methods_measured, "result": measured.result, "trick_source": measured.trick_source,
    "captured": captured, "errors": errors, "majority": majority, "planned_weights": planned_weights, "what_fits": what_fits,
    "plan_of": plan_of, "sizes_that_fit": sizes_that_fit,
    "methods_drawn": methods_drawn, "steps_until": steps_until, "compiled_off": compiled_off,
    "vocabulary": ARCHITECTURE["vocab_size"],
}  # fmt: skip
"""What a page may ask for."""
