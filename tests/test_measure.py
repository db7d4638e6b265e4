"""Memory while one step runs, and energy where a device tells it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import featherweight as fw
from featherweight.adapter import attach
from featherweight.engine.memory import held_bytes, host_peak_bytes, reserved_bytes
from featherweight.engine.train import Report, Settings, fit
from featherweight.measure import EVERY_SECONDS, StepMemory, _processor_joules, energy_meter, thinned
from featherweight.tokens import writer_for

CPU = torch.device("cpu")


def test_the_memory_of_a_step_is_that_of_one_step_and_sees_what_it_takes() -> None:
    watch, kept = StepMemory(CPU, steps=10), list[torch.Tensor]()
    for step in range(1, 8):
        if watch._thread is not None:  # the step that is watched
            kept.append(torch.ones(32 * 2**20))  # 128 MiB
            time.sleep(40 * EVERY_SECONDS)
        report = Report(losses=[0.0] * step)
        watch.on_step(report)
    assert len(kept) == 1
    assert len(watch.samples) > 5
    seconds, held = zip(*watch.samples, strict=True)
    assert list(seconds) == sorted(seconds)
    assert seconds[-1] < 2
    assert max(held) - min(held) > 100 * 2**20


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_a_run_however_short_ends_its_watch(llama: Path, reviews: Path, steps: int) -> None:
    base, task = fw.load_base(str(llama), dtype="float32"), fw.load_task(str(reviews))
    attach(base.model, fw.LoRA(r=2))
    watch = StepMemory(CPU, steps)
    fit(base, writer_for(base, None).examples(task.train)[0], Settings(steps=steps), on_step=watch.on_step)
    watch.stop()
    assert watch._thread is None
    assert all(held > 2**20 for _, held in watch.samples)


def test_thinned_samples_keep_the_peak_and_the_order() -> None:
    samples = [(i / 1000, 100 + (i == 777)) for i in range(1000)]
    few = thinned(samples, 50)
    assert len(few) == 50
    assert max(held for _, held in few) == 101
    assert few == sorted(few)
    assert thinned(samples[:20], 50) == samples[:20]
    assert thinned([]) == []


def test_a_cpu_tells_what_it_holds_and_reserves_nothing() -> None:
    before = held_bytes(CPU)
    more = torch.ones(16 * 2**20)
    assert held_bytes(CPU) - before > 50 * 2**20
    assert host_peak_bytes() >= held_bytes(CPU) - 2**20
    assert reserved_bytes(CPU) is None
    del more


def test_energy_is_the_sum_over_packages_since_it_was_asked_first_and_survives_a_counter_that_begins_anew(
    tmp_path: Path,
) -> None:
    for name, now in (("intel-rapl:0", 900), ("intel-rapl:1", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{now}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    read = _processor_joules(tmp_path)
    assert read is not None
    assert read() == 0
    (tmp_path / "intel-rapl:0/energy_uj").write_text("50\n")  # past its range
    (tmp_path / "intel-rapl:1/energy_uj").write_text("160\n")
    assert read() == pytest.approx((150 + 60) / 1e6)
    (tmp_path / "intel-rapl:1/energy_uj").write_text("170\n")
    assert read() == pytest.approx((150 + 70) / 1e6)


def test_where_nobody_tells_energy_there_is_none(tmp_path: Path) -> None:
    assert _processor_joules(tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0/energy_uj").write_text("what\n")
    assert _processor_joules(tmp_path) is None
    assert energy_meter(torch.device("mps")) is None
