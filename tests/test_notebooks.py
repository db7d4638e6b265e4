"""The notebooks run from the first cell to the last, and what they show in the repository came from the text that is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from handbook import notebook  # noqa: E402

BOOKS = sorted(notebook.FOLDER.glob("*.ipynb"))


def run(path: Path, here: Path, **parameters: object) -> Any:
    """Run a notebook in an empty folder, shortened: what it sets in its cell of parameters is set anew after it, as papermill does."""
    book = nbformat.read(path, as_version=4)
    [at] = [i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ())]
    set_anew = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    assert all(f"\n{name} = " in f"\n{book.cells[at].source}" for name in parameters)
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(set_anew))
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(here)}}).execute()
    return book


def printed(book: Any) -> str:
    """All that the cells wrote on standard output."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
@pytest.mark.real
def test_the_methods_side_by_side(tmp_path: Path) -> None:
    book = run(notebook.FOLDER / "side_by_side.ipynb", tmp_path, STEPS=2, TEST_ROWS=16, OUT="adapters")
    text = printed(book)
    for title, trained in {
        "LoRA": 460_800,
        "Prompt Tuning": 11_520,
        "P-Tuning": 176_192,
        "Prefix-Tuning": 230_400,
        "(IA)³": 57_600,
    }.items():
        assert f"{title:14} {trained:,} trained" in text
        assert (tmp_path / "adapters" / title / "adapter_model.safetensors").is_file()
    drawn = [o for cell in book.cells for o in cell.get("outputs", ()) if "image/svg+xml" in o.get("data", {})]
    assert len(drawn) == 2


@pytest.mark.slow
@pytest.mark.real
def test_your_own_data(tmp_path: Path) -> None:
    book = run(
        notebook.FOLDER / "your_own_data.ipynb",
        tmp_path,
        DATA=str(ROOT / "examples/data/tickets.csv"),
        STEPS=12,
        OUT="adapter",
    )
    text = printed(book)
    assert "51 rows to learn from, 21 to test on" in text
    assert "step  12: loss" in text
    assert "adapter_config.json" in text
    assert text.count("I paid two times for the same lamp.") == 1
    assert "It fits into the 8.0 GiB of this memory." in " ".join(text.split())


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_shows_was_made_by_the_text_that_is_there(path: Path) -> None:
    book = notebook.read(path)
    assert book["metadata"]["featherweight"]["source"] == notebook.source_of(book), (
        "run: python docs/capture.py notebooks"
    )
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code" and cell["source"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    assert "/home" not in path.read_text(encoding="utf-8")
