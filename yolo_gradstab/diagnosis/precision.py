"""What is not finite, in loss, gradient or weights, and what half precision cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import polars as pl

from yolo_gradstab.diagnosis.case import Case, finite, step_of
from yolo_gradstab.diagnosis.finding import MOST_NAMED, Finding, Measured
from yolo_gradstab.guard import LASTING_STEPS
from yolo_gradstab.incident import Incident
from yolo_gradstab.localisation import listed

__all__ = ["amp", "nonfinite_gradient", "nonfinite_loss", "nonfinite_weights"]

CALIBRATION_STEPS = 100  # in which an fp16 scaler may look for its scale
OVERFLOW_SHARE = 0.05  # of the steps after those
LEAST_OVERFLOWS = 3


def nonfinite_loss(case: Case) -> Iterator[Finding]:
    """The first step whose loss is not finite, and the component."""
    bad = case.step[~np.isfinite(case.loss)] if len(case.loss) else np.empty(0)
    captured = [incident for incident in case.records.incidents if _lost_component(incident)]
    steps = [int(bad[0])] if len(bad) else []
    if not (steps or captured or case.events("skip", "nonfinite")):  # the host may have seen more than was recorded
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
        advice=f"Keep guard.nonfinite=skip, and look at the labels of that batch in the set that {case.data} names.",
    )


def _lost_component(incident: Incident) -> str | None:
    """The component of a captured loss that is not finite, if one is."""
    if incident.first_bad is not None and incident.first_bad.where == "loss" and incident.first_bad.what == "nonfinite":
        named = incident.first_bad.component
        if named:
            return named.removesuffix("_loss")  # as the records have it
    lost = next((name for name, value in incident.losses.items() if finite(value) is None), None)
    return lost.removesuffix("_loss") if lost else None


def nonfinite_gradient(case: Case) -> Iterator[Finding]:
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
    is_kept = any(incident.step == step for incident in case.records.incidents)  # few are, of the first of a trouble
    replay = f" with `yolo-gradstab replay` on incidents/{step}" if is_kept else " in that batch"
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


def _bad_gradient_steps(case: Case) -> list[int]:
    """Steps whose gradient was not finite, by events and records; not those of a scaler that looks for its scale."""
    rows = case.steps.filter(pl.col("nonfinite") > 0, pl.col("scale") == 1)["step"].to_list()
    return sorted({*(step_of(event) for event in case.bad_steps), *(set(rows) - set(case.overflow_steps))})


def nonfinite_weights(case: Case) -> Iterator[Finding]:
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
        where=listed(names, most=MOST_NAMED),
        evidence={"tensors or stages": Measured(len(names), 0)},
        advice="Set guard.nonfinite=skip, which keeps them out of the weights, and start from an earlier checkpoint.",
    )


def _batch_of(case: Case, step: int) -> dict[str, Measured]:
    at = case.steps.filter(pl.col("step") == step)
    return {"batch": Measured(int(at["batch"][0]))} if "batch" in at.columns and len(at) else {}


def amp(case: Case) -> Iterator[Finding]:
    """An fp16 scaler that looks for its scale at the start, or that never finds it."""
    skips = case.overflow_steps
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
        "lowest scale": Measured(finite(lowest), 1),
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
