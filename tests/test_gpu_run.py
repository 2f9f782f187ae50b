"""`configs/gpu/run.py`, what `make gpu` starts: the same command at toy size on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
from conftest import MODELS, ROOT

TOY = [
    "specs=drawn_pose", "pose_images=12", "jobs=2", "seeds=2", f"train.model={MODELS / 'yolo26-tiny-pose.yaml'}",
    "train.device=cpu", "train.amp=false", "train.epochs=1", "train.imgsz=32", "train.batch=4", "grid.lr0=[0.01]",
]  # fmt: skip


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "configs/gpu/run.py"), f"out={out}", *TOY, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_what_is_done_is_kept_and_the_next_call_goes_on(tmp_path: Path) -> None:
    done = run(tmp_path, "time_limit_s=300", "seeds=1")
    assert done.stdout.splitlines()[-1].startswith(f"Results: {tmp_path / 'trials.json'}")
    trials = json.loads((tmp_path / "trials.json").read_text())
    assert [(t["outcome"], t["seed"], t["steps"]) for t in trials] == [("completed", 0, 1)] * 2  # 8 images: one step
    assert sorted(str(t["point"]["update_clip"]) for t in trials) == ["0.03", "None"]
    steps = pl.read_parquet(tmp_path / "steps.parquet")
    assert steps.group_by("id").len().sort("id")["id"].to_list() == sorted(t["id"] for t in trials)
    assert pl.read_parquet(tmp_path / "layers.parquet").height > 0
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["device"].startswith("CPU")
    assert machine["versions"]["ultralytics"]
    # the time is up at once: what was done is still there
    started_s = time.monotonic()
    run(tmp_path, "time_limit_s=0")
    assert time.monotonic() - started_s < 30
    assert json.loads((tmp_path / "trials.json").read_text()) == trials
