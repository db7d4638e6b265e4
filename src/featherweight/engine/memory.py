"""How much memory the training steps needed.

On an accelerator that is its allocator's peak. On a CPU it is the process's largest resident size during the steps,
as the operating system counts it: weights, activations, optimiser and the Python process itself.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Start a new measurement: hand freed memory back to the system, then forget the old peak."""
    gc.collect()
    if device.type != "cpu":
        with suppress(RuntimeError):  # Apple's mps keeps no such account
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise, and the next method would inherit it
    with suppress(OSError):
        _CLEAR.write_text("5")  # Linux: reset the resident peak


def peak_bytes(device: torch.device) -> int:
    """The peak since `reset_peak`, in bytes. Where the system cannot reset it (macOS): the process's peak so far."""
    if device.type != "cpu":
        try:
            return int(torch.accelerator.max_memory_allocated(device))
        except RuntimeError:  # mps shares the process's memory: what follows counts it
            pass
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
