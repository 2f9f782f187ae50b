"""`yolo_gradstab.diagnosis` on made records with known answers: each kind, a near miss of it, and what comes first."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
import yaml

from yolo_gradstab.cli import main
from yolo_gradstab.config import config_keys, load_config
from yolo_gradstab.diagnosis import GAINS, KINDS, Finding, Measured, Records, diagnose, last_words, records_of
from yolo_gradstab.incident import Incident
from yolo_gradstab.report import build_report
from yolo_gradstab.runs import RunError, RunFolder, Status
from yolo_gradstab.telemetry import LAYER_SCHEMA, STEP_SCHEMA, PartWriter, read_run

STAGES = [*range(11), 13, 16, 17, 19, 20, 22, 23]  # of yolo26: those with parameters
SMALL = {17: 0.03, 19: 0.05, 20: 2e-5, 22: 4e-5}  # gradients of neck levels with few positives
ARGS = {
    "model": "yolo26n.yaml", "data": "my.yaml", "optimizer": "SGD", "lr0": 0.01, "momentum": 0.937, "epochs": 50,
    "warmup_epochs": 3.0, "close_mosaic": 5, "batch": 16, "nbs": 64, "task": "detect", "pretrained": True, **GAINS,
}  # fmt: skip
NUM = 200


def run(
    *,
    num: int = NUM,
    loss: Any = None,
    norm: Any = None,
    ratio: float = 2e-3,
    growth: float = 1.0,
    stages: dict[int, float] | None = None,
    parts: dict[str, Any] | None = None,
    clip: float = 1.0,
    columns: dict[str, Any] | None = None,
    args: dict[str, Any] | None = None,
    map50: float | None = 0.3,
    outcome: str = "completed",
    divergence: str | None = None,
    **more: Any,
) -> Records:
    """A healthy run of 4 steps an epoch, changed where a test says so.

    Args:
        growth: Of the weights from step 20 on.
        stages: The first step's gradient of a stage, times what is usual.
        parts: Components of the loss, in shares of it.
    """
    noise = np.random.default_rng(0).lognormal(sigma=0.2, size=num)
    losses = np.geomspace(200, 60, num) * noise if loss is None else np.array(loss, dtype=float)
    norms = np.geomspace(700, 1500, num) * noise if norm is None else np.array(norm, dtype=float)
    step = np.arange(num)
    shares = {"box": 0.6, "cls": 0.35, "l1": 0.05} if parts is None else parts
    table = {
        "step": step, "epoch": step // 4, "attempt": 0 * step, "batch": step, "images": 0 * step + 64,
        "lr": 0.01 * np.minimum(1, step / 12) * (1 - 0.99 * step / num), "loss": losses,
        **{f"loss_{name}": share * np.nan_to_num(losses, nan=1.0) for name, share in shares.items()},
        "total_norm": norms, "clipped_norm": clip * norms, "clip_coef": 0.0 * step + clip,
        "nonfinite": 0 * step, "skipped": step < 0, "scale": 0.0 * step + 1, **(columns or {}),
    }  # fmt: skip
    rows = []
    for at in range(0, num, 10):
        for stage in STAGES:
            usual = 10 * math.exp(-0.2 * min(stage, 10) + 2) * SMALL.get(stage, 1.0)
            changed = (stages or {}).get(stage, 1.0) if at == 0 else 1.0
            weight = (5.0 + stage) * (growth if at >= 20 else 1.0)
            rows.append((at, f"model.{stage}", usual * changed, weight, ratio if at else 0.0, 0))
    layers = pl.DataFrame(rows, schema=LAYER_SCHEMA, orient="row")
    status = Status(outcome=outcome, divergence=divergence, step=num)  # type: ignore[arg-type]
    values = {"args": ARGS | (args or {}), "config": {"clip": {"policy": "norm"}}, "status": status, "map50": map50}
    records = Records(steps=pl.DataFrame(table), layers=layers, **(values | more))
    return msgspec.structs.replace(records, incidents=[captured(i) for i in records.incidents])  # plain in the tests


def lost(kind: str = "collapse", **more: Any) -> Records:
    """The same, lost at step 60 by a loss that leaves and then is nothing at all."""
    loss, norm = np.full(NUM, 200.0), np.full(NUM, 700.0)
    if kind == "collapse":
        loss[60:], norm[60:] = 1e-8, 1e-5
    elif kind == "blowup":
        loss[60:], norm[60:] = 3e4, 7e6
    else:
        loss[60:], norm[60:] = math.nan, math.nan
    return run(loss=loss, norm=norm, **({"map50": 0.0, "outcome": "diverged", "divergence": kind} | more))


def incident(step: int = 30, reason: str = "nonfinite_gradient", **more: Any) -> dict[str, Any]:
    return {"step": step, "reason": reason, "loss": 5.0, "losses": {"box": 3.0}, "images": [{}], **more}


def captured(plain: dict[str, Any]) -> Incident:
    """An incident as the trainer writes it; what a test does not say is usual."""
    image = {"path": "good.jpg", "nonfinite": 0, "min": None, "max": None, "labels": 2}
    usual = {"epoch": 0, "batch": 0, "task": "detect", "total_norm": None, "tensors": []}
    return msgspec.convert(usual | plain | {"images": [image | given for given in plain["images"]]}, Incident)


def skip(step: int = 30, reason: str = "nonfinite_gradient", **more: Any) -> dict[str, Any]:
    tensors = ["model.2.conv.weight", "model.4.conv.weight"]
    return {"event": "skip", "step": step, "reason": reason, "num_tensors": 20, "tensors": tensors, **more}


def spoiled(step: int) -> dict[str, Any]:
    """The columns of a run with one such step."""
    at = np.arange(NUM) == step
    return {"nonfinite": at.astype(int), "skipped": at}


def bad(where: str, **more: Any) -> dict[str, Any]:
    return {"where": where, "module": "model.6.m.0", "type": "Divide", "input_max": 8.0, "output_max": 9.0, **more}


def fp16(num: int, steps: list[int]) -> dict[str, Any]:
    at = np.isin(np.arange(num), steps)
    return {"skipped": at, "nonfinite": at.astype(int), "scale": 65536.0 * 0.5 ** np.cumsum(at)}


NAN_IMAGE = {"path": "nan.jpg", "nonfinite": 12, "bad_pixels": True}
HUGE_IMAGE = {"path": "huge.jpg", "min": 0.0, "max": 3e6, "bad_pixels": True}
BAD_BOX = {"path": "box.jpg", "max": 1.0, "bad_labels": True, "problems": ["box 2 has zero size"]}
INIT = {"event": "init", "step": 0, "tensors": [{"name": "model.3.conv.weight", "scale": 1000.0}]}
DEAD = {"event": "dead", "step": 80, "tensors": ["model.5.conv.weight"], "steps": 60}
HOT = {"ratio": 0.1, "growth": 12.0}
SPIKE = np.where(np.arange(NUM) == 90, 2500.0, 150.0 * np.random.default_rng(1).lognormal(sigma=0.1, size=NUM))
LEAP = np.where(np.arange(NUM) >= 180, 300.0, 150.0)  # at epoch 45, where the mosaic closes

# Kind: records whose first finding it must be, its severity there, and near misses that must not have it.
CASES: dict[str, tuple[Records, str, list[Records]]] = {
    "bad_images": (
        run(incidents=[incident(images=[NAN_IMAGE, BAD_BOX])], events=[skip()], columns=spoiled(30)),
        "error",
        [
            run(incidents=[incident(images=[{"path": "good.jpg", "max": 1.0}])], events=[skip()]),
            # a user's own range explains nothing
            run(incidents=[incident(images=[{"path": "a.jpg", "min": -2.7, "max": 3.1, "bad_pixels": True}])]),
        ],
    ),
    "bad_labels": (
        run(incidents=[incident(images=[BAD_BOX], first_bad=bad("loss"))], events=[skip()], columns=spoiled(30)),
        "error",
        # labels enter at the loss: what goes bad before it is not theirs
        [run(incidents=[incident(images=[BAD_BOX], first_bad=bad("forward"))], events=[skip()])],
    ),
    "module_fault": (
        run(incidents=[incident(first_bad=bad("forward"))], events=[skip()], columns=spoiled(30)),
        "error",
        [
            run(incidents=[incident(first_bad=bad("forward", input_max=1e20))], events=[skip()]),
            run(incidents=[incident(first_bad=bad("forward"), nonfinite_weights=["model.6.m.0.w"])], events=[skip()]),
            run(incidents=[incident(first_bad=bad("forward"), images=[NAN_IMAGE])], events=[skip()]),
            run(incidents=[incident(reason="spike", first_bad=bad("forward", what="amplified"))]),
        ],
    ),
    "bad_init": (run(events=[INIT]), "warning", [run(events=[INIT | {"tensors": []}])]),
    "dead_loss_component": (
        run(parts={"box": 0.0, "cls": 0.9, "l1": 0.1}, args={"box": 0.0}),
        "warning",
        [run(parts={"box": 1e-6, "cls": 0.9, "l1": 0.1}), run(parts={"box": 0.0})],
    ),
    "loss_imbalance": (
        run(parts={"box": 0.01, "cls": 0.985, "l1": 0.005}, args={"cls": 500.0}),
        "warning",
        [run(parts={"box": 0.02, "cls": 0.975, "l1": 0.005}), run(args={"cls": 5.0})],
    ),
    "exploding": (
        run(stages=dict.fromkeys(range(8, 11), 50000.0)),
        "warning",
        [run(stages=dict.fromkeys(range(5), 20.0)), run(stages={9: 5e4}, args={"model": "yolo26n.pt"})],
    ),
    "vanishing": (
        run(stages=dict.fromkeys(range(11), 1e-05)),
        "warning",
        [run(stages=dict.fromkeys(range(11), 0.02)), run(stages={3: 1e-5})],  # one stage is not the depth
    ),
    "lr_too_high": (
        lost(**HOT, args={"lr0": 0.3}),
        "error",
        [lost(ratio=5e-3), run(ratio=2e-2), run(growth=2.5, ratio=0.025)],
    ),
    "amp_overflow": (
        run(
            columns=fp16(NUM, [*range(8), *range(100, 190, 9)]),
            events=[skip(step, "scaler_overflow") for step in [*range(8), *range(100, 190, 9)]],
        ),
        "warning",
        [run(columns=fp16(NUM, [0, 1, 150]), events=[skip(step, "scaler_overflow") for step in (0, 1, 150)])],
    ),
    "amp_calibration": (
        run(columns=fp16(NUM, list(range(8))), events=[skip(step, "scaler_overflow") for step in range(8)]),
        "info",
        [run()],
    ),
    "nonfinite_weights": (
        run(
            incidents=[incident(nonfinite_weights=["model.0.conv.weight"])], events=[skip()], columns=spoiled(30),
            map50=None, outcome="running",
        ),
        "error",
        [run(incidents=[incident()], events=[skip()])],
    ),
    "nonfinite_loss": (
        run(
            incidents=[incident(loss=None, losses={"box": 3.0, "cls": None})], events=[skip()],
            columns=spoiled(30) | {"loss": [math.nan if i == 30 else 100.0 for i in range(NUM)]},
            map50=None, outcome="running",
        ),
        "error",
        [run(incidents=[incident()], events=[skip()], columns=spoiled(30))],
    ),
    "nonfinite_gradient": (
        run(events=[skip()], columns=spoiled(30), map50=None, outcome="running"),
        "error",
        [run(columns=fp16(NUM, [0, 1]), events=[skip(0, "scaler_overflow"), skip(1, "scaler_overflow")])],
    ),
    "loss_blowup": (lost("blowup"), "error", [run(loss=SPIKE)]),
    "silent_collapse": (lost(), "error", [run(loss=np.geomspace(200, 1, NUM))]),
    "dead_layer": (run(events=[DEAD]), "warning", [run(events=[DEAD], args={"freeze": 6})]),
    "stalled": (run(loss=np.full(NUM, 190.0), map50=0.0), "warning", [run(num=80, map50=0.0), run(map50=0.002)]),
    "loss_spike": (run(loss=SPIKE), "warning", [run(loss=np.where(np.arange(NUM) == 90, 400.0, 150.0))]),
    "benign_jump": (run(loss=LEAP), "info", [run(loss=LEAP, args={"close_mosaic": 0})]),
    "always_clipped": (run(clip=0.02), "info", [run(columns={"clip_coef": np.where(np.arange(NUM) < 90, 0.1, 1.0)})]),
}  # fmt: skip


def kinds(records: Records, *severities: str) -> list[str]:
    return [finding.kind for finding in diagnose(records) if not severities or finding.severity in severities]


def the(kind: str, records: Records) -> Finding:
    (found,) = (finding for finding in diagnose(records) if finding.kind == kind)
    return found


def test_a_healthy_run_has_nothing() -> None:
    assert diagnose(run()) == []


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize("kind", CASES)
def test_a_fault_is_named_first(kind: str) -> None:
    records, severity, _ = CASES[kind]
    first = diagnose(records)[0]
    assert (first.kind, first.severity) == (kind, severity)


@pytest.mark.parametrize("kind", CASES)
def test_a_near_miss_is_not_named(kind: str) -> None:
    for i, records in enumerate(CASES[kind][2]):
        assert kind not in kinds(records, "error", "warning"), i


def everything() -> list[Finding]:
    extra = [
        lost(**HOT, args={"lr0": 0.3, "momentum": 0.99}),
        lost(**HOT, args={"warmup_epochs": 0.0}, config={"clip": {"policy": "none"}}),
        run(events=[skip() | {"event": "nonfinite"}], columns=spoiled(30)),
        run(parts={"box": 0.99, "cls": 0.005, "l1": 0.005}),
        run(parts={"box": 0.99, "odd": 0.0}),
        run(clip=0.02, config={"clip": {"policy": "agc"}}),
        run(ratio=0.02, loss=np.full(NUM, 190.0), map50=0.0),
    ]
    return [finding for records in [*(case[0] for case in CASES.values()), *extra] for finding in diagnose(records)]


def test_every_advice_is_a_sentence_naming_keys_that_exist_with_values_they_take() -> None:
    from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg

    for finding in everything():
        advice = finding.advice
        assert advice.endswith(".") and ". " not in advice, advice
        pairs = re.findall(r"([a-z_0-9.]+)=(\[[^\]]*\]|\S*[^\s.,;:])", advice)
        assert pairs, advice
        for key, value in pairs:
            if key in DEFAULT_CFG_DICT:
                assert get_cfg(DEFAULT_CFG_DICT, {key: yaml.safe_load(value)})
            else:
                assert key in config_keys(), advice
                load_config({key: value if re.match("[a-z]", value) else float(value)})


def test_findings_are_strict_json_and_print_with_evidence() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = everything()
    json.loads(msgspec.json.encode(found), parse_constant=refuse)
    assert msgspec.json.decode(msgspec.json.encode(found), type=list[Finding]) == found
    for finding in found:
        assert finding.evidence, finding.kind
        assert finding.text().startswith(f"{finding.severity}: {finding.kind}")
    text = the("lr_too_high", lost(**HOT, args={"lr0": 0.3})).text()
    assert "  update over weight of the median stage, highest: 0.1 (threshold 0.01)\n" in text
    assert text.endswith("  advice: Lower the rate of 0.3 to lr0=0.009, or bound the update with update_clip=0.03.")


def test_the_default_gains_are_the_hosts() -> None:
    from ultralytics.cfg import DEFAULT_CFG_DICT

    assert {name: DEFAULT_CFG_DICT[name] for name in GAINS} == GAINS


def test_it_is_a_pure_function() -> None:
    records = CASES["lr_too_high"][0]
    before = records.steps.clone(), records.layers.clone(), msgspec.json.encode(records.events)
    assert diagnose(records) == diagnose(records)
    assert before[0].equals(records.steps) and before[1].equals(records.layers)
    assert before[2] == msgspec.json.encode(records.events)


# What comes first ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["collapse", "blowup", "nonfinite"])
def test_the_rate_stands_before_what_it_did(kind: str) -> None:
    symptom = {"collapse": "silent_collapse", "blowup": "loss_blowup", "nonfinite": "nonfinite_loss"}[kind]
    found = kinds(lost(kind, **HOT), "error")
    assert found[:2] == ["lr_too_high", symptom]


@pytest.mark.parametrize(
    ("more", "first"),
    [
        ({"incidents": [incident(60, "collapse", images=[NAN_IMAGE])]}, "bad_images"),
        ({"events": [INIT]}, "bad_init"),
        ({"parts": {"box": 0.01, "cls": 0.985, "l1": 0.005}, "args": {"cls": 500.0}}, "loss_imbalance"),
        ({"stages": dict.fromkeys(range(11), 1e-05)}, "vanishing"),
        # ...but not what a batch holds that was captured only because the run was lost, nor what came after
        ({"incidents": [incident(60, "collapse", images=[BAD_BOX])]}, "lr_too_high"),
        ({"incidents": [incident(150, images=[NAN_IMAGE])]}, "lr_too_high"),
        ({"incidents": [incident(150, first_bad=bad("forward"))]}, "lr_too_high"),
    ],
)  # fmt: skip
def test_the_root_cause_of_a_lost_run_is_its_first_error(more: dict[str, Any], first: str) -> None:
    found = diagnose(lost(**HOT, **more))
    assert (found[0].kind, found[0].severity) == (first, "error")
    assert {"lr_too_high", "silent_collapse"} <= {finding.kind for finding in found}


def test_only_an_incident_that_was_kept_is_to_be_replayed() -> None:
    kept, other = (diagnose(run(incidents=[incident(step)], events=[skip()], columns=spoiled(30))) for step in (30, 3))
    assert "on incidents/30" in next(f for f in kept if f.kind == "nonfinite_gradient").advice
    assert "incidents/" not in next(f for f in other if f.kind == "nonfinite_gradient").advice


def test_bad_pixels_are_no_problem_of_a_label() -> None:
    problems = ["3 pixels are not finite", "pixels from -2 to 2.5, normal is 0 to 1", "class 7 of 3"]
    image = {"path": "a.jpg", "problems": problems, "bad_labels": True, "bad_pixels": True}
    found = diagnose(run(incidents=[incident(images=[image], first_bad=bad("loss"))], events=[skip()]))
    labels = next(finding for finding in found if finding.kind == "bad_labels")
    assert [m.value for name, m in labels.evidence.items() if name.startswith("problem")] == ["a.jpg: class 7 of 3"]


def test_symptoms_stand_in_the_order_they_came() -> None:
    loss, norm = np.full(NUM, 200.0), np.full(NUM, 700.0)
    loss[60:70], norm[60:70] = 3e4, 7e6
    loss[70:], norm[70:] = 1e-8, 1e-5
    records = run(loss=loss, norm=norm, map50=0.0, outcome="diverged", divergence="blowup")
    found = [(finding.kind, finding.step) for finding in diagnose(records) if finding.severity == "error"]
    assert found == [("loss_blowup", 60), ("silent_collapse", 72)]


def test_a_rate_that_an_early_warning_lowered_is_a_warning_and_no_loss() -> None:
    back = {"event": "rollback", "step": 13, "kind": "running_var", "reason": "a variance grew", "to_step": 0}
    found = diagnose(run(events=[back | {"lr_factor": 0.125, "rollbacks": 1}]))
    assert [(f.kind, f.severity) for f in found if f.severity != "info"] == [("lr_too_high", "warning")]
    assert "before the run was lost" in found[0].message
    assert found[0].advice.startswith("Set lr0=0.0013, the rate at which the run went on")


def test_a_run_that_was_given_a_clip_when_it_went_back_is_advised_to_have_one() -> None:
    back = {"event": "rollback", "step": 13, "kind": "running_var", "to_step": 0, "lr_factor": 0.5, "clip": "norm"}
    found = diagnose(run(events=[back | {"reason": "a variance grew", "rollbacks": 1}]))
    expected = "Set clip=norm and lr0=0.005, with which the run went on after its last rollback."
    assert (found[0].kind, found[0].advice) == ("lr_too_high", expected)


def test_a_run_that_its_bound_alone_holds_together_is_told_to_have_a_clip() -> None:
    warning = {"event": "warning", "step": 9, "kind": "unbounded_ratio", "layer": None, "value": 65.1, "limit": 0.3}
    back = {"event": "rollback", "step": 10, "kind": "unbounded_ratio", "reason": "", "to_step": 0, "lr_factor": 0.5}
    config = {"clip": {"policy": "none"}, "update_clip": {"max_ratio": 0.03}}
    watched = the("lr_too_high", run(events=[warning], config=config))
    guarded = the("lr_too_high", run(events=[warning, back | {"clip": "norm"}], config=config))
    for finding in (watched, guarded):
        assert finding.severity == "warning"
        assert finding.message.startswith("update_clip alone holds the weights together")
        assert finding.evidence["update over weight of the median stage, without update_clip"] == Measured(65.1, 0.3)
    assert watched.advice.endswith("or clip the gradient with clip=norm.")
    assert guarded.advice == "Set clip=norm and lr0=0.005, with which the run went on after its last rollback."
    other = the("lr_too_high", run(events=[warning | {"kind": "update_ratio"}, back | {"kind": "update_ratio"}]))
    assert "update_clip alone" not in other.message


def test_a_run_that_was_saved_has_warnings_that_still_name_the_cause() -> None:
    loss = np.where((np.arange(NUM) >= 60) & (np.arange(NUM) < 64), 3e4, 150.0)
    events = [
        {"event": "divergence", "step": 60, "kind": "blowup", "reason": "", "action": "rollback"},
        {"event": "rollback", "step": 60, "kind": "blowup", "reason": "", "to_step": 40, "lr_factor": 0.25},
    ]
    records = run(loss=loss, events=events, **HOT, args={"lr0": 0.3})
    found = diagnose(records)
    assert [(f.kind, f.severity) for f in found if f.severity != "info"] == [
        ("lr_too_high", "warning"), ("loss_blowup", "warning"),
    ]  # fmt: skip
    assert found[1].message == "the run was lost at step 60 and was saved by a rollback"
    assert "lr0=0.075" in found[0].advice  # 0.3 x 0.25
    lost_again = msgspec.structs.replace(records, map50=0.0, status=Status(outcome="completed", divergence="blowup"))
    assert kinds(lost_again, "error")[:2] == ["lr_too_high", "loss_blowup"]


def test_a_run_without_map_that_ended_well_has_a_warning_for_a_step_that_was_left_out() -> None:
    """As of classify: its records say whether it was lost."""
    events = {"events": [skip(30)], "columns": spoiled(30)}
    for map50 in (0.3, None):
        assert [f.severity for f in diagnose(run(**events, map50=map50)) if f.kind == "nonfinite_gradient"] == [
            "warning"
        ]
    lost = run(**events, map50=None, loss=np.where(np.arange(NUM) > 100, 1e5, 200.0))
    assert "loss_blowup" in kinds(lost, "error")


# Single rules --------------------------------------------------------------------------------------------------------


def test_what_was_noticed_in_a_batch_before_any_trouble_explains_only_a_loss_that_it_hurt() -> None:
    wrong = incident(30, "input", images=[BAD_BOX])
    assert [f.severity for f in diagnose(run(incidents=[wrong | {"loss": 150.0}]))] == ["warning"]
    unhurt, hurt = (lost("blowup", incidents=[wrong | {"loss": loss}]) for loss in (250.0, 5e3))
    assert kinds(unhurt, "error")[0] == "loss_blowup"
    assert "bad_labels" in kinds(unhurt, "warning")
    assert kinds(hurt, "error")[:2] == ["bad_labels", "loss_blowup"]
    pixels = incident(0, "input", images=[{"path": "a.jpg", "min": 0.0, "max": 255.0, "bad_pixels": True}])
    assert kinds(run(incidents=[pixels])) == ["bad_images"]
    assert kinds(lost(**HOT, incidents=[pixels]))[:2] == ["lr_too_high", "silent_collapse"]


def test_the_first_step_of_a_warm_up_does_not_blame_the_rate() -> None:
    """It moves biases alone, by a rate of their own, and in an adaptive optimizer by as much as any."""
    early = run(events=[skip(7)], columns=spoiled(7), args={"optimizer": "AdamW"}, outcome="running", map50=None)
    first_ratio = pl.when(pl.col("step") == 0).then(0.09).otherwise(pl.col("update_ratio"))
    early = msgspec.structs.replace(early, layers=early.layers.with_columns(update_ratio=first_ratio))
    assert kinds(early) == ["nonfinite_gradient"]
    without = msgspec.structs.replace(early, args=early.args | {"warmup_epochs": 0.0})
    assert kinds(without)[0] == "lr_too_high"


def test_a_gradient_that_the_scale_makes_overflow_is_no_fault_of_a_module() -> None:
    steps = list(range(20))
    where = bad("backward", module=None, type="SubBackward0", input_max=2.9e5)
    events = [skip(step, "scaler_overflow") for step in steps]
    records = run(columns=fp16(NUM, steps), events=events, incidents=[incident(19, "nonfinite", first_bad=where)])
    assert kinds(records) == ["amp_overflow"]
    small = bad("backward", module=None, type="SubBackward0", input_max=8.0)
    records = msgspec.structs.replace(records, incidents=[captured(incident(19, first_bad=small))])
    assert kinds(records)[0] == "module_fault"


def test_steps_that_were_taken_back_are_not_the_runs() -> None:
    loss = np.where(np.arange(NUM) == 12, 3000.0, 200.0)
    back = {"event": "rollback", "step": 15, "to_step": 0, "kind": "weight_growth", "lr_factor": 0.5}
    assert "silent_collapse" in kinds(run(loss=loss, map50=0.0), "error")
    found = run(loss=loss, map50=0.0, events=[back])
    assert kinds(found, "error") == []
    assert kinds(found)[0] == "lr_too_high"


def test_an_early_warning_explains_a_run_that_learned_nothing() -> None:
    warning = {"event": "warning", "step": 8, "kind": "weight_growth"}
    severities = {
        map50: the("lr_too_high", run(ratio=0.02, map50=map50, events=[warning])).severity for map50 in (0.0, 0.3)
    }
    assert severities == {0.0: "warning", 0.3: "info"}
    assert the("lr_too_high", run(map50=0.0, events=[warning])).severity == "info"  # its updates were calm


def test_layers_that_are_expected_to_be_without_gradient_stand_last() -> None:
    loss = np.where(np.arange(NUM) == 90, 1000.0, SPIKE.clip(max=300))
    expected = DEAD | {"tensors": ["model.23.cv2.0.0.conv.weight"]}
    assert kinds(run(loss=loss, events=[expected], clip=0.02)) == ["loss_spike", "always_clipped", "dead_layer"]


def test_an_operation_between_modules_can_be_at_fault() -> None:
    where = {"where": "forward", "note": "in an operation between modules, before model.5.conv"}
    first = diagnose(run(incidents=[incident(first_bad=where)], events=[skip()], columns=spoiled(30)))[0]
    assert (first.kind, first.where) == ("module_fault", where["note"])
    assert first.message == "an operation between modules turns sound values into NaN or inf"


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_values_that_overflow_at_the_very_first_step_have_exploded(where: str) -> None:
    def first(step: int, largest: float) -> Finding:
        kept = incident(step, first_bad=bad(where, input_max=largest))
        return diagnose(run(incidents=[kept], events=[skip(step)], columns=spoiled(step)))[0]

    assert first(0, 1e28).kind == "exploding"
    assert first(0, 1e28).where == "model.6.m.0"
    assert first(0, 8.0).kind != "exploding"
    assert first(30, 1e28).kind != "exploding"  # weights may have grown by then


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"momentum": 0.99, "warmup_epochs": 0.0}, "Set momentum=0.937: with 0.99 a step is 100 gradients."),
        ({"warmup_epochs": 0.0}, "Set warmup_epochs=3.0"),
        ({"warmup_epochs": 0.0, "lr0": 1.0}, "Lower the rate of 1 to lr0=0.03"),
        ({"lr0": 0.01}, "lr0=0.0003"),
    ],
)  # fmt: skip
def test_the_advice_on_the_rate_names_what_made_the_step_large(args: dict[str, Any], words: str) -> None:
    assert words in the("lr_too_high", lost(**HOT, args=args)).advice


def test_without_records_of_layers_the_rate_is_judged_by_what_it_is() -> None:
    nothing = pl.DataFrame(schema=LAYER_SCHEMA)
    high = msgspec.structs.replace(lost(args={"lr0": 0.1}), layers=nothing)
    assert kinds(high)[0] == "lr_too_high"
    usual = msgspec.structs.replace(lost(args={"lr0": 0.03}), layers=nothing)
    assert kinds(usual)[0] == "silent_collapse"
    adam = msgspec.structs.replace(lost(args={"lr0": 0.1, "optimizer": "AdamW"}), layers=nothing)
    assert kinds(adam)[0] == "silent_collapse"


def test_updates_after_the_end_are_no_evidence() -> None:
    records = lost()
    late = pl.when(pl.col("step") > 60).then(0.5).otherwise(pl.col("update_ratio"))
    changed = msgspec.structs.replace(records, layers=records.layers.with_columns(update_ratio=late))
    assert kinds(changed)[0] == "silent_collapse"


def test_weights_that_grew_are_a_hint_in_a_run_that_lived() -> None:
    assert [f.severity for f in diagnose(run(growth=4.0, ratio=0.07, columns=None)) if f.kind == "lr_too_high"] == [
        "warning"  # by its updates
    ]
    records = run(growth=4.0)
    one = pl.when(pl.col("layer") == "model.0", pl.col("step") > 0).then(0.1).otherwise(pl.col("update_ratio"))
    hint = msgspec.structs.replace(records, layers=records.layers.with_columns(update_ratio=one))
    assert the("lr_too_high", hint).severity == "info"
    assert the("lr_too_high", hint).where == "model.0"
    calm = msgspec.structs.replace(hint, args=hint.args | {"optimizer": "AdamW"})
    assert "lr_too_high" not in kinds(calm)


def test_a_loss_far_off_at_the_first_step_is_an_explosion_where_nothing_else_is() -> None:
    loss = np.full(NUM, 5e8)
    assert "exploding" in kinds(run(loss=loss))
    assert "exploding" not in kinds(run(loss=loss / 1e3))  # a gain of 1000 makes as much


def changed(records: Records, layer: str, at: int, **columns: float) -> Records:
    """The same, with other values of one stage from a step on."""
    here = (pl.col("layer") == layer) & (pl.col("step") >= at)
    values = {name: pl.when(here).then(value).otherwise(pl.col(name)) for name, value in columns.items()}
    return msgspec.structs.replace(records, layers=records.layers.with_columns(**values))


def test_thresholds_of_the_rate_from_both_sides() -> None:
    def severities(records: Records) -> list[str]:
        return [found.severity for found in diagnose(records) if found.kind == "lr_too_high"]

    for ratio, expected in ((0.29, []), (0.31, ["error"])):  # of one stage, in a run that was lost
        assert severities(changed(lost(), "model.3", 20, update_ratio=ratio)) == expected
    for ratio, expected in ((0.009, []), (0.011, ["error"])):  # of the median stage
        assert severities(lost(ratio=ratio)) == expected
    for ratio, expected in ((0.029, []), (0.031, ["warning"])):  # the same in a run that was not
        assert severities(run(ratio=ratio)) == expected
    for growth, expected in ((2.9, []), (3.1, ["info"]), (9.9, ["info"]), (10.1, ["warning"])):
        grown = changed(run(), "model.3", 90, weight_norm=8.0 * growth, update_ratio=0.07)
        assert severities(changed(grown, "model.4", 10, update_ratio=0.061)) == expected
        assert severities(changed(run(), "model.3", 10, weight_norm=8.0 * growth, update_ratio=0.059)) == []
        assert severities(changed(run(), "model.3", 110, weight_norm=8.0 * growth, update_ratio=0.07)) == []  # late
    # The rate falls to half of its height at about step 110; what moves then is no longer the peak.
    assert severities(changed(lost(), "model.3", 120, update_ratio=0.9)) == []
    assert severities(changed(run(growth=4.0), "model.3", 120, update_ratio=0.07)) == []
    assert severities(changed(run(growth=4.0), "model.3", 90, update_ratio=0.07)) == ["info"]
    assert severities(run(args={"momentum": 0.98})) == []
    assert severities(run(args={"momentum": 0.999})) == ["info"]
    assert "momentum=0.937" in the("lr_too_high", run(args={"momentum": 0.999})).advice


@pytest.mark.parametrize(("lr0", "key"), [(0.09, "warmup_epochs=3.0"), (0.11, "lr0=")])
def test_a_missing_warmup_is_blamed_only_where_one_would_help(lr0: float, key: str) -> None:
    assert key in the("lr_too_high", lost(**HOT, args={"warmup_epochs": 0.0, "lr0": lr0})).advice


def test_what_counts_as_sound_input_depends_on_the_precision() -> None:
    for reason, most in (("nonfinite_gradient", 1e6), ("scaler_overflow", 1e3)):
        for factor, expected in ((0.9, True), (1.1, False)):
            first = bad("forward", input_max=factor * most)
            found = kinds(run(incidents=[incident(reason=reason, first_bad=first)], events=[skip(30, reason)]))
            assert ("module_fault" in found) == expected, (reason, factor)
    for ratio, expected in ((900.0, False), (1100.0, True)):
        first = bad("forward", what="amplified", input_max=2.0, output_max=2 * ratio)
        assert (
            "module_fault" in kinds(lost("blowup", incidents=[incident(60, "blowup", first_bad=first)]))
        ) == expected


def test_the_first_loss_and_the_profile_from_both_sides() -> None:
    assert "exploding" not in kinds(run(loss=np.full(NUM, 9e5)))
    assert "exploding" in kinds(run(loss=np.full(NUM, 1.1e6)))
    records = run()
    base = dict(records.layers.filter(pl.col("step") == 0).select("layer", "grad_norm").iter_rows())
    largest = max(base[f"model.{i}"] for i in range(11)) / base["model.23"]
    for factor, expected in ((900.0, False), (1100.0, True)):
        assert ("exploding" in kinds(run(stages={0: factor / largest}))) == expected
    middle = float(np.median([base[f"model.{i}"] for i in range(11)])) / base["model.23"]
    for factor, expected in ((1 / 900, False), (1 / 1100, True)):
        assert ("vanishing" in kinds(run(stages=dict.fromkeys(range(11), factor / middle)))) == expected
    few = records.layers.filter(pl.col("layer").is_in(["model.0", "model.1", "model.2", "model.23"]))
    short = msgspec.structs.replace(records, layers=few.with_columns(grad_norm=pl.lit(1e-9)))
    assert kinds(changed(short, "model.23", 0, grad_norm=1.0)) == []  # three stages are no depth
    assert the("exploding", run(stages={0: 1e6})).evidence["slope of ln gradient per stage"].threshold == -0.2


def test_the_slope_over_depth_is_that_of_the_records() -> None:
    found = the("exploding", CASES["exploding"][0])
    assert found.where == "model.8"
    slopes = [-0.2] * 28 + [-0.2] * 3 + [-0.2 + math.log(5e4) / (j - i) for i in range(8) for j in range(8, 11)]
    assert found.evidence["slope of ln gradient per stage"].value == pytest.approx(np.median(slopes))


def test_expected_dead_tensors_are_told_apart() -> None:
    def event(*tensors: str, **more: Any) -> dict[str, Any]:
        return DEAD | {"tensors": list(tensors)} | more

    assert kinds(run(events=[event("model.23.dfl.conv.weight")])) == []
    boxes = the("dead_layer", run(events=[event("model.23.cv2.0.0.conv.weight")]))
    assert (boxes.severity, boxes.where) == ("info", "model.23.cv2.0.0.conv.weight")
    assert boxes.advice.startswith("There is nothing to do; ") and "freeze" not in boxes.advice
    assert the("dead_layer", run(events=[event("model.23.cv3.0.0.conv.weight")])).severity == "warning"
    after = lost(events=[event("model.5.conv.weight", step=150, steps=60)])
    assert the("dead_layer", after).severity == "info"
    silent = run()
    layers = silent.layers.with_columns(
        grad_norm=pl.when(pl.col("layer") == "model.7").then(0.0).otherwise(pl.col("grad_norm"))
    )
    silent = msgspec.structs.replace(silent, layers=layers)
    assert the("dead_layer", silent).where == "model.7"
    assert "freeze=[7]" in the("dead_layer", silent).advice
    # A tensor is not its stage, and what is distilled into another model has no stage at all.
    others = event("model.5.conv.weight", "model.23.cv3.0.2.bias", "projector.0.0.weight")
    for records, freeze in ((run(events=[others]), ""), (msgspec.structs.replace(silent, events=[others]), "[7]")):
        found = the("dead_layer", records)
        assert "projector.0.0.weight" in (found.where or "")
        assert found.advice.endswith(f", or do not train them, with freeze={freeze}." if freeze else ".yaml.")
    silent = msgspec.structs.replace(silent, events=[])
    assert kinds(msgspec.structs.replace(silent, args=silent.args | {"freeze": [7]})) == []


def test_what_is_not_finite_is_named_by_tensor_component_and_batch() -> None:
    gradient = the("nonfinite_gradient", CASES["nonfinite_gradient"][0])
    assert (gradient.step, gradient.where) == (30, "model.4.conv.weight")  # the last: nearest the origin
    assert gradient.evidence["batch"].value == 30
    assert the("nonfinite_loss", CASES["nonfinite_loss"][0]).where == "cls"
    assert the("nonfinite_weights", CASES["nonfinite_weights"][0]).where == "model.0.conv.weight"
    images = the("bad_images", CASES["bad_images"][0])
    assert (images.where, images.evidence["pixels that are not finite"].value) == ("nan.jpg", 12)
    labels = the("bad_labels", CASES["bad_labels"][0])
    assert labels.evidence["problem 1"].value == "box.jpg: box 2 has zero size"
    module = the("module_fault", CASES["module_fault"][0])
    assert (module.where, "(Divide)" in module.message) == ("model.6.m.0", True)
    between = run(incidents=[incident(first_bad=bad("forward", module=None, type="sqrt"))], events=[skip()])
    assert "the operation sqrt between modules" in the("module_fault", between).message
    applied = run(events=[skip() | {"event": "nonfinite"}], columns=spoiled(30))
    assert the("nonfinite_gradient", applied).advice.startswith("Set guard.nonfinite=skip")


def test_huge_pixels_and_labels_at_a_spike_that_healed_are_warnings() -> None:
    for image, kind in ((HUGE_IMAGE, "bad_images"), (BAD_BOX, "bad_labels")):
        healed = run(incidents=[incident(90, "spike", images=[image])], loss=SPIKE)
        assert (diagnose(healed)[0].kind, diagnose(healed)[0].severity) == (kind, "warning")
        found = lost(incidents=[incident(60, "nonfinite_gradient", images=[image])])
        assert (diagnose(found)[0].kind, diagnose(found)[0].severity) == (kind, "error")


def test_an_amplifying_module_is_one_only_where_nothing_else_explains_it() -> None:
    amplified = incident(60, "blowup", first_bad=bad("forward", what="amplified", input_max=5.0, output_max=1e9))
    assert kinds(lost("blowup", incidents=[amplified]), "error")[0] == "module_fault"
    assert "module_fault" not in kinds(lost("blowup", incidents=[amplified], **HOT))
    assert "module_fault" not in kinds(lost("blowup", incidents=[amplified], events=[INIT]))


def test_a_scaler_that_never_finds_its_scale() -> None:
    def skips(steps: list[int]) -> Records:
        events = [skip(step, "scaler_overflow") for step in steps]
        return run(num=60, columns=fp16(60, steps), events=events, map50=None, outcome="running")

    assert kinds(skips([*range(10, 30)]))[0] == "amp_overflow"  # 20 in a row
    assert kinds(skips([*range(1, 35, 2)]))[0] == "amp_overflow"  # a scale of 65536 / 2 ** 17
    assert kinds(skips([*range(0, 32, 2)])) == ["amp_calibration"]


def test_a_scaler_leaves_steps_out_with_the_guard_off_too() -> None:
    steps = [*range(100, 190, 3)]
    events = [skip(step, "scaler_overflow") | {"event": "nonfinite"} for step in steps]
    assert kinds(run(columns=fp16(NUM, steps), events=events))[0] == "amp_overflow"


def test_thresholds_of_precision_from_both_sides() -> None:
    def first(steps: list[int], num: int = 300) -> str:
        events = [skip(step, "scaler_overflow") for step in steps]
        columns = fp16(num, steps) | {"scale": np.full(num, 65536.0)}  # it grew again in between
        return next(kind for kind in kinds(run(num=num, columns=columns, events=events)) if kind.startswith("amp"))

    assert first([*range(100, 290, 19)]) == "amp_calibration"  # 10 of 200 are 5 %
    assert first([*range(100, 290, 18)]) == "amp_overflow"  # 11
    assert first([*range(80, 100)][1:]) == "amp_calibration"  # 19 in a row, and early
    assert first([*range(0, 98, 2)]) == "amp_calibration"
    assert first([100, 102], num=130) == "amp_calibration"  # two are no rule, although 7 %
    assert first([100, 102, 104], num=130) == "amp_overflow"


def test_thresholds_of_the_loss_components_from_both_sides() -> None:
    for gain, expected in ((0.5 * 9.9, False), (0.5 * 10.1, True)):
        parts = {"box": 0.3, "cls": 0.6, "l1": 0.1}
        assert ("loss_imbalance" in kinds(run(parts=parts, args={"cls": gain}))) == expected
    for share, expected in ((0.975, False), (0.985, True)):
        assert ("loss_imbalance" in kinds(run(parts={"box": share, "cls": 1 - share}))) == expected
    for until, expected in ((0.49, False), (0.51, True)):  # of the steps
        carried = np.where(np.arange(NUM) < until * NUM, 0.99, 0.5)
        assert ("loss_imbalance" in kinds(run(parts={"box": carried, "cls": 1 - carried}))) == expected
        coef = np.where(np.arange(NUM) < until * NUM, 0.1, 1.0)
        assert ("always_clipped" in kinds(run(columns={"clip_coef": coef}))) == expected
    assert "lower" in the("loss_imbalance", run(parts={"box": 0.99, "cls": 0.01})).advice.lower()


def test_thresholds_of_spikes_from_both_sides() -> None:
    level = 150.0 * np.random.default_rng(1).lognormal(sigma=0.05, size=NUM)

    def spiked(ratio: float, *, noise: float = 0.05, after: float = 1.0) -> list[str]:
        loss = 150.0 * np.random.default_rng(1).lognormal(sigma=noise, size=NUM)
        loss[90] = ratio * np.median(loss[70:90])
        loss[91:] *= after
        return [found.severity for found in diagnose(run(loss=loss)) if found.kind == "loss_spike"]

    assert level.std() < 10
    assert [spiked(ratio) for ratio in (2.9, 3.1, 9.9, 10.1)] == [[], ["info"], ["info"], ["warning"]]
    assert spiked(4.0, noise=0.5) == []  # no more than others there
    assert (spiked(8.0, after=1.35), spiked(8.0, after=1.65)) == (["info"], [])  # it did not come back


def test_a_jump_must_stand_out_of_the_noise() -> None:
    def jumps(noise: float, ratio: float) -> bool:
        loss = 150.0 * np.random.default_rng(2).lognormal(sigma=noise, size=NUM)
        loss[180:] *= ratio
        return "benign_jump" in kinds(run(loss=loss))

    assert [jumps(0.05, ratio) for ratio in (1.4, 1.6)] == [False, True]
    assert [jumps(0.4, ratio) for ratio in (1.7, 4.0)] == [False, True]


def test_the_least_that_is_needed_to_say_something() -> None:
    assert [kinds(run(num=num, map50=0.0)) for num in (99, 100)] == [[], ["stalled"]]
    dead = run(num=60)
    for num, expected in ((50, []), (70, ["dead_layer"])):  # looks up to step 40, and up to 60
        records = changed(run(num=num), "model.7", 0, grad_norm=0.0)
        assert kinds(records) == expected
    assert kinds(dead) == []
    tensors = [{"name": f"model.{i}.conv.weight", "scale": 1e3} for i in range(7)]
    assert (the("bad_init", run(events=[INIT | {"tensors": tensors}])).where or "").endswith(" and 2 more")
    huge = the("bad_images", run(incidents=[incident(90, "spike", images=[HUGE_IMAGE])]))
    assert huge.evidence["largest pixel"] == Measured(3e6, 100.0)


def test_the_effective_rate_of_clipped_steps_by_hand() -> None:
    found = the("always_clipped", run(clip=0.02))
    assert found.evidence["effective lr after clipping"].value == pytest.approx(0.01 * 0.02)
    assert found.evidence["share of steps clipped"].value == 1.0
    left_out = np.arange(NUM) % 10 == 9  # which are recorded as not clipped
    columns = {"skipped": left_out, "clip_coef": np.where(left_out, 1.0, 0.02)}
    found = the("always_clipped", run(clip=0.02, columns=columns))
    assert found.evidence["effective lr after clipping"].value == pytest.approx(0.01 * 0.02)


def test_the_effective_rate_is_of_steps_that_lasted_and_counts_backoffs() -> None:
    """Clipped to a half up to step 99, then to a tenth; step 119 went back to 80, from which on the rate is half."""
    step = np.arange(NUM)
    columns = {"lr": np.where(step < 120, 0.01, 0.005), "clip_coef": np.where(step < 100, 0.5, 0.1)}
    event = {"event": "rollback", "step": 119, "kind": "weight_growth", "to_step": 80, "lr_factor": 0.5, "reason": ""}
    made = [0.01 * (0.5 if i < 80 else 0.1 * 0.5) for i in range(NUM) if not 80 <= i <= 119]
    for kind, records in (
        ("always_clipped", run(columns=columns, events=[event])),
        ("lr_too_high", run(columns=columns, events=[event])),
        ("stalled", run(columns=columns, events=[event], map50=0.0)),
    ):
        effective = the(kind, records).evidence["effective lr after clipping"].value
        assert effective == pytest.approx(sum(made) / len(made))


def test_a_clip_that_the_guard_gave_is_named_and_not_advised_against() -> None:
    back = {"event": "rollback", "step": 13, "kind": "running_var", "to_step": 0, "lr_factor": 0.5, "reason": ""}
    records = run(clip=0.02, events=[back | {"clip": "norm"}], config={"clip": {"policy": "none"}})
    found = the("always_clipped", records)
    assert found.evidence["clipped since the rollback at step"] == Measured(13)
    assert "clip=none" not in found.advice and "clip=norm is what the guard gave the run" in found.advice
    plain = the("always_clipped", run(clip=0.02, config={"clip": {"policy": "agc"}}))
    assert "clip=none shows what is cut off" in plain.advice
    assert "clipped since the rollback at step" not in plain.evidence


def test_a_rate_is_not_raised_beyond_the_hosts_limit_nor_where_the_guard_lowered_it() -> None:
    def advice(lr0: float, **event: Any) -> str:
        usual = {"event": "rollback", "step": 13, "to_step": 0, "reason": ""}
        return the("stalled", run(map50=0.0, args={"lr0": lr0}, events=[usual | event] if event else [])).advice

    longer = "Train for longer than epochs=50"
    assert advice(0.6) == f"{longer}, or raise the rate to lr0=1."
    assert advice(1.0) == f"{longer}."
    assert advice(0.1, kind="weight_growth", lr_factor=0.5) == f"{longer}."


def test_a_long_run_that_learned_nothing_is_an_error() -> None:
    long = run(num=1200, map50=0.0)
    assert (the("stalled", long).severity, kinds(long)[0]) == ("error", "stalled")
    assert the("stalled", run(map50=0.0)).severity == "info"  # short, and its loss fell
    assert "lr0=0.03" in the("stalled", run(map50=0.0)).advice
    assert "stalled" not in kinds(run(map50=None)) + kinds(run(map50=0.0, outcome="interrupted"))


def test_jumps_are_explained_by_what_changed() -> None:
    grown = np.where(np.arange(NUM) < 100, 700.0, 2800.0)
    images = np.where(np.arange(NUM) < 100, 16, 64)
    found = the("benign_jump", run(norm=grown, columns={"images": images}))
    assert (found.step, found.where, "nbs=64" in found.advice) == (100, "total_norm", True)
    assert kinds(run(norm=grown)) == []
    again = {"attempt": (np.arange(NUM) >= 100).astype(int)}
    assert "began the epoch again" in the("benign_jump", run(norm=grown, columns=again)).message
    falling = np.where(np.arange(NUM) < 12, 400.0, 150.0)
    assert kinds(run(loss=falling)) == []  # at the end of the warm-up, as from the start on
    rising = np.where(np.arange(NUM) < 12, 150.0, 240.0)
    assert "warmup_epochs=3" in the("benign_jump", run(loss=rising)).advice


def test_spikes_of_the_gradient_alone_and_early_warnings_are_told() -> None:
    spike = {"event": "spike", "step": 70, "total_norm": 9e4, "z": 9.0, "action": "clip"}
    assert the("loss_spike", run(events=[spike])).severity == "info"
    warning = {"event": "warning", "step": 20, "kind": "weight_growth", "layer": "model.0", "value": 9, "limit": 5}
    found = the("lr_too_high", run(events=[warning]))
    assert (found.severity, found.evidence["early warnings"].value) == ("info", "weight_growth at step 20")


def test_records_that_are_empty_or_short_are_no_reason_to_fail() -> None:
    empty = Records(steps=pl.DataFrame(schema=STEP_SCHEMA), layers=pl.DataFrame(schema=LAYER_SCHEMA))
    assert diagnose(empty) == []
    gave_up = msgspec.structs.replace(empty, status=Status(outcome="failed", reason="RuntimeError: NaN persisted"))
    assert [(found.kind, found.severity) for found in diagnose(gave_up)] == [("nonfinite_loss", "error")]
    for num in (1, 2, 5, 11):
        assert kinds(run(num=num, map50=None, outcome="running"), "error", "warning") == []
    strange = run(events=[{"event": "skip"}, {"event": "init"}, {"event": "dead"}, {"event": "divergence"}, {}])
    assert diagnose(strange)


def test_a_bad_run_ends_with_its_first_finding_and_a_good_one_with_nothing() -> None:
    hot = lost(**HOT)
    heading, *rest, command = last_words(hot, "runs/my run").splitlines()
    assert heading.startswith("error: lr_too_high at step 10: ")
    assert rest == diagnose(hot)[0].text().splitlines()[1:]
    assert command == "1 more finding: yolo-gradstab diagnose 'runs/my run'"
    for silent in (run(), run(clip=0.02), run(events=[DEAD]), run(clip=0.02, outcome="stopped")):
        assert last_words(silent, "r") == ""
    # a warning where the run did not come to its end; an error also where it did
    assert last_words(run(events=[DEAD], outcome="stopped"), "r").startswith("warning: dead_layer at step 80: ")
    kept = run(incidents=[incident(images=[NAN_IMAGE])], events=[skip()], columns=spoiled(30))
    assert last_words(kept, "r").startswith("error: bad_images at step 30: ")
    alone = run(incidents=[incident(reason="spike", images=[NAN_IMAGE])])
    assert last_words(alone, "r").endswith("\nAgain: yolo-gradstab diagnose r")


def test_names_from_data_stay_within_their_line_of_the_terminal() -> None:
    images = [NAN_IMAGE | {"path": "a\nadvice: none\x1b[2J\u202e\u2028é.jpg"}]
    text = the("bad_images", run(incidents=[incident(images=images)], events=[skip()])).text()
    assert r"  where: a\nadvice: none\x1b[2J\u202e\u2028é.jpg" in text.splitlines()
    assert len(text.splitlines()) == 5


# From a folder, and the command --------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Records], Path]:
    """A run folder of records, as the trainer leaves one."""

    def write(records: Records) -> Path:
        folder = RunFolder(tmp_path / "run")
        folder.create(records.config)
        for path, schema, table in (
            (folder.steps, STEP_SCHEMA, records.steps),
            (folder.layers, LAYER_SCHEMA, records.layers),
        ):
            writer = PartWriter(path, schema)
            writer.append(table.to_dicts())
            writer.flush()
        for event in records.events:
            folder.append_event(event)
        (folder.path / "args.yaml").write_text(json.dumps(records.args))
        (folder.path / "results.csv").write_text(f"epoch,metrics/mAP50(B)\n1,0.9\n2,{records.map50}\n")
        for kept in records.incidents:
            path = folder.gradstab / "incidents" / str(kept.step) / "incident.json"
            path.parent.mkdir(parents=True)
            path.write_bytes(msgspec.json.encode(kept))
        folder.write_status(records.status)
        return folder.path

    return write


def test_a_folder_gives_the_findings_of_its_records(written: Callable[[Records], Path]) -> None:
    records = run(incidents=[incident(images=[NAN_IMAGE])], events=[skip()], columns=spoiled(30), clip=0.02)
    folder = written(records)
    assert diagnose(records_of(read_run(folder))) == diagnose(records)
    assert records_of(read_run(folder)).map50 == 0.3  # of the last epoch, not of the best
    next(folder.glob("gradstab/incidents/*/incident.json")).write_text('{"format": 1, "step": "x"}')
    with pytest.raises(RunError, match=r"incident\.json: Expected `int`, got `str`"):
        records_of(read_run(folder))


def test_the_command_prints_words_or_json(
    written: Callable[[Records], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(written(lost(**HOT)))
    assert main(["diagnose", folder]) == 0  # found, so done
    text = capsys.readouterr().out
    assert text.startswith("error: lr_too_high at step 10: ")
    assert "Nothing wrong" not in text
    assert main(["diagnose", folder, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == folder
    assert [finding["kind"] for finding in found["findings"]][:2] == ["lr_too_high", "silent_collapse"]
    for words, status, message in (
        ((str(tmp_path),), 1, "no gradstab folder in it"),
        ((str(tmp_path / "last.pt"),), 1, "cannot be read"),
        ((), 2, "give a run folder or a checkpoint first"),
        ((folder, "format=xml"), 2, "format must be one of text, json"),
        ((folder, "fromat=json"), 2, "the nearest valid key is format"),
    ):
        assert main(["diagnose", *words]) == status
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_a_run_that_failed_for_another_reason_says_it(
    written: Callable[[Records], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(run(status=Status(outcome="failed", step=7, reason="KeyError: 'backbone'")))
    said = "The run failed after 7 steps: KeyError: 'backbone'. Its records show nothing wrong."
    assert main(["diagnose", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(said)
    build_report(folder)
    assert said in (folder / "report.md").read_text()


def test_an_advice_on_the_rate_takes_the_optimizer_from_the_host(written: Callable[[Records], Path]) -> None:
    """`optimizer=auto` ignores lr0, and its own rate is another than args.yaml has."""
    args = {"optimizer": "auto", "lr0": 0.01}
    event = {"event": "optimizer", "step": 0, "optimizer": "AdamW", "lr0": 0.001}
    records = records_of(read_run(written(lost(**(HOT | {"args": args}), events=[event]))))
    assert (records.args["optimizer"], records.args["lr0"]) == ("AdamW", 0.001)
    advice = the("lr_too_high", records).advice
    assert "Lower the rate of 0.001 to lr0=" in advice
    assert " and optimizer=AdamW, since optimizer=auto ignores lr0" in advice
    assert ", with its momentum=0.9 and warmup_bias_lr=0" in advice  # in the host's `build_optimizer`


def test_a_clip_and_a_momentum_mean_nothing_to_an_adaptive_optimizer() -> None:
    """Kingma & Ba 2015: Adam's step does not depend on the gradient's scale, and its beta1 is that of a mean."""
    for optimizer in ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSProp"):
        found = the("always_clipped", run(clip=0.02, args={"optimizer": optimizer}))
        assert found.advice == f"There is nothing to do; with optimizer={optimizer} compare runs by lr0."
        assert "effective lr after clipping" not in found.evidence
        assert "normalised SGD" not in found.message
        rate = the("lr_too_high", lost(**(HOT | {"args": {"optimizer": optimizer, "momentum": 0.98}})))
        assert rate.advice.startswith("Lower the rate of 0.01 to lr0=")
        assert "lr0 / (1 - momentum)" not in rate.evidence


def test_a_rate_in_place_of_the_clip_takes_the_biases_rate_with_it() -> None:
    """`warmup_bias_lr` is absolute: ten times the rate of the host's default, and of the new one too."""
    plain = the("always_clipped", run(clip=0.02)).advice
    assert " with lr0=0.0002 and warmup_bias_lr=0.002 would clip only the largest steps." in plain
    for args in ({"warmup_bias_lr": 0.0}, {"warmup_epochs": 0}):
        assert "warmup_bias_lr" not in the("always_clipped", run(clip=0.02, args=args)).advice


def test_weights_that_a_mitigation_drew_are_that_mitigations() -> None:
    init = {"method": "xavier_normal", "gain": 1000.0}
    found = the("bad_init", run(events=[INIT], config={"mitigations": {"init": init}}))
    assert found.advice == "Leave out mitigations.init=xavier_normal, or its gain of 1000."
    # pretrained=True is the host's default, and loads nothing into a model that is a YAML.
    assert the("bad_init", run(events=[INIT])).advice.endswith(", or start from trained ones, pretrained=WEIGHTS.pt.")


def test_the_command_says_when_nothing_is_wrong(
    written: Callable[[Records], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", str(written(run(clip=0.02)))]) == 0
    assert capsys.readouterr().out.startswith("Nothing wrong was found.\ninfo: always_clipped: ")
