"""The map of the field, after Lialin et al. 2023, "Scaling Down to Scale Up", arXiv:2303.15647 (figure 2 of its first version).

Three ways to train little — add something, select something, train something smaller that stands for it — and where they
overlap. Methods that came after the survey, or that it leaves out, are placed by us and marked with a small circle.
"""

from __future__ import annotations

from dataclasses import dataclass

from .svg import Sheet

CELL = (106, 42)


@dataclass(frozen=True)
class Place:
    """A method at its place. `name` is the registry's, for those that we have."""

    title: str
    year: int
    arxiv: str
    family: str
    x: float
    y: float
    ours: bool = False
    """Whether it is we who put it there, not the survey."""


ADDED, ADAPTER, PROMPT = "additive", "additive: adapter", "additive: soft prompt"
CHOSEN, SMALL = "selective", "reparametrisation"
COLUMNS = (44, 156, 268)
RIGHT = (540, 652, 764)
PLACES = (
    Place("(IA)³", 2022, "2205.05638", ADDED, COLUMNS[0], 72),
    Place("Ladder Side", 2022, "2206.06522", ADDED, COLUMNS[1], 72),
    Place("Adapters", 2019, "1902.00751", ADAPTER, COLUMNS[0], 162),
    Place("AdaMix", 2022, "2205.12410", ADAPTER, COLUMNS[1], 162),
    Place("MAM Adapter", 2021, "2110.04366", "additive: adapter and soft prompt", COLUMNS[1], 239),
    Place("Prompt Tuning", 2021, "2104.08691", PROMPT, COLUMNS[0], 328),
    Place("Prefix-Tuning", 2021, "2101.00190", PROMPT, COLUMNS[1], 328),
    Place("P-Tuning", 2021, "2103.10385", PROMPT, COLUMNS[2], 328, ours=True),
    Place("WARP", 2021, "2101.00121", PROMPT, COLUMNS[0], 384),
    Place("SPoT", 2021, "2110.07904", PROMPT, COLUMNS[1], 384),
    Place("IPT", 2021, "2110.07867", PROMPT, COLUMNS[2], 384),
    Place("P-Tuning v2", 2021, "2110.07602", PROMPT, COLUMNS[0], 440, ours=True),
    Place("SparseAdapter", 2022, "2210.04284", "additive and selective", 411, 238),
    Place("S4", 2023, "2301.01821", "all three", 411, 300),
    Place("UniPELT", 2021, "2110.07577", "additive and reparametrisation", 411, 384),
    Place("Compacter", 2021, "2106.04647", "additive and reparametrisation", 411, 440),
    Place("BitFit", 2021, "2106.10199", CHOSEN, RIGHT[0], 88),
    Place("DiffPruning", 2020, "2012.07463", CHOSEN, RIGHT[1], 88),
    Place("Fish Mask", 2021, "2111.09839", CHOSEN, RIGHT[2], 88),
    Place("LT-SFT", 2021, "2110.07560", CHOSEN, RIGHT[0], 144),
    Place("FAR", 2022, "2205.01541", CHOSEN, RIGHT[1], 144),
    Place("Cross-attention", 2021, "2104.08771", CHOSEN, RIGHT[2], 144),
    Place("LN-tuning", 2022, "2211.08682", CHOSEN, RIGHT[0], 200),
    Place("LoRA", 2021, "2106.09685", SMALL, RIGHT[0], 384),
    Place("KronA", 2022, "2212.10650", SMALL, RIGHT[1], 384),
    Place("Intrinsic SAID", 2020, "2012.13255", SMALL, RIGHT[2], 384),
    Place("AdaLoRA", 2023, "2303.10512", SMALL, RIGHT[0], 440, ours=True),
    Place("VeRA", 2023, "2310.11454", SMALL, RIGHT[1], 440, ours=True),
    Place("DoRA", 2024, "2402.09353", SMALL, RIGHT[2], 440, ours=True),
)


def field(pages: dict[str, str]) -> Sheet:
    """The map. `pages` leads from a method's title to its page, for the methods that we have."""
    sheet = Sheet(
        900,
        520,
        "The map of parameter-efficient fine-tuning",
        "Additive, selective and reparametrisation-based methods.",
    )
    sheet.add('<path class="region a" d="M34 24H378a14 14 0 0 1 14 14V218a14 14 0 0 0 14 14H510a14 14 0 0 1 14 14V486a14 14 0 0 1 -14 14'
              'H34a14 14 0 0 1 -14 -14V38a14 14 0 0 1 14 -14Z"/>')  # fmt: skip
    sheet.add('<path class="region s" d="M416 40H866a14 14 0 0 1 14 14V258a14 14 0 0 1 -14 14H544a14 14 0 0 0 -14 14V344a14 14 0 0 1 -14 14'
              'H416a14 14 0 0 1 -14 -14V54a14 14 0 0 1 14 -14Z"/>')  # fmt: skip
    sheet.add('<rect class="region r" x="402" y="286" width="478" height="214" rx="14"/>')
    sheet.box(32, 134, 350, 154, "group")
    sheet.box(32, 228, 350, 262, "group")
    sheet.words(36, 50, "Additive", "large")
    sheet.words(118, 50, "put something new beside what is frozen", "soft small")
    sheet.words(44, 152, "adapters: small layers", "soft small")
    sheet.words(44, 318, "soft prompts: learned positions", "soft small")
    sheet.words(540, 64, "Selective", "large")
    sheet.words(540, 80, "train a few of the model’s own parameters", "soft small")
    sheet.words(540, 356, "train something small that stands for a large change", "soft small")
    sheet.words(540, 336, "Reparametrisation-based", "large")
    for place in PLACES:
        _cell(sheet, place, pages.get(place.title))
    sheet.box(665, 206, 14, 14, "trained")
    sheet.words(685, 217, "here, with a page of its own", "small")
    sheet.words(668, 238, "∘", "small")
    sheet.words(685, 238, "placed by us, not by the survey", "small")
    return sheet


def _cell(sheet: Sheet, place: Place, page: str | None) -> None:
    """A method with its year and paper; a link, where we have it."""
    w, h = CELL
    if page:
        sheet.add(f'<a href="{page}">')
    sheet.add(
        f'<rect class="{"trained" if page else "paper"}" x="{place.x}" y="{place.y}" width="{w}" height="{h}" rx="5"/>'
    )
    sheet.words(
        place.x + w / 2,
        place.y + 18,
        place.title + (" ∘" if place.ours else ""),
        "middle" + (" hot" if page else "") + (" small" if len(place.title) > 11 else ""),
    )
    sheet.words(place.x + w / 2, place.y + 33, f"{place.year} · {place.arxiv}", "middle soft tiny")
    if page:
        sheet.add("</a>")
