"""Attention over packed rows: products in blocks, and the fused kernel row by row, against the textbook."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherweight import attention, attention_blocks
from featherweight.attention import attend_in_rows
from featherweight.layout import Layout, layout_of

LAYOUTS = [
    Layout(0, (5, 9, 3)),
    Layout(0, (7,)),
    Layout(5, (9,)),
    Layout(4, (3, 8)),
    Layout(2, (150, 40, 1, 64)),
    Layout(40, (33, 2)),
    Layout(130, (100, 3, 120)),
]


def textbook(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """All scores, a mask, a softmax."""
    extra, heads = k.shape[2] - q.shape[2], q.shape[1]
    row = torch.tensor([0] * layout.shared + [i + 1 for i, n in enumerate(layout.lengths) for _ in range(n)])
    position = layout.positions(q.device)[0] + extra
    key_row, key_position = torch.cat([torch.zeros(extra), row]), torch.cat([torch.arange(extra), position])
    distance = position[:, None] - key_position
    seen = (distance >= 0) & ((key_row == 0) | (key_row == row[:, None]))
    seen &= distance < window if window else True
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / 3).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("long", [512, 2, 4], ids=["blocks", "row by row", "both"])
@pytest.mark.parametrize(("extra", "window"), list(itertools.product((0, 6), (None, 5))))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_attention_is_the_textbooks(
    layout: Layout, extra: int, window: int | None, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "long_from", lambda *_: long)
    torch.manual_seed(0)
    seq = layout.shared + sum(layout.lengths)
    shapes = ((1, 4, seq, 8), (1, 2, extra + seq, 8), (1, 2, extra + seq, 8))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = layout.mask(torch.device("cpu"))
    ours, _ = attend_in_rows(torch.nn.Module(), *tensors, mask, scaling=1 / 3, sliding_window=window)
    expected = textbook(*tensors, layout, window)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


@pytest.mark.parametrize("window", [None, 300])
def test_the_scores_of_a_long_row_are_never_all_there(window: int | None) -> None:
    n, heads = 1500, 4
    q, k, v = (torch.randn(n, h, 8, dtype=torch.bfloat16, requires_grad=True) for h in (heads, 2, 2))
    with Largest() as largest:
        out = attention._attend(q, k, v, Layout(0, (n,)), window, 0.3, 0.0)
        torch.autograd.grad(out.sum(), (q, k, v))
    seen = window or n
    assert largest.numbers <= heads * attention_blocks.BLOCK * (seen + 2 * attention_blocks.BLOCK)


def test_scores_behind_a_long_shared_part_are_not_kept() -> None:
    kept: list[int] = []
    q, k, v = (torch.randn(1200, h, 8, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    with saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        attention._attend(q, k, v, Layout(1000, (50, 50, 50, 50)), None, 0.3, 0.0)
    assert max(kept) <= 4 * 2 * (1000 + 64) * 8  # the rows' keys; their scores would be six times as many


def test_masks_are_kept_for_a_few_shapes_however_long_the_row() -> None:
    """Each would else be built anew in every layer, for every block."""
    attention_blocks.visible.cache_clear()
    q, k, v = (torch.randn(3000, h, 8, dtype=torch.bfloat16) for h in (4, 2, 2))
    for window in (None, 300):
        attention._attend(q, k, v, Layout(0, (3000,)), window, 0.3, 0.0)
    assert attention_blocks.visible.cache_info().misses <= 12


def test_a_layout_can_be_read_back_from_its_mask() -> None:
    mask = Layout(3, (2, 5)).mask(torch.device("cpu"))
    assert layout_of(mask) == Layout(3, (2, 5))
    assert layout_of(mask.clone()) == Layout(3, (2, 5))
    assert layout_of(torch.zeros(1, 1, 4, 4)) is None
    assert layout_of(torch.ones(2, 5, dtype=torch.long)) is None
    assert layout_of(None) is None
