"""HF PEFT + `Trainer` as its users run it, in one process: what `faults_rival.py` interrupts.

LoRA on the tiny Llama, a checkpoint and an evaluation every other step, the best adapter at the end, two checkpoints kept. It goes on
from the last checkpoint that transformers finds (`get_last_checkpoint`), which is how its examples do it.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

AT = 13  # the step after which things happen; the last checkpoint is that of step 12


class At(TrainerCallback):
    """Python that runs after a step: to send a signal, or to spoil something."""

    def __init__(self, do: str) -> None:
        self.do = do

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See the class."""
        print("step", state.global_step, flush=True)
        if state.global_step == AT and self.do:
            exec(self.do, {})


class Spoiled(Trainer):
    """One step's loss, or its gradient, is not finite."""

    spoil = ""

    def compute_loss(self, model: Any, *args: Any, **more: Any) -> Any:
        """The loss, spoiled after step 13."""
        loss = super().compute_loss(model, *args, **more)
        if not self.spoil or not model.training or self.state.global_step != AT:
            return loss
        first = next(p for p in model.parameters() if p.requires_grad)
        return (
            loss
            + {
                "NaN loss": first.sum() * float("nan"),
                "NaN gradient": (first * 0).sum().sqrt(),
                "infinite gradient": 3e38 * (first - first.detach()).sum() * 100,
            }[self.spoil]
        )


def train(
    model: str, data: str, *, out: str = "run", steps: int = 24, lr: float = 1e-3, batch: int = 4, workers: int = 0,
    best: bool = True, spoil: str = "", do: str = "", save_at_sigterm: bool = False,
) -> None:  # fmt: skip
    """One run, from the command to the adapter in `out/final`; it goes on where there is something to go on from."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM"))
    with Path(data).open(encoding="utf-8") as f:
        rows = [_tokens(tokenizer, row["text"], row["label"]) for row in csv.DictReader(f)]
    trainer = Spoiled(
        adapted,
        TrainingArguments(
            out, max_steps=steps, learning_rate=lr, per_device_train_batch_size=batch, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=best, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_num_workers=workers, dataloader_pin_memory=False, enable_jit_checkpoint=save_at_sigterm,
        ),
        DataCollatorForSeq2Seq(tokenizer), rows[6:], rows[:6], processing_class=tokenizer, callbacks=[At(do)],
    )  # fmt: skip
    trainer.spoil = spoil
    last = get_last_checkpoint(out) if Path(out).is_dir() else None
    print("going on from", last, flush=True)
    try:
        trainer.train(resume_from_checkpoint=last)
    except KeyboardInterrupt:  # as Python itself ends
        sys.exit(130)
    trainer.save_model(str(Path(out, "final")))


def _tokens(tokenizer: Any, text: str, label: str) -> dict[str, list[int]]:
    asked = tokenizer(f"Text: {text} Sentiment:").input_ids
    answer = [*tokenizer(f" {label}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {
        "input_ids": asked + answer,
        "attention_mask": [1] * len(asked + answer),
        "labels": [-100] * len(asked) + answer,
    }
