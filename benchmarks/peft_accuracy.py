"""At least as good as the real `peft`, on the same data, steps, batches, rates and seed?

For every row of a finished comparison (`rows.jsonl`) the same training is run with the real `peft`: the same base, the
same batches in the same order, the same learning rate and schedule, AdamW on float32 adapters — but peft's own adapters,
its own initialisation and transformers' own loss. Both are then judged by the same test rows; peft's labels are scored by
plain full forward passes. Differences are tested in pairs (exact McNemar test on the rows where one is right and
the other wrong). One JSON line per method is appended at once; finished ones are skipped.

    featherweight compare --out runs/default
    python benchmarks/peft_accuracy.py runs/default --out benchmarks/results/peft_accuracy.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from math import comb
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

import featherweight as fw
from featherweight import tokens
from featherweight.engine.batches import schedule
from featherweight.engine.train import Settings, rate_at
from featherweight.provenance import machine, versions
from featherweight.stats import wilson
from featherweight.tokens import IGNORE, Example

# peft's classes with the sizes that featherweight's defaults have; everything else is peft's own default.
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8),
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=128),
    "prefix_tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
}


def batch_of(examples: list[Example], pad_id: int, full: bool) -> dict[str, torch.Tensor]:
    """Right-padded rows, as peft's soft prompts need them (it ignores position ids); `full` includes the answers."""
    rows = [e.ids if full else e.prompt for e in examples]
    width = -(-max(map(len, rows)) // 8) * 8
    ids = torch.tensor([r + [pad_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    labels = torch.tensor([e.targets + [IGNORE] * (width - len(e.targets)) for e in examples]) if full else None
    return {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if labels is not None else {})


def train(model: Any, examples: list[Example], settings: Settings, pad_id: int) -> None:
    """The plain loop. Its time is not kept: speeds are compared by another script, in one run."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    model.train()
    for step, rows in enumerate(schedule(examples, settings.batch_size, settings.steps, settings.seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        loss = model(**batch_of(rows, pad_id, full=True), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def predict(
    model: Any, examples: list[Example], label_ids: list[list[int]], labels: list[str], pad_id: int
) -> list[str]:
    """The likeliest label of every row. The default's labels are one token each, so the prompt's last logits decide."""
    assert all(len(ids) == 1 for ids in label_ids)
    model.eval()
    answers: dict[int, str] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        rows = [examples[i] for i in chosen]
        logits = model(**batch_of(rows, pad_id, full=False)).logits
        virtual = logits.shape[1] - max(-(-len(r.prompt) // 8) * 8 for r in rows)  # prompts prepend their own
        for i, row, row_logits in zip(chosen, rows, logits, strict=True):
            last = row_logits[virtual + len(row.prompt) - 1]
            answers[i] = labels[int(last[[ids[0] for ids in label_ids]].argmax())]
    return [answers[i] for i in range(len(examples))]


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that two classifiers are equally good, from the rows where just one is right."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


def main() -> None:
    """Run every method that the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="folder of a finished `featherweight compare` on the default model and data"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, help="another rate than the comparison's, for peft only")
    parser.add_argument("--methods", default=",".join(CONFIGS))
    args = parser.parse_args()
    ours = {r["name"]: r for r in map(json.loads, (args.run / "rows.jsonl").read_text().splitlines())}
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []

    task = fw.load_task("movie-reviews", test_rows=next(iter(ours.values()))["eval_examples"])
    answers = [r.answer for r in task.test]
    for name in args.methods.split(","):
        row = ours[name]
        lr = args.lr or row["lr"]
        if any(d["method"] == name and d["lr"] == lr for d in done):
            continue
        base = fw.load_base()
        writer = tokens.writer_for(base, None)
        examples, _ = writer.examples(task.train)
        test, _ = writer.examples(task.test)
        settings = Settings(steps=row["train_steps"], batch_size=row["batch_size"], lr=lr)
        torch.manual_seed(settings.seed)
        base.model.set_attn_implementation("sdpa")  # transformers' own default
        model = get_peft_model(base.model, CONFIGS[name])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == row["trainable_params"], (trained, row["trainable_params"])
        print(f"{name}: {trained:,} parameters, lr {lr:g}", flush=True)
        pad_id = base.tokenizer.pad_token_id
        train(model, examples, settings, pad_id)
        theirs = predict(model, test, writer.label_ids(task.labels), task.labels, pad_id)
        right = [p == a for p, a in zip(theirs, answers, strict=True)]
        right_ours = [p == a for p, a in zip(row["predictions"], answers, strict=True)]
        only_ours = sum(o and not t for o, t in zip(right_ours, right, strict=True))
        only_theirs = sum(t and not o for o, t in zip(right_ours, right, strict=True))
        result = {
            "method": name, "lr": lr, "our_lr": row["lr"], "steps": settings.steps, "batch_size": settings.batch_size,
            "n": len(answers), "ours": row["accuracy"], "our_interval": row["interval"],
            "peft": sum(right) / len(right), "peft_interval": wilson(sum(right), len(right)),
            "only_ours_right": only_ours, "only_peft_right": only_theirs, "p": mcnemar(only_ours, only_theirs),
            "trainable": trained,
            "date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(),
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as f:
            f.write(json.dumps(result) + "\n")
        print(f"{name}: ours {result['ours']:.1%}, peft {result['peft']:.1%}, p = {result['p']:.3f}", flush=True)


if __name__ == "__main__":
    main()
