"""Where parts go: `target_modules` → module paths.

`target_modules` is what HF PEFT takes: a list of names (a path matches when it ends in one of them, after a dot),
one string that is a regular expression for the whole path, or `"all-linear"`. Left out, the names that HF PEFT uses
for the architecture are taken. Prompt methods need no names: they sit on a stack (`stacks`).
"""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .calls import argument_names, cache_name
from .errors import InputError, nearest

_QV = ("q_proj", "v_proj")
# Per `config.model_type`: the modules that HF PEFT adapts by default, so that configurations and counts agree.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(
        ("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm",
         "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    "distilbert": ("q_lin", "v_lin"),  # not in HF PEFT's table
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj",),  # not in HF PEFT's table: Phi-3 fuses q, k and v
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "modernbert": ("Wqkv",),
    "codegen": ("qkv_proj",),
}  # fmt: skip
# (IA)³: (scaled outputs, scaled feed-forward inputs).
IA3_TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t5": (("k", "v"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (("c_attn",), ("mlp.c_proj",))),
    "bloom": (("query_key_value",), ("mlp.dense_4h_to_h",)),
    **dict.fromkeys(("bert", "roberta"), (("key", "value"), ("output.dense",))),
    "distilbert": (("k_lin", "v_lin"), ("ffn.lin2",)),  # not in HF PEFT's table
    "modernbert": (("Wqkv",), ("mlp.Wo",)),  # not in HF PEFT's table
    "opt": (("q_proj", "k_proj"), ("fc2",)),
    "gptj": (_QV, ("fc_out",)),
    **dict.fromkeys(("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), (("query_key_value",), ("dense_4h_to_h",))),
    "gpt_neo": (_QV, ("c_proj",)),
    **dict.fromkeys(("bart", "phi"), (_QV, ("fc2",))),
    "phi3": (("qkv_proj",), ("down_proj",)),  # not in HF PEFT's table
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj"), ("down_proj",))),
    "mixtral": (("k_proj", "v_proj"), ()),  # HF PEFT's w2 is no layer any more: experts are fused
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (_QV, ("down_proj",))),
    "deberta-v2": (("key_proj", "value_proj"), ("output.dense",)),
    "deberta": (("in_proj",), ("output.dense",)),
}  # fmt: skip

# AdaLoRA: where HF PEFT's names are not LoRA's.
ADALORA_TARGETS: dict[str, tuple[str, ...]] = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    **dict.fromkeys(("bart", "opt"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """A matrix multiplication with a weight: `nn.Linear` and its quantised kin, or GPT-2's transposed `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; `Conv1D` keeps its weight transposed."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def model_type(model: nn.Module) -> str:
    """The architecture's name in `config.model_type`, or an empty string."""
    return getattr(getattr(model, "config", None), "model_type", "")


def matches(path: str, target_modules: str | tuple[str, ...]) -> bool:
    """HF PEFT's rule: a string is a regular expression for the whole path, a list holds path endings."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    return any(path == t or path.endswith("." + t) for t in target_modules)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the base (not of attached parts) by path."""
    return {p: m for p, m in model.named_modules() if p and ".parts." not in f".{p}."}


def named(target_modules: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """A plain word is one name, not a regular expression for a whole path; `all-linear` stays what it is."""
    plain = isinstance(target_modules, str) and re.fullmatch(r"[\w.]+", target_modules)
    return (target_modules,) if plain else target_modules  # type: ignore[return-value]


def fused_experts(model: nn.Module) -> dict[str, str]:
    """Weights that hold all experts of a layer in one tensor, by their name: the path of the last such layer."""
    return {n.rsplit(".", 1)[-1]: n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.dim() == 3}


def spelled_out(model: Any, target_modules: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """`all-linear` by the layers' names where a model has fused experts: HF PEFT would take it to mean those too."""
    if target_modules != ALL_LINEAR or not fused_experts(model):
        return target_modules
    return tuple(sorted({p.rsplit(".", 1)[-1] for p in linear_sites(model, ALL_LINEAR)}))


def linear_sites(model: Any, target_modules: str | tuple[str, ...]) -> list[str]:
    """Paths of the linear layers that `target_modules` names. One error lists near misses and what exists."""
    base = _candidates(model)
    if target_modules == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [p for p, m in base.items() if is_linear(m) and m is not head]
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as e:
            raise InputError(f"target_modules={target_modules!r} is not a valid regular expression: {e}") from None
    found = [p for p in base if matches(p, target_modules)]
    leaves = {p.rsplit(".", 1)[-1] for p, m in base.items() if is_linear(m)}
    if isinstance(target_modules, tuple):
        missing = [t for t in target_modules if not any(matches(p, (t,)) for p in found)]
    else:
        missing = [] if found else [target_modules]
    fused = fused_experts(model) if missing else {}
    if missing and missing[0] in fused:
        raise InputError(
            f"target_modules: {missing[0]!r} is one fused tensor of all experts of {fused[missing[0]]}, and only linear "
            f"layers can be adapted; this model's are: {', '.join(sorted(leaves))}"
        )
    if missing:
        raise InputError(
            f"target_modules: this model has no module {', '.join(map(repr, missing))}; {nearest(missing[0], leaves)} "
            f'(or "{ALL_LINEAR}")'
        )
    if wrong := [p for p in found if not is_linear(base[p])]:
        raise InputError(
            f"target_modules: {wrong[0]} is a {type(base[wrong[0]]).__name__}, and only linear layers can be "
            f"adapted; this model's are: {', '.join(sorted(leaves))}"
        )
    return found


def default_lora_targets(model: nn.Module) -> tuple[str, ...]:
    """HF PEFT's default names for this architecture; `q_proj, v_proj` for a newcomer that has them."""
    if (targets := LORA_TARGETS.get(model_type(model))) is not None:
        return targets
    leaves = {p.rsplit(".", 1)[-1] for p, m in _candidates(model).items() if is_linear(m)}
    for pair in (_QV, ("query", "value")):  # the second are those of BERT's many descendants
        if set(pair) <= leaves:
            return pair
    raise InputError(
        f"no default target modules are known for the architecture {model_type(model)!r}; "
        f'set target_modules to some of: {", ".join(sorted(leaves))}, or to "{ALL_LINEAR}"'
    )


def default_adalora_targets(model: nn.Module) -> tuple[str, ...]:
    """HF PEFT's default names for AdaLoRA, of which a T5 with a gated feed-forward lacks one; elsewhere LoRA's."""
    found = {p.rsplit(".", 1)[-1] for p in _candidates(model)}
    named = tuple(t for t in ADALORA_TARGETS.get(model_type(model), ()) if t in found)
    return named or default_lora_targets(model)


def default_ia3_targets(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(target_modules, feedforward_modules) for (IA)³: keys, values and the feed-forward's input."""
    outputs, inputs = IA3_TARGETS.get(model_type(model), ((), ()))
    leaves = {p.rsplit(".", 1)[-1] for p, m in _candidates(model).items() if is_linear(m)}
    if not outputs and {"k_proj", "v_proj", "down_proj"} <= leaves:
        outputs, inputs = ("k_proj", "v_proj"), ("down_proj",)
    if not outputs and {"query", "key", "value"} <= leaves:
        outputs, inputs = IA3_TARGETS["bert"]
    if not outputs:
        raise InputError(
            f"no default target modules are known for the architecture {model_type(model)!r}; "
            f"set target_modules (and feedforward_modules) to some of: {', '.join(sorted(leaves))}"
        )
    if inputs and not any(matches(p, inputs) for p in _candidates(model)):
        raise InputError(
            f"(IA)³: this {model_type(model)} has no module {inputs[0]!r}; set target_modules and feedforward_modules"
        )
    return outputs + inputs, inputs


_HEADS = ("classifier", "score")


def is_classifier(model: nn.Module) -> bool:
    """Whether the model answers with a class of its own head (`…ForSequenceClassification`), not with words."""
    return type(model).__name__.endswith("ForSequenceClassification")


def classifier_heads(model: nn.Module) -> tuple[str, ...]:
    """The names of a classifier's head, which a new task always trains; for other models none."""
    return tuple(n for n in _HEADS if n in model._modules) if is_classifier(model) else ()


def whole_names(model: nn.Module, modules_to_save: tuple[str, ...] | None) -> tuple[str, ...]:
    """`modules_to_save` with a classifier's head, which always belongs there; HF PEFT writes both its names, or twice."""
    wanted = modules_to_save or ()
    if is_classifier(model):
        wanted = tuple(n for n in wanted if n not in _HEADS) + classifier_heads(model)
    return tuple(dict.fromkeys(wanted))


def whole_sites(model: nn.Module, modules_to_save: tuple[str, ...]) -> list[str]:
    """Paths of the modules that `modules_to_save` names: by any ending, as HF PEFT does (so DistilBERT's `classifier` also
    names its `pre_classifier`). What lies inside one of them comes with it."""
    base = _candidates(model)
    for name in modules_to_save:
        if not any(p.endswith(name) for p in base):
            leaves = {p.rsplit(".", 1)[-1] for p in base}
            raise InputError(f"modules_to_save: this model has no module {name!r}; {nearest(name, leaves)}")
    found = [p for p in base if p.endswith(modules_to_save)]
    return [p for p in found if not any(p.startswith(f"{outer}.") for outer in found)]


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The path of a module inside a model."""
    return next(path for path, m in model.named_modules() if m is module)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads with an encoder and writes with a decoder (T5, BART)."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def prompted(model: Any) -> tuple[str, str | None]:
    """Like `stacks`, where a prompt goes: before a classifier as a whole, because what follows its stack (a mean over the
    tokens) must see the prompt and the mask that has room for it. So does HF PEFT. A decoder with a class head looks for its
    last word itself, and must not see the prompt."""
    reads_only = is_classifier(model) and cache_name(argument_names(model)) is None
    return ("", None) if reads_only else stacks(model)


def stacks(model: Any) -> tuple[str, str | None]:
    """Paths of the stack that reads tokens and, in an encoder–decoder, of the one that writes them."""
    if is_encoder_decoder(model):
        return path_of(model, model.get_encoder()), path_of(model, model.get_decoder())
    if not hasattr(model, "base_model"):
        raise InputError(f"{type(model).__name__} is not a transformers model: prompt methods need its stack")
    if is_classifier(model) or not hasattr(model, "get_decoder"):
        return path_of(model, model.base_model), None
    called = model.get_decoder()  # OPT calls the decoder inside its base model, and not the base model
    inside = called is not None and called is not model and any(m is called for m in model.modules())
    return path_of(model, called if inside else model.base_model), None
