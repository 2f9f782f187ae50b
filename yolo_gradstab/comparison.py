"""Runs read from their folders, what became of each, and what arms of a comparison come to.

Imports neither torch nor ultralytics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import msgspec
import polars as pl

from yolo_gradstab import stats
from yolo_gradstab.config import CLIP_POLICIES, ConfigError, Init
from yolo_gradstab.diagnosis import Finding, nothing_words
from yolo_gradstab.diagnosis.case import HOST_WARMUP, effective_lr, stage_of
from yolo_gradstab.diagnosis.finding import KINDS, SEVERITIES, Kind, Severity
from yolo_gradstab.diagnosis.layers import backbone
from yolo_gradstab.guard import NO_QUALITY, Divergence, UnrestKind, find_divergences
from yolo_gradstab.runs import RunError, RunFolder, counted, gave_up_on_nan, one_line
from yolo_gradstab.stats import Estimate
from yolo_gradstab.sweep import Spec, Trial, difference, plan, planned_config, read_trial
from yolo_gradstab.telemetry import QUALITY, Run, lasting, read_run

__all__ = [
    "DIVERGED",
    "Comparison",
    "Entry",
    "NotShown",
    "ReportError",
    "Row",
    "Verdict",
    "arm_label",
    "effects",
    "gather",
]

Interval = Mapping[str, float | None]  # `low` and `high`
Verdict = Literal["kept", "nonfinite", "blowup", "collapse", "stalled", "failed", "stopped", "running", "interrupted"]
DIVERGED: tuple[Verdict, ...] = ("nonfinite", "blowup", "collapse")
UNFINISHED: tuple[Verdict, ...] = ("running", "interrupted", "stopped")
UNDECIDED: tuple[Verdict, ...] = ("failed", *UNFINISHED)  # say nothing about a learning rate

LENGTH_KEYS = ("data", "epochs", "time", "batch", "nbs", "fraction")  # of the host's arguments, that set a run's steps
# Those that make no arm of a lone run: its place, its seed, its rate and what goes with it, and what only shows it.
OF_A_RUN = {"name", "project", "save_dir", "exist_ok", "resume", "seed", "lr0", "warmup_bias_lr", "device", "workers"}
OF_A_RUN |= {"task", "mode", "model", "data", "val", "save", "save_period", "plots", "verbose", "cache"}
MOST_NAMED = 4  # arms in a sentence
USABLE = 0.2  # below the best, a learning rate is still usable

MOMENTS = ("start", "after warm-up", "end")  # at which gradients are compared over depth
MOMENT_RECORDS = 3  # whose median stands for a moment after the start, of which there is one


class ReportError(ValueError):
    """There is nothing to report on; the message is one line and names the path."""


class Row(msgspec.Struct, kw_only=True):
    """A run in the report; the columns of `trials.csv`."""

    id: str
    arm: str
    lr0: float
    seed: int
    optimizer: str
    outcome: str
    verdict: Verdict
    divergence: str | None
    divergence_step: int | None
    metric: float | None
    score: float | None  # the metric as it counts: 0 for a run that diverged, whatever was measured
    best_metric: float | None
    val_loss: float | None
    steps: int
    p50_norm: float | None
    p90_norm: float | None
    p99_norm: float | None
    max_total_norm: float | None
    spike_score: float | None
    robust_spike_score: float | None
    largest_loss_ratio: float | None
    clipped_share: float | None
    lr_eff: float | None
    seconds: float
    note: str
    sweep: str | None = None
    path: str
    task: str
    model: str
    data: str
    metric_name: str | None  # what `metric` is


class Entry:
    """A run with its records, its place in the sweep, and its row."""

    def __init__(self, run: Run, trial: Trial | None) -> None:
        self.run = run
        self.arm = trial.arm if trial else _own_arm(run.config)
        self.steps, self.layers = run.steps, run.layers
        self.findings: list[Finding] | None = []  # most important first; none where records are damaged
        # A trial may have ended before it had written its own.
        self.config = run.config or (planned_config(trial) if trial else {})
        self.row = _row(run, trial, arm_label(self.config, self.arm))

    @property
    def diverged(self) -> bool:
        """Whether it counts as lost."""
        return self.row.verdict in DIVERGED

    @property
    def counts(self) -> bool:
        """Whether the run says something about its learning rate: one that did not come to an end does not."""
        return self.row.verdict not in UNDECIDED

    @property
    def length(self) -> tuple[str, ...]:
        """What sets a run's number of steps, as far as it is of the arm."""
        return tuple(str(self.arm.get(key)) for key in LENGTH_KEYS)

    @property
    def trained(self) -> tuple[str, ...]:
        """What is trained on what, as far as it is of the arm."""
        return tuple(str(self.arm.get(key)) for key in ("model", "data"))

    @property
    def score(self) -> float | None:
        """The metric as it counts."""
        return self.row.score

    @cached_property
    def depth_profile(self) -> pl.DataFrame:
        """Gradient norm of each stage of the backbone at `MOMENTS`: `moment`, `stage`, `norm`.

        A run that diverged has no end: what it came to says nothing about depth. Nor has one of a single record.
        """
        stage_by_name = {name: stage_of(name) for name in self.layers["layer"].unique().to_list()}
        stages = backbone(set(stage_by_name.values()))
        stage = pl.col("layer").replace_strict(stage_by_name, return_dtype=pl.Int64)
        table = self.layers.with_columns(stage=stage).filter(pl.col("stage").is_in(stages))
        given = self.run.args.get("warmup_epochs")
        warmup_epochs = HOST_WARMUP if given is None else float(given)
        # The host keeps the last epoch out of the warm-up.
        warmup_epochs = min(warmup_epochs, max(float(self.run.args.get("epochs") or math.inf) - 1, 0.0))
        warm = self.steps.filter(pl.col("epoch") >= warmup_epochs)["step"]
        recorded = table["step"].unique().sort()
        chosen = {"start": recorded.filter(recorded == 0)}
        if len(warm):
            chosen["after warm-up"] = recorded.filter(recorded >= warm.to_list()[0]).head(MOMENT_RECORDS)
        if not self.diverged:
            chosen["end"] = recorded.filter(recorded > 0).tail(MOMENT_RECORDS)
        norms = [
            table.filter(pl.col("step").is_in(steps.to_list()))
            .group_by("stage")
            .agg(norm=pl.col("grad_norm").median())
            .sort("stage")
            .select(pl.lit(moment).alias("moment"), "stage", "norm")
            for moment, steps in chosen.items()
            if len(steps)
        ]
        kinds = {"moment": pl.String, "stage": pl.Int64, "norm": pl.Float64}
        return pl.concat(norms) if norms else pl.DataFrame(schema=kinds)


# What became of a run ------------------------------------------------------------------------------------------------


def _row(run: Run, trial: Trial | None, label: str) -> Row:
    steps, args, status = run.steps, run.args, run.status
    if trial is None and "lr0" not in args:
        raise ValueError("its args.yaml is missing or names no lr0, so its learning rate is not known")
    lr0 = trial.lr0 if trial else float(args["lr0"])
    if not (math.isfinite(lr0) and lr0 > 0):
        raise ValueError(f"lr0={lr0:g} has no place on a scale of learning rates, which are above 0")
    verdict, found, note = _judge(run)
    norms = steps["total_norm"].fill_null(math.nan).to_numpy()
    summary, ratio = stats.norm_summary(norms), stats.loss_ratio(steps["loss"].fill_null(math.nan).to_numpy())
    metric = None if verdict in UNDECIDED else run.metric
    given = args | (trial.arm if trial else {})  # a trial may have ended before the host wrote its arguments
    return Row(
        id=trial.id if trial else run.folder.path.name,
        arm=label,
        lr0=lr0,
        seed=trial.seed if trial else int(args.get("seed", 0)),
        optimizer=str(args.get("optimizer", "unknown")),
        outcome=status.outcome,
        verdict=verdict,
        divergence=found.kind if found else None,
        divergence_step=found.step if found else None,
        metric=metric,
        score=0.0 if verdict in DIVERGED else metric,
        best_metric=_best_metric(run),
        val_loss=None if verdict in UNDECIDED else _val_loss(run),
        steps=max(status.step, len(steps)),
        p50_norm=summary.p50 if summary else None,
        p90_norm=summary.p90 if summary else None,
        p99_norm=summary.p99 if summary else None,
        max_total_norm=summary.max if summary else None,
        spike_score=stats.spike_score(norms),
        robust_spike_score=stats.robust_spike_score(norms),
        largest_loss_ratio=ratio.largest if ratio else None,
        clipped_share=stats.clipped_share(run.made["clip_coef"].fill_null(math.nan).to_numpy()),
        lr_eff=effective_lr(steps, run.events, lr0=lr0),
        seconds=status.seconds,
        note=note,
        path=str(run.folder.path),
        task=str(given.get("task", "unknown")),
        model=str(given.get("model", "unknown")),
        data=str(given.get("data", "unknown")),
        metric_name=run.metric_name,
    )


def _judge(run: Run) -> tuple[Verdict, Divergence | None, str]:
    """What became of a run, its divergence if it had one, and why, in words.

    A run that says itself that it diverged is believed; the others are judged by their records, with the same function.
    """
    status = run.status
    reason = status.reason or ""
    if status.outcome in {"running", "interrupted"}:
        return status.outcome, None, reason or f"has not ended: it {_running(run)}"
    map50 = run.map50
    if status.divergence:
        at = [
            e.get("step") for e in run.events if e.get("event") == "divergence" and e.get("kind") == status.divergence
        ]
        step = at[-1] if at else None  # those before it were undone
        found = Divergence(status.divergence, step if isinstance(step, int) else max(0, status.step - 1), reason)
        return status.divergence, found, reason
    if status.outcome == "completed" and map50 is not None and map50 >= NO_QUALITY:
        return "kept", None, _survived(run)
    if status.outcome == "stopped":
        return "stopped", None, reason
    # The host's words for a run that it could not bring back; one without a step failed of something else.
    gave_up = gave_up_on_nan(status) and len(run.steps) > 0
    if status.outcome == "failed" and not gave_up:
        return "failed", None, reason
    steps, layers = (lasting(table, run.events) for table in (run.steps, run.layers))
    if findings := find_divergences(steps, layers, map50=map50):
        found = findings[0]
        words = f"{found.kind} at step {found.step}: {found.reason}"
        return found.kind, found, "; ".join(text for text in (reason, words) if text)
    if gave_up or status.outcome == "diverged":  # a status can say so and not of which kind
        return "nonfinite", Divergence("nonfinite", max(0, status.step - 1, len(run.steps) - 1), reason), reason
    if map50 is not None and map50 < NO_QUALITY:
        return "stalled", None, "; ".join(text for text in (reason, _survived(run)) if text)
    return "kept", None, _survived(run)


def _running(run: Run) -> str:
    """Of one that says so, and that nothing shows to have been left."""
    return "is running" if run.folder.is_held() else "is running, or was killed,"


def _survived(run: Run) -> str:
    """Divergences that were undone, or healed, and where the guard went back before there was one, in words."""
    words = []
    for event in run.events:
        if event.get("event") == "divergence":
            undone = "undone" if event.get("action") == "rollback" else "and healed"
            words.append(f"{event.get('kind')} at step {event.get('step')}, {undone}")
        elif event.get("event") == "rollback" and event.get("kind") in get_args(UnrestKind):
            factor = event.get("lr_factor")
            rate = f", rate times {factor:.2g}" if isinstance(factor, float) else ""
            words.append(f"{event['kind']} at step {event.get('step')}, back to step {event.get('to_step')}{rate}")
    return "; ".join(words)


def _val_loss(run: Run) -> float | None:
    """Sum of the validation losses of the last epoch; null where there is none or, unvalidated, the host wrote 0."""
    names = [name for name in run.results.columns if name.startswith("val/") and name.endswith("loss")]
    values = [run.final([name]) for name in names]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) and any(known) else None


def _validated(run: Run) -> set[str]:
    """Components of the loss that validation computes; for the others the host writes 0, as for `rle` in pose."""
    names = (name for name in run.results.columns if name.startswith("val/") and name.endswith("loss"))
    return {name.removeprefix("val/").removesuffix("_loss") for name in names if run.final([name])}


def _first_loss(run: Run, components: Iterable[str]) -> float | None:
    """Sum of these parts of the first step's loss, which the host logs in the units of the validation losses."""
    names = [f"loss_{component}" for component in sorted(components)]
    if not names or run.steps.is_empty() or not set(names) <= set(run.steps.columns):
        return None
    values = [run.steps[name][0] for name in names]
    total = sum(math.nan if value is None else value for value in values)
    return total if math.isfinite(total) and total > 0 else None


def _best_metric(run: Run) -> float | None:
    for name in QUALITY:
        if name in run.results.columns:
            values = run.results[name].cast(pl.Float64, strict=False).drop_nulls().drop_nans()
            return max(values.to_list(), default=None)
    return run.metric


# Arms ----------------------------------------------------------------------------------------------------------------


def _own_arm(config: dict[str, Any]) -> dict[str, Any]:
    """What a run of its own is told from others by."""
    arm = {key: config.get(key) for key in ("clip", "update_clip")}
    mitigations = {key: value for key, value in (config.get("mitigations") or {}).items() if value is not None}
    return arm | ({"mitigations": mitigations} if mitigations else {})


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
    for key, value in (config.get("mitigations") or {}).items():
        if value is not None:
            label += f" + {key} {Init(**value).label if key == 'init' else value}"
    ours = {"clip", "update_clip", "mitigations"}
    others = {key: value for key, value in arm.items() if key.partition(".")[0] not in ours}
    if optimizer := others.pop("optimizer", None):
        label = f"{optimizer}, {label}"
    names = {"guard.divergence": "guard"}
    return label + "".join(f", {names.get(key, key)} {_short(value)}" for key, value in others.items())


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


class Comparison:
    """Runs that may be compared: those of one sweep, or single runs of the same model on the same data."""

    def __init__(
        self, name: str, entries: list[Entry], sweep: Path | None, planned: Iterable[tuple[str, float]] = ()
    ) -> None:
        """Args: `planned` are the arms and learning rates of the sweep's grid, whether they have runs or not."""
        self.name = name
        self.rates = {*planned, *((entry.row.arm, entry.row.lr0) for entry in entries)}
        self.entries = entries
        self.sweep = sweep
        self.stem = ""  # of its figures' files
        for entry in entries:
            entry.row.sweep = str(sweep) if sweep else None
        # In the grid's order for a sweep, where entries come in the order of the plan; lone runs as they were named.
        self.labels = list(dict.fromkeys(entry.row.arm for entry in entries))

    @property
    def metric_name(self) -> str:
        """As a reader calls it."""
        return next((name for entry in self.entries if (name := entry.run.metric_name)), "mAP50-95")

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to compare."""
        return len(self.entries) == 1

    @cached_property
    def fewest_seeds(self) -> int:
        """Of a learning rate of an arm, among the runs that count."""
        return min((_fewest_seeds(runs) for label in self.labels if (runs := self._counting(label))), default=0)

    @property
    def seeds_note(self) -> str:
        """What so many seeds can and cannot support."""
        paired = [pair["metric"].smallest_p for pair in self.pairs if pair["metric"].num_pairs]
        return stats.seeds_note(self.fewest_seeds, smallest_p=min(paired, default=None))

    def _counting(self, label: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.row.arm == label and entry.counts]

    @cached_property
    def num_seeds(self) -> int:
        """Different ones."""
        return len({entry.row.seed for entry in self.entries})

    def counted(self, verdict: Verdict) -> int:
        """Runs that ended so."""
        return sum(entry.row.verdict == verdict for entry in self.entries)

    def horizon(self, label: str) -> int:
        """Steps of a whole run of an arm, at least 1: the median of those that ran to their end, or the longest.

        Of all arms whose runs are meant to be as long.
        """
        alike = self._as_long(label)
        whole = [row.steps for row in alike if row.verdict in {"kept", "stalled"}]
        return max(1, int(median(whole)) if whole else max(row.steps for row in alike))

    def _as_long(self, label: str) -> list[Row]:
        length = next(entry.length for entry in self.entries if entry.row.arm == label)
        return [entry.row for entry in self.entries if entry.length == length]

    @cached_property
    def horizons(self) -> str:
        """Steps of a whole run, of all arms."""
        shortest, longest = (choose(map(self.horizon, self.labels)) for choose in (min, max))
        return f"{shortest}" if shortest == longest else f"{shortest} to {longest}"

    def initial_loss(self, label: str) -> float | None:
        """Of the first training step, in what validation computes; median over the runs with an arm's model and data.

        Nothing is validated before the first epoch has been trained. Of untrained tiny models this loss was 8.4 where
        validation gave 7.4 (detect), and 19.1 where it gave 20.2 (pose).
        """
        trained = next(entry.trained for entry in self.entries if entry.row.arm == label)
        alike = [entry for entry in self.entries if entry.trained == trained]
        components = set().union(*(_validated(entry.run) for entry in alike))
        found = [loss for entry in alike if (loss := _first_loss(entry.run, components)) is not None]
        return median(found) if found else None

    @cached_property
    def arms(self) -> list[dict[str, Any]]:
        """As in `summary.json`."""
        return [self._arm([entry for entry in self.entries if entry.row.arm == label]) for label in self.labels]

    def _arm(self, entries: list[Entry]) -> dict[str, Any]:
        runs = [entry for entry in entries if entry.counts]
        lr0, diverged = [entry.row.lr0 for entry in runs], [entry.diverged for entry in runs]
        scores = [entry.score for entry in runs]
        best, at_best = _best(runs)
        label = entries[0].row.arm
        untold = sorted({rate for arm, rate in self.rates if arm == label} - set(lr0))  # no run there counts
        rate, half = stats.jeffreys(sum(diverged), len(runs)), stats.lr50(lr0, diverged)
        estimates = {
            "lr_sensitivity": self._lr_sensitivity(runs, label),
            "quality_sensitivity": stats.quality_sensitivity(lr0, scores),
            "basin_decades": _basin(runs, best["lr0"], untold),
            "usable_decades": _basin(runs, best["lr0"], untold, within=USABLE),
        }
        if None in scores:  # which these would count as 0
            unknown = Estimate(reason="a run has no final metric")
            estimates |= dict.fromkeys(("quality_sensitivity", "basin_decades", "usable_decades"), unknown)
        below = [entry for entry in runs if not untold or entry.row.lr0 < untold[0]]
        stable = stats.max_stable_lr([entry.row.lr0 for entry in below], [entry.diverged for entry in below])
        survival = _survival(runs, self.horizon(label))
        values: dict[str, Any] = {name: estimate.value for name, estimate in estimates.items()}
        values["spike_score"] = _median(entry.row.spike_score for entry in runs)
        values["robust_spike_score"] = _median(entry.row.robust_spike_score for entry in runs)
        values["rmst"] = survival
        values["clipped_share"] = _median(entry.row.clipped_share for entry in at_best)
        values["lr_eff"] = _median(entry.row.lr_eff for entry in at_best)
        slopes, norms = _over_depth(_shown_for_depth(runs))
        reasons = {name: estimate.reason for name, estimate in estimates.items() if estimate.reason}
        reasons |= {"divergence_rate": rate.reason} if rate.reason else {}
        reasons |= {"lr50": half.reason} if half.reason else {}
        for key, found in (("depth_slope", slopes), ("depth_norm", norms)):
            reasons |= {f"{key}.{moment}": estimate.reason for moment, estimate in found.items() if estimate.reason}
        if untold and not any(entry.diverged for entry in below):
            reasons["max_stable_lr"] = f"{'' if stable is None else 'at least: '}no run at lr0 {untold[0]:g} counts"
        elif stable is None:
            reasons["max_stable_lr"] = "a run diverged at the lowest learning rate"
        if best["metric"] is None:
            reasons["best"] = "no run was kept with a final metric"
        for name in ("clipped_share", "lr_eff"):
            if values[name] is None:
                reasons[name] = reasons.get("best", "not recorded at the best learning rate")
        for name in ("spike_score", "robust_spike_score"):
            if values[name] is None:
                reasons[name] = "needs more than 128 recorded steps"
        if survival is None:
            reasons["rmst"] = "no run that counts"
        return {
            "arm": entries[0].arm,
            "label": label,
            "sweep": str(self.sweep) if self.sweep else None,
            "trials": len(runs),
            "num_seeds": _fewest_seeds(runs),
            "diverged": sum(diverged),
            "divergences": {kind: sum(entry.row.verdict == kind for entry in runs) for kind in DIVERGED},
            "stalled": sum(entry.row.verdict == "stalled" for entry in runs),
            "failed": sum(entry.row.verdict == "failed" for entry in entries),
            "unfinished": sum(entry.row.verdict in UNFINISHED for entry in entries),
            "divergence_rate": {"value": rate.value, "low": rate.low, "high": rate.high},
            "max_stable_lr": stable,
            "lr50": {"value": half.value, "low": half.low, "high": half.high},
            **values,
            "depth_slope": {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in slopes.items()},
            "depth_norm": {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in norms.items()},
            "best": best,
            "seconds": sum(entry.row.seconds for entry in entries),
            "runs": [
                {"lr0": entry.row.lr0, "seed": entry.row.seed, "diverged": entry.diverged, "score": entry.score}
                for entry in runs
            ],
            "reasons": reasons,
        }

    def _lr_sensitivity(self, runs: list[Entry], label: str) -> Estimate:
        initial_loss = self.initial_loss(label)
        if initial_loss is None:
            return Estimate(reason="the loss at the start was not recorded, or no validation loss to compare with it")
        losses = [None if entry.diverged else entry.row.val_loss for entry in runs]
        if any(loss is None and not entry.diverged for loss, entry in zip(losses, runs, strict=True)):
            return Estimate(reason="a run has no validation loss")
        return stats.lr_sensitivity([entry.row.lr0 for entry in runs], losses, initial_loss=initial_loss)

    @cached_property
    def compute_saved_s(self) -> Estimate:
        """Seconds not spent on runs that had diverged: the steps to the end of a whole run, at each one's own pace."""
        if self.sweep is None:
            return Estimate(reason="single runs have no planned length")
        ends = {
            label for label in self.labels if any(row.verdict in {"kept", "stalled"} for row in self._as_long(label))
        }
        if not ends:
            return Estimate(reason="no run came to its end, so the length of one is not known")
        lost = [entry.row for entry in self.entries if entry.diverged]
        saved = [
            max(0, self.horizon(row.arm) - row.steps) * row.seconds / max(1, row.steps)
            for row in lost
            if row.arm in ends
        ]
        left_out = list(dict.fromkeys(row.arm for row in lost if row.arm not in ends))
        reason = f"without {_listed(left_out)}: no run as long came to its end" if left_out else None
        return Estimate(value=sum(saved), reason=reason)

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Every further arm against the first: final metric and survival, paired by learning rate and seed."""
        first, *others = self.labels
        found: list[dict[str, Any]] = []
        for label in others:
            quality = stats.compare_paired(self._scores(first), self._scores(label))
            lives = self._compare_lives(first, label)
            found.append({"first": first, "second": label, "metric": quality, "survival_steps": lives})
        for kind in ("metric", "survival_steps"):
            adjusted = stats.holm([pair[kind].p_value for pair in found])
            for pair, p in zip(found, adjusted, strict=True):
                pair[f"{kind}_p_holm"] = p
        return found

    def _compare_lives(self, first: str, second: str) -> stats.PairedComparison:
        """How much longer the second's runs live; nothing where they are not meant to be of one length."""
        if len({entry.length for entry in self.entries if entry.row.arm in {first, second}}) > 1:
            return msgspec.structs.replace(stats.compare_paired({}, {}), reason="runs of the two are not of one length")
        return stats.compare_survival(self._lives(first), self._lives(second), horizon=self.horizon(first))

    def _scores(self, label: str) -> dict[tuple[float, int], float]:
        return {(e.row.lr0, e.row.seed): e.score for e in self._counting(label) if e.score is not None}

    def _lives(self, label: str) -> dict[tuple[float, int], tuple[float, bool]]:
        return {(e.row.lr0, e.row.seed): (_end(e), e.diverged) for e in self._counting(label)}

    @cached_property
    def findings(self) -> list[FindingRow]:
        """Errors and warnings of all runs, by arm: errors first, of them what was most often the root cause."""
        groups: dict[tuple[str, Severity, Kind], list[tuple[Entry, Finding]]] = {}
        for entry in self.entries:
            for finding in entry.findings or []:
                if finding.severity != "info":
                    groups.setdefault((entry.row.arm, finding.severity, finding.kind), []).append((entry, finding))
        rows = sorted(
            (_finding_row(group) for group in groups.values()),
            key=lambda row: (
                self.labels.index(row.arm), SEVERITIES.index(row.severity), -row.first, -row.runs, KINDS.index(row.kind)
            ),
        )  # fmt: skip
        given: set[tuple[str, str]] = set()
        for row in rows:
            if (row.arm, row.advice) in given:
                row.advice = ""
            given.add((row.arm, row.advice))
        return rows

    @cached_property
    def findings_sentence(self) -> str:
        """How many runs have an error, and how many a warning; of a single run only where there is neither."""
        kinds = Counter(
            "damaged" if entry.findings is None else entry.findings[0].severity if entry.findings else "info"
            for entry in self.entries
        )
        if kinds.keys() <= {"info"}:
            if self.is_single:
                return nothing_words(self.entries[0].run.status, self.entries[0].run.map50)
            verdicts = Counter(entry.row.verdict for entry in self.entries)
            poor: dict[Verdict, str] = {"failed": "failed", "stalled": "did not learn"}
            but = [f"{verdicts[verdict]} {what}" for verdict, what in poor.items() if verdicts[verdict]]
            return f"Nothing wrong was found, but {_listed(but)}." if but else "Nothing wrong was found."
        words = {"error": "with an error", "warning": "with a warning", "damaged": "whose records cannot be diagnosed"}
        parts = [f"{kinds[kind]} {what}" for kind, what in words.items() if kinds[kind]]
        of = f"Of {counted(len(self.entries), 'run')}"
        return "" if self.is_single and not kinds["damaged"] else f"{of}: {_listed(parts)}."

    @cached_property
    def sorts(self) -> str:
        """How the runs that were not kept ended, and what ending some early has spared; nothing where all were kept."""
        words = {"nonfinite": "not finite", "blowup": "blew up", "collapse": "collapsed silently", "stalled": "stalled"}
        counts = Counter(entry.row.verdict for entry in self.entries)
        parts = [f"{counts[kind]} {words.get(kind, kind)}" for kind in counts if kind != "kept"]
        if not parts:
            return ""
        text = f"Of {counted(len(self.entries), 'run')}, {_listed(parts)}."
        saved = self.compute_saved_s.value
        return text + (f" Ending diverged runs early spared {saved / 60:.0f} min." if saved and saved > 90 else "")

    # Tables for the figures ------------------------------------------------------------------------------------------

    def trials_table(self) -> pl.DataFrame:
        """A row per run that counts."""
        columns = ("arm", "lr0", "seed", "metric", "verdict", "lr_eff", "divergence_step")
        rows = [{name: getattr(entry.row, name) for name in columns} for entry in self.entries if entry.counts]
        kinds = {"arm": pl.String, "lr0": pl.Float64, "seed": pl.Int64, "metric": pl.Float64, "verdict": pl.String}
        return pl.DataFrame(rows, schema=kinds | {"lr_eff": pl.Float64, "divergence_step": pl.Int64})

    def grid_table(self) -> tuple[pl.DataFrame, str | None]:
        """The same for a grid of cells; and what its rows are, if not the names of arms.

        Where arms differ in nothing but the cap of their update, rows are that: off first, then ascending.
        """
        table = self.trials_table()
        bounds = {entry.row.arm: entry.config.get("update_clip") for entry in self.entries}
        caps = {arm: bound["max_ratio"] if bound else None for arm, bound in bounds.items()}
        beside = {arm_label(entry.config | {"update_clip": None}, entry.arm) for entry in self.entries}
        is_constant = any(bound and not bound.get("follow_lr", True) for bound in bounds.values())
        if len(beside) > 1 or is_constant or len(set(caps.values())) < len(caps):
            return table, None
        order = sorted(caps, key=lambda arm: caps[arm] or 0.0)
        names = {arm: "off" if caps[arm] is None else _short(caps[arm]) for arm in order}
        place = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(order)}, return_dtype=pl.Int64)
        title = f"update_clip, with {beside.pop()}"
        return table.sort(place, maintain_order=True).with_columns(pl.col("arm").replace_strict(names)), title

    def steps_table(self) -> pl.DataFrame | None:
        """The step records of all runs, and which run each is of."""
        tables = [
            entry.steps.select("step", "loss", "total_norm", "clip_coef").with_columns(
                trial=pl.lit(i),
                arm=pl.lit(entry.row.arm),
                lr0=pl.lit(entry.row.lr0),
                diverged_at=pl.lit(entry.row.divergence_step, dtype=pl.Int64),
            )
            for i, entry in enumerate(self.entries)
            if len(entry.steps)
        ]
        return pl.concat(tables) if tables else None

    def rollbacks_table(self) -> pl.DataFrame:
        """The steps after which the guard went back, by run as in `steps_table`."""
        rows = [
            (i, event["step"])
            for i, entry in enumerate(self.entries)
            for event in entry.run.events
            if event.get("event") == "rollback" and isinstance(event.get("step"), int)
        ]
        return pl.DataFrame(rows, schema={"trial": pl.Int32, "step": pl.Int64}, orient="row")

    def survival_table(self) -> pl.DataFrame | None:
        """Share of an arm's runs that have not diverged, by step; nothing where none has."""
        runs = [entry for entry in self.entries if entry.counts]
        if not any(entry.diverged for entry in runs):
            return None
        rows = []
        for label in self.labels:
            mine = [entry for entry in runs if entry.row.arm == label]
            if mine:
                ends = [_end(e) for e in mine]
                curve = stats.survival_curve(ends, [e.diverged for e in mine], horizon=self.horizon(label))
                rows += [{"arm": label, "step": step, "share": share} for step, share in curve]
        return pl.DataFrame(rows)

    def layer_tables(self) -> list[tuple[str, pl.DataFrame]]:
        """Layer records of the best run, and of the first that diverged."""
        best = max((e for e in self.entries if e.counts and e.score), key=lambda e: e.score or 0.0, default=None)
        lost = min((e for e in self.entries if e.diverged), key=lambda e: (e.row.lr0, e.row.seed), default=None)
        if self.is_single:
            best, lost = self.entries[0], None
        chosen = [
            (f"{what}{entry.row.arm}, lr0 {entry.row.lr0:g}, seed {entry.row.seed}", entry.layers)
            for what, entry in (("" if self.is_single else "best: ", best), (f"{_kind(lost)}: ", lost))
            if entry is not None
        ]
        return [(title, layers) for title, layers in chosen if len(layers)]

    def depth_table(self) -> pl.DataFrame | None:
        """Gradient norm of the backbone's stages by arm and moment: the median over the runs its slope is of."""
        tables = []
        for label in self.labels:
            runs = _shown_for_depth([entry for entry in self.entries if entry.row.arm == label and entry.counts])
            profiles = [entry.depth_profile for entry in runs]
            if any(len(profile) for profile in profiles):
                norms = pl.concat(profiles).group_by("moment", "stage").agg(pl.col("norm").median())
                tables.append(norms.select(pl.lit(label).alias("arm"), "moment", "stage", "norm"))
        if not tables:
            return None
        order = pl.col("moment").replace_strict({name: i for i, name in enumerate(MOMENTS)}, return_dtype=pl.Int64)
        return pl.concat(tables).sort(order, "stage", maintain_order=True)

    @cached_property
    def sentence(self) -> str:
        """What the numbers say, in the order of the table."""
        if self.is_single:
            return _single_sentence(self.entries[0], self.metric_name)
        arms = [arm for arm in self.arms if arm["trials"]]
        if not arms:
            counts = Counter(entry.row.verdict for entry in self.entries)
            if counts.keys() == {"running"}:
                return "No run has ended yet."
            return f"No run counts: {_listed([f'{number} {kind}' for kind, number in counts.items()])}."
        shown, rest = (arms, []) if len(arms) <= MOST_NAMED else (arms[:1], arms[1:])
        lost = _losses(
            [f"{arm['label']} lost {arm['diverged']} of {counted(arm['trials'], 'run')}" for arm in shown],
            [arm["diverged"] for arm in rest],
        )
        alike = self._losses_alike(shown, rest)
        ranked = sorted(
            (arm for arm in arms if arm["best"]["metric"] is not None), key=lambda arm: -arm["best"]["metric"]
        )
        if rest:  # the two best, and the first, which the others are compared with
            ranked = [arm for i, arm in enumerate(ranked) if i < 2 or arm is arms[0]]
        best = [f"{a['best']['metric']:.3f} ({a['label']}, lr0 {a['best']['lr0']:g})" for a in ranked]
        if not best:
            return f"{lost}; no run has a final {self.metric_name}.{alike}"
        middle = ", median over seeds" if self.num_seeds > 1 else ""
        return f"{lost}; best {self.metric_name}{middle}: {' against '.join(best)}.{alike}"

    def _losses_alike(self, shown: list[dict[str, Any]], rest: list[dict[str, Any]]) -> str:
        """Where arms do not have the same learning rates and seeds, what they lost at those that all have."""
        cells = [_lost_by_cell(arm) for arm in (*shown, *rest)]
        common = set.intersection(*map(set, cells))
        if all(common == known.keys() for known in cells):
            return ""
        if not common:
            return " The arms have no learning rate and seed in common."
        counts = [sum(known[cell] for cell in common) for known in cells]
        named = [f"{arm['label']} lost {count}" for arm, count in zip(shown, counts, strict=False)]
        lost = _losses(named, counts[len(shown) :])
        return f" At the {len(common)} pairs of learning rate and seed that all arms have, {lost}."


def _losses(shown: list[str], rest: list[int]) -> str:
    """How many runs were lost, in words of the arms that are named, and in numbers of the others."""
    if rest:
        fewest, most = min(rest), max(rest)
        how = f"{fewest} each" if fewest == most else f"{fewest} to {most}"
        shown = [*shown, f"the {len(rest)} others {how if most else 'none'}"]
    return _listed(shown)


class FindingRow(msgspec.Struct, kw_only=True):
    """One kind of finding among the runs of an arm.

    Attributes:
        runs: How many have it.
        first: In how many it is the first finding: for an error, the root cause.
        steps: Earliest and latest step at which it was first seen.
        lr0: Lowest and highest learning rate of these runs.
        example: The run at the lowest rate.
        advice: For that run; empty where an earlier row of the arm gives the same.
    """

    arm: str
    severity: Severity
    kind: Kind
    runs: int
    first: int
    steps: tuple[int, int] | None
    lr0: tuple[float, float]
    example: str
    advice: str


def _finding_row(group: list[tuple[Entry, Finding]]) -> FindingRow:
    entry, finding = min(group, key=lambda one: (one[0].row.lr0, one[0].row.seed))
    rates = [entry.row.lr0 for entry, _ in group]
    steps = [finding.step for _, finding in group if finding.step is not None]
    return FindingRow(
        arm=entry.row.arm,
        severity=finding.severity,
        kind=finding.kind,
        runs=len({id(entry) for entry, _ in group}),
        first=sum(found is next(iter(one.findings or []), None) for one, found in group),
        steps=(min(steps), max(steps)) if steps else None,
        lr0=(min(rates), max(rates)),
        example=entry.row.id,
        advice=finding.advice,
    )


def _fewest_seeds(runs: list[Entry]) -> int:
    """Different seeds at the learning rate that has the fewest."""
    seeds = Counter(rate for rate, _ in {(entry.row.lr0, entry.row.seed) for entry in runs})
    return min(seeds.values(), default=0)


def _basin(runs: list[Entry], best: float | None, unknown: list[float], **options: float) -> Estimate:
    """Decades around the best rate, which end at the latest where nothing is known."""
    if best is None:
        return stats.basin_decades([], [], **options)
    low = max((rate for rate in unknown if rate < best), default=0.0)
    high = min((rate for rate in unknown if rate > best), default=math.inf)
    known = [entry for entry in runs if low < entry.row.lr0 < high]
    found = stats.basin_decades([entry.row.lr0 for entry in known], [entry.score for entry in known], **options)
    missing = [f"{rate:g}" for rate in (low, high) if 0 < rate < math.inf]
    if found.reason and found.value is not None and missing:
        reason = f"{found.reason}; no run at lr0 {_listed(missing)} counts"
        return msgspec.structs.replace(found, reason=reason)
    return found


def _kind(entry: Entry | None) -> str:
    return entry.row.verdict if entry else ""


def _end(entry: Entry) -> float:
    """The step at which a run ended or diverged."""
    step = entry.row.divergence_step
    return float(step + 1 if entry.diverged and step is not None else max(1, entry.row.steps))


def _survival(runs: list[Entry], horizon: int) -> float | None:
    """Restricted mean survival time, in steps."""
    if not runs:
        return None
    return stats.rmst([_end(entry) for entry in runs], [entry.diverged for entry in runs], horizon=horizon)


def _best(entries: list[Entry]) -> tuple[dict[str, float | None], list[Entry]]:
    """The learning rate with the highest median over seeds, lost runs counting as 0, and the runs at it."""
    runs = [{"lr0": e.row.lr0, "score": e.score, "diverged": e.diverged} for e in entries]
    best = _best_of(runs)
    return best, [entry for entry in entries if entry.row.lr0 == best["lr0"]]


def _best_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    best: dict[str, float | None] = {"lr0": None, "metric": None, "low": None, "high": None}
    for lr0 in sorted({run["lr0"] for run in runs}):
        here = [run for run in runs if run["lr0"] == lr0]
        scores = [run["score"] for run in here if run["score"] is not None]
        is_better = scores and (best["metric"] is None or median(scores) > best["metric"])
        if is_better and not all(run["diverged"] for run in here):
            best = {"lr0": lr0, "metric": median(scores), "low": min(scores), "high": max(scores)}
    return best


def _shown_for_depth(entries: list[Entry]) -> list[Entry]:
    """Runs whose gradients over depth speak for an arm: those at its best learning rate, or at its lowest."""
    _, at_best = _best(entries)
    return at_best or [e for e in entries if e.row.lr0 == min(other.row.lr0 for other in entries)]


def _over_depth(entries: list[Entry]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """How gradients change over the backbone, and how large they are, at each moment.

    Returns:
        Slope of ln norm per stage, with Student's interval over the seeds; and the median norm of the stages, its
        geometric mean over the seeds with the interval of its logarithm. Gradients that are small throughout have
        vanished as well, and only the second shows it.
    """
    slopes: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    norms: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    for entry in entries:
        for (moment,), table in entry.depth_profile.group_by("moment"):
            values = table["norm"].to_list()
            slope, norm = stats.depth_slope(table["stage"].to_list(), values), _median(values)
            slopes[str(moment)] += [] if slope is None else [slope]
            norms[str(moment)] += [] if norm is None else [norm]
    return (
        {moment: stats.mean_over_seeds(found) for moment, found in slopes.items()},
        {moment: stats.geometric_mean_over_seeds(found) for moment, found in norms.items()},
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _single_sentence(entry: Entry, metric_name: str) -> str:
    row = entry.row
    metric = "no final metric" if row.metric is None else f"final {metric_name} {row.metric:.3f}"
    clipped = "" if row.clipped_share is None else f", {row.clipped_share:.0%} of them clipped"
    how = {
        "kept": "completed",
        "running": _running(entry.run),
        "interrupted": "was interrupted",
        "stopped": "was stopped",
        "failed": "failed",
        "stalled": "completed without learning",
    }.get(row.verdict, f"diverged ({row.verdict})")
    at = (
        f" at step {row.divergence_step} of {row.steps}"
        if row.divergence_step is not None
        else f" after {counted(row.steps, 'step')}"
    )
    return f"{row.id} ({row.arm}, lr0 {row.lr0:g}) {how}{at}{clipped}: {metric}."


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def effects(arms: Sequence[Mapping[str, Any]], *, metric: str = "mAP50-95") -> pl.DataFrame:
    """What each arm of a summary came to, against the first: the cells of `figures.technique_matrix`.

    Better and worse are said only where intervals do not overlap: of the share of runs lost (Jeffreys, 95 %) and of the
    slope over depth (Student over seeds; nearer to zero is better), or the ranges over seeds at the best rates. A
    largest rate without a loss is one of a grid, and a gradient's size depends on the loss: neither is judged. Runs
    lost and the best are judged at the learning rates and seeds that both arms have, whatever the words count.

    Args:
        arms: `arms` of `summary.json`; of several sweeps where all but the technique is the same.
        metric: What the metric is called.

    Returns:
        `arm`, `measure`, `words`, `effect` (1, 0, -1 or null).
    """
    rows: list[tuple[str, str, str, int | None]] = []
    first = arms[0]
    first_slope = _magnitude(first["depth_slope"].get("start", {}))
    for arm in arms:
        slope = arm["depth_slope"].get("start", {})
        norm = arm.get("depth_norm", {}).get("start", {}).get("value")  # not in summaries of older versions
        best, stable = arm["best"], arm["max_stable_lr"]
        steepness = "not recorded" if slope.get("value") is None else f"{slope['value']:+.2f}".replace("-", "−")
        quality = "none"
        if best["metric"] is not None:
            quality = f"{best['metric']:.3f}"
            quality += f" ({best['low']:.3f} to {best['high']:.3f})" if arm["num_seeds"] > 1 else ""
        words = {
            "slope over depth|at the start": steepness,
            "gradient norm of|a stage there": "not recorded" if norm is None else f"{norm:.2g}",
            "runs lost": f"{arm['diverged']} of {arm['trials']}",
            "largest rate|without a loss": "none" if stable is None else f"{stable:g}",
            f"best {metric}|(range of seeds)": quality,
        }
        (share, best), (first_share, first_best) = _alike(arm, first), _alike(first, arm)
        judged: list[int | None] = [
            _effect(first_slope, _magnitude(slope), higher_is_better=False),
            None,
            _effect(first_share, share, higher_is_better=False),
            None,
            # One seed has no range.
            _effect(first_best, best, higher_is_better=True) if min(first["num_seeds"], arm["num_seeds"]) > 1 else None,
        ]
        for (measure, text), effect in zip(words.items(), judged, strict=True):
            rows.append((arm["label"], measure, text, None if arm is first else effect))
    kinds = {"arm": pl.String, "measure": pl.String, "words": pl.String, "effect": pl.Int8}
    return pl.DataFrame(rows, schema=kinds, orient="row")


def _lost_by_cell(arm: Mapping[str, Any]) -> dict[tuple[float, int], bool]:
    return {(run["lr0"], run["seed"]): run["diverged"] for run in arm["runs"]}


def _alike(arm: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Interval, Interval]:
    """Share of runs lost, and range of seeds at the best rate, of an arm at the cells that another has too."""
    if "runs" not in arm or "runs" not in other:  # of summaries of older versions: all, where there are as many
        is_alike = arm["trials"] == other["trials"]
        return (arm["divergence_rate"], arm["best"]) if is_alike else (_NOTHING, _NOTHING)
    common = _lost_by_cell(arm).keys() & _lost_by_cell(other).keys()
    runs = [run for run in arm["runs"] if (run["lr0"], run["seed"]) in common]
    rate = stats.jeffreys(sum(run["diverged"] for run in runs), len(runs))
    return {"low": rate.low, "high": rate.high}, _best_of(runs)


_NOTHING: Interval = {"low": None, "high": None}


def _magnitude(interval: Interval) -> dict[str, float | None]:
    """The interval of the absolute value."""
    low, high = interval.get("low"), interval.get("high")
    if low is None or high is None:
        return {"low": None, "high": None}
    return {"low": max(0.0, low, -high), "high": max(abs(low), abs(high))}


def _effect(first: Interval, other: Interval, *, higher_is_better: bool) -> int | None:
    """1 or -1 where the second interval lies wholly beside the first, 0 where they overlap, null without both."""
    low, high, other_low, other_high = first["low"], first["high"], other["low"], other["high"]
    if low is None or high is None or other_low is None or other_high is None:
        return None
    if other_low > high:
        return 1 if higher_is_better else -1
    if other_high < low:
        return -1 if higher_is_better else 1
    return 0


# Finding the runs ----------------------------------------------------------------------------------------------------


class NotShown(msgspec.Struct):
    """A folder that is left out, and why."""

    path: str
    reason: str


def gather(paths: Sequence[Path]) -> tuple[list[Comparison], list[NotShown]]:
    """Every run under the paths, by what may be compared, and every folder that could not be used.

    Raises:
        ReportError: A path is neither a run nor a sweep.
    """
    comparisons: list[Comparison] = []
    not_shown: list[NotShown] = []
    single: dict[str, list[Entry]] = {}
    for i, path in enumerate(paths):
        if any(path.resolve() == other.resolve() for other in paths[:i]):
            not_shown.append(NotShown(str(path), "named twice"))
        elif (path / "trials").is_dir():
            entries, planned = _read_sweep(path, not_shown)
            if entries:
                comparisons.append(Comparison(path.resolve().name, entries, path, planned))
        elif path.is_dir():
            if not RunFolder(path).gradstab.is_dir():
                raise ReportError(f"{path}: neither a run (no gradstab folder) nor a sweep (no trials folder)")
            for entry in _read_all([path], not_shown):
                args = entry.run.args
                name = f"{args.get('task', 'run')}: {args.get('model', '?')} on {args.get('data', '?')}"
                single.setdefault(name, []).append(entry)
        else:
            raise ReportError(f"{path}: no such folder; give run folders or sweep folders")
    for name, entries in single.items():
        comparisons.append(Comparison(name, _told_apart(entries, not_shown), None))
    return comparisons, not_shown


def _told_apart(entries: list[Entry], not_shown: list[NotShown]) -> list[Entry]:
    """Lone runs as arms by all that they differ in, each configuration, rate and seed once."""

    def given(entry: Entry) -> dict[str, Any]:
        guard = {f"guard.{key}": value for key, value in (entry.config.get("guard") or {}).items()}
        return {key: value for key, value in entry.run.args.items() if key not in OF_A_RUN} | guard

    known = [given(entry) for entry in entries]
    keys = dict.fromkeys(key for one in known for key in one)
    differing = [key for key in keys if len({str(one.get(key)) for one in known}) > 1]
    # It goes with the rate in sweeps; where runs at one rate differ in it, it is an arm as any other.
    biases = {(entry.row.lr0, str(entry.run.args.get("warmup_bias_lr"))) for entry in entries}
    if len(biases) > len({rate for rate, _ in biases}):
        differing.append("warmup_bias_lr")
    for entry, one in zip(entries, known, strict=True):
        entry.arm |= {key: one.get(key, entry.run.args.get(key)) for key in differing}
        entry.row.arm = arm_label(entry.config, entry.arm)
    return _once(entries, not_shown)


def _once(entries: list[Entry], not_shown: list[NotShown]) -> list[Entry]:
    """Of runs of the same arm, learning rate and seed the first that counts, or else the first."""
    kept: dict[tuple[str, float, int], Entry] = {}
    for entry in sorted(entries, key=lambda entry: not entry.counts):
        first = kept.setdefault((entry.row.arm, entry.row.lr0, entry.row.seed), entry)
        if first is not entry:
            reason = f"the same configuration, learning rate and seed as {first.row.path}"
            not_shown.append(NotShown(entry.row.path, reason))
    return [entry for entry in entries if entry in kept.values()]


def _read_sweep(path: Path, not_shown: list[NotShown]) -> tuple[list[Entry], set[tuple[str, float]]]:
    """A sweep's trials in the order of its plan, then those of other grids and seeds with the same training.

    Returns:
        The trials; and the arms and learning rates of the plan.
    """
    folders = sorted(folder for folder in (path / "trials").iterdir() if folder.is_dir())
    planned: dict[str, Trial] = {}
    try:
        spec = msgspec.yaml.decode((path / "sweep.yaml").read_bytes(), type=Spec)
        planned = {trial.id: trial for trial in plan(spec, path)}
    except (OSError, msgspec.MsgspecError, ConfigError, ValueError, TypeError) as error:
        reason = "missing" if isinstance(error, OSError) else one_line(error)
        not_shown.append(NotShown(str(path / "sweep.yaml"), f"{reason}, so trials not started are not known"))
    else:
        others = {folder: difference(folder, spec) for folder in folders if folder.name not in planned}
        for folder, differing in others.items():
            if differing:
                reason = f"of another training than the sweep's now ({differing}); an out= of its own keeps them apart"
                not_shown.append(NotShown(str(folder), reason))
        folders = [folder for folder in folders if not others.get(folder)]
    names = {folder.name for folder in folders}
    if waiting := [trial for trial in planned if trial not in names]:
        not_shown.append(NotShown(str(path), f"{len(waiting)} of {len(planned)} trials have not been started"))
    place = {name: i for i, name in enumerate(planned)}
    folders.sort(key=lambda folder: place.get(folder.name, len(place)))
    cells = {(arm_label(planned_config(trial), trial.arm), trial.lr0) for trial in planned.values()}
    return _once(_read_all(folders, not_shown, planned), not_shown), cells


def _read_all(
    folders: Iterable[Path], not_shown: list[NotShown], planned: Mapping[str, Trial] | None = None
) -> list[Entry]:
    """Runs that can be read, at their place in the grid as it is now, or as they were recorded."""
    # Any byte of a file may be damaged, and each reader has its own errors; the folder is named in the report.
    damaged = (RunError, pl.exceptions.PolarsError, OSError, ValueError, TypeError, LookupError, AttributeError)

    def name(folder: Path, what: str, error: Exception) -> None:
        text = one_line(error)
        not_shown.append(NotShown(str(folder), f"{what}: {text.removeprefix(f'{folder}: ')}"))

    entries = []
    for folder in folders:
        try:
            recorded = read_trial(folder)
            entry = Entry(read_run(folder), (planned or {}).get(folder.name, recorded))
            _ = entry.depth_profile  # which reads records too
        except damaged as error:
            name(folder, "cannot be read", error)
            continue
        try:
            entry.findings = entry.run.diagnose()
        except damaged as error:  # of what its row does not need
            entry.findings = None
            name(folder, "its findings, since records cannot be read", error)
        entries.append(entry)
    return entries
