"""The same parts seen closely: what one adapted layer, or the row of tokens, looks like with the method around it."""

from __future__ import annotations

from collections.abc import Callable

from .svg import Sheet

Draw = Callable[[Sheet], None]


def zoom(name: str, title: str) -> Sheet | None:
    """The close view of a method, where one is drawn."""
    if name not in CLOSE:
        return None
    draw, text = CLOSE[name]
    sheet = Sheet(420, 190 if name == "ia3" else 300, f"{title}, seen closely", text)
    draw(sheet)
    return sheet


def _wide(sheet: Sheet) -> None:
    """The frozen weight of a layer, with x below and y above."""
    sheet.line((210, 288), (210, 262), (110, 262), (110, 232))
    sheet.words(220, 284, "x", "maths")
    sheet.box(50, 92, 120, 138, "frozen")
    sheet.words(110, 156, "W", "middle maths")
    sheet.words(110, 176, "frozen", "middle soft small")
    sheet.line((110, 92), (110, 46), (198, 46))
    sheet.line((210, 34), (210, 8))
    sheet.words(220, 20, "y", "maths")


def _low_rank(sheet: Sheet) -> None:
    """Down to r numbers and up again."""
    _wide(sheet)
    sheet.line((210, 262), (300, 262), (300, 232), hot=True)
    sheet.shape([(240, 230), (360, 230), (322, 176), (278, 176)], words="A")
    sheet.line((300, 176), (300, 150), hot=True)
    sheet.words(308, 168, "r numbers", "soft small")
    sheet.shape([(278, 148), (322, 148), (360, 94), (240, 94)], words="B")
    sheet.line((300, 94), (300, 46), (222, 46), hot=True)
    sheet.words(308, 72, "× s", "maths hot")
    sheet.round(210, 46, "+")
    sheet.words(366, 222, "random", "soft tiny")
    sheet.words(366, 112, "zero", "soft tiny")
    sheet.words(366, 124, "at first", "soft tiny")
    sheet.words(366, 234, "at first", "soft tiny")


def _ranks_that_move(sheet: Sheet) -> None:
    """The same with a number on each of the r ways, some of which are cut."""
    _wide(sheet)
    sheet.line((210, 262), (300, 262), (300, 240), hot=True)
    sheet.shape([(240, 238), (360, 238), (340, 196), (260, 196)], words="A")
    for i, cut in enumerate((False, False, True, False, True)):
        x = 268 + 16 * i
        sheet.line((x, 196), (x, 176), tip=False, hot=not cut, dashed=cut)
        sheet.line((x, 152), (x, 130), tip=False, hot=not cut, dashed=cut)
        sheet.box(x - 7, 154, 14, 20, "frozen" if cut else "trained", "0" if cut else "", "tiny soft")
    sheet.words(350, 169, "Λ", "maths hot")
    sheet.words(364, 168, "cut: 0", "soft tiny")
    sheet.shape([(260, 128), (340, 128), (360, 88), (240, 88)], words="B")
    sheet.line((300, 88), (300, 46), (222, 46), hot=True)
    sheet.words(308, 72, "× s", "maths hot")
    sheet.round(210, 46, "+")


def _factors(sheet: Sheet) -> None:
    """One factor for each channel."""
    heights = (26, 40, 18, 34, 24, 30)
    scales = (1.4, 0.5, 1.9, 1.0, 0.3, 1.3)
    for i, (h, s) in enumerate(zip(heights, scales, strict=True)):
        sheet.box(24 + 18 * i, 130 - h, 12, h, "frozen")
        sheet.box(166 + 18 * i, 130 - 24 * s, 12, 24 * s, "trained")
        sheet.box(308 + 16 * i, 130 - h * s, 11, h * s, "frozen")
    for x, words, style in ((76, "W x", "maths"), (218, "l", "maths hot"), (354, "y", "maths")):
        sheet.words(x, 154, words, f"middle {style}")
    for x, words in ((76, "what the layer says"), (218, "one factor a channel"), (354, "louder, quieter")):
        sheet.words(x, 174, words, "middle soft small")
    sheet.round(150, 100, "⊙")
    sheet.words(290, 105, "=", "middle large")


def _row(sheet: Sheet, y: float, made: bool = False) -> None:
    """A row of vectors: a learned prompt, then the text's own."""
    for i in range(4):
        sheet.box(28 + 40 * i, y, 34, 54, "trained", f"p_{i + 1}", "maths hot")
    for i, word in enumerate(("A", "fine", "film", "!")):
        sheet.box(216 + 46 * i, y, 40, 54, "frozen", word, "small")
    sheet.words(105, y + 74, "made by the network" if made else "learned directly", "middle hot small")
    sheet.words(305, y + 74, "embeddings of the text", "middle soft small")


def _prompt(sheet: Sheet) -> None:
    """A prompt that is learned as vectors."""
    sheet.box(28, 40, 368, 44, "frozen", "the frozen model")
    for i in range(4):
        sheet.line((45 + 40 * i, 130), (45 + 40 * i, 86), hot=True)
        sheet.line((236 + 46 * i, 130), (236 + 46 * i, 86))
    for i in range(4):
        sheet.line((236 + 46 * i, 40), (236 + 46 * i, 16))
    sheet.words(30, 30, "cut off here", "soft small")
    _row(sheet, 132)
    sheet.words(28, 250, "P starts as the embeddings of an instruction,", "small")
    sheet.words(28, 268, "then gradient descent moves the vectors.", "small")


def _network(sheet: Sheet) -> None:
    """A prompt out of a small network."""
    sheet.box(28, 10, 368, 34, "frozen", "the frozen model")
    for i in range(4):
        sheet.line((45 + 40 * i, 68), (45 + 40 * i, 46), hot=True)
        sheet.line((236 + 46 * i, 68), (236 + 46 * i, 46))
    _row(sheet, 70, made=True)
    sheet.shape([(28, 224), (182, 224), (160, 196), (50, 196)], words="")
    sheet.shape([(50, 192), (160, 192), (182, 162), (28, 162)], words="")
    sheet.line((105, 161), (105, 150), hot=True)
    for i in range(4):
        sheet.box(28 + 40 * i, 244, 34, 26, "trained", f"e_{i + 1}", "maths hot")
        sheet.line((45 + 40 * i, 244), (45 + 40 * i, 226), hot=True)
    sheet.words(28, 290, "after training only p is kept", "soft small")
    sheet.words(196, 190, "MLP", "hot")
    sheet.words(196, 208, "width → h → h → width", "soft small")


def _prefix(sheet: Sheet) -> None:
    """Past positions that no text made."""
    for row, letter in ((40, "K"), (120, "V")):
        for i in range(3):
            sheet.box(60 + 36 * i, row, 30, 56, "trained")
        for i in range(5):
            sheet.box(176 + 36 * i, row, 30, 56, "frozen")
        sheet.words(111, row + 33, f"P_{letter}", "middle maths hot")
        sheet.words(263, row + 33, letter, "middle maths")
    sheet.words(60, 30, "learned, one set a layer", "hot small")
    sheet.words(250, 30, "of the text", "soft small")
    sheet.box(330, 222, 30, 30, "frozen", "q", "maths")
    sheet.line((345, 220), (345, 190), (75, 190), (75, 178), hot=True)
    for x in (111, 147):
        sheet.line((x, 190), (x, 178), hot=True)
    for i in range(5):
        sheet.line((191 + 36 * i, 190), (191 + 36 * i, 178))
    sheet.words(60, 226, "each query attends to the text", "small")
    sheet.words(60, 244, "and to the learned positions", "small")


CLOSE: dict[str, tuple[Draw, str]] = {
    "lora": (_low_rank, "Beside the frozen W the input goes down to r numbers through A and up again through B; the two are added."),
    "adalora": (_ranks_that_move, "As LoRA, with a number on each of the ways between A and B; the least important ones are set to zero."),
    "ia3": (_factors, "Each channel of what a layer says is multiplied by a learned factor."),
    "prompt_tuning": (_prompt, "Learned vectors stand in front of the embeddings of the text."),
    "p_tuning": (_network, "A small network makes the vectors in front of the text from trainable embeddings."),
    "prefix_tuning": (_prefix, "In every layer a query attends to learned keys and values and to those of the text."),
}  # fmt: skip
