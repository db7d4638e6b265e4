"""Adapters on disk: HF PEFT's folder, both directions.

    adapter_config.json          the method's hyper-parameters, as HF PEFT spells them
    adapter_model.safetensors    its tensors under HF PEFT's names
    featherweight.json           ours, ignored by HF PEFT: the base's fingerprint, the task's template and labels

Only safetensors are read: a pickled file can run code, so it is refused whatever its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter import attach, attached, detach, facts, parts, remember
from .base import fingerprint, same_base
from .errors import InputError, nearest
from .merging import refuse_merged
from .method import Method, Part, Retrained
from .methods import METHODS, method_class
from .methods.options import typed
from .redaction import clean
from .sites import is_classifier, is_encoder_decoder, whole_names, whole_sites

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "featherweight.json"

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
    if base is not None and Path(base).expanduser().exists():
        base = str(Path(base).expanduser().resolve())  # else the adapter would lose its base from another folder
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
            sums = {file: _sha256((stage / file).read_bytes()) for file in (CONFIG, WEIGHTS)}
            _write_json(stage / OURS, ours | {"sha256": sums | {OURS: _sum_of(ours)}})
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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sum_of(about: dict[str, Any]) -> str:
    """The check sum of `featherweight.json` itself: of what it says, the sums left out."""
    return _sha256(json.dumps(about, sort_keys=True).encode())


def read_about(folder: str | Path) -> dict[str, Any]:
    """What `featherweight.json` says of an adapter; empty for one that another tool made.

    Raises `InputError` where a file of the folder is not what was saved: a flipped bit may change every output and break
    nothing.
    """
    folder = Path(folder)
    if not (folder / OURS).is_file():
        return {}
    about = _read_json(folder / OURS)
    sums: dict[str, str] | None = about.pop("sha256", {})
    if sums is not None and not isinstance(sums, dict):
        raise InputError(f"adapter: {folder / OURS} is damaged: its `sha256` holds no check sums")
    try:
        found = {file: _sha256((folder / file).read_bytes()) for file in (WEIGHTS, CONFIG) if (folder / file).is_file()}
    except OSError as e:
        raise InputError(f"adapter: cannot read {folder}: {e.strerror or e}") from None
    for file, content in {**found, OURS: _sum_of(about)}.items():
        if sums is not None and sums.get(file) != content:
            raise InputError(
                f"adapter: {folder / file} is damaged: it is not what was saved (its SHA-256 is another); "
                f'if you changed it on purpose, write `"sha256": null` in {OURS}'
            )
    return about


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from None
    except ValueError as e:
        raise InputError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold an object")
    return content


def read_method(folder: str | Path) -> Method:
    """The method of an adapter folder; refuses what it cannot honour, by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"adapter: there is no folder {folder}")
    if not (folder / CONFIG).is_file():
        raise InputError(f"adapter: {folder} has no {CONFIG}")
    config = _read_json(folder / CONFIG)
    classes = {method_class(name).peft_type: method_class(name) for name in METHODS}
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in classes:
        raise InputError(
            f"adapter: {folder / CONFIG}: peft_type {kind!r} is not known here; {nearest(str(kind), classes)}"
        )
    cls = classes[kind]
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("local")}
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise InputError(
            f"adapter: {folder / CONFIG}: init_lora_weights={config['init_lora_weights']!r} changes the base's weights, "
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
            f"adapter: {folder / CONFIG}: {beyond[0]}={config[beyond[0]]!r} is not supported, and leaving it out would "
            f"change the adapter's output"
        )
    place = f"adapter: {folder / CONFIG}"
    values = {k: typed(place, k, str(fields[k].type), v) for k, v in config.items() if k in fields and v is not None}
    return cls(**values)


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
    tensors = _read_weights(folder)
    placeholder: dict[str, Any] = {}
    if hasattr(method, "init_ids"):  # nothing to start from: the tensors are here
        placeholder["init_ids"] = (0,) * method.num_virtual_tokens  # type: ignore[attr-defined]
    attach(model, dataclasses.replace(method, **placeholder), name)
    try:
        _restore(model, name, method, tensors, folder)
    except Exception:
        detach(model, name)
        raise
    remember(model, name, **{k: v for k, v in about.items() if k != "fingerprint"})
    return attached(model)[name]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).is_file():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = f"; {pickled[0]} is a pickled file, which can run code and is not read" if pickled else ""
        raise InputError(f"adapter: {folder} has no {WEIGHTS}{hint}")
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as e:
        raise InputError(f"adapter: {folder / WEIGHTS} is damaged or no safetensors file: {e}") from None


def _restore(model: nn.Module, name: str, method: Method, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = {
        path: {key: (_key(method, path, part, key), t.shape) for key, t in part.saved().items()}
        for path, part in parts(model, name).items()
    }
    names = {disk: shape for part in expected.values() for disk, shape in part.values()}
    if missing := sorted(names.keys() - tensors.keys()):
        raise InputError(
            f"adapter: {folder} lacks the tensor {missing[0]} ({len(missing)} missing in all): is it for another base?"
        )
    if extra := sorted(tensors.keys() - names.keys()):
        raise InputError(
            f"adapter: {folder} has the unexpected tensor {extra[0]} ({len(extra)} in all): is it for another base?"
        )
    for disk, shape in names.items():
        if tensors[disk].shape != shape:
            raise InputError(
                f"adapter: {folder}: {disk} has the shape {tuple(tensors[disk].shape)}, this base needs {tuple(shape)}: "
                f"it was made for another base"
            )
    for path, part in parts(model, name).items():
        part.restore({key: tensors[disk].float() for key, (disk, _) in expected[path].items()})
