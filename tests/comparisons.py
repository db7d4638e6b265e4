"""Made-up comparisons for what is drawn and written about them: runs with answers, losses and memory, nothing trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.results import Line, read

LABELS = ("negative", "neutral", "positive")
MACHINE = "AMD EPYC, 2 cores, 24 GiB"
TESTED = "1a2b3c4d5e6f"
MIB = 2**20
METHODS = (
    # name, what the table calls it, accuracy, trainable parameters, MiB, seconds of 100 steps
    ("lora", "LoRA", 0.837, 460_800, 1213, 47.6),
    ("lora:r=64", "LoRA (r=64)", 0.846, 3_686_400, 1262, 55.1),
    ("adalora", "AdaLoRA", 0.835, 691_320, 1233, 52.4),
    ("prompt_tuning", "Prompt Tuning", 0.812, 11_520, 1361, 54.6),
    ("p_tuning", "P-Tuning", 0.798, 176_192, 1425, 64.2),
    ("prefix_tuning", "Prefix-Tuning", 0.826, 230_400, 1456, 60.7),
    ("prefix_tuning:num_virtual_tokens=50", "Prefix-Tuning (num_virtual_tokens=50)", 0.815, 576_000, 1502, 66.9),
    ("ia3", "(IA)³", 0.852, 57_600, 1465, 56.8),
)


def rows(n: int = 200) -> list[dict[str, str]]:
    """Rows that were tested on."""
    answers = _answers(n)
    return [
        {"text": f"Review {i}: a film that is {answer} in its way.", "answer": answer, "place": f"test.csv:{i + 2}"}
        for i, answer in enumerate(answers)
    ]


def _answers(n: int) -> list[str]:
    return [LABELS[0] if i % 20 < 9 else LABELS[1] if i % 20 < 11 else LABELS[2] for i in range(n)]


def line(
    name: str,
    title: str,
    accuracy: float,
    trainable: int = 1000,
    mib: int = 1000,
    seconds: float = 50.0,
    *,
    seed: int = 0,
    n: int = 200,
    **more: Any,
) -> Line:
    """One run of a method that answers so many of the rows right; the same rows are hard for all."""
    rng = np.random.default_rng([seed, *name.encode()])
    hard = np.random.default_rng(1).normal(size=n)
    right = hard + 0.5 * rng.normal(size=n) < np.quantile(hard + 0.5 * rng.normal(size=n), accuracy)
    answers = _answers(n)
    given = [
        a if r else LABELS[(LABELS.index(a) + 1 + int(rng.integers(2))) % 3]
        for a, r in zip(answers, right, strict=True)
    ]
    steps = 100
    losses = [0.35 + 3.5 * math.exp(-i / (8 + len(name) % 7)) + 0.15 * abs(float(rng.normal())) for i in range(steps)]
    told: dict[str, Any] = {
        "name": name, "method": title, "seed": seed, "batch_size": 8, "lr": 1e-3, "total_params": 134_515_008 + trainable,
        "trainable_params": trainable, "train_steps": steps, "train_examples": 800, "train_tokens": 41_000, "eval_batches": n // 32 + 1,
        "eval_examples": n, "eval_tokens": 60 * n, "load_seconds": 0.6, "tokenise_seconds": 0.3,
        "train_seconds": seconds + float(rng.normal()), "eval_seconds": 12.2, "whole_seconds": seconds + 20, "peak_bytes": mib * MIB,
        "before_bytes": 700 * MIB, "eval_peak_bytes": 900 * MIB, "host_bytes": mib * MIB, "weights_bytes": 269 * MIB,
        "adapter_bytes": 4 * trainable + 2000, "predicted_bytes": (mib + 40) * MIB,
        "predicted_interval": ((mib - 60) * MIB, (mib + 160) * MIB), "memory_over_step": _step(mib, seconds), "correct": int(right.sum()),
        "accuracy": float(right.mean()), "interval": (accuracy - 0.05, min(1.0, accuracy + 0.05)), "macro_f1": accuracy - 0.2,
        "general_loss": 3.1 + trainable / 2e7, "losses": losses, "predictions": given, "right": [bool(r) for r in right],
        "tested": TESTED, "identity": f"{name}-{seed}", "provenance": provenance(),
    }  # fmt: skip
    return Line(**(told | more))


def provenance(machine: str = MACHINE) -> dict[str, Any]:
    """As a run tells where it comes from."""
    return {
        "command": "featherweight compare --seeds 3", "date": "2026-11-27", "machine": machine, "device": "cpu", "dtype": "torch.bfloat16",
        "versions": {"python": "3.11.7", "featherweight": "0.1.0", "torch": "2.13.0+cpu"},
        "base": "SmolLM2-135M", "settings": {"model": "SmolLM2-135M", "data": "movie-reviews", "steps": 100},
        "hashes": {"base": "0123456789ab", "data": "ba9876543210"},
    }  # fmt: skip


def _step(mib: int, seconds: float) -> list[tuple[float, int]]:
    whole = seconds / 100
    up = [(whole * t / 40, 700 + (mib - 700) * math.sin(math.pi * min(1.0, t / 40)) ** 0.8) for t in range(41)]
    return [(at, int(held * MIB)) for at, held in up]


def untouched(**more: Any) -> Line:
    """The model as it is."""
    return _reference("untouched", "untouched model", 0.70, **more)


def majority(**more: Any) -> Line:
    """The most frequent answer, always."""
    given = {"predictions": [LABELS[0]] * 200, "right": [a == LABELS[0] for a in _answers(200)]}
    return _reference(
        "majority",
        "majority class",
        0.45,
        **(given | {"peak_bytes": 0, "before_bytes": 0, "general_loss": None} | more),
    )


def full(seed: int = 0, **more: Any) -> Line:
    """Full fine-tuning."""
    return line("full", "full fine-tuning", 0.86, 134_515_008, 2350, 120.0, seed=seed, kind="reference", **more)


def _reference(name: str, title: str, accuracy: float, **more: Any) -> Line:
    own = {
        "kind": "reference", "train_steps": 0, "train_examples": 0, "train_tokens": 0, "train_seconds": 0.0, "lr": 0.0, "losses": [],
        "memory_over_step": [], "adapter_bytes": None, "predicted_bytes": None, "predicted_interval": None, "trainable_params": 0,
        "general_loss": 3.1,
    }  # fmt: skip
    return line(name, title, accuracy, 0, 700, 0.0, **(own | more))


def comparison(seeds: int = 3, *, methods: Sequence[tuple[str, str, float, int, int, float]] = METHODS) -> list[Line]:
    """All methods with so many seeds, the untouched model, the majority class, and full fine-tuning."""
    runs = [line(*method, seed=seed) for seed in range(seeds) for method in methods]
    return [*runs, *(full(seed) for seed in range(seeds)), untouched(), majority()]


def diverged(**more: Any) -> Line:
    """A run that broke in the middle: its losses are not finite from step 41 on."""
    broken = [2.0 - i / 50 for i in range(40)] + [None] * 60
    return line("lora:r=1", "LoRA (r=1)", 0.4, 57_000, 1200, 46.0, losses=broken, stopped="diverged", **more)


def stored() -> list[Line]:
    """A comparison of an earlier version that is kept in the repository: its rows know less than today's."""
    return read(Path(__file__).parent.parent / "benchmarks/results/encoder")
