"""A notebook as a page: its words, its code, and what it printed and drew when `docs/capture.py` ran it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .links import ROOT
from .measured import footnote

FOLDER = ROOT / "examples/notebooks"


def read(path: Path) -> dict[str, Any]:
    """The notebook's JSON."""
    book: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return book


def source_of(book: dict[str, Any]) -> str:
    """A hash of what is written in a notebook, whatever it printed: outputs that belong to another text are noticed."""
    return hashlib.sha256(json.dumps([_text(cell["source"]) for cell in book["cells"]]).encode()).hexdigest()[:16]


def page(path: Path) -> str:
    """The notebook as Markdown; links are written as from `docs/`."""
    book, inside = read(path), path.relative_to(ROOT).as_posix()
    ran = book["metadata"]["featherweight"]["ran"]
    told = footnote(
        f"This page is the notebook [`{inside}`](/{inside}), as [`docs/capture.py`](/docs/capture.py) ran it: {ran}"
    )
    title, *rest = (_cell(cell) for cell in book["cells"])
    head, _, words = title.partition("\n")
    return "\n\n".join([head, told, words.strip("\n"), *rest]) + "\n"


def _cell(cell: dict[str, Any]) -> str:
    text = _text(cell["source"])
    if cell["cell_type"] == "markdown":
        text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)
        return text.replace("](../../", "](/")
    return "\n\n".join([f"```python\n{text}\n```", *filter(None, map(_output, cell["outputs"]))])


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _fence(_text(output["text"]))
    data = output["data"]
    if drawn := data.get("image/svg+xml"):
        coded = base64.b64encode(_text(drawn).encode()).decode()
        return f'<img class="plot" alt="What the code above draws" src="data:image/svg+xml;base64,{coded}">'
    return _fence(_text(data["text/plain"]))


def _fence(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)
