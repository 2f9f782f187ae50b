"""Markdown and HTML from run and sweep folders; they are only read, so a report can be made anywhere and made again.

Imports neither torch nor ultralytics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jinja2
import msgspec
import polars as pl
from markupsafe import Markup

from yolo_gradstab import figures
from yolo_gradstab.config import CLIP_POLICIES
from yolo_gradstab.runs import RunError, RunFolder, replacing
from yolo_gradstab.sweep import METRICS, Spec, Trial, final_metric, plan, read_trial
from yolo_gradstab.telemetry import Run, read_run

__all__ = ["ReportError", "arm_label", "build_report", "judge", "loss_breakdown"]

LEARNED = 0.01  # a final metric above this shows that the task can be learned
NOTHING = 1e-3  # a final metric below this is no better than chance
FIRST_STEPS = 10  # a detector's loss may rise while its assigner settles: nothing is judged before this step
BLOWUP, COLLAPSE = 100.0, 1e-3  # of the median of the first losses

NOT_COMPUTED = "not computed in this version"
HOST_LR0 = 0.01  # the host's own default, for a run whose arguments are missing

UNFINISHED = ("running", "interrupted")

Verdict = Literal["kept", "lost", "did not learn"]


class ReportError(ValueError):
    """There is nothing to report on; the message is one line and names the path."""


# What became of a run ------------------------------------------------------------------------------------------------


def loss_breakdown(losses: Sequence[float], steps: Sequence[int] | None = None) -> str | None:
    """How a recorded loss left its course, in words; nothing if it did not.

    In simple form: a loss that is not finite, one 100 times the median of the first ten, or an end a thousand times
    below it, which is how a detector that matches nothing any more looks. `steps` are the optimizer steps the losses
    were recorded at, where that is not each one.

    Example:
        >>> loss_breakdown([200.0] * 10 + [2.25e8, 0.01])
        'loss 1.1e+06 times its start at step 10'
    """
    first = [loss for loss in losses[:FIRST_STEPS] if math.isfinite(loss)]
    later = losses[FIRST_STEPS:]
    numbers = range(len(losses)) if steps is None else steps
    for step, loss in zip(numbers[FIRST_STEPS:], later, strict=True):
        if not math.isfinite(loss):
            return f"loss not finite at step {step}"
        if first and loss > BLOWUP * median(first):
            return f"loss {_number(loss / median(first), 2)} times its start at step {step}"
    if first and later and median(losses[-FIRST_STEPS:]) < COLLAPSE * median(first):
        return f"loss collapsed to {median(losses[-FIRST_STEPS:]):.1e} from {median(first):.3g}"
    return None


def judge(
    outcome: str,
    metric: float | None,
    losses: Sequence[float],
    *,
    best_metric: float,
    steps: Sequence[int] | None = None,
) -> tuple[Verdict, str]:
    """Whether a run was kept, and why not.

    Args:
        outcome: As in its status. A run that diverged, was stopped by its guard, or failed of its loss is lost.
        metric: Its final metric.
        losses: Its recorded losses.
        best_metric: The best final metric in the same sweep: a metric of 0 is a loss only where learning was possible.
    """
    broken = loss_breakdown(losses, steps) or ""
    if outcome in {"diverged", "failed", "stopped"}:
        return "lost", broken
    if metric is not None and metric >= NOTHING:
        return "kept", ""
    if broken and best_metric > LEARNED:
        return "lost", broken
    return ("did not learn", broken) if metric is not None else ("kept", "no final metric was recorded")


class Row(msgspec.Struct, kw_only=True):
    """A run in the report; the columns of `trials.csv`."""

    id: str
    arm: str
    lr0: float
    seed: int
    optimizer: str
    outcome: str
    verdict: Verdict = "kept"
    metric: float | None
    best_metric: float | None
    steps: int
    max_total_norm: float | None
    clipped_share: float | None
    lr_eff: float | None
    seconds: float
    note: str = ""
    sweep: str | None = None
    path: str


class _Entry:
    """A run with its records, its place in the sweep, and its row."""

    def __init__(self, run: Run, trial: Trial | None) -> None:
        self.run = run
        self.arm = trial.arm if trial else {key: run.config.get(key) for key in ("clip", "update_clip")}
        self.steps = run.steps
        self.row = _row(run, trial, arm_label(run.config, self.arm))

    @property
    def lost(self) -> bool:
        return self.row.verdict == "lost"

    @property
    def score(self) -> float | None:
        """The metric as it counts: a lost run's is 0, whatever was measured."""
        return 0.0 if self.lost else self.row.metric


def _row(run: Run, trial: Trial | None, label: str) -> Row:
    steps, args, status = run.steps, run.args, run.status
    norms = steps["total_norm"].drop_nulls().filter(steps["total_norm"].drop_nulls().is_finite())
    lr0 = trial.lr0 if trial else float(args.get("lr0", HOST_LR0))
    return Row(
        id=trial.id if trial else run.folder.path.name,
        arm=label,
        lr0=lr0,
        seed=trial.seed if trial else int(args.get("seed", 0)),
        optimizer=str(args.get("optimizer", "unknown")),
        outcome=status.outcome,
        metric=None if status.outcome in UNFINISHED else final_metric(run),
        best_metric=_best_metric(run),
        steps=max(status.step, len(steps)),
        max_total_norm=max(norms.to_list(), default=None),
        clipped_share=_mean((steps["clip_coef"].drop_nulls() < 1).cast(pl.Float64)),
        lr_eff=_effective_rate(steps, lr0),
        seconds=status.seconds,
        note=status.reason or "",
        path=str(run.folder.path),
    )


def _effective_rate(steps: pl.DataFrame, lr0: float) -> float | None:
    """The rate after clipping: lr0 times the mean of the clip coefficient, each step weighted by its rate."""
    finite = steps.filter(pl.col("clip_coef").is_finite() & pl.col("lr").is_finite() & (pl.col("lr") > 0))
    if finite.is_empty():
        return None
    weighted = float((finite["lr"] * finite["clip_coef"]).sum())
    return weighted / float(finite["lr"].sum()) * lr0


def _best_metric(run: Run) -> float | None:
    for name in METRICS:
        if name in run.results.columns:
            values = run.results[name].cast(pl.Float64, strict=False).drop_nulls().drop_nans()
            return max(values.to_list(), default=None)
    return final_metric(run)


def _mean(values: pl.Series) -> float | None:
    return None if values.is_empty() else float(values.sum()) / len(values)


# Arms ----------------------------------------------------------------------------------------------------------------


def arm_label(config: dict[str, Any], arm: dict[str, Any]) -> str:
    """A short name of what an arm does.

    Args:
        config: The configuration as used.
        arm: Its place in the grid; what is no clipping is named too.

    Example:
        >>> arm_label({"clip": {"policy": "norm", "max_norm": 10.0}, "update_clip": {"max_ratio": 0.03}}, {})
        'norm 10 + update_clip 0.03'
    """
    label = _clip_label(config.get("clip") or {"policy": "none"})
    if bound := config.get("update_clip"):
        label += f" + update_clip {_short(bound['max_ratio'])}"
        label += "" if bound.get("follow_lr", True) else " constant"
    others = {key: value for key, value in arm.items() if key.partition(".")[0] not in {"clip", "update_clip"}}
    return label + "".join(f", {key} {_short(value)}" for key, value in others.items())


def _clip_label(clip: dict[str, Any]) -> str:
    """The policy, its main field, and whichever others differ from their defaults."""
    policy = str(clip.get("policy", "norm"))
    if policy == "none":
        return "no clip"
    fields = {key: list(v) if isinstance(v, tuple) else v for key, v in clip.items() if key != "policy"}
    main, *others = fields or {"": ""}
    defaults = msgspec.json.decode(msgspec.json.encode(CLIP_POLICIES[policy]())) if policy in CLIP_POLICIES else {}
    label = f"{policy} {_short(fields.get(main, ''))}".strip()
    return label + "".join(f" {key} {_short(fields[key])}" for key in others if fields[key] != defaults.get(key))


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " and ".join(map(_short, value)) or "nothing"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Comparisons ---------------------------------------------------------------------------------------------------------


class _Comparison:
    """Runs that may be compared: those of one sweep, or single runs of the same model on the same data."""

    def __init__(self, name: str, entries: list[_Entry], sweep: Path | None) -> None:
        self.name = name
        self.entries = entries
        self.sweep = sweep
        self.stem = ""  # of its figures' files
        self._judge()
        # In the grid's order for a sweep, where entries come in the order of the plan; lone runs as they were named.
        self.labels = list(dict.fromkeys(entry.row.arm for entry in entries))

    def _judge(self) -> None:
        best = max((entry.row.metric or 0.0 for entry in self.entries), default=0.0)
        for entry in self.entries:
            row = entry.row
            row.sweep = str(self.sweep) if self.sweep else None
            losses = entry.steps["loss"].fill_null(math.nan).to_list()
            steps = entry.steps["step"].to_list()
            row.verdict, why = judge(row.outcome, row.metric, losses, best_metric=best, steps=steps)
            row.note = "; ".join(text for text in (row.note, why) if text)

    @property
    def metric_name(self) -> str:
        return "pose mAP50-95" if any(METRICS[0] in entry.run.results.columns for entry in self.entries) else "mAP50-95"

    @property
    def is_single(self) -> bool:
        return len(self.entries) == 1

    @property
    def num_seeds(self) -> int:
        return len({entry.row.seed for entry in self.entries})

    @cached_property
    def arms(self) -> list[dict[str, Any]]:
        """As in `summary.json`."""
        return [self._arm([e for e in self.entries if e.row.arm == label]) for label in self.labels]

    def _arm(self, entries: list[_Entry]) -> dict[str, Any]:
        lost = sum(entry.lost for entry in entries)
        best, at_best = _best(entries)
        stable = _max_stable_rate(entries)
        reasons = dict.fromkeys(
            ("divergence_rate.low", "divergence_rate.high", "lr50", "lr_sensitivity", "basin_decades", "spike_score"),
            NOT_COMPUTED,
        )
        if best["metric"] is None:
            reasons |= dict.fromkeys(("best", "clipped_share", "lr_eff"), "no run was kept with a final metric")
        if stable is None:
            reasons["max_stable_lr"] = "a run was lost at the lowest learning rate"
        return {
            "arm": entries[0].arm,
            "label": entries[0].row.arm,
            "sweep": str(self.sweep) if self.sweep else None,
            "trials": len(entries),
            "diverged": lost,
            "did_not_learn": sum(entry.row.verdict == "did not learn" for entry in entries),
            "divergence_rate": {"value": lost / len(entries), "low": None, "high": None},
            "max_stable_lr": stable,
            "lr50": {"value": None, "low": None, "high": None},
            "lr_sensitivity": None,
            "basin_decades": None,
            "spike_score": None,
            "clipped_share": _median(entry.row.clipped_share for entry in at_best),
            "lr_eff": _median(entry.row.lr_eff for entry in at_best),
            "best": best,
            "seconds": sum(entry.row.seconds for entry in entries),
            "reasons": reasons,
        }

    @cached_property
    def sentence(self) -> str:
        """What the numbers say, in the order of the table."""
        if self.is_single:
            return _single_sentence(self.entries[0].row, self.metric_name)
        kept = [f"{arm['label']} kept {arm['trials'] - arm['diverged']} of {arm['trials']} runs" for arm in self.arms]
        best = [
            f"{arm['best']['metric']:.3f} ({arm['label']}, lr0 {arm['best']['lr0']:g})"
            for arm in sorted(self.arms, key=lambda arm: -(arm["best"]["metric"] or 0))
            if arm["best"]["metric"] is not None
        ]
        if not best:
            return f"{_listed(kept)}; no run has a final {self.metric_name}."
        middle = ", median over seeds" if self.num_seeds > 1 else ""
        return f"{_listed(kept)}; best {self.metric_name}{middle}: {' against '.join(best)}."

    @cached_property
    def stalled(self) -> int:
        """Runs that did not learn."""
        return sum(entry.row.verdict == "did not learn" for entry in self.entries)

    def charts(self, most_points: int) -> dict[str, Any]:
        """Its figures by name."""
        charts: dict[str, Any] = {}
        if not self.is_single:
            columns = ("arm", "lr0", "seed", "metric")
            rows = [{name: getattr(e.row, name) for name in columns} | {"lost": e.lost} for e in self.entries]
            schema = {"arm": pl.String, "lr0": pl.Float64, "seed": pl.Int64, "metric": pl.Float64, "lost": pl.Boolean}
            charts["metric"] = figures.metric_against_lr(pl.DataFrame(rows, schema=schema), self.metric_name)
        steps = [entry for entry in self.entries if len(entry.steps)]
        if steps:
            table = pl.concat([_labelled(trial, entry) for trial, entry in enumerate(steps)])
            charts["trajectories"] = figures.trajectories(table, most_points=most_points)
        return charts


def _labelled(trial: int, entry: _Entry) -> pl.DataFrame:
    columns = entry.steps.select("step", "loss", "total_norm", "clip_coef")
    labels = {"trial": trial, "arm": entry.row.arm, "lr0": entry.row.lr0, "lost": entry.lost}
    return columns.with_columns(pl.lit(value).alias(name) for name, value in labels.items())


def _best(entries: list[_Entry]) -> tuple[dict[str, float | None], list[_Entry]]:
    """The learning rate with the highest median over seeds, lost runs counting as 0, and the runs at it."""
    best: dict[str, float | None] = {"lr0": None, "metric": None, "low": None, "high": None}
    at_best: list[_Entry] = []
    for lr0 in sorted({entry.row.lr0 for entry in entries}):
        here = [entry for entry in entries if entry.row.lr0 == lr0]
        scores = [entry.score for entry in here if entry.score is not None]
        if scores and not all(entry.lost for entry in here) and median(scores) > (best["metric"] or -1.0):
            best = {"lr0": lr0, "metric": median(scores), "low": min(scores), "high": max(scores)}
            at_best = here
    return best, at_best


def _max_stable_rate(entries: list[_Entry]) -> float | None:
    """The highest learning rate up to which no run was lost."""
    stable = None
    for lr0 in sorted({entry.row.lr0 for entry in entries}):
        if any(entry.lost for entry in entries if entry.row.lr0 == lr0):
            break
        stable = lr0
    return stable


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _single_sentence(row: Row, metric_name: str) -> str:
    metric = "no final metric" if row.metric is None else f"final {metric_name} {row.metric:.3f}"
    end = {"kept": "", "lost": ", and the run was lost", "did not learn": ", and the run did not learn"}[row.verdict]
    clipped = "" if row.clipped_share is None else f", {row.clipped_share:.0%} of them clipped"
    outcome = {"running": "is running, or was killed,", "interrupted": "was interrupted", "stopped": "was stopped"}
    how = outcome.get(row.outcome, row.outcome)
    return f"{row.id} ({row.arm}, lr0 {row.lr0:g}) {how} after {row.steps} steps{clipped}: {metric}{end}."


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


# Finding the runs ----------------------------------------------------------------------------------------------------


class _NotShown(msgspec.Struct):
    """A folder that is left out, and why."""

    path: str
    reason: str


def _gather(paths: Sequence[Path]) -> tuple[list[_Comparison], list[_NotShown]]:
    """Every run under the paths, by what may be compared, and every folder that could not be used."""
    comparisons: list[_Comparison] = []
    not_shown: list[_NotShown] = []
    single: dict[str, list[_Entry]] = {}
    for path in paths:
        if (path / "trials").is_dir():
            entries = _read_sweep(path, not_shown)
            if entries:
                comparisons.append(_Comparison(path.resolve().name, entries, path))
        elif path.is_dir():
            if not RunFolder(path).gradstab.is_dir():
                raise ReportError(f"{path}: neither a run (no gradstab folder) nor a sweep (no trials folder)")
            # Alone, a run that goes on or was killed is worth looking at; beside others it would be compared with them.
            for entry in _read_all([path], not_shown, unfinished=len(paths) == 1):
                args = entry.run.args
                name = f"{args.get('task', 'run')}: {args.get('model', '?')} on {args.get('data', '?')}"
                single.setdefault(name, []).append(entry)
        else:
            raise ReportError(f"{path}: no such folder; give run folders or sweep folders")
    return comparisons + [_Comparison(name, entries, None) for name, entries in single.items()], not_shown


def _read_sweep(path: Path, not_shown: list[_NotShown]) -> list[_Entry]:
    """A sweep's trials in the order of its plan, then any that are no longer in it."""
    folders = sorted(folder for folder in (path / "trials").iterdir() if folder.is_dir())
    planned: list[str] = []
    try:
        spec = msgspec.yaml.decode((path / "sweep.yaml").read_bytes(), type=Spec)
        planned = [trial.id for trial in plan(spec, path)]
    except (OSError, msgspec.MsgspecError) as error:
        reason = "missing" if isinstance(error, OSError) else " ".join(str(error).split())
        not_shown.append(_NotShown(str(path / "sweep.yaml"), f"{reason}, so trials not started are not known"))
    names = {folder.name for folder in folders}
    if waiting := [trial for trial in planned if trial not in names]:
        not_shown.append(_NotShown(str(path), f"{len(waiting)} of {len(planned)} trials have not been started"))
    place = {name: i for i, name in enumerate(planned)}
    return _read_all(sorted(folders, key=lambda folder: place.get(folder.name, len(place))), not_shown)


def _read_all(folders: Iterable[Path], not_shown: list[_NotShown], *, unfinished: bool = False) -> list[_Entry]:
    entries = []
    for folder in folders:
        try:
            entry = _Entry(read_run(folder), read_trial(folder))
        # Any byte of a file may be damaged, and each reader has its own errors; the folder is named in the report.
        except (RunError, pl.exceptions.PolarsError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            not_shown.append(_NotShown(str(folder), f"cannot be read: {text.removeprefix(f'{folder}: ')}"))
            continue
        reason = _unfinished(entry)
        if reason and not (unfinished and len(entry.steps)):
            not_shown.append(_NotShown(str(folder), reason))
        else:
            entries.append(entry)
    return entries


def _unfinished(entry: _Entry) -> str | None:
    """Why a run says nothing about its configuration yet."""
    status = entry.run.status
    if status.outcome == "running":
        return f"has not ended: it is running, or was killed, at step {max(status.step, len(entry.steps))}"
    if status.outcome == "interrupted":
        return f"interrupted at step {status.step}" + (f" ({status.reason})" if status.reason else "")
    if status.outcome == "failed" and entry.steps.is_empty():
        return f"failed before its first step: {status.reason or 'no reason was recorded'}"
    losses = entry.steps["loss"].fill_null(math.nan).to_list()
    if status.outcome == "failed" and "NaN" not in (status.reason or "") and not loss_breakdown(losses):
        # A full disk or a memory too small says nothing about the learning rate.
        return f"failed for another reason than its loss: {status.reason or 'no reason was recorded'}"
    return None


# The report ----------------------------------------------------------------------------------------------------------


def build_report(paths: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Write `report.html`, `report.md`, `summary.json` and `trials.csv`; returns the page's path.

    In `summary.json`, an arm's `best` is at the learning rate with the highest median over seeds (a lost run counts as
    0), with the smallest and the largest of its seeds; `clipped_share` and `lr_eff` are medians of the runs at that
    rate; `seconds` are all its runs together.

    Args:
        paths: Run folders and sweep folders, mixed.
        out: Folder to write to; the first path by default.

    Raises:
        ReportError: A path is no folder, or none of them holds a run.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not given:
        raise ReportError("no folder given; give run folders or sweep folders")
    comparisons, not_shown = _gather(list(dict.fromkeys(given)))
    if not comparisons and not not_shown:
        raise ReportError(f"{given[0]}: no run in it; give run folders or sweep folders")
    folder = Path(out) if out is not None else given[0]
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"out={folder}: cannot be made ({error.strerror}); name another folder") from None
    _write_summary(folder, comparisons, not_shown)
    _write_trials(folder, comparisons)
    specs = _draw(folder, comparisons)
    context = _context(comparisons, not_shown)
    _write(folder / "report.md", _markdown().get_template("report.md.j2").render(context))
    context |= {"specs": specs, "script": Markup(figures.javascript_bundle()) if specs else ""}
    _write(folder / "report.html", _html().get_template("report.html.j2").render(context))
    return folder / "report.html"


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_summary(folder: Path, comparisons: list[_Comparison], not_shown: list[_NotShown]) -> None:
    summary = {
        "arms": [arm for comparison in comparisons for arm in comparison.arms],
        "compute_saved": None,
        "reasons": {"compute_saved": NOT_COMPUTED},
        "not_shown": not_shown,
    }
    with replacing(folder / "summary.json") as temporary:  # msgspec writes null for what is not finite
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))


def _write_trials(folder: Path, comparisons: list[_Comparison]) -> None:
    rows = [msgspec.to_builtins(entry.row) for comparison in comparisons for entry in comparison.entries]
    kinds = {"lr0": pl.Float64, "seed": pl.Int64, "steps": pl.Int64, "seconds": pl.Float64}
    kinds |= dict.fromkeys(("metric", "best_metric", "max_total_norm", "clipped_share", "lr_eff"), pl.Float64)
    schema = {name: kinds.get(name, pl.String) for name in Row.__struct_fields__}
    with replacing(folder / "trials.csv") as temporary:
        pl.DataFrame(rows, schema=schema).write_csv(temporary)


def _draw(folder: Path, comparisons: list[_Comparison]) -> dict[str, Markup]:
    """Save every figure, and return each as JSON for the page, by its file's stem."""
    specs = {}
    for number, comparison in enumerate(comparisons, 1):
        name = comparison.entries[0].row.id if comparison.is_single else comparison.name
        name = name if len(comparisons) == 1 else f"{number}_{name}"
        comparison.stem = re.sub(r"\W+", "_", name).strip("_")[:40]
        for kind, chart in comparison.charts(figures.FIGURE_POINTS // len(comparisons)).items():
            stem = f"{comparison.stem}_{kind}"
            figures.save(chart, folder / "figures" / f"{stem}.png")
            specs[stem] = Markup(figures.embedded(chart))  # escaped there, for a script element
    return specs


def _context(comparisons: list[_Comparison], not_shown: list[_NotShown]) -> dict[str, Any]:
    runs = [entry.run for comparison in comparisons for entry in comparison.entries]
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run.status.versions.items():
            found.setdefault(name, set()).add(version)
    return {
        "comparisons": comparisons,
        "not_shown": not_shown,
        "num_runs": len(runs),
        "num_seeds": max((comparison.num_seeds for comparison in comparisons), default=0),
        "fewest_seeds": min((_fewest_seeds(comparison) for comparison in comparisons), default=0),
        "has_stock": any(
            label.partition(" + ")[0] == "norm 10" for comparison in comparisons for label in comparison.labels
        ),
        "has_sweep": any(comparison.sweep for comparison in comparisons),
        "versions": {name: ", ".join(sorted(versions)) for name, versions in sorted(found.items())},
        "report_version": metadata.version("yolo-gradstab"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "trained": _dates(runs),
    }


def _fewest_seeds(comparison: _Comparison) -> int:
    cells: dict[tuple[str, float], int] = {}
    for entry in comparison.entries:
        cells[entry.row.arm, entry.row.lr0] = cells.get((entry.row.arm, entry.row.lr0), 0) + 1
    return min(cells.values())


def _dates(runs: list[Run]) -> str:
    """When the runs ended, by the time of their status files."""
    times = [(run.folder.gradstab / "status.json").stat().st_mtime for run in runs]
    days = sorted({datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d") for time in times})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""


# Templates -----------------------------------------------------------------------------------------------------------


def _html() -> jinja2.Environment:
    environment = jinja2.Environment(loader=_loader(), autoescape=True, undefined=jinja2.StrictUndefined, **_BLOCKS)
    environment.filters |= _FILTERS
    return environment


def _markdown() -> jinja2.Environment:
    """Every value is escaped where it is written, as HTML's are: nothing from data can become markup."""
    environment = jinja2.Environment(
        loader=_loader(),
        autoescape=False,
        finalize=_markdown_escaped,
        undefined=jinja2.StrictUndefined,
        **_BLOCKS,
    )
    environment.filters |= _FILTERS
    return environment


_BLOCKS: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}


def _loader() -> jinja2.BaseLoader:
    return jinja2.PackageLoader("yolo_gradstab", "templates")


def _markdown_escaped(value: Any) -> Any:
    """Text that Markdown and GitHub show as it is, on one line.

    Example:
        >>> _markdown_escaped("a|b <i>")
        'a\\\\|b &lt;i&gt;'
    """
    text = re.sub(r"([\\`*|\[\]$~#])", r"\\\1", re.sub(r"\s+", " ", str(value)))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _number(value: float | None, digits: int = 3) -> str:
    """Significant digits, without an exponent where that is short."""
    if value is None:
        return "–"
    if value and math.isfinite(value) and (abs(value) >= 1e5 or abs(value) < 1e-4):
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_FILTERS: dict[str, Any] = {"number": _number, "fixed": _fixed, "percent": _percent, "time": _time}
