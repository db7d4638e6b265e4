"""What does each trick for small machines save, and what does it cost in time?

Every row runs in a process of its own, through the same `fit` as the command line, several rounds in turn: A B C, A B C. A
row's time is compared with `none` of its own round (with `--only`, of that call), because the machine's speed drifts. Memory
is the peak of the training steps as the operating system counts it (on an accelerator: its allocator), weights included.
PEFT + Trainer runs with what its users would switch on for the same end.

    python benchmarks/tricks.py --model smollm2-135m-instruct --out benchmarks/results/tricks.jsonl
    python benchmarks/tricks.py --model 1b --out benchmarks/results/tricks.jsonl
    python benchmarks/tricks.py --table benchmarks/results/tricks.jsonl > benchmarks/results/tricks.md

`1b` is Llama-3.2-1B's shape with random weights, written to a temporary folder. The rows are those of `speed_work.answers`,
100–400 tokens: the longest eight of 64, two updates; for the larger model the longest two, one update. The base is in the type that
this machine multiplies faster (`--dtype auto`). `WITHOUT` are rows where something that is always on is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import featherweight as fw
from featherweight import provenance
from featherweight.demo import MODEL
from featherweight.engine import loss
from featherweight.engine.memory import peak_bytes, reset_peak
from featherweight.engine.train import Settings, fit
from speed_shapes import config_of
from speed_sides import HFTrainer
from speed_work import rows_of

ONE_ROW = {"batch_size": 1, "accumulate": 8}  # as many as there are rows
TRICKS: dict[str, dict[str, Any]] = {
    "none": {},
    "one row at a time, accumulated": ONE_ROW,
    "layers computed again": {"checkpoint_activations": "layer"},
    "layers computed again, one row at a time": {"checkpoint_activations": "layer", **ONE_ROW},
    "base in int8": {"quantize": "int8"},
    "base in nf4": {"quantize": "nf4"},
    "base in nf4, layers computed again, one row at a time": {
        "quantize": "nf4", "checkpoint_activations": "layer", **ONE_ROW,
    },
    "base streamed from disk": {"stream_base": "disk"},
    "base streamed from disk, layers computed again, one row at a time": {
        "stream_base": "disk", "checkpoint_activations": "layer", **ONE_ROW,
    },
    "PEFT + Trainer": {"trainer": {}},
    "PEFT + Trainer, gradient checkpointing, one row at a time": {"trainer": {"gradient_checkpointing": True, **ONE_ROW}},
    "PEFT + Trainer, nf4, gradient checkpointing, one row at a time": {
        "quantize": "nf4", "trainer": {"gradient_checkpointing": True, **ONE_ROW},
    },
}  # fmt: skip
WITHOUT: dict[str, dict[str, Any]] = {
    "padded, not packed": {"packing": False},
    "all logits at once": {"all_logits": True},
    "without AdamW's states (SGD)": {"optimizer": "sgd"},
    "layers compiled": {"compiled": True},
    "base in bfloat16": {"dtype": "bfloat16"},
    "base in float32": {"dtype": "float32"},
}
STEPS = {"small": 2, "1b": 1}
ROWS = {"small": 8, "1b": 2}


def one_billion(folder: Path) -> Path:
    """A random Llama of 1.24 billion parameters in bfloat16, with the default model's tokenizer."""
    from transformers import LlamaForCausalLM

    config = config_of("1b")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    fw.load_base().tokenizer.save_pretrained(folder)
    return folder


def row(model: str, chosen: dict[str, Any], size: int, steps: int) -> dict[str, Any]:
    """Seconds of each step and the peak; in a process of its own."""
    chosen = dict(chosen)
    for settings in (chosen, chosen.get("trainer", {})):
        if "accumulate" in settings:
            settings["accumulate"] = size
    load = {k: chosen.pop(k) for k in ("quantize", "stream_base", "dtype") if k in chosen}
    trainer = chosen.pop("trainer", None)
    base = fw.load_base(model, **load)
    if chosen.pop("all_logits", False):
        loss.AT_ONCE = dict.fromkeys(loss.AT_ONCE, 2**62)
    if chosen.pop("compiled", False):
        for layer in base.model.model.layers:
            layer.compile(dynamic=True)
    rows = sorted(rows_of("answers", base, 64), key=lambda e: len(e.ids))[-size:]
    if trainer is not None:
        side = HFTrainer(base, "lora", more=trainer)
        reset_peak(base.device)
        seconds, losses = side.run([rows] * steps, lambda _: None)
        return {"seconds": seconds, "losses": losses, "peak": peak_bytes(base.device)}
    torch.manual_seed(0)
    fw.attach(base.model, fw.LoRA(r=8))
    reached: list[float] = []
    settings = Settings(**{"steps": steps, "batch_size": size, **chosen})
    report = fit(base, rows, settings, on_step=lambda r: reached.append(r.seconds))
    seconds = [b - a for a, b in zip([0.0, *reached], reached, strict=False)]
    kind = str(base.model.dtype).removeprefix("torch.")
    return {
        "seconds": seconds,
        "losses": report.losses,
        "peak": report.peak_bytes,
        "stopped": report.stopped,
        "dtype": kind,
    }


def measure(name: str, model: str, shape: str, rounds: int, only: str) -> dict[str, Any]:
    """All rows, in turn."""
    rows = TRICKS | (WITHOUT if shape == "small" else {})
    found: dict[str, list[Any]] = {trick: [] for trick in rows if re.search(only, trick) or trick == "none"}
    for number in range(rounds):
        for trick in found:
            done = subprocess.run(
                [sys.executable, __file__, "--child", model, json.dumps(rows[trick]), str(ROWS[shape]), str(STEPS[shape])],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            found[trick].append(
                json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": last[0]}
            )
            found[trick][-1]["plain_seconds"] = found["none"][-1]["seconds"]  # of the same round
            shown = {k: v for k, v in found[trick][-1].items() if k != "losses"}
            print(f"{name}, round {number + 1}, {trick}: {shown}", flush=True)
    return {"name": name, "size": ROWS[shape], "steps": STEPS[shape], "rows": found, **provenance.record()}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: peak memory and time of each row, against `none`."""
    lines = []
    for record in records:
        lines += [
            f"\n## {record['name']}\n",
            "| trick | peak memory, MiB | of none's | time a step, of none's | loss, last step |",
        ]
        lines.append("|---|---|---|---|---|")
        plain = record["rows"]["none"]
        for trick, rounds in record["rows"].items():
            if any("error" in r for r in rounds):
                lines.append(f"| {trick} | {next(r['error'] for r in rounds if 'error' in r)} | | | |")
                continue
            peak = statistics.median(r["peak"] for r in rounds)
            ratios = [min(r["seconds"]) / min(r["plain_seconds"]) for r in rounds]
            share = peak / statistics.median(r["peak"] for r in plain)
            spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
            lines.append(
                f"| {trick} | {peak / 2**20:,.0f} | {share:.2f}× | {statistics.median(ratios):.2f}×{spread} "
                f"| {rounds[0]['losses'][-1]:.4f} |"
            )
        lines.append(
            f"\n`{record['command']}`, {record['date']}, {record['machine']}, "
            + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        )
    return "\n".join(lines)


def main() -> None:
    """Measure a model, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="measure again only rows whose name matches this expression, beside `none`"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, chosen, size, steps = args.child
        print(json.dumps(row(model, json.loads(chosen), int(size), int(steps))))
        return
    if args.table:
        print("# What the tricks for small machines save, and what they cost")
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    assert args.out, "give --out or --table"
    with tempfile.TemporaryDirectory() as folder:
        model = str(one_billion(Path(folder))) if args.model == "1b" else args.model
        name = "Llama-3.2-1B's shape, random weights" if args.model == "1b" else args.model
        record = measure(name, model, "1b" if args.model == "1b" else "small", args.rounds, args.only)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.only and (before := next((r for r in known if r["name"] == name), None)):  # the other rows stay
        record["rows"] = before["rows"] | {k: v for k, v in record["rows"].items() if k != "none"}
    known = [r for r in known if r["name"] != name] + [record]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(r) + "\n" for r in known))


if __name__ == "__main__":
    main()
