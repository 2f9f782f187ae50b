"""What looks odd and is as expected: a jump that a change of the training explains, steps that are all clipped."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from yolo_gradstab.diagnosis.case import (
    HOST_WARMUP,
    HOST_WARMUP_BIAS_LR,
    LEAST_WINDOW,
    MOSTLY,
    WINDOW,
    Array,
    Case,
    step_of,
)
from yolo_gradstab.diagnosis.finding import Finding, Measured, rounded
from yolo_gradstab.stats import MAD_TO_SIGMA

__all__ = ["always_clipped", "benign_jump"]

JUMP = 1.5  # ratio of medians before and after
JUMP_SIGMAS = 3.0


def benign_jump(case: Case) -> Iterator[Finding]:
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


def _changes(case: Case) -> Iterator[tuple[int, str, str]]:
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


def always_clipped(case: Case) -> Iterator[Finding]:
    """More than half of the steps clipped: normalised SGD, whose rate is not the nominal one.

    An adaptive optimizer divides a clipped gradient by its own size, as it does any: the clip does next to nothing.
    """
    share = case.clipped_share
    if share is None or share <= MOSTLY:
        return
    effective = case.effective_lr()
    norms = case.norm[np.isfinite(case.norm)]
    clip = case.records.config.get("clip") or {}
    is_norm = clip.get("policy", "norm") == "norm"
    advice = "There is nothing to do; compare runs by the effective rate, and clip=none shows what is cut off."
    if case.is_adaptive:
        advice = f"There is nothing to do; with optimizer={case.args.get('optimizer')} compare runs by lr0."
    elif is_norm and len(norms):
        high = rounded(float(np.quantile(norms, 0.9)))
        advice = f"There is nothing to do; clip.max_norm={high} with {_same_rate(case, effective or case.lr0)} would "
        advice += "clip only the largest steps."
    given = [event for event in case.events("rollback") if "clip" in event]
    if given:
        by = "lr0" if case.is_adaptive else "the effective rate"
        advice = f"There is nothing to do; compare runs by {by}. clip=norm is what the guard gave the run."
    evidence = {"share of steps clipped": Measured(share, MOSTLY), "lr0": Measured(case.lr0)}
    if effective is not None:
        evidence["effective lr after clipping"] = Measured(effective)
    if given:
        evidence["clipped since the rollback at step"] = Measured(step_of(given[0]))
    yield Finding(
        kind="always_clipped",
        severity="info",
        message="most steps are clipped, which hardly changes those of an adaptive optimizer"
        if case.is_adaptive
        else "most steps are clipped, so that this is normalised SGD at the effective rate below",
        evidence=evidence,
        advice=advice,
    )


def _same_rate(case: Case, lr0: float) -> str:
    """The arguments of this rate, and of the biases' in warm-up, which is absolute and has to follow it."""
    bias = case.number("warmup_bias_lr", HOST_WARMUP_BIAS_LR) * lr0 / case.lr0 if case.lr0 > 0 else 0.0
    follows = bias > 0 and case.number("warmup_epochs", HOST_WARMUP) > 0 and not case.events("optimizer")
    return case.rate_key(rounded(lr0)) + (f" and warmup_bias_lr={rounded(bias)}" if follows else "")
