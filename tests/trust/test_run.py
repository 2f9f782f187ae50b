"""The rows of the table, of outputs written by hand, and one of them for real."""

import json
import subprocess
import sys

from .matrix import counts, pinned
from .run import TESTS, of_endurance, of_kills, of_ranks, of_versions


def test_counts_are_read_from_the_last_line_of_pytest() -> None:
    assert counts("3 failed, 1570 passed, 25 skipped, 2 errors in 500.00s (0:08:20)") == {
        "failed": 3,
        "passed": 1570,
        "skipped": 25,
        "error": 2,
    }


def test_other_versions_replace_what_the_constraints_name_and_what_a_torch_brings() -> None:
    same = pinned(ultralytics="8.4.183", torch="2.15.0").splitlines()
    assert [line for line in same if line.startswith(("ultralytics=", "torch="))] == [
        "torch==2.15.0",
        "ultralytics==8.4.183",
    ]
    older = pinned(ultralytics="8.4.190", torch="2.11.0").splitlines()
    assert "torch==2.11.0" in older
    assert not [line for line in older if line.startswith(("torchvision", "nvidia-", "triton"))]
    assert [line for line in older if line.startswith("numpy")]


def test_kills_are_added_up_and_what_is_wrong_is_counted() -> None:
    row = {"kind": "a", "kills": 20, "most_lost_s": 1.25, "resumed": 15, "anew": 3, "done": 2, "wrong": []}
    rows = [row, row | {"kind": "b", "kills": 10, "most_lost_s": 0.5}, {"kind": "disk", "wrong": []}]
    said = of_kills("chatter\n" + json.dumps([*rows, {"kind": "full", "wrong": ["x"]}]))
    for part in (
        "30 kills",
        "at most 1.2 s",
        "30 resumed",
        "6 had no checkpoint",
        "4 had ended",
        "1 of 2 other",
        "1 wrong",
    ):
        assert part in said


def test_a_version_that_fails_is_named() -> None:
    cell = {"ultralytics": "8.4.190", "torch": "2.15.0", "passed": 90, "failed": 0}
    said = of_versions(json.dumps([cell, cell | {"ultralytics": "8.4.1", "passed": 80, "failed": 10}]))
    assert said == "1 of 2 pairs (8.4.190 with torch 2.15.0): 80 to 90 tests passed; failures: ['8.4.1/2.15.0: 10']"


def test_ranks_that_fail_are_counted() -> None:
    assert of_ranks("...\n1 failed, 5 passed, 9 deselected in 60.1s\n") == "5 of 6 tests passed"


def test_a_long_run_says_what_it_came_to() -> None:
    ran = {"steps": 20, "records": 19, "slowdown": 1.02, "rss_mib": [100.2, 105.0], "bytes_per_step": 63.0}
    ran |= {"rollbacks": 0, "outcome": "completed", "report_bytes": 9}
    said = of_endurance("progress\n" + json.dumps(ran))
    assert "20 steps, 19 recorded" in said
    assert "100 MiB at a fifth of them, 105 at the end" in said


def test_a_row_for_real() -> None:
    command = [sys.executable, "-m", "trust.run", "only=quirks"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=True)
    assert "| Quirks of COCO files |" in done.stdout
    assert "taken and right" in done.stdout


def test_an_unknown_part_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trust.run", "only=luck"], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "only=luck is none of kills, inputs, quirks, versions, ranks, endurance",
    )
