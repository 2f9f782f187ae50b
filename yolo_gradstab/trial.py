"""One trial of a sweep: what it is, how it is run in a process of its own, and how it ended.

A lock beside the trial's folder is held by the sweep and by the trial's process, whichever lives longer: a sweep that
is killed leaves processes behind, and the next one waits for them instead of starting the same trial twice. (Without
`fcntl`, on Windows, there is no lock.)
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import yaml

from yolo_gradstab.runs import Outcome, RunError, RunFolder, Status, locked, replacing
from yolo_gradstab.telemetry import read_run

__all__ = [
    "ENDED",
    "SweepError",
    "Trial",
    "TrialProcess",
    "flow",
    "outcome_of",
    "read_trial",
    "run_trial",
]

# A trial that ended so is not run again; a failed one only when asked.
ENDED: tuple[Outcome, ...] = ("completed", "diverged", "stopped", "failed")

STOP_GRACE_S = 20.0  # for a terminated trial to write its records, before it is killed
FOREVER_S = 1e9


class SweepError(ValueError):
    """A sweep the user must change; the message is one line and names the file or the key."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a sweep; saved as `trial.json` before it starts.

    Attributes:
        id: Hash of the canonical configuration; the name of its folder.
        arm: Its place in the grid, without the learning rate.
        lr0: Its nominal learning rate.
        seed: Its seed.
        point: Its place in the grid.
        command: What is executed.
    """

    id: str
    arm: dict[str, Any]
    lr0: float
    seed: int
    point: dict[str, Any]
    command: list[str]

    @property
    def label(self) -> str:
        """Its place in the grid and its seed, as on a command line."""
        point = {"lr0": self.lr0} | self.point
        return " ".join(f"{key}={flow(value)}" for key, value in point.items()) + f" seed={self.seed}"


def flow(value: Any) -> str:
    """A value in YAML's one-line style, as our command line reads it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


# What is recorded ----------------------------------------------------------------------------------------------------


def read_trial(folder: Path) -> Trial | None:
    """What the sweep wrote beside a trial's run; nothing for a run of its own.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / "trial.json"
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Trial)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: {error}") from None


def outcome_of(path: Path) -> Outcome | None:
    """How the run in a folder stands; nothing where there is none, or none that can be read."""
    try:
        return read_run(path).status.outcome
    except RunError:
        return None


# Running -------------------------------------------------------------------------------------------------------------


class TrialProcess:
    """The process of a trial, which another thread may end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.stopping = False
        self.timed_out = False  # and was stopped for that

    def run(self, command: list[str], output: Any, environment: Mapping[str, str], **options: Any) -> int | None:
        """Start it and return its exit status, or nothing where it was not let come to its own end."""
        time_limit_s, held = options.pop("time_limit_s"), options.pop("held")
        with self._lock:
            if self.stopping:
                return None
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                # In a session of its own, Ctrl-C in the terminal reaches it once, from us.
                start_new_session=True,
                pass_fds=() if held is None else (held,),
                **options,
            )
        try:
            # With a limit in any case: such a wait is made of short ones, between which Ray's cancelling gets through.
            status = self._process.wait(FOREVER_S if time_limit_s is None else time_limit_s)
        except subprocess.TimeoutExpired:
            self.timed_out = not self.stopping
            self.stop()
        return None if self.stopping else status

    def stop(self) -> None:
        """Terminate it, and kill it if it has not ended within the grace period; nothing is started afterwards."""
        with self._lock:
            self.stopping = True
            process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()  # not SIGINT, which Ray's workers block, and with them whatever they start
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_trial(
    trial: Trial,
    folder: Path,
    environment: Mapping[str, str],
    *,
    time_limit_s: float | None = None,
    again: tuple[Outcome, ...] = (),
    process: TrialProcess | None = None,
    cwd: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Run one trial to its end and leave a true status; returns the seconds it took.

    Args:
        trial: What to run.
        folder: Of the sweep.
        environment: Of the process.
        time_limit_s: After which it is ended, and counts as failed.
        again: Outcomes of an earlier attempt after which it is run again.
        process: Handle by which another thread may end it.
        cwd: Its working directory; ours by default.
        say: Takes a line where a process left by a killed sweep, or a resume by hand, is waited for.
    """
    process = process or TrialProcess()
    started_s = time.monotonic()
    path = folder / "trials" / trial.id
    path.mkdir(exist_ok=True)

    def waiting(reason: str) -> Callable[[], bool]:
        said = False

        def wait() -> bool:
            nonlocal said
            if not said:
                say(f"{trial.label}: {reason}; waiting for it")
            said = True
            return not process.stopping

        return wait

    left = waiting("still running, left by a sweep that was killed")
    with locked(folder / "trials" / f"{trial.id}.lock", left) as held:
        run = RunFolder(path)
        # The run's own lock, which a resume by hand may hold; one that was never held has none.
        resumed = waiting("another process trains into it")
        with locked(run.lock, resumed) if run.lock.is_file() else nullcontext():
            outcome = outcome_of(path)
            if process.stopping or (outcome in ENDED and outcome not in again):
                return time.monotonic() - started_s
            if run.gradstab.exists():  # of an attempt that did not end: its records would be mixed with new ones
                shutil.rmtree(run.gradstab)
            (path / "results.csv").unlink(missing_ok=True)  # to which the host would append
        with replacing(path / "trial.json") as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(trial), indent=2))
        log = folder / "trials" / f"{trial.id}.log"
        with log.open("wb") as output:
            status = process.run(trial.command, output, environment, time_limit_s=time_limit_s, held=held, cwd=cwd)
        _settle(path, status, time_limit_s if process.timed_out else None, log)
    return time.monotonic() - started_s


def _settle(path: Path, status: int | None, limit_s: float | None, log: Path) -> None:
    """Correct a status that the process could not, or that the sweep knows better."""
    run = RunFolder(path)
    try:
        recorded = run.read_status()
    except RunError:
        recorded = Status()
    if limit_s is not None and recorded.outcome in {"running", "interrupted", "failed"}:
        recorded.outcome, recorded.reason = "failed", f"not done after time_limit_s={limit_s:g}"
    elif recorded.outcome != "running":
        return
    elif status is None:
        recorded.outcome, recorded.reason = "interrupted", "killed after the sweep was interrupted"
    else:
        how = f"exit status {status}" if status >= 0 else f"signal {_signal_name(-status)}"
        recorded.outcome, recorded.reason = "failed", f"ended by {how}; its log ends: {_last_line(log)}"
    if not run.gradstab.is_dir():
        run.create({})
    run.write_status(recorded)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-200:] if lines else "it left no output"
