"""Before `train` or `compare` loads anything: does it fit — and where `--memory` says how much there is, with which tricks?

Without `--memory` only what certainly does not fit is refused, with what would; what is uncertain is tried, because the run
protects itself (it rehearses its largest batch, and reads fewer rows at a time where memory runs out).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapter import attach
from ..base import DTYPES, Base, load_tokenizer, pick_device, pick_dtype, skeleton
from ..config import CompareConfig, TrainConfig, TrainingConfig
from ..contenders import Contender
from ..encoder import is_encoder
from ..engine.memory import left_bytes, resident_bytes
from ..engine.train import Settings, heaviest
from ..errors import InputError
from ..full import FullFineTuning
from ..method import Method
from ..progress import note
from ..quantise import KINDS, stored_kind
from ..task import Task
from ..tokens import Example, writer_for
from ..vocabulary import keep_on_host
from .cards import read_bytes
from .estimate import Plan, Target, Tricks, choose, choose_for_all, consider, sets_for
from .imagine import packs

GIB = 2**30


def before_the_run(
    config: TrainConfig, shape: Any, task: Task, method: Method, settings: Settings
) -> tuple[TrainConfig, Settings]:
    """The configuration and settings to train with. Raises `InputError` where the run cannot fit."""
    device = pick_device(config.device)
    left, limit = left_bytes(device), settings.memory
    room = None if left is None else left + (resident_bytes() if device.type == "cpu" else 0)
    if limit is not None:
        room = limit if room is None else min(limit, room)
    if room is None:
        return config, settings
    base, examples = _as_tokens(config, shape, task, [method])
    rows = heaviest(examples, settings, packs(shape, settings.packing))
    given = _given(config, shape, task)
    if limit is None and _plainly_fits(base, rows, given["dtype"], room):
        return config, settings
    target = Target("this machine", room, cpu=device.type == "cpu")
    asked = asked_tricks(config, shape)
    plan = consider(shape, method, settings, rows, target, asked, **given)
    if limit is None and plan.low <= room:
        return config, settings
    if plan.fits(room) and plan.micro == settings.batch_size:
        note(f"plan: about {_gib(plan.bytes)}, at most {_gib(plan.high)}, of {_gib(room)}: it fits as it is")
        return config, settings
    sets = _within_reach(target, asked, shape, given["labels"], [method]) or [asked]
    found = choose(shape, [method], settings, rows, room, cpu=target.cpu, sets=sets, **given)
    if not found.fits(room):
        raise InputError(
            f"{method.title} on {config.model} does not fit into {_gib(room)}: the least it needs is about {_gib(found.bytes)}, at most "
            f"{_gib(found.high)}, with one row at a time and {found.flags or 'no trick'}; shorten rows with --max-length, take a smaller "
            f"model, or more memory"
        )
    if limit is None:
        raise InputError(
            f"{method.title} on {config.model} needs about {_gib(plan.bytes)} even with one row at a time, and {_gib(room)} are free; "
            f"this would fit ({_gib(found.bytes)}): {found.flags} — or --memory {room // 2**20}MB, which chooses by itself"
        )
    return _as(found, config, settings, room, plan)


def before_the_comparison(
    config: CompareConfig, shape: Any, task: Task, who: Sequence[Contender], settings: Settings
) -> tuple[CompareConfig, dict[str, int]]:
    """The configuration to compare with within `--memory`, and how many rows at a time each contender reads, by name. `settings` are
    those that all share.

    All get the same tricks, else a table would compare those too. What `--memory` says decides alone, not what is left at the moment:
    the same command makes the same choice, and goes on with the rows that it has.
    """
    found = [c for c in who if c.method is not None and c.kind == "method"]
    if config.memory is None or not found:
        return config, {}
    room, cpu = read_bytes(config.memory), pick_device(config.device).type == "cpu"
    _, examples = _as_tokens(config, shape, task, [c.method for c in found if c.method])
    runs = list[tuple[Method, Settings, list[Example]]]()
    for contender in found:
        own = replace(settings, batch_size=contender.batch_size or settings.batch_size)
        assert contender.method is not None
        runs.append((contender.method, own, heaviest(examples, own, packs(shape, own.packing))))
    asked = asked_tricks(config, shape)
    given = _given(config, shape, task)
    sets = _within_reach(Target("", room, cpu), asked, shape, given["labels"], [c.method for c in who if c.method]) or [
        asked
    ]
    if any(isinstance(c.method, FullFineTuning) for c in who):  # it needs the base's own weights
        sets = [t for t in sets if t.exact] or [asked]
    note(f"plan: looking for what {len(runs)} methods fit into {_gib(room)} with")
    plans = choose_for_all(shape, runs, room, sets, cpu=cpu, **given)
    tricks, micro = plans[0].tricks, {c.name: plan.micro for c, plan in zip(found, plans, strict=True)}
    least = min(micro.values())
    rows = f"{least} to {max(micro.values())}" if least < max(micro.values()) else f"{least}"
    note(f"plan: the same tricks for every method: {tricks}" + ("" if config.fill else f"; rows at a time: {rows}"))
    if not tricks.exact and asked.exact:
        note("plan: a quantised base is a little less exact; so is every row of this table")
    for plan in plans:
        if not plan.fits(room):
            note(
                f"plan: {plan.method.title} may not fit: it needs about {_gib(plan.bytes)}, at most {_gib(plan.high)}; it is tried"
            )
    if all(plan.fits(room) for plan in plans) and not config.fill:
        most = max(plans, key=lambda plan: plan.high)
        note(f"plan: {most.method.title} needs most, about {_gib(most.bytes)}, at most {_gib(most.high)}")
    return config.model_copy(update=_switched(tricks)), micro


def _as_tokens(config: TrainingConfig, shape: Any, task: Task, methods: Sequence[Method]) -> tuple[Base, list[Example]]:
    """A base without weights, and the rows that it would be trained on."""
    base = Base(skeleton(shape, task.labels or None), load_tokenizer(config.model), config.model, torch.device("cpu"))
    return base, writer_for(base, config.max_length, task.labels, methods).examples(task.train)[0]


def _given(config: TrainingConfig, shape: Any, task: Task) -> dict[str, Any]:
    """What `predict` wants to know besides."""
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else pick_dtype("auto", pick_device(config.device))
    return {"dtype": dtype, "labels": task.labels if is_encoder(shape) else None}


def asked_tricks(config: TrainingConfig, shape: Any) -> Tricks:
    """Those of a configuration, for a model of this one. A model that is stored quantised is so without being asked to."""
    stored = stored_kind(shape)
    quantize = stored if stored in KINDS else config.quantize
    return Tricks(config.checkpoint_activations, quantize, config.stream_base, config.offload_vocabulary)


def _switched(tricks: Tricks) -> dict[str, Any]:
    """A set of tricks as settings."""
    return {
        "checkpoint_activations": tricks.kept,
        "quantize": tricks.quantize,
        "stream_base": tricks.stream,
        "offload_vocabulary": tricks.vocabulary,
    }


def _within_reach(
    target: Target, asked: Tricks, shape: Any, labels: Sequence[str] | None, methods: Sequence[Method]
) -> list[Tricks]:
    """The sets of tricks that mean something there, keep what was asked for, can be had, and go with these methods."""
    sets = [t for t in sets_for(target) if _may(t, asked)]
    if any(t.vocabulary for t in sets) and not leave_vocabulary(shape, labels, methods):
        sets = [t for t in sets if not t.vocabulary]
    return sets


def leave_vocabulary(shape: Any, labels: Sequence[str] | None, methods: Sequence[Method]) -> bool:
    """Whether none of these methods trains the embeddings or the head."""
    for method in methods:
        model = skeleton(shape, labels)
        keep_on_host(model, torch.device("meta"))
        try:
            attach(model, method, encode=lambda _: [0])
        except InputError:
            return False
    return True


def _may(tricks: Tricks, asked: Tricks) -> bool:
    """Whether this set keeps what was asked for, and can be had."""
    if tricks.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        return False
    pairs = ((asked.kept, tricks.kept), (asked.quantize, tricks.quantize), (asked.stream, tricks.stream))
    return asked.vocabulary <= tricks.vocabulary and all(wanted in ("none", had) for wanted, had in pairs)


def _as(plan: Plan, config: TrainConfig, settings: Settings, room: int, asked: Plan) -> tuple[TrainConfig, Settings]:
    """The plan as configuration and settings: the same rows for each update, fewer at a time. `asked` is the plan for an update as
    it was asked for: what is computed again costs time on every machine, whatever its rates."""
    pieces = -(-settings.batch_size // plan.micro) * settings.accumulate
    longer = plan.operations / asked.operations
    price = f"; an update computes {longer:.1f} times as much as without a limit" if longer >= 1.05 else ""
    exact = plan.tricks.quantize == asked.tricks.quantize
    note(
        f"plan: {plan.micro} rows at a time, {pieces} such piece{'s' * (pieces > 1)} for an update; tricks: {plan.tricks}\n"
        f"plan: that is the quickest within {_gib(room)}; it needs about {_gib(plan.bytes)}, at most {_gib(plan.high)}{price}\n"
        + (
            "plan: the result is that of the whole batch at once"
            if exact
            else "plan: a quantised base is a little less exact; its adapter loads on the full one too"
        )
        + (
            "\nplan: the peak that is shown will be higher: the system counts pages of the model's file too, which it can take back"
            if plan.tricks.stream == "disk"
            else ""
        )
    )
    chosen = replace(settings, checkpoint_activations=plan.tricks.kept, micro_batch=plan.micro)
    return config.model_copy(update={**_switched(plan.tricks), "micro_batch": plan.micro}), chosen


def _plainly_fits(base: Base, rows: list[Example], dtype: torch.dtype, room: int) -> bool:
    """Whether it would fit several times over, so that planning is not worth its seconds: a coarse upper bound."""
    numbers = sum(p.numel() for p in base.model.parameters())
    text = base.model.config if base.encoder_decoder else base.model.config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or 4 * text.hidden_size
    layers = text.num_hidden_layers * (2 if base.encoder_decoder else 1)
    tokens = len(rows) * max(len(e.ids) + len(e.targets) for e in rows)
    activations = tokens * layers * (40 * text.hidden_size + 8 * inner) * dtype.itemsize
    return 2 * (numbers * dtype.itemsize + activations) + 2 * GIB < room


def _gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB"
