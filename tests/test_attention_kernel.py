"""One kernel for all packed rows: its calls, on a stand-in of PyTorch's function with numbers, and on the real one without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from featherweight import attention, attention_kernel
from featherweight.attention_kernel import attend_at_once, chosen, takes
from featherweight.layout import Layout
from test_attention import LAYOUTS, textbook


def row_by_row(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, key_begins: Tensor, longest: int, most_keys: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What PyTorch's documentation says that `varlen_attn` does; causal masks end in the lower right corner."""
    assert begins.dtype == key_begins.dtype == torch.int32
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    out, sizes = [], []
    for (a, b), (c, d) in zip(
        itertools.pairwise(begins.tolist()), itertools.pairwise(key_begins.tolist()), strict=True
    ):
        sizes.append((b - a, d - c))
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        scores = (q[a:b].transpose(0, 1) @ keys.mT * scale).masked_fill(~seen, float("-inf"))
        out.append((scores.softmax(-1) @ values).transpose(0, 1))  # nothing between is rounded to half precision
    assert (longest, most_keys) == tuple(map(max, zip(*sizes, strict=True)))
    return torch.cat(out).to(dtype)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts a function in the place of PyTorch's; at first the textbook's."""

    def use(function: Any) -> None:
        monkeypatch.setattr(attention_kernel.varlen, "varlen_attn", function)
        monkeypatch.setattr(attention_kernel, "_VERDICTS", {})

    use(row_by_row)
    monkeypatch.setattr(attention_kernel, "_accelerated", lambda _: True)
    return use


def tensors(layout: Layout, extra: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    seq = layout.shared + sum(layout.lengths)
    shapes = ((seq, 4, 8), (extra + seq, 2, 8), (extra + seq, 2, 8))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("extra", "window"), list(itertools.product((0, 6), (None, 5))))
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(3, (4, 0, 2))], ids=str)
def test_what_the_kernel_is_given_is_the_textbooks_attention(
    layout: Layout, extra: int, window: int | None, stand_in: Any
) -> None:
    q, k, v = tensors(layout, extra, torch.float64)
    found = attend_at_once(q, k, v, layout, window, 1 / 3)
    expected = textbook(*(x.transpose(0, 1)[None] for x in (q, k, v)), layout, window)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_this_pytorchs_function_takes_the_call(window: int | None, kv_heads: int) -> None:
    """On tensors without numbers: a name or a default that changes shows here, not on somebody's GPU."""
    layout = Layout(2, (5, 3))
    with FakeTensorMode():
        q, k, v = (torch.empty(10, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (4, kv_heads, kv_heads))
        rows = attention_kernel.rows_of.__wrapped__(layout, 0, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_kernel, "rows_of", lambda *_: rows)
            out = attend_at_once(q, k, v, layout, window, 0.125)
        assert out.shape == (10, 4, 64)
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [x.shape for x in (q, k, v)]


def test_a_kernel_that_agrees_is_used(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(2, (5, 9))
    q, k, v = tensors(layout, 0, torch.bfloat16)
    assert takes(q, k, v)
    found = attention._attend(q, k, v, layout, None, 0.3, 0.0)
    assert torch.equal(found, attend_at_once(q, k, v, layout, None, 0.3))
    monkeypatch.setattr(attention, "takes", lambda *_: False)
    products = attention._attend(q, k, v, layout, None, 0.3, 0.0)
    assert (found - products).norm() <= 0.02 * products.norm()


def faithful(*given: Any, enable_gqa: bool = False, **more: Any) -> Tensor:
    return row_by_row(*given, enable_gqa=enable_gqa, **more)


def upper_left(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    key_begins: Tensor,
    *sizes: int,
    enable_gqa: bool = False,
    **more: Any,
) -> Tensor:
    """As FlashAttention was before 2.1: a row's first query sees its first key only."""
    out = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(begins.tolist()), itertools.pairwise(key_begins.tolist()), strict=True
    ):
        n = torch.tensor([0, b - a], dtype=torch.int32)
        both = min(b - a, d - c)
        out.append(
            row_by_row(q[a:b], k[c : c + both], v[c : c + both], n, n, b - a, both, enable_gqa=enable_gqa, **more)
        )
    return torch.cat(out)


def no_gradient(*given: Any, enable_gqa: bool = False, **more: Any) -> Tensor:
    out = row_by_row(*given, enable_gqa=enable_gqa, **more)
    return out.detach() + 0 * out


def no_kernel(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def no_window(*given: Any, window_size: tuple[int, int], enable_gqa: bool = False, **more: Any) -> Tensor:
    return row_by_row(*given, window_size=(-1, window_size[1]), enable_gqa=enable_gqa, **more)


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [
        (upper_left, "% off"),
        (no_gradient, "% off"),
        (no_window, "% off"),
        (no_kernel, "RuntimeError: FlashAttention only"),
    ],
)
def test_a_kernel_that_does_something_else_is_not_used(broken: Any, verdict: str, stand_in: Any) -> None:
    q, k, v = tensors(Layout(0, (5,)), 0, torch.bfloat16)
    stand_in(faithful)
    assert takes(q, k, v)
    stand_in(broken)
    assert not takes(q, k, v)
    [found] = chosen().values()
    assert verdict in found
    assert attention._attend(q, k, v, Layout(0, (5,)), None, 0.3, 0.0).isfinite().all()


def test_the_first_call_may_be_one_that_is_computed_again_or_wants_no_gradient(stand_in: Any) -> None:
    layout = Layout(2, (5, 9))
    q, k, v = tensors(layout, 0, torch.bfloat16)
    out = checkpoint(attention._attend, q, k, v, layout, None, 0.3, 0.0, use_reentrant=False)
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()
    stand_in(row_by_row)
    with torch.inference_mode():
        assert takes(q, k, v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("window", [None, 50])
def test_on_a_gpu_it_is_the_textbooks_attention(window: int | None) -> None:
    layout = Layout(3, (5, 300, 17))
    q, k, v = (torch.randn(325, n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
    assert takes(q, k, v), chosen()
    found = attend_at_once(q, k, v, layout, window, 1 / 3)
    expected = textbook(*(x.cpu().double().transpose(0, 1)[None] for x in (q, k, v)), layout, window)[0]
    assert (found.cpu() - expected).norm() <= 0.02 * expected.norm()


def test_exact_types_and_unequal_sizes_stay_with_the_products(stand_in: Any) -> None:
    q, k, v = tensors(Layout(0, (5,)), 0, torch.bfloat16)
    assert not takes(q.float(), k.float(), v.float())
    assert not takes(q, k, v[:, :, :4])


def test_without_a_gpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "_verdict", lambda *_: pytest.fail("tried"))
    assert not takes(*tensors(Layout(0, (5,)), 0, torch.bfloat16))
