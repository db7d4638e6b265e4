"""Where the numbers come from: what all runs have in common once, and what each has of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..redaction import clean
from ..results import Line
from .tags import Html, foreign, joined, tag

LONGEST = 300
OWN = (
    ("seed", "seed"), ("steps", "train_steps"), ("rate", "lr"), ("batch", "batch_size"), ("examples", "train_examples"),
    ("tokens", "train_tokens"),
)  # fmt: skip


def flat(told: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings as `settings.lora.r`: `8`. Of a path on the machine only its end is told: the page is for others too."""
    found: dict[str, str] = {}
    for key, value in told.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}.")
        else:
            told_of = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            found[f"{before}{key}"] = Path(told_of).name if Path(told_of).is_absolute() else told_of
    return found


def fact(lines: Sequence[Line], name: str) -> list[str]:
    """What the runs say of `model`, `data` or the like, wherever in their provenance that stands; each once."""
    found = []
    for line in lines:
        told = flat(line.provenance)
        said = [value for key, value in told.items() if key.rsplit(".", 1)[-1] == name and value not in ("", "None")]
        found += said[:1]
    return list(dict.fromkeys(found))


def section(lines: Sequence[Line]) -> Html:
    """Provenance of every run; folded, but open on paper."""
    told = [clean(flat(line.provenance)) for line in lines]
    common = (
        {key: value for key, value in told[0].items() if all(own.get(key) == value for own in told)} if told else {}
    )
    alike = tag(
        "dl",
        *(
            joined(tag("dt", foreign(key, 80)), tag("dd", foreign(value, LONGEST)))
            for key, value in sorted(common.items())
        ),
        class_="facts-long",
    )
    own = [{k: v for k, v in of.items() if k not in common} for of in told]
    last = ["what differs"] if any(own) else []
    words = ["run", *(word for word, _ in OWN), "ended", "identity", *last]
    heads = [tag("th", word, scope="col", class_="number" if word in dict(OWN) else None) for word in words]
    body = [_run(line, of, bool(last)) for line, of in zip(lines, own, strict=True)]
    runs = tag(
        "table", tag("caption", "Every run"), tag("thead", tag("tr", *heads)), tag("tbody", *body), class_="origin",
    )  # fmt: skip
    scroll = tag("div", runs, class_="scroll", tabindex="0", role="region", aria_label="Every run; it scrolls sideways")
    first = tag("details", tag("summary", f"The same for all {len(lines)} runs"), alike) if common else ""
    return joined(first, tag("details", tag("summary", f"The {len(lines)} runs, one by one"), scroll))


def _run(line: Line, own: Mapping[str, str], several: bool) -> Html:
    numbers = [f"{value:,}" if isinstance(value := getattr(line, name), int) else f"{value:g}" for _, name in OWN]
    differs = joined(
        *(joined(tag("span", foreign(key, 80)), " ", foreign(value, LONGEST)) for key, value in sorted(own.items())),
        by="; ",
    )
    return tag(
        "tr", tag("th", line.method, scope="row"), *(tag("td", number, class_="number") for number in numbers),
        tag("td", foreign(line.stopped or "complete", 60)),
        tag("td", tag("code", line.identity)), tag("td", differs, class_="differs") if several else "",
    )  # fmt: skip
