"""A method's page, made of its own file: docstring, fields, example — and of what was counted and measured."""

from __future__ import annotations

import re
from collections.abc import Callable

from featherweight.demo import ARCHITECTURE

from . import measured, sizes
from .draw.block import block
from .draw.charts import losses, search
from .draw.svg import Sheet
from .draw.zoom import zoom
from .equation import display, tex
from .explained import Explained, entries, prose_and_equations
from .links import ROOT

NAME = re.compile(r"(?<![\w/.])[A-Za-z]+(?:_[A-Za-z]+)+(?![\w/.]\w)")
PATH = re.compile(r"`?\b((?:benchmarks|examples|tests|docs|src)/[\w/.]+\.(?:py|md|jsonl|json))`?")


def page(it: Explained) -> str:
    """The whole page, in the order in which a reader asks."""
    sections: list[tuple[str, Callable[[Explained], str]]] = [
        ("The idea", _idea), ("Every symbol", _symbols), ("How many parameters", _parameters), ("When to use it, and when not", _when),
        ("What it costs", _costs), ("What it reached here", _reached), ("Its hyper-parameters", _options), ("Its learning rate", _rates),
        ("Pitfalls", _pitfalls), ("Try it", _example), ("The paper’s claim, and what we measured", _claim),
    ]  # fmt: skip
    told = [(title, body) for title, make in sections if (body := make(it).strip())]
    head = f"# {it.cls.title}\n\n**{it.tagline[:1].upper()}{it.tagline[1:]}.**\n{{ .lead }}\n\n{_paper_line(it)}\n"
    return head + "".join(f"\n## {title}\n\n{body}\n" for title, body in told)


def figures(*sheets: Sheet | None) -> str:
    """Drawings side by side, or below each other where there is no room."""
    inner = "".join(f"<figure>\n{sheet.svg()}</figure>\n" for sheet in sheets if sheet)
    return f'<div class="figures">\n{inner}</div>\n'


def prose(text: str) -> str:
    """Words of a docstring as Markdown: files and arXiv numbers that it names become links, names of the code look like code."""
    text = PATH.sub(lambda m: f"[`{m[1]}`](/{m[1]})" if (ROOT / m[1]).exists() else m[0], text)
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    pieces = re.split(r"(`[^`]*`|\[[^\]]*\]\([^)]*\))", text)
    return "".join(piece if i % 2 else NAME.sub(_name, piece) for i, piece in enumerate(pieces))


def _name(match: re.Match[str]) -> str:
    """A width is a symbol, any other name with an underscore one of the code."""
    return f"${tex(match[0])}$" if match[0] in ("d_in", "d_out") else f"`{match[0]}`"


def _paper_line(it: Explained) -> str:
    file = f"src/featherweight/methods/{it.file.name}"
    paper = " ".join(it.sections["Paper"].split()).rstrip(".")
    return f"Paper: {prose(paper)}.\n\nThe code, and where this page comes from: [`{file}`](/{file})."


def _idea(it: Explained) -> str:
    out = []
    for kind, block_ in prose_and_equations(it.sections["The idea"]):
        out.append(f"$$\n{display(block_)}\n$$" if kind == "equation" else prose(block_))
    places = sizes.places(it.name, sizes.DEFAULT)
    inputs = getattr(sizes.resolved(it.name, sizes.DEFAULT), "feedforward_modules", ())
    drawn = figures(block(it.name, it.cls.title, [p.name for p in places], inputs), zoom(it.name, it.cls.title))
    return "\n\n".join([*out[:2], drawn, *out[2:]])


def _symbols(it: Explained) -> str:
    rows = entries(it.sections.get("Symbols", ""))
    return "\n".join(
        ["| symbol | what it is |", "|---|---|", *(f"| {_symbol(s)} | {prose(text)} |" for s, text in rows)]
    )


def _symbol(words: str) -> str:
    return ", ".join(f"${display(word)}$" if word.strip() else word for word in words.split(", "))


def _parameters(it: Explained) -> str:
    out = [prose(it.sections["Trainable parameters"])]
    if worked := worked_example(it):
        out.append(
            f"For one such place in the default model, {sizes.DEFAULT}, with the default hyper-parameters: {worked}."
        )
    for model in (sizes.DEFAULT, sizes.LARGE):
        total, trained = sizes.count(it.name, model)
        rows = [
            f"| `{p.name}` | {p.sites} | {f'{p.d_in:,} → {p.d_out:,}' if p.d_in else '–'} | {p.parameters:,} | {p.sites * p.parameters:,} |"
            for p in sizes.places(it.name, model)
        ]
        table = "\n".join(["| where | how many | width | each trains | together |", "|---|--:|---|--:|--:|", *rows])
        share = measured.percent(trained / total, 4)
        out.append(f"**{model}**: {trained:,} of {total:,} parameters are trained, {share}.\n\n{table}")
    out.append("These are counted by the library, on models without weights; ask it about yours:")
    out.append("```bash\nfeatherweight methods --model your-model\n```")
    return "\n\n".join(out)


def worked_example(it: Explained) -> str:
    """The formula with the default model's numbers in place of names, and what comes out; nothing, where there is no formula."""
    formula = " ".join(it.sections["Trainable parameters"].split())
    formula = re.split(r" per |\. | with |\.$", re.sub(r" \([a-z]+; [^)]*\)", "", formula))[0]
    width, first = ARCHITECTURE["hidden_size"], sizes.places(it.name, sizes.DEFAULT)[0]
    known = sizes.hyperparameters(it.name) | {
        "d_in": first.d_in, "d_out": first.d_out, "width": width, "d": width, "layers": ARCHITECTURE["num_hidden_layers"],
        "key–value heads": ARCHITECTURE["num_key_value_heads"], "head size": width // ARCHITECTURE["num_attention_heads"],
    }  # fmt: skip
    known |= {"n": known.get("num_virtual_tokens"), "h": known.get("encoder_hidden_size")}
    for name in sorted(known, key=len, reverse=True):
        if known[name] is not None:
            formula = re.sub(rf"(?<!\w){name}(?!\w)", f"{known[name]:,}", formula)
    numbers = formula.replace("·", " * ").replace("×", "*").replace(",", "")
    if not re.fullmatch(r"[\d\s*+()]+", numbers) or not re.search(r"[*+]", numbers):
        return ""
    result = eval(numbers)  # digits and signs only
    if result != first.parameters:
        raise ValueError(
            f"{it.name}: the docstring's formula gives {result:,}, but {first.parameters:,} are trained at {first.name}"
        )
    return f"{formula} = **{result:,}**"


def _when(it: Explained) -> str:
    yes, no = prose(it.sections["When to use it"]), prose(it.sections["When not"])
    return f'!!! success "Use it"\n\n{_indent(_capital(yes))}\n\n!!! warning "Rather not"\n\n{_indent(_capital(no))}'


def _costs(it: Explained) -> str:
    return _capital(prose(it.sections["What it costs"])) + "\n\n" + _against_peft_speed(it)


def _against_peft_speed(it: Explained) -> str:
    rows = []
    for work, words in (("reviews", "short reviews"), ("answers", "answers of 100–400 tokens")):
        times, memory = measured.speedup(it.name, work), measured.memory(it.name, work)
        if times and memory:
            ours, theirs = memory
            rows.append(
                f"| {words} | {times:.2f} | {measured.mib(ours)} | {measured.mib(theirs)} | {ours / theirs:.2f} |"
            )
    if not rows:
        return "Its time and memory have not been measured against PEFT + Trainer yet."
    head = "| work | times as fast | memory above the weights | theirs | of theirs |\n|---|--:|--:|--:|--:|"
    told = measured.provenance(measured.experiment(f"train reviews {it.name}") or {})
    return (
        "Step by step in turn with HF PEFT + `Trainer`, on the same rows from the same start; medians:\n\n"
        + "\n".join([head, *rows])
        + "\n\n"
        + measured.footnote(f"{told}; {measured.source('speed.jsonl', 'speed.py')}")
    )


def _reached(it: Explained) -> str:
    row = measured.of_method("default/rows.jsonl", it.name)
    best = [t for t in measured.trials(it.name) if t["options"] == {} and t["lr"] == it.cls.learning_rate]
    if row is None:
        if not best:
            return "Nothing has been measured with it yet."
        told = f"In the search of its learning rate: {measured.accuracy(best[0])} of the validation rows after {best[0]['steps']} steps"
        return f"{told} ({measured.source('tune.jsonl', 'tune.py')}). It is not one of the five methods of the default comparison."
    steps, seconds = (row[key] / row.get("seeds", 1) for key in ("train_steps", "train_seconds"))
    facts = [
        ("accuracy on held-out reviews", measured.accuracy(row)),
        ("trained parameters", f"{row['trainable_params']:,} of {row['total_params']:,}"),
        ("peak memory of the whole process", measured.mib(row["peak_bytes"])),
        ("training", f"{row['train_steps'] / row['train_seconds']:.2f} steps of {row['batch_size']} rows a second"),
        ("evaluation", f"{row['eval_examples'] / row['eval_seconds']:.0f} rows a second"),
        ("training took", f"{seconds:.0f} s for {steps:.0f} steps at a rate of {row['lr']:g}"),
    ]
    table = "\n".join(["| on the default model and data | |", "|---|--:|", *(f"| {a} | {b} |" for a, b in facts)])
    return f"{table}\n\n{_of_default(row)}\n\n" + figures(losses(it.cls.title, row["losses"]))


def _of_default(row: measured.Record) -> str:
    return measured.footnote(f"{measured.provenance(row)}; {measured.source('default/rows.jsonl')}")


def _options(it: Explained) -> str:
    advice = {name: text for names, text in entries(it.sections.get("How to choose", "")) for name in names.split(", ")}
    rows = [
        f"| `{o.name}` | `{o.default}` | {prose(o.text)} | {prose(_capital(advice.get(o.name, '')))} |"
        for o in it.options
    ]
    table = "\n".join(["| name | default | what it is | how to choose it |", "|---|---|---|---|", *rows])
    flag = it.options[0].name
    return (
        f"{table}\n\nOn the command line: `--set {flag}=…`, or in a recipe under `[{it.name}]`. "
        f"From Python: `fw.{it.cls.__name__}({flag}=…)`. Names are those of HF PEFT where it has them; "
        "defaults too, but for starts from a text, the lengths of prompts, and AdaLoRA's phases."
    )


def _rates(it: Explained) -> str:
    found = [t for t in measured.trials(it.name) if t["options"] == {}]
    if not found:
        return f"The default is {it.cls.learning_rate:g}; no search of it is stored yet."
    points = [(t["lr"], t["validation_accuracy"], *t["interval"]) for t in found]
    one, encoder = found[0], it.cls.encoder_learning_rate
    text = (
        f"The default is **{it.cls.learning_rate:g}** (for an encoder that classifies, {encoder:g}): chosen by a search on validation "
        f"rows, {one['steps']} steps of {one['batch_size']} rows, one seed, n = {one['n']}. Neighbours differ by less than the "
        "intervals, so read it as an order of magnitude, and search again for another kind of task."
    )
    others = [
        f"| `{_options_told(t['options'])}` | {t['lr']:g} | {measured.accuracy(t)} |"
        for t in measured.trials(it.name)
        if t["options"]
    ]
    table = (
        "\n".join(["\nWith other options:\n", "| option | rate | validation accuracy |", "|---|---|---|", *others])
        if others
        else ""
    )
    drawn, small = figures(search(it.cls.title, points, it.cls.learning_rate)), measured.source("tune.jsonl", "tune.py")
    return f"{text}\n\n{drawn}{table}\n\n{measured.footnote(small)}"


def _options_told(options: dict[str, object]) -> str:
    return ", ".join(f"{k}={v}" for k, v in options.items())


def _pitfalls(it: Explained) -> str:
    text = it.sections.get("Pitfalls", "")
    return prose(re.sub(r"\n {2,}(?!\*)", " ", re.sub(r"^ *\*", "*", text, flags=re.M)))


def _example(it: Explained) -> str:
    path = ROOT / f"examples/{it.name}.py"
    if not path.exists():
        return ""
    return f"[`examples/{it.name}.py`](/examples/{it.name}.py), as the tests run it:\n\n```python\n{path.read_text().rstrip()}\n```"


def _claim(it: Explained) -> str:
    claim = _capital(" ".join(prose(it.sections.get("The paper's claim", "")).split()))
    if not claim:
        return ""
    row, other = measured.of_method("default/rows.jsonl", it.name), measured.against_peft(it.name)
    ours = []
    if row:
        ours.append(
            f"{measured.accuracy(row)} with {measured.percent(row['trainable_params'] / row['total_params'], 3)} of the parameters"
        )
    if other:
        ours.append(
            f"beside the real `peft`, trained on the same rows in the same order: {measured.percent(other['ours'])} and "
            f"{measured.percent(other['peft'])} of n = {other['n']} (p = {other['p']:.2g}, McNemar; "
            f"{measured.source('peft_accuracy.jsonl', 'peft_accuracy.py')})"
        )
    best = [t for t in measured.trials(it.name) if t["lr"] == it.cls.learning_rate and t["options"] == {}]
    if not row and best:
        ours.append(f"{measured.accuracy(best[0])}, on validation rows")
    said = "; ".join(ours) or "nothing yet"
    return (
        f"| | |\n|---|---|\n| the paper | {claim} |\n| here | {said} |\n\nThe paper speaks of other models and tasks; here it is one model "
        "of 135 million parameters and one task with three labels. The two do not contradict each other, and neither proves the other."
    )


def methods_measured() -> str:
    """All methods of the default comparison beside each other."""
    rows = []
    for row in measured.of_methods("default/rows.jsonl"):
        speed, memory = f"{row['train_steps'] / row['train_seconds']:.2f}", measured.mib(row["peak_bytes"])
        told = f"{row['trainable_params']:,} | {memory} | {speed} | {measured.accuracy(row)}"
        rows.append(f"| {row['method']} | {told} |")
    head = "| method | trained parameters | peak memory | steps a second | accuracy |\n|---|--:|--:|--:|---|"
    last = measured.of_methods("default/rows.jsonl")[-1]
    return "\n".join([head, *rows]) + f"\n\n{_of_default(last)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _indent(text: str) -> str:
    return "\n".join(f"    {line.strip()}" for line in text.split("\n"))
