"""What goes out: the file that was asked for, and nothing besides; with `--offline` nothing at all.

The libraries below decide most of it when they are imported, from the environment, so the command line calls this first. From Python set
`HF_HUB_OFFLINE=1` before the first import, or call `go_offline`.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from typing import Any

from .errors import InputError
from .foreign import similar

OFFLINE = "FEATHERWEIGHT_OFFLINE"
"""Set: also the embedded default is not fetched. `HF_HUB_OFFLINE` alone is about hubs."""
_OTHERS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_QUIET = (
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_UPDATE_CHECK",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "DISABLE_SAFETENSORS_CONVERSION",  # it would ask a hub to convert a pickle, in the background
    "PIP_DISABLE_PIP_VERSION_CHECK",
)
_GIVEN_UP: list[tuple[Any, str]] = []
"""The libraries' settings that were changed because the hub was not there, and by nobody's wish."""
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def keep_quiet() -> None:
    """No telemetry, no look for updates, no conversion in the background; no compiled code from a hub.

    For a program of our own, before anything is imported: the package `kernels` fetches code, and so it is not there.
    """
    for name in _QUIET:
        os.environ[name] = "1"
    os.environ["USE_HUB_KERNELS"] = "NO"
    vars(sys)["modules"].setdefault("kernels", None)  # so Python spells "cannot be imported"


def go_offline() -> None:
    """From here on nothing is fetched, whether the libraries that would are imported already or not."""
    for name in (OFFLINE, *_OTHERS):
        os.environ[name] = "1"
    _tell_libraries()


def _tell_libraries() -> list[tuple[Any, str]]:
    """Have those that are imported fetch nothing; which settings that changed, so that it can be taken back."""
    changed = []
    for module in ("huggingface_hub.constants", "datasets.config"):
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            if getattr(sys.modules.get(module), name, None) is False:
                setattr(sys.modules[module], name, True)
                changed.append((sys.modules[module], name))
    return changed


def ask_hub_if_it_is_there() -> None:
    """Where the hub's name leads nowhere, have its libraries take what is in the cache, or say that it is not there, at once.

    By themselves they try six times, which takes half a minute for each file, also for those that are in the cache.
    """
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE and not _GIVEN_UP:  # somebody wants it so
        return
    there = True
    if not urllib.request.getproxies():  # else another machine looks the name up
        try:
            socket.getaddrinfo(urllib.parse.urlsplit(hub.ENDPOINT).hostname, None)
        except OSError:
            there = False
    if not there:
        _GIVEN_UP.extend(_tell_libraries())
    while there and _GIVEN_UP:
        setattr(*_GIVEN_UP.pop(), False)


def is_offline() -> bool:
    """Whether nothing may be fetched, the embedded default included."""
    return os.environ.get(OFFLINE, "") not in ("", "0")


def check_hub_id(what: str, name: str) -> None:
    """Raise `InputError` for a name that no hub can have: it is a slip or an address, and asking for it would tell it to others."""
    if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise InputError(
            f"{what}: {name!r} is no folder or file here, and no hub id either, which is a name or owner/name of letters, digits and -_."
            f"{similar(name)}"
        )
