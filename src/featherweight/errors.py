"""The one error that is the user's to mend.

Everything a person can get wrong — a flag, a file, a column — is raised as `InputError`: one message that says
what is wrong, where, and what to do. The command line prints it as one line and exits with code 2.
"""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something in the user's input is wrong; the message says what, where and what to do next."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40
_SHORT.fillvalue = "…"
_MOST_NAMES, _LONGEST_NAME = 20, 60


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long: what somebody else wrote may be a gigabyte."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def listed(names: Iterable[Any]) -> str:
    """Names in a row, the first twenty of them, none longer than a name is."""
    known = [str(name) for name in names]
    short = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in known[:_MOST_NAMES]]
    return ", ".join(short) + (" …" if len(known) > _MOST_NAMES else "")


def near(word: str, known: Iterable[str]) -> list[str]:
    """The names that are most like a word, three at most, however either is capitalised."""
    folded = {name.casefold(): name for name in known if len(name) <= _LONGEST_NAME}
    found = difflib.get_close_matches(word[:_LONGEST_NAME].casefold(), sorted(folded), n=3, cutoff=0.6)
    return [folded[name] for name in found]


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as `did you mean 'lora'?`, or the list of what exists when nothing is near."""
    known = sorted(known)
    if found := near(word, known):
        return "did you mean " + " or ".join(repr(name) for name in found) + "?"
    return f"there are: {listed(known)}"
