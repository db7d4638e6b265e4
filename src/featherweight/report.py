"""The report of a comparison, or of several: tables, figures and page. `compare` makes it at its end, `report` from what is on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import merged, on_disk, page, tables
from .advice import advice, verdict
from .errors import InputError
from .foreign import path_of, similar
from .prepare import new_folder
from .progress import note
from .results import FILE, Line, read


def run_report(folders: Sequence[str], out: str | None) -> int:
    """`featherweight report`."""
    sources = [path_of(folder) for folder in folders]
    lines = gathered(sources)
    folder = new_folder(out, "report")
    apart = merged.kept_apart(lines)
    notes = [f"of {len(sources)} comparisons: {', '.join(map(str, folders))}"] if len(sources) > 1 else []
    if len(letters := merged.letters(lines)) > 1:
        notes += [f"machine {letter}: {name}" for name, letter in letters.items()]
    notes += [*verdict(apart), *advice(apart)] if len(letters) == 1 else verdict(apart)
    for source in sources:
        for name in {line.tested for line in lines}:
            if name and (rows := source / f"tested-{name}.jsonl").is_file():
                on_disk.write(folder / rows.name, rows.read_text(encoding="utf-8"))
    tables.save(folder, apart, notes, keep=lines)
    tables.show(apart, notes)
    page.write(folder, title_of(lines), lines, notes)
    note(f"\nsaved in {folder} (report.html, table.md, table.csv, table.tex, rows.jsonl, figures/)")
    return 0


def gathered(folders: Sequence[Path]) -> list[Line]:
    """Every run of these comparisons, each once: the same run on the same machine counts where it was made last."""
    found: dict[tuple[str, str], Line] = {}
    for folder in folders:
        lines = read(folder)
        if not lines:
            raise InputError(
                f"{folder} holds no runs of a comparison: it needs a {FILE}, as `featherweight compare` writes it"
                + ("" if folder.exists() else similar(str(folder), folder=True))
            )
        for line in lines:
            found[line.identity or f"{folder} {line.name} {line.seed}", merged.machine(line)] = line
    return list(found.values())


def title_of(lines: Sequence[Line]) -> str:
    """What was compared: `smollm2-135m-instruct on movie-reviews`."""

    def named(key: str) -> str:
        names = dict.fromkeys(str(line.provenance[key]) for line in lines if line.provenance.get(key))
        return ", ".join(Path(name).name or name for name in names)

    model, data = named("base"), named("data")
    return f"{model} on {data}" if model and data else model or data or "A comparison"


def write_page(folder: Path, lines: Sequence[Line], notes: Sequence[str]) -> None:
    """The page of a comparison, with its figures."""
    if lines:
        page.write(folder, title_of(lines), lines, notes)
