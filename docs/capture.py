"""Run the commands that the handbook shows, and keep what they print:

    python docs/capture.py             # all scenes of docs/captured/scenes.toml, in their order
    python docs/capture.py errors      # or some
    python docs/capture.py notebooks   # the notebooks: their outputs are kept in them

Both streams are kept as a terminal would show them, without progress lines, the folder that they ran in, and the hub's address. The last
line says when, on what and with which versions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).resolve().parent))

from featherweight.provenance import machine, versions
from handbook.notebook import FOLDER, ROOT, source_of

HERE = Path(__file__).resolve().parent / "captured"
DATA = HERE.parent.parent / "examples/data"
WORK = HERE.parent.parent / "build/captured"
PROGRESS = re.compile(r"^.*(?:it/s|s left)$|^  \w+ = .*$|^configuration .*$|^$\n", flags=re.M)


def scenes() -> dict[str, list[str]]:
    """Each scene's commands."""
    told = tomllib.loads((HERE / "scenes.toml").read_text(encoding="utf-8"))
    return {name: scene["commands"] for name, scene in told.items()}


def run(command: str) -> str:
    """What a command prints, its exit code where it is not 0."""
    here = f'featherweight() {{ {sys.executable} -m featherweight.cli "$@"; }}; {command}'
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
    done = subprocess.run(
        ["bash", "-c", here],
        cwd=WORK,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    text = PROGRESS.sub("", done.stdout.replace(f"{WORK}/", "")).strip("\n")
    text = re.sub(r"'https?://[^']*'", "the hub", re.sub(r"\n{2,}", "\n", text))
    return f"$ {command}\n{text}\n" + (f"[exit code {done.returncode}]\n" if done.returncode else "")


def run_notebook(path: Path, told: str) -> None:
    """Run a notebook where it lies and keep what it prints and draws, with where that was; progress is left out."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=3600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    book.metadata["language_info"] = {"name": "python"}
    book.metadata["featherweight"] = {"ran": told, "source": source_of(book)}
    nbformat.write(book, path)
    print(f"captured {path.name}")


def _kept(outputs: list[Any]) -> list[Any]:
    """A cell's outputs as one text after another, without progress, machine's paths and addresses."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        elif output.name == "stdout":
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = re.sub(r"'https?://[^']*'", "the hub", PROGRESS.sub("", output.text).replace(f"{ROOT}/", ""))
    return kept


def main(wanted: list[str]) -> None:
    """Run the scenes and write their files."""
    if not wanted:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for file in DATA.iterdir():
        shutil.copy(file, WORK)
    told = ", ".join([f"{date.today()}", machine(), *(f"{name} {version}" for name, version in versions().items())])
    for name, commands in scenes().items():
        if not wanted or name in wanted:
            shown = "\n".join(run(command) for command in commands)
            (HERE / f"{name}.txt").write_text(f"{shown}\n# {told}\n", encoding="utf-8")
            print(f"captured {name}")
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not wanted or "notebooks" in wanted or path.stem in wanted:
            run_notebook(path, told)


if __name__ == "__main__":
    main(sys.argv[1:])
