"""What goes out: nothing for local files, nothing offline, and nothing but the one thing that was asked for. And nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import tiny
from featherweight import InputError, network
from forked import Forked

WATCH = """
import json, os, sys
import huggingface_hub.constants, datasets.config
import torch, pickle
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):  # the tests' own precaution
    os.environ.pop(name, None)
for name in [n for n in os.environ if n.lower().endswith("_proxy")]:  # another machine would look names up
    os.environ.pop(name)
huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = False
os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
os.environ.setdefault("PIP_RETRIES", "0")
seen = open("seen.jsonl", "w", buffering=1)

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        print(json.dumps(["out", event, repr(args)]), file=seen)
        raise OSError("the test lets nothing out")
    if event == "pickle.find_class":
        print(json.dumps(["pickle", event, repr(args)]), file=seen)
    if event == "subprocess.Popen":
        print(json.dumps(["started", event, repr(args[1])]), file=seen)

def watched(name, original):
    def call(*args, **kwargs):
        print(json.dumps(["pickle", name, repr(args)[:200]]), file=seen)
        return original(*args, **kwargs)
    return call

torch.load = watched("torch.load", torch.load)
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    with Forked() as server:
        yield server


def seen(folder: Path, kind: str) -> list[str]:
    events = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    return [f"{event}: {what}" for k, event, what in events if k == kind]


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text()


@pytest.mark.parametrize("data", ["reviews.csv", "talk.jsonl", "rows.parquet"])
def test_local_files_are_worked_on_without_a_connection_or_a_pickle(
    server: Forked, in_tmp: Path, llama: Path, data: str
) -> None:
    """The whole way: planning, training, measuring, generating, merging and comparing."""
    tiny.write(in_tmp / data, tiny.requests() if data == "talk.jsonl" else tiny.reviews())
    model, of = ("--model", llama), ("--data", data)
    untied = tiny.save_llama(in_tmp / "untied")
    lines = [
        ("train", "--model", untied, *of, "--steps", 3, "--save-steps", 1, "--out", "mine"),
        ("evaluate", "--adapter", "mine", *of),
    ]
    if data == "reviews.csv":
        lines += [
            ("generate", "--adapter", "mine", "--prompt", "say film", "--max-new-tokens", 2),
            ("merge", "--adapter", "mine", "--out", "merged"),
            ("compare", *model, *of, "--methods", "lora,ia3", "--steps", 2, "--test-rows", 6, "--no-isolate"),
            ("plan", *model, *of, "--memory", "4GB"),
            ("methods", *model),
        ]
    for line in lines:
        code = server.run(in_tmp, *line, before=WATCH)
        assert code == 0, said(in_tmp)
        assert seen(in_tmp, "out") == []
        assert seen(in_tmp, "pickle") == []


def test_a_hub_id_that_is_not_here_is_asked_for_once_it_may_go_out(server: Forked, in_tmp: Path) -> None:
    """This is the one connection that a user asks for: the other tests would be worth nothing if it were not seen."""
    assert server.run(in_tmp, "plan", "--model", "nobody/nothing", before=WATCH) == 2
    assert len(seen(in_tmp, "out")) == 1  # not six times, as the hub's library would by itself
    assert said(in_tmp).startswith("featherweight: error: model 'nobody/nothing' could not be loaded")


@pytest.mark.parametrize("wanted", [True, False])
def test_who_wants_no_connection_is_not_overruled(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """However that was said: `TRANSFORMERS_OFFLINE` and the like end in this constant."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", wanted)
    monkeypatch.setattr(network.urllib.request, "getproxies", dict)
    for there in (False, True):

        def look(*_: object, found: bool = there) -> None:
            if not found:
                raise OSError

        monkeypatch.setattr(network.socket, "getaddrinfo", look)
        network.ask_hub_if_it_is_there()
        assert (wanted or not there) == constants.HF_HUB_OFFLINE


def test_without_a_network_a_model_in_the_cache_is_used_at_once(in_tmp: Path, llama: Path) -> None:
    stored = in_tmp / "home/hub/models--someone--tiny"
    shutil.copytree(llama, stored / "snapshots" / ("a" * 40))
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("a" * 40)
    with Forked(HF_HOME=str(in_tmp / "home")) as server:
        line = ("generate", "--model", "someone/tiny", "--prompt", "a film", "--max-new-tokens", 2)
        assert server.run(in_tmp, *line, before=WATCH) == 0, said(in_tmp)
    asked = seen(in_tmp, "out")
    assert asked
    assert all(what.startswith("socket.getaddrinfo: ") for what in asked)
    assert "Retrying" not in said(in_tmp)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("plan", "--model", "nobody/nothing"), "model 'nobody/nothing' could not be loaded"),
        (("generate", "--model", "nobody/nothing", "--prompt", "a"), "model 'nobody/nothing' could not be loaded"),
        (
            ("train", "--data", "nobody/nothing", "--model", "LLAMA"),
            "data: 'nobody/nothing' is neither a file here nor",
        ),
        (("train", "--model", "LLAMA"), "--offline opens no connection"),
        (("generate", "--prompt", "a"), "--offline opens no connection"),
        (("methods", "--model", "nobody/nothing"), "model 'nobody/nothing' could not be loaded"),
    ],
)
def test_offline_what_is_not_here_is_one_error_and_nothing_is_asked_for(
    server: Forked, in_tmp: Path, llama: Path, line: tuple[str, ...], words: str
) -> None:
    before = WATCH + f"\nos.environ['HF_HOME'] = {str(in_tmp / 'empty')!r}"
    line = tuple(str(llama) if word == "LLAMA" else word for word in line)
    assert server.run(in_tmp, *line, "--offline", before=before) == 2, said(in_tmp)
    assert words in said(in_tmp).splitlines()[-1]
    assert said(in_tmp).splitlines()[-1].startswith("featherweight: error: ")
    assert "Traceback" not in said(in_tmp)
    assert seen(in_tmp, "out") == []
    assert [s for s in seen(in_tmp, "started") if "pip" in s] == []


@pytest.mark.parametrize("name", ["./nobody", "https://nobody.example/model", "nobody/nothing/more", "no body"])
@pytest.mark.parametrize("flag", ["--model", "--data"])
def test_a_name_that_no_hub_can_have_does_not_go_out(
    server: Forked, in_tmp: Path, llama: Path, flag: str, name: str
) -> None:
    tiny.write(in_tmp / "reviews.csv", tiny.reviews())
    other = {"--model": ("--data", "reviews.csv"), "--data": ("--model", llama)}[flag]
    assert server.run(in_tmp, "train", flag, name, *other, before=WATCH) == 2
    assert said(in_tmp).splitlines()[-1].startswith("featherweight: error: ")
    assert seen(in_tmp, "out") == []


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "a/b_c.d-e", "HuggingFaceTB/SmolLM2-135M"])
def test_names_as_hubs_have_them_may_go_out(name: str) -> None:
    network.check_hub_id("model", name)


@pytest.mark.parametrize("name", ["", "/", "a/", "/a", "a//b", "~/a", "a:b", "ä/b", "-a/b", "a/b.git", "a" * 200])
def test_names_as_no_hub_has_them_may_not(name: str) -> None:
    with pytest.raises(InputError, match="no hub id"):
        network.check_hub_id("model", name)


@pytest.fixture
def cached(llama: Path, in_tmp: Path) -> tuple[Path, str]:
    """A hub's cache with one model in it, and what makes a process use it."""
    repository, commit = in_tmp / "hub" / "models--some--model", "0123456789" * 4
    shutil.copytree(llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    use = f"\nhuggingface_hub.constants.HF_HUB_CACHE = {str(in_tmp / 'hub')!r}"
    return repository / "snapshots" / commit, WATCH + use


def test_a_hub_id_in_the_cache_works_offline(server: Forked, in_tmp: Path, cached: tuple[Path, str]) -> None:
    tiny.write(in_tmp / "reviews.csv", tiny.reviews())
    line = ("train", "--model", "some/model", "--data", "reviews.csv", "--steps", 1, "--offline")
    assert server.run(in_tmp, *line, before=cached[1]) == 0, said(in_tmp)
    assert seen(in_tmp, "out") == []


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "a.B"}}, "some/model/config.json: the field auto_map names code"),
        ("tokenizer_config.json", {"auto_map": ["a.B", None]}, "some/model/tokenizer_config.json: the field auto_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": "a.bin"}}, "names 'a.bin', which is no safetensors file"),
        ("adapter_config.json", {"peft_type": "LORA"}, "there is an adapter beside the model"),
    ],
)
def test_what_comes_from_a_hub_is_looked_at_too(
    server: Forked, in_tmp: Path, cached: tuple[Path, str], file: str, fields: dict[str, Any], words: str
) -> None:
    place = cached[0] / file
    content = json.loads(place.read_text()) if place.is_file() else {}
    place.write_text(json.dumps(content | fields))
    line = ("generate", "--model", "some/model", "--prompt", "a", "--offline")
    assert server.run(in_tmp, *line, before=cached[1]) == 2, said(in_tmp)
    assert words in said(in_tmp)
    assert "Traceback" not in said(in_tmp)


def test_weights_from_a_hub_that_are_no_safetensors_are_refused(
    server: Forked, in_tmp: Path, cached: tuple[Path, str]
) -> None:
    (cached[0] / "model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    line = ("generate", "--model", "some/model", "--prompt", "a", "--offline")
    assert server.run(in_tmp, *line, before=cached[1]) == 2, said(in_tmp)
    assert "featherweight: error: model 'some/model'" in said(in_tmp)
    assert seen(in_tmp, "pickle") == []
