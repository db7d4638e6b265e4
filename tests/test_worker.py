"""Runs in processes of their own: the same results, and nothing lost whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from command import Cli
from featherweight.errors import InputError
from featherweight.results import Line, read
from featherweight.worker import Worker, together

RESULT = ("losses", "predictions", "right", "name", "seed", "lr", "trainable_params", "identity", "total_params")
ALONE = ("--references", "none", "--general-text", "none")


@pytest.fixture
def line(llama: Path, reviews: Path) -> Any:
    return lambda *more: ("compare", "--model", llama, "--data", reviews, "--dtype", "float32", *more)


def results(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    """What does not depend on the machine, by run."""
    return {(r.name, r.seed): {k: getattr(r, k) for k in RESULT} for r in read(Path(folder))}


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def watched(args: tuple[Any, ...], when: str, then: Callable[[int], None]) -> tuple[int, str]:
    """Start a command line, do `then(its process id)` once when a line with `when` has appeared; its code and words."""
    command = [sys.executable, "-u", "-m", "featherweight.cli", *map(str, args)]

    def hear_it() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=hear_it) as child:
        assert child.stderr is not None
        seen: list[str] = []
        for line in child.stderr:
            if when in line and not any(when in earlier for earlier in seen):
                then(child.pid)
            seen.append(line)
        return child.wait(timeout=120), "".join(seen)


def test_a_run_of_its_own_process_has_the_same_result_and_tells_where_it_comes_from(fw_cli: Cli, line: Any) -> None:
    same = ("--methods", "lora", "--steps", 3, "--general-text", "none", "--references", "untouched,majority")
    assert fw_cli(*line(*same, "--no-isolate", "--out", "here")).code == 0
    done = fw_cli(*line(*same, "--out", "apart"))
    assert done.code == 0, done.err
    assert results("here") == results("apart")
    here, apart = ((Path(f) / "lora/adapter_model.safetensors").read_bytes() for f in ("here", "apart"))
    assert here == apart
    row = next(r for r in read(Path("apart")) if r.name == "lora")
    assert row.provenance["command"].startswith("featherweight compare --model ")
    assert row.provenance["identity"]["seed"] == 0
    assert {"machine", "versions", "date", "device", "dtype", "data", "base"} <= set(row.provenance)
    _check_measured(row)
    assert not list(Path("apart").glob("*/checkpoints*"))
    assert sorted(p.name for p in Path("apart").iterdir() if p.is_dir()) == ["figures", "lora"]  # references leave none


def _check_measured(row: Line) -> None:
    """Each figure is there, and they agree with one another."""
    assert 0 < row.weights_bytes < row.before_bytes < row.peak_bytes <= row.host_bytes
    assert 0 < row.eval_peak_bytes <= row.host_bytes
    assert row.predicted_interval is not None
    assert row.predicted_bytes is not None
    assert row.predicted_interval[0] <= row.predicted_bytes <= row.predicted_interval[1]
    assert 0 < row.train_seconds + row.eval_seconds + row.load_seconds + row.tokenise_seconds < row.whole_seconds < 120
    assert row.train_tokens > row.train_examples > 0
    assert row.eval_tokens > row.eval_examples > 0
    assert row.adapter_bytes is not None
    assert row.adapter_bytes > 4 * row.trainable_params
    assert row.reserved_bytes is None  # a CPU reserves nothing


@pytest.mark.slow
def test_a_process_that_is_killed_costs_its_own_run_alone(line: Any) -> None:
    args = line("--methods", "lora,ia3", "--steps", 300, *ALONE, "--out", "table")

    def kill_the_worker(pid: int) -> None:
        [worker] = children(pid)
        os.kill(worker, signal.SIGKILL)

    code, err = watched(args, "LoRA: train: 150/300", kill_the_worker)
    assert code == 1
    assert "Traceback" not in err
    assert [row.name for row in read(Path("table"))] == ["ia3"]
    assert "LoRA was left out: its process ended without a result (signal 9: was there enough memory?)" in (
        Path("table/table.md").read_text()
    )
    code, err = watched(args, "never", lambda _: None)
    assert code == 0, err
    assert "(IA)³: done before" in err
    assert sorted(row.name for row in read(Path("table"))) == ["ia3", "lora"]


STOPPED = ("--methods", "ia3,lora", "--steps", 200, *ALONE)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a comparison ends in that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = tiny.write(folder / "reviews.csv", tiny.reviews())
    line = (
        "compare",
        "--model",
        llama,
        "--data",
        data,
        "--dtype",
        "float32",
        *STOPPED,
        "--no-isolate",
        "--out",
        folder / "whole",
    )
    code, err = watched(line, "never", lambda _: None)
    assert code == 0, err
    return results(str(folder / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_whoever_is_stopped_the_same_command_ends_as_if_nothing_had_been(line: Any, undisturbed: Any, how: str) -> None:
    """SIGKILL: the worker finds itself alone, saves its work, and ends."""
    args, workers = line(*STOPPED, "--out", "table"), list[int]()

    def stop(pid: int) -> None:
        workers.extend(children(pid))
        os.kill(pid, getattr(signal, how))

    code, err = watched(args, "LoRA: train: 50/200", stop)
    assert code == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[how], err
    assert "Traceback" not in err
    assert [row.name for row in read(Path("table"))] == ["ia3"]
    end = time.monotonic() + 60
    while Path(f"/proc/{workers[0]}").exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert not Path(f"/proc/{workers[0]}").exists()
    [checkpoint] = Path("table/lora").glob("checkpoints-*/step-*")
    assert int(checkpoint.name.removeprefix("step-")) >= 50
    code, err = watched(args, "never", lambda _: None)
    assert code == 0, err
    assert "going on from" in err
    assert results("table") == undisturbed


@pytest.mark.slow
def test_side_by_side_the_results_are_the_same(line: Any, fw_cli: Cli) -> None:
    same = ("--methods", "ia3,lora,prompt_tuning", "--steps", 100, *ALONE)
    assert fw_cli(*line(*same, "--no-isolate", "--out", "whole")).code == 0
    most = [0]

    def count(pid: int) -> None:
        most[0] = len(children(pid))

    code, err = watched(line(*same, "--jobs", 2, "--out", "table"), "LoRA: train: 50/100", count)
    assert code == 0, err
    assert most == [2]
    assert results("table") == results("whole")
    assert [row.name for row in read(Path("table"))] == ["ia3", "lora", "prompt_tuning"]  # in the order asked for


# --- the pool, with processes that are told what to do ------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that do what their job says, without importing anything of ours."""

    def start(job: Any, threads: int | None = None) -> Worker:
        import tempfile

        log = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-c", job["python"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        return Worker(process, log)

    monkeypatch.setattr(Worker, "start", staticmethod(start))


def pool(
    scripts: list[str], most: int = 1, stop: Callable[[], int | None] = lambda: None
) -> tuple[list[Any], list[Any]]:
    shown: list[Any] = []
    ended: list[Any] = []

    def end(number: int, answer: Any) -> bool:
        ended.append((number, answer if not isinstance(answer, InputError) else str(answer)))
        return not isinstance(answer, dict) or not answer.get("enough")

    together(
        [{"python": script} for script in scripts], lambda running, _: len(running) < most,
        lambda n, told: shown.append((n, told)), end, stop,
    )  # fmt: skip
    return shown, ended


SAY = "import json, sys; print(json.dumps({!r}), flush=True)"


@pytest.mark.usefixtures("scripted")
def test_what_a_process_tells_is_shown_and_its_answer_taken() -> None:
    shown, ended = pool(
        [SAY.format({"note": "hello"}) + ";" + SAY.format({"answer": {"a": 1}}), SAY.format({"answer": {}})]
    )
    assert shown == [(0, {"note": "hello"})]
    assert ended == [(0, {"a": 1}), (1, {})]


@pytest.mark.usefixtures("scripted")
def test_one_that_ends_without_an_answer_says_its_last_words_and_the_others_go_on() -> None:
    _, ended = pool(["import sys; print('no space left', file=sys.stderr); sys.exit(3)", SAY.format({"answer": {}})])
    assert ended[0] == (0, "its process ended without a result (exit code 3); its last words: no space left")
    assert ended[1] == (1, {})


@pytest.mark.usefixtures("scripted")
def test_after_an_answer_that_ends_it_nothing_more_is_started() -> None:
    _, ended = pool([SAY.format({"answer": {"enough": 1}}), SAY.format({"answer": {}})])
    assert [number for number, _ in ended] == [0]


@pytest.mark.usefixtures("scripted")
def test_as_many_run_at_once_as_may() -> None:
    wait = "import time; time.sleep(0.6); " + SAY.format({"answer": {}})
    start = time.monotonic()
    pool([wait] * 3, most=3)
    assert time.monotonic() - start < 1.5


@pytest.mark.usefixtures("scripted")
def test_asked_to_stop_it_waits_for_those_at_work_to_save() -> None:
    patient = (
        "import signal, sys, time, json\n"
        "def save(*_):\n    print(json.dumps({'answer': {'saved': True}}), flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nprint(json.dumps({'note': 'ready'}), flush=True)\ntime.sleep(60)"
    )
    shown: list[Any] = []
    ended: list[Any] = []
    together(
        [{"python": patient}, {"python": patient}], lambda *_: False, lambda n, told: shown.append(told),
        lambda n, answer: bool(ended.append(answer)), lambda: 15 if shown else None,
    )  # fmt: skip
    assert ended == [{"saved": True}]
