"""Reports from synthetic run folders, written by the package's own writers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

from yolo_gradstab import figures
from yolo_gradstab.cli import _say_where, main
from yolo_gradstab.comparison import arm_label, effects, gather
from yolo_gradstab.config import load_config
from yolo_gradstab.report import ReportError, build_report
from yolo_gradstab.runs import RunFolder, Status
from yolo_gradstab.sweep import Trial, plan, read_spec, read_trial
from yolo_gradstab.telemetry import LAYER_SCHEMA, STEP_SCHEMA, LayerRecord, PartWriter, StepRecord, read_run

# Recorded: yolo11n, SGD, lr0 0.1, no clipping (ALGORITHMS F14).
COLLAPSE = [227, 218, 201, 241, 200, 391, 4240, 14216, 268, 237, 161, 7681, 2.25e8, 0.0099, 0.0011, 0.0033]
NORMS = [712, 1007, 470, 662, 228, 1231, 3.8e4, 1.4e5, 105, 128, 413, 2.2e4, 6.6e6, 0.33, 0.65, 0.24]
HEALTHY = [200.0 * math.exp(-i / 60) for i in range(60)]

SPEC = {
    "task": "detect",
    "train": {"model": "tiny.yaml", "data": "drawn.yaml", "optimizer": "SGD", "epochs": 3},
    "grid": {"lr0": [0.01, 0.1], "update_clip": [None, 0.03]},
    "seeds": [0, 1],
}


@pytest.fixture(autouse=True)
def _empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of figures stay empty, where a test does not look into them: to draw them is half of a report's time."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(figures, "save", lambda chart, path: Path(path).touch())


def write_run(
    folder: Path,
    *,
    config: dict | None = None,
    losses: list[float] = HEALTHY,
    norms: list[float] | None = None,
    metrics: list[float] = (0.1, 0.3),
    status: Status | None = None,
    args: dict | None = None,
    gradient: Callable[[int, int], float] = lambda step, stage: 10.0 / (stage + 1),
    epoch_steps: int = 10**9,
) -> Path:
    """A run folder as the trainer leaves it; `gradient` is the norm of a stage at a step."""
    run = RunFolder(folder)
    run.create(load_config(config).to_dict())
    writer = PartWriter(run.steps, STEP_SCHEMA)
    writer.append(
        StepRecord(
            step=i, epoch=i // epoch_steps, attempt=0, batch=i, images=16, lr=0.01 if i % 2 else 0.03, loss=loss,
            losses={"box": 0.6 * loss, "cls": 0.4 * loss}, total_norm=norms[i] if norms else 40.0, clipped_norm=10.0,
            clip_coef=0.25 if i % 2 else 1.0, bounded_share=None, update_ratio_max=None, nonfinite=0, skipped=False,
            scale=1.0, time_s=0.1 * i,
        ).row()
        for i, loss in enumerate(losses)
    )  # fmt: skip
    writer.flush()
    lines = [f"{epoch},{value},{2 - value},{3 - value}" for epoch, value in enumerate(metrics, 1)]
    names = "epoch,metrics/mAP50-95(B),val/box_loss,val/cls_loss"
    (folder / "results.csv").write_text("\n".join([names, *lines]) + "\n")
    layers = PartWriter(run.layers, LAYER_SCHEMA)
    layers.append(
        LayerRecord(
            step=i, layer=f"model.{k}", grad_norm=gradient(i, k), weight_norm=1.0, update_ratio=0.01, nonfinite=0
        ).row()
        for i in range(0, len(losses), 10)
        for k in range(3)
    )
    layers.flush()
    (folder / "args.yaml").write_text(
        yaml.safe_dump({"task": "detect", "optimizer": "SGD", "lr0": 0.02} | (args or {}))
    )
    run.write_status(status or Status(outcome="completed", step=len(losses), seconds=12.0, versions={"torch": "2.13"}))
    return folder


def write_trial(sweep: Path, trial: Trial, **run) -> Path:
    folder = sweep / "trials" / trial.id
    config = {key: value for key, value in trial.point.items() if key != "lr0"}
    write_run(folder, config=config, **run)
    (folder / "trial.json").write_bytes(msgspec.json.encode(trial))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Stock loses both runs at lr0=0.1, one as NaN and one by silent collapse; with the bound all are kept."""
    folder = tmp_path / "rates"
    spec = read_spec(SPEC)
    (folder / "trials").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(spec)))
    for trial in plan(spec, folder):
        if trial.lr0 == 0.1 and trial.arm["update_clip"] is None:
            nan = Status(
                outcome="failed", step=16, reason="RuntimeError: Training failed: NaN persisted | 4 epochs", seconds=3.0
            )
            status = nan if trial.seed else None
            write_trial(folder, trial, losses=COLLAPSE, norms=NORMS, metrics=[0.2, 0.0], status=status)
        else:
            metric = {0.01: 0.30, 0.1: 0.40}[trial.lr0] + 0.02 * trial.seed
            write_trial(folder, trial, metrics=[0.1, metric])
    return folder


def summary_of(folder: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


# What became of a run


def verdict_of(folder: Path, **run) -> tuple[str, int | None, float | None]:
    write_run(folder, **run)
    build_report(folder)
    (row,) = pl.read_csv(folder / "trials.csv").to_dicts()
    (arm,) = summary_of(folder)["arms"]
    assert (arm["trials"] == 1) == (row["verdict"] not in {"failed", "running", "interrupted"})
    for name in ("report.html", "report.md"):
        assert row["verdict"] in (folder / name).read_text()
    return row["verdict"], row["divergence_step"], row["metric"]


STATUS = {"step": 60, "seconds": 12.0}


@pytest.mark.parametrize(
    ("run", "verdict", "step"),
    [
        ({}, "kept", None),
        ({"metrics": [0.2, 0.0]}, "stalled", None),
        ({"losses": COLLAPSE, "norms": NORMS, "metrics": [0.2, 0.0]}, "blowup", 12),
        # A record of another version, which did not judge: finite, low, and lost.
        (
            {"losses": [200.0] * 20 + [1e-8] * 40, "norms": [700.0] * 20 + [1e-6] * 40, "metrics": [0, 0]},
            "collapse",
            29,
        ),
        ({"losses": [200.0] * 20 + [0.0] * 40, "norms": [700.0] * 20 + [0.0] * 40, "metrics": [0, 0]}, "collapse", 29),
        ({"losses": [200.0] * 5 + [math.nan] * 3, "metrics": []}, "nonfinite", 5),
        ({"losses": COLLAPSE, "norms": NORMS, "metrics": [0.2, 0.3]}, "kept", None),  # and healed
        (
            {
                "status": Status(
                    outcome="diverged", divergence="collapse", reason="collapse at step 57: quiet", **STATUS
                )
            },
            "collapse",
            59,
        ),
        ({"status": Status(outcome="failed", reason="RuntimeError: NaN persisted", **STATUS)}, "nonfinite", 59),
        ({"status": Status(outcome="failed", reason="OSError: disk full", **STATUS)}, "failed", None),
        (
            {"status": Status(outcome="failed", reason="ValueError: cannot convert float NaN to integer", **STATUS)},
            "failed",
            None,
        ),
        (
            {
                "status": Status(
                    outcome="failed",
                    reason="RuntimeError: Checkpoint last.pt is corrupted with NaN/Inf weights",
                    **STATUS,
                )
            },
            "nonfinite",
            59,
        ),
        ({"status": Status(outcome="diverged", step=300)}, "nonfinite", 299),  # of which every tenth is recorded, say
        (
            {"status": Status(outcome="stopped", divergence="nonfinite", reason="inf at step 7", **STATUS)},
            "nonfinite",
            59,
        ),
        ({"status": Status(outcome="running", **STATUS)}, "running", None),
        ({"status": Status(outcome="interrupted", reason="SIGINT", **STATUS)}, "interrupted", None),
    ],
)
def test_every_end_appears_as_what_it_is_in_all_four_documents(
    tmp_path: Path, run: dict, verdict: str, step: int | None
) -> None:
    found = verdict_of(tmp_path / "run", **run)
    assert found[:2] == (verdict, step)
    if verdict in {"running", "interrupted"}:
        assert found[2] is None  # the last epoch's is not a final metric


def test_the_step_is_the_events_where_there_is_one(tmp_path: Path) -> None:
    status = Status(outcome="diverged", divergence="blowup", reason="blowup at step 20: ...", step=21)
    run = write_run(tmp_path / "run", losses=HEALTHY[:21], status=status)
    RunFolder(run).append_event({"event": "divergence", "kind": "blowup", "step": 20, "reason": "..."})
    text = build_report(run).read_text()
    assert "run (norm 10, lr0 0.02) diverged (blowup) at step 20 of 21" in text


def test_where_earlier_ones_were_undone_the_step_is_the_last_events(tmp_path: Path) -> None:
    status = Status(
        outcome="diverged", divergence="blowup", reason="blowup at step 50: ..., after 3 rollbacks", step=51
    )
    run = write_run(tmp_path / "run", losses=HEALTHY[:51], status=status)
    for step in (15, 30, 50):
        RunFolder(run).append_event({"event": "divergence", "kind": "blowup", "step": step, "action": "rollback"})
    build_report(run)
    assert pl.read_csv(run / "trials.csv")["divergence_step"].to_list() == [50]


def test_what_a_rollback_took_back_is_not_held_against_a_run_without_map(tmp_path: Path) -> None:
    """As of classify, which has no mAP50 that says by itself that something was learned."""
    losses = [200.0] * 30 + [3e4] * 3 + [200.0] * 30
    run = write_run(tmp_path / "run", losses=losses)
    (run / "results.csv").write_text("epoch,metrics/accuracy_top1\n1,0.5\n2,0.93\n")
    build_report(run)
    assert pl.read_csv(run / "trials.csv")["verdict"].to_list() == ["blowup"]
    back = {"event": "rollback", "kind": "blowup", "step": 32, "to_step": 20, "lr_factor": 0.5}
    for event in ({"event": "divergence", "kind": "blowup", "step": 30, "action": "rollback"}, back):
        RunFolder(run).append_event(event)
    build_report(run)
    row = pl.read_csv(run / "trials.csv").row(0, named=True)
    assert (row["verdict"], row["score"], row["note"]) == ("kept", 0.93, "blowup at step 30, undone")


def test_steps_that_were_not_made_or_taken_back_have_no_part_in_the_rate(tmp_path: Path) -> None:
    """Of 60 steps every other one was made at 0.01 and not clipped, or at 0.03 and clipped to a quarter."""
    run = write_run(tmp_path / "run")
    build_report(run)
    expected = pl.read_csv(run / "trials.csv").select("lr_eff", "clipped_share")
    assert expected.row(0) == (pytest.approx(0.02 * (30 * 0.03 + 30 * 0.01 * 0.25) / (30 * 0.03 + 30 * 0.01)), 0.5)
    writer = PartWriter(RunFolder(run).steps, STEP_SCHEMA)
    rows = read_run(run).steps.to_dicts()[-8:]
    not_made = [row | {"step": 60 + i, "skipped": True, "clip_coef": 1.0} for i, row in enumerate(rows)]
    writer.append([*not_made, *(row | {"step": 68 + i, "clip_coef": 0.001} for i, row in enumerate(rows))])
    writer.flush()
    back = {"event": "rollback", "kind": "weight_growth", "step": 75, "to_step": 68, "lr_factor": 0.5}
    RunFolder(run).append_event(back)
    build_report(run)
    assert_frame_equal(pl.read_csv(run / "trials.csv").select("lr_eff", "clipped_share"), expected)


@pytest.mark.parametrize(("map50", "verdict"), [(0.5, "kept"), (0.0, "stalled")])
def test_where_the_guard_went_back_on_an_early_warning_is_noted(tmp_path: Path, map50: float, verdict: str) -> None:
    run = write_run(tmp_path / "run", metrics=[map50])
    back = {"event": "rollback", "kind": "running_var", "step": 4, "to_step": 0, "lr_factor": 0.03125}
    RunFolder(run).append_event(back)
    build_report(run)
    row = pl.read_csv(run / "trials.csv").row(0, named=True)
    assert (row["verdict"], row["note"]) == (verdict, "running_var at step 4, back to step 0, rate times 0.031")
    assert "running_var at step 4, back to step 0" in (run / "report.md").read_text()


def test_a_spike_that_healed_is_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    RunFolder(run).append_event({"event": "divergence", "kind": "blowup", "step": 12, "reason": "..."})
    build_report(run)
    assert pl.read_csv(run / "trials.csv")["note"].to_list() == ["blowup at step 12, and healed"]


# Arms


@pytest.mark.parametrize(
    ("config", "arm", "label"),
    [
        ({}, {}, "norm 10"),
        ({"clip": "none"}, {}, "no clip"),
        ({"clip": "agc"}, {}, "agc 0.01"),
        ({"clip": "agc", "clip.exclude": ["bias"]}, {}, "agc 0.01 exclude bias"),
        ({"update_clip": 0.03}, {"update_clip": 0.03}, "norm 10 + update_clip 0.03"),
        ({"update_clip": {"max_ratio": 0.1, "follow_lr": False}}, {}, "norm 10 + update_clip 0.1 constant"),
        ({}, {"optimizer": "AdamW", "guard.nonfinite": "stop"}, "AdamW, norm 10, guard.nonfinite stop"),
        ({}, {"optimizer": "SGD", "guard.divergence": "off"}, "SGD, norm 10, guard off"),
        ({"mitigations.residual": False}, {"mitigations.residual": False}, "norm 10 + residual off"),
        (
            {"mitigations": {"init": {"method": "orthogonal", "gain": 0.5}, "normalization": "none"}},
            {"mitigations.init": {"method": "orthogonal", "gain": 0.5}, "mitigations.normalization": "none"},
            "norm 10 + normalization none + init orthogonal 0.5",
        ),
    ],
)
def test_arm_labels(config: dict, arm: dict, label: str) -> None:
    assert arm_label(load_config(config).to_dict(), arm) == label


# The documents


def test_summary_holds_the_contract_and_says_why_values_are_null(sweep: Path) -> None:
    build_report([sweep])
    summary = summary_of(sweep)
    stock, bounded = summary["arms"]
    assert (stock["arm"], bounded["arm"]) == ({"update_clip": None}, {"update_clip": 0.03})
    assert (stock["trials"], stock["diverged"], bounded["diverged"]) == (4, 2, 0)
    assert stock["divergences"] == {"nonfinite": 0, "blowup": 2, "collapse": 0}
    # Jeffreys for 2 of 4: Beta(2.5, 2.5), symmetric about one half; scipy's quantile as of a table
    assert stock["divergence_rate"] == {
        "value": 0.5,
        "low": pytest.approx(0.1228, abs=2e-4),
        "high": pytest.approx(0.8772, abs=2e-4),
    }
    assert (stock["max_stable_lr"], bounded["max_stable_lr"]) == (0.01, 0.1)
    assert stock["lr50"] == {"value": pytest.approx(10**-1.5), "low": 0.01, "high": 0.1}
    assert bounded["lr50"] == {"value": None, "low": None, "high": None}
    assert "no run diverged" in bounded["reasons"]["lr50"]
    assert bounded["best"] == {"lr0": 0.1, "metric": pytest.approx(0.41), "low": 0.4, "high": pytest.approx(0.42)}
    assert stock["best"]["lr0"] == 0.01  # the collapsed run's earlier 0.2 does not count
    # means .31 and 0: (0 + .31) / 2; and .31, .41: (.1 + 0) / 2
    assert stock["quality_sensitivity"] == pytest.approx(0.155)
    assert bounded["quality_sensitivity"] == pytest.approx(0.05)
    # validation loss 5 - 2 metric: mean 4.38; diverged runs count as the first step's training loss, 200
    assert stock["lr_sensitivity"] == pytest.approx((200 - 4.38) / 2)
    # .31 -> 0 over a decade: within 5 % for a twentieth of it
    assert stock["basin_decades"] == pytest.approx(0.05)
    assert stock["usable_decades"] == pytest.approx(0.2)
    # survival: both lost at step 12 of 60: two of four live 13 steps
    assert stock["rmst"] == pytest.approx(0.5 * 60 + 0.5 * 13)
    assert stock["spike_score"] is None
    assert "128" in stock["reasons"]["spike_score"]
    assert stock["clipped_share"] == 0.5
    assert (stock["num_seeds"], stock["stalled"], stock["failed"], stock["unfinished"]) == (2, 0, 0, 0)
    # 44 steps each not made: at 12 s / 16 steps, and at 3 s / 16
    assert summary["compute_saved"] == pytest.approx(44 * 12 / 16 + 44 * 3 / 16)
    (pair,) = summary["comparisons"]
    assert (pair["first"], pair["second"]) == ("norm 10", "norm 10 + update_clip 0.03")
    assert pair["metric"]["difference"]["value"] == pytest.approx((0.40 + 0.42) / 4)
    assert (pair["metric"]["num_pairs"], pair["metric"]["num_seeds"], pair["metric"]["p_value"]) == (4, 2, 0.5)
    assert "2 seeds cannot reach p < 0.05" in pair["metric"]["reason"]


def test_gradients_over_depth_are_those_of_the_runs_at_the_best_rate(tmp_path: Path) -> None:
    """ln norm has a slope of -(seed + 1) at the start, 0 after warm-up and 2 at the end; at a worse rate another."""
    folder = tmp_path / "rates"
    spec = read_spec(SPEC | {"train": SPEC["train"] | {"warmup_epochs": 1}})
    (folder / "trials").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(spec)))
    for trial in plan(spec, folder):
        is_best = trial.lr0 == 0.1

        def gradient(step: int, stage: int, seed: int = trial.seed, is_best: bool = is_best) -> float:
            slope = -(seed + 1.0) if step < 20 else 0.0 if step < 50 else 2.0
            # one odd record after warm-up, which the median of three leaves out
            return math.exp((slope if is_best else 7.0) * stage) * (1e3**stage if step == 20 else 1.0)

        more = {"args": {"warmup_epochs": 1.0}, "gradient": gradient, "epoch_steps": 20, "losses": [200.0] * 80}
        write_trial(folder, trial, metrics=[0.1, 0.4 if is_best else 0.2], **more)
    build_report(folder)
    for arm in summary_of(folder)["arms"]:
        slopes = {moment: slope["value"] for moment, slope in arm["depth_slope"].items()}
        assert slopes == pytest.approx({"start": -1.5, "after warm-up": 0.0, "end": 2.0}, abs=1e-6)
        half = 12.7062 * math.sqrt(0.5) / math.sqrt(2)  # t(0.975, 1), of the seeds' -1 and -2
        assert arm["depth_slope"]["start"]["low"] == pytest.approx(-1.5 - half, rel=1e-4)
        # the median of three stages is the middle one's: e to the slope
        norms = {moment: norm["value"] for moment, norm in arm["depth_norm"].items()}
        assert norms == pytest.approx({"start": math.exp(-1.5), "after warm-up": 1.0, "end": math.exp(2)})
        assert arm["depth_norm"]["start"]["high"] == pytest.approx(math.exp(-1.5 + half), rel=1e-3)
    assert (
        "| norm 10 | -1.50 (-7.85 to +4.85) | +0.00 (+0.00 to +0.00) | +2.00 (+2.00 to +2.00) |"
        in (folder / "report.md").read_text()
    )
    assert (
        "| norm 10 | 0.22 (0.00039 to 1.3e+02) | 1 (1 to 1) | 7.4 (7.4 to 7.4) |" in (folder / "report.md").read_text()
    )
    assert (folder / "figures" / "rates_depth.svg").exists()


def test_a_run_that_diverged_has_no_end_over_depth(sweep: Path) -> None:
    (comparison,), _ = gather([sweep])
    lost = next(entry for entry in comparison.entries if entry.diverged)
    assert lost.depth_profile["moment"].unique().to_list() == ["start"]  # nor had it got through its warm-up
    kept = next(entry for entry in comparison.entries if not entry.diverged)
    assert set(kept.depth_profile["moment"]) == {"start", "end"}
    kept.layers = kept.layers.filter(pl.col("step") == 0)  # of a run of one step the start is all there is
    del kept.depth_profile
    assert kept.depth_profile["moment"].unique().to_list() == ["start"]


@pytest.mark.parametrize(("epochs", "first"), [(1, 0), (2, 20), (3, 40), (4, 60), (40, 60)])
def test_a_short_run_ends_its_warm_up_when_the_host_does(tmp_path: Path, epochs: int, first: int) -> None:
    """Of three epochs by default, but never the last one too."""
    run = write_run(
        tmp_path / "run",
        losses=[200.0] * 80,
        epoch_steps=20,
        args={"epochs": epochs},
        gradient=lambda step, stage: step + 1.0 + stage,
    )
    entry = gather([run])[0][0].entries[0]
    after = entry.depth_profile.filter(pl.col("moment") == "after warm-up")
    wanted = sorted(step for step in entry.layers["step"].unique() if step >= first)[:3]
    expected = entry.layers.filter(pl.col("step").is_in(wanted)).group_by("layer").agg(pl.col("grad_norm").median())
    assert sorted(after["norm"]) == pytest.approx(sorted(expected["grad_norm"]))


def test_unfinished_and_failed_trials_count_neither_way(sweep: Path) -> None:
    folders = sorted(folder for folder in (sweep / "trials").iterdir() if folder.is_dir())
    RunFolder(folders[0]).write_status(Status(outcome="running", step=7))
    RunFolder(folders[1]).write_status(Status(outcome="failed", step=9, reason="OSError: disk full"))
    build_report(sweep)
    arms = summary_of(sweep)["arms"]
    assert sum(arm["trials"] for arm in arms) == 6
    assert sum(arm["unfinished"] for arm in arms) == 1
    assert sum(arm["failed"] for arm in arms) == 1
    assert {"failed", "running"} <= set(pl.read_csv(sweep / "trials.csv")["verdict"])
    text = (sweep / "report.md").read_text()
    assert "OSError: disk full" in text
    assert "running" in text


def test_a_run_that_is_being_set_up_does_not_keep_a_report_from_being_made(sweep: Path) -> None:
    folder = next(folder for folder in (sweep / "trials").iterdir() if folder.is_dir())
    shutil.rmtree(folder / "gradstab")
    held = RunFolder(folder)
    held.hold()
    try:
        build_report(sweep)
    finally:
        held.release()
    assert pl.read_csv(sweep / "trials.csv").filter(id=folder.name)["verdict"].to_list() == ["running"]


def test_a_trial_that_ended_before_it_wrote_its_configuration_is_of_its_arm(sweep: Path) -> None:
    build_report(sweep)
    labels = [arm["label"] for arm in summary_of(sweep)["arms"]]
    for folder in (folder for folder in (sweep / "trials").iterdir() if folder.is_dir()):
        if read_run(folder).config.get("update_clip") and json.loads((folder / "trial.json").read_text())["seed"]:
            (folder / "gradstab/config.yaml").write_text("{}\n")
    build_report(sweep)
    assert [arm["label"] for arm in summary_of(sweep)["arms"]] == labels


def test_a_damaged_file_is_named_and_the_others_are_shown(sweep: Path) -> None:
    folders = sorted(folder for folder in (sweep / "trials").iterdir() if folder.is_dir())
    damage = {"gradstab/config.yaml": "a: [", "args.yaml": "a: b: c", "gradstab/events.jsonl": "[1]\n"}
    for folder, (name, text) in zip(folders, damage.items(), strict=False):
        (folder / name).write_text(text)
    part = next((folders[3] / "gradstab/steps").glob("*.parquet"))
    part.write_bytes(b"PAR1" + bytes(40))
    _, left_out = gather([sweep])
    for folder, name in (*zip(folders, damage, strict=False), (folders[3], f"gradstab/steps/{part.name}")):
        reasons = [note.reason for note in left_out if note.path == str(folder)]
        assert any(name in reason for reason in reasons), (name, reasons)
    assert len(gather([sweep])[0][0].entries) >= 4


def test_effective_rate_weighs_the_clip_by_the_rate(sweep: Path) -> None:
    build_report(sweep)
    # lr alternates 0.03 (not clipped) and 0.01 (scaled to a quarter): (0.03 + 0.0025) / 0.04 of lr0.
    rows = pl.read_csv(sweep / "trials.csv").filter(pl.col("outcome") == "completed", pl.col("lr0") == 0.01)
    assert rows["lr_eff"].to_list() == pytest.approx([0.01 * 0.0325 / 0.04] * len(rows))


def test_trials_table_has_a_row_per_run(sweep: Path) -> None:
    build_report(sweep)
    rows = pl.read_csv(sweep / "trials.csv")
    assert len(rows) == 8
    lost = rows.filter(pl.col("verdict") == "blowup").sort("seed")
    assert lost["arm"].to_list() == ["norm 10"] * 2
    assert lost["outcome"].to_list() == ["completed", "failed"]
    assert lost["best_metric"].to_list() == [0.2, 0.2]
    assert "times its start" in lost["note"][0]
    assert lost["divergence_step"].to_list() == [12, 12]
    assert lost["note"][1].startswith("RuntimeError: Training failed: NaN persisted | 4 epochs")


@pytest.mark.pictures
def test_documents_lead_with_what_the_numbers_say(sweep: Path) -> None:
    page = build_report(sweep)
    sentence = "norm 10 lost 2 of 4 runs and norm 10 + update_clip 0.03 lost 0 of 4 runs; best mAP50-95"
    assert sentence in page.read_text()
    markdown = (sweep / "report.md").read_text()
    assert sentence in markdown
    for kind in ("metric", "effective", "survival", "trajectories", "layers"):
        picture = f"figures/rates_{kind}.{'png' if kind in {'trajectories', 'layers'} else 'svg'}"
        assert f"({picture})" in markdown
        assert (sweep / picture).stat().st_size > 10_000


def test_page_is_one_file_and_opens_offline(sweep: Path) -> None:
    text = build_report(sweep).read_text()
    assert text.count("window.vegaEmbed=") == 1
    assert len(text.encode()) < 5e6
    assert "<script src" not in text
    assert "<link" not in text
    for link in ('src="http', 'href="http', "@import"):
        assert link not in text.split("<script")[0]


def test_text_from_data_stays_text(tmp_path: Path) -> None:
    reason = "bad `x` | <script>alert(1)</script> $x$\nsecond line"
    run = write_run(
        tmp_path / "a<b>|c", status=Status(outcome="diverged", divergence="nonfinite", step=60, reason=reason)
    )
    tensors = ["model.1.<img src=x onerror=alert(2)>\n# heading | `x`"]
    RunFolder(run).append_event({"event": "skip", "step": 30, "reason": "nonfinite_gradient", "tensors": tensors})
    text = build_report([run], tmp_path / "out").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<img src=x" not in text
    assert "model.1.&lt;img src=x onerror=alert(2)&gt;" in text
    where = r"- where: model.1.&lt;img src=x onerror=alert(2)&gt; \# heading \| \`x\`"
    assert where in (tmp_path / "out" / "report.md").read_text().splitlines()
    rows = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("| a&lt;b")]
    assert len(rows) == 1
    assert rows[0].startswith(r"| a&lt;b&gt;\|c | norm 10 | 0.02 |")
    assert " nonfinite " in rows[0]
    assert r"bad \`x\` \| &lt;script&gt;alert(1)&lt;/script&gt; \$x\$ second line" in rows[0]
    assert rows[0].replace(r"\|", "").count("|") == 15


def test_a_single_run_has_its_trajectories_and_no_comparison(tmp_path: Path) -> None:
    run = write_run(tmp_path / "train", config={"clip": "agc"})
    text = build_report(run).read_text()
    assert "train (agc 0.01, lr0 0.02) completed after 60 steps, 50% of them clipped: final mAP50-95 0.300." in text
    assert 'data-figure="train_trajectories"' in text
    assert "train_metric" not in text
    drawn = sorted(path.name for path in (run / "figures").iterdir())
    assert drawn == ["train_depth.svg", "train_layers.png", "train_trajectories.png"]


# Findings


def test_findings_of_a_sweep_are_grouped_by_arm(sweep: Path) -> None:
    ((comparison,), not_shown) = gather([sweep])
    assert not_shown == []
    assert comparison.findings_sentence == "Of 8 runs: 2 with an error."
    rows = [(row.arm, row.severity, row.kind, row.runs, row.first, row.steps, row.lr0) for row in comparison.findings]
    rate = (0.1, 0.1)
    assert rows == [  # of the recorded collapse: 12 is where the loss passes 100 times its start, 15 its last step
        ("norm 10", "error", "loss_blowup", 2, 2, (12, 12), rate),
        ("norm 10", "error", "silent_collapse", 2, 0, (15, 15), rate),
        ("norm 10", "error", "nonfinite_loss", 1, 0, (15, 15), rate),  # by the words of the run that failed
    ]
    first, second, third = (row.advice for row in comparison.findings)
    assert first.startswith("Lower the rate of 0.02 to lr0=")
    assert (second, third[:27]) == ("", "Keep guard.nonfinite=skip, ")  # the same again is not


def test_findings_name_the_run_at_the_lowest_rate_and_count_runs_not_findings(tmp_path: Path) -> None:
    """Three runs at three rates; in two of them two components of the loss were never anything but 0."""
    init = {"event": "init", "step": 0, "tensors": [{"name": "model.0.conv.weight", "scale": 1000.0}]}
    for rate, step in ((0.03, 9), (0.01, 40), (0.1, None)):
        run = write_run(tmp_path / f"rate{rate}", args={"lr0": rate})
        if step is not None:
            RunFolder(run).append_event(
                {"event": "dead", "step": step, "steps": 50, "tensors": ["model.1.conv.weight"]}
            )
            RunFolder(run).append_event(init)
            part = next((run / "gradstab" / "steps").glob("*.parquet"))
            pl.read_parquet(part).with_columns(loss_a=0.0, loss_b=0.0).write_parquet(part)
    (comparison,), _ = gather(sorted(tmp_path.iterdir()))
    assert comparison.findings_sentence == "Of 3 runs: 2 with a warning."
    rows = {row.kind: (row.runs, row.first, row.steps, row.lr0, row.example) for row in comparison.findings}
    assert rows == {
        "bad_init": (2, 2, (0, 0), (0.01, 0.03), "rate0.01"),
        "dead_loss_component": (2, 0, (0, 0), (0.01, 0.03), "rate0.01"),
        "dead_layer": (2, 0, (9, 40), (0.01, 0.03), "rate0.01"),
    }


def test_both_documents_and_the_summary_show_what_diagnose_says(sweep: Path) -> None:
    lost = next(path for path in sorted((sweep / "trials").iterdir()) if read_run(path).diagnose())
    said = read_run(lost).diagnose()
    page = build_report([lost], sweep / "one").read_text()
    markdown = (sweep / "one" / "report.md").read_text()
    assert summary_of(sweep / "one")["findings"] == [
        {"path": str(lost), "arm": "norm 10", "lr0": 0.1, "findings": msgspec.to_builtins(said)}
    ]
    assert "Nothing wrong was found" not in page + markdown
    for finding in said:
        assert f"<strong>{finding.kind}</strong> at step {finding.step}: {finding.message}</p>" in page
        assert f"**error: {finding.kind}** at step {finding.step}: {finding.message}\n" in markdown
        for name, measured in finding.evidence.items():
            cell = f'<td class="text range">{name}</td><td class="text">{measured.text()}</td>'
            assert cell in page
            assert f"- {name}: {measured.text()}\n" in markdown
        assert f"<p>{finding.advice}</p>" in page
        assert f"- advice: {finding.advice}\n" in markdown
    build_report([sweep])
    page, markdown = (sweep / "report.html").read_text(), (sweep / "report.md").read_text()
    assert "Of 8 runs: 2 with an error." in page
    assert "Of 8 runs: 2 with an error." in markdown
    assert '<span class="lost">error</span> loss_blowup</td><td>2</td><td>2</td><td>0.1</td><td>12</td>' in page
    assert "| norm 10 | error: loss_blowup | 2 | 2 | 0.1 | 12 | Lower the rate of 0.02 to lr0=" in markdown
    assert len(summary_of(sweep)["findings"]) == 2


def test_a_healthy_run_has_nothing_wrong(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    build_report(run)
    for name in ("report.html", "report.md"):
        assert (run / name).read_text().count("Nothing wrong was found.") == 1
    assert summary_of(run)["findings"] == []


def test_a_run_that_has_not_learned_is_not_said_to_be_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five steps are too few to learn anything, and too few for anything to be wrong with them."""
    run = write_run(tmp_path / "run", losses=HEALTHY[:5], metrics=[0.0, 0.0005])
    words = "Nothing wrong was found, but the run has not learned: mAP50 is 0.0005 after 5 steps."
    assert main(["diagnose", str(run)]) == 0
    assert capsys.readouterr().out.startswith(words)
    page = build_report(run).read_text()
    assert words in page
    assert "completed without learning" in page
    write_run(tmp_path / "other", args={"lr0": 0.03})
    (comparison,), _ = gather([run, tmp_path / "other"])
    assert comparison.findings_sentence == "Nothing wrong was found, but 1 did not learn."


def test_the_share_of_clipped_steps_is_the_same_wherever_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 60 steps every second one is clipped, and one of the others was taken back: 30 of 59 that made the weights."""
    run = write_run(tmp_path / "run")
    RunFolder(run).append_event({"event": "rollback", "kind": "blowup", "step": 10, "to_step": 10, "lr_factor": 0.5})
    assert _say_where(run) == 0
    assert "60 optimizer steps: gradient norm 40 (median), 51% of steps clipped, 0 not applied, 1 taken back\n" in (
        capsys.readouterr().out
    )
    build_report(run)
    assert pl.read_csv(run / "trials.csv")["clipped_share"].to_list() == pytest.approx([30 / 59])
    (clipped,) = [finding for finding in read_run(run).diagnose() if finding.kind == "always_clipped"]
    assert clipped.evidence["share of steps clipped"].value == pytest.approx(30 / 59)


def test_a_run_whose_rate_is_not_known_is_named_and_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "args.yaml").unlink()
    other = write_run(tmp_path / "other")
    build_report([run, other], tmp_path / "out")
    (reason,) = [item["reason"] for item in summary_of(tmp_path / "out")["not_shown"] if item["path"] == str(run)]
    assert reason == "cannot be read: its args.yaml is missing or names no lr0, so its learning rate is not known"
    assert pl.read_csv(tmp_path / "out/trials.csv")["id"].to_list() == ["other"]


def test_where_the_guard_went_back_is_in_the_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epoch_steps=20)
    other = write_run(tmp_path / "other", args={"lr0": 0.03})
    RunFolder(other).append_event({"event": "rollback", "kind": "blowup", "step": 10, "to_step": 0, "lr_factor": 0.5})
    (comparison,), _ = gather([run, other])
    (trial,) = [i for i, entry in enumerate(comparison.entries) if entry.row.id == "other"]
    assert comparison.rollbacks_table().rows() == [(trial, 10)]
    page = build_report([run, other], tmp_path / "out").read_text()
    assert "where the guard went back" in page


def test_records_that_cannot_be_diagnosed_leave_the_run_in_the_report(sweep: Path) -> None:
    folder = next(path for path in sorted((sweep / "trials").iterdir()) if not read_run(path).diagnose())
    incident = folder / "gradstab" / "incidents" / "3" / "incident.json"
    incident.parent.mkdir(parents=True)
    incident.write_text('{"format": 1}')
    (comparison,), (left_out,) = gather([sweep])
    assert len(comparison.entries) == 8
    assert comparison.findings_sentence == "Of 8 runs: 2 with an error and 1 whose records cannot be diagnosed."
    assert left_out.path == str(folder)
    assert left_out.reason.startswith("its findings, since records cannot be read: ")
    assert "incident.json: Object missing required field" in left_out.reason
    next((folder / "gradstab" / "layers").glob("*.parquet")).write_bytes(b"not parquet")
    (comparison,), (left_out,) = gather([sweep])
    assert len(comparison.entries) == 7
    assert left_out.reason.startswith("cannot be read: ")


def test_unfinished_and_broken_folders_are_named(sweep: Path) -> None:
    folders = sorted(folder for folder in (sweep / "trials").iterdir() if folder.is_dir())
    RunFolder(folders[0]).write_status(Status(outcome="running", step=7))
    RunFolder(folders[1]).write_status(Status(outcome="interrupted", step=9, reason="SIGINT"))
    (folders[2] / "gradstab" / "status.json").write_text("{")
    next((folders[3] / "gradstab" / "steps").glob("*.parquet")).write_bytes(b"not parquet")
    (folders[4] / "trial.json").rename(sweep / "elsewhere.json")
    for path in sorted((folders[5] / "gradstab").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folders[5] / "gradstab").rmdir()
    next((folders[6] / "gradstab" / "steps").glob("*.parquet")).unlink()
    RunFolder(folders[6]).write_status(Status(outcome="failed", reason="FileNotFoundError: no such data"))
    build_report(sweep)
    reasons = {Path(item["path"]).name: item["reason"] for item in summary_of(sweep)["not_shown"]}
    assert reasons.keys() == {folders[i].name for i in (2, 3, 5)}
    assert "status.json" in reasons[folders[2].name]
    assert "cannot be read" in reasons[folders[3].name]
    assert "no gradstab folder" in reasons[folders[5].name]
    verdicts = dict(pl.read_csv(sweep / "trials.csv").select("id", "verdict").iter_rows())
    assert verdicts[folders[0].name] == "running"
    assert verdicts[folders[1].name] == "interrupted"
    assert verdicts[folders[6].name] == "failed"
    assert len(verdicts) == 5
    assert "Not shown" in (sweep / "report.html").read_text()
    assert folders[2].name in (sweep / "report.md").read_text()


def test_a_run_alone_is_shown_while_it_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "train", status=Status(outcome="running", step=50))
    text = build_report(run).read_text()
    assert "train (norm 10, lr0 0.02) is running, or was killed, after 60 steps, 50% of them clipped" in text
    assert "no final metric" in text
    assert 'data-figure="train_trajectories"' in text
    folder = RunFolder(run)
    folder.hold()
    try:
        text = build_report(run).read_text()
    finally:
        folder.release()
    assert "train (norm 10, lr0 0.02) is running after 60 steps, 50% of them clipped" in text
    assert "has not ended: it is running<" in text


def test_trials_that_were_not_started_are_counted(sweep: Path) -> None:
    shutil.rmtree(next(folder for folder in (sweep / "trials").iterdir() if folder.is_dir()))
    build_report(sweep)
    assert summary_of(sweep)["not_shown"][0]["reason"] == "1 of 8 trials have not been started"


def test_sweeps_and_lone_runs_stand_side_by_side(sweep: Path, tmp_path: Path) -> None:
    args = {"model": "yolo26n.yaml", "data": "bccd.yaml"}
    runs = [write_run(tmp_path / f"run{i}", args=args | {"lr0": 0.01 * (i + 1)}) for i in range(2)]
    page = build_report([sweep, *runs], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert "<h2>rates</h2>" in page.read_text()
    assert "<h2>detect: yolo26n.yaml on bccd.yaml</h2>" in page.read_text()
    arms = summary_of(tmp_path / "out")["arms"]
    assert [arm["trials"] for arm in arms] == [4, 4, 2]
    assert not (sweep / "report.html").exists()


def test_lone_runs_are_arms_by_all_that_they_differ_in(tmp_path: Path) -> None:
    """Two optimizers are no seeds of one arm."""
    args = {"lr0": 0.02, "seed": 0, "name": "x", "save_dir": "y"}
    sgd = write_run(tmp_path / "sgd", args=args | {"optimizer": "SGD", "epochs": 3}, metrics=[0.1, 0.3])
    adamw = write_run(tmp_path / "adamw", args=args | {"optimizer": "AdamW", "epochs": 100}, metrics=[0.1, 0.6])
    build_report([sgd, adamw], tmp_path / "out")
    arms = summary_of(tmp_path / "out")["arms"]
    assert [arm["label"] for arm in arms] == ["SGD, norm 10, epochs 3", "AdamW, norm 10, epochs 100"]
    assert [(arm["trials"], arm["best"]["metric"]) for arm in arms] == [(1, 0.3), (1, 0.6)]
    stop = write_run(tmp_path / "stop", config={"guard.divergence": "stop"}, args=args | {"optimizer": "SGD"})
    build_report([stop, write_run(tmp_path / "back", args=args | {"optimizer": "SGD"})], tmp_path / "out")
    assert [arm["label"] for arm in summary_of(tmp_path / "out")["arms"]] == [
        "norm 10, guard stop", "norm 10, guard rollback"
    ]  # fmt: skip


def test_a_run_that_is_there_twice_counts_once_and_is_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", args={"name": "a"})
    again = write_run(tmp_path / "b", args={"name": "b"})
    other = write_run(tmp_path / "c", args={"name": "c", "seed": 1})
    build_report([first, again, other, tmp_path / "b/../a"], tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    assert [arm["trials"] for arm in summary["arms"]] == [2]
    assert {(Path(item["path"]).name, item["reason"]) for item in summary["not_shown"]} == {
        ("b", f"the same configuration, learning rate and seed as {first}"),
        ("a", "named twice"),
    }


def test_of_a_run_and_its_repetition_the_one_that_counts_is_shown(tmp_path: Path) -> None:
    killed = write_run(tmp_path / "train", status=Status(outcome="interrupted", reason="SIGTERM", step=10))
    again = write_run(tmp_path / "train2")
    build_report([killed, again], tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    assert [(arm["trials"], arm["unfinished"]) for arm in summary["arms"]] == [(1, 0)]
    reason = f"the same configuration, learning rate and seed as {again}"
    assert summary["not_shown"] == [{"path": str(killed), "reason": reason}]


def test_the_bias_warm_up_makes_arms_only_where_it_differs_at_one_rate(tmp_path: Path) -> None:
    def labels(*given: tuple[float, float]) -> list[str]:
        runs = [write_run(tmp_path / f"{lr0}-{bias}", args={"lr0": lr0, "warmup_bias_lr": bias}) for lr0, bias in given]
        build_report(runs, tmp_path / "out")
        assert summary_of(tmp_path / "out")["not_shown"] == []
        return [arm["label"] for arm in summary_of(tmp_path / "out")["arms"]]

    assert labels((0.001, 0.01), (0.01, 0.1)) == ["norm 10"]  # as a sweep scales it
    assert labels((0.02, 0.1), (0.02, 0.0)) == ["norm 10, warmup_bias_lr 0.1", "norm 10, warmup_bias_lr 0"]


def test_a_rate_that_was_lowered_is_in_the_effective_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "train", args={"lr0": 1.0})
    back = {"event": "rollback", "step": 9, "to_step": 0, "kind": "blowup", "reason": "", "lr_factor": 0.25}
    RunFolder(run).append_event(back | {"rollbacks": 1})
    build_report(run)
    (row,) = pl.read_csv(run / "trials.csv").to_dicts()
    # Steps 10 to 59 last, half of them at .03, and half at .01 and clipped to .25; unlowered, rates were 4 times that.
    assert row["lr_eff"] == pytest.approx((0.03 + 0.01 * 0.25) / (0.03 / 0.25 + 0.01 / 0.25))


def test_arms_of_other_lengths_have_their_own_horizon(tmp_path: Path) -> None:
    train = {key: value for key, value in SPEC["train"].items() if key != "epochs"}
    spec = read_spec(SPEC | {"train": train, "grid": {"lr0": [0.01, 0.1], "epochs": [1, 10]}, "seeds": [0]})
    folder = tmp_path / "lengths"
    (folder / "trials").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(spec)))
    for trial in plan(spec, folder):
        length = {1: 20, 10: 200}[trial.point["epochs"]]
        args, made = {"epochs": trial.point["epochs"]}, length if trial.lr0 == 0.01 else length - 10
        status = Status(outcome="diverged", divergence="blowup", step=made, seconds=float(made), reason="blew up")
        if trial.lr0 == 0.01:
            status = Status(outcome="completed", step=made, seconds=float(made))
        path = write_run(folder / "trials" / trial.id, losses=[200.0] * made, args=args, status=status)
        (path / "trial.json").write_bytes(msgspec.json.encode(trial))
    build_report(folder)
    summary = summary_of(folder)
    assert [arm["rmst"] for arm in summary["arms"]] == [(20 + 10) / 2, (200 + 190) / 2]
    (comparison,), _ = gather([folder])
    assert comparison.compute_saved_s.value == 10 + 10  # a second a step, and ten steps of each lost run
    assert comparison.pairs[0]["survival_steps"].reason == "runs of the two are not of one length"
    assert "steps lived of 20 to 200" in (folder / "report.md").read_text()


def test_a_run_that_cannot_be_shown_leaves_the_others(sweep: Path, tmp_path: Path) -> None:
    sound = write_run(tmp_path / "sound")
    zero = write_run(tmp_path / "zero", args={"lr0": 0.0})
    bare = write_run(tmp_path / "bare", args={"warmup_epochs": None, "seed": 1})
    shutil.rmtree(bare / "gradstab" / "layers")
    early = write_run(
        tmp_path / "early", losses=[], args={"seed": 2}, status=Status(outcome="failed", reason="NaN in labels")
    )
    build_report([bare, zero, sound, early], tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    (left_out,) = summary["not_shown"]
    assert Path(left_out["path"]).name == "zero"
    assert left_out["reason"].endswith("lr0=0 has no place on a scale of learning rates, which are above 0")
    assert sum(arm["trials"] for arm in summary["arms"]) == 2
    assert sum(arm["failed"] for arm in summary["arms"]) == 1
    spec = yaml.safe_load((sweep / "sweep.yaml").read_text())
    spec["train"]["lr0"] = "abc"
    del spec["grid"]["lr0"]
    (sweep / "sweep.yaml").write_text(yaml.safe_dump(spec))
    build_report(sweep)
    assert "abc" in summary_of(sweep)["not_shown"][0]["reason"]


def test_a_kept_run_without_a_metric_is_no_zero(sweep: Path) -> None:
    trial = next(folder for folder in (sweep / "trials").iterdir() if read_trial(folder).lr0 == 0.01)
    bound = read_trial(trial).arm["update_clip"]
    (trial / "results.csv").unlink()
    build_report(sweep)
    arm = next(arm for arm in summary_of(sweep)["arms"] if arm["arm"]["update_clip"] == bound)
    for name in ("quality_sensitivity", "basin_decades", "usable_decades"):
        assert (arm[name], arm["reasons"][name]) == (None, "a run has no final metric")


def test_a_cap_is_named_also_where_its_trial_failed_before_it_said_so(tmp_path: Path) -> None:
    spec = read_spec(SPEC | {"grid": {"lr0": [0.01], "update_clip": [0.01, 0.1, 0.3]}, "seeds": [0, 1]})
    folder = tmp_path / "caps"
    (folder / "trials").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(spec)))
    for trial in plan(spec, folder):
        path = write_trial(folder, trial)
        if trial.seed and trial.point["update_clip"] == 0.1:
            (path / "gradstab" / "config.yaml").unlink()
            RunFolder(path).write_status(Status(outcome="failed", reason="RuntimeError: no memory"))
    (comparison,), _ = gather([folder])
    table, title = comparison.grid_table()
    assert table["arm"].unique(maintain_order=True).to_list() == ["0.01", "0.1", "0.3"]
    assert title == "update_clip, with norm 10"


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    run = write_run(tmp_path / "train", losses=[math.nan] * 5, metrics=[math.nan])
    build_report(run)
    arm = summary_of(run)["arms"][0]
    assert arm["best"] == {"lr0": None, "metric": None, "low": None, "high": None}
    assert "best" in arm["reasons"]


def test_a_path_that_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nowhere: no such folder; give run folders or sweep folders"):
        build_report([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match="no folder given"):
        build_report([])
    with pytest.raises(ReportError, match=r"neither a run \(no gradstab folder\) nor a sweep"):
        build_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_the_command_says_when_there_is_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "train")
    (run / "gradstab/status.json").write_text("{")
    assert main(["report", str(run)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"yolo-gradstab: {run}: no run could be shown; cannot be read: ")
    assert captured.err.count("\n") == 1


def test_many_arms_are_a_grid_and_one_short_sentence(tmp_path: Path) -> None:
    caps = [None, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    spec = read_spec(SPEC | {"seeds": [0], "grid": {"lr0": [0.01, 0.1], "update_clip": caps}})
    (tmp_path / "caps" / "trials").mkdir(parents=True)
    (tmp_path / "caps" / "sweep.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(spec)))
    for trial in plan(spec, tmp_path / "caps"):
        losing = trial.lr0 == 0.1 and trial.arm["update_clip"] is None
        metrics = [0.0, 0.0] if losing else [0.1, 0.2 + (trial.arm["update_clip"] or 0) / 100]
        write_trial(
            tmp_path / "caps",
            trial,
            losses=COLLAPSE if losing else HEALTHY,
            norms=NORMS if losing else None,
            metrics=metrics,
        )
    text = build_report(tmp_path / "caps").read_text()
    assert "norm 10 lost 1 of 2 runs and the 8 others none; best mAP50-95: 0.300 (norm 10 + update_clip 10" in text
    assert 'data-figure="caps_grid"' in text
    assert "2 further arms are not drawn here" in text


def test_trials_of_another_training_are_not_pooled_and_named(sweep: Path) -> None:
    """A short try before, into the same folder; but a rate that was taken out of the grid again is shown."""
    build_report(sweep)
    before = summary_of(sweep)
    longer = read_spec(SPEC | {"grid": {"lr0": [0.003], "update_clip": [None]}})
    (shown, _) = plan(longer, sweep)
    write_trial(sweep, shown, metrics=[0.1, 0.2])
    short = read_spec(SPEC | {"train": SPEC["train"] | {"epochs": 2}})
    for trial in plan(short, sweep):
        write_trial(sweep, trial, metrics=[0.9, 0.9])
    build_report(sweep)
    after = summary_of(sweep)
    assert [arm["best"] for arm in after["arms"]] == [arm["best"] for arm in before["arms"]]
    assert [arm["trials"] for arm in after["arms"]] == [before["arms"][0]["trials"] + 1, before["arms"][1]["trials"]]
    reasons = [row["reason"] for row in after["not_shown"]]
    assert len(reasons) == len(plan(short, sweep))
    assert all("another training than the sweep's now (epochs=2, now epochs=" in reason for reason in reasons)


BASE = SPEC | {"grid": {"lr0": [0.01, 0.1]}, "seeds": [0, 1, 2]}
FAILED = {"status": Status(outcome="failed", reason="OSError: disk full", step=5)}
LOST = {"losses": COLLAPSE, "norms": NORMS, "metrics": [0.2, 0.0]}


def write_sweep(folder: Path, content: dict, run: Callable[[Trial], dict | None]) -> Path:
    """A sweep with the trials that are not there yet and for which `run` gives what became of them."""
    spec = read_spec(content)
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(spec)))
    for trial in plan(spec, folder):
        if not (folder / "trials" / trial.id).exists() and (how := run(trial)) is not None:
            ours = {"clip", "update_clip", "mitigations", "guard"}
            config = {key: value for key, value in trial.point.items() if key.partition(".")[0] in ours}
            path = write_run(folder / "trials" / trial.id, config=config, **how)
            (path / "trial.json").write_bytes(msgspec.json.encode(trial))
    return folder


def report_of(folder: Path) -> tuple[dict, str]:
    build_report(folder)
    return summary_of(folder), (folder / "report.md").read_text()


def test_a_longer_grid_counts_each_run_once(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "rates", BASE, lambda trial: {})
    write_sweep(folder, BASE | {"grid": BASE["grid"] | {"update_clip": [None, 0.03]}}, lambda trial: {})
    summary, _ = report_of(folder)
    assert [(arm["label"], arm["trials"], arm["num_seeds"]) for arm in summary["arms"]] == [
        ("norm 10", 6, 3), ("norm 10 + update_clip 0.03", 6, 3)
    ]  # fmt: skip
    assert [arm["arm"] for arm in summary["arms"]] == [{"update_clip": None}, {"update_clip": 0.03}]
    assert summary["not_shown"] == []


def test_a_trial_that_is_there_under_two_ids_counts_once(tmp_path: Path) -> None:
    """An earlier release trained it again; the one that counts is shown."""
    folder = write_sweep(tmp_path / "rates", BASE, lambda trial: FAILED if trial.lr0 == 0.1 else {})
    trials = plan(read_spec(BASE), folder)
    for number, trial in enumerate(trials):
        old = write_run(folder / "trials" / f"t{number:011d}", metrics=[0.1, 0.4])
        (old / "trial.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(trial, id=old.name)))
    summary, _ = report_of(folder)
    (arm,) = summary["arms"]
    assert (arm["trials"], arm["num_seeds"], arm["failed"]) == (6, 3, 0)
    dropped = {f"t{i:011d}" if trial.lr0 == 0.01 else trial.id for i, trial in enumerate(trials)}
    assert {Path(item["path"]).name for item in summary["not_shown"]} == dropped
    reason = "the same configuration, learning rate and seed as "
    assert all(item["reason"].startswith(reason) for item in summary["not_shown"])


def test_a_key_that_moves_into_the_grid_leaves_its_arm_whole(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "rates", BASE | {"seeds": [0]}, lambda trial: {})
    train = {key: value for key, value in SPEC["train"].items() if key != "optimizer"}
    grid = BASE["grid"] | {"optimizer": ["SGD", "AdamW"]}
    write_sweep(folder, BASE | {"train": train, "grid": grid, "seeds": [0, 1]}, lambda trial: {})
    summary, _ = report_of(folder)
    assert [(arm["label"], arm["trials"]) for arm in summary["arms"]] == [("SGD, norm 10", 4), ("AdamW, norm 10", 4)]
    assert [(pair["metric"]["num_pairs"], pair["metric"]["num_seeds"]) for pair in summary["comparisons"]] == [(4, 2)]


def test_a_part_that_makes_its_reader_panic_is_named_and_the_rest_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some bytes do in another place of the file; which ones depends on the reader's version."""
    folder = write_sweep(tmp_path / "rates", BASE, lambda trial: {})
    bad = next((folder / "trials" / plan(read_spec(BASE), folder)[0].id).glob("gradstab/layers/*.parquet"))
    read = pl.read_parquet

    def reader(path: Path, **options: Any) -> pl.DataFrame:
        if path == bad:
            raise pl.exceptions.PanicException("assertion failed: range.end as u64 <= self.size")
        return read(path, **options)

    monkeypatch.setattr(pl, "read_parquet", reader)
    (comparison,), (left_out,) = gather([folder])
    assert len(comparison.entries) == 5
    assert f"layers/{bad.name}: assertion failed: range.end" in left_out.reason


def test_data_or_model_in_the_grid_have_their_own_length_and_initial_loss(tmp_path: Path) -> None:
    def run(trial: Trial) -> dict:
        num_steps, loss = {"small.yaml": (60, 20.0), "large.yaml": (600, 2000.0)}[trial.arm[key]]
        if trial.lr0 == 0.01:
            status = Status(outcome="completed", step=num_steps, seconds=float(num_steps))
            return {"losses": [loss] * num_steps, "status": status, "metrics": [0.1, 0.3]}
        status = Status(outcome="diverged", divergence="blowup", reason="x", step=16, seconds=16.0)
        return {"losses": [loss] * 16, "status": status}

    for key in ("data", "model"):
        train = {name: value for name, value in SPEC["train"].items() if name != key}
        grid = BASE["grid"] | {key: ["small.yaml", "large.yaml"]}
        folder = write_sweep(tmp_path / key, BASE | {"train": train, "grid": grid}, run)
        summary, _ = report_of(folder)
        # Validation loss 5 - 2 x .3; a lost run counts as the loss at the start.
        assert [arm["lr_sensitivity"] for arm in summary["arms"]] == pytest.approx([(20 - 4.4) / 2, (2000 - 4.4) / 2])
        if key == "data":
            assert [arm["rmst"] for arm in summary["arms"]] == [(60 + 16) / 2, (600 + 16) / 2]
            assert summary["compute_saved"] == 3 * (60 - 16) + 3 * (600 - 16)
            assert summary["comparisons"][0]["survival_steps"]["reason"] == "runs of the two are not of one length"


def test_what_is_spared_is_not_said_of_a_length_that_no_run_had(tmp_path: Path) -> None:
    train = {name: value for name, value in SPEC["train"].items() if name != "epochs"}
    grid = BASE["grid"] | {"epochs": [3, 30]}
    lost = Status(outcome="diverged", divergence="blowup", reason="x", step=16, seconds=16.0)

    def run(trial: Trial) -> dict:
        return LOST | {"status": lost} if trial.arm["epochs"] == 30 or trial.lr0 == 0.1 else {}

    summary, _ = report_of(write_sweep(tmp_path / "rates", BASE | {"train": train, "grid": grid}, run))
    assert summary["compute_saved"] == 3 * (60 - 16)
    reason = "without norm 10, epochs 30: no run as long came to its end"
    assert summary["reasons"] == {"compute_saved": reason}


def test_better_is_said_of_the_rates_and_seeds_that_both_arms_have(tmp_path: Path) -> None:
    """The second ran at the lowest rate alone, where the first lost nothing either."""

    def run(trial: Trial) -> dict:
        return {} if trial.lr0 == 0.01 else FAILED if trial.arm["update_clip"] else LOST

    grid = {"lr0": [0.01, 0.1, 0.3, 1.0], "update_clip": [None, 0.03]}
    summary, text = report_of(write_sweep(tmp_path / "rates", BASE | {"grid": grid, "seeds": [0, 1, 2, 3, 4]}, run))
    row = effects(summary["arms"]).filter(pl.col("measure") == "runs lost").row(1, named=True)
    assert (row["words"], row["effect"]) == ("0 of 5", 0)
    old = [{key: value for key, value in arm.items() if key != "runs"} for arm in summary["arms"]]  # not known of them
    assert effects(old).filter(pl.col("measure") == "runs lost")["effect"].to_list() == [None, None]
    assert (
        " At the 5 pairs of learning rate and seed that all arms have, norm 10 lost 0 and norm 10 + update_clip 0.03 "
        "lost 0.**"
    ) in text


@pytest.mark.parametrize("started", [True, False])
def test_the_highest_stable_rate_and_the_basin_stop_at_a_rate_of_which_nothing_is_known(
    tmp_path: Path, started: bool
) -> None:
    def run(trial: Trial) -> dict | None:
        return {"metrics": [0.1, 0.3]} if trial.lr0 not in missing else FAILED if started else None

    missing = {0.1}
    content = BASE | {"grid": {"lr0": [0.01, 0.03, 0.1, 0.3, 1.0]}}
    summary, text = report_of(write_sweep(tmp_path / "rates", content, run))
    (arm,) = summary["arms"]
    assert (arm["max_stable_lr"], arm["basin_decades"]) == (0.03, pytest.approx(math.log10(3)))
    assert arm["reasons"]["max_stable_lr"] == "at least: no run at lr0 0.1 counts"
    assert arm["reasons"]["basin_decades"].endswith("; no run at lr0 0.1 counts")
    assert "| norm 10 | ≥ 0.03 |" in text
    missing = {0.01}
    summary, _ = report_of(write_sweep(tmp_path / "lowest", content, run))
    (arm,) = summary["arms"]
    assert (arm["max_stable_lr"], arm["reasons"]["max_stable_lr"]) == (None, "no run at lr0 0.01 counts")


def test_the_smallest_p_that_is_said_is_that_of_the_table(tmp_path: Path) -> None:
    def run(trial: Trial) -> dict:
        lost = trial.lr0 == 0.1 and trial.arm["update_clip"] is None and trial.seed > 2
        return FAILED if lost else {"metrics": [0.1, 0.3 + 0.01 * trial.seed]}

    content = BASE | {"grid": BASE["grid"] | {"update_clip": [None, 0.03]}, "seeds": [0, 1, 2, 3, 4]}
    summary, text = report_of(write_sweep(tmp_path / "rates", content, run))
    assert summary["comparisons"][0]["metric"]["smallest_p"] == 0.0625
    assert "With 3 runs per setting, 0 of 3 diverged is still compatible" in text
    assert "no paired comparison by seed can give a p below 0.0625" in text


def test_where_no_run_counts_it_is_said_why(tmp_path: Path) -> None:
    _, text = report_of(write_sweep(tmp_path / "rates", BASE, lambda trial: FAILED))
    assert "**No run counts: 6 failed.**" in text
    running = {"status": Status(outcome="running", step=5)}
    _, text = report_of(write_sweep(tmp_path / "begun", BASE, lambda trial: running))
    assert "**No run has ended yet.**" in text


def test_spikes_have_two_significant_digits(tmp_path: Path) -> None:
    norms = np.random.default_rng(0).lognormal(3, 0.1, 3000)
    norms[500::400] *= 50  # 7 of them
    for seed in (0, 1):
        write_run(tmp_path / str(seed), losses=[100.0] * 3000, norms=norms.tolist(), args={"seed": seed})
    build_report([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert "| 0.23%, 0.23% |" in (tmp_path / "out" / "report.md").read_text()
    assert "<td>0.23%</td><td>0.23%</td>" in (tmp_path / "out" / "report.html").read_text()


def test_lone_runs_of_several_trainings_are_told_apart_in_the_files(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{task}{seed}", args={"task": task, "model": "m.yaml", "data": "d.yaml", "seed": seed})
        for task in ("detect", "pose")
        for seed in (0, 1)
    ]
    build_report(runs, tmp_path / "out")
    table = pl.read_csv(tmp_path / "out" / "trials.csv")
    assert table.columns[-4:] == ["task", "model", "data", "metric_name"]
    assert table.select(table.columns[-4:]).row(2) == ("pose", "m.yaml", "d.yaml", "mAP50-95")
    names = [arm["comparison"] for arm in summary_of(tmp_path / "out")["arms"]]
    assert names == ["detect: m.yaml on d.yaml", "pose: m.yaml on d.yaml"]


def test_a_sweep_whose_configuration_file_is_elsewhere_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("mine.yaml")
    file.write_text("clip: agc")
    spec = read_spec(SPEC | {"train": SPEC["train"] | {"gradstab": "mine.yaml"}, "grid": {"lr0": [0.01]}})
    (tmp_path / "rates" / "trials").mkdir(parents=True)
    (tmp_path / "rates" / "sweep.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(spec)))
    for trial in plan(spec, tmp_path / "rates"):
        write_trial(tmp_path / "rates", trial)
    file.write_text("clip: norm")
    build_report(tmp_path / "rates")
    assert "the file of gradstab= was another" in summary_of(tmp_path / "rates")["not_shown"][0]["reason"]
    file.unlink()
    build_report(tmp_path / "rates")
    summary = summary_of(tmp_path / "rates")
    assert summary["arms"][0]["trials"] == 2
    assert "gradstab=mine.yaml: cannot be read" in summary["not_shown"][0]["reason"]


def write_many(folder: Path, num_trials: int, num_steps: int) -> None:
    seeds = list(range(num_trials // 20))
    spec = read_spec(
        SPEC | {"seeds": seeds, "grid": {"lr0": [0.003, 0.01, 0.03, 0.1, 0.3], "update_clip": [None, 0.01, 0.03, 0.1]}}
    )
    generator = np.random.default_rng(0)
    for trial in plan(spec, folder):
        losing = trial.lr0 == 0.3 and trial.arm["update_clip"] is None
        losses = generator.lognormal(sigma=0.3, size=num_steps) * (1e3 if losing else 1)
        write_trial(
            folder, trial, losses=losses.tolist(), norms=(losses * 100).tolist(), metrics=[0.1, 0.0 if losing else 0.3]
        )


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    write_many(tmp_path / "large", 40, 1500)
    assert build_report(tmp_path / "large").stat().st_size < 5e6


@pytest.mark.slow
def test_a_hundred_trials_of_5000_steps_make_a_page_below_5_mb(tmp_path: Path) -> None:
    write_many(tmp_path / "large", 100, 5000)
    code = (
        "import sys, time, resource\nfrom yolo_gradstab.report import build_report\nstarted = time.monotonic()\n"
        "page = build_report(sys.argv[1])\n"
        "print(page.stat().st_size, time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large")], capture_output=True, text=True, check=True
    )
    size, seconds, memory_kb = map(float, done.stdout.split())
    print(f"{size / 1e6:.2f} MB, {seconds:.1f} s, {memory_kb / 1e6:.2f} GB")
    assert size < 5e6
    assert memory_kb < 1.5e6


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page in")
def test_the_page_draws_every_figure_offline_without_an_error(sweep: Path, tmp_path: Path) -> None:
    (sweep / "trials").joinpath("a<b>").mkdir()  # a folder named like markup, which cannot be read
    page = build_report(sweep)
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=10000",
            "--dump-dom", page.resolve().as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert messages == []
    places = page.read_text().count("data-figure=")
    assert done.stdout.count('class="marks"') == places > 4  # what Vega draws into
    assert "<b>" not in done.stdout.split("<script")[0]


def test_reports_need_neither_torch_nor_ultralytics() -> None:
    code = "import sys, yolo_gradstab.report, yolo_gradstab.sweep; print({'torch', 'ultralytics'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "set()"


def an_arm(label: str, *, lost: tuple[float, float], slope: tuple[float, float], best: tuple[float, float]) -> dict:
    return {
        "label": label, "diverged": 2, "trials": 8, "num_seeds": 2, "max_stable_lr": 0.1,
        "divergence_rate": {"value": sum(lost) / 2, "low": lost[0], "high": lost[1]},
        "depth_slope": {"start": {"value": sum(slope) / 2, "low": slope[0], "high": slope[1]}},
        "depth_norm": {"start": {"value": 0.125, "low": 0.1, "high": 0.2}},
        "best": {"lr0": 0.01, "metric": sum(best) / 2, "low": best[0], "high": best[1]},
    }  # fmt: skip


def test_an_effect_is_said_only_where_intervals_lie_apart() -> None:
    first = an_arm("as it is", lost=(0.1, 0.4), slope=(-0.3, -0.1), best=(0.2, 0.3))
    better = an_arm("better", lost=(0.0, 0.05), slope=(-0.06, 0.02), best=(0.31, 0.4))
    worse = an_arm("worse", lost=(0.5, 0.9), slope=(0.4, 0.6), best=(0.0, 0.1))
    same = an_arm("same", lost=(0.05, 0.2), slope=(0.1, 0.3), best=(0.1, 0.25))  # a slope as steep, the other way
    table = effects([first, better, worse, same], metric="mAP")
    found = {(row["arm"], row["measure"].partition("|")[0]): row["effect"] for row in table.iter_rows(named=True)}
    judged = {label: [found[label, name] for name in ("slope over depth", "runs lost", "best mAP")]
              for label in ("as it is", "better", "worse", "same")}  # fmt: skip
    assert judged == {"as it is": [None] * 3, "better": [1, 1, 1], "worse": [-1, -1, -1], "same": [0, 0, 0]}
    assert {
        row["effect"] for row in table.iter_rows(named=True) if row["measure"].startswith(("largest", "gradient"))
    } == {None}
    words = table.filter(pl.col("arm") == "better")["words"].to_list()
    one = [arm | {"num_seeds": 1} for arm in (first, better)]
    assert effects(one).filter(pl.col("measure").str.starts_with("best"))["effect"].to_list() == [None, None]
    assert effects(one)["words"].to_list()[-1] == "0.355"
    assert words == ["−0.02", "0.12", "2 of 8", "0.1", "0.355 (0.310 to 0.400)"]


def test_what_was_not_measured_is_not_judged() -> None:
    first = an_arm("as it is", lost=(0.1, 0.4), slope=(-0.3, -0.1), best=(0.2, 0.3))
    bare = {key: value for key, value in first.items() if key != "depth_norm"}  # as older summaries
    bare |= {"label": "bare", "depth_slope": {}, "max_stable_lr": None}
    bare |= {"best": dict.fromkeys(("lr0", "metric", "low", "high"))}
    rows = effects([first, bare]).filter(pl.col("arm") == "bare")
    assert rows["words"].to_list() == ["not recorded", "not recorded", "2 of 8", "none", "none"]
    assert rows["effect"].to_list() == [None, None, 0, None, None]
