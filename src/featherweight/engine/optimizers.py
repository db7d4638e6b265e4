"""What moves the parts. All of them see float32 gradients and are given the rate of the schedule.

| name | keeps a trained number | needs |
|---|---|---|
| `adamw` | 8 bytes: mean and mean square, float32 (Loshchilov & Hutter 2019, arXiv:1711.05101) | |
| `adamw8bit` | 2 bytes: the same, in blocks of 8-bit numbers (Dettmers et al. 2022, arXiv:2110.02861) | bitsandbytes |
| `paged_adamw8bit` | the same, moved to the host when the device is full (a CUDA device) | bitsandbytes |
| `adafactor` | rows' and columns' mean squares only; wants a much higher rate (Shazeer & Stern 2018, arXiv:1804.04235) | |
| `lion` | 4 bytes: a mean, of which the sign counts; wants a rate 3 to 10 times lower (Chen et al. 2023, arXiv:2302.06675) | bitsandbytes |
| `sgd` | nothing; wants a rate many times higher | |

An adapter is small, so what is saved is small beside activations; it counts where whole modules are trained. The default
rates are tuned for `adamw`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import InputError, nearest

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "sgd", "lion")
STATE_BYTES = {"adamw8bit": 2, "paged_adamw8bit": 2, "lion": 4}
"""Bytes of state that those of bitsandbytes keep for a trained number."""
_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion": "Lion"}


def check_optimizer(name: str) -> None:
    """Raise `InputError` where this optimiser is unknown, or its library is not there."""
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer {name!r} is unknown; {nearest(name, OPTIMIZERS)}")
    if name in _BITSANDBYTES:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise InputError(f'--optimizer {name} needs bitsandbytes: pip install "featherweight[quant]"') from None


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser by its name. Raises `InputError` as `check_optimizer` does."""
    check_optimizer(name)
    given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name in _BITSANDBYTES:
        import bitsandbytes

        parameters = list(parameters)
        if all(p.device.type == "cpu" for p in parameters):
            name = name.removeprefix("paged_")  # the host's memory is all there is
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, _BITSANDBYTES[name])(parameters, **given)
        return made
    cls: Any = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}[name]
    return cls(parameters, **given)
