"""A base that is larger than the memory it may use: three LoRA steps on a CPU, streamed from disk and not.

A random bfloat16 Llama is written to a temporary folder (TMPDIR: on a disk) and trained in processes of their own: without a
limit, and in a memory cgroup (Linux, v1 or v2, if it can be made) that cannot hold the weights. Each starts with the file out of
the page cache. Losses must be equal. Mapped weights are *clean*: under a limit the kernel evicts them by itself, so a base that
is not streamed may train as well. What each wants to have in memory is `peak_file_bytes` without a limit; about 100 MB of it
are libraries.

    python benchmarks/stream_limit.py --weights-mb 1500 --out benchmarks/results/stream_limit.json
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace
from typing import Any

MIB = 2**20
WIDTH, INNER, WORDS, STEPS, PATIENCE = 1024, 2816, 8192, 3, 1800  # seconds, until a run is ended
BLOCK_BYTES = 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH)
processes = multiprocessing.get_context("spawn")  # nothing heavy is imported before a process has joined its cgroup


def make(folder: str, layers: int) -> None:
    """Write the random model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    shape = LlamaConfig(vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers)
    LlamaForCausalLM(shape).save_pretrained(folder, max_shard_size="100GB")


def train(folder: str, streaming: bool, group: str | None, told: Any) -> None:
    """Three steps on random rows, and what they gave."""
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    logging.getLogger("torchao").setLevel(logging.ERROR)
    import torch
    from transformers import LlamaForCausalLM

    import featherweight as fw
    from featherweight.base import Base
    from featherweight.engine.train import Settings, fit
    from featherweight.rows import Row
    from featherweight.stream import streamed
    from featherweight.tokens import Example

    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(0)
    fw.attach(model, fw.LoRA(r=8))
    base = Base(model, SimpleNamespace(pad_token_id=0), "random", torch.device("cpu"))
    texts = [torch.randint(3, WORDS, (64,)).tolist() for _ in range(8)]
    rows, seconds = [Example(ids, ids, [], Row((), "", "random")) for ids in texts], list[float]()
    with streamed(model, base.device, "disk") if streaming else nullcontext():
        report = fit(base, rows, Settings(steps=STEPS, batch_size=2), on_step=lambda r: seconds.append(r.seconds))
    each = [round(b - a, 2) for a, b in zip([0.0, *seconds], seconds, strict=False)]
    told.send({"losses": report.losses, "seconds_per_step": each, "major_faults": getrusage(RUSAGE_SELF).ru_majflt})


def limited(limit: int) -> Path | None:
    """A new memory cgroup with this limit: below our own (v1), beside it (v2, not tried yet); None where there can be none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, own = line.split(":", 2)
        if kind in ("memory", ""):  # v1, v2
            above = own.strip("/") if kind else own.strip("/").rpartition("/")[0]
            group = Path("/sys/fs/cgroup", kind, above, f"featherweight-{os.getpid()}")
            try:
                group.mkdir()
                (group / ("memory.limit_in_bytes" if kind else "memory.max")).write_text(str(limit))
                return group
            except OSError as e:
                print(f"no limit: {e}")
                group.rmdir() if group.exists() else None
    return None


def run(folder: str, streaming: bool, group: Path | None) -> dict[str, Any]:
    """One process: what it told, and its peaks as seen from here."""
    with Path(folder, "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    heard, told = processes.Pipe(duplex=False)
    child = processes.Process(target=train, args=(folder, streaming, group and str(group), told))
    child.start()
    start, peaks = time.perf_counter(), {"VmRSS": 0, "RssAnon": 0, "RssFile": 0}
    while child.is_alive():
        for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
            if (kind := line.split(":")[0]) in peaks:
                peaks[kind] = max(peaks[kind], int(line.split()[1]) * 1024)
        if time.perf_counter() - start > PATIENCE:
            child.kill()
        time.sleep(0.005)
    found = {
        "streamed": streaming, "limited": group is not None, "exit_code": child.exitcode,
        "peak_bytes": peaks["VmRSS"], "peak_anonymous_bytes": peaks["RssAnon"], "peak_file_bytes": peaks["RssFile"],
    }  # fmt: skip
    return found | (heard.recv() if heard.poll() else {})


def main() -> None:
    """Make the model, run the processes, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-mb", type=int, default=1500)
    parser.add_argument("--limit-mb", type=int, help="default: room for a quarter of the weights")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with processes.Pool(1) as pool:
            pool.apply(make, (folder, max(3, args.weights_mb * MIB // BLOCK_BYTES)))
        size = Path(folder, "model.safetensors").stat().st_size
        runs = [run(folder, streaming, None) for streaming in (False, True)]
        limit = args.limit_mb * MIB if args.limit_mb else runs[0]["peak_anonymous_bytes"] + size // 4
        if group := limited(limit):
            try:
                runs += [run(folder, streaming, group) for streaming in (True, False)]
            finally:
                group.rmdir()
    from featherweight import provenance  # not before: see `processes`

    sizes = {"weights_bytes": size, "block_bytes": BLOCK_BYTES, "embeddings_and_head_bytes": 4 * WIDTH * WORDS}
    result = {**sizes, "limit_bytes": limit if group else None, "runs": runs, **provenance.record()}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    assert all(r.get("losses") == runs[0]["losses"] for r in runs[1:3]), "streaming changed what is learned"


if __name__ == "__main__":
    main()
