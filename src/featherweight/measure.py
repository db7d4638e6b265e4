"""What a run is measured by, beside its own report: memory while one step runs, and energy where the device tells it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from .engine.memory import held_bytes
from .engine.train import Report

EVERY_SECONDS = 0.002
POINTS = 200
_POWERCAP = Path("/sys/class/powercap")


class StepMemory:
    """Memory over one training step, sampled while it runs: give `on_step` to `fit`, and read `samples` afterwards.

    The step is the fourth, or the last of a shorter run: by then every shape has been seen, and the optimiser has its state.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.after = device, min(3, steps - 1)
        self.samples: list[tuple[float, int]] = []
        """(seconds since the step's begin, bytes held), at most `POINTS` of them, the peak among them."""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def on_step(self, report: Report) -> None:
        """Called after each step."""
        if self._thread is not None:
            self.stop()
        elif report.steps == self.after and not self.samples:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the sampling, if it is still under way."""
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None

    def _sample(self) -> None:
        start, found = time.perf_counter(), list[tuple[float, int]]()
        while not self._done.wait(EVERY_SECONDS):
            found.append((time.perf_counter() - start, held_bytes(self.device)))
        self.samples = thinned(found)


def thinned(samples: list[tuple[float, int]], points: int = POINTS) -> list[tuple[float, int]]:
    """The highest sample of each of `points` stretches of equal length."""
    if len(samples) <= points:
        return samples
    edges = [i * len(samples) // points for i in range(points + 1)]
    return [max(samples[a:b], key=lambda s: s[1]) for a, b in itertools.pairwise(edges)]


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """A function that gives the joules which this device has used since it was called first; None where it does not tell them.

    NVIDIA's cards tell it through NVML (the package `nvidia-ml-py`), Intel's and AMD's processors through Linux's powercap,
    which most systems let only root read. A processor's figure is of all that runs on it.
    """
    read = _card_joules(device) if device.type == "cuda" else _processor_joules() if device.type == "cpu" else None
    if read is None:
        return None
    first = read()
    return lambda: read() - first


def _card_joules(device: torch.device) -> Callable[[], float] | None:
    with suppress(Exception):  # the package, the driver, or the card does not know it
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000
    return None


def _processor_joules(folder: Path = _POWERCAP) -> Callable[[], float] | None:
    """The sum over packages; a counter that starts again at zero is followed."""
    counters = sorted(folder.glob("intel-rapl:?/energy_uj"))
    try:
        last = {f: int(f.read_text()) for f in counters}
        spans = {f: int((f.parent / "max_energy_range_uj").read_text()) for f in counters}
    except (OSError, ValueError):
        return None
    if not counters:
        return None
    used = 0

    def read() -> float:
        nonlocal used
        for f in counters:
            now = int(f.read_text())
            used += (now - last[f]) % spans[f]
            last[f] = now
        return used / 1e6

    return read
