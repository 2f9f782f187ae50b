"""What a captured batch shows: bad pixels, bad labels, a module at fault."""

from __future__ import annotations

from collections.abc import Iterator

from yolo_gradstab.diagnosis.case import Case
from yolo_gradstab.diagnosis.finding import MOST_NAMED, Finding, Measured, Severity
from yolo_gradstab.diagnosis.rate import is_hot
from yolo_gradstab.incident import ImageNote, Incident
from yolo_gradstab.localisation import HUGE_PIXEL, FirstBad, listed

__all__ = ["SANE_INPUT", "bad_images", "bad_labels", "module_fault"]

LEAST_SANE_INPUT = 1e3  # largest value in half precision that explains no overflow
SANE_INPUT = 1e6  # the same in single precision
AMPLIFIED = 1e3  # largest value out of a module over that into it
HURTS = 3.0  # times the usual loss, of a batch that explains what came of it
AT_ONCE = 5  # steps until a trouble that it explains whatever its loss was: the model is looked at so often


def bad_images(case: Case) -> Iterator[Finding]:
    """Pixels that are not numbers, or far from where pixels lie."""
    captured = [(incident, _bad_pixels(incident)) for incident in case.records.incidents]
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
        advice=f"Repair these images, or take them out of the set that {case.data} names.",
    )


def bad_labels(case: Case) -> Iterator[Finding]:
    """Labels that explain the trouble: they enter at the loss, so not what went bad in the forward pass."""
    captured = [(incident, _bad_labels(incident)) for incident in case.records.incidents]
    captured = [(incident, images) for incident, images in captured if images and not _explained(case, incident)]
    if not captured:
        return
    incident, images = captured[0]
    said = [(image.path, problem) for image in images for problem in image.problems]
    problems = [f"{path}: {problem}" for path, problem in said if "pixel" not in problem]  # which are no label's
    evidence = {f"problem {i}": Measured(problem) for i, problem in enumerate(problems[:MOST_NAMED], 1)}
    evidence["batches with such labels"] = Measured(len(captured))
    yield Finding(
        kind="bad_labels",
        severity=_severity_of(case, incident),
        message="a captured batch holds labels that cannot be right",
        step=incident.step,
        where=_paths(images),
        evidence=evidence,
        advice=f"Repair these labels in the set that {case.data} names; `yolo-gradstab data check` lists them all.",
    )


def _explained(case: Case, incident: Incident) -> bool:
    """Whether something else than its labels explains an incident."""
    if incident.reason in {"blowup", "collapse"}:
        return is_hot(case)
    return incident.first_bad is not None and incident.first_bad.where in {"input", "forward"}


def module_fault(case: Case) -> Iterator[Finding]:
    """A module that turns sound values into ones that are not, with sound weights."""
    for incident in case.records.incidents:
        first = incident.first_bad
        if first is None or first.where not in {"forward", "backward"}:
            continue
        if _bad_pixels(incident) or incident.nonfinite_weights:
            continue
        if first.where == "backward" and (_bad_labels(incident) or not (first.module or first.type)):
            continue  # from the loss, which the labels reach first
        sane = LEAST_SANE_INPUT if incident.step in case.overflow_steps else SANE_INPUT
        ratio = _ratio(first.output_max, first.input_max)
        if first.what == "nonfinite":
            holds = first.input_max is None or first.input_max < sane
        else:  # grown weights amplify too, as does a layer that was wrong from the start
            holds = ratio is not None and ratio > AMPLIFIED and not is_hot(case) and not case.events("init")
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
            where=first.module or first.type or first.note,
            evidence=evidence | ({"note": Measured(first.note)} if first.note else {}),
            advice=f"Repair this module in the model that {case.model} names.",
        )
        return


def _module_name(first: FirstBad) -> str:
    if first.module is None:
        return f"the operation {first.type} between modules" if first.type else "an operation between modules"
    return f"the module {first.module} ({first.type or 'of unknown type'})"


def _severity_of(case: Case, incident: Incident) -> Severity:
    """Of what a batch holds: a spike that healed is no error, nor is what was only noticed and did no harm."""
    if incident.reason == "spike":
        return case.severity
    if incident.reason == "input":
        usual = case.loss_around(incident.step)
        hurts = incident.loss is None or (usual is not None and incident.loss > HURTS * usual)
        hurts = hurts or 0 <= case.trouble_step - incident.step <= AT_ONCE
        return case.severity if hurts else "warning"
    return "error"


def _bad_pixels(incident: Incident) -> list[ImageNote]:
    """Images that explain something: a user's own range, as of standardised images, is not wrong."""
    return [
        image
        for image in incident.images
        if image.nonfinite or max(abs(image.min or 0.0), abs(image.max or 0.0)) > HUGE_PIXEL
    ]


def _bad_labels(incident: Incident) -> list[ImageNote]:
    return [image for image in incident.images if image.bad_labels]


def _paths(images: list[ImageNote]) -> str:
    return listed([image.path for image in images], most=MOST_NAMED)


def _ratio(value: float | None, over: float | None) -> float | None:
    return value / over if value is not None and over else None
