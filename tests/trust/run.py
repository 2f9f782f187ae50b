"""The table of the README: what was done to the package on purpose, and what became of it.

    cd tests && python -m trust.run [only=kills,inputs,quirks,versions,ranks,endurance] [kills=50] [inputs=100000]
                                    [steps=20000] [matrix="ultralytics=8.4.190"]

Prints a row as soon as it is measured. All of it takes hours, most of them the versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trust.matrix import counts

TESTS = Path(__file__).resolve().parents[1]


def last_line(out: str) -> str:
    """Of what says it all in its last line."""
    return out.strip().splitlines()[-1]


def of_kills(out: str) -> str:
    """Of `trust.kills format=json`."""
    rows: list[dict[str, Any]] = json.loads(out[out.index("[") :])
    killed = [row for row in rows if row.get("kills")]
    went_on = {name: sum(row[name] for row in killed) for name in ("resumed", "anew", "done")}
    lost = max(row["most_lost_s"] for row in killed)
    held = sum(not row["wrong"] for row in rows if "kills" not in row)
    wrong = sum(len(row["wrong"]) for row in rows)
    return (
        f"{sum(row['kills'] for row in killed)} kills and SIGTERMs of runs: at most {lost:.1f} s of records lost, "
        f"{went_on['resumed']} resumed to the same bits, {went_on['anew']} had no checkpoint yet, "
        f"{went_on['done']} had ended; {held} of {len(rows) - len(killed)} other cases hold (sweeps killed, full and "
        f"read-only disks, neighbours); {wrong} wrong"
    )


def of_versions(out: str) -> str:
    """Of `trust.matrix format=json`."""
    cells = json.loads(out)
    good = [cell for cell in cells if not cell["failed"]]
    tests = f"{min(cell['passed'] for cell in cells)} to {max(cell['passed'] for cell in cells)} tests passed"
    pairs = ", ".join(f"{cell['ultralytics']} with torch {cell['torch']}" for cell in good)
    failed = [f"{cell['ultralytics']}/{cell['torch']}: {cell['failed']}" for cell in cells if cell["failed"]]
    return f"{len(good)} of {len(cells)} pairs ({pairs}): {tests}" + (f"; failures: {failed}" if failed else "")


def of_ranks(out: str) -> str:
    """Of pytest's summary."""
    found = counts(last_line(out))
    failed = found.get("failed", 0) + found.get("error", 0)
    return f"{found.get('passed', 0)} of {found.get('passed', 0) + failed} tests passed"


def of_endurance(out: str) -> str:
    """Of `trust.endurance`."""
    ran = json.loads(last_line(out))
    before, after = ran["rss_mib"]
    return (
        f"{ran['steps']} steps, {ran['records']} recorded, {ran['bytes_per_step']} bytes a step; {before:.0f} MiB at a "
        f"fifth of them, {after:.0f} at the end; a step {ran['slowdown']} times as long; {ran['rollbacks']} rollbacks; "
        f"{ran['outcome']}; the report opens ({ran['report_bytes']} bytes)"
    )


def main() -> int:
    """Run what is asked for, print the rows."""
    options = {"only": "kills,inputs,quirks,versions,ranks,endurance", "kills": "50", "inputs": "100000"}
    options |= {"steps": "20000", "matrix": ""}
    options |= dict(word.partition("=")[::2] for word in sys.argv[1:])
    pytest = ["pytest", "-q", "-p", "no:cacheprovider", "test_distributed.py", "test_executors.py", "-k"]
    parts: dict[str, tuple[str, list[str], Callable[[str], str]]] = {
        "kills": ("Crash safety", ["trust.kills", f"kills={options['kills']}", "format=json"], of_kills),
        "inputs": ("Broken COCO files", ["trust.fuzz_coco", f"inputs={options['inputs']}"], last_line),
        "quirks": ("Quirks of COCO files", ["trust.quirks"], last_line),
        "versions": (
            "Versions of Ultralytics",
            ["trust.matrix", "format=json", *options["matrix"].split()],
            of_versions,
        ),
        "ranks": (
            "Two ranks, one killed; two Ray nodes, one killed",
            [*pytest, "processes_train or killed_rank or ray"],
            of_ranks,
        ),
        "endurance": ("Endurance", ["trust.endurance", f"steps={options['steps']}"], of_endurance),
    }
    print("| | |\n|:--|:--|", flush=True)
    status = 0
    for name in options["only"].split(","):
        if name not in parts:
            sys.exit(f"only={name} is none of {', '.join(parts)}")
        title, words, summary = parts[name]
        started_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=TESTS,
            env=os.environ | {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        status = status or done.returncode
        minutes = (time.monotonic() - started_s) / 60
        held = "" if done.returncode == 0 else f" **Failed, exit status {done.returncode}.**"
        print(f"| {title} | {summary(done.stdout)}.{held} {minutes:.0f} min |", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
