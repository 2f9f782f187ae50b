"""How the loss went: its components, a loss that left or died, one that went nowhere, spikes that healed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from yolo_gradstab.diagnosis.case import HIGHEST_LR0, LEAST_WINDOW, MOSTLY, WINDOW, Array, Case, finite, step_of
from yolo_gradstab.diagnosis.finding import Finding, Kind, Measured, Severity, rounded
from yolo_gradstab.diagnosis.rate import HOT_RATIO, rate_advice
from yolo_gradstab.guard import FIRST_STEPS, NO_QUALITY
from yolo_gradstab.stats import MAD_TO_SIGMA

__all__ = ["GAINS", "loss_components", "loss_spike", "lost", "stalled"]

GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5, "pose": 12.0, "kobj": 1.0, "rle": 1.0}  # the host's defaults
GAIN_OF = {"l1": "dfl"}  # components that are scaled by an argument of another name
GAIN_OFF = 10.0  # times its default
DOMINANT = 0.98  # share of the components' sum, in more than half of the steps
LARGE_SHARE = 0.5  # the same where the gain is off its default

SPIKE = 3.0  # times the median of the steps before
LARGE_SPIKE = 10.0
SPIKE_SIGMAS = 6.0  # robust, on the log-loss
HEALED = 1.5  # times the median before
STALLED_STEPS = 100  # before which nothing can be said
LONG_RUN = 1000  # steps after which mAP50 0 is an error
HARDLY_FELL = 0.9  # of the starting loss
RAISE_BY = 3.0


def loss_components(case: Case) -> Iterator[Finding]:
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
                else f"Check that the labels of the set {case.data} have what this component is computed from.",
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
                else f"Lower the gain {gain}={rounded(ratio * GAINS[gain] / RAISE_BY)} of that component."
                if gain
                else f"Check the labels of the set {case.data}.",
            )


def _gain(case: Case, component: str) -> tuple[str | None, float]:
    """The host's argument that scales a component, and what it is over its default."""
    name = GAIN_OF.get(component, component)
    if name not in GAINS:
        return None, 1.0
    return name, case.number(name, GAINS[name]) / GAINS[name]


def lost(case: Case) -> Iterator[Finding]:
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
            advice=rate_advice(case),
        )


def _around(case: Case, step: int) -> dict[str, Measured]:
    """Loss and norm there, against the start and the steps before."""
    here, before = case.step == step, (case.step < step) & (case.step >= step - WINDOW) & ~case.skipped
    evidence = {}
    if here.any():
        evidence["loss"] = Measured(finite(case.loss[here][0]), case.start_loss)
        norms = case.norm[before]
        if np.isfinite(norms).any():
            highest = max(float(np.nanmax(norms)), finite(case.norm[here][0]) or 0.0)
            usual = float(np.nanmedian(norms))
            evidence[f"gradient norm, largest in {WINDOW} steps"] = Measured(highest, usual)
    if case.map50 is not None:
        evidence["mAP50 at the end"] = Measured(case.map50, NO_QUALITY)
    return evidence


def stalled(case: Case) -> Iterator[Finding]:
    """No divergence, and nothing learned."""
    known = np.isfinite(case.loss) & ~case.skipped
    if case.status.outcome != "completed" or case.map50 is None or case.map50 >= NO_QUALITY or case.troubled:
        return
    if known.sum() < STALLED_STEPS or case.start_loss is None:
        return
    end = float(np.median(case.loss[known][-FIRST_STEPS:]))
    fell = end / case.start_loss if case.start_loss > 0 else 1.0
    severity: Severity = "warning" if fell > HARDLY_FELL else "info"
    if known.sum() >= LONG_RUN:
        severity = "error"
    evidence = {
        "mAP50 at the end": Measured(case.map50, NO_QUALITY),
        "loss at the end over its start": Measured(fell, HARDLY_FELL),
        "steps": Measured(int(known.sum()), STALLED_STEPS),
    }
    middle = case.usual_update or 0.0
    if middle:
        evidence["update over weight of the median stage"] = Measured(middle, HOT_RATIO)
    effective = case.effective_lr()
    if effective is not None:
        evidence["effective lr after clipping"] = Measured(effective)
    yield Finding(
        kind="stalled",
        severity=severity,
        message="the run went well and learned next to nothing",
        step=int(case.step[known][-1]),
        evidence=evidence,
        advice=rate_advice(case) if middle > HOT_RATIO else _longer_or_higher(case),
    )


def _longer_or_higher(case: Case) -> str:
    """The advice to a run that learned too slowly; no higher rate for one whose rate the guard had found too high."""
    longer = f"Train for longer than epochs={case.args.get('epochs', 1)}"
    higher = min(case.lowered_to * RAISE_BY, HIGHEST_LR0)
    if case.calmings or higher <= case.lowered_to:
        return f"{longer}."
    return f"{longer}, or raise the rate to {case.rate_key(rounded(higher))}."


def loss_spike(case: Case) -> Iterator[Finding]:
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
    ratio, at, deviations = max(found, default=(0.0, step_of(events[0]) if events else 0, 0.0))
    if found:
        evidence["loss over the steps before"] = Measured(ratio, SPIKE)
        evidence["robust deviations"] = Measured(deviations, SPIKE_SIGMAS)
    if events:
        evidence["spikes of the gradient norm"] = Measured(len(events))
        evidence["largest of them, robust deviations"] = Measured(
            max((finite(event.get("z")) or 0.0 for event in events), default=None)
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
