"""Weights as views of memory-mapped files, whose pages come and go while their addresses stay.

safetensors that are loaded in their own type on a CPU are such views already; what is not is written to a scratch file
once. The kernel can be asked to read a weight's pages ahead, and told that this process does not need them now: what is
dropped is read from the file again when it is touched. That is only safe for pages of a file that were never written to,
so each weight is looked up in `/proc/self/maps` and `/proc/self/pagemap` first. Linux only.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError

Span = tuple[int, int]  # first byte, number of bytes
_LARGE = 2**20


class Pages:
    """On a CPU: pages of mapped files come and go, addresses never change."""

    def __init__(self, model: nn.Module, layers: list[nn.Module], blocks: list[list[nn.Parameter]]) -> None:
        inside = {id(p) for block in blocks for p in block}
        others = [p for name, p in model.named_parameters() if ".parts." not in f".{name}" and not p.requires_grad]
        rest = [p for p in others if id(p) not in inside and p.nbytes >= _LARGE]  # embeddings, head
        move_to_files([*rest, *(p for block in blocks for p in block)])
        self.spans = [[whole_pages(p) for p in block] for block in blocks]
        self.rest = [whole_pages(p) for p in rest]

    def bring(self, here: int, coming: int | None) -> None:
        """See `Place`. `here` needs nothing: what is touched is read."""
        for i, spans in enumerate(self.spans):
            if i not in (here, coming):
                drop(spans)
        drop(self.rest)
        if coming is not None:
            read_ahead(self.spans[coming])

    def stop(self) -> None:
        """See `Place`. Nothing to do."""


def whole_pages(weight: Tensor) -> Span:
    """The pages that hold nothing but this tensor; of size 0 where there are none."""
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return first, max(0, end - first)


def read_ahead(spans: Iterable[Span]) -> None:
    """Ask the kernel to begin to read these pages; it does so by itself."""
    _advise(spans, mmap.MADV_WILLNEED)


def drop(spans: Iterable[Span]) -> None:
    """Give these pages back; the kernel may keep them as its cache while there is room."""
    _advise(spans, mmap.MADV_DONTNEED)


def _advise(spans: Iterable[Span], advice: int) -> None:
    for first, size in spans:
        if size:
            _madvise()(first, size, advice)


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def move_to_files(weights: Iterable[nn.Parameter]) -> int:
    """Make every weight that is no clean view of a file one. Returns how many bytes had to be written for that."""
    files, written = _mapped_files(), 0
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:  # a deleted file lasts as long as it is mapped
        for n, p in enumerate(weights):
            if whole_pages(p)[1] and not (p.is_contiguous() and _is_clean(p, files)):
                p.data = _written_to(Path(folder) / str(n), p.data)
                written += p.nbytes
    return written


def _mapped_files() -> list[Span]:
    """The address ranges of this process that are mappings of files."""
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    ranges = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith("/") and line[4] != "0"]
    return [(int(first, 16), int(end, 16) - int(first, 16)) for first, end in ranges]


def drop_files_of(weights: Iterable[Tensor]) -> None:
    """Give back the pages of the files that some of these weights are views of; whoever touches one reads it again.

    While one view of a file is left, all of it stays mapped: also what was read only to be quantised. Linux only.
    """
    if sys.platform != "linux":
        return
    starts = [weight.data_ptr() for weight in weights]
    files = [(first, size) for first, size in _mapped_files() if any(first <= at < first + size for at in starts)]
    drop(span for span in files if _untouched(span))


def _is_clean(weight: Tensor, files: list[Span]) -> bool:
    """Whether a tensor lies in a mapped file and none of its pages was written to."""
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    return any(first <= start and end <= first + size for first, size in files) and _untouched(whole_pages(weight))


def _untouched(span: Span) -> bool:
    """Whether none of a file's pages was written to: such a page is in memory only."""
    first, size = span
    try:
        with Path("/proc/self/pagemap").open("rb") as table:
            table.seek(first // mmap.PAGESIZE * 8)
            pages = torch.frombuffer(bytearray(table.read(size // mmap.PAGESIZE * 8)), dtype=torch.int64)
    except (OSError, ValueError):  # some sandboxes have no such table
        return False
    somewhere, of_file = (pages >> 62) & 3, (pages >> 61) & 1  # bits: 63 in memory, 62 swapped out, 61 of a file
    return not bool(((somewhere != 0) & (of_file == 0)).any())


def _written_to(path: Path, weight: Tensor) -> Tensor:
    """A tensor's copy in a file of its own, mapped."""
    try:
        weight.contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
        mapped = torch.from_file(str(path), shared=False, size=weight.nbytes, dtype=torch.uint8)
    except (OSError, RuntimeError) as e:
        raise InputError(
            f"--stream-base disk: cannot write the weights to {path.parent} ({e}); "
            f"let TMPDIR name a folder with room for them"
        ) from None
    return mapped.view(weight.dtype).view(weight.shape)
