"""What other tools call our settings: whoever comes from one of them is told our name.

The names are those of Hugging Face's `TrainingArguments`, `LoraConfig` and TRL, of LLaMA-Factory, Axolotl, mlx-lm and Lightning.
Ours is a setting, a setting with a value, or METHOD.OPTION. What has no equivalent here is not in the table.
"""

from __future__ import annotations

from collections.abc import Collection

_OURS = {
    "adapter": "adapter_name_or_path adapter_path lora_model_dir lora_path peft_model",
    "model": "base_model model_id model_name model_name_or_path model_path pretrained_model_name_or_path",
    "data": "data_path dataset dataset_name dataset_path datasets train_data train_dataset train_file",
    "test_data": "eval_data eval_dataset eval_file test_dataset test_file",
    "max_length": "block_size context_length cutoff_len max_seq_len max_seq_length model_max_length sequence_len",
    "method": "fine_tune_type finetuning_type peft_method peft_type",
    "lora.r": "lora_r lora_rank r rank",
    "lora.lora_alpha": "alpha lora_alpha",
    "lora.lora_dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules target_modules",
    "lora.use_rslora": "peft_use_rslora use_rslora",
    "prompt_tuning.num_virtual_tokens": "num_virtual_tokens",
    "steps": "iters max_steps num_steps num_train_steps total_steps",
    "epochs": "max_epochs n_epochs num_epochs num_train_epochs",
    "batch_size": "micro_batch_size per_device_batch_size per_device_train_batch_size train_batch_size",
    "accumulate": "accumulate_grad_batches grad_accum gradient_accumulation gradient_accumulation_steps",
    "optimizer": "optim optimizer_type",
    "packing": "sample_packing",
    "lr": "learning_rate",
    "warmup": "lr_warmup_ratio warmup_ratio warmup_steps",
    "max_grad_norm": "clip_grad gradient_clip_val gradient_clipping max_norm",
    "checkpoint_activations=layer": "activation_checkpointing gradient_checkpointing grad_checkpoint use_gradient_checkpointing",
    "quantize": "quantization quantization_bit",
    "quantize=nf4": "load_in_4bit use_4bit",
    "quantize=int8": "load_in_8bit use_8bit",
    "dtype": "precision torch_dtype",
    "dtype=bfloat16": "bf16",
    "dtype=float16": "fp16",
    "dtype=float32": "fp32",
    "device": "device_map",
    "device=cpu": "no_cuda use_cpu",
    "out": "output output_dir output_path save_dir",
    "resume": "resume_from_checkpoint",
    "max_new_tokens": "max_tokens",
    "temperature": "temp",
}
_NAMES = {theirs: ours for ours, names in _OURS.items() for theirs in names.split()}


def as_flag(theirs: str, settings: Collection[str]) -> str | None:
    """Our flag for another tool's name, if the verb has these settings: `--quantize nf4`."""
    ours = _known(theirs, settings)
    if ours is None:
        return None
    if "." in ours:
        return f"--set {ours}=VALUE"
    name, _, value = ours.partition("=")
    return f"--{name.replace('_', '-')} {value}".strip()


def as_key(theirs: str, settings: Collection[str]) -> str | None:
    """The same for a key of a recipe: `quantize = "nf4"`."""
    ours = _known(theirs, settings)
    if ours is None:
        return None
    method, dot, option = ours.rpartition(".")
    name, equals, value = option.partition("=")
    return f"{name} in the table [{method}]" if dot else f'{name} = "{value}"' if equals else name


def as_option(theirs: str, method: str) -> str | None:
    """The same for an option of a method: `r`."""
    owner, _, option = (_known(theirs, {"options"}) or "").rpartition(".")
    return option if owner == method and option != theirs else None


def _known(theirs: str, settings: Collection[str]) -> str | None:
    """Ours, where the verb has it; the options of methods are the setting `options`."""
    ours = _NAMES.get(theirs.lstrip("-").replace("-", "_").lower())
    needed = "options" if ours and "." in ours else (ours or "").partition("=")[0]
    return ours if needed in settings else None
