"""A run to be diagnosed: its records, and the facts that more than one rule asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast, get_args

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from yolo_gradstab import stats
from yolo_gradstab.diagnosis.finding import Severity
from yolo_gradstab.guard import FIRST_STEPS, NO_QUALITY, Divergence, UnrestKind, find_divergences
from yolo_gradstab.incident import Incident, IncidentError, read_incident
from yolo_gradstab.runs import RunError, Status, gave_up_on_nan
from yolo_gradstab.telemetry import Run, lasting, made

__all__ = ["Array", "Case", "Records", "effective_lr", "finite", "records_of", "stage_of", "step_of"]

HOST_LR0, HOST_MOMENTUM, HOST_WARMUP, HOST_WARMUP_BIAS_LR = 0.01, 0.937, 3.0, 0.1  # the host's defaults
HIGHEST_LR0 = 1.0  # that the host takes
EARLY_STEPS = 100
PEAK = 0.5  # of the highest rate, from which on a step counts as one at the peak
WINDOW = 20  # steps before and after
LEAST_WINDOW = 5
MOSTLY = 0.5  # of the steps

Array = NDArray[np.float64]


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
    incidents: list[Incident] = []
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
            incidents.append(read_incident(path.parent))
        except IncidentError as error:
            raise RunError(str(error)) from None
    return Records(
        steps=run.steps,
        layers=run.layers,
        events=run.events,
        incidents=sorted(incidents, key=lambda incident: incident.step),
        args=run.args,
        config=run.config,
        status=run.status,
        map50=run.map50,
    )


class Case:
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
        """Parts of the loss, by name."""
        names = [name for name in self.steps.columns if name.startswith("loss_")]
        return {name.removeprefix("loss_"): self.column(name) for name in names}

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Those of these kinds, in order."""
        return [event for event in self.records.events if event.get("event") in names]

    def number(self, key: str, default: float) -> float:
        """A number among the host's arguments."""
        value = self.args.get(key, default)
        return float(value) if isinstance(value, (int, float)) else default

    def rate_key(self, lr0: str) -> str:
        """The arguments that set a rate, for an advice: with the optimizer where that was left to the host."""
        if not self.events("optimizer"):
            return f"lr0={lr0}"
        # The host takes others of its own with it, which it would not if the optimizer were named.
        own = f"with its {'momentum=0.9 and ' if self.is_adaptive else ''}warmup_bias_lr=0"
        return f"lr0={lr0} and optimizer={self.args.get('optimizer')}, since optimizer=auto ignores lr0, {own}"

    @cached_property
    def is_adaptive(self) -> bool:
        """Whether the optimizer divides the gradient by its own size: a clip then hardly changes its steps."""
        name = str(self.args.get("optimizer", "")).upper()
        return "ADAM" in name or name == "RMSPROP"

    @cached_property
    def momentum(self) -> float:
        """Of SGD and its kin, whose steps add gradients up; 0 of an adaptive one, whose beta1 is of a mean."""
        return 0.0 if self.is_adaptive else self.number("momentum", HOST_MOMENTUM)

    @cached_property
    def data(self) -> str:
        """The argument that names the data, for an advice."""
        return f"data={self.args.get('data') or 'data.yaml'}"

    @cached_property
    def model(self) -> str:
        """The argument that names the model, for an advice."""
        return f"model={self.args.get('model') or 'model.yaml'}"

    @cached_property
    def lr0(self) -> float:
        """As it was asked for."""
        return self.number("lr0", HOST_LR0)

    @cached_property
    def lowered_to(self) -> float:
        """The rate after the guard's last backoff; `lr0` without one."""
        factors = [finite(event.get("lr_factor")) for event in self.events("rollback")]
        return self.lr0 * next((factor for factor in reversed(factors) if factor), 1.0)

    def effective_lr(self, until: float = math.inf) -> float | None:
        """What `lr0` amounted to after clipping and backoffs, up to a step.

        Nothing of a run without such columns, and of an adaptive optimizer, whose steps are not its gradients.
        """
        if self.is_adaptive or "lr" not in self.steps.columns or self._made is None:
            return None
        events = [event for event in self.records.events if step_of(event) < until]
        return effective_lr(self.steps.filter(pl.col("step") <= until), events, lr0=self.lr0)

    @cached_property
    def clipped_share(self) -> float | None:
        """Of the steps that moved the weights."""
        return None if self._made is None else stats.clipped_share(self._made["clip_coef"].fill_null(math.nan))

    @cached_property
    def _made(self) -> pl.DataFrame | None:
        """The steps that moved the weights, where the records tell them and what was clipped."""
        known = {"clip_coef", "skipped"} <= set(self.steps.columns)
        return made(self.steps, self.records.events) if known else None

    # How it went -----------------------------------------------------------------------------------------------------

    @cached_property
    def ended(self) -> bool:
        """Whether it goes on no more."""
        return self.status.outcome not in {"running", "interrupted"}

    @cached_property
    def map50(self) -> float | None:
        """At the end; of a run that goes on, nothing."""
        return self.records.map50 if self.ended else None

    @cached_property
    def divergences(self) -> list[Divergence]:
        """What the trainer saw, and what the records show, each kind once, in order."""
        found = [_divergence(event) for event in self.events("divergence", "rollback") if event not in self.calmings]
        found += self._lasting_divergences
        reason = self.status.reason or ""
        if self.status.divergence or gave_up_on_nan(self.status):
            kind = self.status.divergence or "nonfinite"
            if kind not in {divergence.kind for divergence in found}:
                found.append(Divergence(kind, max(0, self.status.step - 1), reason))
        first: dict[str, Divergence] = {}
        for divergence in sorted(found, key=lambda divergence: divergence.step):
            first.setdefault(divergence.kind, divergence)
        return list(first.values())

    @cached_property
    def _lasting_divergences(self) -> list[Divergence]:
        """Of the records without the steps that were taken back."""
        steps, layers = (lasting(table, self.records.events) for table in (self.steps, self.layers))
        return find_divergences(steps, layers, map50=self.map50)

    @cached_property
    def calmings(self) -> list[dict[str, Any]]:
        """Rollbacks that an early warning made, before the run was lost."""
        return [event for event in self.events("rollback") if event.get("kind") in get_args(UnrestKind)]

    @cached_property
    def recovered(self) -> bool:
        """Whether it ended well, whatever it went through."""
        # Classify, semantic and depth have no such line between something and nothing.
        good = not self._lasting_divergences if self.map50 is None else self.map50 >= NO_QUALITY
        return good and self.status.outcome == "completed" and self.status.divergence is None

    @cached_property
    def bad_steps(self) -> list[dict[str, Any]]:
        """Events of gradients that were not finite, without those of an fp16 scaler that looks for its scale."""
        return [event for event in self.events("skip", "nonfinite") if event.get("reason") != "scaler_overflow"]

    @cached_property
    def overflow_steps(self) -> list[int]:
        """Steps that an fp16 scaler left out; with the guard off it does so too."""
        events = self.events("skip", "nonfinite")
        return sorted(step_of(event) for event in events if event.get("reason") == "scaler_overflow")

    @cached_property
    def trouble_step(self) -> float:
        """Step at which it first went wrong; infinite where it did not."""
        steps = [divergence.step for divergence in self.divergences]
        return min([*steps, *(step_of(event) for event in self.bad_steps)], default=math.inf)

    @cached_property
    def troubled(self) -> bool:
        """Whether it went wrong at any step."""
        return math.isfinite(self.trouble_step)

    @cached_property
    def severity(self) -> Severity:
        """Of what explains or shows the trouble."""
        return "error" if self.troubled and not self.recovered else "warning"

    @cached_property
    def start_loss(self) -> float | None:
        """Median of the first finite ones."""
        known = self.loss[np.isfinite(self.loss) & ~self.skipped][:FIRST_STEPS]
        return float(np.median(known)) if len(known) else None

    def loss_around(self, step: int) -> float | None:
        """Median of the finite ones of the steps before and after, without it."""
        near = (np.abs(self.step - step) <= WINDOW) & (self.step != step) & np.isfinite(self.loss) & ~self.skipped
        return float(np.median(self.loss[near])) if near.any() else None

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

        At the first step a warm-up moves nothing but biases, and those from zero: that says nothing.
        """
        updates = self.updates
        if self.number("warmup_epochs", HOST_WARMUP) > 0:
            updates = updates.filter(pl.col("step") > 0)
        peak = updates.filter(pl.col("step") > 0, pl.col("lr") >= PEAK * pl.col("lr").max())
        return peak if len(peak) else updates

    @cached_property
    def usual_update(self) -> float | None:
        """Of the median stage, in the median of those steps."""
        return cast("float | None", self.peak_updates["middle"].median())

    @cached_property
    def growth(self) -> float | None:
        """The most that a stage's weights had grown when it went wrong, or within the first steps."""
        until = min(self.trouble_step, EARLY_STEPS)
        known = self.layers.filter(pl.col("step") <= until, pl.col("weight_norm") > 0).sort("step")
        start = pl.col("weight_norm").first().over("layer")
        return finite(known.select((pl.col("weight_norm") / start).max()).item())

    @cached_property
    def head(self) -> int | None:
        """Index of the last stage."""
        return max((stage_of(name) for name in self.layers["layer"].unique()), default=None)


def _divergence(event: dict[str, Any]) -> Divergence:
    return Divergence(event.get("kind", "blowup"), step_of(event), str(event.get("reason") or ""))


def effective_lr(steps: pl.DataFrame, events: Sequence[Mapping[str, Any]], *, lr0: float) -> float | None:
    """What lr0 amounts to after clipping and after the guard's backoffs, of the steps that were made and lasted."""
    steps = made(steps, events)
    factors = np.ones(len(steps))  # counts as a part of the clip: lr0 is what was asked for
    for event in events:
        step, factor = event.get("step"), event.get("lr_factor")
        if event.get("event") == "rollback" and isinstance(step, int) and isinstance(factor, float) and factor > 0:
            factors[(steps["step"] > step).to_numpy()] = factor
    lr, clip_coef = (steps[name].fill_null(math.nan).to_numpy() for name in ("lr", "clip_coef"))
    return stats.effective_lr(lr / factors, clip_coef * factors, lr0=lr0)


def step_of(event: dict[str, Any]) -> int:
    """0 where an event has none."""
    step = event.get("step")
    return step if isinstance(step, int) else 0


def stage_of(name: str) -> int:
    """Of `model.<stage>` and of every tensor in it; -1 for other names."""
    match = re.search(r"(?:^|\.)model\.(\d+)(?:\.|$)", name)  # past wrappers, as `norms.Layers.stages` has it
    return int(match[1]) if match else -1


def finite(value: Any) -> float | None:
    """The number, if it is one."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
