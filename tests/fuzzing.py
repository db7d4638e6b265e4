"""Bad input, made from a seed, driven through the real command line, and judged.

A case is a folder with broken (or sound) files in it and a command line. It runs in a process of its own, in which loading weights
is an exit with a code of its own: what gets so far was accepted. What may come out:

    refused     exit code 2, one line that names the place, nothing written
    accepted    the model would have been loaded, or the verb is done
    broken      everything else: a traceback, further lines, too much memory or time, a write outside the out folder, or an answer
                that is not the one that this case must get
"""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fuzz_adapters
import fuzz_data
import fuzz_settings
import tiny
from forked import Forked
from fuzz_case import OUT, Case

MORE_BYTES, SECONDS, LONGEST_COMPLAINT = 200 * 2**20, 20, 1500
"""What a case may take: memory above the baseline, seconds of computing (the machine may have other work), characters."""
HANGS_SECONDS = 180
REACHED = 77
IMPORTS = (
    "datasets", "pyarrow.parquet", "featherweight.run", "featherweight.plan.verb", "featherweight.methods.adalora",
    "featherweight.methods.ia3", "featherweight.methods.p_tuning", "featherweight.methods.prefix_tuning",
    "featherweight.methods.prompt_tuning",
)  # fmt: skip
BEFORE = f"""
import signal
from featherweight import demo, prepare, run

def reached(*_, **__):
    raise SystemExit({REACHED})

prepare.load_base = run.load_base = demo._fetch = reached
signal.alarm({HANGS_SECONDS})
"""
FAMILIES: dict[str, Callable[[random.Random, Path, fuzz_adapters.Good], Case]] = {
    "data": fuzz_data.make,
    "recipe": fuzz_settings.make_recipe,
    "flags": fuzz_settings.make_flags,
    "adapter": fuzz_adapters.make,
}
SHARES = {"data": 5, "recipe": 2, "flags": 1, "adapter": 4}


@dataclass
class Outcome:
    """What became of a case."""

    case: Case
    verdict: Literal["refused", "accepted", "broken"]
    why: str = ""
    said: str = ""
    seconds: float = 0.0
    """Of computing, its children's not counted."""
    more_bytes: int = 0
    """Peak memory above that of a run that has a sound file and reaches the model."""
    code: int = 0


class Fuzzer:
    """Runs cases, one after the other, in a folder of its own."""

    def __init__(self, work: Path, good: fuzz_adapters.Good) -> None:
        self.work, self.good = work, good
        work.mkdir(parents=True, exist_ok=True)
        self.server = Forked(
            *IMPORTS, HF_HOME=str(work / "cache"), XDG_CACHE_HOME=str(work / "cache"), HF_DATASETS_OFFLINE="1"
        )

    def __enter__(self) -> Fuzzer:
        self.server.__enter__()
        for _ in range(2):  # the first may still wait for the imports
            rows = tiny.write(self.fresh() / "in" / "rows.csv", tiny.reviews())
            args = ("evaluate", "--model", self.good.model, "--data", rows, "--split", "all")
            code = self.server.run(self.work / "case", *args, before=BEFORE)
            assert code == REACHED, (self.work / "case" / "said.txt").read_text()
        self.baseline_bytes = self.server.peak_bytes
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()

    def fresh(self) -> Path:
        """An empty folder for a case: `in/` for its files, `outside/` for what it must not touch."""
        folder = self.work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "in").mkdir(parents=True)
        return folder

    def seeded(self, seed: int) -> Outcome:
        """Make the case of a seed and drive it."""
        return self.drive(made(seed, self.fresh(), self.good))

    def drive(self, case: Case, before: str = "") -> Outcome:
        """Run a case whose files are in place. `before` is more Python for its process to run first."""
        folder = self.work / "case"
        seen = snapshot(folder)
        code = self.server.run(folder, *case.args, before=BEFORE + before)
        said = (folder / "said.txt").read_bytes().decode("utf-8", "backslashreplace")
        seconds, more = self.server.cpu_seconds, self.server.peak_bytes - self.baseline_bytes
        verdict, why = judge(case, code, said, seconds, more, left=(folder / OUT).exists())
        if verdict != "broken" and (changed := differences(seen, snapshot(folder))):
            verdict, why = "broken", f"written outside the out folder: {', '.join(changed)}"
        return Outcome(case, verdict, why, said[:3000], round(seconds, 3), more, code)


def made(seed: int, folder: Path, good: fuzz_adapters.Good) -> Case:
    """The case of a seed; its files are written below `folder`."""
    rng = random.Random(seed)
    family = rng.choices(list(SHARES), list(SHARES.values()))[0]
    case = FAMILIES[family](rng, folder, good)
    case.kind, case.seed = f"{family}: {case.kind}", seed
    return case


def judge(
    case: Case, code: int, said: str, seconds: float, more_bytes: int, *, left: bool
) -> tuple[Literal["refused", "accepted", "broken"], str]:
    """The verdict, and for a broken case why."""
    if "Traceback (most recent call last)" in said or code == 70:
        return "broken", "a traceback"
    if code == -signal.SIGALRM:
        return "broken", f"not ready after {HANGS_SECONDS} s"
    if code < 0:
        return "broken", f"ended by signal {-code}"
    if seconds > SECONDS:
        return "broken", f"took {seconds:.1f} s"
    if more_bytes > MORE_BYTES:
        return "broken", f"took {more_bytes / 2**20:.0f} MiB above the baseline"
    if code == 2:
        return _judge_complaint(case, said, left)
    if code not in (0, REACHED, *case.codes):
        return "broken", f"exit code {code}"
    if case.must:
        return "broken", "accepted, and must be refused"
    return "accepted", ""


def _judge_complaint(case: Case, said: str, left: bool) -> tuple[Literal["refused", "broken"], str]:
    if not re.fullmatch(r"featherweight: error: \S[^\n]*\n", said):
        return "broken", "the complaint is not one line"
    if not said[:-1].isprintable():
        return "broken", "the complaint has characters that a terminal may obey"
    if len(said) > LONGEST_COMPLAINT:
        return "broken", f"the complaint has {len(said)} characters"
    if left:
        return "broken", "refused, and the out folder is left behind"
    if case.must is False:
        return "broken", "refused, and must be accepted"
    if case.must and case.place and not re.search(re.escape(case.place) + r"(?!\d)", said):
        return "broken", f"the complaint does not name {case.place}"
    return "refused", ""


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """What there is, but for the out folder and what the process said."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name != "said.txt" and not name.startswith(OUT):
            facts = path.lstat()
            found[name] = (
                facts.st_mode,
                facts.st_size if not path.is_dir() else 0,
                0 if path.is_dir() else facts.st_mtime_ns,
            )
    return found


def differences(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> list[str]:
    """The names that were added, removed or changed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
