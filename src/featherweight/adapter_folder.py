"""Adapters on disk: HF PEFT's folder, both directions. Which files there are, and what is checked of them, is in `adapter_files`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter import attach, attached, detach, facts, parts, remember
from .adapter_files import (
    CONFIG,
    OURS,
    WEIGHTS,
    check_values,
    is_name,
    json_of,
    read_about,
    sha256_of,
    shapes_of,
    sum_of,
)
from .base import fingerprint, same_base
from .errors import InputError, nearest, shown
from .foreign import path_of, similar
from .merging import refuse_merged
from .method import Method, Part, Retrained
from .methods import METHODS, method_class
from .methods.options import typed
from .redaction import clean
from .sites import is_classifier, is_encoder_decoder, whole_names, whole_sites

# Keys of HF PEFT's files that say where an adapter comes from or how it was initialised: they do not change its output.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "peft_type",
    "init_ia3_weights", "init_weights", "tokenizer_name_or_path", "tokenizer_kwargs",
    "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size",
    "encoder_dropout", "encoder_num_layers", "prefix_projection", "megatron_core", "qalora_group_size",
    "r",  # AdaLoRA inherits it from LoRA and never reads it
}  # fmt: skip


def save(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    base: str | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write adapter `name` to a folder that HF PEFT loads. Other files in the folder are left alone.

    `base` is the base model's hub id or path, for `adapter_config.json`; `about` is kept in `featherweight.json`. What
    `train` told of the adapter (its base, template, labels) is taken from there where it is not given.
    Raises `InputError` when the folder cannot be written.
    """
    if name not in attached(model):
        raise InputError(f"no adapter named {name!r}; attached: {', '.join(attached(model)) or 'none'}")
    refuse_merged(model, "save an adapter")  # its base's fingerprint would be that of the merged weights
    folder, method = Path(folder), attached(model)[name]
    about, base = clean({**facts(model, name), **(about or {})}), clean(base)
    base = base or about.get("base")
    if base is not None and path_of(base).exists():
        base = str(path_of(base).resolve())  # else the adapter would lose its base from another folder
    own = parts(model, name)
    tensors = {
        _key(method, path, part, key): tensor.detach().cpu().contiguous()
        for path, part in own.items()
        for key, tensor in part.saved().items()
    }
    whole = [path for path, part in own.items() if isinstance(part, Retrained)]
    ours = {**about, "base": base, "fingerprint": fingerprint(model, without=whole)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
            stage = Path(staging)
            save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
            _write_json(stage / CONFIG, _config(model, name, base))
            sums = {file: sha256_of(stage / file) for file in (CONFIG, WEIGHTS)}
            _write_json(stage / OURS, ours | {"sha256": sums | {OURS: sum_of(ours)}})
            for file in (WEIGHTS, OURS, CONFIG):  # all are written before the first is put in place
                (stage / file).replace(folder / file)
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write the adapter to {folder}: {getattr(e, 'strerror', None) or e}") from None
    return folder


def _key(method: Method, path: str, part: Part, name: str) -> str:
    """The on-disk name of a tensor. HF PEFT puts one wrapper less around the model for prompts than for layers."""
    if not isinstance(part, Retrained):
        return method.key(path, name)
    return f"base_model.{path}.{name}" if hasattr(method, "num_virtual_tokens") else f"base_model.model.{path}.{name}"


def _task_type(model: nn.Module) -> str:
    return "SEQ_CLS" if is_classifier(model) else "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(model: nn.Module, name: str, base: str | None) -> dict[str, Any]:
    method = attached(model)[name]
    config: dict[str, Any] = {
        "peft_type": method.peft_type,
        "task_type": _task_type(model),
        "base_model_name_or_path": base,
        "inference_mode": True,
        **method.config(model, parts(model, name)),
    }
    if "prompt_tuning_init" in config:
        # HF PEFT insists on a name for a prompt that started from text, though it never opens it to load one.
        config["tokenizer_name_or_path"] = base or getattr(model, "name_or_path", None) or "unknown"
    return config


def read_method(folder: str | Path) -> Method:
    """The method of an adapter folder; refuses what it cannot honour, by name."""
    config, place = read_config(folder), f"adapter: {Path(folder) / CONFIG}"
    classes = {method_class(name).peft_type: method_class(name) for name in METHODS}
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in classes:
        raise InputError(f"{place}: peft_type {shown(kind)} is not known here; {nearest(str(kind)[:99], classes)}")
    cls = classes[kind]
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("local")}
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise InputError(
            f"{place}: init_lora_weights={shown(config['init_lora_weights'])} changes the base's weights, "
            f"which is not supported; with HF PEFT, save it converted to plain LoRA first"
        )
    beyond = [
        k
        for k, v in config.items()
        if k not in fields
        and k not in {*_HARMLESS, "init_lora_weights"}
        and v not in (None, False, "none")
        and v != []
        and v != {}
    ]
    if beyond:
        raise InputError(
            f"{place}: {shown(beyond[0])[1:-1]}={shown(config[beyond[0]])} is not supported, and leaving it out would "
            f"change the adapter's output"
        )
    values = {k: typed(place, k, str(fields[k].type), v) for k, v in config.items() if k in fields and v is not None}
    try:
        return cls(**values)
    except InputError as e:
        raise InputError(f"{place}: {e}") from None


def read_config(folder: str | Path) -> dict[str, Any]:
    """`adapter_config.json`, as it is, but for the name of the base, which is a text. Raises `InputError` where there is none."""
    folder = Path(folder)
    if not path_of(str(folder)).is_dir():
        raise InputError(f"adapter: there is no folder {folder}{similar(str(folder), folder=True)}")
    if (config := json_of(folder, CONFIG)) is None:
        raise InputError(f"adapter: {folder} has no {CONFIG}")
    base = config.get("base_model_name_or_path")
    if base is not None and not is_name(base):
        raise InputError(
            f"adapter: {folder / CONFIG}: base_model_name_or_path must be the name of a model, not {shown(base)}"
        )
    return config


def check_fit(skeletal: nn.Module, folder: str | Path) -> None:
    """Raise `InputError` where an adapter is not one for this model, of which no weight has been loaded yet."""
    folder = Path(folder)
    method, found = read_method(folder), shapes_of(folder)
    try:
        with torch.device("meta"):  # however large it claims to be
            _attach_blank(skeletal, method, "default")
    except InputError as e:
        raise InputError(f"adapter: {folder / CONFIG}: {e}") from None
    try:
        with suppress(
            NotImplementedError
        ):  # AdaLoRA's shapes follow from values, which a skeleton has not; `load` checks them
            _check_shapes(_names(skeletal, "default", method), found, folder)
    finally:
        detach(skeletal)
    check_values(folder)


def load(model: nn.Module, folder: str | Path, name: str = "default", *, force: bool = False) -> Method:
    """Attach an adapter from a folder that `save` or HF PEFT wrote, and make it live; `force` even on another base of its shapes.

    Raises `InputError` for another base, missing, unexpected or misshapen tensors, a damaged or pickled file; the
    model is then as it was.
    """
    folder = Path(folder)
    refuse_merged(model, "load an adapter")  # the base would not be recognised
    about = read_about(folder) if folder.is_dir() else {}
    method = read_method(folder)
    whole = whole_sites(model, whole_names(model, method.modules_to_save))
    made_for, here = about.get("fingerprint"), fingerprint(model, without=whole)
    if made_for is not None and not same_base(made_for, here) and not force:
        wanted = about.get("base") or "an unnamed base"
        raise InputError(
            f"adapter: {folder} was made for another base: {wanted} (fingerprint {made_for}); this one has {here}; "
            f"forced (--force, force=True), its answers may mean nothing"
        )
    shapes_of(folder)  # checked before a byte of it is used
    check_values(folder)
    tensors = load_file(folder / WEIGHTS)
    _attach_blank(model, method, name)
    try:
        _restore(model, name, method, tensors, folder)
    except Exception:
        detach(model, name)
        raise
    remember(model, name, **{k: v for k, v in about.items() if k != "fingerprint"})
    return attached(model)[name]


def _attach_blank(model: nn.Module, method: Method, name: str) -> None:
    """Attach a method whose tensors are not needed: they come from a file."""
    placeholder: dict[str, Any] = {}
    if hasattr(method, "init_ids"):  # nothing to start from
        placeholder["init_ids"] = (0,) * method.num_virtual_tokens  # type: ignore[attr-defined]
    attach(model, dataclasses.replace(method, **placeholder), name)


def _names(model: nn.Module, name: str, method: Method) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """The tensors of an attached adapter: path → tensor's name → its name on disk and its shape."""
    return {
        path: {key: (_key(method, path, part, key), tuple(t.shape)) for key, t in part.saved().items()}
        for path, part in parts(model, name).items()
    }


def _check_shapes(
    expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]], found: dict[str, tuple[int, ...]], folder: Path
) -> None:
    names = {disk: shape for part in expected.values() for disk, shape in part.values()}
    file = folder / WEIGHTS
    if missing := sorted(names.keys() - found.keys()):
        raise InputError(
            f"adapter: {file} lacks the tensor {missing[0]} ({len(missing)} missing in all): is it for another base?"
        )
    if extra := sorted(found.keys() - names.keys()):
        raise InputError(
            f"adapter: {file} has the unexpected tensor {shown(extra[0])[1:-1]} ({len(extra)} in all): is it for another base?"
        )
    for disk, shape in names.items():
        if found[disk] != shape:
            raise InputError(
                f"adapter: {file}: {disk} has the shape {shown(found[disk])}, this base needs {shape}: it was made for another base"
            )


def _restore(model: nn.Module, name: str, method: Method, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = _names(model, name, method)
    _check_shapes(expected, {disk: tuple(t.shape) for disk, t in tensors.items()}, folder)
    for path, part in parts(model, name).items():
        part.restore({key: tensors[disk].float() for key, (disk, _) in expected[path].items()})
