"""Kernels for an accelerator: what they compute, in Triton's interpreter, and when they are used, tried on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from featherweight.engine import kernels
from featherweight.engine.kernels import Way, best, choose
from featherweight.engine.lean import GATE, NORM, _RMSNorm, _SiLUGate, lean

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROWS = (torch.linspace(-3, 3, 48).view(3, 16), torch.linspace(0.5, 1.5, 16), 1e-5)


def slow(way: Way) -> Way:
    return Way(lambda *a: (time.sleep(0.002), way.forward(*a))[1], way.backward)


def twin(way: Way) -> Way:
    """Another one that does the same."""
    return Way(lambda *a: way.forward(*a), lambda *a: way.backward(*a))


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["norm", "gate"])
def test_a_kernel_computes_what_its_formula_says(name: str, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted.py"), name, dtype],
        capture_output=True, text=True, check=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [c["width"] for c in cases] == [3, 100, 576, 2048]
    for found in cases:
        assert found["same_shapes"], found
        assert all(found["agree"]), found
        for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
            # The interpreter cuts float32 off to bfloat16, where a device rounds: up to one unit in the last place, twice.
            assert ours <= (1.2e-2 if dtype == "bfloat16" else 1.5 * theirs + 1e-7), found


@needs_triton
@pytest.mark.parametrize(
    ("backend", "arch", "warp", "dtype"),
    [("cuda", 80, 32, "bf16"), ("cuda", 80, 32, "fp32"), ("cuda", 75, 32, "fp16"), ("hip", "gfx942", 64, "bf16")],
)
def test_the_compiler_takes_every_kernel_for_cards_that_are_not_here(
    backend: str, arch: Any, warp: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs Python and takes more than the compiler does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from featherweight.engine import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"eps": "fp32", "r_at": "*fp32", "n": "i32", "width": "constexpr", "block": "constexpr"}
    for program in (fused._norm_forward, fused._norm_backward, fused._gate_forward, fused._gate_backward):
        signature = {n: types.get(n, f"*{dtype}") for n in program.arg_names}
        sizes = {n: {"width": 576, "block": 1024}[n] for n, t in signature.items() if t == "constexpr"}
        source = ASTSource(program, signature, sizes)
        made = triton.compile(source, target=GPUTarget(backend, arch, warp), options={"enable_fp_fusion": True})
        assert made.asm


@needs_triton
def test_without_a_device_that_triton_knows_the_formula_is_used() -> None:
    way, reason = choose(lambda: kernels.kernel("norm"), NORM, ROWS)
    assert way is NORM
    assert "Error" in reason


def test_without_triton_the_formula_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "featherweight.engine.fused", raising=False)
    way, reason = choose(lambda: kernels.kernel("norm"), NORM, ROWS)
    assert way is NORM
    assert reason.startswith("ModuleNotFoundError")


def test_the_faster_of_two_that_agree_is_used() -> None:
    quick = twin(NORM)
    way, reason = choose(lambda: quick, slow(NORM), ROWS)
    assert way is quick
    assert float(reason.split()[3]) > 2
    way, reason = choose(lambda: slow(quick), NORM, ROWS)
    assert way is NORM
    assert float(reason.split()[3]) < 0.5


def test_a_compiler_that_fails_is_no_error() -> None:
    def no_compiler(*_: Any) -> Any:
        raise OSError("no C compiler")

    for broken in (Way(no_compiler, NORM.backward), Way(NORM.forward, no_compiler)):
        assert choose(lambda broken=broken: broken, slow(NORM), ROWS)[1] == "OSError: no C compiler"


def off_by_one_number(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[-1] += 0.1
    return t


@pytest.mark.parametrize(
    "wrong",
    [off_by_one_number, lambda t: t * torch.nan, Tensor.double, lambda t: t[:1], lambda t: 1.0001 * t],
    ids=["one number", "NaN", "type", "shape", "all a little"],
)
@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_kernel_that_is_wrong_is_not_used_however_fast(half: str, wrong: Callable[[Tensor], Tensor]) -> None:
    def bad(*given: Any) -> tuple[Tensor, ...]:
        first, *rest = getattr(NORM, half)(*given)
        return (wrong(first), *rest)

    formula = slow(NORM)
    way, reason = choose(lambda: NORM._replace(**{half: bad}), formula, ROWS)
    assert way is formula
    assert reason == "the kernel's numbers are not the formula's" or "Error" in reason


@pytest.mark.parametrize("dtype", kernels.AGREE)
def test_rounding_is_agreement(dtype: torch.dtype) -> None:
    x, w, eps = ROWS
    exact = Way(
        lambda x, w, eps: tuple(t.to(x.dtype) for t in NORM.forward(x.double(), w.double(), eps)),
        lambda *given: tuple(t.to(x.dtype) for t in NORM.backward(*(t.double() for t in given))),
    )
    x = x.to(dtype)
    assert choose(lambda: exact, slow(slow(NORM)), (x, w.to(dtype), eps))[0] is exact


def test_a_trial_leaves_the_numbers_at_hand_and_the_generator_alone() -> None:
    x, up = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    before, state = (x.clone(), up.clone()), torch.get_rng_state()
    choose(lambda: twin(GATE), GATE, (x, up))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before[0])
    assert torch.equal(up, before[1])


@pytest.fixture
def as_if_accelerated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU counts as an accelerator, for which there are kernels. What is used of them, one after the other."""
    used: list[str] = []

    def kernel(name: str) -> Way:
        way = {"norm": NORM, "gate": GATE}[name]

        def noted(half: str, *given: Any) -> Any:
            used.append(f"{name} {half}")
            return getattr(way, half)(*given)

        used.append(f"{name} tried")
        return Way(lambda *a: noted("forward", *a), lambda *a: noted("backward", *a))

    monkeypatch.setattr(kernels, "accelerated", lambda _: True)
    monkeypatch.setattr(kernels, "_CHOSEN", {})
    monkeypatch.setattr(kernels, "kernel", kernel)
    monkeypatch.setattr(kernels, "_seconds", lambda way, _: 2.0 if way in (NORM, GATE) else 1.0)
    return used


def test_what_is_chosen_is_used_forward_and_backward(as_if_accelerated: list[str]) -> None:
    x, w, eps = ROWS
    for _ in range(2):
        as_if_accelerated.clear()
        given = x.clone().requires_grad_(True)
        _SiLUGate.apply(_RMSNorm.apply(given, w, eps), given).sum().backward()
    assert as_if_accelerated == [
        "norm forward",
        "gate forward",
        "gate backward",
        "norm backward",
    ]  # and nothing is tried again
    assert kernels.chosen() == {
        "norm cpu (torch.float32, 16) (torch.float32, 16)": "the kernel is 2.00 times as fast",
        "gate cpu (torch.float32, 16) (torch.float32, 16)": "the kernel is 2.00 times as fast",
    }


def test_another_width_or_type_is_tried_anew(as_if_accelerated: list[str]) -> None:
    x, w, eps = ROWS
    for dtype, width in ((torch.float32, 16), (torch.float32, 8), (torch.bfloat16, 8), (torch.float32, 16)):
        best("norm", NORM, x[:, :width].to(dtype), w[:width].to(dtype), eps)
    assert as_if_accelerated.count("norm tried") == 3


def test_a_lean_model_learns_the_same_with_kernels(as_if_accelerated: list[str]) -> None:
    model = models.FAMILIES["qwen3"]()
    model.requires_grad_(False)
    embeds = torch.randn(1, 5, model.config.hidden_size, requires_grad=True)

    def learned() -> Tensor:
        return torch.autograd.grad(model(inputs_embeds=embeds, use_cache=False).logits.square().sum(), embeds)[0]

    expected = learned()
    with lean(model):
        found = learned()
    assert {"norm backward", "gate backward"} <= set(as_if_accelerated)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_memory_that_runs_out_in_a_trial_says_nothing_about_the_kernel(
    as_if_accelerated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as now:
        now.setattr(kernels, "kernel", lambda _: Way(full, full))
        assert best("norm", NORM, *ROWS) is NORM
    assert kernels.chosen() == {}
    assert best("norm", NORM, *ROWS) is not NORM


def test_what_has_no_numbers_or_is_float64_is_never_tried(as_if_accelerated: list[str]) -> None:
    x, w, eps = ROWS
    with FakeTensorMode():
        for device in ("cpu", "lazy:0"):
            assert best("norm", NORM, torch.empty(3, 16, device=device), torch.empty(16, device=device), eps) is NORM
    assert best("norm", NORM, x.double(), w.double(), eps) is NORM
    assert best("norm", NORM, x[:0], w, eps) is NORM
    assert as_if_accelerated == []


def test_while_it_is_compiled_the_formula_is_traced() -> None:
    """In a process of its own: here every function of ours checks shapes, which the compiler does not look through."""
    script = """
import torch
from featherweight.engine import kernels
from featherweight.engine.lean import _RMSNorm, _SiLUGate

kernels.accelerated, kernels.choose = lambda _: True, lambda *_: 1 / 0
w, x = torch.rand(8), torch.randn(2, 8, requires_grad=True)
compiled = torch.compile(lambda t: _SiLUGate.apply(_RMSNorm.apply(t, w, 1e-5), t), fullgraph=True, backend="eager")
[gradient] = torch.autograd.grad(compiled(x).sum(), x)
print(bool(gradient.isfinite().all()), kernels.chosen())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True {}\n"


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose", lambda *_: pytest.fail("tried"))
    assert best("norm", NORM, ROWS[0].to("meta"), ROWS[1].to("meta"), 1e-5) is NORM
    assert best("norm", NORM, *ROWS) is NORM


@needs_triton
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
@pytest.mark.parametrize("dtype", kernels.AGREE)
def test_on_an_accelerator_the_kernels_agree_with_the_formulas(dtype: torch.dtype) -> None:
    device = torch.accelerator.current_accelerator()
    x, up = torch.randn(2, 64, 2048, device=device).to(dtype).unbind()
    for name, formula, inputs in (("norm", NORM, (x, up[0].abs(), 1e-5)), ("gate", GATE, (x, up))):
        assert "times as fast" in choose(lambda name=name: kernels.kernel(name), formula, inputs)[1]
