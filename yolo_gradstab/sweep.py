"""A grid of training runs: learning rate x policy x seed, each trial a process of its own.

A sweep's folder holds `sweep.yaml` (the specification as run) and, per trial, `trials/<id>/` (the host's run folder,
with `trial.json` beside its files) and `trials/<id>.log`. The id is a hash of the trial's canonical configuration, so
the same sweep started again, or with a longer grid, continues.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import polars as pl
import yaml

from yolo_gradstab.config import Config, as_numbers, load_config, nearest, read_config_file
from yolo_gradstab.runs import Outcome, RunError, replacing, terminable
from yolo_gradstab.telemetry import Run, read_run

__all__ = [
    "METRICS",
    "Spec",
    "SweepError",
    "Trial",
    "final_metric",
    "plan",
    "read_spec",
    "read_trial",
    "run_sweep",
    "trial_command",
]

log = logging.getLogger(__name__)

# The host's names of mAP50-95; a pose run has both, and is judged by its key points.
METRICS = ("metrics/mAP50-95(P)", "metrics/mAP50-95(B)")

# A trial that ended so is not run again.
DONE: tuple[Outcome, ...] = ("completed", "diverged", "stopped")

STOP_GRACE_S = 20.0  # for an interrupted trial to write its records, before it is killed


class SweepError(ValueError):
    """A sweep the user must change; the message is one line and names the file or the key."""


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sweep, as written in YAML.

    Attributes:
        task: What is trained.
        train: Ultralytics' training arguments and our keys, the same for every trial.
        grid: For each further argument or key of ours, the values to try; trials are all their combinations.
        seeds: Every combination is run once with each.
        jobs: Trials at once.
        executor: Where trials run.
        name: Of its folder, where none is given; that of its file by default.
    """

    task: Literal["detect", "pose"]
    train: dict[str, Any]
    grid: dict[str, list[Any]]
    seeds: list[int] = msgspec.field(default_factory=lambda: [0])
    jobs: int = 1
    executor: Literal["local"] = "local"
    name: str = "sweep"


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


# The specification ---------------------------------------------------------------------------------------------------

_ALLOWED = {
    "task": "detect or pose",
    "train": "Ultralytics' training arguments, e.g. {model: yolo26n.yaml, data: bccd.yaml, optimizer: SGD}",
    "grid": "keys with a list of values each, e.g. {lr0: [0.01, 0.1]}",
    "seeds": "a list of whole numbers, e.g. [0, 1, 2]",
    "jobs": "a whole number from 1",
    "executor": "local",
    "name": "a word for the sweep's folder",
}

# What a sweep decides by itself, and what to give instead.
_RESERVED = {
    "seed": "use the sweep's own `seeds: [0, 1, 2]`",
    "task": "give the sweep's own `task:`",
    "mode": "a sweep trains",
    "project": "the sweep's folder is `out=`",
    "name": "a trial's folder is named by its id",
    "exist_ok": "the sweep sets it",
    "save_dir": "the sweep's folder is `out=`",
    "resume": "start the same sweep again, and it continues",
}


def read_spec(source: str | Path | Mapping[str, Any] | Spec, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Spec:
    """Read and check a sweep; nothing has been started if it is refused.

    Args:
        source: A YAML file, or its content.
        overrides: What wins over it: ``train.epochs=2``, ``grid.lr0=[0.1]``, ``seeds=[0, 1]``, ``jobs=2``, as strings
            or as a mapping of such keys to values.

    Raises:
        SweepError: One line naming the key, the value, what is allowed and what to do.
        ConfigError: A key of ours is wrong, in some combination.
    """
    where, content = _content(source)
    for key, value in _pairs(overrides):
        section, _, name = key.partition(".")
        if name and isinstance(content.get(section, {}), dict):
            content[section] = {**content.get(section, {}), name: value}
        else:
            content[key] = value
    spec = _convert(where, as_numbers(content))
    _check(where, spec)
    return spec


def _content(source: str | Path | Mapping[str, Any] | Spec) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Spec):
        return "sweep", msgspec.to_builtins(source)
    if isinstance(source, Mapping):
        return "sweep", dict(source)
    source = Path(source)
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise SweepError(f"{source}: cannot be read ({error.strerror}); give the path of a sweep's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{source}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise SweepError(f"{source}: must hold the keys {', '.join(_ALLOWED)}, got {type(content).__name__}")
    return str(source), {"name": source.stem, **content}


def _pairs(overrides: Mapping[str, Any] | Iterable[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise SweepError(f"{text!r} is not key=value; give e.g. train.epochs=2 or seeds=[0,1]")
        try:
            yield key, yaml.safe_load(value)
        except yaml.YAMLError:
            raise SweepError(f"{key}={value} is not valid YAML; give e.g. seeds=[0,1]") from None


def _convert(where: str, content: dict[str, Any]) -> Spec:
    for key, value in content.items():
        if key not in _ALLOWED:
            raise SweepError(f"{where}: unknown key {key}={value!r}{nearest(str(key), _ALLOWED)}")
    for key, values in content["grid"].items() if isinstance(content.get("grid"), dict) else ():
        if not isinstance(values, list) or not values:
            raise SweepError(f"{where}: grid.{key} must be a list of at least one value, got {values!r}")
    try:
        return msgspec.convert(content, Spec)
    except msgspec.ValidationError as error:
        match = re.search(r"missing required field `(\w+)`|at `\$\.(\w+)", str(error))
        key = (match[1] or match[2]) if match else "grid"
        if key not in content:
            raise SweepError(f"{where}: {key} is missing; it must be {_ALLOWED[key]}") from None
        raise SweepError(f"{where}: {key} must be {_ALLOWED[key]}, got {content[key]!r}") from None


def _check(where: str, spec: Spec) -> None:
    """What the types cannot say, before anything is started."""
    for key in (*spec.train, *spec.grid):
        if key in _RESERVED:
            section = "train" if key in spec.train else "grid"
            raise SweepError(f"{where}: {section}.{key} cannot be set in a sweep; {_RESERVED[key]}")
        if not _is_ours(key) and key not in (known := _host_defaults()):
            raise SweepError(f"{where}: unknown key {key}{nearest(key, known)}")
    for key in ("model", "data"):
        if key not in spec.train and key not in spec.grid:
            raise SweepError(f"{where}: train.{key} is missing; give what to train{' on' if key == 'data' else ''}")
    for key, values in {**spec.grid, "seeds": spec.seeds}.items():
        name = key if key == "seeds" else f"grid.{key}"
        seen = [_canonical(value) for value in values]
        if twice := [value for value, text in zip(values, seen, strict=True) if seen.count(text) > 1]:
            raise SweepError(f"{where}: {name} has {twice[0]!r} twice; give each value once")
    if not spec.seeds or min(spec.seeds) < 0:
        raise SweepError(f"{where}: seeds must be {_ALLOWED['seeds']}, none of them negative, got {spec.seeds}")
    if spec.jobs < 1:
        raise SweepError(f"{where}: jobs must be {_ALLOWED['jobs']}, got {spec.jobs}")
    _check_rates(where, spec)
    for point in _points(spec):
        _check_point(where, spec, point)


def _check_rates(where: str, spec: Spec) -> None:
    for section, values in (("grid", spec.grid.get("lr0", [])), ("train", [spec.train.get("lr0", 0.01)])):
        for lr0 in values:
            if isinstance(lr0, bool) or not isinstance(lr0, int | float) or not 0 < lr0 <= 1:
                allowed = "a number above 0 and at most 1, which is Ultralytics' own limit"
                raise SweepError(f"{where}: {section}.lr0 must be {allowed}, got {lr0!r}")
    for optimizer in spec.grid.get("optimizer", [spec.train.get("optimizer", "auto")]):
        if str(optimizer).lower() == "auto":
            raise SweepError(
                f"{where}: optimizer=auto, Ultralytics' default, ignores lr0, so every learning rate would be the same "
                "run; give train.optimizer, e.g. SGD, MuSGD or AdamW"
            )


def _check_point(where: str, spec: Spec, point: dict[str, Any]) -> None:
    train, varied = _dotted(spec.train), _dotted(point)
    for key in varied.keys() & train.keys():
        raise SweepError(f"{where}: {key} is both in train and in grid; give it once")
    arguments = train | varied
    for key, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SweepError(f"{where}: {key} must be finite, got {value}")
    layer = read_config_file(arguments["gradstab"]) if arguments.get("gradstab") else None
    load_config(layer, {key: value for key, value in arguments.items() if _is_ours(key) and key != "gradstab"})


def _is_ours(key: str) -> bool:
    return key == "gradstab" or key.partition(".")[0] in Config.__struct_fields__


@cache
def _host_defaults() -> dict[str, Any]:
    """The host's arguments with their defaults, read from its file: importing it would load torch."""
    package = importlib.util.find_spec("ultralytics")
    assert package is not None and package.origin is not None
    text = (Path(package.origin).parent / "cfg" / "default.yaml").read_text(encoding="utf-8")
    defaults: dict[str, Any] = yaml.safe_load(text)
    return defaults


# Trials --------------------------------------------------------------------------------------------------------------


def plan(spec: Spec, out: str | Path) -> list[Trial]:
    """Every trial of a sweep, in the order they are started: all seeds of a combination together."""
    trials = []
    for point, seed in itertools.product(_points(spec), spec.seeds):
        arguments = _dotted(spec.train) | _dotted(point)
        lr0 = float(arguments.get("lr0", _host_defaults()["lr0"]))
        # In the host this rate is absolute: left at 0.1, biases would start 100 times hotter than the rest at
        # lr0=0.001, and the sweep would vary two things.
        arguments.setdefault("warmup_bias_lr", float(f"{min(0.1, 10 * lr0):.12g}"))
        identity = {"task": spec.task, "arguments": arguments, "seed": seed}
        # A letter first: on a command line `name=312977198333`, or `1e5...`, would be read as a number.
        trial_id = "t" + hashlib.sha256(_canonical(identity).encode()).hexdigest()[:11]
        trials.append(
            Trial(
                id=trial_id,
                arm={key: value for key, value in point.items() if key != "lr0"},
                lr0=lr0,
                seed=seed,
                point=point,
                command=trial_command(spec.task, arguments | {"seed": seed}, Path(out) / "trials" / trial_id),
            )
        )
    return trials


def trial_command(task: str, arguments: Mapping[str, Any], folder: Path) -> list[str]:
    """What trains one trial into this folder."""
    place = {"project": str(folder.parent.absolute()), "name": folder.name, "exist_ok": True}
    given = [f"{key}={_flow(value)}" for key, value in {**arguments, **place}.items()]
    return [sys.executable, "-m", "yolo_gradstab", task, "train", *given]


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


def final_metric(run: Run) -> float | None:
    """mAP50-95 after the last epoch; that of the best epoch would hide a collapse.

    Taken from `results.csv`, or from the status where there is none.
    """
    for name in METRICS:
        if name in run.results.columns and run.results.height:
            value = run.results[name].cast(pl.Float64, strict=False)[-1]
            return value if value is not None and math.isfinite(value) else None
    return next((run.status.metrics[name] for name in METRICS if name in run.status.metrics), None)


def _points(spec: Spec) -> list[dict[str, Any]]:
    return [dict(zip(spec.grid, values, strict=True)) for values in itertools.product(*spec.grid.values())]


def _dotted(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings of our keys as dotted ones, as a command line has them."""
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        if isinstance(value, dict) and _is_ours(key):
            flat |= _dotted({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    return flat


def _canonical(value: Any) -> str:
    """JSON that is equal for equal configurations: keys sorted, 1.0 as 1."""

    def same(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): same(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [same(each) for each in item]
        return int(item) if isinstance(item, float) and item.is_integer() else item

    return msgspec.json.encode(same(value), order="deterministic").decode()


def _flow(value: Any) -> str:
    """A value in YAML's one-line style, as our command line reads it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


# Running -------------------------------------------------------------------------------------------------------------


def run_sweep(
    spec: str | Path | Mapping[str, Any] | Spec,
    out: str | Path | None = None,
    say: Callable[[str], None] = log.info,
) -> Path:
    """Run what a sweep has not run yet, and return its folder.

    A trial that fails does not stop the others. Ctrl-C and SIGTERM end the running trials, whose records are kept; the
    same call continues. Trials that completed, diverged or were stopped by their guard are not run again.

    Args:
        spec: A YAML file, its content, or what `read_spec` gave.
        out: The sweep's folder; ``runs/sweeps/<name of the file>`` by default.
        say: Takes lines of progress.

    Raises:
        SweepError: The sweep is refused; nothing has been started.
        ConfigError: A key of ours is wrong, in some combination.
    """
    checked = read_spec(spec)
    folder = Path(out) if out is not None else Path("runs", "sweeps", checked.name)
    return run_trials(checked, plan(checked, folder), folder, say)


def run_trials(spec: Spec, trials: list[Trial], folder: Path, say: Callable[[str], None]) -> Path:
    """Run planned trials, whatever their commands are."""
    _make_folder(spec, folder)
    pending = [trial for trial in trials if _outcome(folder / "trials" / trial.id) not in DONE]
    done = len(trials) - len(pending)
    say(f"{len(trials)} trials in {folder}, {done} of them already done; {min(spec.jobs, len(trials))} at a time")
    failed: list[Trial] = []
    children = _Children()
    environment = _environment(spec.jobs)
    with terminable(), ThreadPoolExecutor(spec.jobs) as pool:
        futures = {pool.submit(_run_trial, trial, folder, children, environment): trial for trial in pending}
        try:
            for number, future in enumerate(_as_completed(futures), done + 1):
                trial = futures[future]
                _report_trial(future, trial, folder / "trials" / trial.id, f"trial {number}/{len(trials)}", say, failed)
                if number == done + 1 and len(pending) > 1:
                    rest_s = future.result() * math.ceil((len(pending) - 1) / spec.jobs)
                    say(f"about {_duration(rest_s)} for the other {len(pending) - 1}, each as long as the first")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    if failed:
        logs = ", ".join(str(folder / "trials" / f"{trial.id}.log") for trial in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        say(f"{len(failed)} of {len(trials)} trials failed; see {logs}{more}. Start the sweep again to repeat them")
    return folder


def _as_completed(futures: Iterable[Future[float]]) -> Iterator[Future[float]]:
    """Each as it ends, waiting in short pieces: a signal may wake another thread, and Python acts on it in this one."""
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from ended


def _make_folder(spec: Spec, folder: Path) -> None:
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"out={folder}: cannot be made ({error.strerror}); name another folder") from None
    with replacing(folder / "sweep.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(msgspec.to_builtins(spec), sort_keys=False), encoding="utf-8")


def _run_trial(trial: Trial, folder: Path, children: _Children, environment: dict[str, str]) -> float:
    """Run one trial to its end; returns the seconds it took."""
    started_s = time.monotonic()
    path = folder / "trials" / trial.id
    path.mkdir(exist_ok=True)
    if (path / "gradstab").exists():  # of an attempt that did not end: its records would be mixed with the new ones
        shutil.rmtree(path / "gradstab")
    with replacing(path / "trial.json") as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(trial), indent=2))
    with (folder / "trials" / f"{trial.id}.log").open("wb") as output:
        children.run(trial.command, output, environment)
    return time.monotonic() - started_s


class _Children:
    """The trials' processes, which end together when the sweep is interrupted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def run(self, command: list[str], output: Any, environment: dict[str, str]) -> None:
        """Start a process and wait for its end; does nothing once the sweep is being stopped."""
        with self._lock:
            if self._stopping:
                return
            # In a session of its own, Ctrl-C in the terminal reaches it once, from us.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self._running.add(process)
        process.wait()
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """Interrupt all of them, and kill those that have not ended within the grace period."""
        with self._lock:
            self._stopping = True
            running = list(self._running)
        deadline_s = time.monotonic() + STOP_GRACE_S
        for process in running:
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        try:
            for process in running:
                process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("trials that did not end within %.0f s of the interruption are killed", STOP_GRACE_S)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()


def _environment(jobs: int) -> dict[str, str]:
    """Ours, with the processor's threads shared among the trials that run at once."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **os.environ}


def _outcome(path: Path) -> Outcome | None:
    try:
        return read_run(path).status.outcome
    except RunError:
        return None


def _report_trial(
    future: Future[float], trial: Trial, path: Path, heading: str, say: Callable[[str], None], failed: list[Trial]
) -> None:
    seconds = future.result()
    outcome = _outcome(path)
    point = {"lr0": trial.lr0} | trial.point
    what = " ".join(f"{key}={_flow(value)}" for key, value in point.items())
    if outcome not in DONE:
        failed.append(trial)
        reason = f"failed ({_last_line(path.with_name(f'{trial.id}.log'))})"
    else:
        metric = final_metric(read_run(path))
        reason = f"{outcome}, " + ("no metric" if metric is None else f"mAP50-95 {metric:.3g}")
    say(f"{heading} {what} seed={trial.seed}: {reason}, {_duration(seconds)}")


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-200:] if lines else "it left no output"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
