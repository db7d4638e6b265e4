"""One base in memory for many processes: how much is saved where its weights are views of one file.

    python benchmarks/shared_base.py --out benchmarks/results/shared_base.json       # a minute; Linux

Each process loads the default model and reads every weight. A page that several have mapped counts fully in each one's resident size
(RSS), and in equal shares in its proportional size (PSS): the sum of the latter is what they really take. In the type that the file holds
(bfloat16) the weights are shared; converted to another (float32) each process has its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from featherweight import on_disk, provenance
from featherweight.base import load_base

LOAD = """
import sys
import featherweight as fw
base = fw.load_base(dtype=sys.argv[1])
print(sum(float(p.detach().float().sum()) for p in base.model.parameters()), flush=True)
sys.stdin.readline()
"""
MIB = 2**20


def taken(dtype: str, processes: int) -> tuple[int, int]:
    """(sum of resident sizes, sum of proportional sizes) in bytes of so many processes that hold the base."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOAD, dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    sums = {"Rss": 0, "Pss": 0}
    for process in started:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            name, _, size = line.partition(":")
            if name in sums:
                sums[name] += int(size.split()[0]) * 1024
    for process in started:
        process.communicate(b"\n")
    return sums["Rss"], sums["Pss"]


def main() -> None:
    """One, two and three processes, in both types."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    load_base(dtype="bfloat16")  # fetched and unpacked, if need be
    found = []
    for dtype in ("bfloat16", "float32"):
        for processes in (1, 2, 3):
            resident, proportional = taken(dtype, processes)
            found.append(
                {"dtype": dtype, "processes": processes, "resident_bytes": resident, "proportional_bytes": proportional}
            )
            print(
                f"{dtype}, {processes} processes: resident {resident / MIB:,.0f} MiB, really {proportional / MIB:,.0f} MiB",
                flush=True,
            )
    on_disk.write(args.out, json.dumps({**provenance.record(), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
