"""`configs/gpu/run.py`, what `make gpu` starts: the same command at toy size on the CPU."""

import inspect
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from conftest import MODELS, ROOT

from yolo_gradstab.bench import run_bench
from yolo_gradstab.sweep import read_spec

TOY = [
    "stages=pose", "pose_images=12", "jobs=2", "seeds=[0,1]", f"train.model={MODELS / 'yolo26-tiny-pose.yaml'}",
    "train.device=cpu", "train.amp=false", "train.epochs=1", "train.imgsz=32", "train.batch=4", "grid.lr0=[0.01]",
]  # fmt: skip


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "configs/gpu/run.py"), f"out={out}", *TOY, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_what_is_done_is_kept_and_the_next_call_goes_on(tmp_path: Path) -> None:
    done = run(tmp_path, "time_limit_s=300", "seeds=[0]")
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


def test_every_stage_is_a_sweep_that_is_accepted() -> None:
    stages = runpy.run_path(str(ROOT / "configs/gpu/run.py"))["SWEEPS"]
    optimizers, policies, models = set(), set(), set()
    for spec, *changes in stages.values():
        sweep = read_spec(ROOT / f"configs/gpu/{spec}.yaml", ["train.data=any.yaml", *changes])
        optimizers |= set(sweep.grid["optimizer"])
        policies |= {str(clip) for clip in sweep.grid.get("clip", [])}
        models.add((sweep.train["model"], sweep.train["imgsz"], sweep.train["amp"]))
    assert optimizers == {"SGD", "AdamW", "MuSGD"}
    assert policies == {"none", "{'policy': 'norm', 'max_norm': 1}", "agc", "zclip"}
    assert {("yolo26n.yaml", 320, True), ("yolo11n.yaml", 320, "bf16"), ("yolo26s.yaml", 640, "bf16")} < models


@pytest.mark.slow  # a minute
def test_the_bench_is_of_the_model_that_is_given(tmp_path: Path) -> None:
    model = str(MODELS / "yolo26-tiny.yaml")
    run(tmp_path, "stages=bench", f"train.model={model}", "seeds=[0]", "time_limit_s=500")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert {case["model"] for case in result["cases"]} == {model}
    assert {"clip_part", "train_step", "histograms"} < {case["case"] for case in result["cases"]}
    assert [(setting["precisions"], setting["blocks"]) for setting in result["settings"]] == [(["fp32"], 5)]
    # what is there is not timed again
    run(tmp_path, "stages=bench", f"train.model={model}", "time_limit_s=500")
    assert json.loads((tmp_path / "bench.json").read_text()) == result


def test_what_is_timed_is_what_the_bench_takes() -> None:
    """In the first stage the first question: what a step costs in half precision."""
    benches = runpy.run_path(str(ROOT / "configs/gpu/run.py"))["BENCHES"]
    accepted = inspect.signature(run_bench).parameters
    everything: dict[str, set[object]] = {"models": set(), "batches": {16}, "optimizers": set(), "precisions": {"fp32"}}
    for setting in [setting for settings in benches.values() for setting in settings]:
        assert setting.keys() <= accepted.keys()
        for key, found in everything.items():
            found.update(setting.get(key, ()))
    assert everything == {
        "models": {f"{name}.yaml" for name in ("yolo26n", "yolo26s", "yolo26m", "yolo26x", "yolo11n")},
        "batches": {16, 64},
        "optimizers": {"SGD", "AdamW", "MuSGD"},
        "precisions": {"fp32", "bf16", "fp16"},
    }
    assert [setting["precisions"] for setting in benches["bench"]] == [["bf16", "fp16"]]


def broken_model(folder: Path) -> Path:
    path = folder / "broken-pose.yaml"
    path.write_text("nc: 1\nkpt_shape: [17, 3]\nbackbone:\n  - [-1, 1, NoSuchLayer, []]\nhead: []\n")
    return path


def test_a_stage_that_breaks_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as broken:
        one = ["seeds=[0]", "grid.update_clip=[null]", f"train.model={broken_model(tmp_path)}"]
        run(tmp_path, "stages=bench,pose", "time_limit_s=300", *one)
    *_, results, last = broken.value.stdout.splitlines()
    assert results.startswith("Results: ")
    assert last == "Not to their end, for the reasons above: bench"
    assert "ended with status 1: " in broken.value.stdout
    outcomes = [trial["outcome"] for trial in json.loads((tmp_path / "trials.json").read_text())]
    assert outcomes == ["failed"]


@pytest.mark.slow  # as long as it takes to start two trials
def test_a_throughput_of_trials_that_failed_is_none(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as broken:
        run(tmp_path, "stages=throughput", f"train.model={broken_model(tmp_path)}", "time_limit_s=300")
    assert "throughput with jobs=1: 0 of 2 trials completed, so it is not counted" in broken.value.stdout
    assert not (tmp_path / "throughput.json").exists()


def test_seeds_are_a_list(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run(tmp_path, "seeds=3")
    assert refused.value.stderr == "seeds=3 must be a list of whole numbers, such as [0,1,2]\n"


@pytest.mark.slow  # six trials
def test_throughput_is_of_as_many_trials_for_each_job(tmp_path: Path) -> None:
    """Twice `jobs` at most: 1 and 2 here. And a stage that is none is refused before anything is started."""
    run(tmp_path, "stages=throughput", "jobs=1", "seeds=[0]", "time_limit_s=300")
    rows = json.loads((tmp_path / "throughput.json").read_text())
    assert [(row["jobs"], row["trials"]) for row in rows] == [(1, 2), (2, 4)]
    for row in rows:
        assert row["trials_per_hour"] == pytest.approx(3600 * row["trials"] / row["seconds"])
    assert len(list((tmp_path / "throughput").glob("2/trials/*/gradstab/status.json"))) == 4
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run(tmp_path, "stages=nonsense")
    assert refused.value.stderr.startswith("stages=nonsense is none of bench, detect, pose, throughput, ")


def test_a_stage_without_its_data_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTAB_DATA", str(tmp_path / "nowhere"))
    done = run(tmp_path, "stages=pose_coco,pose", "time_limit_s=0")
    folder = tmp_path / "nowhere" / "coco_open"
    assert f"pose_coco is left out: {folder} does not exist; set GRADSTAB_DATA to the folder that holds" in done.stdout
    assert "pose is left out" not in done.stdout
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run(tmp_path, "stages=pose_coco", "time_limit_s=0")
    assert refused.value.stderr == "no stage is left\n"


def test_a_drawn_set_is_drawn_once(tmp_path: Path) -> None:
    data_of = runpy.run_path(str(ROOT / "configs/gpu/run.py"))["data_of"]
    path = data_of("drawn_pose", tmp_path, 4)
    before = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")}
    assert data_of("drawn_pose", tmp_path, 4) == path
    assert {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")} == before
    whole = path.read_text()
    part = path.parent.rename(path.parent.with_suffix(".part"))  # as a drawing that was cut off leaves it
    (part / "data.yaml").write_text(whole.splitlines()[0] + "\n")
    assert data_of("drawn_pose", tmp_path, 4).read_text() == whole
    assert not part.exists()
