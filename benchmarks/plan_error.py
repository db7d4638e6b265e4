"""How wrong is the plan? Random configurations, predicted and then run; constants from one half, errors from the other.

Each run is `fit` itself on a model of 10 to 150 million random weights, in a process of its own, and has three measures:

* *allocated*: what PyTorch's allocator had given out at the highest point of `fit`, the model included (on a CPU from the profiler's
  account of every allocation, in three further updates; on an accelerator `max_memory_allocated`). This is what is simulated.
* *resident*: how far the process's size, at its peak during `fit`, is above what it was before the model was built, everything
  imported. Beyond the above: pages of libraries, oneDNN's copies, and what the C library keeps after it was freed. On an accelerator
  it is what the allocator reserved.
* *time*: the median update after the first two.

The prediction sees the configuration and the lengths of the rows, never the model; for time, this machine is calibrated before
each run, as `plan --calibrate` does it.

    python benchmarks/plan_error.py --out benchmarks/results/plan_error.jsonl --n 100    # goes on where it stopped
    python benchmarks/plan_error.py --out benchmarks/results/plan_error.jsonl --report   # the errors, on one half
    python benchmarks/plan_error.py --out benchmarks/results/plan_error.jsonl --write    # and constants.json from the other
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import featherweight as fw
from featherweight import provenance
from featherweight.adapter import attach
from featherweight.base import DTYPES, Base, load_config, skeleton
from featherweight.engine.memory import handing_back, reset_peak
from featherweight.engine.train import Report, Settings, fit, heaviest, prepared
from featherweight.engine.update import Learner
from featherweight.methods.options import build_method
from featherweight.pages import drop_files_of
from featherweight.plan import estimate
from featherweight.plan.clock import calibrate, seconds
from featherweight.plan.imagine import packs
from featherweight.plan.simulate import a_tiny_update, simulate
from featherweight.quant import make_dependable
from featherweight.quantise import quantising
from featherweight.rows import Row
from featherweight.stream import start
from featherweight.tokens import IGNORE, Example

METHODS = ("lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3", "adalora")
CONSTANTS = Path(estimate.__file__).with_name("constants.json")
WIDEN = 1.5  # the interval is that of the errors on the first half, made so much wider


def draw(number: int) -> dict[str, Any]:
    """The configuration of run `number`."""
    rng = random.Random(number)
    family = rng.choice(("llama", "qwen3", "gpt2", "t5", "smollm2"))
    width, length = rng.choice((384, 512, 640, 768)), rng.choice((32, 64, 128, 256, 512))
    size = rng.choice([n for n in (1, 2, 4, 8) if n * length <= (1024 if number < 80 else 4096)])
    return {
        "number": number, "family": family, "width": width, "layers": rng.choice((4, 6, 8, 12)),
        "vocabulary": rng.choice((16_384, 32_768, 49_152)), "method": rng.choice(METHODS),
        "length": length, "batch_size": size,
        "micro": rng.choice([n for n in (1, 2, 4, 8) if n <= size]), "dtype": rng.choice(("bfloat16", "float32")),
        "kept": rng.choice(("none", "none", "layer")), "packing": rng.choice((None, None, False)),
        "lean": rng.random() < 0.8, "optimizer": rng.choice(("adamw", "adamw", "adafactor", "sgd")),
        "quantize": rng.choice(("none", "none", "none", "nf4", "int8")), "stream": rng.choice(("none", "none", "disk")),
    }  # fmt: skip


def is_plain(line: dict[str, Any]) -> bool:
    """Whether the base is neither quantised nor streamed. Not every draw is had: of a quantised base nothing is streamed here."""
    return line["run"]["quantize"] == "none" and not is_streamed(line["run"])


def is_streamed(run: dict[str, Any]) -> bool:
    """Whether the base's layers are brought in from their file: a CPU, a base that is not quantised."""
    return run["stream"] == "disk" and run["quantize"] == "none"


def shape_of(run: dict[str, Any]) -> Any:
    """The model's configuration."""
    from transformers import GPT2Config, LlamaConfig, Qwen3Config, T5Config

    width, layers, words = run["width"], run["layers"], run["vocabulary"]
    if run["family"] == "smollm2":
        return load_config(fw.demo.MODEL)
    if run["family"] == "gpt2":
        return GPT2Config(
            n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=words, resid_pdrop=0.0, attn_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
    if run["family"] == "t5":
        made: Any = T5Config
        return made(
            d_model=width, d_ff=2 * width, d_kv=64, num_heads=width // 64, num_layers=layers, num_decoder_layers=layers,
            vocab_size=words, dropout_rate=0.0, decoder_start_token_id=0,
        )  # fmt: skip
    cls = LlamaConfig if run["family"] == "llama" else Qwen3Config
    return cls(
        hidden_size=width, intermediate_size=width * 11 // 4 // 8 * 8, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, vocab_size=words, tie_word_embeddings=True,
    )  # fmt: skip


def rows_of(run: dict[str, Any]) -> list[Example]:
    """Rows of between half the length and all of it."""
    rng, rows = random.Random(run["number"]), []
    for _ in range(4 * run["batch_size"]):
        n = rng.randint(run["length"] // 2, run["length"])
        ids = [rng.randrange(3, 9_000) for _ in range(n)]
        answer = max(1, n // 4)
        targets = ids[-answer:] if run["family"] == "t5" else [IGNORE] * (n - answer) + ids[-answer:]
        rows.append(Example(ids, targets, ids[:-answer], Row((), "", "random")))
    return rows


def settings_of(run: dict[str, Any]) -> Settings:
    """How it is trained. Rows are read `micro` at a time by making so many small batches of an update."""
    return Settings(
        steps=4, batch_size=run["micro"], accumulate=run["batch_size"] // run["micro"], checkpoint_activations=run["kept"],
        optimizer=run["optimizer"], packing=run["packing"], lean=run["lean"], lr=1e-5, seed=run["number"],
    )  # fmt: skip


def resident() -> int:
    """This process's size now."""
    return next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)


def random_model(cls: Any, shape: Any, dtype: str) -> Any:
    """A model with random weights of this type."""
    torch.set_default_dtype(DTYPES[dtype])
    try:
        return cls(shape)
    finally:
        torch.set_default_dtype(torch.float32)


def loaded(cls: Any, shape: Any, folder: str, run: dict[str, Any], device: torch.device) -> Any:
    """The model from its file, as `load_base` loads it."""
    dtype, quantize = DTYPES[run["dtype"]], run["quantize"]
    if quantize == "none":
        return cls.from_pretrained(folder, dtype=dtype)
    with handing_back():
        model = cls.from_pretrained(folder, dtype=dtype, **quantising(quantize, dtype, device, skeleton(shape)))
    make_dependable(model)
    drop_files_of(model.parameters())
    return model


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Run it; in a process of its own."""
    shape, rows, method = shape_of(run), rows_of(run), build_method(run["method"], {})
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    cls = type(skeleton(shape))
    with tempfile.TemporaryDirectory() as folder:
        if from_file := run["quantize"] != "none" or is_streamed(run):  # quantising is done while loading
            random_model(cls, shape, run["dtype"]).save_pretrained(folder)
        reset_peak(device)
        before = resident() if device.type == "cpu" else 0
        model = loaded(cls, shape, folder, run, device) if from_file else random_model(cls, shape, run["dtype"])
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    if is_streamed(run):
        start(model.eval().requires_grad_(False), device, "disk")
    base = Base(model.eval().to(device), SimpleNamespace(pad_token_id=0), "random", device)
    attach(base.model, method)
    taken: list[float] = []

    def step(report: Report) -> None:
        taken.append(report.seconds - sum(taken))

    report = fit(base, rows, settings_of(run), on_step=step)
    assert report.stopped is None, report
    assert report.micro_batch == run["micro"], report
    if device.type == "cpu":
        peak, weights = report.peak_bytes, sum(p.nbytes for p in {*model.parameters(), *model.buffers()})
        given = weights + allocated(
            base, heaviest(rows, settings_of(run), packs(shape, run["packing"])), settings_of(run)
        )
    else:
        peak, given = torch.accelerator.max_memory_reserved(device), torch.accelerator.max_memory_allocated(device)
    return {
        "bytes": peak - before, "allocated": given, "before": before, "seconds": taken[2:], "device": device.type,
    }  # fmt: skip


def allocated(base: Base, rows: list[Example], settings: Settings) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at one time during three updates, above what it had before."""
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
        prepared(base, settings) as tensors,
    ):
        learner = Learner(base, settings, tensors)
        for _ in range(3):  # from the third on there are two copies to go back to with the optimiser's states
            learner.update([rows])
    found: Any = profiler.profiler
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def predict(run: dict[str, Any], calibrated: bool = True) -> dict[str, Any]:
    """What the plan says, before anything is fitted: bytes by part, and seconds at this machine's measured rates."""
    shape, rows, settings, dtype = shape_of(run), rows_of(run), settings_of(run), DTYPES[run["dtype"]]
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    heavy = heaviest(rows, settings, packs(shape, settings.packing))
    method, cpu = build_method(run["method"], {}), device.type == "cpu"
    peaks = simulate(shape, method, settings, heavy, dtype=dtype, quantize=run["quantize"], cpu=cpu)
    told: dict[str, Any] = {"parts": peaks.parts, "layouts": settings.steps * settings.accumulate}
    if is_streamed(run):
        told["parts"]["weights"] -= estimate.elsewhere(shape, dtype, "none", None)[0]
    if calibrated:
        rates = calibrate(shape, sum(len(e.ids) for e in heavy), dtype, device, a_tiny_update(shape, device))
        told["seconds"] = estimate.mean_share(shape, rows, settings, heavy) * seconds(peaks.work, rates)
    return told


def in_child(run: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    child = [sys.executable, __file__, "--child", json.dumps(run)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def simulated(line: dict[str, Any]) -> tuple[int, int]:
    """(bytes in all, bytes that libraries take a share of) of a prediction."""
    parts = dict(line["predicted"]["parts"])
    seats = parts.pop("seats", 0) * max(1, min(estimate.KEPT_LAYOUTS, line["predicted"]["layouts"]))
    parts["workspace"] = parts.get("workspace", 0) + seats
    return sum(parts.values()), sum(parts.get(part, 0) for part in estimate.SHARED)


def fitted(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants that make these lines' relative errors small (least squares), and their errors as an interval."""
    rows, wanted = [], []
    for line in lines:
        total, shared = simulated(line)
        measured, again = line["measured"]["bytes"], line["run"]["kept"] == "layer"
        rows.append([1e8 / measured, 0 if again else shared / measured, shared / measured if again else 0])
        wanted.append((measured - total) / measured)
    found = torch.linalg.lstsq(torch.tensor(rows).double(), torch.tensor(wanted).double()[:, None], driver="gelsd")
    fixed, share, share_again = (max(0.0, float(x)) for x in found.solution)
    made: dict[str, Any] = {
        "fixed_bytes": round(fixed * 1e8),
        "share": round(share, 4),
        "share_again": round(share_again, 4),
    }
    made["memory_error"] = [0.0, 0.0]
    for end, kept in (("", "none"), ("_again", "layer")):
        off = [(n["measured"]["bytes"] - told(n, made)) / unseen(n, made) for n in lines if n["run"]["kept"] == kept]
        made[f"unseen_error{end}"] = [round(min(off) * WIDEN, 4), round(max(off) * WIDEN, 4)]
    ratios = [statistics.median(line["measured"]["seconds"]) / line["predicted"]["seconds"] for line in lines]
    scale = statistics.median(ratios)
    made["time_scale"] = round(scale, 4)
    made["time_error"] = [round(min(ratios) / scale - 1, 4), round(max(ratios) / scale - 1, 4)]
    made["process_bytes"] = round(statistics.median(line["measured"]["before"] for line in lines)) or 600_000_000
    return made


def unseen(line: dict[str, Any], made: dict[str, Any]) -> float:
    """What these constants add to what is simulated."""
    more = made.get("quantised_bytes", 0) if line["run"]["quantize"] != "none" else 0
    share = made["share_again" if line["run"]["kept"] == "layer" else "share"]
    return float(made["fixed_bytes"] + more + share * simulated(line)[1])


def told(line: dict[str, Any], made: dict[str, Any]) -> float:
    """The predicted growth with these constants."""
    return simulated(line)[0] + unseen(line, made)


def report(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Constants from the even runs; errors on the odd ones, which took no part in them.

    The constants are those of the runs whose base is not quantised. What those need besides that are, as a rule, is what bitsandbytes
    itself weighs, and the matrices that it unpacks.
    """
    plain, even = [line for line in lines if is_plain(line)], [line for line in lines if line["run"]["number"] % 2 == 0]
    made = fitted([line for line in even if line["run"]["quantize"] == "none"])
    made |= {k: v for k, v in fitted(even).items() if k.startswith("time")}
    more = [n["measured"]["bytes"] - told(n, made) for n in even if n["run"]["quantize"] != "none"]
    made["quantised_bytes"] = max(0, round(statistics.median(more))) if more else 0
    other = [line for line in plain if line["run"]["number"] % 2]
    packed = [line for line in lines if line["run"]["number"] % 2 and line["run"]["quantize"] != "none"]
    fetched = [line for line in lines if line["run"]["number"] % 2 and is_streamed(line["run"])]

    def grown(of: list[dict[str, Any]]) -> list[float]:
        return [told(line, made) / line["measured"]["bytes"] - 1 for line in of]

    def allocated_off(of: list[dict[str, Any]]) -> list[float]:
        return [simulated(line)[0] / line["measured"]["allocated"] - 1 for line in of]

    def time_off(of: list[dict[str, Any]]) -> list[float]:
        scale = made["time_scale"]
        return [scale * n["predicted"]["seconds"] / statistics.median(n["measured"]["seconds"]) - 1 for n in of]

    about = lines[0]["provenance"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    print("# How wrong is the plan?\n")
    print(f"{len(lines)} random runs on a CPU; constants from the even ones, errors of the odd ones.\n")
    print("| | runs | median error | worst | target: median, worst |\n|---|---|---|---|---|")
    for name, off, target in (
        ("memory that PyTorch's allocator gave out", allocated_off(other), "3 %, 10 %"),
        ("the same, base quantised", allocated_off(packed), "3 %, 10 %"),
        ("memory that the process grew by", grown(other), "3 %, 10 %"),
        ("the same, base quantised", grown(packed), "3 %, 10 %"),
        ("the same, base streamed from disk", grown(fetched), "3 %, 10 %"),
        ("time of an update", time_off([*other, *packed, *fetched]), "15 %"),
    ):
        size = sorted(map(abs, off))
        print(f"| {name} | {len(size)} | {statistics.median(size):.1%} | {size[-1]:.1%} | {target} |")
    every = [*other, *packed, *fetched]

    def reaches(n: dict[str, Any]) -> float:
        ends = made["unseen_error_again" if n["run"]["kept"] == "layer" else "unseen_error"]
        return told(n, made) + float(ends[1]) * unseen(n, made)

    missed = sum(n["measured"]["bytes"] > reaches(n) for n in every)
    (low, high), (low_again, high_again) = made["unseen_error"], made["unseen_error_again"]
    print(
        f"\nThe process grew beyond the interval in {missed} of {len(every)} runs ({low:+.0%} to {high:+.0%} of what is not simulated, "
        f"{low_again:+.0%} to {high_again:+.0%} where layers are computed again)."
    )
    print("\nThe five whose growth was predicted worst:\n\n| growth | allocated | time | run |\n|---|---|---|---|")
    found = sorted(
        zip(grown(other), allocated_off(other), time_off(other), other, strict=True), key=lambda f: -abs(f[0])
    )
    for m, a, t, line in found[:5]:
        print(f"| {m:+.0%} | {a:+.1%} | {t:+.0%} | {', '.join(f'{k} {v}' for k, v in line['run'].items())} |")
    print(f"\n{about['machine']}, {about['date']}, {versions}. Command: `plan_error.py`, with OMP_NUM_THREADS=1.")
    return made


def main() -> None:
    """Run what is missing, or report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--again", action="store_true", help="predict memory again, of the runs that were measured")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(json.loads(args.child))))
        return
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for line in lines if args.again else ():  # the simulation has changed, what was measured has not
        line["predicted"] |= predict(line["run"], calibrated=False)
    if args.again:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = {line["run"]["number"] for line in lines}
    for number in () if args.report or args.write else range(args.n):
        if number in known:
            continue
        run = draw(number)
        line = {"run": run, "predicted": predict(run), "measured": in_child(run), "provenance": provenance.record()}
        total, _ = simulated(line)
        print(
            number,
            run["family"],
            run["method"],
            f"{total / line['measured']['bytes'] - 1:+.1%} before constants",
            flush=True,
        )
        with args.out.open("a") as out:
            out.write(json.dumps(line) + "\n")
        lines.append(line)
    if len(lines) >= 4:
        made = report(lines)
        if args.write:
            stored = json.loads(CONSTANTS.read_text())
            kind = "cpu" if lines[0]["measured"]["device"] == "cpu" else "accelerator"
            stored[kind] = {
                **made,
                "measured": f"{len(lines)} runs on {lines[0]['measured']['device']}, benchmarks/plan_error.py",
            }
            CONSTANTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
