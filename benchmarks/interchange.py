"""Adapters of every method on every family, there and back between featherweight and the real peft.

Ours: we save → peft loads → peft saves → we load. Theirs: peft saves → we load → we save → peft loads. A cell is the
largest deviation of the logits at any stop, relative to the largest logit. Fails where one is above 1e-5.

    python benchmarks/interchange.py > benchmarks/results/interchange.md      # a minute
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from torch import Tensor

from featherweight import InputError
from featherweight.provenance import record
from models import random_inputs
from reference import THEIRS, cannot
from subjects import EVERYWHERE, METHODS, OURS, Side, adapted, build, off

LIMIT = 1e-5


@torch.no_grad()
def logits(side: Side, model: Any) -> Tensor:
    """What a model says of the same rows."""
    return side.logits(model.eval(), **random_inputs(model))


def there_and_back(first: Side, second: Side, family: str, method: str, folder: Path) -> float:
    """The worst deviation from what the first side's adapter says."""
    model = adapted(first, family, method, torch.float32)
    expected, worst = logits(first, model), 0.0
    for stop, (writer, reader) in enumerate(((first, second), (second, first))):
        writer.save(model, folder / str(stop))
        model = reader.load(build(family, torch.float32), folder / str(stop))
        worst = max(worst, off(logits(reader, model), expected))
    return worst


def cell(family: str, method: str) -> tuple[str, bool]:
    """Both ways of one method on one family, and whether they are within the limit."""
    if why := cannot(build(family, torch.float32), method):
        return f"not asked: {why}", True
    found = []
    for first, second in ((OURS, THEIRS), (THEIRS, OURS)):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            try:
                found.append(there_and_back(first, second, family, method, Path(folder)))
            except InputError as e:
                return f"refused: {str(e).split(',')[0]}", "needs a model whose layers take keys" in str(e)
    return " · ".join("0" if d == 0 else f"{d:.0e}" for d in found), max(found) <= LIMIT


def main() -> None:
    """Print the table; fail when the two disagree."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    made = record()
    print("# Interchange with the real peft\n")
    print(
        f"`python benchmarks/interchange.py`, {made['date']}; "
        + ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    )
    print("\nEach cell: ours there and back · theirs there and back, the largest relative deviation of the logits.\n")
    print("| family | " + " | ".join(METHODS) + " |\n| --- |" + " --- |" * len(METHODS))
    wrong = []
    for family in EVERYWHERE:
        cells = {method: cell(family, method) for method in METHODS}
        print(f"| {family} | " + " | ".join(text for text, _ in cells.values()) + " |", flush=True)
        wrong += [f"{method} on {family}: {text}" for method, (text, fits) in cells.items() if not fits]
    if wrong:
        sys.exit("not the same: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
