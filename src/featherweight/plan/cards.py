"""Cards that people own: their memory, and how fast they read it and multiply.

None of these was measured by us. Memory and bandwidth are those of the vendors' specifications as we know them; the bandwidths of the
RTX 4060, 4060 Ti, 4090, 5070, 5070 Ti, 5080 and 5090 were compared with printed ones, the others were not. Rates are of dense
products in 16-bit numbers with sums in float32, computed from what is printed:

* NVIDIA: the appendices of the architecture whitepapers (Turing TU102, Ampere GA102, Ada, RTX Blackwell) for the large cards;
  the others by the same rule, the stated boost clock and number of cores: on Turing 256 operations a core pair's clock, from Ampere
  on twice the float32 rate. (Turing has no bfloat16: a plan for it is of float32, or of evaluating in float16.)
* AMD: "peak half precision" (matrix, where stated) of the product pages. Intel: half the XMX int8 rate of the product pages.
* Apple: the float32 rate of the chip's GPU, where Apple states one, else by its number of cores; its memory is the whole
  machine's, so a plan needs --memory, or takes the smallest machine that was sold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """What a card has. Units: bytes, bytes a second, operations a second."""

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float


def _card(name: str, gib: int, gigabytes_a_second: float, teraflops: float) -> Card:
    return Card(name, gib * GIB, gigabytes_a_second * 1e9, teraflops * 1e12)


CARDS: tuple[Card, ...] = (
    _card("RTX 2060 6GB", 6, 336, 25.8), _card("RTX 2060 12GB", 12, 336, 28.7), _card("RTX 2070 8GB", 8, 448, 29.9),
    _card("RTX 2080 8GB", 8, 448, 40.3), _card("RTX 2080 Ti 11GB", 11, 616, 53.8),
    _card("RTX 3050 8GB", 8, 224, 18.2), _card("RTX 3060 12GB", 12, 360, 25.5), _card("RTX 3060 Ti 8GB", 8, 448, 32.4),
    _card("RTX 3070 8GB", 8, 448, 40.6), _card("RTX 3070 Ti 8GB", 8, 608, 43.5), _card("RTX 3080 10GB", 10, 760, 59.5),
    _card("RTX 3080 12GB", 12, 912, 61.3), _card("RTX 3080 Ti 12GB", 12, 912, 68.2),
    _card("RTX 3090 24GB", 24, 936, 71.2), _card("RTX 3090 Ti 24GB", 24, 1008, 80.0),
    _card("RTX 4060 8GB", 8, 272, 30.2), _card("RTX 4060 Ti 8GB", 8, 288, 44.1), _card("RTX 4060 Ti 16GB", 16, 288, 44.1),
    _card("RTX 4070 12GB", 12, 504, 58.3), _card("RTX 4070 Super 12GB", 12, 504, 71.0),
    _card("RTX 4070 Ti 12GB", 12, 504, 80.2), _card("RTX 4070 Ti Super 16GB", 16, 672, 88.2),
    _card("RTX 4080 16GB", 16, 717, 97.5), _card("RTX 4080 Super 16GB", 16, 736, 104.4),
    _card("RTX 4090 24GB", 24, 1008, 165.2),
    _card("RTX 5060 8GB", 8, 448, 38.4), _card("RTX 5060 Ti 8GB", 8, 448, 47.4), _card("RTX 5060 Ti 16GB", 16, 448, 47.4),
    _card("RTX 5070 12GB", 12, 672, 61.7), _card("RTX 5070 Ti 16GB", 16, 896, 87.9), _card("RTX 5080 16GB", 16, 960, 112.6),
    _card("RTX 5090 32GB", 32, 1792, 209.5),
    _card("RX 7600 XT 16GB", 16, 288, 45.1), _card("RX 7800 XT 16GB", 16, 624, 74.7),
    _card("RX 7900 GRE 16GB", 16, 576, 92.0), _card("RX 7900 XT 20GB", 20, 800, 103.0),
    _card("RX 7900 XTX 24GB", 24, 960, 122.8),
    _card("Arc A750 8GB", 8, 512, 114.7), _card("Arc A770 16GB", 16, 560, 131.0), _card("Arc B570 10GB", 10, 380, 101.5),
    _card("Arc B580 12GB", 12, 456, 116.5),
    _card("Apple M1", 8, 68, 2.6), _card("Apple M1 Pro", 16, 200, 5.2), _card("Apple M1 Max", 32, 400, 10.4),
    _card("Apple M2", 8, 100, 3.6), _card("Apple M2 Pro", 16, 200, 6.8), _card("Apple M2 Max", 32, 400, 13.6),
    _card("Apple M3", 8, 100, 3.5), _card("Apple M3 Pro", 18, 150, 6.4), _card("Apple M3 Max", 36, 300, 14.1),
    _card("Apple M4", 16, 120, 4.3), _card("Apple M4 Pro", 24, 273, 9.2), _card("Apple M4 Max", 36, 410, 18.4),
)  # fmt: skip


def find_card(wanted: str) -> Card:
    """The card with all the words of a loose name, such as "4060 ti 16gb" or "NVIDIA GeForce RTX 4090".

    Raises `InputError` that lists near misses where none or several are meant.
    """
    words = _words(wanted)
    fitting = [c for c in CARDS if words and words <= _words(c.name)]
    exact = [c for c in fitting if _words(c.name) - words <= _sizes(c.name)]  # "4060" is not the Ti
    found = exact or fitting
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--gpu {wanted!r} can be {' or '.join(c.name for c in found)}: say which")
    shared = {c.name: len(words & _words(c.name)) for c in CARDS}
    near = [n for n, common in shared.items() if common and common == max(shared.values())][:8]
    known = f"near it are: {', '.join(near)}" if near else f"there are: {', '.join(c.name for c in CARDS)}"
    raise InputError(f"--gpu {wanted!r} is not in the catalogue; {known}; or give --memory, such as --memory 12GB")


_MAKERS = {"nvidia", "geforce", "amd", "radeon", "intel", "gpu", "graphics"}


def _words(name: str) -> set[str]:
    """`RTX4060Ti 16 GB` → {rtx, 4060, ti, 16gb}."""
    name = re.sub(r"(\d+)\s*(gb|gib|g)\b", r" \1gb ", name.lower())
    return set(re.findall(r"\d+gb|[am]\d+|b\d{3}|\d+|[a-z]+", name)) - _MAKERS


def _sizes(name: str) -> set[str]:
    """The words of a name that need not be said."""
    return {w for w in _words(name) if w.endswith("gb") or w in ("rtx", "rx", "arc", "apple")}


def read_bytes(text: str) -> int:
    """`12GB`, `12 GiB`, `900MB` or a plain number of GB, as bytes; GB is taken as the GiB that cards mean by it."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib|)\s*", text.lower())
    if not found or not float(found[1]):
        raise InputError(f"--memory {text!r} is not a size; write it as 12GB or 900MB")
    return int(float(found[1]) * (2**20 if found[2].startswith("m") else GIB))
