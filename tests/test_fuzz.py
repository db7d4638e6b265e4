"""Bad input is refused by place, cheaply and without a trace: some hundred cases here; `benchmarks/fuzz.py` makes ten thousand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fuzz_adapters
import tiny
from fuzz_case import Case
from fuzz_monsters import MONSTERS, Monster
from fuzzing import Fuzzer

CASES = 300
LINE = 'raise InputError("data: in/rows.csv:7: a wrong thing; mend it")'
SAY = "from featherweight import InputError, prepare\ndef load_task(*_, **__):\n    {}\nprepare.load_task = load_task\n"


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    work = tmp_path_factory.mktemp("fuzz")
    with Fuzzer(work, fuzz_adapters.good(work / "good")) as running:
        yield running


def test_hundreds_of_seeded_cases_are_refused_by_place_or_accepted(fuzzer: Fuzzer) -> None:
    outcomes = [fuzzer.seeded(seed) for seed in range(CASES)]
    assert [(o.case.seed, o.case.kind, o.why, o.said) for o in outcomes if o.verdict == "broken"] == []
    verdicts = [o.verdict for o in outcomes]
    assert verdicts.count("refused") > CASES / 2
    assert verdicts.count("accepted") > CASES / 10


@pytest.mark.parametrize("monster", MONSTERS, ids=lambda monster: monster.__name__)
def test_a_monster_is_refused_quickly_and_within_200_mib(fuzzer: Fuzzer, monster: Monster) -> None:
    outcome = fuzzer.drive(monster(fuzzer.fresh(), fuzzer.good))
    fuzzer.fresh()  # gigabytes are not kept
    assert (outcome.verdict, outcome.why) == ("refused", ""), outcome


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("raise KeyError('x')", "a traceback"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal 11"),
        ("print('more'); " + LINE, "the complaint is not one line"),
        ("raise InputError('')", "the complaint is not one line"),
        ("raise InputError('x ' * 2000)", "the complaint has 40"),
        ("open('stray', 'w').close(); " + LINE, "written outside the out folder: stray"),
        ("open('in/rows.csv', 'a').write('x'); " + LINE, "written outside the out folder: in/rows.csv"),
        ("import os; os.remove('in/rows.csv'); " + LINE, "written outside the out folder: in/rows.csv"),
        ("import os; os.makedirs('out/run'); " + LINE, "refused, and the out folder is left behind"),
        ("bytearray(b'x') * (2**28 + 2**27); " + LINE, "MiB above the baseline"),
        ("raise InputError('data: in/rows.csv:71: a wrong thing')", "the complaint does not name rows.csv:7"),
        ("raise InputError('data: a wrong thing')", "the complaint does not name rows.csv:7"),
        ("raise SystemExit(77)", "accepted, and must be refused"),
        (LINE, ""),
    ],
)
def test_the_fuzzer_notices_what_is_broken(fuzzer: Fuzzer, does: str, why: str) -> None:
    tiny.write(fuzzer.fresh() / "in" / "rows.csv", tiny.reviews())
    args = ["evaluate", "--model", str(fuzzer.good.model), "--data", "in/rows.csv"]
    outcome = fuzzer.drive(Case("", args, must=True, place="rows.csv:7"), before=SAY.format(does))
    assert outcome.verdict == ("broken" if why else "refused"), outcome
    assert why in outcome.why


def test_the_fuzzer_notices_sound_input_that_is_refused_and_time(
    fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(fuzzer.fresh() / "in" / "rows.csv", tiny.reviews())
    sound = Case("", ["evaluate", "--model", str(fuzzer.good.model), "--data", "in/rows.csv"], must=False)
    assert fuzzer.drive(sound).verdict == "accepted"
    assert fuzzer.drive(sound, before=SAY.format(LINE)).why == "refused, and must be accepted"
    monkeypatch.setattr("fuzzing.SECONDS", 0.0)
    assert "took" in fuzzer.drive(sound).why
    monkeypatch.setattr("fuzzing.SECONDS", 20)
    hangs = fuzzer.drive(sound, before=SAY.format("import signal, time; signal.alarm(1); time.sleep(60)"))
    assert "not ready" in hangs.why


def test_a_seed_makes_the_same_case_every_time(fuzzer: Fuzzer) -> None:
    for seed in range(40):
        one, other = fuzzer.seeded(seed), fuzzer.seeded(seed)
        assert (one.case, one.verdict) == (other.case, other.verdict)
        if one.verdict == "refused":
            assert one.said == other.said
