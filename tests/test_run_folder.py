"""A run and its folder: stopped by signals, gone on with, refused to others, on a disk that is full or gone."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
import tiny
from command import Cli, complaint
from featherweight.prepare import new_folder
from featherweight.run_folder import at_work
from forked import Forked, said, when
from killing import SHORT, result_of

LONG = ("--steps", 400, "--batch-size", 4, "--dtype", "float32", "--set", "lora_dropout=0.1")


# --- signals --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(server: Forked, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the long run ends in when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("whole")
    data = tiny.write(folder / "reviews.csv", tiny.reviews())
    assert server.run(folder, "train", "--model", llama, "--data", data, *LONG) == 0, said(folder)
    return result_of(folder / "runs" / "lora-001")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bytes(
    server: Forked, in_tmp: Path, line: Any, whole: Any, number: signal.Signals
) -> None:
    pid = server.start(in_tmp, *line(*LONG))
    when(in_tmp, "train: 100/400")
    os.kill(pid, number)
    assert server.wait(pid) == 128 + number
    run = in_tmp / "runs" / "lora-001"
    assert json.loads((run / "run.json").read_text())["ended"] == "interrupted"
    assert len(list((run / "checkpoints").iterdir())) == 1
    if number != signal.SIGHUP:  # the words go nowhere then
        assert re.search(r"interrupted after \d+ of 400 steps.*or the same command, goes on", said(in_tmp))
    assert "Traceback" not in said(in_tmp)
    fw.load(fw.load_base(str(line()[2]), dtype="float32").model, run)
    assert server.run(in_tmp, *line(*LONG)) == 0, said(in_tmp)
    assert "going on from" in said(in_tmp)
    assert [p.name for p in (in_tmp / "runs").iterdir()] == ["lora-001"]
    assert result_of(run)[:2] == whole[:2]  # the third names the file of the data, which lies elsewhere


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_of_another_kind_is_no_second_ctrl_c(
    server: Forked, in_tmp: Path, line: Any, number: signal.Signals
) -> None:
    """Ctrl-C, and then the window is closed."""
    twice = (
        "import os, featherweight.engine.update as u\n"
        "first, calls = u.labelled_loss, []\n"
        "def press(*given):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 20: [os.kill(os.getpid(), n) for n in (2, {int(number)})]\n"
        "    return first(*given)\n"
        "u.labelled_loss = press"
    )
    assert server.run(in_tmp, *line(*SHORT, "--out", "mine"), before=twice) == 130
    assert [p.name for p in (in_tmp / "mine" / "checkpoints").iterdir()] == ["step-000019"]


def test_a_second_ctrl_c_ends_it_at_once_without_a_partial_file(server: Forked, in_tmp: Path, line: Any) -> None:
    """The first is noted while a batch takes a minute."""
    slow = (
        "import time, featherweight.engine.update as u\n"
        "first, calls = u.labelled_loss, []\n"
        "def slow(*given):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 20: print('now', flush=True); time.sleep(60)\n"
        "    return first(*given)\n"
        "u.labelled_loss = slow"
    )
    pid = server.start(in_tmp, *line(*SHORT), before=slow)
    when(in_tmp, "now")
    os.kill(pid, signal.SIGINT)
    when(in_tmp, "press Ctrl-C again")
    start = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert server.wait(pid) == 130
    assert time.monotonic() - start < 10
    assert not list((in_tmp / "runs" / "lora-001").rglob(".sav*"))
    assert server.run(in_tmp, *line(*SHORT)) == 0
    assert json.loads((in_tmp / "runs" / "lora-001" / "run.json").read_text())["ended"] == "complete"


def test_a_second_ctrl_c_in_the_middle_of_a_save_leaves_no_partial_file_either(
    server: Forked, in_tmp: Path, line: Any
) -> None:
    twice = (
        "import os, signal, featherweight.checkpoints as c\n"
        "def half(tensors, path):\n"
        "    path.write_bytes(b'half')\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "c.save_file = half"
    )
    args = line(*SHORT, "--save-steps", 10, "--out", "mine")
    assert server.run(in_tmp, *args, before=twice) == 130
    assert list((in_tmp / "mine" / "checkpoints").iterdir()) == []
    assert server.run(in_tmp, *args) == 0, said(in_tmp)


def test_ctrl_c_after_the_last_step_keeps_the_adapter_and_leaves_the_evaluation_out(
    server: Forked, in_tmp: Path, line: Any
) -> None:
    late = (
        "import os, signal, featherweight.training as t\n"
        "first = t.save\n"
        "t.save = lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), first(*a, **k))[1]"
    )
    assert server.run(in_tmp, *line(*SHORT), before=late) == 130
    assert "was not evaluated" in said(in_tmp)
    assert json.loads((in_tmp / "runs" / "lora-001" / "run.json").read_text())["ended"] == "complete"


# --- going on, and not ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(server: Forked, in_tmp: Path, line: Any) -> Path:
    """A folder `mine` with a run that was stopped after 20 of 30 steps."""
    stop = (
        "import os, signal, featherweight.training as t\n"
        "first = t.fit_with_bar\n"
        "def fit(base, rows, settings, title, **more):\n"
        "    from featherweight.engine.train import fit\n"
        "    return fit(base, rows, settings, on_step=lambda r: r.steps == 20 and os.kill(os.getpid(), signal.SIGINT), **more)\n"
        "t.fit_with_bar = fit"
    )
    assert server.run(in_tmp, *line(*SHORT, "--out", "mine"), before=stop) == 130, said(in_tmp)
    return in_tmp / "mine"


def test_resume_needs_nothing_but_the_folder(
    fw_cli: Cli, stopped: Path, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stopped.parent / "elsewhere").mkdir()
    monkeypatch.chdir(stopped.parent / "elsewhere")
    done = fw_cli("train", "--resume", stopped)
    assert done.code == 0, done.err
    assert "going on from" in done.err
    assert fw_cli(*line(*SHORT, "--out", "whole")).code == 0
    assert result_of(stopped) == result_of(Path("whole"))
    assert "is complete" in complaint(fw_cli("train", "--resume", stopped))


def test_other_settings_are_refused_with_the_differences(fw_cli: Cli, stopped: Path, line: Any) -> None:
    words = complaint(fw_cli(*line(*SHORT, "--out", "mine", "--lr", 0.5, "--set", "r=4")))
    assert "lr was None and is 0.5" in words
    assert "options was {'lora': {'lora_dropout': 0.1}} and is {'lora': {'lora_dropout': 0.1, 'r': 4}}" in words
    assert "steps" not in words
    assert "lr was None and is 0.5" in complaint(fw_cli("train", "--resume", stopped, "--lr", 0.5))
    forced = fw_cli("train", "--resume", stopped, "--lr", 0.5, "--force")
    assert forced.code == 0, forced.err
    assert "going on from" in forced.err


def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(fw_cli: Cli, stopped: Path) -> None:
    before = [(stopped / name).read_text() for name in ("run.json", "recipe.toml")]
    assert "does not fit this run at all" in fw_cli("train", "--resume", stopped, "--force", "--set", "r=4").err
    assert [(stopped / name).read_text() for name in ("run.json", "recipe.toml")] == before
    done = fw_cli("train", "--resume", stopped)
    assert done.code == 0, done.err


def test_batches_of_other_rows_are_another_run(fw_cli: Cli, stopped: Path) -> None:
    """Where texts are padded, those of like length share a batch."""
    words = complaint(fw_cli("train", "--resume", stopped, "--no-packing"))
    assert "packing was None and is False" in words


def test_data_that_has_been_moved_is_recognised(fw_cli: Cli, stopped: Path, reviews: Path) -> None:
    reviews.rename(reviews.with_name("moved.csv"))
    assert "reviews.csv" in complaint(fw_cli("train", "--resume", stopped))
    done = fw_cli("train", "--resume", stopped, "--data", reviews.with_name("moved.csv"))
    assert done.code == 0, done.err
    assert "going on from" in done.err


def test_what_started_a_run_is_not_part_of_it(fw_cli: Cli, stopped: Path, line: Any) -> None:
    """Neither its recipe nor the next start inherits `--resume` or `--force`."""
    told = json.loads((stopped / "run.json").read_text())
    assert fw_cli("train", "--resume", stopped, "--force", "--epochs", 1).code == 0
    assert json.loads((stopped / "run.json").read_text())["pid"] == os.getpid() != told["pid"]
    assert json.loads(next((stopped / "checkpoints").iterdir()).joinpath("state.json").read_text())["identity"][
        "device"
    ] == ("cpu")
    recipe = (stopped / "recipe.toml").read_text()
    assert "resume" not in recipe
    assert "force = false" in recipe
    assert fw_cli("train", "--recipe", stopped / "recipe.toml", "--out", "again").code == 0


def test_a_run_that_began_afresh_can_be_resumed(server: Forked, fw_cli: Cli, in_tmp: Path, line: Any) -> None:
    cut = "import featherweight.training as t; t._save = None"
    assert server.run(in_tmp, *line(*SHORT, "--save-steps", 10, "--fresh", "--out", "mine"), before=cut) == 70
    done = fw_cli("train", "--resume", "mine")
    assert done.code == 0, done.err


def test_a_recipe_that_was_lost_costs_no_setting(server: Forked, fw_cli: Cli, in_tmp: Path, line: Any) -> None:
    cut = "import featherweight.training as t; t.announce = None"
    assert server.run(in_tmp, *line(*SHORT, "--out", "mine"), before=cut) == 70
    (in_tmp / "mine" / "recipe.toml").write_text("")
    done = fw_cli(*line(*SHORT, "--out", "mine"))
    assert done.code == 0, done.err
    assert "steps = 30" in (in_tmp / "mine" / "recipe.toml").read_text()


def test_a_folder_in_which_a_run_was_killed_before_it_began_is_free(fw_cli: Cli, in_tmp: Path, line: Any) -> None:
    (in_tmp / "mine").mkdir()
    for name in (".lock", ".run.json"):
        (in_tmp / "mine" / name).touch()
    done = fw_cli(*line(*SHORT, "--out", "mine"))
    assert done.code == 0, done.err


def test_two_runs_at_the_same_instant_take_two_folders(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks before the other has made its own."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert [new_folder(None, "lora").name for _ in range(2)] == ["lora-001", "lora-002"]


def test_settings_that_do_not_change_the_result_may_change(fw_cli: Cli, stopped: Path, line: Any) -> None:
    done = fw_cli("train", "--resume", stopped, "--checkpoint-activations", "layer", "--micro-batch", 1)
    assert done.code == 0, done.err
    assert 'checkpoint_activations = "layer"' in (stopped / "recipe.toml").read_text()


def test_other_data_is_refused_though_its_file_has_the_same_name(
    fw_cli: Cli, stopped: Path, line: Any, reviews: Path
) -> None:
    tiny.write(reviews, [row | {"text": row["text"] + "!"} for row in tiny.reviews()])
    assert re.search(r"of another run: data was '\w+' and is '\w+'", fw_cli(*line(*SHORT, "--out", "mine")).err)


def test_another_base_is_refused_though_its_folder_has_the_same_name(
    fw_cli: Cli, reviews: Path, in_tmp: Path, server: Forked
) -> None:
    tiny.save_llama(in_tmp / "base")
    args = ("train", "--model", "base", "--data", reviews, *SHORT, "--out", "mine", "--save-steps", 10)
    fail = "import featherweight.training as t; t._save = None"
    assert server.run(in_tmp, *args, before=fail) == 70
    shutil_weights(in_tmp / "base")
    assert "of another run: base was" in fw_cli(*args).err


def shutil_weights(folder: Path) -> None:
    """Other weights for the same model."""
    from safetensors.torch import load_file, save_file

    tensors = {k: t * 1.5 for k, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FIRST_MOMENTS = {  # what a process does at the time, and dies
    "trying the folder": "p.check_writable = lambda file: (open(file, 'w').close(), die())",
    "locking it": "r.FileLock.acquire = lambda lock, **_: (open(lock.lock_file, 'w').close(), die())",
    "saying what was asked for": "r._write = lambda path, content: (open(path.with_name('.run.json'), 'w').close(), die())",
    "writing the recipe": "Path.write_text = lambda path, *a, **k: "
    "(open(path, 'w').close(), die()) if 'recipe' in path.name else write(path, *a, **k)",
}


@pytest.mark.parametrize("moment", FIRST_MOMENTS)
def test_a_run_that_is_killed_in_its_first_moments_can_be_asked_for_again(
    server: Forked, in_tmp: Path, line: Any, moment: str
) -> None:
    """An empty recipe would be one of defaults; a folder with files would be another's."""
    spoil = (
        "import os, featherweight.prepare as p, featherweight.run_folder as r\n"
        "from pathlib import Path\n"
        "write, die = Path.write_text, lambda: os.kill(os.getpid(), 9)\n" + FIRST_MOMENTS[moment]
    )
    args = line(*SHORT, "--out", "mine")
    assert server.run(in_tmp, *args, before=spoil) == -9, said(in_tmp)
    assert list((in_tmp / "mine").iterdir())
    assert server.run(in_tmp, *args) == 0, said(in_tmp)
    assert server.run(in_tmp, *line(*SHORT, "--out", "whole")) == 0
    assert result_of(in_tmp / "mine") == result_of(in_tmp / "whole")


def test_fresh_begins_anew(fw_cli: Cli, server: Forked, in_tmp: Path, line: Any) -> None:
    assert server.run(
        in_tmp, *line(*SHORT, "--save-steps", 10), before="import featherweight.training as t; t._save = None"
    )
    done = fw_cli(*line(*SHORT, "--fresh"))
    assert done.code == 0, done.err
    assert "going on" not in done.err
    assert sorted(p.name for p in Path("runs").iterdir()) == ["lora-001", "lora-002"]
    assert fw_cli(*line(*SHORT)).code == 0  # goes on with the first
    assert sorted(p.name for p in Path("runs").iterdir()) == ["lora-001", "lora-002"]


def test_a_folder_without_a_run_cannot_be_resumed(fw_cli: Cli, in_tmp: Path) -> None:
    (in_tmp / "empty").mkdir()
    assert "there is no run in this folder" in complaint(fw_cli("train", "--resume", "empty"))
    assert "there is no run in this folder" in complaint(fw_cli("train", "--resume", "none"))
    (in_tmp / "empty" / "run.json").write_text("{")
    assert "run.json is damaged" in complaint(fw_cli("train", "--resume", "empty"))


def test_a_checkpoint_that_is_damaged_is_named_and_the_run_still_ends_in_the_same_bytes(
    fw_cli: Cli, stopped: Path, line: Any
) -> None:
    [newest] = (stopped / "checkpoints").iterdir()
    (newest / "state.safetensors").write_bytes(b"")
    done = fw_cli(*line(*SHORT, "--out", "mine"))
    assert done.code == 0, done.err
    assert "state.safetensors is damaged" in done.err
    assert fw_cli(*line(*SHORT, "--out", "whole")).code == 0
    assert result_of(stopped) == result_of(Path("whole"))


# --- two runs, locks ------------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_and_told_of_the_first(
    server: Forked, fw_cli: Cli, in_tmp: Path, line: Any
) -> None:
    args = line(*LONG, "--out", "mine")
    pid = server.start(in_tmp, *args)
    when(in_tmp, "train: 100/400")
    words = complaint(fw_cli(*args))
    assert f"another run is at work in it (process {pid} on " in words
    assert "featherweight train" in words
    os.kill(pid, signal.SIGKILL)
    server.wait(pid)
    with at_work(in_tmp / "mine"):  # the lock of a process that is gone holds nobody up
        assert "another run is at work in it" in complaint(fw_cli(*args))
    assert server.run(in_tmp, *args) == 0, said(in_tmp)


def test_a_run_that_is_refused_leaves_no_folder(fw_cli: Cli, in_tmp: Path, line: Any) -> None:
    assert "does not fit" in complaint(fw_cli(*line(*SHORT, "--memory", "1MB")))
    assert not list(Path("runs").glob("*"))
