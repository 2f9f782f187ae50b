"""What went wrong in a run, in words: findings from its records alone, the root cause first.

A finding is named for what is wrong, not for where it was seen. Causes stand before their symptoms: a batch, a module
or an initial weight before the rate, the rate before the loss that left, a loss that left before a run that learned
nothing. A cause seen only after the run was lost is no cause, and stands behind.

What is expected is no finding: BatchNorm lets gradients grow towards the input at the start, norms grow while the rate
decays, necks with few positives have tiny gradients, and pose losses start with norms of 1e5. Where a threshold could
not be relative to the run itself, it lies between what healthy and what lost runs of yolo26, 11, 8 and 5 showed.

Imports neither torch nor ultralytics.

References:
    Defazio 2025, "Why gradients rapidly increase near the end of training" (growth that is benign).
    Yang et al. 2019, "A mean field theory of batch normalization" (growth towards the input at the start).
    Google 2023, "Deep learning tuning playbook" (more than half of the steps clipped).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Literal, cast, get_args

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from yolo_gradstab.guard import FIRST_STEPS, LASTING_STEPS, NO_QUALITY, Divergence, find_divergences
from yolo_gradstab.runs import RunError, Status
from yolo_gradstab.stats import MAD_TO_SIGMA, effective_lr
from yolo_gradstab.telemetry import Run

__all__ = ["KINDS", "Finding", "IncidentRecord", "Kind", "Measured", "Records", "diagnose", "records_of"]

Kind = Literal[
    "bad_images", "bad_labels", "module_fault", "bad_init", "dead_loss_component", "loss_imbalance", "exploding",
    "vanishing", "lr_too_high", "amp_overflow", "nonfinite_weights", "nonfinite_loss", "nonfinite_gradient",
    "loss_blowup", "silent_collapse", "dead_layer", "stalled", "loss_spike", "benign_jump", "amp_calibration",
    "always_clipped",
]  # fmt: skip
Severity = Literal["error", "warning", "info"]

KINDS: tuple[Kind, ...] = get_args(Kind)  # causes before their symptoms
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
SYMPTOMS = {"nonfinite_weights", "nonfinite_loss", "nonfinite_gradient", "loss_blowup", "silent_collapse"}
DATA_CAUSES = {"bad_images", "bad_labels", "module_fault"}

# The rate. Update of a stage over its weights; healthy runs lie near 1e-3, lost ones had 0.015 and more before the end.
CALM_RATIO = 3e-3  # that a rate to go back to is aimed at
HOT_RATIO = 1e-2  # median over stages: explains a run that was lost
FIERCE_RATIO = 3e-2  # median over stages: worth a warning in a run that was not
WILD_RATIO = 0.3  # of a single stage
UNEASY_RATIO = 0.06  # of a single stage, with weights that have grown
GROWN = 3.0  # times their start, of a stage's weights within `EARLY_STEPS`
OVERGROWN = 10.0
EARLY_STEPS = 100
PEAK = 0.5  # of the highest rate, from which on a step counts as one at the peak
LARGE_MOMENTUM = 0.97  # above it, the step is more than 33 times the gradient
HEAT = 5.0  # lr0 / (1 - momentum) over the host's, where no update was recorded
WARMUP_CURES = 10.0  # times the host's lr0, above which it is the rate and not its missing warm-up
LOWER_BY = (3.0, 100.0)  # least and most that a rate is advised to be lowered by

# Depth, at initialisation: logarithms of gradient norms of the backbone's stages against the head's. Healthy ones lie
# from -0.6 to 4.7 (yolov5 to yolo26, sizes n to x); without normalisation they were -13 or +10.
DEPTH = math.log(1e3)
EXPECTED_SLOPE = -0.2  # per stage of the backbone: gradients grow towards the input
EXPLODED_LOSS = 1e6  # per image, at the first step
LEAST_STAGES = 4  # of a backbone whose profile is judged

LEAST_SANE_INPUT = 1e3  # largest value in half precision that explains no overflow
SANE_INPUT = 1e6  # the same in single precision
AMPLIFIED = 1e3  # largest value out of a module over that into it
HUGE_PIXEL = 10.0  # healthy ones lie from 0 to 1

# Loss components.
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5, "pose": 12.0, "kobj": 1.0, "rle": 1.0}  # the host's defaults
GAIN_OF = {"l1": "dfl"}  # components that are scaled by an argument of another name
GAIN_OFF = 10.0  # times its default
DOMINANT = 0.98  # share of the components' sum, in more than half of the steps
LARGE_SHARE = 0.5  # the same where the gain is off its default

CALIBRATION_STEPS = 100  # in which an fp16 scaler may look for its scale
OVERFLOW_SHARE = 0.05  # of the steps after those
LEAST_OVERFLOWS = 3
DEAD_STEPS = 50  # without any gradient
MOSTLY = 0.5  # of the steps
SPIKE = 3.0  # times the median of the steps before
LARGE_SPIKE = 10.0
SPIKE_SIGMAS = 6.0  # robust, on the log-loss
HEALED = 1.5  # times the median before
JUMP = 1.5  # ratio of medians before and after
JUMP_SIGMAS = 3.0
WINDOW = 20  # steps before and after
LEAST_WINDOW = 5
STALLED_STEPS = 100  # before which nothing can be said
LONG_RUN = 1000  # steps after which mAP50 0 is an error
HARDLY_FELL = 0.9  # of the starting loss
RAISE_BY = 3.0
MOST_NAMED = 5  # tensors, images
HOST_LR0, HOST_MOMENTUM, HOST_WARMUP = 0.01, 0.937, 3.0  # the host's defaults

Array = NDArray[np.float64]


class Measured(msgspec.Struct, frozen=True):
    """A piece of evidence; the threshold is what it was held against, where there is one."""

    value: float | int | str | None
    threshold: float | int | str | None = None


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, or worth knowing.

    Attributes:
        kind: What it is.
        severity: ``error``: the run is lost or wrong by it; ``warning``: look at it; ``info``: as expected.
        message: The same in a sentence.
        step: Optimizer step at which it was first seen.
        where: Layer, tensors, loss component or image paths.
        evidence: Names to numbers with their thresholds.
        advice: One sentence naming a key that exists, as ``key=value``.
    """

    kind: Kind
    severity: Severity
    message: str
    step: int | None = None
    where: str | None = None
    evidence: dict[str, Measured] = msgspec.field(default_factory=dict)
    advice: str

    def text(self) -> str:
        """As it is printed: a heading, where, the evidence, the advice."""
        at = "" if self.step is None else f" at step {self.step}"
        lines = [f"{self.severity}: {self.kind}{at}: {self.message}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        for name, measured in self.evidence.items():
            against = "" if measured.threshold is None else f" (threshold {_shown(measured.threshold)})"
            lines.append(f"  {name}: {_shown(measured.value)}{against}")
        return "\n".join([*lines, f"  advice: {self.advice}"])


class ImageRecord(msgspec.Struct, kw_only=True):
    """An image of a captured batch, as far as it is needed here."""

    path: str = "?"
    nonfinite: int = 0
    min: float | None = None
    max: float | None = None
    problems: list[str] = []
    bad_labels: bool = False
    bad_pixels: bool = False


class FirstBadRecord(msgspec.Struct, kw_only=True):
    """Where a captured batch first went bad when it was rerun."""

    where: str
    module: str | None = None
    type: str | None = None
    what: str = "nonfinite"
    input_max: float | None = None
    output_max: float | None = None
    component: str | None = None
    note: str = ""


class IncidentRecord(msgspec.Struct, kw_only=True):
    """What is read of `incidents/<step>/incident.json`; fields that are not needed here are left out."""

    step: int
    reason: str = ""
    loss: float | None = None
    losses: dict[str, float | None] = {}
    nonfinite_weights: list[str] = []
    images: list[ImageRecord] = []
    first_bad: FirstBadRecord | None = None


class Records(msgspec.Struct, kw_only=True):
    """All that a diagnosis is made from.

    Attributes:
        steps: A row per optimizer step, as in `telemetry`.
        layers: A row per recorded step and stage.
        events: Lines of `events.jsonl`.
        incidents: Captured batches.
        args: The host's arguments.
        config: Ours, as it was used.
        status: How the run stands or ended.
        map50: At the last epoch; for pose, of the key points.
    """

    steps: pl.DataFrame
    layers: pl.DataFrame
    events: list[dict[str, Any]] = []
    incidents: list[IncidentRecord] = []
    args: dict[str, Any] = {}
    config: dict[str, Any] = {}
    status: Status = msgspec.field(default_factory=Status)
    map50: float | None = None


def records_of(run: Run) -> Records:
    """The records of a run folder.

    Raises:
        RunError: One of its files is damaged; the message names it.
    """
    incidents = []
    for path in sorted(run.folder.gradstab.glob("incidents/*/incident.json")):
        try:
            incidents.append(msgspec.json.decode(path.read_bytes(), type=IncidentRecord))
        except (OSError, msgspec.MsgspecError) as error:
            raise RunError(f"{path}: {error}") from None
    return Records(
        steps=run.steps,
        layers=run.layers,
        events=run.events,
        incidents=sorted(incidents, key=lambda incident: incident.step),
        args=run.args,
        config=run.config,
        status=run.status,
        map50=_final_map50(run),
    )


def _final_map50(run: Run) -> float | None:
    """Of the last epoch rather than of the best, which the host validates at the end and which hides a collapse."""
    for name in ("metrics/mAP50(P)", "metrics/mAP50(B)"):
        if name in run.results.columns and run.results.height:
            return _finite(run.results[name].cast(pl.Float64, strict=False)[-1])
        if name in run.status.metrics:
            return _finite(run.status.metrics[name])
    return None


def diagnose(records: Records) -> list[Finding]:
    """What went wrong in a run, most important first; the first error is the root cause.

    Args:
        records: As `records_of` reads them. They are only read: the same records always give the same findings.
    """
    case = _Case(records)
    found = [finding for rule in _RULES for finding in rule(case)]
    return sorted(found, key=lambda finding: _place(finding, case.trouble_step))


def _place(finding: Finding, trouble_step: float) -> tuple[int, int, int, int, int]:
    step = -1 if finding.step is None else finding.step
    is_symptom = finding.kind in SYMPTOMS
    # Once a run is lost anything can be found in it: what was seen only later did not cause it.
    is_late = not is_symptom and finding.kind in DATA_CAUSES and step > trouble_step
    group = 0 if finding.kind in DATA_CAUSES else KINDS.index("nonfinite_weights" if is_symptom else finding.kind)
    return SEVERITIES.index(finding.severity), is_late, group, step, KINDS.index(finding.kind)


class _Case:
    """The facts that more than one rule asks for, each worked out once."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.args, self.status, self.layers = records.args, records.status, records.layers
        self.steps = records.steps.sort("step", maintain_order=True)
        self.step = self.column("step")
        self.loss = self.column("loss")
        self.norm = self.column("total_norm")
        self.lr = self.column("lr")
        self.skipped = self.column("skipped") > 0

    def column(self, name: str) -> Array:
        """A column of the steps; NaN where it has none."""
        if name not in self.steps.columns:
            return np.full(len(self.steps), math.nan)
        return self.steps[name].cast(pl.Float64).fill_null(math.nan).to_numpy()

    @cached_property
    def components(self) -> dict[str, Array]:
        names = [name for name in self.steps.columns if name.startswith("loss_")]
        return {name.removeprefix("loss_"): self.column(name) for name in names}

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in self.records.events if event.get("event") in names]

    def number(self, key: str, default: float) -> float:
        """A number among the host's arguments."""
        value = self.args.get(key, default)
        return float(value) if isinstance(value, (int, float)) else default

    # How it went -----------------------------------------------------------------------------------------------------

    @cached_property
    def ended(self) -> bool:
        return self.status.outcome not in {"running", "interrupted"}

    @cached_property
    def map50(self) -> float | None:
        return self.records.map50 if self.ended else None

    @cached_property
    def divergences(self) -> list[Divergence]:
        """What the trainer saw, and what the records show, each kind once, in order."""
        found = [_divergence(event) for event in self.events("divergence", "rollback")]
        found += find_divergences(self.steps, self.layers, map50=self.map50)
        reason = self.status.reason or ""
        if self.status.divergence or (self.status.outcome == "failed" and "NaN" in reason):  # the host's own words
            kind = self.status.divergence or "nonfinite"
            if kind not in {divergence.kind for divergence in found}:
                found.append(Divergence(kind, max(0, self.status.step - 1), reason))
        first: dict[str, Divergence] = {}
        for divergence in sorted(found, key=lambda divergence: divergence.step):
            first.setdefault(divergence.kind, divergence)
        return list(first.values())

    @cached_property
    def recovered(self) -> bool:
        """Whether it ended well, whatever it went through."""
        good = self.map50 is not None and self.map50 >= NO_QUALITY
        return good and self.status.outcome == "completed" and self.status.divergence is None

    @cached_property
    def bad_steps(self) -> list[dict[str, Any]]:
        """Events of gradients that were not finite, without those of an fp16 scaler that looks for its scale."""
        return [event for event in self.events("skip", "nonfinite") if event.get("reason") != "scaler_overflow"]

    @cached_property
    def trouble_step(self) -> float:
        """Step at which it first went wrong; infinite where it did not."""
        steps = [divergence.step for divergence in self.divergences]
        return min([*steps, *(_step(event) for event in self.bad_steps)], default=math.inf)

    @cached_property
    def troubled(self) -> bool:
        return math.isfinite(self.trouble_step)

    @cached_property
    def severity(self) -> Severity:
        """Of what explains or shows the trouble."""
        return "error" if self.troubled and not self.recovered else "warning"

    @cached_property
    def start_loss(self) -> float | None:
        known = self.loss[np.isfinite(self.loss) & ~self.skipped][:FIRST_STEPS]
        return float(np.median(known)) if len(known) else None

    # The rate --------------------------------------------------------------------------------------------------------

    @cached_property
    def updates(self) -> pl.DataFrame:
        """Per recorded step: median and largest update ratio of the stages, while it was still in order."""
        moved = self.layers.filter(
            pl.col("step") <= self.trouble_step, pl.col("weight_norm") > 0, pl.col("update_ratio") > 0
        )
        # The rate between two records, since steps may be recorded more rarely than layers.
        rates = self.steps.select("step", "lr").sort("step")
        table = moved.group_by("step").agg(
            pl.col("update_ratio").median().alias("middle"), pl.col("update_ratio").max().alias("largest")
        )
        return table.sort("step").join_asof(rates, on="step")

    @cached_property
    def peak_updates(self) -> pl.DataFrame:
        """Those of them at which the rate was at its height; of the first step only where there is no other.

        At the first step a warm-up moves nothing but biases, and those from zero.
        """
        updates = self.updates
        peak = updates.filter(pl.col("step") > 0, pl.col("lr") >= PEAK * pl.col("lr").max())
        return peak if len(peak) else updates

    @cached_property
    def growth(self) -> float | None:
        """The most that a stage's weights had grown when it went wrong, or within the first steps."""
        until = min(self.trouble_step, EARLY_STEPS)
        known = self.layers.filter(pl.col("step") <= until, pl.col("weight_norm") > 0).sort("step")
        start = pl.col("weight_norm").first().over("layer")
        return _finite(known.select((pl.col("weight_norm") / start).max()).item())

    @cached_property
    def head(self) -> int | None:
        """Index of the last stage."""
        return max((_stage(name) for name in self.layers["layer"].unique()), default=None)


# Batches and modules -------------------------------------------------------------------------------------------------


def _bad_images(case: _Case) -> Iterator[Finding]:
    """Pixels that are not numbers, or far from where pixels lie."""
    captured = [(incident, _with(incident, "bad_pixels")) for incident in case.records.incidents]
    captured = [(incident, images) for incident, images in captured if images]
    if not captured:
        return
    incident, images = captured[0]
    nonfinite = sum(image.nonfinite for image in images)
    extremes = [abs(value) for image in images for value in (image.min, image.max) if value is not None]
    evidence = {"pixels that are not finite": Measured(nonfinite, 0)}
    if extremes:
        evidence["largest pixel"] = Measured(max(extremes), HUGE_PIXEL)
    evidence["batches with such images"] = Measured(len(captured))
    yield Finding(
        kind="bad_images",
        severity="error" if nonfinite else _severity_of(case, incident),
        message="a captured batch holds images whose pixels are "
        + ("not finite" if nonfinite else "far from the range of 0 to 1"),
        step=incident.step,
        where=_paths(images),
        evidence=evidence,
        advice=f"Repair these images, or take them out of the set that {_data(case)} names.",
    )


def _bad_labels(case: _Case) -> Iterator[Finding]:
    """Labels that explain the trouble: they enter at the loss, so not what went bad in the forward pass."""
    captured = [(incident, _with(incident, "bad_labels")) for incident in case.records.incidents]
    captured = [(incident, images) for incident, images in captured if images and not _explained(case, incident)]
    if not captured:
        return
    incident, images = captured[0]
    problems = [f"{image.path}: {problem}" for image in images for problem in image.problems]
    evidence = {f"problem {i}": Measured(problem) for i, problem in enumerate(problems[:MOST_NAMED], 1)}
    evidence["batches with such labels"] = Measured(len(captured))
    yield Finding(
        kind="bad_labels",
        severity=_severity_of(case, incident),
        message="a captured batch holds labels that cannot be right",
        step=incident.step,
        where=_paths(images),
        evidence=evidence,
        advice=f"Repair these labels in the set that {_data(case)} names; `yolo-gradstab data check` lists them all.",
    )


def _explained(case: _Case, incident: IncidentRecord) -> bool:
    """Whether something else than its labels explains an incident."""
    if incident.reason in {"blowup", "collapse"}:
        return _is_hot(case)
    return incident.first_bad is not None and incident.first_bad.where in {"input", "forward"}


def _module_fault(case: _Case) -> Iterator[Finding]:
    """A module that turns sound values into ones that are not, with sound weights."""
    for incident in case.records.incidents:
        first = incident.first_bad
        if first is None or first.where not in {"forward", "backward"} or not (first.module or first.type):
            continue
        if _with(incident, "bad_pixels") or incident.nonfinite_weights:
            continue
        if first.where == "backward" and _with(incident, "bad_labels"):
            continue  # from the loss, which the labels reach first
        sane = LEAST_SANE_INPUT if incident.reason == "scaler_overflow" else SANE_INPUT
        ratio = _ratio(first.output_max, first.input_max)
        if first.what == "nonfinite":
            holds = first.input_max is None or first.input_max < sane
        else:  # grown weights amplify too, as does a layer that was wrong from the start
            holds = ratio is not None and ratio > AMPLIFIED and not _is_hot(case) and not case.events("init")
        if not holds:
            continue
        did = "sound values into NaN or inf" if first.what == "nonfinite" else "values into far larger ones"
        pass_ = "" if first.where == "forward" else " in the backward pass"
        evidence = {"largest value in": Measured(first.input_max, sane)}
        if first.what == "amplified":
            evidence["largest value out over that in"] = Measured(ratio, AMPLIFIED)
        yield Finding(
            kind="module_fault",
            severity="error" if first.what == "nonfinite" else case.severity,
            message=f"{_module_name(first)} turns {did}{pass_}",
            step=incident.step,
            where=first.module or first.type,
            evidence=evidence | ({"note": Measured(first.note)} if first.note else {}),
            advice=f"Repair this module in the model that {_model(case)} names.",
        )
        return


def _module_name(first: FirstBadRecord) -> str:
    if first.module is None:
        return f"the operation {first.type} between modules"
    return f"the module {first.module} ({first.type or 'of unknown type'})"


def _bad_init(case: _Case) -> Iterator[Finding]:
    """Weights whose scale at the start is off by orders of magnitude."""
    for event in case.events("init")[:1]:
        tensors = [tensor for tensor in event.get("tensors", []) if _finite(tensor.get("scale")) is not None]
        if not tensors:
            return
        tensors.sort(key=lambda tensor: -abs(math.log(max(tensor["scale"], 1e-38))))
        yield Finding(
            kind="bad_init",
            severity=case.severity,
            message=f"{_count(len(tensors), 'weight')} start far off the usual scale",
            step=_step(event),
            where=_names([tensor["name"] for tensor in tensors]),
            evidence={
                tensor["name"]: Measured(tensor["scale"], "0.01 to 100 times the usual")
                for tensor in tensors[:MOST_NAMED]
            },
            advice=f"Initialise these weights anew in the model {_model(case)}, or start from pretrained=True.",
        )


# Depth ---------------------------------------------------------------------------------------------------------------


def _depth(case: _Case) -> Iterator[Finding]:
    """Gradients that explode or vanish over depth, at the start: later profiles of healthy runs differ too much."""
    first = case.layers.filter(pl.col("step") == 0)
    trained = str(case.args.get("model") or "").endswith(".pt") or isinstance(case.args.get("pretrained"), str)
    if first.is_empty() or trained or case.args.get("resume"):
        return
    norms = {_stage(name): norm for name, norm in first.select("layer", "grad_norm").iter_rows()}
    backbone = _backbone(norms)
    known = [i for i in backbone if norms[i] is not None and math.isfinite(norms[i]) and norms[i] > 0]
    head = norms.get(case.head) if case.head is not None else None
    start = float(case.loss[0]) if len(case.loss) else math.nan
    evidence: dict[str, Measured] = {}
    logs: list[float] = []
    if len(known) >= LEAST_STAGES and head and math.isfinite(head) and case.head not in known:
        logs = [math.log(norms[i] / head) for i in known]
        evidence["slope of ln gradient per stage"] = Measured(_slope(known, logs), EXPECTED_SLOPE)
        largest, middle = math.exp(max(logs)), math.exp(float(np.median(logs)))
        evidence["gradient of a backbone stage over the head's, largest"] = Measured(largest, math.exp(DEPTH))
        evidence["gradient of a backbone stage over the head's, median"] = Measured(middle, math.exp(-DEPTH))
    evidence["loss at the first step"] = Measured(start, EXPLODED_LOSS)
    where = f"model.{known[0]} to model.{known[-1]}" if known else None
    if (logs and max(logs) > DEPTH) or start > EXPLODED_LOSS:
        kind: Kind = "exploding"
        where = f"model.{known[int(np.argmax(logs))]}" if logs and max(logs) > DEPTH else where
        message = "over the depth of the untrained network values or gradients grow far more than usual"
    elif logs and float(np.median(logs)) < -DEPTH:
        kind, message = "vanishing", "gradients fade in the untrained network before they reach its backbone"
    else:
        return
    yield Finding(
        kind=kind,
        severity=case.severity,
        message=message,
        step=0,
        where=where,
        evidence=evidence,
        advice=f"Give the layers normalisation and an activation that passes gradients on in the model {_model(case)}.",
    )


def _backbone(stages: Iterable[int]) -> list[int]:
    """Stages with parameters from the first up to the first without, which is where the neck begins."""
    consecutive = []
    for i, stage in enumerate(sorted(stages)):
        if i != stage:
            break
        consecutive.append(stage)
    return consecutive


def _slope(x: list[int], y: list[float]) -> float:
    """Median of the slopes between all pairs (Theil 1950, Sen 1968)."""
    pairs = ((i, j) for j in range(len(x)) for i in range(j))
    return float(np.median([(y[j] - y[i]) / (x[j] - x[i]) for i, j in pairs]))


# The rate ------------------------------------------------------------------------------------------------------------


def _is_hot(case: _Case) -> bool:
    """Whether updates before the trouble were so large that the rate explains it."""
    peak = case.peak_updates
    if peak.is_empty():
        return _unrecorded_heat(case) is not None
    return _top(peak, "middle") > HOT_RATIO or _top(peak, "largest") > WILD_RATIO


def _unrecorded_heat(case: _Case) -> float | None:
    """lr0 / (1 - momentum) over the host's, for SGD where no update was recorded in time."""
    if not str(case.args.get("optimizer", "")).upper().endswith("SGD"):
        return None
    heat = case.number("lr0", HOST_LR0) / max(1e-6, 1 - case.number("momentum", HOST_MOMENTUM))
    heat *= (1 - HOST_MOMENTUM) / HOST_LR0
    return heat if heat > HEAT else None


def _lr_too_high(case: _Case) -> Iterator[Finding]:
    """Steps that move weights too far: of a run that was lost, or that was near it."""
    severity = _rate_severity(case)
    if severity is None:
        return
    peak = case.peak_updates
    evidence = {}
    step = None
    if len(peak):
        over = peak.filter((pl.col("middle") > HOT_RATIO) | (pl.col("largest") > UNEASY_RATIO))
        step = int(over["step"][0]) if len(over) else int(peak["step"][0])
        limit = HOT_RATIO if case.troubled else FIERCE_RATIO
        evidence["update over weight of the median stage, highest"] = Measured(_top(peak, "middle"), limit)
        evidence["update over weight of one stage, highest"] = Measured(_top(peak, "largest"), WILD_RATIO)
    else:
        evidence["lr0 / (1 - momentum) over the host's"] = Measured(_unrecorded_heat(case), HEAT)
    if case.growth is not None:
        evidence["weights of a stage over their start"] = Measured(case.growth, GROWN)
    evidence |= _timing(case)
    warnings = case.events("warning")
    if warnings:
        said = [f"{event.get('kind')} at step {_step(event)}" for event in warnings[:MOST_NAMED]]
        evidence["early warnings"] = Measured(", ".join(said))
    words = "each step moves the weights too far for them to settle"
    if case.troubled and case.recovered:
        words += "; the run was lost to it and came back"
    yield Finding(
        kind="lr_too_high",
        severity=severity,
        message=words,
        step=step,
        where=_fiercest_stage(case),
        evidence=evidence,
        advice=_rate_advice(case),
    )


def _rate_severity(case: _Case) -> Severity | None:
    if case.troubled:
        return case.severity if _is_hot(case) else None
    if case.peak_updates.is_empty():
        return None
    middle = _median(case.peak_updates, "middle")
    adaptive = "ADAM" in str(case.args.get("optimizer", "")).upper()  # its weights grow early in good runs too
    grown = 0.0 if adaptive or case.growth is None else case.growth
    uneasy = _top(case.peak_updates, "largest") > UNEASY_RATIO
    if middle > FIERCE_RATIO or (grown > OVERGROWN and uneasy):
        return "warning"
    # A large momentum shows late: its steps go on growing for 1 / (1 - momentum) steps.
    heavy = _momentum(case) > LARGE_MOMENTUM and _unrecorded_heat(case) is not None
    return "info" if (grown > GROWN and uneasy) or heavy or case.events("warning") else None


def _timing(case: _Case) -> dict[str, Measured]:
    """When it went wrong, beside when the rate was highest, and what the rate amounted to after clipping."""
    if not len(case.lr) or not np.isfinite(case.lr).any():
        return {}
    until = case.step <= case.trouble_step
    lr0 = case.number("lr0", HOST_LR0)
    evidence = {"lr0": Measured(lr0), "lr0 / (1 - momentum)": Measured(lr0 / max(1e-6, 1 - _momentum(case)))}
    effective = effective_lr(case.lr[until], case.column("clip_coef")[until], lr0=lr0)
    if effective is not None:
        evidence["effective lr after clipping"] = Measured(effective)
    peak = int(case.step[int(np.nanargmax(case.lr))])
    evidence["step of the highest rate"] = Measured(peak)
    if case.troubled:
        evidence["step at which it went wrong"] = Measured(int(case.trouble_step))
    return evidence


def _rate_advice(case: _Case) -> str:
    lr0, momentum = case.number("lr0", HOST_LR0), _momentum(case)
    if momentum > LARGE_MOMENTUM:
        return f"Set momentum={HOST_MOMENTUM}: with {momentum:g} a step is {1 / max(1e-6, 1 - momentum):.0f} gradients."
    early = case.trouble_step <= EARLY_STEPS
    if case.troubled and early and case.number("warmup_epochs", HOST_WARMUP) <= 0 and lr0 <= WARMUP_CURES * HOST_LR0:
        return f"Set warmup_epochs={HOST_WARMUP}: without a warm-up the first steps are the largest."
    factors = [factor for event in case.events("rollback") if (factor := _finite(event.get("lr_factor")))]
    if factors and case.recovered:
        return f"Set lr0={_rounded(lr0 * factors[-1])}, the rate at which the run went on after its last rollback."
    least, most = LOWER_BY
    wanted = 1 / least
    if len(case.peak_updates):
        wanted = CALM_RATIO / max(_top(case.peak_updates, "middle"), 1e-12)
    lower = _rounded(lr0 * min(1 / least, max(1 / most, wanted)))
    config = case.records.config
    other = "" if config.get("update_clip") else ", or bound the update with update_clip=0.03"
    if (config.get("clip") or {}).get("policy") == "none":
        other = ", or clip the gradient with clip=norm"
    return f"Lower the rate of {lr0:g} to lr0={lower}{other}."


def _fiercest_stage(case: _Case) -> str | None:
    """The stage whose weights moved furthest in one of those steps."""
    if case.peak_updates.is_empty():
        return None
    steps = case.peak_updates["step"].implode()
    moved = case.layers.filter(pl.col("step").is_in(steps), pl.col("weight_norm") > 0).sort("update_ratio")
    return str(moved["layer"][-1]) if len(moved) else None


# What is not finite --------------------------------------------------------------------------------------------------


def _nonfinite_loss(case: _Case) -> Iterator[Finding]:
    """The first step whose loss is not finite, and the component."""
    bad = case.step[~np.isfinite(case.loss)] if len(case.loss) else np.empty(0)
    captured = [incident for incident in case.records.incidents if _lost_component(incident)]
    steps = [int(bad[0])] if len(bad) else []
    if not steps and not captured and not _bad_gradient_steps(case):  # the host may have seen more than was recorded
        steps = [divergence.step for divergence in case.divergences if divergence.kind == "nonfinite"]
    if not steps and not captured:
        return
    step = min([*steps, *(incident.step for incident in captured)])
    components = [name for name, values in case.components.items() if not np.isfinite(values[case.step == step]).all()]
    components += [name for incident in captured[:1] if (name := _lost_component(incident)) and name not in components]
    yield Finding(
        kind="nonfinite_loss",
        severity=case.severity,
        message="the loss is not finite" + (f", by its component {components[0]}" if components else ""),
        step=step,
        where=", ".join(components) or None,
        evidence={"steps whose loss is not finite": Measured(max(len(bad), len(captured)), 0)}
        | _batch_of(case, step)
        | ({"the run says": Measured(case.status.reason)} if case.status.reason else {}),
        advice=f"Keep guard.nonfinite=skip, and look at the labels of that batch in the set that {_data(case)} names.",
    )


def _lost_component(incident: IncidentRecord) -> str | None:
    """The component of a captured loss that is not finite, if one is."""
    if incident.first_bad is not None and incident.first_bad.where == "loss" and incident.first_bad.what == "nonfinite":
        named = incident.first_bad.component
        if named:
            return named
    return next((name for name, value in incident.losses.items() if _finite(value) is None), None)


def _nonfinite_gradient(case: _Case) -> Iterator[Finding]:
    """Gradients that are not finite, or too large to clip; the tensor nearest the origin of it."""
    steps = _bad_gradient_steps(case)
    if not steps:
        return
    first = next(iter(case.bad_steps), {})
    tensors = first.get("tensors") or []
    step = steps[0]
    applied = bool(case.events("nonfinite"))
    overflow = first.get("reason") == "gradient_overflow"
    evidence = {"steps": Measured(len(steps), 0)}
    if first.get("num_tensors"):
        evidence["tensors of the first"] = Measured(first["num_tensors"], 0)
    if mended := case.events("buffers_restored"):
        evidence["buffers taken from the average, first"] = Measured(mended[0].get("num_buffers"))
    did = "was applied" if applied else "was not applied"
    replay = f" with `yolo-gradstab replay` on incidents/{step}" if case.records.incidents else " in that batch"
    found = "is too large for single precision" if overflow else "is not finite"
    yield Finding(
        kind="nonfinite_gradient",
        severity=case.severity,
        message=f"the gradient {found}; the step {did}",
        step=step,
        where=str(tensors[-1]) if tensors else None,
        evidence=evidence | _batch_of(case, step),
        advice="Set guard.nonfinite=skip, which keeps such a step from the weights."
        if applied
        else f"Keep guard.nonfinite=skip, and look at what made it{replay}.",
    )


def _bad_gradient_steps(case: _Case) -> list[int]:
    """Steps whose gradient was not finite, by events and records; not those of a scaler that looks for its scale."""
    scaled = [_step(event) for event in case.events("skip") if event.get("reason") == "scaler_overflow"]
    rows = case.steps.filter(pl.col("nonfinite") > 0, pl.col("scale") == 1)["step"].to_list()
    return sorted({*(_step(event) for event in case.bad_steps), *(set(rows) - set(scaled))})


def _nonfinite_weights(case: _Case) -> Iterator[Finding]:
    """Weights that hold NaN or inf."""
    captured = next((incident for incident in case.records.incidents if incident.nonfinite_weights), None)
    rows = case.layers.filter(~pl.col("weight_norm").is_finite() | pl.col("weight_norm").is_null()).sort("step")
    if captured is None and rows.is_empty():
        return
    steps = ([captured.step] if captured else []) + ([int(rows["step"][0])] if len(rows) else [])
    names = captured.nonfinite_weights if captured else rows.filter(pl.col("step") == steps[0])["layer"].to_list()
    yield Finding(
        kind="nonfinite_weights",
        severity=case.severity,
        message="weights are not finite, so that every later step is lost",
        step=min(steps),
        where=_names(names),
        evidence={"tensors or stages": Measured(len(names), 0)},
        advice="Set guard.nonfinite=skip, which keeps them out of the weights, and start from an earlier checkpoint.",
    )


def _batch_of(case: _Case, step: int) -> dict[str, Measured]:
    at = case.steps.filter(pl.col("step") == step)
    return {"batch": Measured(int(at["batch"][0]))} if "batch" in at.columns and len(at) else {}


# What was lost -------------------------------------------------------------------------------------------------------


def _lost(case: _Case) -> Iterator[Finding]:
    """Loss that blew up, and silent collapse."""
    kinds: dict[str, tuple[Kind, str]] = {
        "blowup": ("loss_blowup", "the loss left its basin"),
        "collapse": ("silent_collapse", "the run died without a NaN: it trains on, and predicts nothing"),
    }
    rollbacks = case.events("rollback")
    for divergence in case.divergences:
        if divergence.kind not in kinds:
            continue
        kind, words = kinds[divergence.kind]
        if case.recovered:
            saved = "was saved by a rollback" if rollbacks else "came back by itself"
            words = f"the run was lost at step {divergence.step} and {saved}"
        yield Finding(
            kind=kind,
            severity=case.severity,
            message=f"{words}: {divergence.reason}" if divergence.reason else words,
            step=divergence.step,
            evidence=_around(case, divergence.step),
            advice=_rate_advice(case),
        )


def _around(case: _Case, step: int) -> dict[str, Measured]:
    """Loss and norm there, against the start and the steps before."""
    here, before = case.step == step, (case.step < step) & (case.step >= step - WINDOW) & ~case.skipped
    evidence = {}
    if here.any():
        evidence["loss"] = Measured(_finite(case.loss[here][0]), case.start_loss)
        norms = case.norm[before]
        if np.isfinite(norms).any():
            highest = max(float(np.nanmax(norms)), _finite(case.norm[here][0]) or 0.0)
            usual = float(np.nanmedian(norms))
            evidence[f"gradient norm, largest in {WINDOW} steps"] = Measured(highest, usual)
    if case.map50 is not None:
        evidence["mAP50 at the end"] = Measured(case.map50, NO_QUALITY)
    return evidence


def _stalled(case: _Case) -> Iterator[Finding]:
    """No divergence, and nothing learned."""
    known = np.isfinite(case.loss) & ~case.skipped
    if case.status.outcome != "completed" or case.map50 is None or case.map50 >= NO_QUALITY or case.troubled:
        return
    if known.sum() < STALLED_STEPS or case.start_loss is None:
        return
    end = float(np.median(case.loss[known][-FIRST_STEPS:]))
    fell = end / case.start_loss if case.start_loss > 0 else 1.0
    severity: Severity = "warning" if fell > HARDLY_FELL else "info"
    lr0 = case.number("lr0", HOST_LR0)
    if known.sum() >= LONG_RUN:
        severity = "error"
    evidence = {
        "mAP50 at the end": Measured(case.map50, NO_QUALITY),
        "loss at the end over its start": Measured(fell, HARDLY_FELL),
        "steps": Measured(int(known.sum()), STALLED_STEPS),
    }
    middle = _median(case.peak_updates, "middle") if len(case.peak_updates) else 0.0
    if middle:
        evidence["update over weight of the median stage"] = Measured(middle, HOT_RATIO)
    effective = effective_lr(case.lr, case.column("clip_coef"), lr0=lr0)
    if effective is not None:
        evidence["effective lr after clipping"] = Measured(effective)
    yield Finding(
        kind="stalled",
        severity=severity,
        message="the run went well and learned next to nothing",
        step=int(case.step[known][-1]),
        evidence=evidence,
        advice=_rate_advice(case)
        if middle > HOT_RATIO
        else f"Train for longer than epochs={case.args.get('epochs', 1)}, or raise the rate to "
        f"lr0={_rounded(lr0 * RAISE_BY)}.",
    )


# Layers and loss components ------------------------------------------------------------------------------------------


def _dead_layer(case: _Case) -> Iterator[Finding]:
    """Trainable, and no gradient for long; where that is expected it is an info."""
    dead = [(_step(event), str(name)) for event in case.events("dead") for name in event.get("tensors", [])]
    spans = {_step(event): int(event.get("steps", 0)) for event in case.events("dead")}
    frozen = _frozen(case.args.get("freeze"))
    named = {_stage(name) for _, name in dead}
    dead += [(step, stage) for step, stage in _silent_stages(case) if _stage(stage) not in named]
    dead = [(step, name) for step, name in dead if ".dfl." not in name and _stage(name) not in frozen]
    # Once nothing is matched any more, nothing has a gradient.
    unexpected = [
        (step, name)
        for step, name in dead
        if not _may_lack_positives(case, name) and step - spans.get(step, DEAD_STEPS) < case.trouble_step
    ]
    shown = unexpected or dead
    if not shown:
        return
    names = list(dict.fromkeys(name for _, name in shown))
    stages = sorted({_stage(name) for name in names})
    yield Finding(
        kind="dead_layer",
        severity="warning" if unexpected else "info",
        message=f"{_count(len(names), 'tensor or stage', 'tensors or stages')} had no gradient at all for long"
        + ("" if unexpected else ", as is expected where nothing is matched"),
        step=min(step for step, _ in shown),
        where=_names(names),
        evidence={"steps without any gradient": Measured(max(spans.values(), default=DEAD_STEPS), DEAD_STEPS)},
        advice=f"Connect them to the loss in the model {_model(case)}, or do not train them, with freeze={stages}.",
    )


def _silent_stages(case: _Case) -> list[tuple[int, str]]:
    """Stages whose gradient was 0 at every look, over more than `DEAD_STEPS`."""
    table = case.layers.group_by("layer").agg(
        pl.col("grad_norm").max().alias("most"),
        pl.col("weight_norm").max(),
        pl.col("step").max().alias("last"),
        (pl.col("step").max() - pl.col("step").min()).alias("span"),
    )
    silent = table.filter(pl.col("most") == 0, pl.col("weight_norm") > 0, pl.col("span") > DEAD_STEPS)
    return [(int(step), str(layer)) for step, layer in silent.select("last", "layer").sort("layer").iter_rows()]


def _frozen(freeze: Any) -> set[int]:
    """Stages that the host's `freeze` names: the first so many, or a list of them."""
    if isinstance(freeze, int):
        return set(range(freeze))
    return {stage for stage in freeze if isinstance(stage, int)} if isinstance(freeze, list) else set()


def _may_lack_positives(case: _Case, name: str) -> bool:
    """Branches of the head that only matched anchors reach; its classes have a gradient from every anchor."""
    head = case.head if case.head is not None else _stage(name)
    return _stage(name) == head and name.count(".") > 1 and "cv3" not in name


def _loss_components(case: _Case) -> Iterator[Finding]:
    """A component that carries the loss, or that never moves."""
    before = (case.step < case.trouble_step) & ~case.skipped
    parts = {name: values[before] for name, values in case.components.items()}
    if len(parts) < 2 or not before.any():
        return
    table = np.abs(np.stack(list(parts.values())))
    total = table.sum(axis=0)
    moved = np.isfinite(total) & (total > 0)
    if moved.sum() < FIRST_STEPS:
        return
    shares = table[:, moved] / total[moved]
    for name, values, share in zip(parts, table, shares, strict=True):
        gain, ratio = _gain(case, name)
        if not values[moved].any():
            yield Finding(
                kind="dead_loss_component",
                severity=case.severity if ratio == 0 else "warning",
                message=f"the loss component {name} was exactly 0 at every step while others were not",
                step=int(case.step[before][0]),
                where=name,
                evidence={"largest value": Measured(0.0, 0.0), "steps": Measured(int(moved.sum()), FIRST_STEPS)}
                | ({} if gain is None else {f"gain {gain}": Measured(ratio * GAINS[gain], GAINS[gain])}),
                advice=f"Set {gain}={GAINS[gain]}, the default, so that it is trained."
                if ratio == 0 and gain
                else f"Check that the labels of the set {_data(case)} have what this component is computed from.",
            )
        off = ratio is not None and ratio >= GAIN_OFF
        limit = LARGE_SHARE if off else DOMINANT
        if (share > limit).mean() > MOSTLY:
            yield Finding(
                kind="loss_imbalance",
                severity=case.severity if off else "warning",
                message=f"the loss component {name} carries nearly all of the loss",
                step=int(case.step[before][0]),
                where=name,
                evidence={f"share of {name}, median": Measured(float(np.median(share)), limit)}
                | ({} if gain is None else {f"gain {gain}": Measured(ratio * GAINS[gain], GAINS[gain])}),
                advice=f"Set {gain}={GAINS[gain]}, the default."
                if off and gain
                else f"Lower the gain {gain}={_rounded(ratio * GAINS[gain] / RAISE_BY)} of that component."
                if gain
                else f"Check the labels of the set {_data(case)}.",
            )


def _gain(case: _Case, component: str) -> tuple[str | None, float]:
    """The host's argument that scales a component, and what it is over its default."""
    name = GAIN_OF.get(component, component)
    if name not in GAINS:
        return None, 1.0
    return name, case.number(name, GAINS[name]) / GAINS[name]


# Precision -----------------------------------------------------------------------------------------------------------


def _amp(case: _Case) -> Iterator[Finding]:
    """An fp16 scaler that looks for its scale at the start, or that never finds it."""
    skips = sorted(_step(event) for event in case.events("skip") if event.get("reason") == "scaler_overflow")
    if not skips:
        return
    late = [step for step in skips if step >= CALIBRATION_STEPS]
    num_late = max(0, int(case.step[-1]) + 1 - CALIBRATION_STEPS) if len(case.step) else 0
    share = len(late) / num_late if num_late else 0.0
    scale = case.column("scale")
    lowest = float(np.nanmin(scale)) if np.isfinite(scale).any() else math.nan
    often = share > OVERFLOW_SHARE and len(late) >= LEAST_OVERFLOWS
    overflows = often or lowest < 1 or _longest_run(skips) >= LASTING_STEPS
    evidence = {
        "steps not applied": Measured(len(skips)),
        f"share of steps after the first {CALIBRATION_STEPS}": Measured(share, OVERFLOW_SHARE),
        "most in a row": Measured(_longest_run(skips), LASTING_STEPS),
        "lowest scale": Measured(_finite(lowest), 1),
    }
    yield Finding(
        kind="amp_overflow" if overflows else "amp_calibration",
        severity=("warning" if case.recovered else "error") if overflows else "info",
        message="gradients overflow half precision again and again, whatever the scale"
        if overflows
        else "half precision found its gradient scale by leaving out a few steps, as it always does",
        step=(late or skips)[0] if often else skips[0],
        evidence=evidence,
        advice="Set amp=bf16, which has the range of single precision, or amp=False."
        if overflows
        else "There is nothing to do; amp=bf16 needs no such scale.",
    )


def _longest_run(steps: list[int]) -> int:
    longest = count = 0
    for i, step in enumerate(steps):
        count = count + 1 if i and step == steps[i - 1] + 1 else 1
        longest = max(longest, count)
    return longest


# What healed, and what is normal -------------------------------------------------------------------------------------


def _loss_spike(case: _Case) -> Iterator[Finding]:
    """Spikes of the loss that healed; the largest is shown."""
    known = np.isfinite(case.loss) & (case.loss > 0) & ~case.skipped
    step, loss = case.step[known], case.loss[known]
    found: list[tuple[float, int, float]] = []  # ratio, step, deviations
    for i in _candidates(loss):
        before, after = np.log(loss[max(0, i - WINDOW) : i]), loss[i + 1 : i + 1 + WINDOW]
        middle = float(np.median(before))
        sigma = MAD_TO_SIGMA * float(np.median(np.abs(before - middle)))
        deviations = (math.log(loss[i]) - middle) / max(sigma, 1e-3)
        ratio = float(loss[i]) / math.exp(middle)
        healed = len(after) >= LEAST_WINDOW and float(np.median(after)) < HEALED * math.exp(middle)
        if ratio > SPIKE and deviations > SPIKE_SIGMAS and healed and step[i] < case.trouble_step:
            found.append((ratio, int(step[i]), deviations))
    events = case.events("spike")
    if not found and not events:
        return
    evidence = {"spikes of the loss": Measured(len(found))}
    ratio, at, deviations = max(found, default=(0.0, _step(events[0]) if events else 0, 0.0))
    if found:
        evidence["loss over the steps before"] = Measured(ratio, SPIKE)
        evidence["robust deviations"] = Measured(deviations, SPIKE_SIGMAS)
    if events:
        evidence["spikes of the gradient norm"] = Measured(len(events))
        evidence["largest of them, robust deviations"] = Measured(
            max((_finite(event.get("z")) or 0.0 for event in events), default=None)
        )
    yield Finding(
        kind="loss_spike",
        severity="warning" if ratio > LARGE_SPIKE else "info",
        message="the loss leapt up and came back" if found else "the gradient norm leapt up and came back",
        step=at,
        evidence=evidence,
        advice="There is nothing to do for one; if they come often, clip=zclip clips them alone.",
    )


def _candidates(loss: Array) -> list[int]:
    """Steps far above the median of all, and after enough others: few, so that the exact rule costs nothing."""
    if len(loss) <= FIRST_STEPS:
        return []
    previous = np.minimum(np.roll(loss, 1), np.roll(loss, 2))  # a spike stands above at least one of the two before it
    rises = loss > SPIKE * previous
    return [int(i) for i in np.flatnonzero(rises) if i >= FIRST_STEPS]


def _benign_jump(case: _Case) -> Iterator[Finding]:
    """A lasting change of loss or norm that a change of the training explains."""
    for step, reason, key in _changes(case):
        if abs(case.trouble_step - step) <= WINDOW:
            continue
        for name, values in (("loss", case.loss), ("total_norm", case.norm)):
            known = np.isfinite(values) & (values > 0) & ~case.skipped
            before = np.log(values[known & (case.step < step) & (case.step >= step - WINDOW)])
            after = np.log(values[known & (case.step >= step) & (case.step < step + WINDOW)])
            if len(before) < LEAST_WINDOW or len(after) < LEAST_WINDOW:
                continue
            jump = float(np.median(after) - np.median(before))
            noise = MAD_TO_SIGMA * math.hypot(_deviation(before), _deviation(after)) / math.sqrt(LEAST_WINDOW)
            falls = jump < 0 and key.startswith("warmup_epochs")  # as it does from the start on
            if abs(jump) > math.log(JUMP) and abs(jump) > JUMP_SIGMAS * noise and not falls:
                yield Finding(
                    kind="benign_jump",
                    severity="info",
                    message=f"the {name} changed to {math.exp(jump):.2g} times what it was as {reason}",
                    step=step,
                    where=name,
                    evidence={"median after over median before": Measured(math.exp(jump), JUMP)},
                    advice=f"There is nothing to do; it follows from {key}.",
                )
                break


def _changes(case: _Case) -> Iterator[tuple[int, str, str]]:
    """Steps at which the training itself changes, why, and the argument."""
    if not len(case.step):
        return
    epoch, images, attempt = case.column("epoch"), case.column("images"), case.column("attempt")
    close, epochs = int(case.number("close_mosaic", 0)), int(case.number("epochs", 0))
    closed = np.flatnonzero(epoch >= epochs - close)
    if close > 0 and epochs > close and case.number("mosaic", 1.0) > 0 and len(closed):
        yield int(case.step[closed[0]]), "the mosaic closed", f"close_mosaic={close}"
    if case.number("warmup_epochs", HOST_WARMUP) > 0 and np.isfinite(case.lr).any():
        warmup = f"warmup_epochs={case.number('warmup_epochs', HOST_WARMUP):g}"
        yield int(case.step[int(np.nanargmax(case.lr))]), "the warm-up ended", warmup
    nbs = int(case.number("nbs", 64))
    for name, values, reason, key in (
        ("images", images, "the images in a step changed", f"nbs={nbs}"),
        ("attempt", attempt, "the host began the epoch again", f"batch={case.args.get('batch', 16)}"),
    ):
        usual = np.maximum(values[1:], values[:-1]) > (JUMP * np.minimum(values[1:], values[:-1]))
        changed = np.flatnonzero(usual if name == "images" else np.diff(values) > 0)
        if len(changed):
            yield int(case.step[changed[0] + 1]), reason, key


def _deviation(values: Array) -> float:
    return float(np.median(np.abs(values - np.median(values))))


def _always_clipped(case: _Case) -> Iterator[Finding]:
    """More than half of the steps clipped: normalised SGD, whose rate is not the nominal one."""
    coef = case.column("clip_coef")[~case.skipped]
    coef = coef[np.isfinite(coef)]
    if not len(coef) or (coef < 1).mean() <= MOSTLY:
        return
    lr0 = case.number("lr0", HOST_LR0)
    effective = effective_lr(case.lr, case.column("clip_coef"), lr0=lr0)
    norms = case.norm[np.isfinite(case.norm)]
    clip = case.records.config.get("clip") or {}
    is_norm = clip.get("policy", "norm") == "norm"
    advice = "There is nothing to do; compare runs by the effective rate, and clip=none shows what is cut off."
    if is_norm and len(norms):
        high = _rounded(float(np.quantile(norms, 0.9)))
        lower = _rounded(effective or lr0)
        advice = f"There is nothing to do; clip.max_norm={high} with lr0={lower} would clip only the largest steps."
    evidence = {"share of steps clipped": Measured(float((coef < 1).mean()), MOSTLY), "lr0": Measured(lr0)}
    if effective is not None:
        evidence["effective lr after clipping"] = Measured(effective)
    yield Finding(
        kind="always_clipped",
        severity="info",
        message="most steps are clipped, so that this is normalised SGD at the effective rate below",
        evidence=evidence,
        advice=advice,
    )


_RULES: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _bad_images, _bad_labels, _module_fault, _bad_init, _loss_components, _depth, _lr_too_high, _amp,
    _nonfinite_weights, _nonfinite_loss, _nonfinite_gradient, _lost, _dead_layer, _stalled, _loss_spike, _benign_jump,
    _always_clipped,
)  # fmt: skip


# Words and numbers ---------------------------------------------------------------------------------------------------


def _severity_of(case: _Case, incident: IncidentRecord) -> Severity:
    """Of what a batch holds: a spike that healed is none."""
    healed = incident.reason == "spike" and (case.recovered or not case.troubled)
    return "warning" if healed else "error"


def _divergence(event: dict[str, Any]) -> Divergence:
    return Divergence(event.get("kind", "blowup"), _step(event), str(event.get("reason") or ""))


def _with(incident: IncidentRecord, flag: str) -> list[ImageRecord]:
    return [image for image in incident.images if getattr(image, flag)]


def _paths(images: list[ImageRecord]) -> str:
    return _names([image.path for image in images])


def _names(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _data(case: _Case) -> str:
    return f"data={case.args.get('data') or 'data.yaml'}"


def _model(case: _Case) -> str:
    return f"model={case.args.get('model') or 'model.yaml'}"


def _momentum(case: _Case) -> float:
    return case.number("momentum", HOST_MOMENTUM)


def _step(event: dict[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _stage(name: str) -> int:
    """Of `model.<stage>` and of every tensor in it; -1 for other names."""
    words = name.split(".")
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else -1


def _top(table: pl.DataFrame, column: str) -> float:
    return cast("float", table[column].max())


def _median(table: pl.DataFrame, column: str) -> float:
    return cast("float", table[column].median())


def _ratio(value: float | None, over: float | None) -> float | None:
    return value / over if value is not None and over else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _rounded(value: float) -> str:
    """To one significant digit, as one writes a setting."""
    return f"{float(f'{value:.1g}'):g}"


def _shown(value: float | int | str | None) -> str:
    return "not known" if value is None else value if isinstance(value, str) else f"{value:.4g}"
