"""Help for whoever is new or mistypes: settings in groups, other tools' names, near names of files, what would fit."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from command import Cli
from featherweight import cli, groups
from featherweight.config import VERBS, Config

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
