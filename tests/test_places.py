"""Where a run lives: disks that are full or read-only, folders of any name, a clock that jumps."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
from command import Cli, complaint
from forked import Forked, said
from killing import SHORT, after_step, result_of

NO_RIGHTS = "import ctypes; ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())\n"
"""Root, too, may then not write into what is read-only."""


def test_a_limit_on_files_is_a_clear_message_and_training_goes_on(server: Forked, in_tmp: Path, line: Any) -> None:
    """For real: no file may be longer than 6 KB, which the adapter is not, but the state."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    args = line(*SHORT, "--save-steps", 10, "--out", "mine")
    assert server.run(in_tmp, *args, before=limit) == 0, said(in_tmp)
    assert said(in_tmp).count("a checkpoint could not be written at step") == 2
    assert "File too large" in said(in_tmp)
    assert list((in_tmp / "mine" / "checkpoints").iterdir()) == []
    assert server.run(in_tmp, *line(*SHORT, "--out", "whole")) == 0
    assert result_of(in_tmp / "mine") == result_of(in_tmp / "whole")


def test_or_it_stops_as_asked_and_goes_on_when_there_is_room(server: Forked, in_tmp: Path, line: Any) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    args = line(*SHORT, "--save-steps", 10, "--out", "mine", "--if-save-fails", "stop")
    assert server.run(in_tmp, *args, before=limit) == 1
    assert "stopped after 10 steps, as asked" in said(in_tmp)
    assert server.run(in_tmp, *args) == 0, said(in_tmp)


def test_an_adapter_that_does_not_fit_on_the_disk_is_saved_elsewhere(server: Forked, in_tmp: Path, line: Any) -> None:
    (in_tmp / "elsewhere").mkdir()
    full = (
        f"import os, tempfile, featherweight.training as t; tempfile.tempdir = {str(in_tmp / 'elsewhere')!r}\n"
        "from featherweight import on_disk\n"
        "first = t.save\n"
        "def save(model, folder, **more):\n"
        "    saving.append(1)\n"
        "    if folder.name == 'mine': raise t.InputError('cannot write the adapter to mine: No space left on device')\n"
        "    return first(model, folder, **more)\n"
        "t.save = save\n"
        "def write(path, text):\n"
        "    if saving: raise t.InputError('cannot write run.json: No space left on device')\n"
        "    return written(path, text)\n"
        "written, on_disk.write, saving = on_disk.write, write, []"
    )
    assert server.run(in_tmp, *line(*SHORT, "--out", "mine"), before=full) == 1
    assert "No space left on device" in said(in_tmp)
    [saved] = (in_tmp / "elsewhere").iterdir()
    assert str(saved) in said(in_tmp)
    assert fw.load(fw.load_base(str(line()[2]), dtype="float32").model, saved).peft_type == "LORA"


@pytest.mark.parametrize("name", ["with spaces", "naïve-東京-😀", "a" * 200], ids=["spaces", "unicode", "long"])
def test_folders_of_any_name_work(fw_cli: Cli, in_tmp: Path, line: Any, name: str) -> None:
    done = fw_cli(*line(*SHORT, "--save-steps", 10, "--out", name))
    assert done.code == 0, done.err
    assert {"step-000010", "step-000020"} == {p.name for p in (in_tmp / name / "checkpoints").iterdir()}


def test_folders_that_cannot_be_are_one_clear_error(fw_cli: Cli, in_tmp: Path, line: Any) -> None:
    assert "File name too long" in complaint(fw_cli(*line(*SHORT, "--out", "a" * 300)))
    if Path("/proc/self").is_dir():
        assert "cannot make the folder" in complaint(fw_cli(*line(*SHORT, "--out", "/proc/here")))


@pytest.mark.skipif(sys.platform != "linux", reason="takes root's rights away as Linux does it")
def test_a_folder_that_is_read_only_is_one_clear_error(server: Forked, in_tmp: Path, line: Any) -> None:
    (in_tmp / "read-only").mkdir(mode=0o555)
    assert server.run(in_tmp, *line(*SHORT, "--out", "read-only/mine"), before=NO_RIGHTS) == 2
    assert re.fullmatch(r"featherweight: error: .*read-only.*Permission denied.*\n", said(in_tmp))


@pytest.mark.skipif(sys.platform != "linux", reason="takes root's rights away as Linux does it")
def test_a_folder_that_becomes_read_only_costs_checkpoints_and_not_the_adapter(
    server: Forked, in_tmp: Path, line: Any
) -> None:
    (in_tmp / "elsewhere").mkdir()
    closes = f"import os, tempfile; tempfile.tempdir = {str(in_tmp / 'elsewhere')!r}\n" + after_step(
        15, "os.chmod('mine', 0o555); os.chmod('mine/checkpoints', 0o555)"
    )
    args = line(*SHORT, "--save-steps", 10, "--out", "mine")
    assert server.run(in_tmp, *args, before=NO_RIGHTS + closes) == 1, said(in_tmp)
    assert "a checkpoint could not be written at step 20: Permission denied; the run goes on" in said(in_tmp)
    assert [p.name for p in (in_tmp / "mine" / "checkpoints").iterdir()] == ["step-000010"]
    [saved] = (in_tmp / "elsewhere").iterdir()
    assert f"the adapter has been saved in {saved} instead" in said(in_tmp)
    assert "Traceback" not in said(in_tmp)
    (in_tmp / "mine").chmod(0o755)
    (in_tmp / "mine" / "checkpoints").chmod(0o755)
    assert server.run(in_tmp, *args) == 0, said(in_tmp)
    assert server.run(in_tmp, *line(*SHORT, "--out", "whole")) == 0
    assert result_of(in_tmp / "mine") == result_of(in_tmp / "whole")


def test_a_clock_that_jumps_changes_nothing(server: Forked, in_tmp: Path, line: Any) -> None:
    jumps = "import itertools, time\nyears = itertools.cycle([0, 4e9, 1e9])\ntime.time = lambda: next(years)"
    assert server.run(in_tmp, *line(*SHORT, "--save-steps", 10, "--out", "mine"), before=jumps) == 0, said(in_tmp)
    assert server.run(in_tmp, *line(*SHORT, "--out", "whole")) == 0
    assert result_of(in_tmp / "mine") == result_of(in_tmp / "whole")


def test_files_from_the_future_change_nothing(server: Forked, in_tmp: Path, line: Any) -> None:
    args = line(*SHORT, "--save-steps", 10, "--out", "mine")
    assert server.run(in_tmp, *args, before=after_step(15, "os.kill(os.getpid(), 9)")) == -9
    [checkpoint] = (in_tmp / "mine" / "checkpoints").iterdir()
    os.utime(checkpoint, (4e9, 4e9))
    assert server.run(in_tmp, *args) == 0, said(in_tmp)
    assert "step-000010" in said(in_tmp)
    kept = {p.name for p in (in_tmp / "mine" / "checkpoints").iterdir()}
    assert kept == {"step-000010", "step-000020"}
    assert server.run(in_tmp, *line(*SHORT, "--out", "whole")) == 0
    assert result_of(in_tmp / "mine") == result_of(in_tmp / "whole")
