"""What HF PEFT + `Trainer` does in the faults of `faults.py`: of each try, what was done, whether it held, and what happened.

Judged as ours is: `held` means what the table's second column says. What it does right besides is said in words.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import tiny
from forked import Forked

LAST, BEFORE = "checkpoint-12", "checkpoint-10"  # when a run ends after step 13
FINAL = Path("final", "adapter_model.safetensors")
NO_RIGHTS = "import ctypes; ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())"
"""Root, too, may then not write into what is read-only."""


@dataclass
class Try:
    """One fault, once."""

    what: str
    held: bool
    came: str


class Rival:
    """PEFT + Trainer on the tiny Llama, and what it ends in if nothing happens."""

    def __init__(self, server: Forked, folder: Path) -> None:
        self.server, self.folder = server, folder
        folder.mkdir(parents=True)
        self.model = tiny.save_llama(folder / "llama")
        self.data = tiny.write(folder / "reviews.csv", tiny.reviews())
        for _ in range(2):  # the server may still be importing during the first
            begun = time.monotonic()
            assert self.run("whole") == 0, self.said()
            self.seconds = time.monotonic() - begun
            self.wanted = self.result("whole")
            shutil.rmtree(folder / "whole")

    def start(self, out: str, before: str = "", **more: Any) -> int:
        """A process that trains into a folder."""
        given = {"model": str(self.model), "data": str(self.data), "out": out, **more}
        code = f"{before}\nimport faults_trainer\nfaults_trainer.train(**{given!r})\nraise SystemExit(0)"
        return self.server.start(self.folder, before=code)

    def run(self, out: str, before: str = "", **more: Any) -> int:
        """Its exit code; 70 for an error, minus a signal's number."""
        return self.server.wait(self.start(out, before, **more))

    def said(self) -> str:
        """Its last line."""
        lines = (self.folder / "said.txt").read_text(errors="replace").strip().splitlines() or [""]
        return lines[-1][:160].replace(str(self.folder), "…")

    def went_on_from(self) -> str:
        """The checkpoint it went on from, or None in words."""
        found = re.search(
            r"going on from .*?(checkpoint-\d+|None)", (self.folder / "said.txt").read_text(errors="replace")
        )
        return found[1] if found else "nothing"

    def result(self, out: str) -> bytes | None:
        """The bytes of the adapter in the end; None where there is none."""
        file = self.folder / out / FINAL
        return file.read_bytes() if file.is_file() else None

    def stopped(
        self, out: str, do: str = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", **more: Any
    ) -> int:
        """A run to which something happens after step 13 of 24: its exit code."""
        shutil.rmtree(self.folder / out, ignore_errors=True)
        return self.run(out, do=do, **more)

    def last(self, out: str) -> int:
        """The step of its newest checkpoint that says so itself: 0 where there is none."""
        return max(
            (int(p.parent.name[11:]) for p in (self.folder / out).glob("checkpoint-*/trainer_state.json")), default=0
        )

    def in_words(self, out: str, code: int) -> str:
        """How a run that went on ended."""
        if code:
            return f"ends with an error: {self.said()}"
        return f"accepted in silence, {'the same result' if self.result(out) == self.wanted else 'another result'}"


def kills(rival: Rival, wanted: int = 30) -> Iterator[Try]:
    """SIGKILL at random instants; a run that cannot go on is helped by hand: its newest checkpoint is removed."""
    rng, killed, n = random.Random(0), 0, 0
    while killed < wanted:
        out, n, errors, here = f"killed-{n}", n + 1, list[str](), 0
        while rival.result(out) is None and len(errors) < 5:
            pid = rival.start(out)
            time.sleep(rng.uniform(0, rival.seconds))
            os.kill(pid, signal.SIGKILL)
            code = rival.server.wait(pid)
            here += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                errors.append(f"{rival.went_on_from()} cannot be gone on from ({rival.said()})")
                newest = max((rival.folder / out).glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
                shutil.rmtree(newest)
        killed += here
        end = "the same bytes" if rival.result(out) == rival.wanted else "other bytes"
        if here:
            yield Try(f"{here} kills", not errors and end == "the same bytes", "; ".join([*errors, end]))


def damage(rival: Rival) -> Iterator[Try]:
    """Each file of the newest checkpoint gone, cut or with one bit flipped; the one before it is whole."""
    rival.stopped("damaged")
    kept = rival.folder / "kept"
    (rival.folder / "damaged").rename(kept)
    kinds: dict[str, Callable[[Path], Any]] = {
        "gone": Path.unlink,
        "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
        "a bit flipped": _flip,
    }
    for file in sorted(p.name for p in (kept / LAST).iterdir()):
        for how, spoil in kinds.items():
            shutil.rmtree(rival.folder / "damaged", ignore_errors=True)
            shutil.copytree(kept, rival.folder / "damaged")
            spoil(rival.folder / "damaged" / LAST / file)
            code = rival.run("damaged")
            held = code == 0 and rival.went_on_from() == BEFORE and rival.result("damaged") == rival.wanted
            yield Try(f"{file}, {how}", held, rival.in_words("damaged", code))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def full_disk(rival: Rival) -> Iterator[Try]:
    """No file may be longer than so much, from step 13 on; then there is room again, and the same command goes on."""
    rival.stopped("full")
    sizes = {p.name: p.stat().st_size for p in (rival.folder / "full" / LAST).iterdir()}
    for file in ("adapter_model.safetensors", "tokenizer.json", "optimizer.pt"):  # the longest that do not fit any more
        limit = sizes[file] - 1
        do = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        code, words = rival.stopped("full", do), rival.said()
        partial = sorted(
            p.name for p in (rival.folder / "full").glob("checkpoint-*") if not (p / "trainer_state.json").is_file()
        )
        again = rival.run("full")
        came = f"exit {code}: {words}; left half-written: {', '.join(partial) or 'nothing'}; then {rival.in_words('full', again)}"
        yield Try(
            f"{limit:,} bytes, one fewer than {file}",
            not partial and again == 0 and rival.result("full") == rival.wanted,
            came,
        )


def not_finite(rival: Rival) -> Iterator[Try]:
    """A loss or gradient that is not finite in one step."""
    kinds = ("NaN loss", "NaN gradient", "infinite gradient")
    for kind, best in itertools.product(kinds, (True, False)):
        code = rival.stopped("spoiled", "", spoil=kind, best=best)
        file = rival.folder / "spoiled" / FINAL
        bad = not file.is_file() or not all(bool(t.isfinite().all()) for t in load_file(file).values())
        logged = re.findall(r"'loss': '(\S+?)'", (rival.folder / "said.txt").read_text())
        came = f"exit {code}; the adapter is {'not finite' if bad else 'finite'}; the losses logged end in {', '.join(logged[-2:])}"
        yield Try(f"{kind}, {'the best' if best else 'the last'} adapter kept", code != 0 and not bad, came)


def signals(rival: Rival) -> Iterator[Try]:
    """Once, after step 13; and in the middle of a save."""
    sends = "import os, signal, time; os.kill(os.getpid(), signal.{}); time.sleep(4)"
    for name, more in (("SIGINT", {}), ("SIGTERM", {}), ("SIGTERM", {"save_at_sigterm": True}), ("SIGHUP", {})):
        code = rival.stopped("signalled", sends.format(name), **more)
        kept, wanted = rival.last("signalled"), 128 + getattr(signal, name)
        option = " with enable_jit_checkpoint" if more else ""
        came = f"exit {code}; the newest checkpoint is of step {kept} of the 13 that were done"
        yield Try(name + option, kept == 13 and code in (wanted, wanted - 256), came)
    inside = (
        "import os, signal, transformers as t\n"
        "t.Trainer._save_rng_state = lambda *_: os.kill(os.getpid(), signal.SIGINT)"
    )
    code = rival.stopped("signalled", inside)
    half = [
        p.name for p in (rival.folder / "signalled").glob("checkpoint-*") if not (p / "trainer_state.json").is_file()
    ]
    again = rival.run("signalled")
    came = f"exit {code}; left half-written: {', '.join(half) or 'nothing'}; then {rival.in_words('signalled', again)}"
    yield Try("SIGINT inside a save", code == 130 and not half and again == 0, came)


def helpers(rival: Rival) -> Iterator[Try]:
    """Data workers (two; by default it has none), and the base's files."""
    for name, number in (*[("killed", "SIGKILL")] * 3, ("stopped", "SIGSTOP")):
        do = f"import multiprocessing as m, os, signal; os.kill(m.active_children()[0].pid, signal.{number})"
        shutil.rmtree(rival.folder / "helped", ignore_errors=True)
        pid, end = rival.start("helped", do=do, workers=2, steps=200), time.monotonic() + 90
        while not (rival.folder / "helped" / LAST).exists() and time.monotonic() < end:
            time.sleep(0.1)
        begun = time.monotonic()
        while _alive(pid) and time.monotonic() < begun + 60:
            time.sleep(0.1)
        seconds = time.monotonic() - begun
        hung = _alive(pid)
        if hung:
            os.killpg(pid, signal.SIGKILL)
        code = rival.server.wait(pid)
        came = "hangs; ended by us after 60 s" if hung else f"exit {code} after {seconds:.0f} s: {rival.said()}"
        yield Try(f"a worker {name}", not hung and code == 70, came)
    for how, held in (("removed", "os.remove(f)"), ("cut to nothing", "os.truncate(f, 0)")):
        weights = rival.model / "model.safetensors"
        content = weights.read_bytes()
        code = rival.stopped("based", f"import os; f = {str(weights)!r}; {held}")
        weights.write_bytes(content)
        same = rival.result("based") == rival.wanted
        yield Try(f"the base's file {how}", same, f"exit {code}{', the same result' if same else ''}")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def two_runs(rival: Rival) -> Iterator[Try]:
    """A second one in the folder of one that is at work; and one whose process is gone."""
    shutil.rmtree(rival.folder / "two", ignore_errors=True)
    pid = rival.start("two", do="import time; time.sleep(600)")
    while not (rival.folder / "two" / LAST / "trainer_state.json").exists():
        time.sleep(0.1)
    code = rival.run("two")
    os.kill(pid, signal.SIGKILL)
    rival.server.wait(pid)
    yield Try("a second run in the folder", code != 0, f"exit {code}, both write there")
    rival.stopped("two")
    code = rival.run("two")
    yield Try("a run after one that was killed", code == 0, f"exit {code}")


def places(rival: Rival) -> Iterator[Try]:
    """Names, a folder that is read-only, and a clock that was ahead."""
    for name in ("with spaces", "naïve-東京-😀", "a" * 200):
        code = rival.run(name)
        yield Try(f"a folder called {name[:20]}", code == 0 and rival.result(name) == rival.wanted, f"exit {code}")
    readonly = rival.folder / "read-only"
    readonly.mkdir(mode=0o555)
    for name, before in (("a" * 300, ""), ("read-only/run", NO_RIGHTS)):
        code = rival.run(name, before)
        yield Try(
            f"a folder called {name[:20]}", code == 70 and "Error" in rival.said(), f"exit {code}: {rival.said()[:90]}"
        )
    rival.stopped("clocked")
    ahead = time.time() + 86_400
    for folder in (rival.folder / "clocked").glob("checkpoint-*"):
        os.utime(folder, (ahead, ahead))
    code = rival.run("clocked", do="", steps=24)
    left = sorted(int(p.name[11:]) for p in (rival.folder / "clocked").glob("checkpoint-*"))
    came = f"exit {code}; of the checkpoints of steps 14 to 24 and the two before, it keeps those of {left}"
    yield Try("a clock that was a day ahead", code == 0 and 24 in left, came)


def other_settings(rival: Rival) -> Iterator[Try]:
    """It goes on with another rate, other rows, another batch or another base."""
    rows, base = rival.data.read_text(), (rival.model / "model.safetensors").read_bytes()

    def ask(what: str, **more: Any) -> Try:
        code = rival.run("other", **more)
        return Try(what, code != 0, rival.in_words("other", code) if code else "accepted in silence")

    rival.stopped("other")
    yield ask("another rate", lr=0.5)
    rival.stopped("other")
    yield ask("another batch size", batch=8)
    rival.stopped("other")
    rival.data.write_text(rows.replace(" is ", " was "))
    yield ask("other rows in the file")
    rival.data.write_text(rows)
    rival.stopped("other")
    save_file(
        {k: t * 1.5 for k, t in load_file(rival.model / "model.safetensors").items()}, rival.model / "model.safetensors"
    )
    yield ask("other weights in the base")
    (rival.model / "model.safetensors").write_bytes(base)


FAULTS: dict[str, Callable[[Rival], Iterator[Try]]] = {
    "kill": kills, "damage": damage, "disk": full_disk, "nonfinite": not_finite, "signals": signals, "helpers": helpers,
    "two runs": two_runs, "places": places, "settings": other_settings,
}  # fmt: skip


def ask(folder: Path, faults: list[str]) -> dict[str, list[Try]]:
    """All tries of these faults."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with Forked("faults_trainer") as server:
        rival, found = Rival(server, folder), dict[str, list[Try]]()
        for name in faults:
            found[name] = []
            for one in FAULTS[name](rival):
                found[name].append(one)
                print(f"{name}: {json.dumps(vars(one), ensure_ascii=False)}", flush=True)
    return found
