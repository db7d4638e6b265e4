"""The files of an adapter folder, before anything in them is believed.

    adapter_config.json          the method's hyper-parameters, as HF PEFT spells them
    adapter_model.safetensors    its tensors under HF PEFT's names
    featherweight.json           ours, ignored by HF PEFT: the base's fingerprint, the task's template and labels

A folder may come from anyone. So each file is a file and lies in the folder (or in its repository of the hub's cache, which keeps
files as links), is not longer than such files are, and says what its kind says, in the types that it says it in. Only safetensors
are read: a pickled file can run code, so it is refused whatever its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError, shown
from .foreign import LONGEST_FILE, read_json
from .rows import pieces

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "featherweight.json"
LONGEST_NAME = 1000
"""Characters of the name of a model."""
_PICKLED = (".bin", ".pt", ".pth", ".pkl")


def file_of(folder: Path, name: str) -> Path | None:
    """The path of a file of an adapter; None where there is none. Raises `InputError` for a link that leads out of the folder."""
    path = folder / name
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(_root(folder)):
            raise InputError(
                f"adapter: {path} is a link out of its folder and is not followed; put the file itself there"
            )
        if path.is_file():
            return path
    except (OSError, RuntimeError) as e:  # a loop of links
        raise InputError(
            f"adapter: {path} cannot be read: {getattr(e, 'strerror', None) or 'its link leads to itself'}"
        ) from None
    if os.path.lexists(path):
        raise InputError(f"adapter: {path} is no file; put the file itself there")
    return None


def _root(folder: Path) -> Path:
    """Where an adapter's files may be: its folder, or all of its repository in the hub's cache."""
    real = folder.resolve()
    within = (p.parent for p in real.parents if p.name == "snapshots" and p.parent.name.startswith("models--"))
    return next(within, real)


def json_of(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of an adapter; None where there is none."""
    if (path := file_of(folder, name)) is None:
        return None
    try:
        content = read_json(path)
    except OSError as e:
        raise InputError(f"adapter: {path} cannot be read: {e.strerror or e}") from None
    except ValueError as e:
        raise InputError(f"adapter: {path} is not valid JSON: {e}; download or save the adapter anew") from None
    if not isinstance(content, dict):
        raise InputError(f"adapter: {path} does not hold an object; download or save the adapter anew")
    return content


def sha256_of(path: Path) -> str:
    """The check sum of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sum_of(about: dict[str, Any]) -> str:
    """The check sum of `featherweight.json` itself: of what it says, the sums left out."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read_about(folder: str | Path) -> dict[str, Any]:
    """What `featherweight.json` says of an adapter; empty for one that another tool made.

    Raises `InputError` where a file of the folder is not what was saved: a flipped bit may change every output and break
    nothing.
    """
    folder = Path(folder)
    if (about := json_of(folder, OURS)) is None:
        return {}
    sums: dict[str, str] | None = about.pop("sha256", {})
    if sums is not None and not isinstance(sums, dict):
        raise InputError(f"adapter: {folder / OURS} is damaged: its `sha256` holds no check sums")
    try:
        found = {file: sha256_of(path) for file in (WEIGHTS, CONFIG) if (path := file_of(folder, file))}
    except OSError as e:
        raise InputError(f"adapter: cannot read {folder}: {e.strerror or e}") from None
    for file, content in {**found, OURS: sum_of(about)}.items():
        if sums is not None and sums.get(file) != content:
            raise InputError(
                f"adapter: {folder / file} is damaged: it is not what was saved (its SHA-256 is another); "
                f'if you changed it on purpose, write `"sha256": null` in {OURS}'
            )
    for key, (fits, wanted) in _TOLD.items():
        if about.get(key) is not None and not fits(about[key]):
            raise InputError(f"adapter: {folder / OURS}: {key} must be {wanted}, not {shown(about[key])}")
    return about


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def is_name(value: Any) -> bool:
    """Whether a value can name a model or a data set."""
    return _is_text(value) and value.isprintable() and len(value) <= LONGEST_NAME


def _is_template(value: Any) -> bool:
    if not _is_text(value):
        return False
    try:
        columns, _ = pieces(value)
    except ValueError:
        return False
    return bool(columns)


def _are_labels(value: Any) -> bool:
    texts = isinstance(value, list) and all(_is_text(label) and label for label in value)
    return texts and len(set(value)) == len(value) != 1


def _are(**kinds: type | tuple[type, ...]) -> Callable[[Any], bool]:
    """Whether a value is an object that has only these keys, of these types."""
    return lambda value: (
        isinstance(value, dict)
        and all(key in kinds and isinstance(v, kinds[key]) and not isinstance(v, bool) for key, v in value.items())
    )


_TOLD: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda v: v in ("classification", "instructions"), "classification or instructions"),
    "template": (_is_template, "a text with columns in braces"),
    "labels": (_are_labels, "a list of different texts"),
    "columns": (
        _are(text_column=str, label_column=str, prompt_column=str, response_column=str),
        "columns by their flag",
    ),
    "held_out": (_are(seed=int, test_fraction=(float, int), test_data=str), "seed and test_fraction, or test_data"),
    "base": (is_name, "the name of a model"),
    "data": (is_name, "the name of a data set"),
    "fingerprint": (lambda v: _is_text(v) and v.count("-") == 1 and all(v.split("-")), "two words with - between them"),
    "identity": (
        lambda v: (
            isinstance(v, dict) and all(_is_text(v.get(k, "")) for k in ("base", "tokenizer", "template", "data"))
        ),
        "an object of fingerprints and settings",
    ),
}
"""What must be true of what `featherweight.json` says, where it says it, and how that is put in words."""


def shapes_of(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an adapter's tensors, from its header: bounds and overlaps have been checked, and the types.

    Raises `InputError` for what is missing, pickled or damaged.
    """
    path = _weights_of(Path(folder))
    with _refused(path):
        with path.open("rb") as f:
            start = f.read(8)
        if len(start) == 8 and struct.unpack("<Q", start)[0] > LONGEST_FILE:
            raise ValueError(f"it claims a header of more than {LONGEST_FILE // 2**20} MiB")
        with safe_open(path, "pt") as tensors:
            told = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            if other := next((name for name in told if told[name].get_dtype() not in _TYPES), None):
                raise ValueError(f"{shown(other)} is of the type {told[other].get_dtype()}, not of {', '.join(_TYPES)}")
            return {name: tuple(tensor.get_shape()) for name, tensor in told.items()}


def check_values(folder: str | Path) -> None:
    """Raise `InputError` where a tensor holds NaN or infinity. `shapes_of` has checked the header; a piece is read at a time."""
    path = _weights_of(Path(folder))
    with _refused(path), path.open("rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        for name, told in json.loads(f.read(size)).items():
            if name == "__metadata__":
                continue
            begin, end = told["data_offsets"]
            f.seek(8 + size + begin)
            for at in range(begin, end, _PIECE_BYTES):
                piece = bytearray(f.read(min(_PIECE_BYTES, end - at)))
                if not bool(torch.frombuffer(piece, dtype=_TYPES[told["dtype"]]).isfinite().all()):
                    raise ValueError(
                        f"{shown(name)} holds numbers that are NaN or infinite, so its answers would mean nothing"
                    )


_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_PIECE_BYTES = 2**24


def _weights_of(folder: Path) -> Path:
    if (path := file_of(folder, WEIGHTS)) is None:
        pickled = [p.name for p in folder.iterdir() if p.suffix in _PICKLED]
        hint = f"; {pickled[0]} is a pickled file, which can run code and is not read" if pickled else ""
        raise InputError(f"adapter: {folder} has no {WEIGHTS}{hint}")
    return path


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Inside, what goes wrong with reading the weights is one clear error."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as e:
        raise InputError(
            f"adapter: {path} is damaged or no safetensors file: {str(e)[:300]}; download or save the adapter anew"
        ) from None
