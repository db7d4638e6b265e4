"""Text that comes from data and files, made fit to be shown: one line, no control characters, not too long."""

from __future__ import annotations

import re

_BREAKS = re.compile(r"[\s\u0085\u2028\u2029]+")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""Control characters, and marks that turn the direction of whatever text comes after them."""


def plain(text: object, longest: int = 400) -> str:
    """In one line of at most `longest` characters; `…` stands where something was left out."""
    # Four times as much is looked at as is shown: of a text of megabytes, spaces and marks may be taken out.
    words = str(text)[: 4 * longest].encode("utf-8", "replace").decode("utf-8")
    words = _UNSEEN.sub("", _BREAKS.sub(" ", words))
    cut = len(words) > longest or len(str(text)) > 4 * longest
    return words[: longest - 1].rstrip() + "…" if cut else words
