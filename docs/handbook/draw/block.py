"""Where a method sits in a transformer: the same block each time, what is frozen in grey, what is trained in the accent colour.

Where the trained parts are is asked of the method itself (`Method.sites` on the default model), so a figure cannot be out of
date, and a new method has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .svg import Sheet

AXIS, WIDTH, HEIGHT = 264, 64, 30
LINEAR = {  # middle, top, name
    "q_proj": (158, 402, "query"), "k_proj": (AXIS, 402, "key"), "v_proj": (370, 402, "value"), "o_proj": (AXIS, 268, "output"),
    "gate_proj": (204, 166, "gate"), "up_proj": (324, 166, "up"), "down_proj": (AXIS, 102, "down"),
}  # fmt: skip
NOTES = {"lora": "BA", "adalora": "BΛA"}
"""What is written on an adapted layer; (IA)³, prompts and prefixes are drawn in their own way."""


def block(name: str, title: str, leaves: Iterable[str], scaled_inputs: Iterable[str] = ()) -> Sheet:
    """The block with the parts of a method: `leaves` are the kinds of modules that have one."""
    leaves = list(leaves)
    told = (
        ", ".join(LINEAR[leaf][2] for leaf in leaves if leaf in LINEAR) or "the row of tokens, or the keys and values"
    )
    sheet = Sheet(
        440, 580, f"{title} in a transformer block", f"Frozen layers in grey; {title} trains parts at: {told}."
    )
    _frozen(sheet)
    for leaf in leaves:
        if leaf in LINEAR and name == "ia3":
            _factor(sheet, leaf, at_input=leaf in scaled_inputs)
        elif leaf in LINEAR:
            _way_round(sheet, leaf, NOTES.get(name, "?"))
    if not any(leaf in LINEAR for leaf in leaves) and name not in AROUND:
        sheet.box(46, 44, 376, 434, "flow")
    AROUND.get(name, _text)(sheet)
    _legend(sheet)
    return sheet


def _frozen(sheet: Sheet) -> None:
    """What all figures share."""
    sheet.box(46, 44, 376, 434, "group")
    sheet.words(56, 61, "one of the layers", "soft small")
    for y in (450, 218):
        sheet.line((AXIS, y - 8), (AXIS, y - 16), tip=False)
        sheet.box(AXIS - 37, y - 10, 74, 18, "frozen", "norm", "tiny soft")
    for leaf in ("q_proj", "k_proj", "v_proj"):
        x, y, _ = LINEAR[leaf]
        sheet.line((AXIS, 442), (AXIS, 436), (x, 436), (x, y + HEIGHT), tip=False)
        sheet.line((x, y), (x, 348))
    sheet.box(126, 316, 276, 30, "frozen", "attention")
    sheet.line((AXIS, 316), (AXIS, 299))
    sheet.line((AXIS, 268), (AXIS, 252))
    for leaf in ("gate_proj", "up_proj"):
        x, y, _ = LINEAR[leaf]
        sheet.line((AXIS, 204), (x, 204), (x, y + HEIGHT), tip=False)
        sheet.line((x, y), (x, 150), (AXIS, 150), tip=False)
    sheet.line((AXIS, 150), (AXIS, 133))
    sheet.line((AXIS, 102), (AXIS, 84))
    for x, y, words in LINEAR.values():
        sheet.box(x - WIDTH / 2, y, WIDTH, HEIGHT, "frozen", words)
    for bottom, top in ((470, 242), (232, 74)):  # what skips the attention, and the feed-forward
        sheet.line((AXIS, bottom), (66, bottom), (66, top), (AXIS - 10, top))
        sheet.round(AXIS, top, "+")
    sheet.line((AXIS, 232), (AXIS, 228), tip=False)
    sheet.line((AXIS, 64), (AXIS, 30))
    sheet.words(AXIS + 9, 35, "next layer … head", "soft small")
    sheet.line((AXIS, 496), (AXIS, 460))


def _tokens(sheet: Sheet, prompted: int = 0) -> None:
    """The row that goes into the first layer: so many learned vectors, then the text's own."""
    left = AXIS - 18 * (prompted + 4) + 3
    for i in range(prompted):
        sheet.box(left + 36 * i, 506, 30, 26, "trained", f"p_{i + 1}", "maths hot")
    for i in range(4):
        sheet.box(left + 36 * (prompted + i), 506, 30, 26, "frozen", f"x_{i + 1}", "maths")
    sheet.line(
        (left, 503),
        (left, 497),
        (left + 36 * (prompted + 4) - 6, 497),
        (left + 36 * (prompted + 4) - 6, 503),
        tip=False,
    )
    sheet.words(left + 36 * prompted, 549, "embeddings of the text", "soft small")


def _text(sheet: Sheet) -> None:
    _tokens(sheet)


def _way_round(sheet: Sheet, leaf: str, note: str) -> None:
    """A trained way round a frozen linear layer, whose result is added."""
    x, y, _ = LINEAR[leaf]
    side = x - WIDTH / 2 - 20
    sheet.line((x, y + HEIGHT + 3), (side, y + HEIGHT + 3), (side, y + 26), tip=False, hot=True)
    sheet.line((side, y + 4), (side, y - 12), (x - 7, y - 12), hot=True)
    sheet.round(x, y - 12, "+", radius=7)
    sheet.box(side - 17, y + 4, 34, 22, "trained", note, "small hot")


def _factor(sheet: Sheet, leaf: str, at_input: bool) -> None:
    """A factor for each channel at the output of a layer, or at its input."""
    x, y, _ = LINEAR[leaf]
    y = y + HEIGHT + 11 if at_input else y - 14
    sheet.round(x, y, "⊙", hot=True, radius=9)
    sheet.words(x + 13, y + 5, "l", "maths hot")


def _prompt(sheet: Sheet) -> None:
    """Learned vectors in front of the input's."""
    _tokens(sheet, prompted=3)
    sheet.words(30, 549, "the prompt, trained", "hot small")


def _network(sheet: Sheet) -> None:
    """A prompt that a network makes."""
    _tokens(sheet, prompted=3)
    for i in range(3):
        sheet.line((156 + 36 * i, 548), (156 + 36 * i, 534), hot=True)
    sheet.shape([(136, 572), (248, 572), (236, 548), (148, 548)], words="MLP", style="small hot")
    sheet.words(258, 567, "trained with it, not kept", "hot small")


def _prefix(sheet: Sheet) -> None:
    """Keys and values in front of every layer's."""
    _tokens(sheet)
    for y, words in ((304, "P_K"), (334, "P_V")):
        sheet.box(76, y, 34, 24, "trained", words, "maths hot")
    sheet.line((110, 316), (118, 316), (118, 331), (125, 331), hot=True)
    sheet.line((110, 346), (118, 346), (118, 331), tip=False, hot=True)
    sheet.words(76, 374, "trained,", "hot small")
    sheet.words(76, 388, "each layer", "hot small")
    sheet.words(76, 402, "its own", "hot small")


AROUND: dict[str, Callable[[Sheet], None]] = {
    "prompt_tuning": _prompt, "p_tuning": _network, "prefix_tuning": _prefix,
}  # fmt: skip


def _legend(sheet: Sheet) -> None:
    """The two colours in words."""
    sheet.box(10, 10, 14, 14, "frozen")
    sheet.words(30, 22, "frozen", "small")
    sheet.box(82, 10, 14, 14, "trained")
    sheet.words(102, 22, "trained", "small")
