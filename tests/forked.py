"""Many command lines, each in a process of its own, none of which has to import anything anew.

A server process imports everything once and forks a child for each command line: milliseconds instead of seconds. It never
computes, because threads do not survive a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Self


class Forked:
    """The server, as seen from a test or benchmark. `imports` are further modules that no child shall have to import anew."""

    def __init__(self, *imports: str, **environment: str) -> None:
        self.imports, self.environment = imports, environment
        self.peak_bytes = 0
        self.cpu_seconds = 0.0
        """The most memory that the child waited for last had resident, and what it computed for."""

    def __enter__(self) -> Self:
        tests = Path(__file__).parent
        paths = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *self.imports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            stderr=subprocess.DEVNULL, env={**os.environ, **settings, **self.environment, "PYTHONPATH": paths},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()

    def _ask(self, **question: Any) -> list[Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(question) + "\n")
        answer: list[Any] = json.loads(self.server.stdout.readline())
        return answer

    def start(self, folder: Path, *args: object, before: str = "") -> int:
        """Start `featherweight args…` in a folder, and return its process id. Its words go to `said.txt` there.

        `before` is Python that the child runs first: to set a limit, or to spoil something.
        """
        pid: int = self._ask(folder=str(folder), args=[str(a) for a in args], before=before)[0]
        return pid

    def wait(self, pid: int) -> int:
        """The exit code; minus the signal's number where one ended it."""
        code, self.peak_bytes, self.cpu_seconds = self._ask(wait=pid)
        ended: int = code
        return ended

    def run(self, folder: Path, *args: object, before: str = "") -> int:
        """Both."""
        return self.wait(self.start(folder, *args, before=before))


def said(folder: Path) -> str:
    """What the last process in a folder has said so far."""
    return (folder / "said.txt").read_text()


def when(folder: Path, words: str, seconds: float = 60) -> None:
    """Wait until a process has said this."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (folder / "said.txt").is_file() and words in said(folder):
            return
        time.sleep(0.01)
    raise AssertionError(f"never said {words!r}: {said(folder)}")


def _serve() -> None:
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401

    import featherweight.cli
    import featherweight.methods.lora
    import featherweight.training  # noqa: F401

    for name in sys.argv[1:]:
        importlib.import_module(name)
    torch.set_num_threads(1)
    answer: list[Any]
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status, used = os.wait4(asked["wait"], 0)
            answer = [os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024, used.ru_utime + used.ru_stime]
        else:
            answer = [os.fork()]
            if answer == [0]:
                _child(**asked)
        print(json.dumps(answer), flush=True)


def _child(folder: str, args: list[str], before: str) -> None:
    from featherweight import cli

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a suite in the background ignores Ctrl-C
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()
    os.chdir(folder)
    said = os.open("said.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for mine, stream in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(mine, stream)
    code = 70
    try:
        exec(before, {})
        sys.argv = ["featherweight", *args]
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
