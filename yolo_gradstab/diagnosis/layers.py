"""What stages and tensors show: weights that start wrong, depth that gradients do not pass, layers without any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import polars as pl

from yolo_gradstab.diagnosis.batch import SANE_INPUT
from yolo_gradstab.diagnosis.case import Case, finite, stage_of, step_of
from yolo_gradstab.diagnosis.finding import MOST_NAMED, Finding, Kind, Measured
from yolo_gradstab.guard import DEAD_STEPS, USUAL_SCALE
from yolo_gradstab.localisation import FirstBad, listed
from yolo_gradstab.runs import counted
from yolo_gradstab.stats import depth_slope

__all__ = ["backbone", "bad_init", "dead_layer", "depth"]

# Depth, at initialisation: logarithms of gradient norms of the backbone's stages against the head's. Healthy ones lie
# from -0.6 to 4.7 (yolov5 to yolo26, sizes n to x); without normalisation they were -13 or +10.
DEPTH = math.log(1e3)
EXPECTED_SLOPE = -0.2  # per stage of the backbone: gradients grow towards the input
EXPLODED_LOSS = 1e6  # per image, at the first step
LEAST_STAGES = 4  # of a backbone whose profile is judged


def bad_init(case: Case) -> Iterator[Finding]:
    """Weights whose scale at the start is off by orders of magnitude."""
    for event in case.events("init")[:1]:
        tensors = [tensor for tensor in event.get("tensors", []) if finite(tensor.get("scale")) is not None]
        if not tensors:
            return
        least, most = event.get("usual") or USUAL_SCALE
        tensors.sort(key=lambda tensor: -abs(math.log(max(tensor["scale"], 1e-38))))
        yield Finding(
            kind="bad_init",
            severity=case.severity,
            message=f"{counted(len(tensors), 'weight')} start far off the usual scale",
            step=step_of(event),
            where=listed([tensor["name"] for tensor in tensors], most=MOST_NAMED),
            evidence={
                tensor["name"]: Measured(tensor["scale"], f"{least:g} to {most:g} times the usual")
                for tensor in tensors[:MOST_NAMED]
            },
            advice=_other_weights(case),
        )


def _other_weights(case: Case) -> str:
    init = (case.records.config.get("mitigations") or {}).get("init")
    if init:
        gain = init.get("gain", 1.0)
        return f"Leave out mitigations.init={init.get('method')}{f', or its gain of {gain:g}' if gain != 1 else ''}."
    return (
        f"Initialise these weights anew in the model {case.model}, or start from trained ones, pretrained=WEIGHTS.pt."
    )


def depth(case: Case) -> Iterator[Finding]:
    """Gradients that explode or vanish over depth, at the start: later profiles of healthy runs differ too much."""
    first = case.layers.filter(pl.col("step") == 0)
    trained = str(case.args.get("model") or "").endswith(".pt") or isinstance(case.args.get("pretrained"), str)
    if first.is_empty() or trained or case.args.get("resume"):
        return
    overflown = _overflown(case)
    norms = {stage_of(name): norm for name, norm in first.select("layer", "grad_norm").iter_rows()}
    known = [i for i in backbone(norms) if norms[i] is not None and math.isfinite(norms[i]) and norms[i] > 0]
    head = norms.get(case.head) if case.head is not None else None
    start = float(case.loss[0]) if len(case.loss) else math.nan
    evidence: dict[str, Measured] = {}
    logs: list[float] = []
    if len(known) >= LEAST_STAGES and head and math.isfinite(head) and case.head not in known:
        logs = [math.log(norms[i] / head) for i in known]
        evidence["slope of ln gradient per stage"] = Measured(
            depth_slope(known, [norms[i] for i in known]), EXPECTED_SLOPE
        )
        largest, middle = math.exp(max(logs)), math.exp(float(np.median(logs)))
        evidence["gradient of a backbone stage over the head's, largest"] = Measured(largest, math.exp(DEPTH))
        evidence["gradient of a backbone stage over the head's, median"] = Measured(middle, math.exp(-DEPTH))
    evidence["loss at the first step"] = Measured(finite(start), EXPLODED_LOSS)
    where = f"model.{known[0]} to model.{known[-1]}" if known else None
    if overflown is not None:
        kind: Kind = "exploding"
        where = overflown.module or overflown.component
        message = "over the depth of the untrained network values grow until they overflow"
        evidence["largest value before they do"] = Measured(overflown.input_max, SANE_INPUT)
    elif (logs and max(logs) > DEPTH) or start > EXPLODED_LOSS:
        kind = "exploding"
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
        advice=f"Give the layers normalisation and an activation that passes gradients on in the model {case.model}.",
    )


def _overflown(case: Case) -> FirstBad | None:
    """Where the very first batch was not finite, if values had grown beyond sense before that."""
    for incident in case.records.incidents:
        first = incident.first_bad
        if incident.step == 0 and first is not None and first.what == "nonfinite" and first.where != "input":
            return first if (first.input_max or 0.0) >= SANE_INPUT and not incident.nonfinite_weights else None
    return None


def backbone(stages: Iterable[int]) -> list[int]:
    """Stages with parameters from the first up to the first without, which is where the neck begins."""
    consecutive = []
    for i, stage in enumerate(sorted(stages)):
        if i != stage:
            break
        consecutive.append(stage)
    return consecutive


def dead_layer(case: Case) -> Iterator[Finding]:
    """Trainable, and no gradient for long; where that is expected it is an info."""
    dead = [(step_of(event), str(name)) for event in case.events("dead") for name in event.get("tensors", [])]
    spans = {step_of(event): int(event.get("steps", 0)) for event in case.events("dead")}
    frozen = _frozen(case.args.get("freeze"))
    named = {stage_of(name) for _, name in dead}
    silent = _silent_stages(case)
    dead += [(step, stage) for step, stage in silent if stage_of(stage) not in named]
    dead = [(step, name) for step, name in dead if ".dfl." not in name and stage_of(name) not in frozen]
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
    # What the host freezes are whole stages.
    stages = sorted({stage_of(name) for name in names} & {stage_of(stage) for _, stage in silent} - {-1})
    advice = f"There is nothing to do; no object of {case.data} is matched there."
    if unexpected:
        otherwise = f", or do not train them, with freeze={stages}" if stages else ""
        advice = f"Connect them to the loss in the model {case.model}{otherwise}."
    yield Finding(
        kind="dead_layer",
        severity="warning" if unexpected else "info",
        message=f"{counted(len(names), 'tensor or stage', 'tensors or stages')} had no gradient at all for long"
        + ("" if unexpected else ", as is expected where nothing is matched"),
        step=min(step for step, _ in shown),
        where=listed(names, most=MOST_NAMED),
        evidence={"steps without any gradient": Measured(max(spans.values(), default=DEAD_STEPS), DEAD_STEPS)},
        advice=advice,
    )


def _silent_stages(case: Case) -> list[tuple[int, str]]:
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


def _may_lack_positives(case: Case, name: str) -> bool:
    """Branches of the head that only matched anchors reach; its classes have a gradient from every anchor."""
    head = case.head if case.head is not None else stage_of(name)
    return stage_of(name) == head and name.count(".") > 1 and "cv3" not in name
