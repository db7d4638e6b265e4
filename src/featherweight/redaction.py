"""Secrets are taken out of all words that leave: what is printed, recorded, or saved beside a result.

Recognised are the values of environment variables whose names say so (`…_TOKEN`, `…_KEY`, `…_SECRET`, `…_PASSWORD` …), tokens of
known shapes, and what stands in addresses before an @ or behind `?token=`. What looks like none of these is not known to be one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
HIDDEN = "***"
SHORTEST = 8
"""Characters of a secret in the environment: shorter values are words that occur anyway, and would be taken out everywhere."""

_NAMES = re.compile(
    r"(^|_)(TOKENS?|KEYS?|APIKEY|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PAT|CREDENTIALS?|AUTH)(_|$)", re.IGNORECASE
)
_TELLING = r"[\w-]*(?:token|key|secret|password|passwd|signature|credential|auth)[\w-]*|sig|pwd"
_SHAPES = (
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}"), HIDDEN),
    (re.compile(r"\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bsk-[\w-]{16,}|\bAKIA[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/-]{8,}=*"), r"\1" + HIDDEN),
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@'\"]+@"), r"\1" + HIDDEN + "@"),
    (re.compile(rf"(?i)([?&;](?:{_TELLING})=)[^&;#\s'\"]+"), r"\1" + HIDDEN),
)  # fmt: skip


def clean(value: T) -> T:
    """The same with its secrets taken out: a text, or the texts in lists and objects."""
    return _clean(value, _planted())


def _planted() -> list[str]:
    """Secrets of the environment, the longest first: one may be part of another."""
    values = {v.strip() for name, v in os.environ.items() if _NAMES.search(name)}
    return sorted((v for v in values if len(v) >= SHORTEST and not _is_path(v)), key=len, reverse=True)


def _is_path(value: str) -> bool:
    """Where a key lies is no secret."""
    try:
        return value.startswith(("/", "~", ".")) and Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _clean(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        for shape, instead in _SHAPES:
            value = shape.sub(instead, value)
        return value
    if isinstance(value, dict):
        return {_clean(k, secrets): _clean(v, secrets) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clean(v, secrets) for v in value) if type(value) in (list, tuple) else value
    return value
