"""From a simulation to a promise: what the simulation cannot see, an interval, and the choice among tricks.

A simulated peak lacks the process itself, what a matrix library takes for its copies, and the allocator's gaps. `constants.json`
has a figure for each, for CPUs and for accelerators, found by `benchmarks/plan_error.py` on one half of its configurations. The
interval is of these figures (`unseen_error`): what is simulated is right within a few per cent, what is not seen may be half or
several times as much. Where nothing has been measured yet, it says so (`measured` is null) and the interval is a wide guess:
±15 % of all memory.

Something fits where the upper end of the interval does.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from ..attention_blocks import seats_of
from ..base import skeleton
from ..encoder import is_encoder, own_labels
from ..engine.train import Settings, batches
from ..method import Method
from ..stream import find_blocks
from ..tokens import Example
from .cards import find_card
from .clock import ORDINARY_CPU, Rates, rates_of, seconds
from .imagine import packs
from .packed import pack_weights
from .simulate import Evaluation, Peaks, simulate

SHARED = ("activations", "loss", "workspace")  # what libraries and allocators take more of, in proportion
KEPT_LAYOUTS = seats_of.cache_info().maxsize or 0  # attention keeps the places of so many batches' rows


@dataclass(frozen=True)
class Tricks:
    """A set of tricks that save memory."""

    kept: str = "none"
    """`Settings.checkpoint_activations`."""
    quantize: str = "none"
    stream: str = "none"
    """Where the base's layers are brought in from: `none`, `ram` or `disk`."""
    vocabulary: bool = False
    """Embeddings and head stay on the host."""

    @property
    def exact(self) -> bool:
        """Whether the result is what it would be without."""
        return self.quantize == "none"

    @property
    def whole(self) -> bool:
        """Whether the base is there in full, and as it is."""
        return self.exact and self.stream == "none" and not self.vocabulary

    @property
    def number(self) -> int:
        """How many are switched on."""
        return sum(way != "none" for way in (self.kept, self.quantize, self.stream)) + self.vocabulary

    def __str__(self) -> str:
        told = [self.quantize] * (self.quantize != "none") + [f"checkpoint {self.kept}"] * (self.kept != "none")
        told += [f"stream {self.stream}"] * (self.stream != "none") + ["host vocabulary"] * self.vocabulary
        return " + ".join(told) or "none"


TRICKS = (
    Tricks(), Tricks("layer"), Tricks("offload"), Tricks("none", "nf4"), Tricks("layer", "nf4"), Tricks("layer", "int8"),
    Tricks("layer", vocabulary=True), Tricks("layer", "nf4", vocabulary=True), Tricks("layer", "none", "ram"),
    Tricks("layer", "nf4", "ram"), Tricks("layer", "nf4", "ram", vocabulary=True),
)  # fmt: skip
# Bytes a second from the host's memory to a card (PCIe 4.0, 8 lanes), and from a disk: guesses, not measured.
LINK, DISK = 12e9, 2e9


@dataclass(frozen=True)
class Target:
    """Where it is to run. Without `rates` there is no prediction of time."""

    name: str
    memory_bytes: int
    cpu: bool
    rates: Rates | None = None


@dataclass(frozen=True)
class Plan:
    """A prediction: bytes by part (the process included), their sum with its interval, and seconds of an update."""

    method: Method
    tricks: Tricks
    micro: int
    parts: dict[str, int]
    low: int
    high: int
    seconds: float | None
    parameters: int
    trained: int
    operations: float
    """Floating-point operations of an update, known without any rates."""

    @property
    def bytes(self) -> int:
        """What is needed, all in all."""
        return sum(self.parts.values())

    def fits(self, memory_bytes: int) -> bool:
        """Whether it does even at the upper end of the interval."""
        return self.high <= memory_bytes

    @property
    def flags(self) -> str:
        """What to tell `featherweight train`, beyond what it was told."""
        told = f"--checkpoint-activations {self.tricks.kept} " * (self.tricks.kept != "none")
        told += f"--quantize {self.tricks.quantize} " * (not self.tricks.exact)
        told += f"--stream-base {self.tricks.stream} " * (self.tricks.stream != "none")
        return (told + "--offload-vocabulary" * self.tricks.vocabulary).strip()


@functools.cache
def constants() -> dict[str, Any]:
    """What was measured beside the simulation; see `constants.json`."""
    text = resources.files(__package__).joinpath("constants.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def completed(
    peaks: Peaks, target: Target, tricks: Tricks = Tricks(), layouts: int = 1
) -> tuple[dict[str, int], int, int]:
    """(bytes by part, lower end, upper end) with what a simulation cannot see. `layouts`: different batches in the run."""
    known = constants()["cpu" if target.cpu else "accelerator"]
    parts = {**peaks.parts}
    parts["workspace"] = parts.get("workspace", 0) + parts.pop("seats", 0) * max(1, min(KEPT_LAYOUTS, layouts))
    again = "" if tricks.kept == "none" else "_again"
    unseen = known["fixed_bytes"] + known[f"share{again}"] * sum(parts.get(part, 0) for part in SHARED)
    unseen += 0 if tricks.exact else known["quantised_bytes"]
    parts["workspace"] += round(unseen)
    growth, process = sum(parts.values()), known["process_bytes"]
    errors = zip(known["memory_error"], known[f"unseen_error{again}"], strict=True)
    low, high = (round(process + growth * (1 + all_) + unseen * of_unseen) for all_, of_unseen in errors)
    return {**parts, "process": process}, low, high


def predict(
    config: Any,
    method: Method,
    settings: Settings,
    rows: Sequence[Example],
    target: Target,
    tricks: Tricks = Tricks(),
    *,
    micro: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    labels: Sequence[str] | None = None,
    evaluation: Evaluation = "none",
) -> Plan:
    """What training on these rows (the heaviest batch of the run) needs, read `micro` at a time; or evaluating on them."""
    settings = replace(settings, checkpoint_activations=tricks.kept)
    micro = min(micro or settings.batch_size, len(rows))
    peaks = simulate(
        config, method, settings, rows, dtype=dtype, quantize=tricks.quantize, cpu=target.cpu, micro=micro,
        labels=labels, evaluation=evaluation, vocabulary_on_host=tricks.vocabulary,
    )  # fmt: skip
    pieces = -(-len(rows) // micro)
    away = fetched = 0
    if tricks.stream != "none":
        away, fetched = elsewhere(config, dtype, tricks.quantize, labels)
    kept = replace(peaks, phases={k: {**v, "weights": v["weights"] - away} for k, v in peaks.phases.items()})
    parts, low, high = completed(kept, target, tricks, settings.steps * settings.accumulate)
    known = constants()["cpu" if target.cpu else "accelerator"]
    taken = seconds(peaks.work, target.rates, known["time_scale"]) if target.rates else None
    if taken is not None and fetched:  # layers are brought in while the device computes
        taken = max(taken, fetched * pieces / (DISK if tricks.stream == "disk" else LINK))
    matrix = _matrix_bytes(config, dtype) if tricks.vocabulary else 0
    if taken is not None and not is_encoder(config):  # the head comes once a piece, and is waited for
        taken += matrix * pieces / LINK
    if not tricks.exact and not target.cpu:  # bitsandbytes quantises on the device: while loading, all of it is there
        loading = parts["process"] + peaks.parts["weights"] + 2 * matrix
        low, high = max(low, loading), max(high, loading)
    operations = sum(n * each for (each, _, _), n in peaks.work.items())
    return Plan(method, tricks, micro, parts, low, high, taken, peaks.parameters, peaks.trained, operations)


def _matrix_bytes(config: Any, dtype: torch.dtype) -> int:
    """What the embeddings take, or the head."""
    text = config if config.is_encoder_decoder else config.get_text_config()
    return int(text.vocab_size * text.hidden_size * dtype.itemsize)


def elsewhere(config: Any, dtype: torch.dtype, quantize: str, labels: Sequence[str] | None) -> tuple[int, int]:
    """(bytes of a streamed base that are not there at one time, bytes that a step brings in): two layers are there."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    model = skeleton(config, labels or (own_labels(config) if is_encoder(config) else None))
    pack_weights(model, quantize)
    layers = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in find_blocks(model)]
    return max(0, sum(layers) - 2 * max(layers)), 2 * sum(layers)


def consider(
    config: Any,
    method: Method,
    settings: Settings,
    rows: Sequence[Example],
    target: Target,
    tricks: Tricks,
    **given: Any,
) -> Plan:
    """The plan with the most rows at a time that fit; where not even one does, the plan for one."""
    whole = min(settings.batch_size, len(rows))
    plan = functools.cache(lambda n: predict(config, method, settings, rows, target, tricks, micro=n, **given))
    if plan(whole).fits(target.memory_bytes) or whole == 1 or not plan(1).fits(target.memory_bytes):
        return plan(whole) if plan(whole).fits(target.memory_bytes) else plan(1)
    n = whole
    while n > 1:  # as the engine does it when memory runs out
        n = (n + 1) // 2
        if plan(n).fits(target.memory_bytes):
            break
    return plan(n)


def sets_for(target: Target) -> Iterator[Tricks]:
    """The tricks that mean something here."""
    sets = (t for t in TRICKS if not target.cpu or (t.kept != "offload" and not t.vocabulary))
    return (replace(t, stream="disk") if target.cpu and t.stream != "none" else t for t in sets)


def rank(plan: Plan, memory_bytes: int) -> tuple[Any, ...]:
    """What fits comes first, then what is not streamed, then what is exact, then what is quick; else what needs least.

    Where times are not known, the fewest tricks count as the quickest: each of them costs time.
    """
    if not plan.fits(memory_bytes):
        return True, (), plan.high, plan.bytes
    return False, _order(plan.tricks), plan.tricks.number if plan.seconds is None else plan.seconds, plan.bytes


def _order(tricks: Tricks) -> tuple[bool, bool]:
    """Streaming last, because it is slow; of the rest, what changes a result after what does not."""
    return tricks.stream != "none", not tricks.exact


def choose(
    config: Any,
    methods: Sequence[Method],
    settings: Settings,
    rows: Sequence[Example],
    memory_bytes: int,
    *,
    cpu: bool = False,
    rates: Rates | None = None,
    sets: Sequence[Tricks] | None = None,
    **given: Any,
) -> Plan:
    """The cheapest plan that fits into this memory: the quickest of those with exact tricks, else of the others, and streaming only
    where nothing else does. Where nothing fits, the plan that needs least.

    `sets` are the tricks to choose from; by default all that mean something there.

    Without `rates`, work is compared at those of an ordinary CPU or card.
    """
    target = Target("this memory", memory_bytes, cpu, rates or _ordinary(cpu))
    plans = list[Plan]()
    for group in _in_order(list(sets_for(target) if sets is None else sets)):
        plans += [
            consider(config, method, settings, rows, target, tricks, **given) for method in methods for tricks in group
        ]
        if any(p.fits(memory_bytes) for p in plans):
            break
    return min(plans, key=lambda p: rank(p, memory_bytes))


def choose_for_all(
    config: Any,
    runs: Sequence[tuple[Method, Settings, Sequence[Example]]],
    memory_bytes: int,
    sets: Sequence[Tricks],
    *,
    cpu: bool = False,
    **given: Any,
) -> list[Plan]:
    """A plan for each run, all with one set of tricks, so that they can be compared: the quickest of the sets with which all fit, in the
    order of `choose`. Where no set lets all fit, of those that let most fit the one whose largest plan needs least.
    """
    target, found = Target("this memory", memory_bytes, cpu, _ordinary(cpu)), list[list[Plan]]()

    def misfits(plans: list[Plan]) -> int:
        return sum(not plan.fits(memory_bytes) for plan in plans)

    for group in _in_order(sets):
        found += [[consider(config, m, s, rows, target, tricks, **given) for m, s, rows in runs] for tricks in group]
        if not all(misfits(plans) for plans in found):
            break

    def cost(plans: list[Plan]) -> tuple[Any, ...]:
        most = max(plan.high for plan in plans) if misfits(plans) else 0
        return misfits(plans), most, _order(plans[0].tricks), sum(plan.seconds or 0 for plan in plans)

    return min(found, key=cost)


def _ordinary(cpu: bool) -> Rates:
    return ORDINARY_CPU if cpu else rates_of(find_card("RTX 3060"))


def _in_order(sets: Sequence[Tricks]) -> list[list[Tricks]]:
    """Those that are alike in what they cost the user, best first."""
    return [list(same) for _, same in itertools.groupby(sorted(sets, key=_order), key=_order)]


def mean_share(config: Any, examples: Sequence[Example], settings: Settings, heavy: Sequence[Example]) -> float:
    """How many tokens a batch of the run has on average, as a share of the heaviest batch's."""

    def size(rows: Sequence[Example]) -> int:
        return sum(len(e.ids) for e in rows)

    sizes = [size(rows) for rows in batches(examples, settings, packs(config, settings.packing))]
    return sum(sizes) / len(sizes) / size(heavy)
