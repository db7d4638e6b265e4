"""Where a number comes from: versions, machine, command, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from .redaction import clean

PACKAGES = ("featherweight", "torch", "transformers", "safetensors", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that shape a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The machine in words: processor, cores, memory, accelerator."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    words = f"{cpu}, {os.cpu_count()} cores"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        words += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        words += f", {torch.cuda.get_device_name()}"
    return words


def command() -> str:
    """The command line of this process, without the path of the program, and without secrets."""
    return shlex.join(clean([Path(sys.argv[0]).name, *sys.argv[1:]]))


def record() -> dict[str, Any]:
    """All of it, for saving beside a result."""
    return {"command": command(), "date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions()}
