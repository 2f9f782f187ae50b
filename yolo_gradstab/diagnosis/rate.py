"""Whether the learning rate is too high, and what to lower it to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import polars as pl

from yolo_gradstab.diagnosis.case import EARLY_STEPS, HOST_LR0, HOST_MOMENTUM, HOST_WARMUP, Case, finite, step_of
from yolo_gradstab.diagnosis.finding import MOST_NAMED, Finding, Measured, Severity, rounded
from yolo_gradstab.guard import NO_QUALITY

__all__ = ["HOT_RATIO", "is_hot", "lr_too_high", "rate_advice"]

# The rate. Update of a stage over its weights; healthy runs lie near 1e-3, lost ones had 0.015 and more before the end.
CALM_RATIO = 3e-3  # that a rate to go back to is aimed at
HOT_RATIO = 1e-2  # median over stages: explains a run that was lost
FIERCE_RATIO = 3e-2  # median over stages: worth a warning in a run that was not
WILD_RATIO = 0.3  # of a single stage
UNEASY_RATIO = 0.06  # of a single stage, with weights that have grown
GROWN = 3.0  # times their start, of a stage's weights within `EARLY_STEPS`
OVERGROWN = 10.0
LARGE_MOMENTUM = 0.97  # above it, the step is more than 33 times the gradient
HEAT = 5.0  # lr0 / (1 - momentum) over the host's, where no update was recorded
WARMUP_CURES = 10.0  # times the host's lr0, above which it is the rate and not its missing warm-up
LOWER_BY = (3.0, 100.0)  # least and most that a rate is advised to be lowered by


def is_hot(case: Case) -> bool:
    """Whether updates before the trouble were so large that the rate explains it."""
    peak = case.peak_updates
    if peak.is_empty():
        return _unrecorded_heat(case) is not None
    return _top(peak, "middle") > HOT_RATIO or _top(peak, "largest") > WILD_RATIO


def _unrecorded_heat(case: Case) -> float | None:
    """lr0 / (1 - momentum) over the host's, for SGD where no update was recorded in time."""
    if not str(case.args.get("optimizer", "")).upper().endswith("SGD"):
        return None
    heat = case.lr0 / max(1e-6, 1 - case.momentum)
    heat *= (1 - HOST_MOMENTUM) / HOST_LR0
    return heat if heat > HEAT else None


def lr_too_high(case: Case) -> Iterator[Finding]:
    """Steps that move weights too far: of a run that was lost, or that was near it."""
    severity = _rate_severity(case)
    if severity is None:
        return
    peak, held = case.peak_updates, _held(case)
    evidence = {}
    step = None
    if len(peak):
        over = peak.filter((pl.col("middle") > HOT_RATIO) | (pl.col("largest") > UNEASY_RATIO))
        step = int(over["step"][0]) if len(over) else int(peak["step"][0])
        limit = HOT_RATIO if case.troubled else FIERCE_RATIO
        evidence["update over weight of the median stage, highest"] = Measured(_top(peak, "middle"), limit)
        evidence["update over weight of one stage, highest"] = Measured(_top(peak, "largest"), WILD_RATIO)
        if held is not None:
            evidence["update over weight of the median stage, without update_clip"] = held
    else:
        evidence["lr0 / (1 - momentum) over the host's"] = Measured(_unrecorded_heat(case), HEAT)
    if case.growth is not None:
        evidence["weights of a stage over their start"] = Measured(case.growth, GROWN)
    evidence |= _timing(case)
    warnings = case.events("warning")
    if warnings:
        said = [f"{event.get('kind')} at step {step_of(event)}" for event in warnings[:MOST_NAMED]]
        evidence["early warnings"] = Measured(", ".join(said))
    words = "each step moves the weights too far for them to settle"
    if held is not None and not case.troubled:
        words = (
            "update_clip alone holds the weights together, where each step would move them too far for them to settle"
        )
    if case.troubled and case.recovered:
        words += "; the run was lost to it and came back"
    elif case.calmings:
        words += "; the guard went back before the run was lost, and lowered the rate"
    yield Finding(
        kind="lr_too_high",
        severity=severity,
        message=words,
        step=step,
        where=_fiercest_stage(case),
        evidence=evidence,
        advice=rate_advice(case),
    )


def _rate_severity(case: Case) -> Severity | None:
    if case.troubled:
        return case.severity if is_hot(case) else None
    if case.calmings or _held(case) is not None:
        return "warning"
    if case.usual_update is None:
        return None
    # Of adaptive optimizers weights grow early in good runs too.
    grown = 0.0 if case.is_adaptive or case.growth is None else case.growth
    uneasy = _top(case.peak_updates, "largest") > UNEASY_RATIO
    warned = bool(case.events("warning"))
    learned_nothing = case.map50 is not None and case.map50 < NO_QUALITY
    explains = warned and learned_nothing and is_hot(case)
    if case.usual_update > FIERCE_RATIO or (grown > OVERGROWN and uneasy) or explains:
        return "warning"
    # A large momentum shows late: its steps go on growing for 1 / (1 - momentum) steps.
    heavy = case.momentum > LARGE_MOMENTUM and _unrecorded_heat(case) is not None
    return "info" if (grown > GROWN and uneasy) or heavy or warned else None


def _held(case: Case) -> Measured | None:
    """What updates over weights would have been, of a run that only its bound kept from diverging."""
    events = [event for event in case.events("warning") if event.get("kind") == "unbounded_ratio"]
    return Measured(events[0].get("value"), events[0].get("limit")) if events else None


def _timing(case: Case) -> dict[str, Measured]:
    """When it went wrong, beside when the rate was highest, and what the rate amounted to after clipping."""
    if not len(case.lr) or not np.isfinite(case.lr).any():
        return {}
    evidence = {"lr0": Measured(case.lr0)}
    if not case.is_adaptive:
        evidence["lr0 / (1 - momentum)"] = Measured(case.lr0 / max(1e-6, 1 - case.momentum))
    effective = case.effective_lr(until=case.trouble_step)
    if effective is not None:
        evidence["effective lr after clipping"] = Measured(effective)
    peak = int(case.step[int(np.nanargmax(case.lr))])
    evidence["step of the highest rate"] = Measured(peak)
    if case.troubled:
        evidence["step at which it went wrong"] = Measured(int(case.trouble_step))
    return evidence


def rate_advice(case: Case) -> str:
    """What to set the rate to, or what makes its steps too large."""
    lr0, momentum = case.lr0, case.momentum
    if momentum > LARGE_MOMENTUM:
        return f"Set momentum={HOST_MOMENTUM}: with {momentum:g} a step is {1 / max(1e-6, 1 - momentum):.0f} gradients."
    early = case.trouble_step <= EARLY_STEPS
    if case.troubled and early and case.number("warmup_epochs", HOST_WARMUP) <= 0 and lr0 <= WARMUP_CURES * HOST_LR0:
        return f"Set warmup_epochs={HOST_WARMUP}: without a warm-up the first steps are the largest."
    backs = [event for event in case.events("rollback") if finite(event.get("lr_factor"))]
    if backs and case.recovered:
        rate = case.rate_key(f"{case.lowered_to:.2g}")
        clip = f"clip={backs[-1]['clip']} and " if "clip" in backs[-1] else ""
        return f"Set {clip}{rate}, {'with' if clip else 'the rate at'} which the run went on after its last rollback."
    least, most = LOWER_BY
    wanted = 1 / least
    if len(case.peak_updates):
        wanted = CALM_RATIO / max(_top(case.peak_updates, "middle"), 1e-12)
    lower = rounded(lr0 * min(1 / least, max(1 / most, wanted)))
    config = case.records.config
    other = "" if config.get("update_clip") else ", or bound the update with update_clip=0.03"
    if (config.get("clip") or {}).get("policy") == "none":
        other = ", or clip the gradient with clip=norm"
    return f"Lower the rate of {lr0:g} to {case.rate_key(lower)}{other}."


def _fiercest_stage(case: Case) -> str | None:
    """The stage whose weights moved furthest in one of those steps."""
    if case.peak_updates.is_empty():
        return None
    steps = case.peak_updates["step"].implode()
    moved = case.layers.filter(pl.col("step").is_in(steps), pl.col("weight_norm") > 0).sort("update_ratio")
    return str(moved["layer"][-1]) if len(moved) else None


def _top(table: pl.DataFrame, column: str) -> float:
    return cast("float", table[column].max())
