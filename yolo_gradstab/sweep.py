"""A grid of training runs: learning rate x policy x seed, planned as trials and run by an executor.

A sweep's folder holds `sweep.yaml` (the specification as run) and, per trial, `trials/<id>/` (the host's run folder,
with `trial.json` beside its files) and `trials/<id>.log`. The id is a hash of the trial's canonical configuration,
however it is written, so the same sweep started again, or with a longer grid, continues. The same seed means the same
initial weights and the same order of data in every arm, so that arms can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from yolo_gradstab.config import (
    TASKS,
    Config,
    ConfigError,
    Task,
    as_numbers,
    config_keys,
    load_config,
    nearest,
    read_config_file,
)
from yolo_gradstab.executors import TrialState, run_trials
from yolo_gradstab.host import check_arguments
from yolo_gradstab.runs import RunError, RunFolder, make_out, one_line, replacing
from yolo_gradstab.trial import ENDED, SweepError, Trial, flow, outcome_of, read_trial

__all__ = [
    "Spec",
    "SweepError",
    "Trial",
    "TrialState",
    "check_files",
    "difference",
    "plan",
    "planned_config",
    "read_spec",
    "read_trial",
    "run_sweep",
    "trial_at",
    "trial_command",
]

log = logging.getLogger(__name__)


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sweep, as written in YAML.

    Attributes:
        task: What is trained.
        train: Ultralytics' training arguments and our keys, the same for every trial.
        grid: For each further argument or key of ours, the values to try; trials are all their combinations.
        seeds: Every combination is run once with each.
        jobs: Trials at once, in turn on the GPUs there are unless `device` is given.
        executor: Where trials run: processes on this machine, or tasks of a Ray cluster.
        time_limit_s: Of each trial, after which it is ended and counts as failed; null for none.
        name: Of its folder, where none is given; that of its file by default.
    """

    task: Task
    train: dict[str, Any]
    grid: dict[str, list[Any]]
    seeds: list[int] = msgspec.field(default_factory=lambda: [0])
    jobs: int = 1
    executor: Literal["local", "ray"] = "local"
    time_limit_s: float | None = None
    name: str = "sweep"


# The specification ---------------------------------------------------------------------------------------------------

_ALLOWED = {
    "task": f"one of {', '.join(TASKS)}",
    "train": "Ultralytics' training arguments, e.g. {model: yolo26n.yaml, data: bccd.yaml, optimizer: SGD}",
    "grid": "keys with a list of values each, e.g. {lr0: [0.01, 0.1]}",
    "seeds": "a list of whole numbers, e.g. [0, 1, 2]",
    "jobs": "a whole number from 1",
    "executor": "local or ray",
    "time_limit_s": "a number of seconds above 0, or null",
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
    numbers = as_numbers(content)
    if isinstance(content.get("name"), str):
        numbers["name"] = content["name"]  # `1e-3` is no number there
    spec = _convert(where, numbers)
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
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, or a day that is in no calendar
        raise SweepError(f"{source}: is not valid YAML ({one_line(error)})") from None
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
        except (yaml.YAMLError, ValueError):
            raise SweepError(f"{key}={value} is not valid YAML; give e.g. seeds=[0,1]") from None


def _convert(where: str, content: dict[str, Any]) -> Spec:
    for key, value in content.items():
        if key not in _ALLOWED:
            raise SweepError(f"{where}: unknown key {key}={value!r}{nearest(str(key), _ALLOWED)}")
        if isinstance(value, dict) and (wrong := [name for name in value if not isinstance(name, str)]):
            raise SweepError(f"{where}: {key} has the key {wrong[0]!r}, which is no word; give names of arguments")
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
        if not _is_ours(key) and key not in _host_defaults():
            value = spec.train.get(key, spec.grid.get(key))
            near = nearest(key, [*_host_defaults(), *config_keys(), "gradstab"])
            raise SweepError(f"{where}: unknown key {key}={value!r}{near}")
    for key in ("model", "data"):
        if key not in spec.train and key not in spec.grid:
            raise SweepError(f"{where}: train.{key} is missing; give what to train{' on' if key == 'data' else ''}")
    for key, values in {**spec.grid, "seeds": spec.seeds}.items():
        name = key if key == "seeds" else f"grid.{key}"
        texts = [_canonical(value) for value in values]
        if twice := [value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1]:
            raise SweepError(f"{where}: {name} has {twice[0]!r} twice; give each value once")
    if not spec.seeds or min(spec.seeds) < 0:
        raise SweepError(f"{where}: seeds must be {_ALLOWED['seeds']}, none of them negative, got {spec.seeds}")
    if max(spec.seeds) >= 2**32:
        raise SweepError(f"{where}: seeds must be below 2^32, which is numpy's own limit, got {max(spec.seeds)}")
    if spec.jobs < 1:
        raise SweepError(f"{where}: jobs must be {_ALLOWED['jobs']}, got {spec.jobs}")
    if spec.time_limit_s is not None and not (math.isfinite(spec.time_limit_s) and spec.time_limit_s > 0):
        raise SweepError(f"{where}: time_limit_s must be {_ALLOWED['time_limit_s']}, got {spec.time_limit_s}")
    _check_rates(where, spec)
    seen: dict[str, dict[str, Any]] = {}
    for point in _points(spec):
        resolved = _canonical(_resolved(where, spec, point))
        if resolved in seen:
            raise SweepError(f"{where}: {flow(seen[resolved])} and {flow(point)} are the same run; give each once")
        seen[resolved] = point


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


def _resolved(where: str, spec: Spec, point: dict[str, Any]) -> dict[str, Any]:
    """What a point of the grid comes to, checked: the host's arguments and our configuration."""
    train, varied = _dotted(spec.train), _dotted(point)
    for key in varied.keys() & train.keys():
        raise SweepError(f"{where}: {key} is both in train and in grid; give it once")
    arguments = train | varied
    for key, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SweepError(f"{where}: {key} must be finite, got {value}")
    host = {key: value for key, value in arguments.items() if not _is_ours(key)}
    try:
        return {"host": host, "ours": _configuration(arguments)}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _configuration(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All of our keys, a file's among them, as a run with these arguments has them."""
    given = {key: value for key, value in arguments.items() if _is_ours(key) and key != "gradstab"}
    return load_config(arguments.get("gradstab") or None, given).to_dict()


def check_files(spec: Spec) -> None:
    """Refuse a model or data that is neither a file here nor a name that Ultralytics knows.

    Not part of reading a spec, which a report does on machines that have no data.

    Raises:
        SweepError: One line naming the key and the file.
    """
    for key, folder in (("model", "models"), ("data", "datasets")):
        section = "train" if key in spec.train else "grid"
        for value in [spec.train[key]] if key in spec.train else spec.grid[key]:
            is_folder = key == "data" and Path(str(value)).is_dir()  # as a set for classification is
            if not is_folder and not _is_found(str(value), _host_folder() / "cfg" / folder):
                drawn = "; draw it first: yolo-gradstab data sample out=" + str(Path(str(value)).parent)
                advice = f"{drawn} task={spec.task}" if "sample" in str(value) else "; give the path of a file"
                raise SweepError(f"{section}.{key}={value} does not exist{advice}")


def _check_values(spec: Spec) -> None:
    """Refuse what the host would refuse in every trial; not part of reading a spec, since it loads the host."""
    for point in _points(spec):
        try:
            check_arguments(_resolved(spec.name, spec, point)["host"])
        except (TypeError, ValueError) as error:
            raise SweepError(f"{flow(point)}: {error}") from None


def _is_found(name: str, host: Path) -> bool:
    """A file here, an address, weights the host can fetch by name, or a YAML file of its own, `26n` being `26`."""
    if Path(name).is_file() or "://" in name or (name.endswith(".pt") and "/" not in name):
        return True
    stem = re.sub(r"(\d+)[nsblmx](.*)$", r"\1\2", Path(name).stem)
    return Path(name).name == name and any(path.stem == stem for path in host.rglob("*.yaml"))


def _is_ours(key: str) -> bool:
    return key == "gradstab" or key.partition(".")[0] in Config.__struct_fields__


@cache
def _host_defaults() -> dict[str, Any]:
    """The host's arguments with their defaults, read from its file: importing it would load torch."""
    defaults: dict[str, Any] = yaml.safe_load((_host_folder() / "cfg" / "default.yaml").read_text(encoding="utf-8"))
    return defaults


def _host_folder() -> Path:
    package = importlib.util.find_spec("ultralytics")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent


_PLACE = ("project", "name", "exist_ok")  # where a trial's folder is; no part of what it trains

# Trials --------------------------------------------------------------------------------------------------------------


def plan(spec: Spec, out: str | Path) -> list[Trial]:
    """Every trial of a sweep, in the order they are started: all seeds of a combination together.

    A trial that is there already under the id that an earlier release gave it keeps that one, and its folder.

    Raises:
        ConfigError: A file that `gradstab` names cannot be read.
    """
    trials = [trial_at(point, seed, spec, out) for point, seed in itertools.product(_points(spec), spec.seeds)]
    there = _elsewhere(Path(out) / "trials", {trial.id for trial in trials})
    return [_placed(trial, Path(out), there[trial.id]) if trial.id in there else trial for trial in trials]


def trial_at(point: dict[str, Any], seed: int, spec: Spec, out: str | Path) -> Trial:
    """The trial of one point of the grid, or of a point that another grid had; its id says what it is.

    Raises:
        ConfigError: A file that `gradstab` names cannot be read.
    """
    arguments = _dotted(spec.train) | _dotted(point)
    lr0 = float(arguments.get("lr0", _host_defaults()["lr0"]))
    # In the host this rate is absolute: left at 0.1, biases would start 100 times hotter than the rest at
    # lr0=0.001, and the sweep would vary two things.
    arguments.setdefault("warmup_bias_lr", float(f"{min(0.1, 10 * lr0):.12g}"))
    # A sweep measures what a policy does by itself: a run that has diverged is ended there, and not rescued, unless
    # that is asked for, in a file too.
    content = read_config_file(arguments["gradstab"]) if arguments.get("gradstab") else {}
    if "guard.divergence" not in content and "divergence" not in (content.get("guard") or {}):
        arguments.setdefault("guard.divergence", "stop")
    arguments["seed"] = seed
    words = {key: _word(key, value) for key, value in arguments.items()}
    trial_id = _identity(spec.task, words, _configuration(arguments))
    return Trial(
        id=trial_id,
        arm={key: value for key, value in point.items() if key != "lr0"},
        lr0=lr0,
        seed=seed,
        point=point,
        command=trial_command(spec.task, arguments, Path(out) / "trials" / trial_id),
    )


def _identity_of(trial: Trial, folder: Path) -> str:
    """The id of what a recorded trial trained, however that was written, and whatever it is called.

    Args:
        trial: As recorded.
        folder: Its own.

    Raises:
        RunError: Its configuration is damaged.
        ConfigError: Its configuration is none of this release.
    """
    words = dict(word.partition("=")[::2] for word in trial.command[5:])
    if words.get("gradstab"):  # whose content may have changed since: as it was used
        return _identity(trial.command[3], words, load_config(RunFolder(folder).read_config()).to_dict())
    return _identity(trial.command[3], words, planned_config(trial))


def planned_config(trial: Trial) -> dict[str, Any]:
    """All of our keys, as a trial's command gives them; the file of `gradstab` as it is now.

    Raises:
        ConfigError: One of them is wrong.
    """
    words = {key: text for key, equals, text in (word.partition("=") for word in trial.command) if equals}
    return _configuration(
        {key: text if key == "gradstab" else yaml.safe_load(text) for key, text in words.items() if _is_ours(key)}
    )


def _identity(task: str, words: Mapping[str, str], ours: dict[str, Any]) -> str:
    """Hash of a canonical configuration: the host's arguments as given, and ours with their defaults."""
    host = {key: _number(text) for key, text in words.items() if key not in _PLACE and not _is_ours(key)}
    identity = {"task": task, "host": host, "ours": ours}
    # A letter first: on a command line `name=312977198333`, or `1e5...`, would be read as a number.
    return "t" + hashlib.sha256(_canonical(identity).encode()).hexdigest()[:11]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _elsewhere(trials: Path, ids: set[str]) -> dict[str, str]:
    """Of the trials with these ids, those that have no folder of that name: the name of the one they are in."""
    found: dict[str, str] = {}
    folders = sorted(folder for folder in trials.glob("*/") if folder.name not in ids)
    for folder in sorted(folders, key=lambda folder: outcome_of(folder) not in ENDED):  # a whole one first
        # One that is damaged, or of another release, is none of these; a report names it.
        with suppress(RunError, ValueError, TypeError, yaml.YAMLError):
            trial = read_trial(folder)
            identity = _identity_of(trial, folder) if trial and len(trial.command) > 5 else ""
            if identity in ids and not (trials / identity).exists():
                found.setdefault(identity, folder.name)
    return found


def _placed(trial: Trial, out: Path, name: str) -> Trial:
    command = [f"name={name}" if word == f"name={trial.id}" else word for word in trial.command]
    return msgspec.structs.replace(trial, id=name, command=command)


def trial_command(task: str, arguments: Mapping[str, Any], folder: Path) -> list[str]:
    """What trains one trial into this folder."""
    place = dict(zip(_PLACE, (str(folder.parent.absolute()), folder.name, True), strict=True))
    given = {key: value for key, value in {**arguments, **place}.items() if (key, value) != ("gradstab", None)}
    words = [f"{key}={_word(key, value)}" for key, value in given.items()]
    return [sys.executable, "-m", "yolo_gradstab", task, "train", *words]


def _word(key: str, value: Any) -> str:
    """A value as a command line has it: ours in YAML, the host's text and paths as they are.

    It reads its null, and what may be null in a list, in Python's words alone.
    """
    if isinstance(value, str) and (key == "gradstab" or not _is_ours(key)):
        return value
    return repr(value) if not _is_ours(key) and (value is None or isinstance(value, list)) else flow(value)


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


# Running -------------------------------------------------------------------------------------------------------------


def run_sweep(
    spec: str | Path | Mapping[str, Any] | Spec,
    out: str | Path | None = None,
    say: Callable[[str], None] = log.info,
    *,
    watch: Callable[[list[TrialState]], None] | None = None,
    retry: str | None = None,
) -> Path:
    """Run what a sweep has not run yet, and return its folder.

    A trial that fails does not stop the others. Ctrl-C and SIGTERM end the running trials, whose records are kept; the
    same call continues, also after the sweep itself was killed. Trials that ended are not run again.

    Args:
        spec: A YAML file, its content, or what `read_spec` gave.
        out: The sweep's folder; ``runs/sweeps/<name of the file>`` by default. With ``executor: ray`` on storage that
            every machine sees.
        say: Takes lines of progress.
        watch: Takes the states of all trials, about once a second, for a live display.
        retry: ``failed`` to run trials again that failed.

    Raises:
        SweepError: The sweep is refused; nothing has been started.
        ConfigError: A key of ours is wrong, in some combination.
    """
    if retry not in (None, "failed"):
        raise SweepError(f"retry must be failed, got {retry!r}")
    checked = read_spec(spec)
    check_files(checked)
    _check_values(checked)
    folder = Path(out) if out is not None else Path("runs", "sweeps", checked.name)
    trials = plan(checked, folder)
    planned = {trial.id for trial in trials}
    if any(path.name not in planned and difference(path, checked) for path in (folder / "trials").glob("*/")):
        say(f"{folder}: trials of another training are there; its report will name them, and not show them")
    _check_folder(folder)
    make_out(folder, SweepError, part="trials")
    run_trials(
        trials,
        folder,
        say,
        jobs=checked.jobs,
        executor=checked.executor,
        time_limit_s=checked.time_limit_s,
        own_device="device" in checked.train or "device" in checked.grid,
        watch=watch,
        retry=retry == "failed",
        prepare=lambda: _write_spec(checked, folder),
    )
    return folder


def difference(folder: Path, spec: Spec) -> str:
    """In what a trial's training differs from what the sweep has now at its point and seed; empty if in nothing."""
    try:
        trial = read_trial(folder)
        now = trial and trial_at(trial.point, trial.seed, spec, folder.parents[1])
        if not trial or not now or now.id in {trial.id, _identity_of(trial, folder)}:
            return ""
    except (RunError, ValueError, TypeError):  # a damaged one is named when it is read
        return ""

    def only(one: Trial, other: Trial) -> str:
        place = ("project=", "name=")
        return " ".join(
            word for word in one.command[3:] if word not in other.command[3:] and not word.startswith(place)
        )

    was, has = only(trial, now), only(now, trial)
    return f"{was or 'fewer arguments'}, now {has or 'fewer'}" if was or has else "the file of gradstab= was another"


def _check_folder(folder: Path) -> None:
    words = str(folder.absolute())
    if words.count("[") != words.count("]"):
        raise SweepError(f"out={folder}: Ultralytics takes a single bracket for half a list; name another folder")


def _write_spec(spec: Spec, folder: Path) -> None:
    """Keep the sweep as it is run; a file that says the same already is left alone.

    Raises:
        SweepError: There is another, and not as a sweep writes it: somebody's own, whose comments would be lost.
    """
    path = folder / "sweep.yaml"
    old = None
    with suppress(SweepError, ConfigError):  # missing, or no specification
        old = read_spec(path)
    if old == spec:
        return
    if old is not None and path.read_text(encoding="utf-8") != _dumped(old):
        raise SweepError(f"{path}: says otherwise, and is not as a sweep writes it; change it, or give another out=")
    with replacing(path) as temporary:
        temporary.write_text(_dumped(spec), encoding="utf-8")


def _dumped(spec: Spec) -> str:
    return str(yaml.safe_dump(msgspec.to_builtins(spec), sort_keys=False))
