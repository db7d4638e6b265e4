"""Recipes, flags and options: sound ones, spoilt in one place that is known."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny
from featherweight.config import CompareConfig, EvaluateConfig, GenerateConfig, MergeConfig, PlanConfig, TrainConfig
from fuzz_case import Case, mutated, write

WHOLE = ("steps", "batch_size", "micro_batch", "accumulate", "test_rows", "max_length", "seed", "validation_rows")
REAL = ("lr", "warmup", "weight_decay", "max_grad_norm", "test_fraction", "save_minutes")
WORDS = ("dtype", "quantize", "stream_base", "metric", "optimizer", "checkpoint_activations", "if_save_fails")
TEXTS = ("data", "model", "template", "text_column", "label_column", "test_data", "device", "memory", "method")
SWITCHES = ("lean", "packing", "fresh", "force", "skip_nonfinite")
OPTIONS = {
    "lora": ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"), "ia3": ("target_modules", "feedforward_modules"),
    "prompt_tuning": ("num_virtual_tokens", "prompt_tuning_init_text"), "adalora": ("init_r", "target_r", "beta1"),
}  # fmt: skip
NOT_WHOLE = (
    '"8"',
    "1.5",
    "true",
    "[8]",
    "nan",
    "-inf",
    "-1",
    "1979-05-27",
    "{}",
    '"x"',
    "[]",
    "99999999999999999999999999",
    "[[1]]",
)
NOT_REAL = ('"0.1"', "nan", "inf", "-inf", "-1", "[0.1]", "1979-05-27T07:32:00Z", "{}", "1e400", "true")
NOT_WORD = ("1", "true", '"AdamW"', '"none "', '"\\u0000"', "[]", '["none"]', '"float8"', '"\\u001b[2J"', '"x\\ny"')
NOT_TEXT = ("5", "1.5", "true", '["a"]', "[]", "07:32:00", '"a\\u0000b"', "{}")
NOT_SWITCH = ('"maybe"', "5", "[]", "nan", "[true]", "1.5")
WRONG = {"whole": NOT_WHOLE, "real": NOT_REAL, "word": NOT_WORD, "text": NOT_TEXT, "switch": NOT_SWITCH}


def _sound(model: Path) -> list[str]:
    return [f'model = "{model}"', 'data = "in/rows.csv"', "seed = 3", 'dtype = "float32"', "batch_size = 4"]


def _wrong(rng: random.Random) -> tuple[str, str]:
    """A key and a value that it does not take."""
    kind = rng.choice(list(WRONG))
    key = rng.choice({"whole": WHOLE, "real": REAL, "word": WORDS, "text": TEXTS, "switch": SWITCHES}[kind])
    value = rng.choice(WRONG[kind])
    if key == "seed" and value in ("-1", "1.5"):
        value = '"x"'
    if key in ("warmup", "weight_decay", "test_fraction") and value == "true":
        value = '"x"'
    return key, value


def make_recipe(rng: random.Random, folder: Path, good: Any) -> Case:
    """A recipe with one thing wrong, for one of the verbs that read it."""
    tiny.write(folder / "in" / "rows.csv", tiny.reviews(20))
    lines, how = _sound(good.model), rng.randrange(12)
    path, at = folder / "in" / "recipe.toml", rng.randrange(3, len(lines))
    must: bool | None = True
    where, kind = f"recipe.toml:{at + 1}", "a wrong value"
    if how < 4:
        key, value = _wrong(rng)
        lines = [line for line in lines if not line.startswith(f"{key} =")]
        at = min(at, len(lines))
        lines.insert(at, f"{key} = {value}")
        where = f"recipe.toml:{at + 1}"
    elif how == 4:
        kind = "an unknown key"
        lines.insert(
            at,
            rng.choice(["stepz = 5", "Steps = 5", '"" = 1', '"a b" = 2', "options = 3", "r = 8", f"{'k' * 9000} = 1"]),
        )
    elif how == 5:
        kind = "an unknown table"
        lines += rng.choice(
            [["[loraa]", "r = 8"], ["[model]", "a = 1"], ["[a.b.c]", "d = 1"], ["[[lora]]", "r = 1"], ["[options]"]]
        )
        where = "recipe.toml:6"
    elif how == 6:
        kind = "a wrong option"
        name, value = rng.choice(list(OPTIONS)), rng.choice(['"8"', "nan", "[1]", "{}", "-inf", "1979-05-27", "[[]]"])
        option = rng.choice(OPTIONS[name])
        if value == '"8"' and option in ("target_modules", "feedforward_modules", "prompt_tuning_init_text"):
            value = "8.5"
        lines += [f"[{name}]", f"{option} = {value}"]
        where = "recipe.toml:7"
    elif how == 7:
        kind = "an unknown option"
        lines += [
            f"[{rng.choice(list(OPTIONS))}]",
            rng.choice(["rr = 8", "init_ids = [1]", "'' = 1", "peft_type = 'X'"]),
        ]
        where = "recipe.toml:7"
    elif how == 8:
        kind = "no TOML"
        depth = rng.choice([1000, 20_000])
        broken = ["steps 5", "steps = ", "= 5", "steps = 5 5", 'a = "x', "[lora", "seed = 1\nseed = 2", "x = " + "[" * depth, "\x00",
                  "x = " + "9" * 5000, "x = " + "{a=" * depth, ".".join("a" * depth) + " = 1"]  # fmt: skip
        lines.insert(at, rng.choice(broken))
        where = "recipe.toml"
    elif how == 9:
        kind = "no UTF-8"
        write(path, "\n".join(lines).encode() + rng.choice([b"\n# \xff", b"\nx = '\xe9'"]))
        lines, where = [], "recipe.toml"
    elif how == 10:
        kind, must, where = "bytes flipped", None, ""
        write(path, mutated(rng, "\n".join([*lines, "[lora]", "r = 4", "lora_alpha = 8.0"]).encode()))
        lines = []
    else:
        kind, must, where = "sound", False, ""
    if lines:
        write(path, "\n".join(lines) + "\n")
    return Case(kind, ["train", "--recipe", "in/recipe.toml", "--out", "out/run"], must, where)


WORDS_FOR_ANYTHING = (
    "", " ", "-1", "0", "8", "1e999", "nan", "x" * 5000, "../..", "/", ".", "~", "~nobody/x", "\udcff", "a\nb", "\x1b[2J", "{", "{}",
    "{text", "{label}", "{0}", "{text!r}", "none", "auto", "cuda:99", "meta", "cpu", "cpu:7", "mps", "xla", "99999999999999999999",
    "8GB", "nanGB", "-1GB", "1e400GB", "text", "label", "lora", "lora,ia3", ",", "None", "true", "[", "é", "😀", "%s%n", "float32",
    "in/rows.csv", "in/rows.csv/x", "/dev/null", "in", "\u2028",
)  # fmt: skip
SETTINGS = (
    "", "=", "r", "r=", "=8", "r=8", "lora.r=8", "r='8'", 'r="8"', "r=nan", "lora_alpha=nan", "lora_alpha=inf", "lora_alpha=0", "r=-1",
    "r=1e9", "r=99999999999999999999", "r=4\nx=5", "x.r=8", "lora..r=8", ".r=8", "r=[8]", "r={}", "r=" + "[" * 5000, "target_modules=[]",
    "target_modules=(", "target_modules=[[1]]", "target_modules=", "r=1979-05-27", "lora_dropout=1", "lora_dropout=nan", "rr=8",
    "target_modules=none", "modules_to_save=nope", "use_rslora=1", "r=\udcff", "r=" + "9" * 5000, "lora_alpha=" + "9" * 400,
    "r=4000000000", "target_modules=" + "(a+)+$", "lora.r=8.0", "ia3.target_modules=q_proj",
)  # fmt: skip
VERBS = {
    "train": TrainConfig, "compare": CompareConfig, "evaluate": EvaluateConfig, "plan": PlanConfig, "generate": GenerateConfig,
    "merge": MergeConfig,
}  # fmt: skip


def make_flags(rng: random.Random, folder: Path, good: Any) -> Case:
    """A command line that is sound but for a flag or two with any word at all."""
    tiny.write(folder / "in" / "rows.csv", tiny.reviews(20))
    verb = rng.choice([*VERBS, "evaluate", "train", "methods"])
    args = {"--model": str(good.model)}
    if verb in ("train", "compare", "evaluate"):
        args |= {"--data": "in/rows.csv"}
    if verb in ("train", "compare", "merge"):
        args |= {"--out": "out/run"}
    if verb == "merge":
        args |= {"--adapter": str(good.adapters["lora"])}
    more: list[str] = ["--no-isolate"] if verb == "compare" else []
    if verb == "methods" or (verb in ("train", "compare", "plan") and rng.random() < 0.5):
        setting = rng.choice(SETTINGS)
        more += ["--set", f"lora.{setting}" if verb != "train" and "." not in setting else setting]
    else:
        names = [
            n
            for n in VERBS[verb].model_fields
            if n not in ("options", "model", "calibrate", "resume", "out", "isolate")
        ]
        for name in rng.sample(names, rng.choice([1, 1, 2])):
            flag = "--" + name.replace("_", "-")
            args[flag] = rng.choice(WORDS_FOR_ANYTHING)
            if "bool" in str(VERBS[verb].model_fields[name].annotation):
                more.append(flag if rng.random() < 0.5 else f"{flag}={args[flag]}")
                del args[flag]
    line = [word for pair in args.items() for word in pair]
    return Case(f"{verb}, any word", [verb, *line, *more], None, codes=(1,) if verb == "plan" else ())
