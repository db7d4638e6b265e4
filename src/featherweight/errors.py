"""The one error that is the user's to mend.

Everything a person can get wrong — a flag, a file, a column — is raised as `InputError`: one message that says
what is wrong, where, and what to do. The command line prints it as one line and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something in the user's input is wrong; the message says what, where and what to do next."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as `did you mean 'lora'?`, or the list of what exists when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(known[:20]) + (" …" if len(known) > 20 else "")
    return f"there are: {shown}"
