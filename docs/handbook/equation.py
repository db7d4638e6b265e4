"""Equations as they stand in a docstring, as TeX.

A docstring is read as text, so it says `y = W x + s · B A x` and `d_in`; the page shows the same, set. Runs of two spaces
separate the parts of a line, words of the explanation are set upright, symbols slanted.
"""

from __future__ import annotations

import re

SIGNS = {
    "·": r"\cdot ", "⊙": r"\odot ", "×": r"\times ", "→": r"\to ", "←": r"\leftarrow ", "−": "-", "‖": r"\Vert ",
    "∂": r"\partial ", "≤": r"\le ", "≈": r"\approx ", "…": r"\dots ", "%": r"\%", "Σ": r"\textstyle\sum ",
}  # fmt: skip
GREEK = {"Λ": r"\Lambda ", "β": r"\beta ", "Δ": r"\Delta ", "λ": r"\lambda ", "τ": r"\tau "}
WIDEST = 46
"""Characters of a docstring that make a row; what is longer is broken between its pieces."""
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ᵢ", "0123456789i")
RAISED = {"²": "^{2}", "³": "^{3}", "ᵀ": "^{\\top}", "⁻¹": "^{-1}"}
BARRED = {"Ī": r"\bar{I}", "Ū": r"\bar{U}"}
TOKEN = re.compile(
    r"(?P<word>[A-Za-z]+(?:_[A-Za-z]+)*)|(?P<lowered>[₀-₉ᵢ]+)|(?P<raised>⁻¹|[²³ᵀ])|(?P<root>√\w+)|(?P<number>[\d.,]*\d)|(?P<other>.)"
)


def word(text: str) -> str:
    """A symbol, a symbol with an index, or a name that is set upright."""
    if len(text) == 1:
        return f"{text} "
    head, _, index = text.partition("_")
    if index and len(head) == 1:
        index = index if len(index) == 1 else rf"\mathrm{{{index}}}"
        return f"{head}_{{{index}}} "
    name = text.replace("_", r"\_")
    return rf"\mathrm{{{name}}} "


def tex(text: str) -> str:
    """One piece of an equation as TeX."""
    out = []
    for token in TOKEN.finditer(text):
        kind, value = token.lastgroup, token[0]
        if kind == "word":
            out.append(word(value))
        elif kind == "lowered":
            out.append(f"_{{{value.translate(LOWERED)}}}")
        elif kind == "raised":
            out.append(RAISED[value])
        elif kind == "root":
            out.append(rf"\sqrt{{{word(value[1:]).strip()}}}")
        elif kind == "number":
            out.append(value.replace(",", "{,}"))
        else:
            out.append(SIGNS.get(value) or GREEK.get(value) or BARRED.get(value) or value)
    return re.sub(r"(\\mathrm\{[^}]*\}) (?=[A-Za-z]|\\mathrm)", r"\1\\ ", re.sub(r" {2,}", " ", "".join(out).strip()))


def display(block: str) -> str:
    """An indented block of a docstring: each line a row, its pieces (two spaces apart) with room between them, long rows broken."""
    rows: list[str] = []
    for line in block.strip("\n").split("\n"):
        pieces = [part.strip(" ,") for part in re.split(r" {2,}", line.strip()) if part.strip(" ,")]
        room = 0
        for i, piece in enumerate(pieces):
            fits = i > 0 and len(piece) <= room
            rows[-1:] = [rf"{rows[-1]} \qquad {labelled(piece)}"] if fits else [*rows[-1:], labelled(piece)]
            room = room - len(piece) if fits else WIDEST - len(piece)
    if len(rows) == 1:
        return rows[0]
    return r"\begin{gathered}" + r" \\[.5em] ".join(rows) + r"\end{gathered}"


def labelled(piece: str) -> str:
    """`A: r × d_in` says a shape; `keys, values: y = …` says where; `(where …)` is a remark."""
    if piece.startswith("(") and piece.endswith(")") and " " in piece:
        label, colon, rest = piece[1:-1].partition(": ")
        return rf"(\text{{{label}: }}{tex(rest)})" if colon else rf"\text{{{piece}}}"
    if where := re.match(r"([A-Za-z][\w, -]*[a-z]{2,}):( .*)?$", piece):
        return rf"\text{{{where[1]}:}}\quad {tex(where[2] or '')}"
    if width := re.match(r"(.{1,3}): +(.*×.*)", piece):
        return rf"{tex(width[1])} \in \mathbb{{R}}^{{{tex(width[2])}}}"
    return tex(piece)
