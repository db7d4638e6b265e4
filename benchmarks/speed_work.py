"""What `speed.py` trains: four kinds of work, each a base and rows, all made on this machine without a hub.

For accelerators there are also the shapes of `speed_shapes.py`.

(a) `reviews`: SmolLM2-135M on movie reviews with their natural lengths; the answer is one word.
(b) `answers`: the same model on questions with answers of 100–400 tokens: the documentation of Python's standard library,
    written with the model's chat template.
(c) `mt0`: an encoder–decoder of mt0-large's shape with random weights, rows as long as the reviews, labels of 2–4 tokens.
(d) `long`: rows of 2,048 to 8,192 tokens of Python's own source code, every token but the first line learned.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import featherweight as fw
import speed_shapes
from featherweight.engine.batches import IGNORE
from featherweight.rows import Row
from featherweight.tokens import Example, writer_for

WORK = ("reviews", "answers", "mt0", "long")
LENGTHS = (2048, 4096, 8192)
BATCH = 8
REVIEWS = (10, 13, 16, 18, 20, 21, 23, 24, 26, 27, 28, 30, 31, 33, 35, 37, 39, 41, 45, 51)
"""Tokens of the reviews' prompts, 20 quantiles: for mt0's rows no model need be fetched to count them."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def base_of(work: str, dtype: str = "bfloat16", layers: int | None = None) -> fw.Base:
    """A fresh base for this work. `layers` cuts mt0 to fewer layers, for trying things out."""
    if shaped := speed_shapes.parsed(work):
        return speed_shapes.base_of(shaped)
    if work != "mt0":
        return fw.load_base(dtype=dtype)
    from transformers import MT5Config, MT5ForConditionalGeneration

    layers = layers or 24
    config = MT5Config(
        d_model=1024, d_ff=2816, d_kv=64, num_heads=16, num_layers=layers, num_decoder_layers=layers,
        vocab_size=250_112, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with device:
            model: Any = MT5ForConditionalGeneration(config)
            head = torch.nn.Parameter(torch.randn(250_112, 1024) * 0.02, requires_grad=False)
    finally:
        torch.set_default_dtype(before)
    model.lm_head.weight = head  # mt0's own head; transformers ties it
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # as `load_base` does; the rivals choose their own
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    return fw.Base(model.eval(), tokenizer, "mt0-large's shape, random weights", device)


def rows_of(work: str, base: fw.Base, n: int, seed: int = 0) -> list[Example]:
    """`n` rows in random order (for `long`: one of each length, in turn)."""
    if shaped := speed_shapes.parsed(work):
        return speed_shapes.rows_of(shaped, base, n, seed)
    rng = random.Random(seed)
    if work == "reviews":
        task = fw.load_task("movie-reviews")
        return writer_for(base, None, task.labels).examples(rng.sample(task.train, n))[0]
    if work == "mt0":
        return [_translated(rng) for _ in range(n)]
    if work == "answers":
        return rng.sample(_answers(base), n)
    return [_source(base, LENGTHS[i % len(LENGTHS)], rng) for i in range(n)]


def rows_a_step(work: str) -> int:
    """Rows of a batch."""
    if shaped := speed_shapes.parsed(work):
        return shaped.batch
    return 1 if work == "long" else BATCH


def batches_of(work: str, base: fw.Base, steps: int, *, by_length: bool = False) -> list[list[Example]]:
    """The rows of each step."""
    size = rows_a_step(work)
    rows = rows_of(work, base, steps * size)
    if by_length:
        rows.sort(key=lambda e: len(e.ids))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return batches[::2] + batches[1::2][::-1] if by_length else batches


def _translated(rng: random.Random) -> Example:
    """Random words, as many as a review has: the base is random too, so what counts is the lengths."""
    ids = [rng.randrange(2, 250_000) for _ in range(rng.choice(REVIEWS))] + [1]
    return Example(
        ids, [rng.randrange(2, 250_000) for _ in range(rng.choice((1, 2, 3)))] + [1], ids, Row((), "", "random")
    )


def _answers(base: fw.Base) -> list[Example]:
    """Functions and classes of the standard library and what their documentation says, 100–400 tokens."""
    writer, found = writer_for(base, None), {}
    for module in pkgutil.iter_modules():
        if module.name not in sys.stdlib_module_names or module.name in ("antigravity", "this", "idlelib", "test"):
            continue
        try:
            loaded = importlib.import_module(module.name)
        except Exception:  # a module of another system
            continue
        for name, thing in sorted(vars(loaded).items()):
            text = inspect.getdoc(thing) if callable(thing) or inspect.isclass(thing) else None
            if text and not name.startswith("_") and 100 <= len(writer.plain(text)) <= 400:
                found[text] = f"What does {name} of Python's module {module.name} do?"
    rows = [
        Row(
            spans=(("", False), (text, True)), answer=text, place=question,
            messages=({"role": "user", "content": question}, {"role": "assistant", "content": text}),
        )
        for text, question in sorted(found.items())
    ]  # fmt: skip
    return writer.examples(rows)[0]


def _source(base: fw.Base, length: int, rng: random.Random) -> Example:
    """A stretch of the standard library's source code, exactly `length` tokens read."""
    files = sorted(Path(inspect.__file__).parent.glob("*.py"), key=lambda f: -f.stat().st_size)
    text = rng.choice(files[:30]).read_text(encoding="utf-8")
    ids = writer_for(base, None).plain(text)[: length + 1]
    ids += ids[: length + 1 - len(ids)]
    return Example(ids, [IGNORE] * 16 + ids[16:], ids[:16], Row((), "", "source"))
