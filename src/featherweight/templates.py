"""A model's chat template, run where it can do no harm: in a process of its own, with limits on time, memory and output.

The process is started at the first conversation and ends with this one. It knows nothing of this one: neither its memory nor
what is in its environment. See `sandbox` for what happens in it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError

SECONDS = 5.0
"""For one text: a template takes a ten-thousandth of that."""
CHARACTERS = 1_000_000
"""That a text may be longer than ten times its messages."""
BYTES = 768 * 2**20
"""The address space of the process, where the system limits it (Linux)."""

_KEPT = ("PATH", "HOME", "TZ", "LANG", "LC_", "PYTHON", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_", "VIRTUAL_ENV")


def render(tokenizer: Any, messages: Sequence[dict[str, str]], wanted: Sequence[tuple[int, bool]]) -> list[str]:
    """What the tokenizer's chat template writes for beginnings of a conversation.

    Each wanted text is the first `n` messages, and whether the assistant's turn is opened after them. Raises `InputError` where
    the template refuses, breaks a limit, or does not end.
    """
    asked = {
        "template": tokenizer.get_chat_template(),
        "variables": tokenizer.special_tokens_map,
        "messages": list(messages),
        "wanted": list(wanted),
    }
    helper = _helper(os.getpid())  # a fork has one of its own: two askers would take each other's answers
    line = helper.ask(json.dumps(asked, default=str).encode() + b"\n")
    if not line.endswith(b"\n"):
        helper.end()
        raise InputError(
            f"the model's chat template does not end within {SECONDS:g} seconds, or breaks what runs it; do not use this "
            f"model, or give its tokenizer another template"
        )
    answer = json.loads(line)
    if "error" in answer:
        raise InputError(f"the model's chat template refuses this conversation: {answer['error']}")
    texts: list[str] = answer["texts"]
    return texts


@dataclass(frozen=True)
class Helper:
    """The process, and whose turn it is to ask it."""

    process: subprocess.Popen[bytes]
    turn: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, line: bytes) -> bytes:
        """One line for one line; an incomplete one where the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.turn:
            try:
                self.process.stdin.write(line)
                self.process.stdin.flush()
                return self.process.stdout.readline()
            except (OSError, ValueError):  # it has ended, or another thread has ended it
                return b""
            except BaseException:  # Ctrl-C: an answer that nobody read would be taken for the next one's
                self.end()
                raise

    def end(self) -> None:
        """End the process, whatever it is doing."""
        _helper.cache_clear()
        atexit.unregister(self.end)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not sent yet
                pipe.close()


@functools.cache  # one for the whole program: starting it takes as long as a thousand conversations
def _helper(_owner: int) -> Helper:
    program = [
        sys.executable, "-P", str(Path(__file__).with_name("sandbox.py")), str(SECONDS), str(CHARACTERS), str(BYTES),
    ]  # fmt: skip
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k.startswith(_KEPT)},
        start_new_session=True,  # Ctrl-C is for the program, which ends this one when it ends
    )  # fmt: skip
    helper = Helper(process)
    atexit.register(helper.end)
    return helper
