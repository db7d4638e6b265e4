"""Adapter folders: sound ones of several methods, spoilt in one place that is known."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import featherweight as fw
import tiny
from fuzz_case import Case, mutated, write

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "featherweight.json"
FILES = (CONFIG, WEIGHTS, OURS)
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 7, 1.5, 10**30, 10**400, float("nan"), float("inf"), "", "8", "x" * 3000, "a\u0000b", "\ud800", "\x1b[2J", [],
    [1], ["a"], [[]], {}, {"a": 1}, {"": []}, "../../x", "/etc/passwd",
)  # fmt: skip
Spoil = Callable[[random.Random, Path, str], tuple[bool | None, str]]
"""Spoils a folder that holds an adapter of a method, and says whether it must be refused, and the file that must be named."""


@dataclass(frozen=True)
class Good:
    """A tiny model and sound adapters of some methods on it."""

    model: Path
    adapters: dict[str, Path]


def good(folder: Path) -> Good:
    """Make them."""
    model = tiny.save_llama(folder / "llama")
    task = fw.load_task(str(tiny.write(folder / "rows.csv", tiny.reviews())))
    methods = {
        "lora": fw.LoRA(r=2), "ia3": fw.IA3(), "prompt_tuning": fw.PromptTuning(num_virtual_tokens=3),
        "p_tuning": fw.PTuning(num_virtual_tokens=3),
    }  # fmt: skip
    adapters = {}
    for name, method in methods.items():
        base = fw.load_base(str(model), dtype="float32")
        fw.train(base, task, method, steps=1)
        adapters[name] = fw.save(base.model, folder / name, about={"base": str(model)})
    return Good(model, adapters)


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change keys of a JSON file, and take the check sums out."""
    told = json.loads((folder / file).read_text()) | changes
    write(folder / file, json.dumps(told))
    if file == OURS or (folder / OURS).exists():
        write(folder / OURS, json.dumps(json.loads((folder / OURS).read_text()) | {"sha256": None}))


def by_peft(rng: random.Random, folder: Path) -> None:
    """As another tool leaves it: without `featherweight.json` — or ours, with the check sums taken out."""
    if rng.random() < 0.6:
        (folder / OURS).unlink()
    else:
        edit(folder, OURS)


def sound(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    """As it was saved, or as HF PEFT saves it."""
    if rng.random() < 0.5:
        by_peft(rng, folder)
    return False, ""


def a_wrong_setting(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    wrong = {
        "lora": {"r": ["8", -1, 0, 1.5, True, [8], {}, 10**30, float("nan"), float("inf")],
                 "lora_alpha": ["8", float("nan"), float("inf"), [], 0, 10**400],
                 "lora_dropout": [float("nan"), -1, 1, "0"], "target_modules": [7, [1], {}, [[]], ["nope"], "(", [""]],
                 "use_rslora": ["yes", 5]},
        "ia3": {"target_modules": [7, ["nope"], [1], {}], "feedforward_modules": [7, {}, [[]]]},
        "prompt_tuning": {"num_virtual_tokens": ["3", 0, -1, 10**30, 1.5, True, []]},
        "p_tuning": {"num_virtual_tokens": ["3", 0, -1, 10**30, 1.5, True, {}]},
    }[method]  # fmt: skip
    key = rng.choice(list(wrong))
    edit(folder, CONFIG, **{key: rng.choice(wrong[key])})
    return True, CONFIG


def any_setting(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    key = rng.choice(
        [*json.loads((folder / CONFIG).read_text()), "rank_pattern", "use_dora", "bias", "modules_to_save", "new_key"]
    )
    edit(folder, CONFIG, **{key: rng.choice(JUNK)})
    return None, ""


def an_unknown_setting(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    edit(
        folder,
        CONFIG,
        **{
            rng.choice(["use_dora", "new_key", "rank_pattern", "corda_config", "\ud800"]): rng.choice(
                [True, 7, {"a": 1}, "x" * 9000]
            )
        },
    )
    return True, CONFIG


def no_object(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    file, depth = rng.choice([CONFIG, OURS]), rng.choice([500, 3000, 50_000])
    text = rng.choice(
        [
            "",
            "{",
            "[]",
            "5",
            "null",
            "{}}",
            "[" * depth,
            '{"r":' * depth,
            "\x00",
            '{"r": ' + "9" * 5000 + "}",
            "{'r': 8}",
        ]
    )
    write(folder / file, rng.choice([text.encode(), b"\xff\xfe" + text.encode("utf-16-le")]))
    if file == CONFIG and rng.random() < 0.5:
        (folder / OURS).unlink()
    return True, file


def a_wrong_word_of_ours(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    wrong = {
        "labels": ["bad", 5, [1, 2], {"a": 1}, [[]], ["a", "a"], ["a"], [None, "a"]], "template": [5, ["{text}"], "{", {}, True],
        "columns": [5, ["text"], {"nope": "x"}, {"text_column": 5}, "text", {"seed": "1"}], "base": [5, [], {}, True],
        "held_out": [5, [1], {"nope": 1}, {"seed": "x"}, {"test_fraction": "x"}, "x", {"test_data": 5}], "kind": [5, "x", [], True],
        "fingerprint": [5, "", "x", "a-b-c", [], {}], "identity": [5, "x", [1], {"tokenizer": 5}], "sha256": [5, "x", [1]],
        "data": [5, [], {}, True],
    }  # fmt: skip
    key = rng.choice(list(wrong))
    value = rng.choice(wrong[key])
    told = json.loads((folder / OURS).read_text()) | {"sha256": None}
    write(folder / OURS, json.dumps(told | {key: value}))
    return True, OURS


def a_flipped_byte(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    """Anywhere, in an adapter that has check sums."""
    file = rng.choice(FILES)
    content = (folder / file).read_bytes()
    spoilt = mutated(rng, content)
    write(folder / file, spoilt)
    return (None, "") if file != WEIGHTS or spoilt == content else (True, file)


def a_flipped_byte_unseen(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    """Anywhere, in one that has none."""
    by_peft(rng, folder)
    file = rng.choice([CONFIG, WEIGHTS, WEIGHTS])
    content = (folder / file).read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0] if file == WEIGHTS else len(content)
    write(folder / file, mutated(rng, content[:head]) + content[head:])
    return None, ""


def header(folder: Path, change: Callable[[dict[str, Any]], Any], more: bytes = b"") -> None:
    """Change the header of the weights."""
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    told = json.loads(content[8 : 8 + size])
    told.pop("__metadata__", None)
    told = told if (other := change(told)) is None else other
    text = json.dumps(told).encode()
    write(folder / WEIGHTS, struct.pack("<Q", len(text)) + text + content[8 + size :] + more)


def a_broken_header(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    name = rng.choice(["first", "last"])

    def of(told: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = told[sorted(told)[0 if name == "first" else -1]]
        return found

    def overlap(told: dict[str, Any]) -> None:
        told["other"] = dict(of(told))
        for tensor in told.values():
            tensor["data_offsets"] = of(told)["data_offsets"]

    changes: list[Callable[[dict[str, Any]], Any]] = [
        overlap, lambda t: of(t).update(shape=[2**40, 2**40]), lambda t: of(t).update(shape=[-1, 4]), lambda t: of(t).update(dtype="F99"),
        lambda t: of(t).update(dtype=5), lambda t: of(t).update(shape="x"), lambda t: of(t).update(data_offsets=[2**62, 2**63]),
        lambda t: of(t).update(data_offsets=[-4, 0]), lambda t: of(t).update(data_offsets=[4, 0]), lambda t: of(t).pop("shape"),
        lambda t: {"x": []}, lambda t: {}, lambda t: t.update(__metadata__={"a": 1}), lambda t: t.update(__metadata__=[]),
        lambda t: of(t).update(shape=[]), lambda t: of(t).update(shape=[10**400]),
    ]  # fmt: skip
    header(folder, rng.choice(changes))
    return True, WEIGHTS


def no_weights(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    content = (folder / WEIGHTS).read_bytes()
    write(folder / WEIGHTS, rng.choice([
        b"", b"\0" * 7, struct.pack("<Q", 2**62) + content[8:], struct.pack("<Q", 2**64 - 1) + content[8:], struct.pack("<Q", 0),
        struct.pack("<Q", len(content)) + content[8:], content[: len(content) // 2], content + b"x", b"PK" + content,
        pickle.dumps({"a": 1}),
        struct.pack("<Q", 4000) + b"[" * 4000, struct.pack("<Q", 3) + b"{}\xff", content[:-1],
        struct.pack("<Q", 50_000) + b'{"a":' * 10_000,
    ]))  # fmt: skip
    return True, WEIGHTS


def pickled(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    name = rng.choice(["adapter_model.bin", "adapter_model.pt", "pytorch_model.pth", "adapter_model.pkl"])
    (folder / WEIGHTS).unlink()
    write(folder / name, pickle.dumps({"a": 1}))
    return True, name


def other_tensors(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    how = rng.randrange(7)
    if how == 0:
        tensors.pop(name)
    elif how == 1:
        tensors[rng.choice(["../../stray", "/etc/passwd", "", "x" * 5000, "a\x1b[2Jb", "base_model.model.x"])] = (
            torch.ones(1)
        )
    elif how == 2:
        tensors[name] = torch.ones(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
    elif how == 3:
        tensors[name] = tensors[name].flatten()[None, None]
    elif how == 4:
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice(
            [float("nan"), float("inf"), float("-inf")]
        )
    elif how == 5:
        tensors[rng.choice(["../x", "/abs"])] = tensors.pop(name)
    else:
        tensors = {"base_model.model.lm_head.weight": torch.ones(2, 2)}
    save_file(tensors, folder / WEIGHTS)
    return True, WEIGHTS


def another_type(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    by_peft(rng, folder)
    kind = rng.choice(
        [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.int64]
    )
    save_file({k: v.to(kind) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return not kind.is_floating_point, WEIGHTS if not kind.is_floating_point else ""


def a_link_out(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    file, outside = rng.choice(FILES), folder.parent.parent / "outside"
    write(outside / file, (folder / file).read_bytes())
    (folder / file).unlink()
    (folder / file).symlink_to(rng.choice([outside / file, Path("../../outside") / file]))
    return True, file


def a_link_within(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    file = rng.choice(FILES)
    (folder / "blobs").mkdir()
    (folder / file).rename(folder / "blobs" / "abc")
    (folder / file).symlink_to("blobs/abc")
    return False, ""


def from_the_hub(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    """Files are links to blobs of the same repository; one may lead out of it."""
    repository = folder.parent / "hub" / "models--me--mine"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    out, spoilt = rng.random() < 0.5, rng.choice(FILES)
    for file in FILES:
        away = out and file == spoilt
        blob = (repository.parent / "models--you--yours" if away else repository) / "blobs" / file
        write(blob, (folder / file).read_bytes())
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    shutil.rmtree(folder)
    folder.symlink_to(snapshot)
    return out, spoilt if out else ""


def odd_files(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    file = rng.choice(FILES)
    (folder / file).unlink()
    how = rng.randrange(5)
    if how == 0:
        (folder / file).mkdir()
    elif how == 1:
        (folder / file).symlink_to(file)
    elif how == 2:
        (folder / file).symlink_to("nowhere")
    elif how == 3:
        os.mkfifo(folder / file)
    else:
        (folder / file).symlink_to("/dev/zero")
    return True, file


def no_folder(rng: random.Random, folder: Path, method: str) -> tuple[bool | None, str]:
    shutil.rmtree(folder)
    how = rng.randrange(4)
    if how == 0:
        folder.mkdir()
    elif how == 1:
        write(folder, "{}")
    elif how == 2:
        folder.symlink_to(folder)
    return True, "adapter"


SPOILS: tuple[Spoil, ...] = (
    sound, a_wrong_setting, a_wrong_setting, any_setting, any_setting, an_unknown_setting, no_object, a_wrong_word_of_ours,
    a_wrong_word_of_ours, a_flipped_byte, a_flipped_byte_unseen, a_flipped_byte_unseen, a_broken_header, a_broken_header, no_weights,
    pickled, other_tensors, other_tensors, another_type,
    a_link_out, a_link_within, from_the_hub, odd_files, no_folder,
)  # fmt: skip


def make(rng: random.Random, folder: Path, good: Good) -> Case:
    """An adapter to evaluate, to generate with, or to merge."""
    method, spoil = rng.choice(list(good.adapters)), rng.choice(SPOILS)
    adapter = folder / "in" / "adapter"
    shutil.copytree(good.adapters[method], adapter)
    tiny.write(folder / "in" / "rows.csv", tiny.reviews(20))
    must, where = spoil(rng, adapter, method)
    verbs = [["evaluate", "--data", "in/rows.csv"], ["generate", "--prompt", "a film"]]
    if method in ("lora", "ia3"):
        verbs.append(["merge", "--out", "out/merged"])
    verb = rng.choice(verbs)
    base = [] if must is not False and rng.random() < 0.3 else ["--model", str(good.model)]
    return Case(spoil.__name__, [*verb, "--adapter", "in/adapter", *base], must, where)
