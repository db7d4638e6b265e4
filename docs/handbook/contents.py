"""What the handbook contains, in the order of its navigation."""

from __future__ import annotations

from featherweight.methods import METHODS, method_class

Contents = list[tuple[str, str | list[tuple[str, str]]]]


def contents() -> Contents:
    """Titles and pages. A method has its page by being registered."""
    methods = [(method_class(name).title, f"methods/{name}.md") for name in METHODS]
    return [
        ("Start", "index.md"),
        ("Methods", [("The map", "methods/index.md"), *methods]),
        ("Guides", [
            ("Installing", "guides/installing.md"),
            ("Words", "guides/words.md"),
            ("From your CSV to an adapter", "guides/your-csv.md"),
            ("An instruction or chat model", "guides/chat.md"),
            ("Choosing a method", "guides/choosing.md"),
            ("Reading the report", "guides/report.md"),
            ("Evaluating honestly", "guides/evaluating.md"),
            ("Using the adapter elsewhere", "guides/elsewhere.md"),
            ("Without a network", "guides/offline.md"),
            ("Troubleshooting", "guides/troubleshooting.md"),
            ("A method of your own", "guides/your-method.md"),
        ]),
        ("Notebooks", [
            ("The methods, side by side", "notebooks/side_by_side.md"),
            ("Your own data", "notebooks/your_own_data.md"),
        ]),
        ("Tricks", [
            ("For small machines", "tricks/index.md"),
            ("What fits on which card", "tricks/what-fits.md"),
            ("Fewer rows at a time", "tricks/fewer-rows.md"),
            ("Checkpointing", "tricks/checkpointing.md"),
            ("A quantised base", "tricks/quantisation.md"),
            ("Offloading and streaming", "tricks/streaming.md"),
            ("Optimisers", "tricks/optimisers.md"),
            ("Precision", "tricks/precision.md"),
            ("Packing", "tricks/packing.md"),
            ("Loss at labels only", "tricks/label-only-loss.md"),
            ("Compilation", "tricks/compilation.md"),
        ]),
        ("How it works", [
            ("The one idea", "how-it-works.md"),
            ("Will it fit?", "fit.md"),
            ("How fast", "how-fast.md"),
            ("Comparing honestly", "comparing.md"),
            ("Never lose work", "never-lose-work.md"),
            ("What you can rely on", "what-you-can-rely-on.md"),
            ("How we measure", "how-we-measure.md"),
        ]),
        ("Reference", [("Commands", "reference/commands.md"), ("Python", "reference/api.md")]),
    ]  # fmt: skip


def summary() -> str:
    """The navigation as the site builder reads it."""
    out = []
    for title, there in contents():
        if isinstance(there, str):
            out.append(f"* [{title}]({there})")
        else:
            out += [f"* {title}", *(f"    * [{name}]({page})" for name, page in there)]
    return "\n".join(out) + "\n"
