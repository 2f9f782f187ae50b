"""Reports from synthetic run folders, written by the package's own writers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
import yaml

from yolo_gradstab.config import load_config
from yolo_gradstab.report import ReportError, arm_label, build_report, judge, loss_breakdown
from yolo_gradstab.runs import RunFolder, Status
from yolo_gradstab.sweep import Trial, plan, read_spec
from yolo_gradstab.telemetry import STEP_SCHEMA, PartWriter, StepRecord

# Recorded: yolo11n, SGD, lr0 0.1, no clipping (ALGORITHMS F14).
COLLAPSE = [227, 218, 201, 241, 200, 391, 4240, 14216, 268, 237, 161, 7681, 2.25e8, 0.0099, 0.0011, 0.0033]
HEALTHY = [200.0 * math.exp(-i / 60) for i in range(60)]

SPEC = {
    "task": "detect",
    "train": {"model": "tiny.yaml", "data": "drawn.yaml", "optimizer": "SGD", "epochs": 3},
    "grid": {"lr0": [0.01, 0.1], "update_clip": [None, 0.03]},
    "seeds": [0, 1],
}


def write_run(
    folder: Path,
    *,
    config: dict | None = None,
    losses: list[float] = HEALTHY,
    metrics: list[float] = (0.1, 0.3),
    status: Status | None = None,
    args: dict | None = None,
) -> Path:
    """A run folder as the trainer leaves it."""
    run = RunFolder(folder)
    run.create(load_config(config).to_dict())
    writer = PartWriter(run.steps, STEP_SCHEMA)
    writer.append(
        StepRecord(
            step=i, epoch=0, attempt=0, batch=i, images=16, lr=0.01 if i % 2 else 0.03, loss=loss, losses={"box": loss},
            total_norm=40.0, clipped_norm=10.0, clip_coef=0.25 if i % 2 else 1.0, bounded_share=None,
            update_ratio_max=None, nonfinite=0, skipped=False, scale=1.0, time_s=0.1 * i,
        ).row()
        for i, loss in enumerate(losses)
    )  # fmt: skip
    writer.flush()
    lines = [f"{epoch},{value}" for epoch, value in enumerate(metrics, 1)]
    (folder / "results.csv").write_text("\n".join(["epoch,metrics/mAP50-95(B)", *lines]) + "\n")
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
            nan = Status(outcome="failed", step=16, reason="RuntimeError: loss is NaN | gave up", seconds=3.0)
            status = nan if trial.seed else None
            write_trial(folder, trial, losses=COLLAPSE, metrics=[0.2, 0.0], status=status)
        else:
            metric = {0.01: 0.30, 0.1: 0.40}[trial.lr0] + 0.02 * trial.seed
            write_trial(folder, trial, metrics=[0.1, metric])
    return folder


def summary_of(folder: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


# Judging


def test_the_recorded_collapse_is_lost_and_a_healthy_run_kept() -> None:
    assert judge("completed", 0.0, COLLAPSE, best_metric=0.3)[0] == "lost"
    assert "at step 12" in judge("completed", 0.0, COLLAPSE, best_metric=0.3)[1]
    assert judge("completed", 0.3, HEALTHY, best_metric=0.3) == ("kept", "")


def test_a_metric_of_zero_without_blow_up_did_not_learn() -> None:
    assert judge("completed", 0.0, HEALTHY, best_metric=0.3) == ("did not learn", "")


def test_nothing_counts_as_lost_where_nothing_could_be_learned() -> None:
    verdict, why = judge("completed", 0.0, COLLAPSE, best_metric=0.01)
    assert verdict == "did not learn"
    assert "times its start" in why


def test_the_step_is_the_recorded_one() -> None:
    assert "at step 120" in str(loss_breakdown([1.0] * 12 + [1e9], steps=range(0, 130, 10)))


@pytest.mark.parametrize("outcome", ["diverged", "failed", "stopped"])
def test_a_run_that_did_not_reach_its_end_is_lost(outcome: str) -> None:
    assert judge(outcome, 0.3, HEALTHY, best_metric=0.3)[0] == "lost"


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0] * 10 + [math.nan], "not finite at step 10"),
        ([1.0] * 12 + [100.1], "times its start at step 12"),
        ([1.0] * 10 + [0.00099] * 10, "collapsed"),
        ([1.0] * 3 + [1e9, math.inf] + [1.0] * 10, None),
        ([1.0] * 10 + [99.9, 0.00101], None),
        ([1e-9] * 4, None),
        ([], None),
    ],
)
def test_loss_breakdown_from_step_ten_on(losses: list[float], words: str | None) -> None:
    found = loss_breakdown(losses)
    assert found is None if words is None else words in found


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
        ({}, {"optimizer": "AdamW", "guard.nonfinite": "stop"}, "norm 10, optimizer AdamW, guard.nonfinite stop"),
    ],
)
def test_arm_labels(config: dict, arm: dict, label: str) -> None:
    assert arm_label(load_config(config).to_dict(), arm) == label


# The documents


def test_summary_counts_lost_runs_and_says_why_values_are_null(sweep: Path) -> None:
    build_report([sweep])
    stock, bounded = summary_of(sweep)["arms"]
    assert (stock["arm"], bounded["arm"]) == ({"update_clip": None}, {"update_clip": 0.03})
    assert (stock["trials"], stock["diverged"], bounded["diverged"]) == (4, 2, 0)
    assert stock["divergence_rate"] == {"value": 0.5, "low": None, "high": None}
    assert (stock["max_stable_lr"], bounded["max_stable_lr"]) == (0.01, 0.1)
    assert bounded["best"] == {"lr0": 0.1, "metric": pytest.approx(0.41), "low": 0.4, "high": pytest.approx(0.42)}
    assert stock["best"]["lr0"] == 0.01  # the collapsed run's earlier 0.2 does not count
    assert stock["lr50"] == {"value": None, "low": None, "high": None}
    assert {"lr50", "divergence_rate.low", "spike_score"} <= stock["reasons"].keys()
    assert stock["clipped_share"] == 0.5
    assert summary_of(sweep)["compute_saved"] is None


def test_effective_rate_weighs_the_clip_by_the_rate(sweep: Path) -> None:
    build_report(sweep)
    # lr alternates 0.03 (not clipped) and 0.01 (scaled to a quarter): (0.03 + 0.0025) / 0.04 of lr0.
    rows = pl.read_csv(sweep / "trials.csv").filter(pl.col("outcome") == "completed", pl.col("lr0") == 0.01)
    assert rows["lr_eff"].to_list() == pytest.approx([0.01 * 0.0325 / 0.04] * len(rows))


def test_trials_table_has_a_row_per_run(sweep: Path) -> None:
    build_report(sweep)
    rows = pl.read_csv(sweep / "trials.csv")
    assert len(rows) == 8
    lost = rows.filter(pl.col("verdict") == "lost").sort("seed")
    assert lost["arm"].to_list() == ["norm 10"] * 2
    assert lost["outcome"].to_list() == ["completed", "failed"]
    assert lost["best_metric"].to_list() == [0.2, 0.2]
    assert "times its start" in lost["note"][0]
    assert lost["note"][1].startswith("RuntimeError: loss is NaN | gave up")


def test_documents_lead_with_what_the_numbers_say(sweep: Path) -> None:
    page = build_report(sweep)
    sentence = "norm 10 kept 2 of 4 runs and norm 10 + update_clip 0.03 kept 4 of 4 runs; best mAP50-95"
    assert sentence in page.read_text()
    markdown = (sweep / "report.md").read_text()
    assert sentence in markdown
    for picture in ("figures/rates_metric.png", "figures/rates_trajectories.png"):
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
    run = write_run(tmp_path / "a<b>|c", status=Status(outcome="diverged", step=60, reason=reason))
    text = build_report([run], tmp_path / "out").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    rows = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("| a&lt;b")]
    assert len(rows) == 1
    assert rows[0].startswith(r"| a&lt;b&gt;\|c | norm 10 | 0.02 |")
    assert r"bad \`x\` \| &lt;script&gt;alert(1)&lt;/script&gt; \$x\$ second line" in rows[0]
    assert rows[0].replace(r"\|", "").count("|") == 15


def test_a_single_run_has_its_trajectories_and_no_comparison(tmp_path: Path) -> None:
    run = write_run(tmp_path / "train", config={"clip": "agc"})
    text = build_report(run).read_text()
    assert "train (agc 0.01, lr0 0.02) completed after 60 steps, 50% of them clipped: final mAP50-95 0.300." in text
    assert 'data-figure="train_trajectories"' in text
    assert "train_metric" not in text
    assert [path.name for path in (run / "figures").iterdir()] == ["train_trajectories.png"]


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
    assert reasons[folders[0].name] == "has not ended: it is running, or was killed, at step 60"
    assert "interrupted at step 9 (SIGINT)" in reasons[folders[1].name]
    assert "status.json" in reasons[folders[2].name]
    assert "cannot be read" in reasons[folders[3].name]
    assert "no gradstab folder" in reasons[folders[5].name]
    assert "failed before its first step: FileNotFoundError" in reasons[folders[6].name]
    assert len(pl.read_csv(sweep / "trials.csv")) == 2
    assert "Not shown" in (sweep / "report.html").read_text()
    assert folders[0].name in (sweep / "report.md").read_text()


def test_a_run_alone_is_shown_while_it_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "train", status=Status(outcome="running", step=50))
    text = build_report(run).read_text()
    assert "train (norm 10, lr0 0.02) is running, or was killed, after 60 steps, 50% of them clipped" in text
    assert "no final metric" in text
    assert 'data-figure="train_trajectories"' in text


def test_trials_that_were_not_started_are_counted(sweep: Path) -> None:
    import shutil

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


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    spec = read_spec(SPEC | {"seeds": list(range(6)), "grid": {"lr0": [0.01, 0.1], "update_clip": [None, 0.03]}})
    folder = tmp_path / "large"
    losses = np.random.default_rng(0).lognormal(size=3000).tolist()
    for trial in plan(spec, folder):
        write_trial(folder, trial, losses=losses)
    assert build_report(folder).stat().st_size < 5e6


def test_reports_need_neither_torch_nor_ultralytics() -> None:
    code = "import sys, yolo_gradstab.report, yolo_gradstab.sweep; print({'torch', 'ultralytics'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "set()"
