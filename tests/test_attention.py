"""Attention over packed rows: the gathered matrices, and the fused kernel row by row, against the textbook."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from featherweight import attention
from featherweight.attention import Layout, attend_in_rows, layout_of

LAYOUTS = [
    Layout(0, (5, 9, 3)),
    Layout(0, (7,)),
    Layout(5, (9,)),
    Layout(4, (3, 8)),
    Layout(2, (150, 40, 1, 64)),
    Layout(40, (33, 2)),
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


@pytest.mark.parametrize("long", [512, 2, 4], ids=["gathered", "row by row", "both"])
@pytest.mark.parametrize(("extra", "window"), list(itertools.product((0, 6), (None, 5))))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_attention_is_the_textbooks(
    layout: Layout, extra: int, window: int | None, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "long_from", lambda _: long)
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


def test_a_layout_can_be_read_back_from_its_mask() -> None:
    mask = Layout(3, (2, 5)).mask(torch.device("cpu"))
    assert layout_of(mask) == Layout(3, (2, 5))
    assert layout_of(mask.clone()) == Layout(3, (2, 5))
    assert layout_of(torch.zeros(1, 1, 4, 4)) is None
    assert layout_of(torch.ones(2, 5, dtype=torch.long)) is None
    assert layout_of(None) is None
