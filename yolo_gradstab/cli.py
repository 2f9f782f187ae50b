"""The `yolo-gradstab` command, in the style of `yolo`: words, then `key=value`.

Exit status: 0 done, 1 the work failed (one line on stderr), 2 wrong use (one line on stderr). Set `GRADSTAB_DEBUG=1`
to see a traceback.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import yaml

from yolo_gradstab.config import (
    TASKS,
    Config,
    ConfigError,
    as_numbers,
    config_keys,
    load_config,
    nearest,
)
from yolo_gradstab.runs import RunFolder, counted, make_out, one_line
from yolo_gradstab.usage import HELP, help_of

__all__ = ["main"]

MOST_PROBLEMS = 20  # of a data set, that are shown: where a folder is a wrong one, every image has one
PATHS = {"out", "coco", "model", "data", "weights", "project", "name"}  # text, though a folder may be called 2017


class UsageError(ValueError):
    """Wrong use of the command; exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        return 1
    except (UsageError, ConfigError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except SystemExit as error:  # SIGTERM, unwound by the trainer
        return _fail("terminated" if error.code else "", 1 if error.code else 0)
    except Exception as error:
        return _fail(error, 1)


def _fail(error: Exception | str, status: int) -> int:
    if os.environ.get("GRADSTAB_DEBUG") and isinstance(error, Exception):
        raise error
    if str(error):
        kind = f"{type(error).__name__}: " if isinstance(error, Exception) and not isinstance(error, ValueError) else ""
        print(f"yolo-gradstab: {_printable(kind + ' '.join(str(error).split()))}", file=sys.stderr)
    return status


def _printable(text: str) -> str:
    """What a stranger's file says, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _print_json(value: Any) -> None:
    """For programs; null for what is not finite."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def _dispatch(words: list[str]) -> int:
    if not words or words in (["help"], ["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    known = [*TASKS, "data", *_COMMANDS]
    asked = words[1:] if words[0] == "help" else words
    if words[0] == "help" or not {"-h", "--help"}.isdisjoint(words):
        if asked[0] not in {*known, "version", "-h", "--help"}:
            raise UsageError(f"unknown command {asked[0]!r}{nearest(asked[0], known, 'command')}")
        print(help_of(asked), end="")
        return 0
    if words[0] in {"version", "--version"}:
        print(f"yolo-gradstab {metadata.version('yolo-gradstab')}")
        return 0
    if words[0] in TASKS:
        if words[1:2] != ["train"]:
            raise UsageError(
                f"{words[0]}: the mode must be train, got {_shown(words[1:2])}; use `yolo` for other modes"
            )
        return _train(words[0], words[2:])
    if words[0] == "data" and words[1:2] and words[1] in _DATA:
        return _DATA[words[1]](_pairs(words[2:], PATHS if words[1] == "sample" else PATHS | {"images"}))
    if words[0] == "data":
        raise UsageError(f"data: must be followed by {', '.join(_DATA)}, got {_shown(words[1:2])}")
    if words[0] in _COMMANDS:
        return _COMMANDS[words[0]](words[1:])
    raise UsageError(f"unknown command {words[0]!r}{nearest(words[0], known, 'command')}; see `yolo-gradstab help`")


# Training ------------------------------------------------------------------------------------------------------------


def _train(task: str, words: list[str]) -> int:
    from ultralytics.cfg import TASK2DATA, TASK2MODEL

    config, arguments = _training_arguments(words)
    from yolo_gradstab.trainer import host_model, trainer_for

    if arguments.get("task") not in {None, task}:
        other = arguments["task"]
        raise UsageError(f"task={other}: the command is `{task} train`; give `yolo-gradstab {other} train`")
    if arguments.get("resume") is True and not arguments.get("model"):
        raise UsageError("resume=True: of which run? give its checkpoint, e.g. resume=RUN/weights/last.pt")
    model = str(arguments.pop("model", None) or TASK2MODEL[task])
    if resume := arguments.get("resume"):
        model = _checkpoint(model if resume is True else str(resume))  # which names the model as well
    if arguments.get("data") is None and not resume:
        arguments["data"] = TASK2DATA[task]
    yolo, trainer = host_model(task, model)
    yolo.train(trainer=trainer_for(trainer, config), **arguments)
    folder = Path(yolo.trainer.save_dir)
    if isinstance(arguments.get("data"), list):  # the host trains on one after the other, each in a folder of its own
        return max((_say_where(run) for run in sorted(folder.iterdir()) if RunFolder(run).gradstab.is_dir()), default=1)
    return _say_where(folder)


def _checkpoint(path: str) -> str:
    """What resume=... names, if it is a checkpoint."""
    advice = "give the checkpoint to go on from, e.g. resume=RUN/weights/last.pt"
    if Path(path).is_dir():
        raise UsageError(f"resume={path}: is a folder; {advice}")
    if not path.endswith(".pt"):
        raise UsageError(f"resume={path}: is no checkpoint; {advice}")
    if not Path(path).is_file():
        raise UsageError(f"resume={path}: no such file; {advice}")
    return path


def _say_where(folder: Path) -> int:
    """Two lines about the run: what its gradients were like, and where to look."""
    import polars as pl

    from yolo_gradstab.stats import clipped_share
    from yolo_gradstab.telemetry import read_run

    run = read_run(folder)
    steps = run.steps
    if len(steps):
        made = run.made
        skipped = steps["skipped"].sum()
        taken_back = len(steps) - len(made) - skipped
        share = clipped_share(made["clip_coef"].fill_null(math.nan))
        median = steps.select(pl.col("total_norm").median()).item()
        print(
            f"{counted(len(steps), 'optimizer step')}: gradient norm {median:.4g} (median), "
            f"{share or 0:.0%} of steps clipped, {skipped} not applied"
            + (f", {taken_back} taken back" if taken_back else "")
        )
    print(f"Run: {folder}   records: {folder / 'gradstab'}   report: yolo-gradstab report {folder}")
    if run.status.outcome in {"stopped", "diverged"}:
        return _fail(f"{folder}: {run.status.outcome}: {run.status.reason}", 1)
    return 0


def _training_arguments(words: list[str], also: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
    """Our configuration and the host's arguments, both checked before anything starts; `also` are a command's own."""
    from ultralytics.cfg import DEFAULT_CFG_DICT, merge_equals_args, parse_key_value_pair

    ours: dict[str, Any] = {}
    host: dict[str, Any] = {}
    from_file: dict[str, Any] = {}
    file = None
    for word in _merged(words, merge_equals_args):
        key, equals, text = word.partition("=")
        if not equals:
            if not isinstance(DEFAULT_CFG_DICT.get(key), bool):
                known = [*DEFAULT_CFG_DICT, *config_keys()]
                advice = f"; give it a value, {word}=..." if word in known else nearest(key, known)
                raise UsageError(f"{word!r} is not key=value{advice}")
            host[key] = True  # as in `yolo detect train resume`
        elif key == "gradstab":
            file = text
        elif key == "cfg":
            from_file = _host_file(text)
        elif key.partition(".")[0] in Config.__struct_fields__:
            ours[key] = _value(key, text)
        else:
            try:
                host.update([parse_key_value_pair(word)])
            except (AssertionError, SyntaxError, ValueError, NameError) as error:
                raise UsageError(f"{word}: {error}") from None
            if key in PATHS:
                host[key] = _path(host[key], text)
    host = from_file | host
    _check_host_arguments(host, also)
    return load_config(file, ours), host


def _host_file(path: str) -> dict[str, Any]:
    """The host's arguments from a file, as its own command line merges them beneath those of the line.

    The command names task and mode; what the host's copy of its defaults holds as null is left to the defaults.
    """
    from ultralytics.utils import YAML
    from ultralytics.utils.checks import check_yaml

    try:
        content = YAML.load(check_yaml(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cfg={path}: cannot be read ({one_line(error)})") from None
    return {key: value for key, value in content.items() if key not in {"cfg", "task", "mode"} and value is not None}


def _merged(words: list[str], merge: Callable[[list[str]], list[str]]) -> list[str]:
    try:
        return merge(words)
    except SyntaxError as error:
        raise UsageError(str(error)) from None


def _check_host_arguments(arguments: dict[str, Any], also: Sequence[str]) -> None:
    """The host's own checks of keys, types and ranges, in one line, with our keys among the suggestions."""
    from ultralytics.cfg import DEFAULT_CFG_DICT

    from yolo_gradstab.host import check_arguments

    try:
        check_arguments(arguments)
    except SyntaxError:
        unknown = [key for key in arguments if key not in DEFAULT_CFG_DICT]
        near = nearest(unknown[0], [*DEFAULT_CFG_DICT, *config_keys(), "gradstab", *also])
        raise UsageError(f"unknown key {unknown[0]}={arguments[unknown[0]]!r}{near}") from None
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # such as the 30th of February
        raise UsageError(f"{key}={text}: the value is not valid YAML; put text in quotes") from None


# Data ----------------------------------------------------------------------------------------------------------------


def _data_check(given: dict[str, Any]) -> int:
    from yolo_gradstab.coco.check import check_coco
    from yolo_gradstab.coco.labels import check_task

    options = _options("data check", given, required=("coco", "images"), optional={"task": "detect", "format": "text"})
    _choice("format", options["format"], ("text", "json"))
    _wrong_use(check_task, options["task"])
    report = check_coco(options["coco"], images=options["images"], task=options["task"])
    if options["format"] == "json":
        _print_json(report)
    else:
        _print_check(report)
    if report.problems:
        return _fail(f"{options['coco']}: {counted(len(report.problems), 'problem')}", 1)
    return 0


def _print_check(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(report.summary(), markup=False)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("not used, by reason")
    table.add_column("annotations", justify="right")
    table.add_column("ids")
    for reason, count in report.unused.items():
        ids = [str(unused.annotation_id) for unused in report.unused_annotations if unused.reason == reason]
        table.add_row(reason, str(count), ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else ""))
    if report.unused:
        console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for problem in report.problems[:MOST_PROBLEMS]:
        console.print(f"problem: {problem}", markup=False)
    if (more := len(report.problems) - MOST_PROBLEMS) > 0:
        console.print(f"... and {counted(more, 'more problem')}; format=json names them all")


def _data_convert(given: dict[str, Any]) -> int:
    from yolo_gradstab.coco.conversion import convert_coco
    from yolo_gradstab.coco.labels import check_task

    options = _options("data convert", given, required=("coco", "images", "out"), optional={"task": "detect"})
    _wrong_use(check_task, options["task"])
    report = convert_coco(options["coco"], images=options["images"], out=options["out"], task=options["task"])
    print(f"{report.files} label files for {report.images} images in {report.out}")
    unused = ", ".join(f"{count} {reason}" for reason, count in report.unused.items())
    print(f"{report.used} of {report.annotations} annotations used{'; not used: ' if unused else ''}{unused}")
    for note in report.notes:
        _print_line(f"note: {note}")
    keys = {"names": report.names, "kpt_shape": report.kpt_shape, "flip_idx": report.flip_idx}
    wanted = {key: value for key, value in keys.items() if value is not None}
    print("For the data YAML:\n" + yaml.safe_dump(wanted, sort_keys=False, default_flow_style=None), end="")
    return 0


def _data_sample(given: dict[str, Any]) -> int:
    from yolo_gradstab.coco.sample import check_arguments, draw_sample

    optional = {"task": "detect", "images": 96, "size": 160, "seed": 0}
    options = _options("data sample", given, required=("out",), optional=optional)
    arguments = {key: options[key] for key in optional}
    _wrong_use(check_arguments, **arguments)
    path = draw_sample(options["out"], **arguments)
    print(f"Drawn: {path}   train on it: yolo-gradstab {options['task']} train data={path} ...")
    return 0


# Sweeps and reports --------------------------------------------------------------------------------------------------


def _sweep(words: list[str]) -> int:
    from yolo_gradstab.report import build_report
    from yolo_gradstab.sweep import SweepError, check_files, read_spec, run_sweep

    if not words or _is_pair(words[0]):
        raise UsageError("sweep: give a spec first, e.g. `yolo-gradstab sweep configs/sweeps/sample_detect.yaml`")
    given = _pairs(words[1:])
    out, retry = given.pop("out", None), given.pop("retry", None)
    if retry is not None:
        _choice("sweep: retry", retry, ("failed",))
    try:
        spec = read_spec(words[0], given)
        check_files(spec)
        with _live_table() as (say, watch):
            folder = run_sweep(spec, out, say=say, watch=watch, retry=retry)
    except SweepError as error:
        raise UsageError(str(error)) from None
    print(f"Report: {build_report([folder])}")
    return _failed_trials([folder], folder)


def _failed_trials(sweeps: list[Path], report: Path) -> int:
    """Exit status of sweeps, from their report: 1, and how many, where trials failed. To diverge is no failure."""
    arms = msgspec.json.decode((report / "summary.json").read_bytes())["arms"]
    failed = sum(arm["failed"] for arm in arms)
    if not failed:
        return 0
    trials = sum(arm["trials"] + arm["failed"] + arm["unfinished"] for arm in arms)
    where = " and ".join(str(sweep / "trials") for sweep in sweeps)
    return _fail(f"{failed} of {trials} trials failed; their logs are in {where}, retry=failed runs them again", 1)


@contextmanager
def _live_table() -> Iterator[tuple[Callable[[str], None], Callable[[list[Any]], None] | None]]:
    """How a sweep says its lines and shows its trials: lines above a table in a terminal, lines alone elsewhere."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if not console.is_terminal:
        yield _say, None
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        yield (
            lambda line: console.print(line, markup=False),
            lambda states: live.update(_states_table(states, console.height - 4)),
        )


def _states_table(states: list[Any], height: int) -> Any:
    """Running trials with their step, loss and norm, then the last that ended, as many as fit; counts and time left."""
    from rich.table import Table

    running = [state for state in states if state.outcome == "running"]
    ended = [state for state in states if state.outcome not in {None, "running", "interrupted"}]
    diverged = sum(state.outcome == "diverged" for state in ended)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), caption_justify="left")
    for name in ("trial", "step", "loss", "norm", "outcome", "metric", "time"):
        table.add_column(name, justify="left" if name in {"trial", "outcome"} else "right", no_wrap=name != "trial")
    shown = [*running, *reversed(ended)][: max(1, height - 3)]
    for state in shown:
        outcome = f"{state.outcome} ({state.divergence})" if state.divergence else state.outcome
        values = (state.loss, state.total_norm)
        numbers = ["" if value is None else f"{value:.4g}" for value in values]
        metric = "" if state.metric is None else f"{state.metric:.3f}"
        table.add_row(state.trial.label, str(state.step), *numbers, outcome, metric, f"{state.seconds:.0f} s")
    table.caption = (
        f"{len(ended)} of {len(states)} ended, {diverged} of them diverged{_time_left(states, ended, running)}"
    )
    return table


def _time_left(states: list[Any], ended: list[Any], running: list[Any]) -> str:
    """By the mean time of those that ended; as many run at once as do now."""
    if not ended or not running:
        return ""
    mean_s = sum(state.seconds for state in ended) / len(ended)
    waiting_s = mean_s * (len(states) - len(ended) - len(running))
    left_s = waiting_s + sum(max(0.0, mean_s - state.seconds) for state in running)
    return f"; about {left_s / len(running) / 60:.0f} min left"


def _lr_range(words: list[str]) -> int:
    """Raise the rate until training breaks; print where, a chart, and the grid to sweep."""
    from yolo_gradstab.lr_range import refuse_keys, run_lr_range

    refuse_keys(word.partition("=")[0] for word in words)  # ours among them, whose defaults are in the configuration
    names = ("task", "lr_min", "lr_max", "steps", "out")
    own = _pairs([word for word in words if word.partition("=")[0] in names])
    config, arguments = _training_arguments([word for word in words if word.partition("=")[0] not in names], names)
    task = own.pop("task", None)
    if task is None:
        raise UsageError("lr-range: task must be given, as task=detect")
    if (out := own.pop("out", "runs/lr_range")) is None:
        raise UsageError("lr-range: out must be given, or left out for runs/lr_range")
    out = Path(out)
    result = run_lr_range(task, arguments, config, **as_numbers(own), out=out)
    if "optimizer" not in arguments:
        print("No optimizer was given: this is for SGD. Give optimizer=... for another")
    _print_range(result)
    found = f"training broke at lr {result.lr_div:.2g} ({result.how})" if result.lr_div else result.how
    first = f" from lr {result.lr[0]:.2g}" if result.lr else ""
    print(f"{counted(len(result.lr), 'step')}{first}: {found}")
    if result.steepest is not None:
        print(f"loss fell fastest near lr {result.steepest:.2g}")
    print(f"grid to sweep:  lr0: {[float(f'{rate:g}') for rate in result.grid]}")
    print(f"Chart: {out / 'lr_range.png'}   records: {out / 'lr_range.json'}")
    return 0


def _print_range(result: Any) -> None:
    """The smoothed loss at every quarter of a decade, as bars."""
    rows: dict[int, tuple[float, float]] = {}
    for rate, loss in zip(result.lr, result.smoothed_loss, strict=True):
        if loss is not None:
            rows[round(4 * math.log10(rate))] = (rate, loss)
    most = max((loss for _, loss in list(rows.values())[:3]), default=1.0) * 1.5
    for rate, loss in rows.values():
        width = min(40, round(40 * loss / most))
        print(f"  lr {rate:8.2g}  loss {loss:9.4g}  {'█' * width}{'▶' if loss > most else ''}")


def _report(words: list[str]) -> int:
    from yolo_gradstab.report import build_report

    folders = [word for word in words if not _is_pair(word)]
    options = _options(
        "report", _pairs([word for word in words if _is_pair(word)]), required=(), optional={"out": None}
    )
    if not folders:
        raise UsageError("report: give at least one run or sweep folder")
    page = build_report(folders, out=options["out"])
    print(f"Report: {page}")
    summary = msgspec.json.decode((page.parent / "summary.json").read_bytes())
    if not summary["arms"]:
        return _fail(f"{folders[0]}: no run could be shown; {summary['not_shown'][0]['reason']}", 1)
    return 0


def _diagnose(words: list[str]) -> int:
    """Findings of a run or of a checkpoint, most important first; finding something is no failure."""
    from yolo_gradstab.audit import audit_checkpoint
    from yolo_gradstab.diagnosis import diagnose, nothing_words, records_of
    from yolo_gradstab.telemetry import read_run

    if not words or _is_pair(words[0]):
        raise UsageError("diagnose: give a run folder or a checkpoint first, e.g. `yolo-gradstab diagnose RUN`")
    options = _options("diagnose", _pairs(words[1:]), required=(), optional={"format": "text"})
    _choice("format", options["format"], ("text", "json"))
    path = words[0]
    run = None if path.endswith(".pt") else read_run(path)
    findings = audit_checkpoint(path) if run is None else diagnose(records_of(run))
    if options["format"] == "json":
        _print_json({"run": path, "findings": findings})
        return 0
    if all(finding.severity == "info" for finding in findings):
        print("Nothing wrong was found." if run is None else nothing_words(run.status, run.map50))
    for finding in findings:
        print(finding.text())
    return 0


def _replay(words: list[str]) -> int:
    """What was captured, where it went bad then, and where it goes bad now; going bad is no failure."""
    from yolo_gradstab.incident import NOT_LOCALISED, read_incident
    from yolo_gradstab.localisation import first_bad_words, same_place
    from yolo_gradstab.replay import check_weights, replay

    if not words or _is_pair(words[0]):
        raise UsageError("replay: give an incident first, e.g. `yolo-gradstab replay RUN/gradstab/incidents/12`")
    options = _options("replay", _pairs(words[1:]), required=(), optional={"weights": None})
    incident = read_incident(words[0])
    check_weights(options["weights"])
    numbers = [("loss", incident.loss), ("gradient norm", incident.total_norm)]
    said = ", ".join(f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in numbers)
    where = f"epoch {incident.epoch}, batch {incident.batch}"
    _print_line(f"Captured at step {incident.step} ({where}) of a {incident.task} run, {incident.reason}: {said}")
    bad = [image for image in incident.images if image.problems]
    _print_line(f"{len(bad)} of {len(incident.images)} images with problems{':' if bad else ''}")
    for image in bad:
        _print_line(f"  {image.path}: {'; '.join(image.problems)}")
    if incident.note:
        _print_line(f"note: {incident.note}")
    known = incident.first_bad is not None or NOT_LOCALISED not in incident.note
    _print_line(f"Then: {first_bad_words(incident.first_bad) if known else NOT_LOCALISED}")
    found = replay(words[0], weights=options["weights"])
    same = "the same place" if same_place(found, incident.first_bad) else "another place"
    with_weights = "" if options["weights"] is None else f" (weights={options['weights']})"
    _print_line(f"Now{with_weights}: {first_bad_words(found)}")
    if known:
        print(f"That is {same}.")
    return 0


def _print_line(text: str) -> None:
    print(_printable(text), flush=True)


# Rates that show the regimes on the drawn sets: stock's best, above it, and where stock is lost.
DEMO_RATES = [0.03, 0.1, 1.0]


def _demo(words: list[str]) -> int:
    """Everything at small size: draw data, train over learning rates with and without `update_clip`, report."""
    from yolo_gradstab.coco.sample import SAMPLE_TASKS, draw_sample
    from yolo_gradstab.report import build_report
    from yolo_gradstab.sweep import run_sweep

    out = Path(_options("demo", _pairs(words), required=(), optional={"out": "demo"})["out"])
    make_out(out, UsageError)
    os.environ.setdefault("YOLO_OFFLINE", "true")  # everything it needs is drawn here
    folders = []
    for task in SAMPLE_TASKS:
        data = draw_sample(out / "data" / task, task=task, images=96, size=64)
        train = {"model": str(_tiny_model(task, out)), "data": str(data), "epochs": 16, "imgsz": 64, "batch": 8}
        train |= {"nbs": 8, "optimizer": "SGD", "close_mosaic": 4, "val": False, "plots": False, "device": "cpu"}
        grid = {"lr0": DEMO_RATES, "update_clip": [None, 0.03]}
        print(
            f"{task}: {len(DEMO_RATES)} learning rates with stock's clip, alone and with update_clip=0.03", flush=True
        )
        folders.append(run_sweep({"task": task, "train": train, "grid": grid, "jobs": 2}, out / task, say=_say))
    report = build_report(folders, out=out)
    _print_trials(out / "trials.csv")
    print(f"Report: {report.resolve()}")
    return _failed_trials(folders, out)


def _tiny_model(task: str, out: Path) -> Path:
    """YOLO26 at an eighth of its width, small enough for a CPU; the host's own architecture with another scale."""
    from ultralytics.utils import ROOT, YAML

    name = "yolo26-pose" if task == "pose" else "yolo26"
    model = YAML.load(ROOT / "cfg" / "models" / "26" / f"{name}.yaml")
    path = out / "models" / f"{name}-tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**model, "scales": {"t": [0.5, 0.125, 1024]}}, sort_keys=False), encoding="utf-8")
    return path


def _print_trials(path: Path) -> None:
    """What a reader wants of `trials.csv` at a glance."""
    import polars as pl
    from rich.console import Console
    from rich.table import Table

    task = pl.col("sweep").str.split("/").list.last().alias("task")
    trials = pl.read_csv(path).with_columns(task)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name, heading in DEMO_COLUMNS.items():
        table.add_column(heading, justify="right" if trials.schema[name].is_numeric() else "left", no_wrap=True)
    for row in trials.select(DEMO_COLUMNS.keys()).iter_rows():
        table.add_row(*("" if v is None else f"{v:.2g}" if isinstance(v, float) else str(v) for v in row))
    Console(highlight=False, width=100).print(table)


DEMO_COLUMNS = {
    "task": "task",
    "arm": "clip",
    "lr0": "lr0",
    "verdict": "outcome",
    "score": "mAP50-95",
    "clipped_share": "clipped",
    "lr_eff": "effective lr",
}


def _checks(words: list[str]) -> int:
    """Status 1 where something is not as tested: a program may ask before it trains."""
    options = _options("checks", _pairs(words), required=(), optional={"format": "text"})
    _choice("format", options["format"], ("text", "json"))
    from yolo_gradstab.checks import run_checks

    checks = run_checks()
    if options["format"] == "json":
        _print_json({"checks": checks})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            sign = {True: "ok ", False: "?? ", None: "   "}[check.ok]
            print(f"{sign}{check.name:<{width}}  {check.found}")
    return int(any(check.ok is False for check in checks))


def _bench(words: list[str]) -> int:
    from yolo_gradstab.bench import PRECISIONS, run_bench

    optional = {"format": "text", "model": "yolo26n.yaml", "rounds": 60, "blocks": 10, "imgsz": 160}
    optional |= {"batch": 16, "optimizer": "SGD", "precision": "fp32"}
    options = _options("bench", _pairs(words), required=(), optional=optional)
    _choice("format", options["format"], ("text", "json"))
    for key, least, also in (("rounds", 10, ""), ("blocks", 3, " (or 0: no whole steps)"), ("imgsz", 32, "")):
        value = options[key]
        if not isinstance(value, int) or not (value >= least or (also and value == 0)):
            raise UsageError(f"bench: {key} must be a whole number of at least {least}{also}, got {value!r}")
    models, batches, optimizers, precisions = (
        value if isinstance(value := options[key], list) else [value]
        for key in ("model", "batch", "optimizer", "precision")
    )
    for key, values in (("model", models), ("batch", batches), ("optimizer", optimizers), ("precision", precisions)):
        if not values or None in values:
            raise UsageError(f"bench: {key} must be given, or left out for {optional[key]}")
    for batch in batches:
        if not isinstance(batch, int) or batch < 1:
            raise UsageError(f"bench: batch must be a whole number of at least 1, or a list of them, got {batch!r}")
    for optimizer in optimizers:
        _choice("bench: optimizer", optimizer, ("SGD", "AdamW", "MuSGD"))
    for precision in precisions:
        _choice("bench: precision", precision, tuple(PRECISIONS))
    try:
        result = run_bench(
            models,
            rounds=options["rounds"],
            blocks=options["blocks"],
            imgsz=options["imgsz"],
            batches=batches,
            optimizers=optimizers,
            precisions=precisions,
        )
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"bench: {error}") from error
    if options["format"] == "json":
        _print_json(result)
    else:
        _print_bench(result)
    return 0


def _print_bench(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = result["machine"]
    print(f"{machine['device']}, {machine['threads']} threads; the same part of a stock step = 1")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("model", "case", "ratio", "low", "high", "median_ms"):
        table.add_column(name, justify="left" if name in {"model", "case"} else "right")
    for case in result["cases"]:
        figures = (f"{case[name]:.3f}" for name in ("ratio", "low", "high", "median_ms"))
        table.add_row(Path(case["model"]).stem, _case_words(case), *figures)
    Console(highlight=False).print(table)
    for case in result["cases"]:
        if case["case"] == "clip_part":
            print(
                f"{Path(case['model']).stem}: {case['parameters']:,} weights in {case['tensors']} tensors; "
                f"reading as many bytes once takes {case['read_ms']:.2f} ms"
            )
        elif "source" in case:
            print(f"{case['case']}: {case['source']}")
        elif case["case"] == "guard":
            print(
                f"guard: two snapshots are kept, each {case['snapshot_mib']:.1f} MiB and made in "
                f"{case['snapshot_ms']:.1f} ms; the ratio is {case['ratio']:.4f} with one in 20 steps, early on, "
                f"{case['late_ratio']:.4f} with one in 200"
            )
        if "added_ms" in case:
            span = f"{case['added_low_ms']:.1f} to {case['added_high_ms']:.1f}"
            print(f"{_case_words(case)}: adds {case['added_ms']:.1f} ms ({span}) outside of forward and backward pass")
        if "syncs" in case:  # on a GPU
            print(f"{_case_words(case)}: waits for the GPU {case['syncs']:g} times, stock {case['stock_syncs']:g}")


def _case_words(case: dict[str, Any]) -> str:
    """What a case is, with its setting where it is a whole step."""
    return " ".join([case["case"], *(str(case[key]) for key in ("batch", "optimizer", "precision") if "batch" in case)])


def _say(line: str) -> None:
    print(line, flush=True)


# Words ---------------------------------------------------------------------------------------------------------------


def _is_pair(word: str) -> bool:
    """Whether a word is key=value, and not a folder of such a name."""
    return "=" in word and not Path(word).exists()


def _path(value: Any, text: str) -> Any:
    """A path as it was written, where YAML took it for a number, a date, a truth, or a part of it for a comment.

    Lists, nothing, and what stands in quotes, are as YAML has them.
    """
    return value if value is None or isinstance(value, list) or text.lstrip()[:1] in {"'", '"'} else text


def _pairs(words: list[str], paths: Set[str] = PATHS) -> dict[str, Any]:
    pairs = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} is not key=value")
        value = _value(key, text)
        pairs[key] = _path(value, text) if key in paths else value
    return pairs


def _options(
    command: str, given: dict[str, Any], *, required: Sequence[str], optional: dict[str, Any]
) -> dict[str, Any]:
    keys = [*required, *optional]
    for key, value in given.items():
        if key not in keys:
            raise UsageError(f"{command}: unknown key {key}={value!r}{nearest(key, keys)}")
        if value is None and optional.get(key) is not None:
            raise UsageError(f"{command}: {key} must be given, or left out for {optional[key]}")
    missing = [key for key in required if given.get(key) is None]
    if missing:
        raise UsageError(f"{command}: {' and '.join(missing)} must be given, as {missing[0]}=...")
    return {**optional, **given}


def _wrong_use(check: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """What a library's own check of arguments refuses is wrong use of the command."""
    try:
        check(*args, **kwargs)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def _shown(words: list[str]) -> str:
    return repr(words[0]) if words else "nothing"


_DATA: dict[str, Callable[[dict[str, Any]], int]] = {
    "check": _data_check,
    "convert": _data_convert,
    "sample": _data_sample,
}
_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "bench": _bench,
    "checks": _checks,
    "demo": _demo,
    "sweep": _sweep,
    "lr-range": _lr_range,
    "report": _report,
    "diagnose": _diagnose,
    "replay": _replay,
}
