"""Where the rows of a packed batch lie.

A packed row is

    shared | row 1 | row 2 | …          every row sees what is shared, and itself; never another row

The layers are told by the attention mask: *the number of the row* that each token belongs to, 1 × 1 × 1 × seq, 0 for what is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the rows lie: `shared` tokens, then rows of these lengths."""

    shared: int
    lengths: tuple[int, ...]

    def after(self, more: int) -> Layout:
        """The layout with `more` shared tokens in front."""
        return Layout(self.shared + more, self.lengths)

    def mask(self, device: torch.device) -> Int[Tensor, "1 1 1 seq"]:
        """What the model gets as its attention mask: each token's row, 0 where it is shared. It carries this layout."""
        numbers = torch.cat([torch.full((n,), i) for i, n in enumerate((self.shared, *self.lengths))])
        numbers = numbers.to(device)[None, None, None]
        numbers.rows_layout = self  # type: ignore[attr-defined]  # reading it back from the numbers would wait for a GPU
        return numbers

    def positions(self, device: torch.device) -> Int[Tensor, "1 seq"]:
        """Each token's position in its own text, what is shared counted in front of every row."""
        parts = [torch.arange(self.shared), *(torch.arange(n) + self.shared for n in self.lengths)]
        return torch.cat(parts).to(device)[None]


def layout_of(mask: Any) -> Layout | None:
    """The layout that an attention mask stands for; None where it is an ordinary mask, or none."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.long:
        return None
    known: Layout | None = getattr(mask, "rows_layout", None)
    if known is None:
        shared, *lengths = torch.bincount(mask.flatten()).tolist()
        known = Layout(shared, tuple(lengths))
    return known
