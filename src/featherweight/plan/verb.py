"""`featherweight plan`: what to simulate, where it is to run, and the answer in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..base import DTYPES, Base, load_config, load_tokenizer, pick_device, pick_dtype, skeleton
from ..config import PlanConfig
from ..encoder import is_encoder, own_labels
from ..engine.memory import left_bytes
from ..engine.train import Settings, heaviest
from ..errors import InputError
from ..method import Method
from ..methods import METHODS
from ..methods.options import build_method
from ..prepare import NO_TEXTS, settings_of, task_of
from ..progress import bar, spell_seconds
from ..quantise import stored_kind
from ..redaction import clean
from ..rows import Row
from ..scoring import EVAL_BATCH
from ..tokens import IGNORE, Example, writer_for
from ..vocabulary import check_offloading
from .before import asked_tricks, leave_vocabulary
from .cards import find_card, read_bytes
from .clock import Rates, calibrate, rates_of
from .estimate import Plan, Target, consider, constants, mean_share, predict, rank, sets_for
from .follow import PARTS
from .imagine import packs
from .simulate import Evaluation, a_tiny_update

GIB = 2**30


def run_plan(config: PlanConfig) -> int:
    """`featherweight plan`."""
    names = list(dict.fromkeys(n.strip() for n in config.method.split(",") if n.strip()))
    if not names:
        raise InputError(f"--method names none; there are: {', '.join(METHODS)}")
    methods = [build_method(name, config.options.get(name, {})) for name in names]
    needs = "its config.json" if config.data is None else "its config.json and tokenizer"
    shape = load_config(config.model, needs)
    dtype = dtype_of(config)
    examples, tested, labels = examples_of(config, shape, methods)
    settings = settings_of(config, len(examples), lr=1e-3)
    rows = heaviest(examples, settings, packs(shape, settings.packing))
    target = target_of(config, shape, rows, dtype)
    if target.cpu and config.offload_vocabulary:
        check_offloading(torch.device("cpu"))
    share = mean_share(shape, examples, settings, rows)
    given: dict[str, Any] = {"dtype": dtype, "labels": labels}
    asked, stored = asked_tricks(config, shape), stored_kind(shape)
    first = predict(shape, methods[0], settings, rows, target, asked, **given)
    if config.metric == "exact_match" and is_encoder(shape):
        raise InputError(NO_TEXTS)
    writes = config.metric == "exact_match" or (config.data is not None and not labels)
    answers: Evaluation = "texts" if writes else "labels"
    scoring = predict(shape, methods[0], settings, tested, target, asked, evaluation=answers, **given)
    print(clean("\n".join(sentences(config.model, first, scoring, target, settings, share, rows))))
    print("\n" + parts_table(first, scoring))
    sets = [t for t in sets_for(target) if stored is None or t.quantize == asked.quantize]
    if not target.cpu and not leave_vocabulary(shape, labels, methods):
        sets = [t for t in sets if not t.vocabulary]
    pairs, plans = [(method, tricks) for method in methods for tricks in sets], list[Plan]()
    with bar("plan: a step without numbers for each set of tricks", len(pairs)) as progress:
        for method, tricks in pairs:
            plans.append(consider(shape, method, settings, rows, target, tricks, **given))
            progress.update(len(plans), f"{method.title}, {tricks}")
    plans.sort(key=lambda p: rank(p, target.memory_bytes))
    print("\n" + tricks_table(plans, target, settings, share))
    best = plans[0]
    if best.fits(target.memory_bytes):
        flags = " ".join(filter(None, (f"--method {names[methods.index(best.method)]}", best.flags)))
        print(clean(f"\nBest: featherweight train --model {config.model} {flags}"))
    return 0 if best.fits(target.memory_bytes) else 1


def dtype_of(config: PlanConfig) -> torch.dtype:
    """The base's type, as `load_base` would choose it there."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if config.gpu is not None:
        return torch.float32 if find_card(config.gpu).name.startswith("RTX 20") else torch.bfloat16
    return torch.bfloat16 if config.memory is not None else pick_dtype("auto", pick_device(config.device))


def target_of(config: PlanConfig, shape: Any, rows: Sequence[Example], dtype: torch.dtype) -> Target:
    """The card, the memory, or this machine."""
    memory = None if config.memory is None else read_bytes(config.memory)
    if config.gpu is not None:
        card = find_card(config.gpu)
        return Target(card.name, memory or card.memory_bytes, cpu=False, rates=rates_of(card))
    device = pick_device(config.device)
    here = config.device != "auto" or memory is None
    left = memory or left_bytes(device)
    if left is None:
        raise InputError("this system does not say how much memory is free: give --memory, such as --memory 12GB")
    rates: Rates | None = None
    if config.calibrate:
        tokens = sum(len(e.ids) for e in rows)
        rates = calibrate(shape, tokens, dtype, device, a_tiny_update(shape, device))
    name = "this machine" if memory is None else "this memory"
    return Target(name, left, cpu=here and device.type == "cpu", rates=rates)


def examples_of(
    config: PlanConfig, shape: Any, methods: Sequence[Method]
) -> tuple[list[Example], list[Example], list[str] | None]:
    """(rows to train on, the rows of the largest batch of the evaluation, labels): those of --data, or rows of --length."""
    if config.data is None:
        labels = own_labels(shape) if is_encoder(shape) else None
        rows = [row_of(config.length, i, shape) for i in range(max(config.batch_size, EVAL_BATCH))]
        return rows, rows[:EVAL_BATCH], labels
    if config.model.endswith(".json"):
        raise InputError("--data needs the model's tokenizer: give its folder or hub id, or leave --data out")
    task = task_of(config)
    base = Base(skeleton(shape, task.labels), load_tokenizer(config.model), config.model, torch.device("cpu"))
    writer = writer_for(base, config.max_length, task.labels, methods)
    examples, tested = writer.examples(task.train)[0], writer.examples(task.test)[0]
    tested.sort(key=lambda e: -len(e.prompt))
    return examples, tested[:EVAL_BATCH], task.labels or None


def row_of(length: int, number: int, shape: Any) -> Example:
    """A row of this many tokens, half of them an answer; rows begin differently, so that nothing is shared."""
    ids = [(7 * number + i) % 50 + 1 for i in range(length + 1)]
    if is_encoder(shape):
        return Example(ids[:length], [number % shape.num_labels], ids[:length], Row((), "", "plan"))
    if shape.is_encoder_decoder:
        return Example(ids[:length], ids[: max(1, length // 4)], ids[:length], Row((), "", "plan"))
    half = length // 2
    return Example(ids, [IGNORE] * (length + 1 - half) + ids[-half:], ids[: length + 1 - half], Row((), "", "plan"))


def sentences(
    model: str, plan: Plan, scoring: Plan, target: Target, settings: Settings, share: float, rows: Sequence[Example]
) -> list[str]:
    """The answer in three sentences."""
    longest = max(len(e.ids) for e in rows)
    known = constants()["cpu" if target.cpu else "accelerator"]
    memory = target.memory_bytes / GIB
    verdict = "fits" if plan.fits(target.memory_bytes) else "does not fit"
    if not plan.fits(target.memory_bytes) and plan.low <= target.memory_bytes:
        verdict = "may not fit"
    needs = (
        f"{plan.method.title} on {model} ({plan.parameters / 1e6:,.0f} M parameters, {plan.trained:,} trained; {plan.micro} rows of at "
        f"most {longest} tokens at a time) needs {gib(plan.bytes)} to train ({gib(plan.low)} to {gib(plan.high)}"
        f"{'' if known['measured'] else ', not measured on such a device yet'}) and {gib(scoring.bytes)} to evaluate."
    )
    return [
        needs,
        f"It {verdict} into the {memory:.1f} GiB of {target.name}.",
        f"{settings.steps} steps " + spell_time(plan, target, settings, share),
    ]


def spell_time(plan: Plan, target: Target, settings: Settings, share: float) -> str:
    """How long, and how sure that is."""
    if plan.seconds is None or target.rates is None:
        return "take a time that is not known: name a --gpu, or measure this machine with --calibrate."
    known = constants()["cpu" if target.cpu else "accelerator"]
    total = plan.seconds * share * settings.steps
    low, high = (total * (1 + e) for e in known["time_error"])
    source = "measured rates" if target.rates.measured else "the vendor's rates, not measured by us"
    span = f"{spell_seconds(low)} to {spell_seconds(high)}; {source}"
    return f"take about {spell_seconds(total)} ({span}), {plan.seconds * share:.2g} s each."


def gib(n: float) -> str:
    """1.23 GiB."""
    return f"{n / GIB:.2f} GiB"


def parts_table(plan: Plan, scoring: Plan) -> str:
    """Memory by part."""
    rows = [(part, plan.parts.get(part, 0), scoring.parts.get(part, 0)) for part in PARTS]
    rows.append(("together", plan.bytes, scoring.bytes))
    head = f"{'':12} {'training':>11} {'evaluation':>11}"
    return "\n".join([head, *(f"{part:12} {gib(a):>11} {gib(b):>11}" for part, a, b in rows)])


def tricks_table(plans: Sequence[Plan], target: Target, settings: Settings, share: float) -> str:
    """Method × tricks, best first."""
    head = f"{'method':15} {'tricks':54} {'rows at a time':>14} {'memory':>10} {'at most':>10} {'fits':>5} {'steps take':>11}"
    lines = [head]
    for p in plans:
        fits = "yes" if p.fits(target.memory_bytes) else "no"
        taken = "?" if p.seconds is None else spell_seconds(p.seconds * share * settings.steps)
        lines.append(
            f"{p.method.title:15} {p.tricks!s:54} {p.micro:>14} {gib(p.bytes):>10} {gib(p.high):>10} {fits:>5} {taken:>11}"
        )
    return "\n".join(lines)
