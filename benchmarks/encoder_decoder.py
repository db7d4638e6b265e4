"""An encoder–decoder, trained for real: a small random-weight T5 learns the training rows of the movie reviews.

No pretrained encoder–decoder comes in a package, so this base has random weights and knows nothing: what is shown is
that the whole path works on this architecture — data, training, label scoring, saving, loading — and that the methods
which change every layer can learn rows by heart even here. It says nothing of accuracy on new rows.

    python benchmarks/encoder_decoder.py --out benchmarks/results/encoder_decoder.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

import featherweight as fw
from featherweight import provenance

TRIALS: list[tuple[Any, float]] = [
    (fw.LoRA(r=16, lora_alpha=32, target_modules="all-linear"), 2e-3),
    (fw.IA3(), 1e-1),
    (fw.PrefixTuning(), 1e-1),
    (fw.PromptTuning(), 1e-1),
    (fw.PTuning(), 1e-2),
]


def random_t5(folder: str) -> None:
    """A 2 + 2-layer T5 with the default model's tokenizer, on disk as any other base."""
    tokenizer = fw.load_base().tokenizer
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train each method on a few rows, test it on those same rows, before and after a round trip through a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    full = fw.load_task("movie-reviews")
    rows = full.train[: args.rows]
    task = fw.Task(full.kind, full.source, rows, rows, full.labels, full.template)  # tested on what it learned from
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        random_t5(f"{folder}/t5")
        for method, lr in TRIALS:
            base = fw.load_base(f"{folder}/t5", dtype="float32")
            untouched = fw.evaluate(base, task)
            report = fw.train(base, task, method, steps=args.steps, lr=lr)
            score = fw.evaluate(base, task)
            fw.save(base.model, f"{folder}/adapter", base=base.name)
            again = fw.load_base(f"{folder}/t5", dtype="float32")
            fw.load(again.model, f"{folder}/adapter")
            reloaded = fw.evaluate(again, task)
            assert reloaded.predictions == score.predictions
            total, trained = fw.count(base.model)
            line = {
                "method": method.title, "lr": lr, "steps": report.steps, "rows": len(rows),
                "first_loss": sum(report.losses[:10]) / 10, "last_loss": sum(report.losses[-10:]) / 10,
                "training_accuracy_before": untouched.accuracy, "training_accuracy": score.accuracy,
                "reloaded_predictions_equal": True, "total": total, "trainable": trained, **provenance.record(),
            }  # fmt: skip
            lines.append(json.dumps(line))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("\n".join(lines) + "\n")  # at once: a run that is cut off keeps what it has
            print(
                f"{method.title:14} loss {line['first_loss']:.2f} → {line['last_loss']:.3f}, accuracy on the {len(rows)} "
                f"training rows {untouched.accuracy:.1%} → {score.accuracy:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
