"""A training step without numbers: how much memory it needs, by part, and how much work it is.

Nothing is estimated by a formula. The model is built from its configuration with tensors that have a shape and no numbers
(torch's fake tensors), the method is attached, and the very code of `fit` runs on them: the same batches, lean layers,
attention, loss, checkpointing, clipping and optimiser. A `Follower` watches what is alive. So a plan follows the engine,
whatever is changed there.

A deep model is simulated at two small depths: at the highest point of each phase of a step (forward, backward, update),
the bytes of each part grow by the same amount with every layer, so the rest of the line is drawn. Where the count of
parameters says that layers are not alike, all of them are simulated.

What is not in it: the process itself, the device's context, what a matrix library takes for itself. `estimate` adds those.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapter import attach, trainable
from ..attention import rows_apart
from ..base import Base, skeleton
from ..calls import cache_name
from ..encoder import is_encoder, own_labels
from ..engine.batches import readable
from ..engine.lean import lean
from ..engine.optimizers import STATE_BYTES
from ..engine.train import Settings, training
from ..engine.update import Learner
from ..method import Method
from ..methods.options import build_method
from ..rows import Row
from ..scoring import NEW_TOKENS, first_token_scores, label_scores, room_for
from ..tokens import Example
from ..vocabulary import waiting_at
from .follow import Follower, Work
from .imagine import as_on, at_depth, depth_of, entered, imagined, packs, period_of, tiny, without_numbers
from .packed import Packed

Evaluation = Literal["none", "labels", "texts"]
GRAIN = 512  # bytes: an accelerator's allocator rounds up to it
SHALLOW = 2  # layers of the smaller of two simulations; the other has twice as many


@dataclass(frozen=True)
class Peaks:
    """Bytes of every part at the highest point of each phase of a step, and the work of one update."""

    phases: dict[str, dict[str, int]]
    work: Work
    parameters: int
    trained: int

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of every part where most is needed."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))

    @property
    def bytes(self) -> int:
        """All parts together, where most is needed."""
        return sum(self.parts.values())


@dataclass(frozen=True, eq=False)
class Question:
    """What is to be simulated: one update on these rows, or an evaluation of them."""

    config: Any
    method: Method
    settings: Settings
    rows: Sequence[Example]
    dtype: torch.dtype = torch.bfloat16
    quantize: str = "none"
    cpu: bool = True
    """Else an accelerator: its allocator's grain, larger pieces of the head, and fused attention, for which the CPU's kernel
    stands in (it keeps the same)."""
    micro: int | None = None
    """Rows read at a time."""
    labels: Sequence[str] | None = None
    evaluation: Evaluation = "none"
    vocabulary_on_host: bool = False
    """Embeddings and head are not on the device; a table of words and the head's pieces are."""
    whole: bool = False
    """Every layer is simulated, however many there are."""

    @functools.cached_property
    def words(self) -> str:
        """The question in full: two with the same words have the same answer."""
        told = [getattr(self, f.name) for f in fields(self) if f.name != "config"]
        return repr([type(self.config), self.config.to_json_string(use_diff=False), *told])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)


def simulate(config: Any, method: Method, settings: Settings, rows: Sequence[Example], **how: Any) -> Peaks:
    """Peak memory and work of one update on these rows, or of evaluating them. `how` are the further fields of `Question`.

    What was asked before is remembered: sets of tricks that differ in where weights wait, and choices among the same sets,
    need one simulation.
    """
    return _answer(Question(config, method, settings, list(rows), **how))


@functools.lru_cache(maxsize=64)
def _answer(asked: Question) -> Peaks:
    config = asked.config
    depth, shallow = depth_of(config), max(SHALLOW, period_of(config))
    if asked.whole or depth is None or depth <= 2 * shallow or not _layers_alike(config, depth, shallow):
        return _at(asked, config)
    one, two = (_at(asked, at_depth(config, n * shallow)) for n in (1, 2))
    return _line(one, two, depth / shallow - 1)


def _at(asked: Question, config: Any) -> Peaks:
    """The answer for this model, which may be a shallower one."""
    settings, method = asked.settings, asked.method
    kept, paged = STATE_BYTES.get(settings.optimizer, 0), settings.optimizer.startswith("paged")
    if kept:  # bitsandbytes' optimisers look at numbers: their states are added up instead
        settings = replace(settings, optimizer="sgd")
    base = imagined(
        config, method, dtype=asked.dtype, quantize=asked.quantize, labels=asked.labels, on_cpu=asked.cpu, steps=settings.steps,
        vocabulary_on_host=asked.vocabulary_on_host,
    )  # fmt: skip
    follower, packing = Follower(1 if asked.cpu else GRAIN), packs(config, settings.packing)
    with as_on(follower, cpu=asked.cpu, offload=settings.checkpoint_activations == "offload"):
        if asked.evaluation == "labels":
            watch_scoring(base, asked.rows, follower, packing)
        elif asked.evaluation == "texts":
            watch_writing(base, asked.rows, follower)
        else:
            micro = asked.micro or settings.batch_size
            watch_update(base, settings, asked.rows, follower, packing, micro, foreach=not asked.cpu)
    parameters = {id(p): p.numel() for p in base.model.parameters()}
    trained = sum(p.numel() for p in trainable(base.model))
    phases = follower.peaks()
    for parts in phases.values():
        parts.pop("host", None)
    for parts in phases.values() if kept else ():  # and copied twice, as all that an update changes
        parts["optimiser"] = parts.get("optimiser", 0) + kept * trained
        if not paged:
            parts["copies"] = parts.get("copies", 0) + 2 * kept * trained
    return Peaks(phases, follower.work, sum(parameters.values()), trained)


def _layers_alike(config: Any, depth: int, shallow: int) -> bool:
    """Whether the number of parameters grows evenly with the depth."""
    kind: Any = type(config)
    return _grows_evenly(kind, config.to_json_string(use_diff=False), depth, shallow)


@functools.lru_cache(maxsize=8)
def _grows_evenly(kind: Any, written: str, depth: int, shallow: int) -> bool:
    config = kind.from_dict(json.loads(written))
    labels = own_labels(config) if is_encoder(config) else None
    counts = [
        sum({id(p): p.numel() for p in skeleton(at_depth(config, n), labels).parameters()}.values())
        for n in (shallow, 2 * shallow, depth)
    ]
    even = counts[0] + (counts[1] - counts[0]) * (depth / shallow - 1)
    return abs(even - counts[2]) < 0.001 * counts[2]


def _line(one: Peaks, two: Peaks, times: float) -> Peaks:
    """What lies `times` as far from `one` as `two` does."""

    def further(a: int, b: int) -> int:
        return round(a + (b - a) * times)

    phases = {
        phase: {part: further(one.phases[phase].get(part, 0), n) for part, n in parts.items()}
        for phase, parts in two.phases.items()
    }
    work = Work({kind: max(0, further(one.work[kind], two.work[kind])) for kind in one.work | two.work})
    return Peaks(phases, work, further(one.parameters, two.parameters), further(one.trained, two.trained))


def watch_update(
    base: Base,
    settings: Settings,
    rows: Sequence[Example],
    follower: Follower,
    packing: bool,
    micro: int,
    *,
    foreach: bool = False,
) -> None:
    """Follow one update as it is in the middle of a run: the optimiser has its states, and two copies to go back to.

    The base may be real. `foreach`: the optimiser works on all tensors together, as it does on an accelerator.
    """
    pieces = [list(rows[i : i + micro]) for i in range(0, len(rows), micro)]
    heavy = max(pieces, key=lambda piece: sum(len(e.ids) + len(e.targets) for e in piece))
    some = [heavy] * min(2, settings.accumulate * len(pieces))  # in the second the gradients of the first are there
    with training(base, settings, packing) as tensors, entered(base), _telling(base, follower), follower:
        learner = Learner(base, settings, without_numbers(base, tensors, follower.mark))
        learner.micro = micro
        _first_step(learner, foreach)
        follower.mark([v for s in learner.optimizer.state.values() for v in s.values() if _is_tensor(v)], "optimiser")
        follower.part = "copies"
        learner.before, before = learner.state(), learner.state()
        follower.part = "activations"
        follower.start()
        learner.gradients(some)
        learner.before = before
        follower.phase = "update"
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
    share = settings.accumulate * len(pieces) / len(some)
    follower.work = Work({kind: round(n * share) for kind, n in follower.work.items()})


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _first_step(learner: Learner, foreach: bool) -> None:
    """Let the optimiser make its states."""
    for group in learner.optimizer.param_groups:
        if foreach and "foreach" in group:
            group["foreach"] = True
    for p in learner.parameters:
        p.grad = torch.zeros_like(p)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def watch_scoring(base: Base, rows: Sequence[Example], follower: Follower, packing: bool, labels: int = 2) -> None:
    """Follow the scoring of labels of one token each on these rows, as `evaluate` does it."""
    words = [[i] for i in range(labels)]
    base.model.eval()
    apart = rows_apart(base.model) if packing else nullcontext()
    with lean(base.model), apart, entered(base), _telling(base, follower), follower:
        follower.start()
        if packing:
            first_token_scores(base, rows, words)
        else:
            label_scores(base, rows, words)


@torch.no_grad()
def watch_writing(base: Base, rows: Sequence[Example], follower: Follower, new_tokens: int = NEW_TOKENS) -> None:
    """Follow what `generate` does that needs most: reading the prompts of these rows, and writing the last of `new_tokens` tokens, when
    keys and values of all others are kept.
    """
    model, prompts = base.model.eval(), [row.prompt for row in rows]
    with lean(model), entered(base), _telling(base, follower), follower:
        follower.start()
        given = readable(base, prompts)
        mask = given["attention_mask"]
        new_tokens, last = room_for(base, mask.shape[1], new_tokens), mask.new_ones(len(rows), 1)
        if base.encoder_decoder:
            given = {"encoder_outputs": model.get_encoder()(**given), "attention_mask": mask}
            out = model(**given, decoder_input_ids=last, use_cache=True)
        else:
            out = model(**given, use_cache=True, logits_to_keep=1)
        name = cache_name(out)
        assert name is not None  # it was asked for
        cache = out[name]
        del out
        _lengthen(cache, max(0, new_tokens - 2))
        if base.encoder_decoder:
            model(**given, decoder_input_ids=last, use_cache=True, **{name: cache})
        else:
            mask = torch.cat([mask, mask.new_ones(len(rows), max(1, new_tokens - 1))], 1)
            place = {"position_ids": mask.cumsum(1)[:, -1:] - 1} if "position_ids" in given else {}
            model(input_ids=last, attention_mask=mask, use_cache=True, **place, **{name: cache})


def _lengthen(cache: Any, tokens: int) -> None:
    """Have a cache hold so many tokens more; a layer with a window, as many as it keeps."""
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        if getattr(layer, "keys", None) is None:  # a layer that keeps a state of its own
            continue
        window = getattr(layer, "sliding_window", None)
        more = min(tokens, max(0, window - 1 - layer.keys.shape[2])) if window else tokens
        for kind in ("keys", "values"):
            kept = getattr(layer, kind)
            setattr(layer, kind, torch.cat([kept, kept[:, :, :1].expand(-1, -1, more, -1)], 2))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length += tokens


@contextmanager
def _telling(base: Base, follower: Follower) -> Iterator[None]:
    """Inside, the follower is told what tensors are for."""
    model, own = base.model, trainable(base.model)
    buffers = [b for path, b in model.named_buffers() if ".parts." in f".{path}"]
    follower.mark([*model.parameters(), *model.buffers()], "weights")
    follower.mark([*own, *buffers], "adapter")
    hooks = [p.register_post_accumulate_grad_hook(lambda p: follower.mark([p.grad], "gradients")) for p in own]

    def says(part: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            follower.part = part

        return hook

    hooks.append(model.register_forward_pre_hook(says("activations")))
    if (head := model.get_output_embeddings() if model.can_generate() else None) is not None:
        hooks.append(head.register_forward_pre_hook(says("loss")))
    for module in model.modules():
        if isinstance(module, Packed):
            module.told = follower.mark
        if (waiting := waiting_at(module)) is not None:
            follower.mark([waiting.weight], "host")
            follower.mark([waiting.table] if isinstance(module, nn.Embedding) else [], "weights")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def a_tiny_update(config: Any, device: torch.device) -> tuple[Base, Work, Callable[[], Any]]:
    """A small real base of this architecture, the work of an update of it, and a function that does it: all overhead."""
    base = tiny(config, device)
    attach(base.model, build_method("lora", {"target_modules": "all-linear"}))
    labels = [0] if base.classifies else [2] * 8
    rows = [Example([3, 4, 5, 6, 7, 8, 9, 10], labels, [3], Row((), "", "tiny"))] * 2
    settings, packing, follower = Settings(batch_size=2), packs(config, None), Follower()

    def update() -> None:
        with training(base, settings, packing) as tensors:
            learner = Learner(base, settings, tensors)
            learner.gradients([rows])
            learner.optimizer.step()

    update()  # what an accelerator's kernels are tried with, once, is no work of an update
    watch_update(base, settings, rows, follower, packing, 2)
    return base, follower.work, update
