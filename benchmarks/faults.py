"""Every fault of docs/never-lose-work.md, asked of featherweight and of HF PEFT + `Trainer`: how often, and how often it held.

Ours are the tests that show each fault, run here and counted; kills are those of `kills.py`. The rival's are `faults_rival.py`.

    python benchmarks/faults.py --out benchmarks/results/faults.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HOUSE = Path(__file__).parent.parent
sys.path.insert(0, str(HOUSE / "tests"))


@dataclass(frozen=True)
class Fault:
    """A row of the table: what is done, what must come of it, which tests ask for it."""

    what: str
    wanted: str
    tests: tuple[str, ...]
    """`file::test`, with all its parameters."""


RUN, BASE, PLACES, KEPT = (f"tests/test_{n}.py::test_" for n in ("run_folder", "base_on_disk", "places", "checkpoints"))
FAULTS = {
    "kill": Fault(
        "SIGKILL at random instants, inside saves too",
        "no run lost, no partial checkpoint used, the result byte-identical",
        (
            "tests/test_killing.py::test_a_run_killed_at_random_instants_ends_in_the_same_bytes",
            f"{RUN}a_run_that_is_killed_in_its_first_moments_can_be_asked_for_again",
        ),
    ),
    "damage": Fault(
        "each file of a checkpoint deleted, cut, or one bit flipped",
        "refused by name, the one before it used, and said so",
        (
            f"{KEPT}a_damaged_checkpoint_is_refused_by_name",
            f"{KEPT}the_one_before_a_damaged_checkpoint_is_used",
            f"{KEPT}every_byte_of_the_small_files_counts",
            f"{RUN}a_checkpoint_that_is_damaged_is_named_and_the_run_still_ends_in_the_same_bytes",
        ),
    ),
    "disk": Fault(
        "a write limit, or a full disk, during a save",
        "a clear message, nothing half-written, it goes on or stops as asked, an older checkpoint resumes",
        (
            f"{KEPT}training_goes_on_without_a_checkpoint_that_cannot_be_written",
            f"{KEPT}or_it_stops_if_that_is_what_was_asked_for",
            f"{PLACES}a_limit_on_files_is_a_clear_message_and_training_goes_on",
            f"{PLACES}or_it_stops_as_asked_and_goes_on_when_there_is_room",
            f"{PLACES}an_adapter_that_does_not_fit_on_the_disk_is_saved_elsewhere",
        ),
    ),
    "nonfinite": Fault(
        "a loss or gradient that is NaN or infinite",
        "it stops before the update, names the rows, keeps the last finite adapter; or skips and counts",
        tuple(
            f"tests/test_nonfinite.py::test_{name}"
            for name in (
                "the_run_stops_before_the_update_and_names_the_row",
                "two_rows_of_a_batch_are_both_named",
                "asked_to_skip_it_goes_on_without_and_counts",
                "a_skipped_update_leaves_no_trace",
                "where_nothing_but_skipping_happens_it_gives_up",
                "the_command_line_says_which_lines_of_the_file",
            )
        ),
    ),
    "signals": Fault(
        "Ctrl-C once and twice, SIGTERM, a closed terminal",
        "saved, exit 130, 143, 129; the second at once, without a partial file",
        (
            f"{RUN}a_signal_saves_and_the_same_command_goes_on_to_the_same_bytes",
            f"{RUN}a_second_ctrl_c_ends_it_at_once_without_a_partial_file",
            f"{RUN}a_second_ctrl_c_in_the_middle_of_a_save_leaves_no_partial_file_either",
            f"{RUN}ctrl_c_after_the_last_step_keeps_the_adapter_and_leaves_the_evaluation_out",
            f"{KEPT}a_signal_in_the_middle_of_an_accumulation_window_undoes_the_update",
        ),
    ),
    "helpers": Fault(
        "a data worker killed or hung; the base's file removed, cut or overwritten",
        "an error within 60 s (or no harm), the checkpoint kept, no process left over",
        (
            f"{BASE}a_run_has_no_other_process_that_could_be_killed_or_hang",
            f"{BASE}a_base_whose_files_are_removed_does_no_harm",
            f"{BASE}a_base_that_is_cut_ends_the_run_at_once_and_costs_no_checkpoint",
            f"{BASE}a_base_that_is_overwritten_is_noticed_before_anything_is_saved",
        ),
    ),
    "two runs": Fault(
        "two runs in one folder; the lock of a process that is gone",
        "the second refused, naming the first; the lock recovered",
        (f"{RUN}a_second_run_in_a_folder_is_refused_and_told_of_the_first",),
    ),
    "places": Fault(
        "a clock that jumps, read-only folders, names that are long, spaced or unicode",
        "it works, or is one clear error",
        tuple(
            PLACES + name
            for name in (
                "folders_of_any_name_work",
                "folders_that_cannot_be_are_one_clear_error",
                "a_folder_that_is_read_only_is_one_clear_error",
                "a_folder_that_becomes_read_only_costs_checkpoints_and_not_the_adapter",
                "a_clock_that_jumps_changes_nothing",
                "files_from_the_future_change_nothing",
            )
        ),
    ),
    "settings": Fault(
        "gone on with: another rate, batch, other rows, another base",
        "refused, with the difference",
        (
            f"{RUN}other_settings_are_refused_with_the_differences",
            f"{RUN}other_data_is_refused_though_its_file_has_the_same_name",
            f"{RUN}another_base_is_refused_though_its_folder_has_the_same_name",
        ),
    ),
}


def ours(faults: list[str]) -> dict[str, Counter[str]]:
    """How many tests of each fault were run, and passed. A fault without tests, or a test that is not there, is an error."""
    names = [test for fault in faults for test in FAULTS[fault].tests]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.xml")
        newer = "ignore::FutureWarning"  # of a newer transformers than ours was written for
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-W",
            newer,
            "-o",
            "junit_family=xunit1",
            f"--junitxml={told}",
            *names,
        ]
        paths = os.pathsep.join([str(HOUSE / "src"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, cwd=HOUSE, env={**os.environ, "PYTHONPATH": paths}, check=False, stdout=sys.stderr)
        cases = list(ElementTree.parse(told).iter("testcase"))
    found = {fault: Counter[str]() for fault in faults}
    for fault, count in found.items():
        for test in FAULTS[fault].tests:
            file, _, name = test.partition("::")
            mine = [c for c in cases if c.get("file") == file and c.get("name", "").partition("[")[0] == name]
            if not mine or any(c.find("skipped") is not None for c in mine):
                raise SystemExit(f"{test} was not run")
            count["tried"] += len(mine)
            count["held"] += sum(c.find("failure") is None and c.find("error") is None for c in mine)
    return found


def table(rows: dict[str, dict[str, Any]], told: dict[str, Any]) -> str:
    """As Markdown."""
    made = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    lines = [
        "# Faults: how often each was tried, and how often it held",
        "",
        f"`python benchmarks/{told['command']}`, {told['date']}, {told['machine']}; {made}.",
        "",
        "| fault | must | featherweight: held of tried | PEFT + Trainer: held of tried |",
        "|---|---|---|---|",
    ]
    for key, row in rows.items():
        fault, mine, theirs = FAULTS[key], row.get("ours"), row["trainer"]
        held = sum(t["held"] for t in theirs)
        kills = row.get("kills")
        counted = f"{mine['held']} of {mine['tried']}" if mine else "not counted yet"
        also = f"; besides {kills['same']} of {kills['runs']} runs in {kills['kills']} kills" if kills else ""
        lines.append(f"| {fault.what} | {fault.wanted} | {counted}{also} | {held} of {len(theirs)} |")
    lines += [
        "",
        "Ours are counted as tests, each of which may try a fault many times. The rival's tries, one by one:",
        "",
    ]
    for key, row in rows.items():
        lines += [f"## {FAULTS[key].what}", "", "| try | held | what happened |", "|---|---|---|"]
        lines += [
            f"| {t['what']} | {'yes' if t['held'] else 'no'} | {t['came'].replace('|', '/')} |" for t in row["trainer"]
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Ask both sides, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS), help="a few of them, separated by commas")
    parser.add_argument("--kills", type=Path, default=HOUSE / "benchmarks" / "results" / "kills.json")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ours-again", action="store_true", help="the rival's tries are those in --out")
    given = parser.parse_args()
    faults = given.faults.split(",")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # else started in the background, tests could not press Ctrl-C

    import faults_rival
    from featherweight import provenance

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:  # side by side: nothing is timed
        counted = pool.submit(ours, faults)
        if given.ours_again:
            kept = json.loads(given.out.read_text(encoding="utf-8"))["faults"]
            theirs = {fault: kept[fault]["trainer"] for fault in faults}
        else:
            asked = faults_rival.ask(Path(folder, "rival"), faults)
            theirs = {fault: [asdict(t) for t in asked[fault]] for fault in faults}
        mine = counted.result()
    rows: dict[str, dict[str, Any]] = {
        fault: {"ours": dict(mine[fault]), "tests": FAULTS[fault].tests, "trainer": theirs[fault]} for fault in faults
    }
    if "kill" in rows and given.kills.is_file():
        rows["kill"]["kills"] = json.loads(given.kills.read_text())
    told = provenance.record()
    if given.out:
        given.out.write_text(
            json.dumps({"faults": rows, **told}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        given.out.with_suffix(".md").write_text(table(rows, told), encoding="utf-8")
    print(table(rows, told))


if __name__ == "__main__":
    main()
