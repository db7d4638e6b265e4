"""Help for whoever is new or mistypes: settings in groups, other tools' names, near names of files, what would fit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

import tiny
from command import Cli, complaint
from featherweight import cli, foreign, groups, synonyms
from featherweight.config import VERBS, Config, TrainConfig
from featherweight.methods import METHODS, method_class

COMMANDS: dict[str, Any] = vars(typer.main.get_command(cli.app))["commands"]


# --- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_flag_of_every_verb_is_in_a_group_and_groups_come_in_one_order(verb: str) -> None:
    flags = [param for param in COMMANDS[verb].params if param.param_type_name == "option"]
    places = [groups.GROUPS.index(flag.rich_help_panel) for flag in flags]
    assert places
    assert places == sorted(places)


def test_a_setting_is_in_the_group_of_its_declaration() -> None:
    class Odd(Config):
        feathers: int = groups.in_answers(3, gt=0, description="How many.")

    flag = cli._flag("feathers", Odd.model_fields["feathers"])
    [option] = flag.annotation.__metadata__
    assert option.rich_help_panel == groups.ANSWERS
    assert Odd(feathers=2).feathers == 2
    with pytest.raises(ValueError, match="greater than 0"):
        Odd(feathers=0)


def test_the_help_shows_the_groups_as_headings(fw_cli: Cli) -> None:
    told = fw_cli("train", "--help").out
    at = [told.index(f"─ {group} ─") for group in groups.GROUPS if group != groups.ANSWERS]
    assert at == sorted(at)
    assert groups.ANSWERS in fw_cli("generate", "--help").out
    assert at[0] < told.index("│ --model") < at[1]


def test_no_group_is_empty() -> None:
    used = {groups.group_of(field) for kind in VERBS for name, field in kind.model_fields.items() if name != "options"}
    assert used | {groups.RECIPE} == {*groups.GROUPS}


# --- other tools' names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("train --learning-rate 1e-3", "No such option: --learning-rate; did you mean --lr?"),
        ("train --learning_rate=1e-3", "did you mean --lr?"),
        ("train --lora-r 4", "did you mean --set lora.r=VALUE?"),
        ("compare --rank 4", "did you mean --set lora.r=VALUE?"),
        ("train --lora_alpha 4", "did you mean --set lora.lora_alpha=VALUE?"),
        ("train --num_train_epochs 2", "did you mean --epochs?"),
        ("plan --per-device-train-batch-size 2", "did you mean --batch-size?"),
        ("train --gradient-accumulation-steps 2", "did you mean --accumulate?"),
        ("train --load-in-4bit", "did you mean --quantize nf4?"),
        ("generate --load_in_8bit", "did you mean --quantize int8?"),
        ("train --bf16", "did you mean --dtype bfloat16?"),
        ("train --gradient-checkpointing", "did you mean --checkpoint-activations layer?"),
        ("evaluate --model-name-or-path x", "did you mean --model?"),
        ("generate --max-tokens 3", "did you mean --max-new-tokens?"),
    ],
)
def test_another_tools_flag_gets_ours(fw_cli: Cli, line: str, wanted: str) -> None:
    assert complaint(fw_cli(*line.split())).endswith(wanted)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("merge --load-in-4bit", "No such option: --load-in-4bit"),
        ("evaluate --learning-rate 1", "No such option: --learning-rate"),
        ("train --push-to-hub", "No such option: --push-to-hub"),
        ("train --batchsize 3", "No such option: --batchsize (Possible options: --batch-size, --quantize)"),
    ],
)
def test_what_the_verb_has_no_equivalent_of_gets_the_parsers_own_words(fw_cli: Cli, line: str, said: str) -> None:
    assert complaint(fw_cli(*line.split())) == said


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("steps = 3\nlearning-rate = 0.1", "r.toml:2: 'learning_rate' is not a setting here; did you mean lr?"),
        ("load_in_4bit = true", 'did you mean quantize = "nf4"?'),
        ("lora_rank = 8", "did you mean r in the table [lora]?"),
        ("[lora]\nrank = 8", "r.toml:2: lora has no option 'rank'; did you mean 'r'?"),
    ],
)
def test_another_tools_key_in_a_recipe_gets_ours(fw_cli: Cli, in_tmp: Path, recipe: str, wanted: str) -> None:
    (in_tmp / "r.toml").write_text(recipe)
    assert complaint(fw_cli("train", "--recipe", "r.toml")).endswith(wanted)


def test_every_name_of_ours_in_the_table_exists_and_every_value_is_taken() -> None:
    settings = {name for kind in VERBS for name in kind.model_fields}
    for theirs, ours in synonyms._NAMES.items():
        assert theirs not in settings
        method, dot, rest = ours.rpartition(".")
        name, equals, value = rest.partition("=")
        if dot:
            assert name in {field.name for field in dataclasses.fields(method_class(method))}
        else:
            assert name in settings
        if equals:
            TrainConfig(**{name: value})
    assert all(synonyms.as_option(theirs, name) != theirs for theirs in synonyms._NAMES for name in METHODS)


# --- near names -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("train --data tickts.csv", "data: there is no file tickts.csv; did you mean 'tickets.csv'?"),
        ("train --data TICKET.tsv", "did you mean 'tickets.csv'?"),
        ("train --data tickets", "did you mean 'tickets.csv'?"),
        ("train --data sub/nott.csv", "did you mean 'sub/notes.csv'?"),
        ("train --data movie-review", "did you mean 'movie-reviews'?"),
        ("evaluate --data notes.csv", "there is no file notes.csv"),
        ("evaluate --adapter my-adaptr", "adapter: there is no folder my-adaptr; did you mean 'my-adapter'?"),
        ("generate --prompt x --adapter ticket.csv", "adapter: there is no folder ticket.csv"),
        ("train --recipe quik.toml", "--recipe quik.toml: No such file or directory; did you mean 'quick.toml'?"),
        ("train --resume my-adaptr", "did you mean 'my-adapter'?"),
        ("report my-adaptr", "did you mean 'my-adapter'?"),
        ("plan --model smollm2-135m", "could not be loaded; did you mean 'smollm2-135m-instruct'?"),
        ("plan --model my-adaptr", "could not be loaded; did you mean 'my-adapter'?"),
        ("plan --model ./my-adaptr", "letters, digits and -_.; did you mean 'my-adapter'?"),
        ("plan --model ./shape.json", "there is no file ./shape.json; did you mean 'shapes.json'?"),
        ("train --data tickets.csv --text-column tekst", "did you mean 'text'?; its columns are: text, label"),
        ("train --data tickets.csv --method lorra", "unknown method 'lorra'; did you mean 'lora' or 'adalora'?"),
        ("train --data tickets.csv --method Prefix-Tuning", "did you mean 'prefix_tuning'"),
    ],
)
def test_a_near_name_is_named(fw_cli: Cli, in_tmp: Path, line: str, wanted: str) -> None:
    for folder in ("my-adapter", "sub"):
        (in_tmp / folder).mkdir()
    for file in ("sub/notes.csv", "quick.toml", "shapes.json"):
        (in_tmp / file).touch()
    tiny.write(in_tmp / "tickets.csv", tiny.reviews())
    said = complaint(fw_cli(*line.split()))
    assert wanted in said
    assert wanted.endswith("?") or "did you mean" in wanted or "did you mean" not in said


def test_of_a_crowded_folder_only_the_first_entries_are_looked_at(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "tickets.csv").touch()
    assert foreign.similar("ticket.csv") == "; did you mean 'tickets.csv'?"
    monkeypatch.setattr(foreign, "MOST_ENTRIES", 0)
    assert foreign.similar("ticket.csv") == ""


@pytest.mark.parametrize("name", ["", ".", "..", "/", "nowhere/at/all.csv", "~nobody/x", "x" * 200])
def test_what_has_no_neighbour_gets_no_hint(in_tmp: Path, name: str) -> None:
    (in_tmp / "tickets.csv").touch()
    assert foreign.similar(name) == ""


# --- without a network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "wanted"),
    [([], "no more than its config.json is read"), (["--data", "rows.csv"], "its config.json and tokenizer is read")],
)
def test_a_plan_that_cannot_fetch_a_model_says_how_little_of_it_is_needed(
    fw_cli: Cli, in_tmp: Path, llama: Path, more: list[str], wanted: str
) -> None:
    said = complaint(fw_cli("plan", "--model", "nobody/nothing", "--offline", *more))
    assert wanted in said
    assert said.endswith("a folder that holds that will do")
    (in_tmp / "there").mkdir()
    tiny.write(in_tmp / "rows.csv", tiny.reviews())
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json") if more else ("config.json",):
        shutil.copy(llama / file, in_tmp / "there")
    done = fw_cli("plan", "--model", "there", "--memory", "8GB", "--length", "16", *more)
    assert done.code == 0, done.err
