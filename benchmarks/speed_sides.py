"""Who runs in `speed.py`: featherweight's engine, and what people would otherwise run.

A side trains an adapter for one step on given rows: forward, backward, clip, AdamW, constant rate.

* `ours`: the engine of `featherweight train`.
* `trainer`: HF PEFT and the `Trainer`, bfloat16, as its users run it: rows padded to the longest of the batch.
* `loop_sdpa`, `loop_eager`: HF PEFT in a plain loop, bfloat16, with either attention; rounded lengths save it new kernels.
* `reference`: the recipe of the reference table: float32, every row padded to 128 tokens.
* `liger`: the same `trainer` with Liger's kernels switched on, as its users do: `use_liger_kernel`.
* `unsloth`: in `speed_unsloth.py`.
* `full`: all weights trained by our engine, for "is LoRA a faster step than full fine-tuning?"

`APART` are those that change transformers for the whole process. Liger does: given a model, it changes that model's layers and its
`forward`, but for the rotary positions it replaces transformers' own function (`apply_liger_kernel_to_llama` of liger-kernel
0.8.5), which every other Llama of the process then calls too, ours among them. So each of these has a process of its own, see
`speed_child.py`.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors.torch import load_file

import featherweight as fw
from featherweight.adapter import trainable
from featherweight.engine.train import prepared
from featherweight.engine.update import gradients
from featherweight.methods.options import build_method
from featherweight.tokens import IGNORE, Example
from peft_accuracy import CONFIGS
from speed_work import base_of

RATE = 1e-3
Between = Callable[[int], None]
APART = ("liger", "unsloth")
NEEDS = {"liger": ("triton", "liger_kernel"), "unsloth": ("unsloth",), "nf4": ("bitsandbytes",)}


def lacking(what: str) -> str | None:
    """Why this side, or this type of base, cannot run here; None where it can."""
    gone = [module for module in NEEDS.get(what, ()) if importlib.util.find_spec(module) is None]
    if gone:
        return f"{gone[0]} is not installed"
    return "it needs an accelerator" if what in APART and not torch.accelerator.is_available() else None


def side_of(kind: str, work: str, method: str, start: Path | None = None) -> Any:
    """A side by its name, on a base of its own."""
    if kind == "unsloth":
        from speed_unsloth import Unsloth

        return Unsloth(work, start)
    if kind in ("trainer", "liger"):
        return HFTrainer(base_of(work), method, start, {"use_liger_kernel": True} if kind == "liger" else None)
    if kind == "reference":
        return Loop(base_of(work, "float32"), method, width=128, start=start)
    if kind in ("ours", "full"):
        return (Ours if kind == "ours" else Full)(base_of(work), method)
    return Loop(base_of(work), method, attention=kind.removeprefix("loop_"), start=start)


class Ours:
    """featherweight: what `fit` does in a step."""

    def __init__(self, base: fw.Base, method: str) -> None:
        self.base = base
        torch.manual_seed(0)
        fw.attach(base.model, build_method(method, {}))
        self.parameters = trainable(base.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)
        self.open = ExitStack()
        self.tensors = self.open.enter_context(prepared(base))

    def step(self, rows: Sequence[Example]) -> float:
        """One update; returns the loss."""
        loss = gradients(self.base, [self.tensors(self.base, list(rows))], self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item()

    def save(self, folder: Path) -> None:
        """The adapter, in HF PEFT's format."""
        fw.save(self.base.model, folder)


class Full(Ours):
    """Every weight trained, no adapter: the same engine."""

    def __init__(self, base: fw.Base, method: str) -> None:
        self.base = base
        base.model.requires_grad_(True)
        self.parameters = list(base.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0)
        self.open = ExitStack()
        self.tensors = self.open.enter_context(prepared(base))


def peft_model(base: fw.Base, method: str, start: Path | None = None) -> Any:
    """The real `peft` around the base, with our sizes; from our adapter's own start, where a folder of it is given."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[method])  # peft writes the architecture's targets into it
    config.task_type = "SEQ_2_SEQ_LM" if base.encoder_decoder else "CAUSAL_LM"
    model: Any = get_peft_model(base.model, config)
    if start is not None and method != "p_tuning":  # whose files have no encoder to go on training
        set_peft_model_state_dict(model, load_file(start / "adapter_model.safetensors"))
    return model


def padded(base: fw.Base, rows: Sequence[Example], width: int | None = None, rounded: int = 1) -> dict[str, Any]:
    """Right-padded tensors: to `width`, or to the longest, rounded up."""

    def fill(lists: Sequence[list[int]], value: int, to: int | None) -> torch.Tensor:
        to = to or -(-max(map(len, lists)) // rounded) * rounded
        return torch.tensor([x[:to] + [value] * (to - len(x)) for x in lists], device=base.device)

    labels = [r.targets for r in rows]
    return {
        "input_ids": fill([r.ids for r in rows], base.tokenizer.pad_token_id, width),
        "attention_mask": fill([[1] * len(r.ids) for r in rows], 0, width),
        "labels": fill(labels, IGNORE, (4 if width else None) if base.encoder_decoder else width),
    }


class Loop:
    """HF PEFT in a plain loop. `width` of 128 is the reference recipe's padding."""

    def __init__(
        self, base: fw.Base, method: str, attention: str = "sdpa", width: int | None = None, start: Path | None = None
    ) -> None:
        self.base, self.width = base, width
        base.model.set_attn_implementation(attention)
        self.model = peft_model(base, method, start)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)

    def step(self, rows: Sequence[Example]) -> float:
        """One update; returns the loss."""
        loss = self.model(**padded(self.base, rows, self.width, rounded=8), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def save(self, folder: Path) -> None:
        """The adapter."""
        self.model.save_pretrained(folder)


class HFTrainer:
    """HF PEFT and `Trainer`. It drives: what else is measured runs between its steps.

    `more` switches on what its users would: `use_liger_kernel`, and for small machines `gradient_checkpointing`, and `batch_size`
    rows at a time, `accumulate` times.
    """

    def __init__(
        self, base: fw.Base, method: str, start: Path | None = None, more: dict[str, Any] | None = None
    ) -> None:
        self.base, self.more = base, more or {}
        self.bf16 = base.model.dtype == torch.bfloat16  # before what is not quantised becomes float32
        base.model.set_attn_implementation("sdpa")  # what transformers chooses
        if getattr(base.model, "is_quantized", False):
            again = bool(self.more.get("gradient_checkpointing"))
            base.model = prepare_model_for_kbit_training(base.model, use_gradient_checkpointing=again)
        self.model = peft_model(base, method, start)

    def run(self, batches: Sequence[Sequence[Example]], between: Between) -> tuple[list[float], list[float]]:
        """Train on the batches in their order; `between(i)` is called after step i. Returns seconds and losses."""
        import transformers
        from transformers import Trainer, TrainerCallback, TrainingArguments

        seconds: list[float] = []
        losses: list[float] = []

        class Clock(TrainerCallback):
            start = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.start = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                synchronise()
                seconds.append(time.perf_counter() - self.start)
                between(len(seconds) - 1)

            def on_log(self, *_: Any, **given: Any) -> None:
                if "loss" in given["logs"]:
                    losses.append(given["logs"]["loss"])

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(rows)

        transformers.logging.set_verbosity_error()
        rows = list(itertools.chain(*batches))
        size = self.more.get("batch_size", len(batches[0]))
        again = bool(self.more.get("gradient_checkpointing"))
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=size, max_steps=len(batches), bf16=self.bf16,
                gradient_accumulation_steps=self.more.get("accumulate", 1), gradient_checkpointing=again,
                gradient_checkpointing_kwargs={"use_reentrant": False} if again else None,
                learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, logging_steps=1, save_strategy="no",
                report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=self.base.device.type == "cpu",
                use_liger_kernel=self.more.get("use_liger_kernel", False), dataloader_pin_memory=False,  # rows are on the device
            )  # fmt: skip
            trainer = InOrder(
                self.model, arguments, train_dataset=rows, data_collator=lambda chosen: padded(self.base, chosen),
                callbacks=[Clock()],
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return seconds, losses

    def save(self, folder: Path) -> None:
        """The adapter."""
        self.model.save_pretrained(folder)


def synchronise() -> None:
    """Wait for an accelerator, so that the clock is honest."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(step: Callable[[Sequence[Example]], float], rows: Sequence[Example]) -> tuple[float, float]:
    """(seconds, loss) of a step."""
    start = time.perf_counter()
    loss = step(rows)
    synchronise()
    return time.perf_counter() - start, loss
