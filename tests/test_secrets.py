"""Secrets do not leave: not in what is printed, not in any file of a run, whether it ends well or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from featherweight import cli, provenance
from featherweight.redaction import HIDDEN, clean
from forked import Forked

PLANTED = {
    "HF_TOKEN": "hf_plantedTokenOfTheHub123", "MY_SERVICE_API_KEY": "planted-service-key/+=", "DB_PASSWORD": "plantedPassword99",
}  # fmt: skip
ELSEWHERE = ("plantedUser", "plantedPass", "plantedQuery", "hf_plantedInARecipe123")
BEFORE = f"import os; os.environ |= {PLANTED!r}\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    with Forked() as server:
        yield server


def leaks(folder: Path) -> list[str]:
    """Files under a folder that tell a secret, the program's own words among them."""
    wanted = [word.encode() for word in (*PLANTED.values(), *ELSEWHERE)]
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("recipe-with-secrets.toml", "reviews.csv")]
    assert files
    return [f"{p}: {w!r}" for p in files for w in wanted if w in p.read_bytes()]


@pytest.fixture
def work(in_tmp: Path) -> Path:
    """A folder whose name is a secret, with data in it, and an empty one to work in."""
    secret = in_tmp / PLANTED["DB_PASSWORD"]
    secret.mkdir()
    tiny.write(secret / "reviews.csv", tiny.reviews())
    (in_tmp / "work").mkdir()
    (in_tmp / "work" / "recipe-with-secrets.toml").write_text(
        f'template = "hf_plantedInARecipe123 https://plantedUser:plantedPass@host/?token=plantedQuery {{text}} '
        f'{PLANTED["HF_TOKEN"]}"\n'
    )
    return in_tmp / "work"


def test_a_run_that_ends_well_tells_no_secret_and_goes_on_as_it_was(server: Forked, work: Path, llama: Path) -> None:
    recipe = ("--recipe", "recipe-with-secrets.toml", "--data", work.parent / PLANTED["DB_PASSWORD"] / "reviews.csv")
    line = ("train", "--model", llama, *recipe, "--steps", 4, "--save-steps", 1, "--out", "mine")
    assert server.run(work, *line, before=BEFORE) == 0, (work / "said.txt").read_text()
    assert leaks(work) == []
    assert HIDDEN in (work / "mine" / "recipe.toml").read_text()
    about = (work / "mine" / "run.json").read_text()
    assert HIDDEN in about
    (work / "mine" / "run.json").write_text(about.replace('"complete"', '"interrupted"'))
    assert server.run(work, *line, before=BEFORE) == 0, (work / "said.txt").read_text()
    assert "going on from" in (work / "said.txt").read_text()
    assert leaks(work) == []


def test_a_comparison_tells_no_secret(server: Forked, work: Path, llama: Path) -> None:
    recipe = ("--recipe", "recipe-with-secrets.toml", "--data", work.parent / PLANTED["DB_PASSWORD"] / "reviews.csv")
    line = ("compare", "--model", llama, *recipe, "--methods", "ia3", "--steps", 2, "--test-rows", 6, "--out", "table")
    assert server.run(work, *line, before=BEFORE) == 0, (work / "said.txt").read_text()
    assert leaks(work) == []
    assert HIDDEN in (work / "table" / "rows.jsonl").read_text()  # in the command that is recorded


@pytest.mark.parametrize(
    "flags",
    [
        ("--data", "https://plantedUser:plantedPass@host.example/rows.csv?token=plantedQuery"),
        ("--data", f"{PLANTED['MY_SERVICE_API_KEY']}.csv"),
        ("--model", "https://plantedUser:plantedPass@host.example/model"),
        ("--model", PLANTED["HF_TOKEN"]),
        ("--lr", PLANTED["DB_PASSWORD"]),
        ("--dtype", PLANTED["HF_TOKEN"]),
        ("--out", f"/proc/{PLANTED['HF_TOKEN']}/out"),
        ("--template", f"{{text}} {{{PLANTED['HF_TOKEN']}}}"),
        ("--recipe", f"{PLANTED['HF_TOKEN']}.toml"),
        (f"--{PLANTED['DB_PASSWORD']}",),
    ],
)
def test_a_run_that_is_refused_tells_no_secret(server: Forked, work: Path, llama: Path, flags: tuple[str, ...]) -> None:
    data = work.parent / PLANTED["DB_PASSWORD"] / "reviews.csv"
    assert server.run(work, "train", "--model", llama, "--data", data, *flags, before=BEFORE) == 2
    assert "error: " in (work / "said.txt").read_text()
    assert leaks(work) == []


def test_what_nobody_expected_is_printed_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError(f"cannot read https://plantedUser:plantedPass@host with {PLANTED['HF_TOKEN']}")

    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RuntimeError) as caught:
        cli.main()
    sys.excepthook(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith(f"RuntimeError: cannot read https://{HIDDEN}@host with {HIDDEN}\n")


def test_a_recorded_command_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", PLANTED["MY_SERVICE_API_KEY"])
    monkeypatch.setattr(sys, "argv", ["/x/featherweight", "train", "--data", PLANTED["MY_SERVICE_API_KEY"]])
    assert provenance.record()["command"] == f"featherweight train --data '{HIDDEN}'"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a hf_abcdefghijkl b", "a *** b"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("git+https://tok@host/x", "git+https://***@host/x"),
        ("https://a:b@h/?x=1&access_token=t&y=2#f", "https://***@h/?x=1&access_token=***&y=2#f"),
        ("https://h/?X-Amz-Signature=abc", "https://h/?X-Amz-Signature=***"),
        (
            "mail me@host.example, see https://host.example/a?b=c",
            "mail me@host.example, see https://host.example/a?b=c",
        ),
        ("what a key film; token by token", "what a key film; token by token"),
    ],
)
def test_secrets_are_known_by_their_shape(text: str, left: str) -> None:
    assert clean(text) == left


def test_secrets_are_found_in_lists_and_objects_and_the_rest_stays() -> None:
    value: Any = {"a": ["https://a:b@h", 1.5, None], "b": (True, {"hf_abcdefghijkl": 2})}
    assert clean(value) == {"a": ["https://***@h", 1.5, None], "b": (True, {"***": 2})}


def test_what_is_short_or_a_path_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("A_TOKEN", "film")
    assert clean(f"the film in {tmp_path}") == f"the film in {tmp_path}"
