"""How much memory a step needs above the weights, and how that grows with a row: for `speed.py`.

Each side's peak is measured in a process of its own (`speed_child.py`), so that nobody inherits what another left behind.
"""

from __future__ import annotations

import json
import subprocess
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherweight.attention import attend_in_rows
from featherweight.engine.loss import _HeadLoss
from featherweight.engine.memory import peak_bytes, reserved_bytes, reset_peak
from featherweight.layout import Layout
from speed_child import PATIENCE, command
from speed_sides import APART, Ours, lacking, side_of, timed
from speed_work import BATCH, LENGTHS, base_of, rows_a_step, rows_of


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak: what an allocator without waste would need."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, out)):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if (key := storage._cdata) not in self.known and any(t is o for o in tree_leaves(out)):
                    size = storage.nbytes()
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._gone, key, size)
                    self.peak = max(self.peak, self.now)
                self.known.add(key)
        return out


def memory_child(work: str, method: str, kind: str) -> dict[str, int]:
    """Peak memory of two steps on long rows of this work, above what the process held before; run in a process of its own.

    On an accelerator resident is what its allocator has given to tensors, so the count of tensors' bytes would say the same.
    """
    side = side_of(kind, work, method)
    rows = rows_of(work, side.base, 3 if work == "long" else 8 * BATCH)
    rows = sorted(rows, key=lambda e: len(e.ids))[-rows_a_step(work) :]
    for p in side.base.model.parameters():  # weights that are still in their file only
        p.sum()
    reset_peak(side.base.device)
    before = peak_bytes(side.base.device)

    def steps(n: int) -> None:
        if hasattr(side, "run"):
            side.run([rows] * n, lambda _: None)
        else:
            for _ in range(n):
                side.step(rows)

    steps(1 if work == "long" else 2)
    found = {"resident": peak_bytes(side.base.device) - before, "row_tokens": sum(len(e.ids) for e in rows)}
    if side.base.device.type != "cpu":
        return found | {"before": before, "reserved": reserved_bytes(side.base.device) or 0}
    with Alive() as alive:
        steps(1)
    return found | {"tensors": alive.peak}


def memory(work: str, method: str, kinds: Sequence[str]) -> dict[str, Any]:
    """`memory_child` of every side that is installed. Where one of `APART` fails, the others still count."""
    found, failed = {}, {}
    for kind in ("ours", *(k for k in kinds if not lacking(k))):
        done = subprocess.run(
            command("memory", work, method, kind), capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        if done.returncode == 0:
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        elif kind in APART:
            failed[kind] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        else:
            raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
    return {"bytes": found} | ({"failed": failed} if failed else {})


def growth(method: str) -> dict[str, Any]:
    """By the length of a row: seconds of a step, seconds of its attention alone, and bytes that the loss needs for a while."""
    side = Ours(base_of("long"), method)
    config, head = side.base.model.config, side.base.model.get_output_embeddings()
    size = config.hidden_size // config.num_attention_heads
    seconds, attention, loss_bytes = {}, {}, {}
    for row in rows_of("long", side.base, len(LENGTHS)):
        n, device = len(row.ids) - 1, side.base.device
        side.step([row])
        seconds[n] = min(timed(side.step, [row])[0] for _ in range(2))
        q, k, v = (
            torch.randn(1, heads, n, size, device=device, dtype=torch.bfloat16, requires_grad=True)
            for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        )
        mask = Layout(0, (n,)).mask(device)

        def attend(_: Any, q: Any = q, k: Any = k, v: Any = v, mask: Any = mask) -> float:
            attend_in_rows(side.base.model, q, k, v, mask)[0].sum().backward()
            return 0.0

        attention[n] = config.num_hidden_layers * min(timed(attend, ())[0] for _ in range(3))
        hidden = torch.randn(n, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        with Alive() as alive:
            _HeadLoss.apply(hidden, head.weight, None, torch.zeros(n, dtype=torch.long, device=device))
        loss_bytes[n] = alive.peak - hidden.nbytes  # what it keeps, the gradient of what it was given, is no surprise
    return {"seconds": seconds, "attention": attention, "loss_bytes": loss_bytes}
