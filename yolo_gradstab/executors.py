"""Where the trials of a sweep run: processes on this machine, or tasks of a Ray cluster.

Ray does the distributing, the retrying after a lost machine, and the sharing of GPUs; a task runs a trial as this
machine would. The sweep's folder must then be on storage that every machine sees, as Ray's own training libraries ask.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import msgspec
import polars as pl

from yolo_gradstab.runs import (
    DivergenceKind,
    Outcome,
    RunError,
    RunFolder,
    Status,
    counted,
    locked,
    one_line,
    terminable,
)
from yolo_gradstab.telemetry import read_run
from yolo_gradstab.trial import (
    ENDED,
    STOP_GRACE_S,
    SweepError,
    Trial,
    TrialProcess,
    outcome_of,
    run_trial,
)

__all__ = ["TrialState", "devices", "run_trials"]

TICK_S = 0.5  # between looks at what has ended, and at signals
WATCH_S = 1.0
RAY_RETRIES = 3  # of a trial whose machine was lost

Done = tuple[Trial, float]  # and the seconds it took


class TrialState(msgspec.Struct, kw_only=True):
    """How a trial stands, for a live display.

    Attributes:
        trial: Which.
        outcome: As in its status; null before it starts.
        divergence: Of which kind, if it has diverged.
        step: Optimizer steps recorded.
        loss: At the last of them.
        total_norm: At the last of them.
        metric: What it is judged by, at its end.
        seconds: It has taken.
    """

    trial: Trial
    outcome: Outcome | None = None
    divergence: DivergenceKind | None = None
    step: int = 0
    loss: float | None = None
    total_norm: float | None = None
    metric: float | None = None
    seconds: float = 0.0


def run_trials(
    trials: list[Trial],
    folder: Path,
    say: Callable[[str], None],
    *,
    jobs: int = 1,
    executor: Literal["local", "ray"] = "local",
    time_limit_s: float | None = None,
    own_device: bool = False,
    watch: Callable[[list[TrialState]], None] | None = None,
    retry: bool = False,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Run what has not been run yet, whatever the commands are.

    Args:
        trials: In the order they are started.
        folder: Of the sweep.
        say: Takes lines of progress.
        jobs: At once.
        executor: Where.
        time_limit_s: Of each trial.
        own_device: The commands name their device, so GPUs are not dealt out.
        watch: Takes all states, about once a second.
        retry: Run failed ones again.
        prepare: Called once the folder is this sweep's own, before anything is started.

    Raises:
        SweepError: The folder is in use, or the executor is not to be had; nothing has been started.
    """
    again: tuple[Outcome, ...] = ("failed",) if retry else ()
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    lock = folder / "sweep.lock"
    try:
        with terminable(), locked(lock):
            if prepare is not None:
                prepare()
            _run_locked(
                trials, folder, say, jobs, executor, own_device, watch, {"time_limit_s": time_limit_s, "again": again}
            )
    except BlockingIOError:
        raise SweepError(
            f"{lock}: another sweep is running in this folder; wait for it, or give another out="
        ) from None


def _run_locked(
    trials: list[Trial],
    folder: Path,
    say: Callable[[str], None],
    jobs: int,
    executor: Literal["local", "ray"],
    own_device: bool,
    watch: Callable[[list[TrialState]], None] | None,
    options: dict[str, Any],
) -> None:
    outcomes = {trial.id: outcome_of(folder / "trials" / trial.id) for trial in trials}
    pending = [t for t in trials if outcomes[t.id] not in ENDED or outcomes[t.id] in options["again"]]
    done = len(trials) - len(pending)
    say(f"{counted(len(trials), 'trial')} in {folder}, {done} of them already done; {min(jobs, len(trials))} at a time")
    execute = _run_by_ray if executor == "ray" else _run_here
    looks = _Looks(trials, folder, options["again"])
    number, looked_s = done, 0.0
    # Closed by name: on Ctrl-C the traceback would keep the generator alive, and the trials with it.
    with closing(execute(pending, folder, jobs, options, own_device, say)) as ends:
        for end in ends:
            if end is not None:
                number += 1
                trial, seconds = end
                say(f"trial {number}/{len(trials)} {trial.label}: {_ending(folder, trial)}, {_duration(seconds)}")
                if number == done + 1 and len(pending) > 1:
                    rest_s = seconds * math.ceil((len(pending) - 1) / jobs)
                    say(f"about {_duration(rest_s)} for the other {len(pending) - 1}, each as long as the first")
            if watch and (time.monotonic() - looked_s > WATCH_S or number == len(trials)):
                watch(looks.all())
                looked_s = time.monotonic()
    failed = [trial for trial in trials if outcome_of(folder / "trials" / trial.id) == "failed"]
    if failed:
        logs = ", ".join(str(folder / "trials" / f"{trial.id}.log") for trial in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        say(f"{len(failed)} of {len(trials)} trials failed; see {logs}{more}. retry=failed runs them again")


def _ending(folder: Path, trial: Trial) -> str:
    run = read_run(folder / "trials" / trial.id)
    status = run.status
    if status.outcome in {"failed", "stopped"}:
        return f"{status.outcome} ({status.reason})"
    metric = run.metric
    how = f"{status.outcome} ({status.divergence})" if status.divergence else status.outcome
    found = "no metric" if metric is None else f"{run.metric_name} {metric:.3g}"
    return f"{how} after {counted(status.step, 'step')}, {found}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# This machine --------------------------------------------------------------------------------------------------------


def _run_here(
    pending: list[Trial],
    folder: Path,
    jobs: int,
    options: Mapping[str, Any],
    own_device: bool,
    say: Callable[[str], None],
) -> Generator[Done | None, None, None]:
    """Each trial as it ends, and nothing now and then: a signal wakes any thread, and Python acts on it in this one."""
    gpus = [] if own_device or jobs == 1 else _visible_gpus()
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    processes = {trial.id: TrialProcess() for trial in pending}

    def run(trial: Trial) -> float:
        slot = slots.get()
        try:
            environment = _threads(jobs) | os.environ | devices(slot, gpus)
            return run_trial(trial, folder, environment, process=processes[trial.id], say=say, **options)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[float], Trial] = {pool.submit(run, trial): trial for trial in pending}
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=TICK_S, return_when=FIRST_COMPLETED)
                if not ended:
                    yield None
                for future in ended:
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with ThreadPoolExecutor(len(processes)) as stopping:  # together: each has its grace period
                list(stopping.map(TrialProcess.stop, processes.values()))
            raise


def _threads(jobs: int) -> dict[str, str]:
    """The processor's threads shared among the trials that run at once."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def devices(slot: int, gpus: list[str]) -> dict[str, str]:
    """What a trial sees of the GPUs: one of them, in turn; nothing is said where there is none.

    Example:
        >>> [devices(slot, ["0", "3"]) for slot in range(3)]
        [{'CUDA_VISIBLE_DEVICES': '0'}, {'CUDA_VISIBLE_DEVICES': '3'}, {'CUDA_VISIBLE_DEVICES': '0'}]
    """
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}


def _visible_gpus() -> list[str]:
    # To import torch takes seconds, in vain where Linux has no driver: NVIDIA's, AMD's, or that of Windows below it.
    if sys.platform == "linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))):
        return []
    try:
        import torch
    except ImportError:
        return []
    count = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:count] if given else [str(i) for i in range(count)]


# Ray -----------------------------------------------------------------------------------------------------------------


def _run_by_ray(
    pending: list[Trial],
    folder: Path,
    jobs: int,
    options: Mapping[str, Any],
    own_device: bool,
    say: Callable[[str], None],
) -> Generator[Done | None, None, None]:
    ray, ours = _ray()
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        threads = max(1, int(min(cpus / jobs, max((node.get("CPU", 0) for node in nodes), default=1))))
        share = 0.0 if own_device or not gpus else 1 / math.ceil(jobs / gpus)  # of one GPU: no task spans two
        task = ray.remote(_task).options(
            num_cpus=threads, num_gpus=share, max_retries=RAY_RETRIES, scheduling_strategy="SPREAD"
        )
        kept = ("OMP_", "MKL_", "YOLO_", "GRADSTAB_")
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {key: value for key, value in os.environ.items() if key.startswith(kept)}
        place = (str(folder.absolute()), environment, str(Path.cwd()), dict(options))
        waiting = list(reversed(pending))
        running: dict[Any, Trial] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    trial = waiting.pop()
                    running[task.remote(msgspec.json.encode(trial), *place)] = trial
                ended, _ = ray.wait(list(running), timeout=TICK_S)
                if not ended:
                    yield None
                for reference in ended:
                    trial = running.pop(reference)
                    yield trial, _result(ray, reference, trial, folder)
        except BaseException:
            for reference in running:
                ray.cancel(reference)  # a KeyboardInterrupt in the task, which ends its process
            ray.wait(list(running), num_returns=len(running), timeout=STOP_GRACE_S + 5)
            raise
    finally:
        if ours:
            ray.shutdown()


def _ray() -> tuple[Any, bool]:
    """Ray, connected to the cluster there is (`RAY_ADDRESS`), or to one of this machine; and whether that was us."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise SweepError('executor: ray needs Ray; install it with: pip install "yolo-gradstab[ray]"') from None
    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
    return ray, True


def _task(encoded: bytes, folder: str, environment: dict[str, str], cwd: str, options: dict[str, Any]) -> float:
    """On the machine that runs the trial."""
    trial = msgspec.json.decode(encoded, type=Trial)
    for path in (folder, cwd):
        if not Path(path).is_dir():
            raise SweepError(
                f"{path} is not there on {platform.node()}; with executor: ray, give an out= and start the sweep in a "
                "folder that every machine of the cluster sees"
            )
    # This machine's Python, wherever it lies.
    command = [sys.executable if part == trial.command[0] else part for part in trial.command]
    process = TrialProcess()
    try:
        return run_trial(
            msgspec.structs.replace(trial, command=command),
            Path(folder),
            {**os.environ, **environment},
            process=process,
            cwd=Path(cwd),
            **options,
        )
    except BaseException:
        process.stop()
        raise


def _result(ray: Any, reference: Any, trial: Trial, folder: Path) -> float:
    """The seconds a task took; a trial whose machines were lost again and again has failed."""
    try:
        return float(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SweepError):
            raise SweepError(str(error.cause)) from None
        reason = f"{type(error.cause).__name__}: {error.cause}"
    except ray.exceptions.RayError as error:
        reason = f"lost with its machine, {RAY_RETRIES + 1} times: {one_line(error)}"
    run = RunFolder(folder / "trials" / trial.id)
    run.create({})
    run.write_status(Status(outcome="failed", reason=reason))
    return 0.0


# Looking -------------------------------------------------------------------------------------------------------------


class _Looks:
    """States of trials, read from their folders; of running ones only the newest part of the records."""

    def __init__(self, trials: list[Trial], folder: Path, again: tuple[Outcome, ...]) -> None:
        self._trials = trials
        self._waiting: tuple[Outcome, ...] = ("interrupted", *again)  # how one stands that is run again
        self._folder = folder
        self._ended: dict[str, TrialState] = {}
        self._since_s = time.time()

    def all(self) -> list[TrialState]:
        return [self._ended.get(trial.id) or self._look(trial) for trial in self._trials]

    def _look(self, trial: Trial) -> TrialState:
        state = TrialState(trial=trial)
        path = self._folder / "trials" / trial.id
        try:
            started_s = (path / "trial.json").stat().st_mtime
            if started_s >= self._since_s - 1:  # by this sweep; its process is still loading
                state.outcome, state.seconds = "running", time.time() - started_s
            run = read_run(path)
            status = run.status
            if status.outcome in self._waiting and state.outcome is None:
                return state  # of an earlier sweep: it waits for its turn
            state.outcome, state.divergence, state.step = status.outcome, status.divergence, status.step
            state.seconds = status.seconds
            if status.outcome in ENDED:
                state.metric = run.metric
                self._ended[trial.id] = state
            else:
                state.seconds = time.time() - started_s
                newest = max(run.folder.steps.glob("*.parquet"), default=None)
                if newest is not None:
                    columns = pl.read_parquet(newest, columns=["step", "loss", "total_norm"], glob=False)
                    state.step, state.loss, state.total_norm = columns.row(-1)
        # Read while it is being written, or damaged.
        except (RunError, OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
            pass
        return state
