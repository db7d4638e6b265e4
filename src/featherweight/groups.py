"""The groups that settings are shown in: the headings of `--help` and of the handbook's reference, in this order.

A setting says its group where it is declared: `lr: float | None = in_training(None, gt=0, description=…)` is pydantic's `Field`,
and nothing else has to be told of a new setting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo

GROUPS = (
    "Model", "Data", "Method", "Training", "Measuring", "Answers", "Fitting into memory", "Running", "Output", "Recipe",
)  # fmt: skip
MODEL, DATA, METHOD, TRAINING, MEASURING, ANSWERS, MEMORY, RUNNING, OUTPUT, RECIPE = GROUPS


def _field_in(group: str) -> Callable[..., Any]:
    return partial(Field, json_schema_extra={"group": group})


in_model, in_data, in_method, in_training = map(_field_in, (MODEL, DATA, METHOD, TRAINING))
in_measuring, in_answers, in_memory, in_running, in_output = map(
    _field_in, (MEASURING, ANSWERS, MEMORY, RUNNING, OUTPUT)
)


def group_of(setting: FieldInfo) -> str:
    """The group that a setting was declared in."""
    extra = setting.json_schema_extra
    assert isinstance(extra, dict), "declare the setting with one of the functions in groups.py"
    return str(extra["group"])
