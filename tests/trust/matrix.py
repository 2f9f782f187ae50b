"""The test suite over versions of Ultralytics and torch, each pair in an environment of its own.

    cd tests && python -m trust.matrix [ultralytics=8.4.183,8.4.190] [torch=2.15.0] [tests=tests/test_trainer.py,...]
                                       [folder=DIR] [format=text|json]

Everything else is as `constraints.txt` says, except what a torch brings with it. Environments are kept in `.matrix`;
the first time, each takes an installation (half a minute with uv where it knows the packages already).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from yolo_gradstab.host import TESTED

ROOT = Path(__file__).resolve().parents[2]
# The oldest tested release, some between, and the newest; with the newest torch. And the oldest torch with the newest.
RELEASES = (TESTED["ultralytics"][0], "8.4.185", "8.4.187", "8.4.189", TESTED["ultralytics"][1])
OLDEST_TORCH, NEWEST_TORCH = TESTED["torch"]
OF_TORCH = ("torch", "torchvision", "triton", "nvidia-", "cuda-", "setuptools", "sympy", "networkx", "mpmath")


class Cell(NamedTuple):
    """A pair of versions, and what became of the suite with it."""

    ultralytics: str
    torch: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    first_failed: list[str]


def pinned(*, ultralytics: str, torch: str) -> str:
    """The constraints with these two versions in place of the ones they name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    same_torch = f"torch=={torch}" in lines
    kept = [
        line for line in lines if not line.startswith("ultralytics==") and (same_torch or not line.startswith(OF_TORCH))
    ]
    return "\n".join([*kept, f"ultralytics=={ultralytics}", *([] if same_torch else [f"torch=={torch}"])]) + "\n"


def environment(folder: Path, *, ultralytics: str, torch: str) -> Path:
    """The Python of an environment with these versions, made where it is missing or out of date."""
    venv = folder / f"ultralytics-{ultralytics}-torch-{torch}"
    python = venv / "bin" / "python"
    ready = venv / "ready"
    if not ready.exists() or ready.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        venv.mkdir(parents=True, exist_ok=True)
        (venv / "constraints.txt").write_text(pinned(ultralytics=ultralytics, torch=torch))
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        uv = Path(sys.executable).with_name("uv")
        install = [uv, "pip", "install", "--python", python] if uv.exists() else [python, "-m", "pip", "install"]
        wanted = ["--quiet", "-c", venv / "constraints.txt", "-e", f"{ROOT}[dev]"]
        subprocess.run([*map(str, install), *map(str, wanted)], check=True)
        ready.touch()
    return python


def counts(summary: str) -> dict[str, int]:
    """Of pytest's last line: `3 failed, 1570 passed, 25 skipped in 500.00s`."""
    found = re.findall(r"(\d+) (\w+)", summary.partition(" in ")[0])
    return {word.removesuffix("s"): int(number) for number, word in found}


def try_cell(folder: Path, *, ultralytics: str, torch: str, tests: list[str]) -> Cell:
    """Run the suite with these versions."""
    python = environment(folder, ultralytics=ultralytics, torch=torch)
    started_s = time.monotonic()
    command = [str(python), "-m", "pytest", "-q", "-n", "2", "-m", "not slow and not gpu", *tests]
    log = python.parents[1] / "pytest.log"  # to be looked at while it grows
    env = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text().strip().splitlines() or ["pytest said nothing"]
    found = counts(lines[-1])
    failed = [line.partition(" ")[2] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    number_failed = found.get("failed", 0) + found.get("error", 0)
    if done.returncode and not number_failed:
        number_failed, failed = 1, [lines[-1]]
    return Cell(
        ultralytics,
        torch,
        found.get("passed", 0),
        number_failed,
        found.get("skipped", 0),
        round(time.monotonic() - started_s, 1),
        failed[:20],
    )


def main() -> int:
    """Try every pair, print as they end."""
    options = {"ultralytics": "", "torch": "", "tests": "tests", "folder": str(ROOT / ".matrix"), "format": "text"}
    options |= dict(word.partition("=")[::2] for word in sys.argv[1:])
    pairs = [(release, NEWEST_TORCH) for release in RELEASES] + [(RELEASES[-1], OLDEST_TORCH)]
    if options["ultralytics"] or options["torch"]:
        releases = (options["ultralytics"] or RELEASES[-1]).split(",")
        pairs = [(r, torch) for r in releases for torch in (options["torch"] or NEWEST_TORCH).split(",")]
    cells = []
    for release, torch in pairs:
        cell = try_cell(Path(options["folder"]), ultralytics=release, torch=torch, tests=options["tests"].split(","))
        cells.append(cell)
        if options["format"] == "text":
            what = f"{cell.passed} passed, {cell.failed} failed, {cell.skipped} skipped in {cell.seconds:.0f} s"
            print(f"ultralytics {release:8} torch {torch:7} {what}", *cell.first_failed, sep="\n  ", flush=True)
    if options["format"] == "json":
        print(json.dumps([cell._asdict() for cell in cells]))
    return 1 if any(cell.failed for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
