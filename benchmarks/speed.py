"""How fast, in how much memory — against what people would otherwise run?

Both sides train in one process, step by step in turn, on the same rows from the same start, so that what the machine does
meanwhile happens to both; the ratio of each pair of steps is what counts. The first steps warm up and are left out. Losses
are kept beside the times: a speed-up that changes what is learned is a bug. Peak memory is measured in a process of its own
for each side, as the operating system counts it (resident size) and as tensors are counted (bytes alive), both above what was
there when training began.

    python benchmarks/speed.py --out benchmarks/results/speed.jsonl            # an hour or two; goes on where it stopped
    python benchmarks/speed.py --out benchmarks/results/speed.jsonl --only "train reviews lora"

On an accelerator it begins with random Llamas of 1, 3 and 8 billion parameters and mt0-large's shape, the most telling first; nothing
is fetched. On a machine that is lent for a quarter of an hour, first see that all is in place (a minute, on a CPU too), then measure;
the last line goes on where it stopped when it is given again:

    python benchmarks/speed.py --out tiny.jsonl --only '(train|memory) tiny'
    python benchmarks/speed.py --out benchmarks/results/speed_gpu.jsonl --only '(train|memory) (1b|3b|8b|mt0)' --budget 540

Both sides' models stand on one device: 8 billion parameters in bfloat16 are 16 GB, twice, beside what a step needs. NF4 wants
bitsandbytes, Liger triton and liger-kernel; what is not installed is left out, and the records say so. Liger and Unsloth run in
processes of their own that take turns with ours (`speed_child.py`).

`speed_report.py` makes the table of it. Work: `speed_work.py`, `speed_shapes.py`; sides: `speed_sides.py`, `speed_child.py`; memory:
`speed_memory.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import featherweight as fw
import speed_shapes
from featherweight import attention_kernel, provenance
from featherweight.adapter import parts
from featherweight.engine import kernels
from featherweight.engine.memory import free
from featherweight.engine.update import gradients
from featherweight.tokens import Example
from speed_child import Elsewhere
from speed_memory import growth, memory
from speed_shapes import FIRST, REST, SECOND, SMOKE
from speed_sides import APART, NEEDS, Full, Loop, Ours, lacking, padded, side_of, timed
from speed_work import BATCH, base_of, batches_of, rows_of

BEGUN = time.perf_counter()
METHODS = ("lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3")


def matmul_rate() -> float:
    """This machine's matrix-multiply rate in floating-point operations a second: bfloat16, the best of ten large products."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    return 2 * n**3 / min(timed(lambda _: float((a @ a)[0, 0]), ())[0] for _ in range(10))


def operations(step: Callable[[Sequence[Example]], float], rows: Sequence[Example]) -> int:
    """Floating-point operations of the products in one step."""
    with FlopCounterMode(display=False) as counter:
        step(rows)
    return counter.get_total_flops()


def rival(kind: str, work: str, method: str, start: Path | None) -> Any:
    """A side by its name; in a process of its own if it needs one."""
    return (Elsewhere if kind in APART else side_of)(kind, work, method, start)


def train(
    work: str, method: str, kinds: Sequence[str], steps: int, warm: int = 2, *, by_length: bool = False
) -> dict[str, Any]:
    """Ours and its rivals in turn. Rows of `reviews` are also tested afterwards, with both adapters."""
    base = base_of(work)
    batches = batches_of(work, base, steps + warm, by_length=by_length)
    ours = Ours(base, method)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder))
        start = Path(folder) if work != "mt0" else None
        others = {kind: rival(kind, work, method, start) for kind in kinds}
    driver = next((k for k, side in others.items() if hasattr(side, "run")), None)  # runs the rest between its steps
    seconds: dict[str, list[float]] = {kind: [] for kind in ("ours", *kinds)}
    losses: dict[str, list[float]] = {kind: [] for kind in ("ours", *kinds)}

    def between(i: int) -> None:
        for kind, side in {"ours": ours, **others}.items():
            if kind != driver:
                took, loss = timed(side.step, batches[i])
                seconds[kind].append(took)
                losses[kind].append(loss)

    try:
        if driver:
            seconds[driver], losses[driver] = others[driver].run(batches, between)
        else:
            for i in range(len(batches)):
                between(i)
    finally:
        for side in others.values():
            if isinstance(side, Elsewhere):
                side.stop()
    rate = matmul_rate()
    shares = [operations(ours.step, rows) / (rate * took) for rows, took in zip(batches, seconds["ours"], strict=True)]
    tokens = [sum(len(e.ids) for e in rows) for rows in batches[warm:]]
    return {
        "seconds": {k: v[warm:] for k, v in seconds.items()}, "losses": losses, "tokens": tokens,
        "ratios": {k: [a / b for a, b in zip(v[warm:], seconds["ours"][warm:], strict=True)] for k, v in seconds.items() if k != "ours"},
        "limit": {"rate": rate, "fractions": shares[warm:]}, "chosen": kernels.chosen() | attention_kernel.chosen(),
    }  # fmt: skip


def exactness(method: str) -> dict[str, Any]:
    """How far ours and PEFT's gradients in bfloat16 are from those in float32: one batch, the start of training."""

    def learned(side: Any) -> dict[str, torch.Tensor]:
        rows = rows_of("reviews", side.base, BATCH)
        if isinstance(side, Ours):
            gradients(side.base, [side.tensors(side.base, rows)], side.parameters)
            own = {
                f"{path}.{n}": p for path, part in parts(side.base.model).items() for n, p in part.named_parameters()
            }
        else:
            with torch.autocast(side.base.device.type, torch.bfloat16):
                side.model(**padded(side.base, rows, rounded=8), use_cache=False).loss.backward()
            own = {
                n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in side.model.named_parameters()
            }
        return {n: p.grad.float() for n, p in own.items() if p.grad is not None}

    exact = learned(ours := Ours(base_of("reviews", "float32"), method))
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder))
        sides = {"ours": Ours(base_of("reviews"), method), "peft": Loop(base_of("reviews"), method, start=Path(folder))}
    length = torch.stack([g.norm() for g in exact.values()]).norm()
    found = {}
    for kind, side in sides.items():
        rounded = learned(side)
        assert rounded.keys() == exact.keys(), (list(rounded)[:2], list(exact)[:2])
        found[kind] = float(torch.stack([(rounded[n] - g).norm() for n, g in exact.items()]).norm() / length)
    return {"off": found}


def evaluation(rows: int = 96) -> dict[str, Any]:
    """Scoring labels against generating them as the reference recipe does: float32, padded to 128, ten new tokens."""
    task = fw.load_task("movie-reviews", test_rows=rows)
    ours, theirs = fw.load_base(dtype="bfloat16"), Loop(fw.load_base(dtype="float32"), "lora", width=128)
    fw.attach(ours.model, fw.LoRA(r=8))
    theirs.model.eval()
    tokenizer = theirs.base.tokenizer
    tokenizer.padding_side = "left"
    texts = [tokenizer.decode(e.prompt) for e in fw.tokens.writer_for(ours, None).examples(task.test)[0]]
    seconds: dict[str, list[float]] = {"ours": [], "generate": []}
    fw.evaluate(ours, task)
    for at in range(0, rows, rows // 4):
        part = texts[at : at + rows // 4]
        start = time.perf_counter()
        for i in range(0, len(part), BATCH):
            inputs = tokenizer(part[i : i + BATCH], padding="max_length", max_length=128, return_tensors="pt")
            with torch.no_grad():
                theirs.model.generate(
                    **{k: v.to(theirs.base.device) for k, v in inputs.items()}, max_new_tokens=10, do_sample=False
                )
        seconds["generate"].append((time.perf_counter() - start) / len(part))
        seconds["ours"].append(fw.evaluate(ours, task).seconds / rows)
    ratios = [a / b for a, b in zip(seconds["generate"], seconds["ours"], strict=True)]
    return {"seconds": seconds, "ratios": {"generate": ratios}}


def sizes() -> dict[str, Any]:
    """A LoRA step against a step that trains all weights, in our engine, for Llamas of several sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = {}
    for width, layers in ((128, 4), (256, 8), (576, 30), (1024, 24)):
        sides = {}
        real = fw.load_base(dtype="bfloat16")
        rows = rows_of("reviews", real, 8 * BATCH)
        for kind, side in (("lora", Ours), ("full", Full)):
            config = LlamaConfig(
                hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8, num_hidden_layers=layers,
                num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=49152, tie_word_embeddings=True,
            )  # fmt: skip
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config).bfloat16()
            model.to(real.device)
            sides[kind] = side(fw.Base(model, real.tokenizer, "random", real.device), "lora")
        pairs = []
        for i in range(8):
            batch = rows[i * BATCH : (i + 1) * BATCH]
            took = {kind: timed(side.step, batch)[0] for kind, side in sides.items()}
            pairs.append(took["full"] / took["lora"])
        parameters = sum(p.numel() for p in sides["full"].base.model.parameters())
        found[f"{parameters / 1e6:.0f} M"] = pairs[2:]
    return {"ratios": found}


FIRST_STEP = """
import sys, time
from featherweight import cli
from featherweight.engine.train import Report

before = Report.add

def add(self, *given):
    print("step", time.time(), flush=True)
    before(self, *given)

Report.add = add
cli.main()
"""


def first_step() -> dict[str, Any]:
    """Seconds from the command to the end of its first step, model and data cached."""
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["train", "--steps", "1", "--test-rows", "8", "--out", f"{folder}/run"]
            start, child = time.time(), [sys.executable, "-c", FIRST_STEP, *flags]
            out = subprocess.run(child, capture_output=True, text=True, check=True).stdout
            seconds.append(next(float(line.split()[1]) for line in out.splitlines() if line.startswith("step")) - start)
    return {"seconds": seconds}


Experiment = Callable[[], dict[str, Any]]
EXPERIMENTS: dict[str, Experiment] = {
    **{f"train reviews {m}": partial(train, "reviews", m, ("trainer",), 24) for m in METHODS},
    "train reviews lora sorted": partial(train, "reviews", "lora", ("loop_sdpa", "loop_eager"), 16, by_length=True),
    "train reviews lora reference": partial(train, "reviews", "lora", ("reference",), 6, 1),
    "train answers lora loops": partial(train, "answers", "lora", ("loop_sdpa", "loop_eager"), 4, 1),
    "train reviews lora full": partial(train, "reviews", "lora", ("full",), 10),
    **{f"train answers {m}": partial(train, "answers", m, ("trainer",), 5, 1) for m in METHODS},
    "train mt0 lora reference": partial(train, "mt0", "lora", ("reference",), 4, 1, by_length=True),
    **{f"memory {w} lora": partial(memory, w, "lora", ("trainer",)) for w in ("reviews", "answers", "mt0", "long")},
    **{f"memory {w} {m}": partial(memory, w, m, ("trainer",)) for w in ("reviews", "answers") for m in METHODS[1:]},
    **{f"exactness {m}": partial(exactness, m) for m in ("lora", "ia3")},
    "evaluation": evaluation,
    "sizes": sizes,
    "growth lora": partial(growth, "lora"),
    "first step": first_step,
}


def on_shapes(works: Sequence[str]) -> dict[str, Experiment]:
    """The experiments on random Llamas: PEFT + Trainer first, then memory, then what fewer people have installed."""
    against: dict[str, dict[str, Experiment]] = {
        kind: {
            f"train {work} lora{'' if kind == 'trainer' else f' {kind}'}": partial(train, work, "lora", (kind,), 12, 3)
            for work in works
        }
        for kind in ("trainer", *APART)
    }
    held: dict[str, Experiment] = {
        f"memory {work} lora": partial(memory, work, "lora", ("trainer", *APART))
        for work in works
        if not work.endswith("mixed")
    }
    return against["trainer"] | held | against["liger"] | against["unsloth"]


def experiments(only: str) -> dict[str, Experiment]:
    """Those that are offered here, the most telling first; `tiny` is offered where it is asked for by name."""
    if "tiny" in only:
        return on_shapes(SMOKE)
    if not torch.accelerator.is_available():
        return EXPERIMENTS
    mt0: dict[str, Experiment] = {
        "train mt0 lora reference": partial(train, "mt0", "lora", ("reference",), 12, 3, by_length=True),
        "train mt0 lora": partial(train, "mt0", "lora", ("trainer",), 12, 3),
        "memory mt0 lora": EXPERIMENTS["memory mt0 lora"],
    }
    return on_shapes(FIRST) | on_shapes(SECOND) | mt0 | on_shapes(REST) | (EXPERIMENTS | mt0)


def left_out(name: str) -> str | None:
    """Why an experiment cannot be made here; None where it can."""
    return next(filter(None, map(lacking, re.split("[ -]", name))), None)


def rivals() -> dict[str, Any]:
    """What is installed of what the experiments on accelerators need, and which sides are therefore left out, and why."""
    versions = {}
    for module in sorted({module for needed in NEEDS.values() for module in needed}):
        with suppress(metadata.PackageNotFoundError):
            versions[module] = metadata.version(module.replace("_", "-"))
    return {"installed": versions, "left_out": {kind: why for kind in NEEDS if (why := lacking(kind))}}


def write(path: Path, known: dict[str, dict[str, Any]], order: Sequence[str]) -> None:
    """All records, those of this machine's experiments first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [n for n in order if n in known] + [n for n in known if n not in order]
    path.write_text("".join(json.dumps(known[n]) + "\n" for n in names))


def attempt(name: str, experiment: Experiment) -> dict[str, Any] | None:
    """The record of an experiment; None where it failed, which is said: the others are still wanted."""
    start = time.time()
    try:
        found = experiment()
    except Exception:
        traceback.print_exc()
        print(f"{name}: failed", flush=True)
        return None
    if speed_shapes.parsed(name.split()[1] if " " in name else name):
        found |= rivals()
    return {"name": name, **found, **provenance.record(), "took": round(time.time() - start)}


def main() -> int:
    """Run the experiments that the output file does not hold yet; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", help="only experiments whose name begins with what this expression matches", default=""
    )
    parser.add_argument("--again", action="store_true", help="also those that are finished")
    parser.add_argument("--budget", type=float, help="begin no experiment after so many seconds", default=math.inf)
    args = parser.parse_args()
    known = {r["name"]: r for r in map(json.loads, args.out.read_text().splitlines())} if args.out.exists() else {}
    offered, failed = experiments(args.only), 0
    chosen = {n: e for n, e in offered.items() if re.match(args.only, n) and (args.again or n not in known)}
    for name, experiment in chosen.items():
        if time.perf_counter() - BEGUN > args.budget:
            print(f"{name} and what comes after it: not begun, the time is used up", flush=True)
            break
        if why := left_out(name):
            print(f"{name}: left out, {why}", flush=True)
            continue
        record = attempt(name, experiment)
        free(torch.accelerator.current_accelerator() or torch.device("cpu"))
        if record is None:
            failed = 1
            continue
        known[name] = record
        write(args.out, known, list(offered))
        ratios = {k: f"{statistics.median(v):.2f}" for k, v in record.get("ratios", {}).items()}
        shown = ratios or {k: v for k, v in record.items() if k in ("bytes", "failed", "seconds", "off")}
        print(f"{name}: {shown}", flush=True)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
