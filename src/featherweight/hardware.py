"""Which of two ways the engine goes: the one for a CPU, or the one for an accelerator.

Asked here, by `hardware.kind_of(…)`, so that a simulation of an accelerator, whose tensors say that they are on a CPU, can answer `other`.
"""

from __future__ import annotations

import torch


def kind_of(device: torch.device) -> str:
    """`cpu` or `other`."""
    return "cpu" if device.type == "cpu" else "other"
