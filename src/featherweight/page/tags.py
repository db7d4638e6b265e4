"""Markup that cannot be broken out of: every text is escaped, unless it is markup already."""

from __future__ import annotations

import html
from typing import ClassVar

from ..plain import plain


class Html(str):
    """Markup; whatever is not of this type is text."""

    __slots__: ClassVar[tuple[str, ...]] = ()


def text(words: object, longest: int = 2000) -> Html:
    """Words from anywhere, fit to stand in a page: escaped, on one line, shortened."""
    return words if isinstance(words, Html) else Html(html.escape(plain(words, longest)))


def foreign(words: object, longest: int = 400) -> Html:
    """Words out of data: what they do to the direction of writing ends with them."""
    return Html(f"<bdi>{text(plain(words, longest).strip())}</bdi>")


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. `class_`, `data_key` and the like lose their `_`; None and False leave an attribute out, True has no value."""
    told = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            told += f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
    return Html(f"<{name}{told}>{joined(*content)}</{name}>")


def joined(*content: object, by: str = "") -> Html:
    """One after the other."""
    return Html(by.join(text(part) for part in content))
