"""What went wrong in a run, in words: findings from its records alone, the root cause first.

A finding is named for what is wrong, not for where it was seen. Causes stand before their symptoms: a batch, a module
or an initial weight before the rate, the rate before the loss that left, a loss that left before a run that learned
nothing. A cause seen only after the run was lost is no cause, and stands behind.

What is expected is no finding: BatchNorm lets gradients grow towards the input at the start, norms grow while the rate
decays, necks with few positives have tiny gradients, and pose losses start with norms of 1e5. Where a threshold could
not be relative to the run itself, it lies between what healthy and what lost runs of yolo26, 11, 8 and 5 showed.

The rules stand in rooms by what they look at; `case` holds the records and the facts that several ask for. Imports
neither torch nor ultralytics.

References:
    Defazio 2025, "Why gradients rapidly increase near the end of training" (growth that is benign).
    Yang et al. 2019, "A mean field theory of batch normalization" (growth towards the input at the start).
    Google 2023, "Deep learning tuning playbook" (more than half of the steps clipped).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from yolo_gradstab.diagnosis.batch import bad_images, bad_labels, module_fault
from yolo_gradstab.diagnosis.case import Case, Records, records_of
from yolo_gradstab.diagnosis.finding import KINDS, SEVERITIES, Finding, Kind, Measured, Severity
from yolo_gradstab.diagnosis.layers import bad_init, dead_layer, depth
from yolo_gradstab.diagnosis.loss import GAINS, loss_components, loss_spike, lost, stalled
from yolo_gradstab.diagnosis.normal import always_clipped, benign_jump
from yolo_gradstab.diagnosis.precision import amp, nonfinite_gradient, nonfinite_loss, nonfinite_weights
from yolo_gradstab.diagnosis.rate import lr_too_high
from yolo_gradstab.guard import NO_QUALITY
from yolo_gradstab.runs import Status, counted

__all__ = [
    "GAINS", "KINDS", "Finding", "Kind", "Measured", "Records", "Severity", "diagnose",
    "last_words", "records_of",
]  # fmt: skip

SYMPTOMS = {"nonfinite_weights", "nonfinite_loss", "nonfinite_gradient", "loss_blowup", "silent_collapse"}
DATA_CAUSES = {"bad_images", "bad_labels", "module_fault"}

_RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    bad_images, bad_labels, module_fault, bad_init, loss_components, depth, lr_too_high, amp,
    nonfinite_weights, nonfinite_loss, nonfinite_gradient, lost, dead_layer, stalled, loss_spike, benign_jump,
    always_clipped,
)  # fmt: skip


def diagnose(records: Records) -> list[Finding]:
    """What went wrong in a run, most important first; the first error is the root cause.

    Args:
        records: As `records_of` reads them. They are only read: the same records always give the same findings.
    """
    case = Case(records)
    found = [finding for rule in _RULES for finding in rule(case)]
    return sorted(found, key=lambda finding: _place(finding, case.trouble_step))


def last_words(records: Records, run: str | Path) -> str:
    """What is said at the end of a run that went wrong: its first finding, and how to see the rest; else nothing.

    Args:
        records: Of a run that has ended.
        run: Its folder, for the command.
    """
    found = diagnose(records)
    ended_badly = records.status.outcome in {"diverged", "stopped", "failed"}
    if not found or found[0].severity == "info" or not (ended_badly or found[0].severity == "error"):
        return ""
    more = counted(len(found) - 1, "more finding") if len(found) > 1 else "Again"
    return f"{found[0].text()}\n{more}: yolo-gradstab diagnose {shlex.quote(str(run))}"


def nothing_words(status: Status, map50: float | None) -> str:
    """Of a run whose records show nothing wrong, which is not to say that it went well.

    Args:
        status: How it stands or ended.
        map50: At its end; null where there is none.
    """
    after = f"after {counted(status.step, 'step')}"
    if status.outcome == "failed":
        return f"The run failed {after}: {status.reason}. Its records show nothing wrong."
    if status.outcome == "completed" and map50 is not None and map50 < NO_QUALITY:
        return f"Nothing wrong was found, but the run has not learned: mAP50 is {map50:.2g} {after}."
    return "Nothing wrong was found."


def _place(finding: Finding, trouble_step: float) -> tuple[int, int, int, int, int]:
    step = -1 if finding.step is None else finding.step
    if finding.severity == "info" and finding.kind == "dead_layer":  # expected: the least of all
        return SEVERITIES.index("info"), False, len(KINDS), step, KINDS.index("dead_layer")
    is_symptom = finding.kind in SYMPTOMS
    # Once a run is lost anything can be found in it: what was seen only later did not cause it.
    is_late = not is_symptom and finding.kind in DATA_CAUSES and step > trouble_step
    group = 0 if finding.kind in DATA_CAUSES else KINDS.index("nonfinite_weights" if is_symptom else finding.kind)
    return SEVERITIES.index(finding.severity), is_late, group, step, KINDS.index(finding.kind)
