"""Two buffers on an accelerator that the blocks of a base are copied into, one while the other computes.

Block i always lies in buffer i mod 2, at the same place. So whatever autograd or a quantised layer keeps a view of is
right again when its block is back. A thread copies, on a stream of its own: from pinned memory, which the device reads by
itself, or from mapped files (pages.py). At rest a weight is in that memory; while its block runs, in the buffer.

Not yet run on a GPU: the tests run it with a CPU as the device, where the thread is the only thing that overlaps.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .pages import drop, move_to_files, whole_pages
from .vocabulary import on_host

Blocks = list[list[nn.Parameter]]
_ALIGNED = 256


class Slots:
    """On an accelerator: two buffers that blocks are copied into."""

    def __init__(
        self, model: nn.Module, layers: list[nn.Module], blocks: Blocks, *, device: torch.device, pinned: bool
    ) -> None:
        self.model, self.layers, self.blocks, self.device, self.pinned = model, layers, blocks, device, pinned
        self.stay = {id(p) for block in blocks for p in block} | on_host(model)
        size = max(_layout(block)[-1] for block in blocks)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.views = [_views(self.slots[i % 2], block) for i, block in enumerate(blocks)]
        if pinned:
            for block in blocks:
                _pin(block, device)
        else:
            move_to_files(p for block in blocks for p in block)
        self.at_rest = [[p.data for p in block] for block in blocks]
        self.side = None if device.type == "cpu" else torch.Stream(device)
        self.thread = ThreadPoolExecutor(1, "stream-base")
        self.held: list[int | None] = [None, None]
        self.fetched: list[Future[Any] | None] = [None, None]
        _to_device(model, device, self.stay)

    def bring(self, here: int, coming: int | None) -> None:
        """See `Place`. The block that `coming` takes the slot of has all its work queued by now."""
        if self.held[here % 2] != here:
            self._fetch(here)
        if coming is not None and coming % 2 != here % 2 and self.held[coming % 2] != coming:
            self._fetch(coming)
        fetched = self.fetched[here % 2]
        assert fetched is not None
        done = fetched.result()
        if self.side is not None:
            torch.accelerator.current_stream(self.device).wait_event(done)
        _to_device(self.layers[here], self.device, self.stay)  # parts that were attached since
        for p, view in zip(self.blocks[here], self.views[here], strict=True):
            p.data = view

    def stop(self) -> None:
        """See `Place`."""
        self.thread.shutdown()
        for i in self.held:
            self._let_go(i)
        if self.side is not None:
            torch.accelerator.synchronize(self.device)
            self.model.to("cpu")

    def _fetch(self, i: int) -> None:
        self._let_go(self.held[i % 2])
        queued = None if self.side is None else torch.accelerator.current_stream(self.device).record_event()
        self.held[i % 2], self.fetched[i % 2] = i, self.thread.submit(self._copy, i, queued)

    def _let_go(self, i: int | None) -> None:
        if i is not None:
            for p, host in zip(self.blocks[i], self.at_rest[i], strict=True):
                p.data = host

    def _copy(self, i: int, queued: Any) -> Any:
        """In the thread: fill the slot as soon as what still reads it is done."""
        if self.side is not None:
            self.side.wait_event(queued)
        with self.side or nullcontext():
            for there, host in zip(self.views[i], self.at_rest[i], strict=True):
                there.copy_(host, non_blocking=True)
        if not self.pinned:
            if self.side is not None:
                self.side.synchronize()
            drop(map(whole_pages, self.at_rest[i]))
        return None if self.side is None else self.side.record_event()


def _layout(block: list[nn.Parameter]) -> list[int]:
    """Where each weight of a block begins in a buffer, and at last the buffer's size in bytes."""
    return list(itertools.accumulate((-(-p.nbytes // _ALIGNED) * _ALIGNED for p in block), initial=0))


def _views(buffer: Tensor, block: list[nn.Parameter]) -> list[Tensor]:
    """A block's weights as they lie in a buffer of bytes."""
    starts = _layout(block)[:-1]
    return [buffer[at : at + p.nbytes].view(p.dtype).view(p.shape) for at, p in zip(starts, block, strict=True)]


def _pin(block: list[nn.Parameter], device: torch.device) -> None:
    """Move a block into memory that the device can read by itself."""
    buffer = torch.empty(_layout(block)[-1], dtype=torch.uint8, pin_memory=device.type != "cpu")
    for p, view in zip(block, _views(buffer, block), strict=True):
        p.data = view.copy_(p.data)


def _to_device(module: nn.Module, device: torch.device, stay: Collection[int]) -> None:
    """Everything but the streamed weights: small tensors, scales of 4-bit layers, parts."""
    for m in module.modules():
        for p in m._parameters.values():
            if p is not None and id(p) not in stay and p.device != device:
                p.data = p.data.to(device)
            if (scales := getattr(p, "quant_state", None)) is not None:
                scales.to(device)
        for name, buffer in m._buffers.items():
            if buffer is not None and buffer.device != device:
                m._buffers[name] = buffer.to(device)
