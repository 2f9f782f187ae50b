"""Train every case, read its run folder, and score the diagnosis: `make faults`, or in tests/ `python -m faults.run`.

    out=DIR          keep the runs there; a case that was trained there before is only read again
    only=TEXT,...    cases whose names contain one of these
    jobs=2           trainings at once

Prints a table of the faults, how soon each trouble was noticed, the healthy runs, and as its last line
`N/M faults named first, K false errors in H healthy runs`. Exit status 1 if under 95 % are named, or an error is false.
"""

from __future__ import annotations

import os

# Before torch and the host are imported, here and in the processes that train.
os.environ |= {"OMP_NUM_THREADS": "1", "YOLO_VERBOSE": "false", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}

import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import msgspec
import polars as pl
from conftest import DrawnSet

from faults.faults import FAULTS
from faults.healthy import HEALTHY
from faults.training import IMAGES, SIZE, Case, Outcome, Trouble, train_case
from yolo_gradstab import read_run
from yolo_gradstab.telemetry import Run

__all__ = ["Notice", "Result", "judge", "main", "onset", "score"]

LEAST_NAMED = 0.95
LIMITS: dict[Trouble, int] = {"nonfinite": 0, "blowup": 10, "collapse": 20}  # steps until a trouble is noticed


class Notice(msgspec.Struct, kw_only=True, frozen=True):
    """Steps from the beginning of a trouble until it was noticed; None where it never was, negative where foreseen.

    By either sign that sends a run back: an early warning (`warned`), or the judgement that it has diverged (`lost`).
    """

    trouble: Trouble
    began: int
    lost: int | None
    warned: int | None = None

    @property
    def in_time(self) -> bool:
        return self.lost_in_time or (self.warned is not None and self.warned <= LIMITS[self.trouble])

    @property
    def lost_in_time(self) -> bool:
        """Whether it would have been without the early warnings, which `guard.divergence=stop` does not act on."""
        return self.lost is not None and self.lost <= LIMITS[self.trouble]

    def __str__(self) -> str:
        after = "never" if self.lost is None else f"{self.lost:+d}"
        warned = "" if self.warned is None else f", warned {self.warned:+d}"
        return f"{self.trouble} {after}{warned} (limit {LIMITS[self.trouble]}){'' if self.in_time else ' LATE'}"


class Result(msgspec.Struct, kw_only=True):
    """A case as it was diagnosed; `findings` are (kind, severity, step), in order."""

    name: str
    task: str
    kinds: tuple[str, ...]
    findings: list[tuple[str, str, int | None]]
    ended: str
    notice: Notice | None = None
    seconds: float = 0.0

    @property
    def is_named(self) -> bool:
        return bool(self.findings) and self.findings[0][0] in self.kinds

    @property
    def errors(self) -> list[str]:
        return [kind for kind, severity, _ in self.findings if severity == "error"]


def judge(case: Case, folder: Path, outcome: Outcome) -> Result:
    """Read a run folder as a user would, and hold it against what was done to the run."""
    run = read_run(folder / "run")
    findings = [(finding.kind, finding.severity, finding.step) for finding in run.diagnose()]
    status = run.status
    ended = f"{status.outcome}{f' ({status.divergence})' if status.divergence else ''}"
    return Result(
        name=case.name,
        task=case.task,
        kinds=case.kinds,
        findings=findings,
        ended=ended + (f"; {outcome.error[:60]}" if outcome.error else ""),
        notice=_notice(case, run, outcome),
    )


def _notice(case: Case, run: Run, outcome: Outcome) -> Notice | None:
    """When it was noticed, by the events; when it began, by the fault or, for a rate, by the loss."""
    lost = [(e["step"], e["kind"]) for e in run.events if e["event"] == "divergence"]
    warned = [e["step"] for e in run.events if e["event"] == "warning"]
    if case.trouble is None:
        # A rate has no moment at which it is injected. Where the loss never left, the guard was there before it.
        if "lr_too_high" not in case.kinds or not lost:
            return None
        step, trouble = lost[0]
        began = onset(run.steps.filter(pl.col("step") <= step), trouble)
        if began is None:
            return None
        foreseen = min((at - began for at in warned), default=None)
        return Notice(trouble=trouble, began=began, lost=step - began, warned=foreseen)
    if outcome.acted is None:
        return Notice(trouble=case.trouble, began=0, lost=None)
    bad = [e for e in run.events if e["event"] in {"skip", "nonfinite"} and e["reason"] != "scaler_overflow"]
    seen = [step for step, _ in lost] + ([e["step"] for e in bad] if case.trouble == "nonfinite" else [])
    acted = outcome.acted
    return Notice(
        trouble=case.trouble,
        began=acted,
        lost=min((step - acted for step in seen if step >= acted), default=None),
        warned=min((step - acted for step in warned if step >= acted), default=None),
    )


def onset(steps: pl.DataFrame, trouble: Trouble) -> int | None:
    """From which step on the loss was lost: ten times its start, or for a collapse for good a hundredth of it.

    Args:
        steps: `step`, `loss` and `skipped`, as recorded, up to the step at which the trouble was noticed.
        trouble: Which of them.

    Returns:
        None where the loss shows no such step: it was noticed before.
    """
    applied = steps.filter(~pl.col("skipped"))
    over = pl.col("loss") / applied["loss"].head(10).median()
    if trouble == "collapse":
        alive = applied.filter(over > 0.01)["step"]
        found = applied.filter(pl.col("step") > (alive[-1] if len(alive) else -1))["step"]
    else:
        found = applied.filter(over > 10)["step"]
    return int(found[0]) if len(found) else None


def score(faults: Sequence[Result], healthy: Sequence[Result]) -> tuple[str, int]:
    """The last line, and the exit status."""
    named = sum(result.is_named for result in faults)
    errors = sum(len(result.errors) for result in healthy)
    line = f"{named}/{len(faults)} faults named first, {errors} false errors in {len(healthy)} healthy runs"
    return line, int(named < LEAST_NAMED * len(faults) or errors > 0)


def _run_case(index: int, sets: dict[str, DrawnSet], folder: Path) -> Result:
    """One case, in a process that trains one after the other; folders are numbered, so that no name is read."""
    import torch
    from ultralytics.utils import LOGGER

    torch.set_num_threads(1)
    LOGGER.setLevel("CRITICAL")
    case = [*FAULTS, *HEALTHY][index]
    begun, done = time.monotonic(), folder / "outcome.json"
    if done.is_file():
        return judge(case, folder, msgspec.json.decode(done.read_bytes(), type=Outcome))
    shutil.rmtree(folder, ignore_errors=True)  # of a suite that was broken off
    folder.mkdir(parents=True)
    outcome = train_case(case, sets[case.task], folder)
    done.write_bytes(msgspec.json.encode(outcome))
    result = judge(case, folder, outcome)
    result.seconds = time.monotonic() - begun
    return result


def run_all(indices: Sequence[int], out: Path, *, jobs: int) -> dict[int, Result]:
    """Train and judge cases, several at once; says on stderr how far it is."""
    sets = {task: DrawnSet(out / "sets" / task, task, images=IMAGES, size=SIZE) for task in ("detect", "pose")}
    results: dict[int, Result] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(_run_case, i, sets, out / f"{i:03d}"): i for i in indices}
        for future in as_completed(waiting):
            index = waiting[future]
            case = [*FAULTS, *HEALTHY][index]
            try:
                results[index] = future.result()
            except Exception:
                traceback.print_exc()
                results[index] = Result(
                    name=case.name, task=case.task, kinds=case.kinds, findings=[], ended="the suite itself failed"
                )
            print(f"{len(results)}/{len(indices)} {case.name}", file=sys.stderr)
    return results


def _table(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        first = "nothing" if not result.findings else "{} {}".format(*result.findings[0][:2])
        mark = "" if not result.kinds else "ok  " if result.is_named else "MISS"
        wanted = "" if not result.kinds or result.is_named else f", wanted {' or '.join(result.kinds)}"
        notice = f"; noticed: {result.notice}" if result.notice else ""
        false = f"; FALSE: {', '.join(result.errors)}" if not result.kinds and result.errors else ""
        title = f"{result.task:6} {result.name}"
        lines.append(f"{mark} {title:66} {first}{wanted}{notice}{false} [{result.ended}] {result.seconds:.0f} s")
    return "\n".join(lines)


def _notices(results: Sequence[Result]) -> str:
    notices = [result.notice for result in results if result.notice]
    parts = []
    for trouble, limit in LIMITS.items():
        mine = [notice for notice in notices if notice.trouble == trouble]
        parts.append(f"{trouble} {sum(notice.in_time for notice in mine)}/{len(mine)} within {limit} steps")
    alone = sum(notice.in_time and not notice.lost_in_time for notice in notices)
    return f"noticed in time: {', '.join(parts)}; {alone} of them by an early warning alone"


def main(argv: Sequence[str]) -> int:
    """Run the suite; returns the exit status."""
    options = dict(argument.partition("=")[::2] for argument in argv)
    unknown = options.keys() - {"out", "only", "jobs"}
    if unknown:
        print(f"unknown argument {sorted(unknown)[0]}; there are out=DIR, only=TEXT,... and jobs=2", file=sys.stderr)
        return 2
    wanted = [text for text in options.get("only", "").split(",") if text]
    cases = [*FAULTS, *HEALTHY]
    indices = [i for i, case in enumerate(cases) if not wanted or any(text in case.name for text in wanted)]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(options.get("out") or temporary).resolve()
        results = run_all(indices, out, jobs=int(options.get("jobs") or 2))
    faults = [results[i] for i in indices if i < len(FAULTS)]
    healthy = [results[i] for i in indices if i >= len(FAULTS)]
    line, status = score(faults, healthy)
    print(_table(faults), _table(healthy), _notices(faults), line, sep="\n\n" if healthy and faults else "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
