"""Where the default learning rates and initialisations come from.

Every method gets a small search on the default model and data: a grid of four or five rates, one seed, and where a
method has a choice of initialisation, a trial of the other one. Accuracy is taken on 400 validation rows that are cut
from the training side; the test rows of `compare` are never looked at. One JSON line per trial is appended at once;
done trials are skipped.

    python benchmarks/tune.py --out benchmarks/results/tune.jsonl            # two minutes a trial on 2 cores
    python benchmarks/tune.py --out benchmarks/results/tune.jsonl --table    # only print what is there, as Markdown
    python benchmarks/tune.py --out benchmarks/results/tune_encoder.jsonl --model all-MiniLM-L6-v2    # half a minute a trial
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import featherweight as fw
from featherweight import tokens
from featherweight.adapter import attach, detach
from featherweight.demo import MODEL
from featherweight.engine.train import Settings, fit
from featherweight.methods import method_class
from featherweight.provenance import machine, versions
from featherweight.scoring import evaluate
from featherweight.sites import is_classifier

GRID: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("prompt_tuning", {}, (1e-2, 3e-2, 1e-1, 3e-1)),
    ("p_tuning", {}, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("prefix_tuning", {}, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("lora", {}, (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)),
    ("ia3", {}, (5e-3, 1e-2, 2e-2, 5e-2)),
    ("adalora", {}, (5e-3, 1e-2, 2e-2, 5e-2)),
    # Does the start matter?
    ("prefix_tuning", {"init_weights": None}, (1e-2,)),
    ("p_tuning", {"init_text": None}, (3e-3,)),
    ("prompt_tuning", {"prompt_tuning_init": "RANDOM"}, (3e-2,)),
]

ENCODER_GRID: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("lora", {}, (1e-3, 2e-3, 5e-3, 1e-2)),
    ("ia3", {}, (5e-3, 1e-2, 2e-2, 5e-2)),
    ("adalora", {}, (5e-3, 1e-2, 2e-2, 5e-2)),
    ("prompt_tuning", {}, (1e-2, 3e-2, 1e-1, 3e-1)),
    ("p_tuning", {}, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("prefix_tuning", {}, (3e-3, 1e-2, 3e-2, 1e-1)),
]


def table(trials: list[dict[str, Any]]) -> str:
    """The finished trials, by method and rate; the best rate of each method's default form is bold."""
    best: dict[str, dict[str, Any]] = {}
    for t in trials:
        if (
            t["options"] == {}
            and t["validation_accuracy"] > best.get(t["method"], {"validation_accuracy": 0})["validation_accuracy"]
        ):
            best[t["method"]] = t
    lines = [
        "| method | options | learning rate | validation accuracy [95 %] | loss, last 20 steps |",
        "|---|---|---|---|---|",
    ]
    for t in sorted(
        trials, key=lambda t: (t["method"], json.dumps(t["options"]) != "{}", json.dumps(t["options"]), t["lr"])
    ):
        mark = "**" if best.get(t["method"]) is t else ""
        options = ", ".join(f"{k}={v}" for k, v in t["options"].items()) or "–"
        low, high = t["interval"]
        lines.append(
            f"| {t['method']} | {options} | {mark}{t['lr']:g}{mark} | {mark}{t['validation_accuracy']:.1%}{mark} "
            f"[{low:.1%}, {high:.1%}], n = {t['n']} | {t['last_loss']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the trials that the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=400, help="validation rows")
    parser.add_argument("--table", action="store_true", help="print the finished trials and run none")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(done))
        return
    seen = {(d["method"], json.dumps(d["options"], sort_keys=True), d["lr"], d["steps"]) for d in done}

    task = fw.load_task("movie-reviews")
    base = fw.load_base(args.model, task.labels)
    validation, train = task.train[: args.rows], task.train[args.rows :]
    task = fw.Task(task.kind, task.source, train, validation, task.labels, task.template)
    writer = tokens.writer_for(base, None, task.labels)
    examples, _ = writer.examples(task.train)
    for name, options, rates in ENCODER_GRID if is_classifier(base.model) else GRID:
        for lr in rates:
            if (name, json.dumps(options, sort_keys=True), lr, args.steps) in seen:
                continue
            torch.manual_seed(0)
            method = (
                method_class(name)(**options).starting_from(task.instruction)
                if "init_text" not in options
                else method_class(name)(**options)
            )
            attach(base.model, method, encode=writer.plain)
            report = fit(base, examples, Settings(steps=args.steps, batch_size=args.batch_size, lr=lr))
            score = evaluate(base, task, writer)
            detach(base.model)
            low, high = score.interval
            row = {
                "model": base.name, "method": name, "options": options, "lr": lr, "steps": args.steps, "batch_size": args.batch_size,
                "validation_accuracy": score.accuracy, "n": score.n, "interval": [low, high], "macro_f1": score.macro_f1,
                "last_loss": sum(report.losses[-20:]) / 20, "stopped": report.stopped, "dtype": str(base.model.dtype),
                "date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(),
            }  # fmt: skip
            with args.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(
                f"{name:14} {options} lr={lr:g}: {score.accuracy:.1%} [{low:.1%}, {high:.1%}] loss {row['last_loss']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
