"""How much memory there is, how much the training steps needed, and what to do when it runs out.

On an accelerator the peak is its allocator's. On a CPU it is the process's largest resident size during the steps,
as the operating system counts it: weights, activations, optimiser and the Python process itself.

A CPU has no allocator that says no: asked for more than there is, Linux gives it and later kills the process. So a limit is
set on the process (`within`), short of what the machine, or its container, has left: then asking for too much is an error
that can be caught, and a smaller batch can be tried.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_GROUPS = {  # a container's limit and use, in the two versions of Linux's control groups
    Path("/sys/fs/cgroup/memory.max"): Path("/sys/fs/cgroup/memory.current"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"): Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
}
LEARNED = 2**25  # bytes: blocks up to here glibc keeps in the end, if it is left alone
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
_WORDS = (  # of PyTorch's allocators, cuBLAS, C++, and oneDNN
    "can't allocate memory", "out of memory", "not enough memory", "alloc_failed", "bad_alloc", "could not create a primitive",
)  # fmt: skip
SPARE = 0.03  # of what is left: for what the system itself needs, and for Python's small objects


def reset_peak(device: torch.device) -> None:
    """Start a new measurement: hand freed memory back to the system, then forget the old peak."""
    free(device)
    if device.type != "cpu":
        with suppress(RuntimeError):  # Apple's mps keeps no such account
            torch.accelerator.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")  # Linux: reset the resident peak


def free(device: torch.device) -> None:
    """Hand freed memory back to the system."""
    gc.collect()
    if device.type != "cpu":
        with suppress(RuntimeError):
            torch.accelerator.empty_cache()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise, and the next method would inherit it


@contextmanager
def handing_back() -> Iterator[None]:
    """Inside, what is freed goes back to the system at once, unless it is small.

    glibc learns to keep freed blocks of up to 32 MiB for the next one that fits. That is quick where sizes repeat, as they do in
    training. While a base is quantised they do not: what is kept of each layer lies between the holes that its larger temporaries
    leave, and a base came to take five times its size (`benchmarks/quantised_load.py`). Afterwards glibc is as if it had learned.
    """
    if not hand_back(2**17):
        yield
        return
    try:
        yield
    finally:
        hand_back(LEARNED)


def hand_back(from_bytes: int = 2**16) -> bool:
    """From now on, freed blocks of at least so many bytes go back to the system at once; whether the C library can do that.

    In training that saves a quarter to a third of the memory beside the weights and takes up to 1.7 times as long, because pages
    that are asked for anew must be zeroed (dev/LOG.md): for runs that would not fit otherwise.
    """
    try:
        library = ctypes.CDLL(None)
        tell, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):  # another C library
        return False
    tell(_MMAP_THRESHOLD, from_bytes)
    tell(_TRIM_THRESHOLD, 2 * from_bytes)
    trim(0)
    return True


def peak_bytes(device: torch.device) -> int:
    """The peak since `reset_peak`, in bytes. Where the system cannot reset it (macOS): the process's peak so far."""
    if device.type != "cpu":
        try:
            return int(torch.accelerator.max_memory_allocated(device))
        except RuntimeError:  # mps shares the process's memory: what follows counts it
            pass
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows keeps no such account in Python's reach
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes(device: torch.device) -> int:
    """What is held now, counted like `peak_bytes`."""
    if device.type != "cpu":
        try:
            return int(torch.accelerator.memory_allocated(device))
        except RuntimeError:
            pass
    return resident_bytes()


def reserved_bytes(device: torch.device) -> int | None:
    """What an accelerator's allocator had taken from the device at its peak since `reset_peak`; a CPU has no such allocator."""
    if device.type == "cpu":
        return None
    try:
        return int(torch.accelerator.max_memory_reserved(device))
    except RuntimeError:
        return None


def host_peak_bytes() -> int:
    """The process's largest resident size since `reset_peak`, or on an accelerator since it began; 0 where nobody says."""
    return _status("VmHWM") or 0


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: each library has its own words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error).lower() for words in _WORDS)


def left_bytes(device: torch.device) -> int | None:
    """How much more memory there is, in bytes; None where the system does not say."""
    if device.type != "cpu":
        try:
            return int(torch.get_device_module(device).mem_get_info(device)[0])
        except (RuntimeError, AttributeError):
            return None
    left = []
    with suppress(OSError, ValueError):
        left.append(_field(_MEMINFO.read_text(), "MemAvailable"))
    for limit, used in _GROUPS.items():
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            left.append(int(limit.read_text()) - int(used.read_text()))
    known = [n for n in left if n is not None]
    return min(known) if known else None


def resident_bytes() -> int:
    """What this process holds in RAM now; 0 where the system does not say."""
    return _status("VmRSS") or 0


@contextmanager
def within(device: torch.device, limit: int | None = None) -> Iterator[None]:
    """Inside, asking for more memory than `limit` bytes in all, or than there is, is an error that `out_of_memory` knows.

    On a CPU this holds on Linux; on an accelerator where its allocator takes a limit (CUDA). Elsewhere nothing changes.
    """
    if device.type != "cpu":
        with _allocator_within(device, limit):
            yield
        return
    left, data, resident = left_bytes(device), _status("VmData"), _status("VmRSS")
    if limit is not None and resident is not None:
        left = limit - resident if left is None else min(left, limit - resident)
    if left is None or data is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data + max(0, int(left * (1 - SPARE)) - _unused_heap())
    known = [n for n in before if n != resource.RLIM_INFINITY]  # an outer limit stays one
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *known]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _unused_heap() -> int:
    """Bytes that the C library keeps for later: the process has asked for them, yet they can be taken without asking again."""

    class MallInfo(ctypes.Structure):
        _fields_ = tuple((str(i), ctypes.c_size_t) for i in range(10))  # see mallinfo2(3): the ninth is free space

    with suppress(OSError, AttributeError):
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = MallInfo
        return int(getattr(ask(), "8"))
    return 0


@contextmanager
def _allocator_within(device: torch.device, limit: int | None) -> Iterator[None]:
    module = torch.get_device_module(device)
    if limit is None or not hasattr(module, "set_per_process_memory_fraction"):
        yield
        return
    total = module.mem_get_info(device)[1]
    module.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        module.set_per_process_memory_fraction(1.0, device)


def _status(field: str) -> int | None:
    with suppress(OSError):
        return _field(_STATUS.read_text(), field)
    return None


def _field(text: str, name: str) -> int | None:
    """A field of one of Linux's tables, in bytes."""
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), None)
