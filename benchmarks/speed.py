"""How fast, in how much memory — against what people would otherwise run?

Both sides train in one process, step by step in turn, on the same rows from the same start, so that what the machine does
meanwhile happens to both; the ratio of each pair of steps is what counts. The first steps warm up and are left out. Losses
are kept beside the times: a speed-up that changes what is learned is a bug. Peak memory is measured in a process of its own
for each side, as the operating system counts it (resident size) and as tensors are counted (bytes alive), both above what was
there when training began.

    python benchmarks/speed.py --out benchmarks/results/speed.jsonl            # an hour or two; goes on where it stopped
    python benchmarks/speed.py --out benchmarks/results/speed.jsonl --only "train reviews lora"

`speed_report.py` makes the table of it. Work: `speed_work.py`; sides: `speed_sides.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import featherweight as fw
from featherweight import provenance
from featherweight.adapter import parts
from featherweight.attention import Layout, attend_in_rows
from featherweight.engine.loss import _HeadLoss
from featherweight.engine.memory import peak_bytes, reset_peak
from featherweight.engine.update import gradients
from featherweight.tokens import Example
from speed_sides import Full, HFTrainer, Loop, Ours, padded, synchronise
from speed_work import LENGTHS, base_of, rows_of

METHODS = ("lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3")
BATCH = 8


def timed(step: Callable[[Sequence[Example]], float], rows: Sequence[Example]) -> tuple[float, float]:
    """(seconds, loss) of a step."""
    start = time.perf_counter()
    loss = step(rows)
    synchronise()
    return time.perf_counter() - start, loss


def matmul_rate() -> float:
    """This machine's matrix-multiply rate in floating-point operations a second: bfloat16, 2048³, the best of ten."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    a = torch.randn(2048, 2048, dtype=torch.bfloat16, device=device)
    return 2 * 2048**3 / min(timed(lambda _: float((a @ a)[0, 0]), ())[0] for _ in range(10))


def operations(step: Callable[[Sequence[Example]], float], rows: Sequence[Example]) -> int:
    """Floating-point operations of the products in one step."""
    with FlopCounterMode(display=False) as counter:
        step(rows)
    return counter.get_total_flops()


def batches_of(work: str, base: fw.Base, steps: int, *, by_length: bool = False) -> list[list[Example]]:
    """The rows of each step."""
    size = 1 if work == "long" else BATCH
    rows = rows_of(work, base, steps * size)
    if by_length:
        rows.sort(key=lambda e: len(e.ids))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return batches[::2] + batches[1::2][::-1] if by_length else batches


def rival(kind: str, work: str, method: str, start: Path | None) -> Any:
    """A side by its name, on a base of its own."""
    if kind == "trainer":
        return HFTrainer(base_of(work), method, start)
    if kind == "reference":
        return Loop(base_of(work, "float32"), method, width=128, start=start)
    if kind == "full":
        return Full(base_of(work), method)
    return Loop(base_of(work), method, attention=kind.removeprefix("loop_"), start=start)


def train(
    work: str, method: str, kinds: Sequence[str], steps: int, warm: int = 2, *, by_length: bool = False
) -> dict[str, Any]:
    """Ours and its rivals in turn. Rows of `reviews` are also tested afterwards, with both adapters."""
    base = base_of(work)
    batches = batches_of(work, base, steps + warm, by_length=by_length)
    ours = Ours(base, method)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder))
        start = Path(folder) if "random" not in base.name else None
        others = {kind: rival(kind, work, method, start) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in ("ours", *kinds)}
    losses: dict[str, list[float]] = {kind: [] for kind in ("ours", *kinds)}

    def between(i: int) -> None:
        for kind, side in {"ours": ours, **others}.items():
            if kind != "trainer":
                took, loss = timed(side.step, batches[i])
                seconds[kind].append(took)
                losses[kind].append(loss)

    if "trainer" in others:
        seconds["trainer"], losses["trainer"] = others["trainer"].run(batches, between)
    else:
        for i in range(len(batches)):
            between(i)
    rate = matmul_rate()
    shares = [operations(ours.step, rows) / (rate * took) for rows, took in zip(batches, seconds["ours"], strict=True)]
    tokens = [sum(len(e.ids) for e in rows) for rows in batches[warm:]]
    return {
        "seconds": {k: v[warm:] for k, v in seconds.items()}, "losses": losses, "tokens": tokens,
        "ratios": {k: [a / b for a, b in zip(v[warm:], seconds["ours"][warm:], strict=True)] for k, v in seconds.items() if k != "ours"},
        "limit": {"rate": rate, "fractions": shares[warm:]},
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


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak: what an allocator without waste would need."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, out)):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if (key := storage._cdata) not in self.known and any(t is o for o in tree_leaves(out)):
                    size = storage.nbytes()
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._gone, key, size)
                    self.peak = max(self.peak, self.now)
                self.known.add(key)
        return out


def memory_child(work: str, method: str, kind: str) -> dict[str, int]:
    """Peak memory of two steps on long rows of this work, above what the process held before; run in a process of its own."""
    side: Any = Ours(base_of(work), method) if kind == "ours" else rival(kind, work, method, None)
    rows = rows_of(work, side.base, 3 if work == "long" else 8 * BATCH)
    rows = sorted(rows, key=lambda e: len(e.ids))[-(1 if work == "long" else BATCH) :]
    for p in side.base.model.parameters():  # weights that are still in their file only
        p.sum()
    reset_peak(side.base.device)
    before = peak_bytes(side.base.device)

    def steps(n: int) -> None:
        if kind == "trainer":
            side.run([rows] * n, lambda _: None)
        else:
            for _ in range(n):
                side.step(rows)

    steps(1 if work == "long" else 2)
    resident = peak_bytes(side.base.device) - before
    with Alive() as alive:
        steps(1)
    return {"resident": resident, "tensors": alive.peak, "row_tokens": sum(len(e.ids) for e in rows)}


def memory(work: str, method: str, kinds: Sequence[str]) -> dict[str, Any]:
    """`memory_child` of every side."""
    found = {}
    for kind in ("ours", *kinds):
        child = [sys.executable, __file__, "--child", work, method, kind]
        done = subprocess.run(child, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    return {"bytes": found}


def growth(method: str) -> dict[str, Any]:
    """By the length of a row: seconds of a step, seconds of its attention alone, and bytes that the loss needs for a while."""
    side = Ours(base_of("long"), method)
    config, head = side.base.model.config, side.base.model.get_output_embeddings()
    size = config.hidden_size // config.num_attention_heads
    seconds, attention, loss_bytes = {}, {}, {}
    for row in rows_of("long", side.base, len(LENGTHS)):
        n, device = len(row.ids) - 1, side.base.device
        side.step([row])
        seconds[n] = min(timed(side.step, [row])[0] for _ in range(2))
        q, k, v = (
            torch.randn(1, heads, n, size, device=device, dtype=torch.bfloat16, requires_grad=True)
            for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        )
        mask = Layout(0, (n,)).mask(device)

        def attend(_: Any, q: Any = q, k: Any = k, v: Any = v, mask: Any = mask) -> float:
            attend_in_rows(side.base.model, q, k, v, mask)[0].sum().backward()
            return 0.0

        attention[n] = config.num_hidden_layers * min(timed(attend, ())[0] for _ in range(3))
        hidden = torch.randn(n, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        with Alive() as alive:
            _HeadLoss.apply(hidden, head.weight, None, torch.zeros(n, dtype=torch.long, device=device))
        loss_bytes[n] = alive.peak - hidden.nbytes  # what it keeps, the gradient of what it was given, is no surprise
    return {"seconds": seconds, "attention": attention, "loss_bytes": loss_bytes}


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


EXPERIMENTS: dict[str, Callable[[], dict[str, Any]]] = {
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


def main() -> None:
    """Run the experiments that the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="only experiments whose name begins so", default="")
    parser.add_argument("--again", action="store_true", help="also those that are finished")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(memory_child(*args.child)))
        return
    assert args.out, "give --out"
    known = {r["name"]: r for r in map(json.loads, args.out.read_text().splitlines())} if args.out.exists() else {}
    for name, experiment in EXPERIMENTS.items():
        if not name.startswith(args.only) or (name in known and not args.again):
            continue
        start = time.time()
        known[name] = {"name": name, **experiment(), **provenance.record(), "took": round(time.time() - start)}
        ordered = [known[n] for n in EXPERIMENTS if n in known]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(r) + "\n" for r in ordered))
        ratios = {k: f"{statistics.median(v):.2f}" for k, v in known[name].get("ratios", {}).items()}
        print(
            f"{name}: {ratios or {k: v for k, v in known[name].items() if k in ('bytes', 'seconds', 'off')}}",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
