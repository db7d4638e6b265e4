"""The gate: what is looked at before anything of a base is loaded.

A model's files can make a loader run code: a pickle when it is read, a configuration that names Python files (`auto_map`) or
compiled ones on a hub (attention and expert kernels), an index or an adapter beside the model that points to other files. Here these
files are read as what they must be — JSON, safetensors, GGUF — and refused, by name and field, where they ask for more.
What is said is the user's to mend, and nothing has been loaded or run by then.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError
from .network import ask_hub_if_it_is_there, check_hub_id

CONFIGS = (
    "config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
LONGEST_TABLE = 100_000_000
"""Bytes of the table that a safetensors file begins with, by its specification."""
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
EXPERTS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
PLAIN = {"eager", "sdpa", "flex_attention", "paged|eager", "paged|sdpa", "grouped_mm", "batched_mm"}
"""Implementations that are transformers' own code."""
PACKAGED = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
"""Those that are a package's; without it transformers looks on a hub."""
RUNS_CODE = ("auto_map", "custom_generate", "trust_remote_code", "allow_all_kernels", "use_kernels", "kernel_config")
ON_A_HUB = {"mxfp4", "fp8", "finegrained_fp8", "fbgemm_fp8", "eetq", "metal", "nvfp4", "deepgemm"}
"""Ways of quantising whose code transformers fetches from a hub, with the package `kernels`."""


def inspect(source: str) -> dict[str, Any]:
    """What to hand to every `from_pretrained` besides a base's folder or hub id.

    Raises `InputError` where the base's files ask for code, or for files elsewhere. On a hub, all that is loaded is of the revision
    that was looked at.
    """
    found: dict[str, Any] = {"trust_remote_code": False}  # unset, transformers asks on the terminal
    if not Path(source).is_dir():
        check_hub_id("model", source)
        ask_hub_if_it_is_there()
        found |= _revision(source)
    for file, content in _configs(source, found):
        _check_config(content, file)
    if _find(source, ADAPTER, found) is not None:
        raise InputError(
            f"model {source}: there is an adapter beside the model ({ADAPTER}), which would be loaded into it; remove it, or give the "
            f"model without it and the adapter as --adapter"
        )
    _check_weights(source, found)
    return found


def inspect_config(file: Path) -> None:
    """The same for a `config.json` alone."""
    _check_config(_read(file), str(file))


def check_gguf(file: Path) -> None:
    """Raise `InputError` where a `.gguf` file is something else."""
    with file.open("rb") as f:
        start = f.read(4)
    if start != b"GGUF":
        raise InputError(f"model: {file} is no GGUF file, whatever its name: {_kind(start)}")


def check_safetensors(file: Path) -> None:
    """Raise `InputError` where a `.safetensors` file is something else, or not whole: by its length and the table it begins with."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        table = f.read(length) if 8 + length <= size and length <= LONGEST_TABLE else b""
    try:
        told = json.loads(table)
        ends = [entry["data_offsets"][1] for name, entry in told.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise InputError(f"model: {file} is no safetensors file, whatever its name: {_kind(start)}") from None
    if whole != size:
        raise InputError(
            f"model: {file} is damaged: it has {size:,} bytes, and by its own table {whole:,}; fetch it again"
        )


def _kind(start: bytes) -> str:
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it looks like a pickle, which can run code and is not read"
    return "it is damaged, or of another format"


def _revision(hub_id: str) -> dict[str, str]:
    """The revision that a hub's configuration is of, as an argument; nothing where there is none: the loader says why."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    file = cached_file(hub_id, "config.json", **_QUIET)
    commit = extract_commit_hash(file, None) if file else None
    return {"revision": commit} if commit else {}


_QUIET: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def _find(source: str, name: str, found: dict[str, Any]) -> Path | None:
    """A file of a base, fetched if need be; None where there is none."""
    if (folder := Path(source)).is_dir():
        return folder / name if (folder / name).is_file() else None
    if "revision" not in found:
        return None
    from transformers.utils import cached_file

    file = cached_file(source, name, revision=found["revision"], **_QUIET)
    return Path(file) if file else None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"model: cannot read {file}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"model: {file} is not valid JSON: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"model: {file} does not hold an object")
    return content


def _configs(source: str, found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurations of a base with the words for where they are; those for other versions of transformers too."""
    names = list(CONFIGS)
    for name in names:
        if (file := _find(source, name, found)) is None:
            continue
        content = _read(file)
        if name == "config.json":
            names += [other for other in content.get("configuration_files") or () if isinstance(other, str)]
        yield f"{source}/{name}", content


def _fields(content: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every field of a configuration, however deep: its path, its name, its value."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield f"{path}{name}", name, value
            yield from _fields(value, f"{path}{name}.")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _fields(value, f"{path}{number}.")


def _check_config(content: dict[str, Any], file: str) -> None:
    for path, name, value in _fields(content):
        if name in RUNS_CODE and value:
            why = "names code that would be run"
        elif name in (*ATTENTION, *EXPERTS) and (foreign := _foreign(value)):
            why = f"names {foreign!r}, which is no code of transformers' own and would be fetched from a hub and run"
        elif name == "quant_method" and _fetches_kernels(value):
            why = f"is {value!r}, for which the package `kernels` would fetch code from a hub; without that package it loads"
        elif name == "transformers_weights" and not str(value).endswith((".safetensors", ".safetensors.index.json")):
            why = f"names {value!r}, which is no safetensors file"
        else:
            continue
        raise InputError(
            f"model: {file}: the field {path} {why}; no code that comes with a model is run here: choose a model that needs none"
            + (
                ""
                if name == "quant_method"
                else ", or remove the field from a copy of its folder, if transformers knows the model without it"
            )
        )


def _foreign(value: Any) -> str | None:
    """The first implementation that would be fetched; a value can be one name, or one for each part of the model."""
    if isinstance(value, dict):
        return next((f for v in value.values() if (f := _foreign(v))), None)
    if value is None or str(value) in PLAIN:
        return None
    package = PACKAGED.get(str(value).removeprefix("paged|"), "")
    try:
        here = bool(package) and importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        here = False
    return None if here else str(value)


def _fetches_kernels(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ON_A_HUB and importlib.util.find_spec("kernels") is not None


def _check_weights(source: str, found: dict[str, Any]) -> None:
    """Weights are safetensors, and where an index names them, inside the base's own folder."""
    folder, names = Path(source), [WEIGHTS]
    if (index := _find(source, INDEX, found)) is not None:
        shards = _read(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"model: {source}/{INDEX} is damaged: it has no `weight_map`")
        for shard in dict.fromkeys(map(str, shards.values())):
            _check_shard(shard, f"{source}/{INDEX}", folder if folder.is_dir() else None)
            names.append(shard)
    if folder.is_dir():  # what comes from a hub is read by the same strict reader when it is there
        for name in names:
            if (folder / name).is_file():
                check_safetensors(folder / name)


def _check_shard(shard: str, index: str, folder: Path | None) -> None:
    if not shard.endswith(".safetensors"):
        raise InputError(
            f"model: {index}: it names {shard!r}, which is no safetensors file; pickled files can run code"
        )
    parts = shard.replace("\\", "/").split("/")
    inside = ".." not in parts and ":" not in shard and parts[0] != ""
    if inside and folder is not None and (folder / shard).exists():
        inside = (folder / shard).resolve().is_relative_to(_home(folder))
    if not inside:
        raise InputError(
            f"model: {index}: it names {shard!r}, which is outside the model's folder; copy the file into it"
        )


def _home(folder: Path) -> Path:
    """Where a base's files may be: its folder; for one in a hub's cache, whose files are links, its repository there."""
    folder = folder.resolve()
    repository = folder.parent.parent
    in_a_cache = folder.parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if in_a_cache else folder
