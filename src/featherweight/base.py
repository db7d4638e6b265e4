"""Where a base model comes from, and how it is placed.

A base is named by a hub id, a folder as `save_pretrained` writes it, a `.gguf` file, or the name of the embedded
default or encoder. Only safetensors and GGUF are read: pickled weights can run code, so they are refused.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from . import demo
from .adapter import attached, living
from .encoder import fresh_modules, is_encoder, own_labels, with_labels
from .engine.memory import handing_back
from .errors import InputError
from .foreign import similar
from .gate import check_gguf, inspect, inspect_config
from .pages import drop_files_of
from .quant import dense_shape, is_quantised, make_dependable
from .quantise import quantising, refuse_quantising, stored_kind
from .sites import is_classifier
from .stream import check_source, start
from .vocabulary import check_offloading, keep_on_host

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """A loaded base model with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    fresh: tuple[str, ...] = ()
    """Modules of an encoder's head that the checkpoint lacks: they start random, and every adapter must train them."""

    @property
    def classifies(self) -> bool:
        """Whether it answers with a class of its own head, not with words."""
        return is_classifier(self.model)

    @property
    def labels(self) -> list[str]:
        """The classes of its head, row by row; empty for a model that writes."""
        return own_labels(self.model.config) if self.classifies else []

    @property
    def random(self) -> list[str]:
        """The `fresh` modules that no live adapter has trained (by the rule of `modules_to_save`), nor one that was merged for
        good: while there are any, answers mean nothing."""
        merged = self.model.__dict__.get("_trained_whole", [])
        own = [n for name in living(self.model) for n in attached(self.model)[name].modules_to_save or ()]
        return [n for n in self.fresh if not n.endswith((*own, *merged))]

    @property
    def encoder_decoder(self) -> bool:
        """Whether it reads with an encoder and writes with a decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def context(self) -> int:
        """The longest row it can read, in tokens."""
        config = self.model.config
        config = config if config.is_encoder_decoder else config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if self.classifies:  # RoBERTa and its kin count positions from behind the padding's
            for path, module in self.model.named_modules():
                if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                    limit = module.num_embeddings - module.padding_idx - 1
        return int(limit or 1_000_000)  # T5 has relative positions: no limit


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {name!r} is not available here: {str(e).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: on a CPU bfloat16 unless float32 is clearly faster, measured (some emulate bfloat16); elsewhere bfloat16 if it has it."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"dtype {name!r} is unknown; there are: auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _computes_in_bfloat16() else torch.float32


@functools.cache  # once: every load in a process gets the same type, however busy the machine is
def _computes_in_bfloat16() -> bool:
    """Whether this CPU has instructions for it. It needs half the memory, so float32 must be clearly faster to be chosen."""
    return _matmul_seconds(torch.bfloat16) < 1.5 * _matmul_seconds(torch.float32)


def _matmul_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What to hand to `from_pretrained` for a model's name: a hub id or folder, and a GGUF file's name."""
    if name == demo.MODEL:
        return str(demo.model_folder(_unpack)), {}
    if name == demo.ENCODER:
        return str(demo.encoder_folder()), {}
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model: there is no file {name}{similar(name, folder=False)}")
        check_gguf(path)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = (
                "it is an adapter: pass it as --adapter"
                if (path / "adapter_config.json").is_file()
                else "is it a model?"
            )
            raise InputError(f"model: the folder {name} has no config.json; {hint}")
        return str(path), {}
    if path.exists():
        raise InputError(f"model: {name} is neither a folder nor a .gguf file")
    return name, {}


def _inspected(name: str, needs: str | None = None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """`_source`, and what the gate says to hand over besides."""
    source, packed = _source(name)
    try:
        return source, packed, inspect(source)
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise _explain(name, e, needs) from None


def _explain(name: str, error: Exception, needs: str | None = None) -> InputError:
    """What another library's error means; `needs` says what of the model would do, where that is not all of it."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "safetensors" in str(error):
        return InputError(
            f"model {name!r}: its weights are not in safetensors (pickled files can run code, so they are not read): {first}"
        )
    hint = "" if Path(name).expanduser().exists() else similar(name, (demo.MODEL, demo.ENCODER), folder=True)
    wanted = f"of the model no more than {needs} is read here" if needs else "give a hub id, a folder or a .gguf file"
    advice = f"{wanted}; without a network, or with --offline, " + (
        "a folder that holds that will do" if needs else "only folders, files and models in the cache work"
    )
    return InputError(f"model {name!r} could not be loaded{hint or ':'} {first} — {advice}")


def load_config(name: str, needs: str | None = None) -> Any:
    """A model's configuration, without its weights: from a name, or from a `config.json` itself.

    `needs`: what of the model whoever asks will use, in words for the error, where that is less than the whole.
    """
    from transformers import AutoConfig

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise InputError(f"model: there is no file {name}{similar(name, folder=False)}")
        inspect_config(Path(name))
        source, extra = name, {"trust_remote_code": False}
    else:
        source, packed, found = _inspected(name, needs)
        extra = packed | found
    try:
        return AutoConfig.from_pretrained(source, **extra)
    except (OSError, ValueError, KeyError) as e:
        raise _explain(name, e, needs) from None


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer alone, as `load_base` gives it."""
    source, packed, found = _inspected(name)
    try:
        return _tokenizer(source, packed | found)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise _explain(name, e) from None


def _tokenizer(source: str, extra: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    if is_encoder(config):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def skeleton(config: Any, labels: Sequence[str] | None = None) -> nn.Module:
    """The model without weights, for counting: every tensor is on the meta device. An encoder needs its task's labels.

    transformers 5 ties mT5's head to its embeddings whatever the configuration says, yet mT5 and mt0 were trained with
    a head of their own; mT5's is therefore given one here, as `load_base` finds it in the checkpoint.
    """
    config = with_labels(config, labels) if is_encoder(config) else copy.deepcopy(config)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    if config.model_type in ("mt5", "umt5"):
        _untie(model, torch.empty_like(model.lm_head.weight))
    return model


def _untie(model: Any, head: torch.Tensor) -> None:
    model.get_output_embeddings().weight = nn.Parameter(head, requires_grad=False)
    model.config.tie_word_embeddings = False


def _restore_untied_head(model: Any, source: str, revision: str | None) -> None:
    """Give back a checkpoint's own head where transformers has tied it away (mT5, mt0, T5 1.1)."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight or not model.config.is_encoder_decoder:
        return
    there: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(source, "model.safetensors", **there)
    if file is None:
        index = cached_file(source, "model.safetensors.index.json", **there)
        shard = json.loads(Path(index).read_text())["weight_map"].get("lm_head.weight") if index else None
        file = cached_file(source, shard, **there) if shard else None
    if file is None:
        return
    with safe_open(file, "pt") as tensors:
        if "lm_head.weight" in tensors.keys():  # noqa: SIM118 (not a dict)
            own = tensors.get_tensor("lm_head.weight").to(head.weight)
            if not torch.equal(own, embeddings.weight):
                _untie(model, own)


def load_base(
    name: str = demo.MODEL,
    labels: Sequence[str] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "none",
    stream_base: Literal["none", "ram", "disk"] = "none",
    offload_vocabulary: bool = False,
) -> Base:
    """Load a base model and its tokenizer: frozen use in mind, no cache while training, evaluation mode.

    `labels` are those of the task, which an encoder needs for its head; other models do not look at them. `quantize` is
    `none`, `nf4` or `int8`, see `quantise.py`; what is stored quantised already is loaded as it is. `stream_base` brings the
    layers' weights in from there while the model runs (see `stream.py`): they stay frozen for good. `offload_vocabulary` has the
    embeddings and the head stay on the host (see `vocabulary.py`); so do they.
    """
    from transformers.utils import logging

    place = pick_device(device)
    check_source(stream_base, place)
    if offload_vocabulary:
        check_offloading(place)
    kind = pick_dtype(dtype, place)
    source, packed, found = _inspected(name)
    config = load_config(name)
    refuse_quantising(config, quantize)
    if packed and quantize != "none":  # transformers quantises safetensors only
        source, packed, found = _inspected(str(demo.unpacked_folder(Path(source, packed["gguf_file"]), _unpack)))
    extra = packed | found
    if encoder := is_encoder(config):
        extra |= {"config": with_labels(config, labels), "ignore_mismatched_sizes": True}
    if quantize != "none" and stored_kind(config) is None:
        extra |= quantising(quantize, kind, place, skeleton(config, labels))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = _tokenizer(source, packed | found)
        if packed:
            extra |= _dequantised()
        with torch.random.fork_rng(devices=[]), handing_back() if quantize != "none" else nullcontext():
            torch.manual_seed(0)  # what a checkpoint lacks starts the same in every load
            model, loading = _auto_class(config).from_pretrained(
                source, dtype=kind, use_safetensors=None if packed else True, output_loading_info=True, **extra
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as e:
        raise _explain(name, e) from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    fresh: tuple[str, ...] = ()
    missing = sorted(loading["missing_keys"])
    if encoder:
        fresh, missing = fresh_modules(model, {*missing, *(key for key, *_ in loading["mismatched_keys"])})
    if missing:
        raise InputError(
            f"model {name!r}: its file lacks {missing[0]} ({len(missing)} tensors in all), which would stay random; "
            f"is it a {'model that reads text' if encoder else 'language model that writes text'} ({type(model).__name__})?"
        )
    if not encoder:
        _restore_untied_head(model, source, found.get("revision"))
    make_dependable(model)  # before anything is evaluated
    if quantize != "none":
        drop_files_of(model.parameters())
    if packed:  # it is dense now, but would still claim to be quantised and refuse to be saved
        model.hf_quantizer = None
        with suppress(AttributeError):
            del model.config.quantization_config
    # For short rows on a CPU plain matrix products are faster than the fused kernel (benchmarks/attention.py).
    if place.type == "cpu":
        with suppress(ValueError, KeyError):
            model.set_attn_implementation("eager")
    if not encoder:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if offload_vocabulary:
        keep_on_host(model, place)
    if stream_base != "none":
        start(model.eval().requires_grad_(False), place, stream_base)
        return Base(model, tokenizer, name, place, fresh)
    return Base(model.eval().to(place), tokenizer, name, place, fresh)


def save_base(base: Base, folder: Path) -> None:
    """Write a model and its tokenizer as a folder of transformers. Raises `InputError` where it cannot be written."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    except (OSError, ValueError) as e:
        raise InputError(f"cannot write the model to {folder}: {str(e).splitlines()[0]}") from None
    finally:
        logging.enable_progress_bar()


def _unpack(gguf: Path, folder: Path) -> None:
    """Unpack GGUF to bfloat16 safetensors, so that later loads take a second and other tools can read it."""
    loaded = load_base(str(gguf), dtype="bfloat16", device="cpu")
    save_base(loaded, folder)


def _dequantised() -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed unless told; their kernels have no fast backward pass."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@torch.no_grad()
def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Tells one base from another: `names-values`, hashes of names and shapes and of a sample of every frozen tensor.

    `without` are paths of modules that an adapter replaces whole: what is under them is no matter.

    Values are rounded to bfloat16 first, so that a base has the same fingerprint in float32 and bfloat16. float16 rounds
    differently, and so does every way of quantising: their values are left out, as `names-float16` or `names-quantised`,
    with the shapes that the weights had. So an adapter trained on a quantised base loads on the base itself.
    """
    names, values = hashlib.sha256(), hashlib.sha256()
    left_out = ""
    for name, p in model.named_parameters():
        if ".parts." in f".{name}" or any(name.startswith(f"{path}.") for path in without):
            continue
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_quantised(module := model.get_submodule(layer)):
            names.update(f"{name}{tuple(dense_shape(module))}".encode())
            left_out = "quantised"
            continue
        names.update(f"{name}{tuple(p.shape)}".encode())
        left_out = left_out or ("float16" if p.dtype == torch.float16 else "")
        if p.is_floating_point() and not p.is_meta:
            sample = p.flatten()[:: max(1, p.numel() // 64)][:64].to(torch.bfloat16).view(torch.int16)
            values.update(sample.cpu().numpy().tobytes())
    return f"{names.hexdigest()[:8]}-{left_out or values.hexdigest()[:8]}"


_UNTOLD = {"float16", "quantised"}


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of the same base."""
    (names, values), (other_names, other_values) = one.split("-"), other.split("-")
    return names == other_names and (values == other_values or not {values, other_values}.isdisjoint(_UNTOLD))
