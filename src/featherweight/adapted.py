"""An adapter and the base it was trained on, loaded together: what every verb that uses a finished adapter begins with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapter_files import read_about, shapes_of
from .adapter_folder import check_fit, load, read_config, read_method
from .base import Base, load_base, load_config, skeleton
from .errors import InputError
from .identity import check_tokens


def told_by(folder: str | Path | None) -> dict[str, Any]:
    """What an adapter says of itself: its base, and, where it is ours, its task's template and labels. No folder says nothing."""
    if folder is None:
        return {}
    read_method(folder)
    about = {"base": read_config(folder).get("base_model_name_or_path"), **read_about(Path(folder))}
    shapes_of(Path(folder))
    return about


def load_adapted(
    folder: str | Path,
    *,
    model: str | None = None,
    labels: Sequence[str] | None = None,
    force: bool = False,
    **settings: Any,
) -> Base:
    """The base of an adapter that `save` or HF PEFT wrote, with the adapter on it, ready for `predict`, `generate` or `evaluate`.

    Which base it is, and the labels that an encoder's head needs, are read from the folder; `model` names another place of
    the same base. `settings` are those of `load_base`, such as `dtype` and `quantize`. Raises `InputError` for a folder that is no adapter
    or does not name its base, and, unless `force`, for a base or tokenizer other than the adapter was trained with; what can
    be seen from the configuration is refused before a weight is loaded.
    """
    about = told_by(folder)
    name = model or about.get("base")
    if name is None:
        raise InputError(f"adapter: {folder} does not say which base it is for; name it with model=")
    labels = labels or about.get("labels")
    check_fit(skeleton(load_config(name), labels), folder)
    base = load_base(name, labels, **settings)
    load(base.model, folder, force=force)
    check_tokens(base, about, force=force)
    return base
