"""Sweeps whose trials are small programs that write real run folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from yolo_gradstab import sweep as sweep_module
from yolo_gradstab.config import ConfigError
from yolo_gradstab.runs import RunError, RunFolder
from yolo_gradstab.sweep import Spec, SweepError, Trial, plan, read_spec, read_trial, run_sweep, run_trials
from yolo_gradstab.telemetry import read_run

SPEC: dict[str, Any] = {
    "task": "detect",
    "train": {"model": "tiny.yaml", "data": "drawn.yaml", "optimizer": "SGD", "epochs": 3},
    "grid": {"lr0": [0.01, 0.1], "clip": ["none", {"policy": "norm", "max_norm": 10}]},
    "seeds": [0, 1],
}

# A trial without a network: a run folder, written as the trainer writes it.
TRIAL = """
import os, sys, time
from pathlib import Path
from yolo_gradstab.runs import RunFolder, Status
from yolo_gradstab.telemetry import STEP_SCHEMA, PartWriter, StepRecord
folder, outcome = Path(sys.argv[1]), sys.argv[2]
run = RunFolder(folder)
run.create({"clip": {"policy": "norm", "max_norm": 10.0}})
(folder / "starts").open("a").write("x")
if outcome == "crash":
    sys.exit("ValueError: the data is not there")
if outcome == "wait":
    run.write_status(Status())
    try:
        (folder / "ready").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        run.write_status(Status(outcome="interrupted"))
        raise SystemExit(130)
writer = PartWriter(run.steps, STEP_SCHEMA)
writer.append([StepRecord(step=0, epoch=0, attempt=0, batch=0, images=16, lr=0.01, loss=1.0, losses={}, total_norm=1.0,
    clipped_norm=1.0, clip_coef=1.0, bounded_share=None, update_ratio_max=None, nonfinite=0, skipped=False, scale=1.0,
    time_s=0.0).row()])
writer.flush()
(folder / "results.csv").write_text("epoch,metrics/mAP50-95(B)\\n1,0.5\\n2,0.41\\n")
print("threads", os.environ["OMP_NUM_THREADS"])
run.write_status(Status(outcome=outcome, metrics={"metrics/mAP50-95(B)": 0.5}))
"""


def acting(trials: list[Trial], folder: Path, **outcomes: str) -> list[Trial]:
    """The same trials with a small program for a command; `outcomes` are by number, as `t1="crash"`."""
    return [
        msgspec.structs.replace(
            trial,
            command=[
                sys.executable,
                "-c",
                TRIAL,
                str(folder / "trials" / trial.id),
                outcomes.get(f"t{i}", "completed"),
            ],
        )
        for i, trial in enumerate(trials)
    ]


def small(**changes: Any) -> Spec:
    return read_spec(SPEC | {"grid": {"lr0": [0.01, 0.1]}, "seeds": [0]} | changes)


# Reading


def test_spec_is_read_from_yaml_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(
        "task: pose\ntrain: {model: m.yaml, data: d.yaml, optimizer: SGD, weight_decay: 5e-4}\n"
        "grid: {lr0: [1e-3, 1E-2], update_clip: [null, 3e-2]}\n"
    )
    spec = read_spec(path, ["train.epochs=2", "seeds=[0,1]", "jobs=2", "grid.clip.max_norm=[1,10]"])
    assert spec.train == {"model": "m.yaml", "data": "d.yaml", "optimizer": "SGD", "weight_decay": 5e-4, "epochs": 2}
    assert spec.grid == {"lr0": [0.001, 0.01], "update_clip": [None, 0.03], "clip.max_norm": [1, 10]}
    assert (spec.seeds, spec.jobs, spec.executor) == ([0, 1], 2, "local")
    assert read_spec(path, {"seeds": [3], "train.lrf": "1e-2"}).seeds == [3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tusk": 1}, r"unknown key tusk=1; the nearest valid key is task"),
        ({"task": "segment"}, r"task must be detect or pose, got 'segment'"),
        ({"jobs": "two"}, r"jobs must be a whole number from 1, got 'two'"),
        ({"jobs": 0}, r"jobs must be a whole number from 1, got 0"),
        ({"seeds": []}, r"seeds must be a list of whole numbers, e\.g\. \[0, 1, 2\], none of them negative, got \[\]"),
        ({"seeds": [0, 0]}, r"seeds has 0 twice"),
        ({"executor": "ray"}, r"executor must be local, got 'ray'"),
        ({"grid": {"lr0": []}}, r"grid\.lr0 must be a list of at least one value, got \[\]"),
        ({"grid": {"lr0": 0.1}}, r"grid\.lr0 must be a list of at least one value, got 0\.1"),
        ({"grid": {"lr0": [0.1, 1e-1]}}, r"grid\.lr0 has 0\.1 twice; give each value once"),
        ({"grid": {"lr0": [2.0]}}, r"grid\.lr0 must be a number above 0 and at most 1.*, got 2\.0"),
        ({"grid": {"lr0": [0]}}, r"grid\.lr0 must be a number above 0 .*, got 0"),
        ({"train.lr0": 10}, r"train\.lr0 must be a number above 0 .*, got 10"),
        ({"train.lr0": 0.1}, r"lr0 is both in train and in grid; give it once"),
        (
            {"train.clip.max_norm": 5, "grid": {"clip": [{"max_norm": 9}]}},
            r"clip\.max_norm is both in train and in grid; give it once",
        ),
        ({"train.optimizer": "auto"}, r"optimizer=auto, .*, ignores lr0.*give train\.optimizer, e\.g\. SGD"),
        ({"grid": {"optimizer": ["SGD", "auto"]}}, r"optimizer=auto"),
        ({"train": {"model": "m", "data": "d"}}, r"optimizer=auto, Ultralytics' default, ignores lr0"),
        ({"train": {"optimizer": "SGD", "data": "d"}}, r"train\.model is missing; give what to train"),
        ({"train.seed": 3}, r"train\.seed cannot be set in a sweep; use the sweep's own `seeds"),
        ({"grid": {"seed": [1, 2]}}, r"grid\.seed cannot be set in a sweep; use the sweep's own `seeds"),
        ({"train.name": "x"}, r"train\.name cannot be set in a sweep"),
        ({"train.epocs": 3}, r"unknown key epocs; the nearest valid key is epochs"),
        ({"train.box": float("inf")}, r"box must be finite, got inf"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SweepError, match=words) as refused:
        read_spec(SPEC, changes)
    assert "\n" not in str(refused.value)


def test_our_keys_are_checked_for_every_combination() -> None:
    with pytest.raises(ConfigError, match=r"clip\.factor=0\.1 belongs to policy agc, not to norm"):
        read_spec(SPEC | {"grid": {"clip": ["agc", "norm"], "clip.factor": [0.1]}})
    with pytest.raises(ConfigError, match=r"update_clip\.max_ratio must be positive"):
        read_spec(SPEC | {"grid": {"update_clip": [None, -1]}})


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not valid YAML"), ("- 1", "must hold the keys task, train"), ("task: pose", "train is missing")],
)
def test_a_file_that_is_no_spec_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(SweepError, match=rf"rates\.yaml.* {words}"):
        read_spec(path)
    with pytest.raises(SweepError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        read_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(SweepError, match="'jobs' is not key=value"):
        read_spec(SPEC, ["jobs"])


@pytest.mark.parametrize("name", ["sample_detect", "sample_pose", "bccd_detect"])
def test_specs_in_the_project_are_valid(name: str) -> None:
    root = Path(__file__).parents[1]
    spec = read_spec(root / "configs" / "sweeps" / f"{name}.yaml")
    assert len(plan(spec, "out")) >= 30
    if name.startswith("sample"):
        assert (root / spec.train["model"]).is_file()


# Planning


def test_ids_do_not_depend_on_how_a_number_or_a_mapping_is_written() -> None:
    one = SPEC | {"grid": {"lr0": [0.1, 1], "update_clip": [{"max_ratio": 0.03, "follow_lr": True}]}}
    two = SPEC | {"grid": {"update_clip": [{"follow_lr": True, "max_ratio": "3e-2"}], "lr0": ["1e-1", 1.0]}}
    first, second = plan(read_spec(one), "a"), plan(read_spec(two), "b")
    assert [trial.id for trial in first] == [trial.id for trial in second]
    assert len({trial.id for trial in first}) == 4
    assert all(len(trial.id) == 12 for trial in first)
    # Read back from a command line, a name of digits alone (or 1e5...) would be a number and make another folder.
    assert all(trial.id[0] == "t" for trial in first)


def test_any_difference_in_the_configuration_is_another_trial() -> None:
    base = {trial.id for trial in plan(small(), "out")}
    for change in ({"seeds": [1]}, {"task": "pose"}, {"train": SPEC["train"] | {"epochs": 4}}):
        assert base.isdisjoint(trial.id for trial in plan(small(**change), "out"))


def test_a_longer_grid_keeps_the_trials_there_are() -> None:
    base = {trial.id for trial in plan(small(), "out")}
    assert base < {trial.id for trial in plan(small(seeds=[0, 1], grid={"lr0": [0.01, 0.1, 1.0]}), "out")}


def test_command_is_what_a_user_would_type() -> None:
    trial = plan(read_spec(SPEC), "out")[2]
    assert trial.point == {"lr0": 0.01, "clip": {"policy": "norm", "max_norm": 10}}
    assert trial.arm == {"clip": {"policy": "norm", "max_norm": 10}}
    assert trial.command[:5] == [sys.executable, "-m", "yolo_gradstab", "detect", "train"]
    assert trial.command[5:] == [
        "model=tiny.yaml", "data=drawn.yaml", "optimizer=SGD", "epochs=3", "lr0=0.01", "clip.policy=norm",
        "clip.max_norm=10", "warmup_bias_lr=0.1", "seed=0", f"project={Path('out/trials').absolute()}",
        f"name={trial.id}", "exist_ok=true",
    ]  # fmt: skip


def test_values_reach_the_command_as_they_are() -> None:
    train = SPEC["train"] | {"val": False, "lrf": 1e-5, "classes": [0, 2]}
    grid = {"update_clip": [None], "guard.nonfinite": ["off"], "clip": [{"policy": "agc", "exclude": ["bias", "norm"]}]}
    given = dict(
        text.split("=", 1) for text in plan(read_spec(SPEC | {"train": train, "grid": grid}), "o")[0].command[5:]
    )
    values = {key: yaml.safe_load(text) for key, text in given.items()}
    assert (values["val"], values["lrf"], values["classes"]) == (False, 1e-5, [0, 2])
    assert values["update_clip"] is None
    assert values["guard.nonfinite"] == "off"
    assert values["clip.exclude"] == ["bias", "norm"]


def test_bias_warm_up_is_scaled_with_the_rate_unless_given() -> None:
    def rates(spec: Spec) -> list[str]:
        return [text for trial in plan(spec, "out") for text in trial.command if text.startswith("warmup_bias_lr")]

    assert rates(small(grid={"lr0": [0.001, 0.007, 0.3]})) == [f"warmup_bias_lr={x}" for x in (0.01, 0.07, 0.1)]
    assert rates(small(train=SPEC["train"] | {"warmup_bias_lr": 0.0})) == ["warmup_bias_lr=0.0"] * 2


def test_the_rate_is_the_hosts_where_none_is_given() -> None:
    assert plan(small(grid={"clip": ["agc"]}), "out")[0].lr0 == 0.01


# Running


def test_trials_run_are_recorded_and_not_run_again(tmp_path: Path) -> None:
    spec, lines = small(), []
    trials = acting(plan(spec, tmp_path), tmp_path, t1="diverged")
    assert run_trials(spec, trials, tmp_path, lines.append) == tmp_path
    assert lines[0] == f"2 trials in {tmp_path}, 0 of them already done; 1 at a time"
    assert lines[1].startswith("trial 1/2 lr0=0.01 seed=0: completed, mAP50-95 0.41, ")
    assert lines[2].startswith("about ")
    assert lines[3].startswith("trial 2/2 lr0=0.1 seed=0: diverged, mAP50-95 0.41, ")
    assert read_spec(tmp_path / "sweep.yaml") == spec
    folder = tmp_path / "trials" / trials[0].id
    assert read_trial(folder) == trials[0]
    assert json.loads((folder / "trial.json").read_text()).keys() == {"id", "arm", "lr0", "seed", "point", "command"}

    lines.clear()
    run_trials(spec, trials, tmp_path, lines.append)
    assert lines == [f"2 trials in {tmp_path}, 2 of them already done; 1 at a time"]
    assert (folder / "starts").read_text() == "x"


def test_a_failed_trial_does_not_stop_the_others_and_is_repeated(tmp_path: Path) -> None:
    spec, lines = small(), []
    trials = acting(plan(spec, tmp_path), tmp_path, t0="crash")
    run_trials(spec, trials, tmp_path, lines.append)
    log = tmp_path / "trials" / f"{trials[0].id}.log"
    assert lines[1].startswith("trial 1/2 lr0=0.01 seed=0: failed (ValueError: the data is not there), ")
    assert "trial 2/2 lr0=0.1 seed=0: completed" in lines[3]
    assert lines[-1] == f"1 of 2 trials failed; see {log}. Start the sweep again to repeat them"
    run_trials(spec, acting(plan(spec, tmp_path), tmp_path), tmp_path, lines.append)
    assert read_run(tmp_path / "trials" / trials[0].id).status.outcome == "completed"


def test_records_of_an_unfinished_attempt_are_removed(tmp_path: Path) -> None:
    spec = small()
    trials = acting(plan(spec, tmp_path), tmp_path)
    stale = RunFolder(tmp_path / "trials" / trials[0].id)
    stale.create({})
    stale.append_event({"event": "skip"})
    run_trials(spec, trials, tmp_path, lambda line: None)
    assert read_run(stale.path).events == []
    assert len(read_run(stale.path).steps) == 1


def test_several_trials_run_at_once_and_share_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    spec = small(jobs=2)
    trials = acting(plan(spec, tmp_path), tmp_path)
    run_trials(spec, trials, tmp_path, lambda line: None)
    assert "threads 3" in (tmp_path / "trials" / f"{trials[0].id}.log").read_text()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.rmtree(tmp_path / "trials")
    run_trials(spec, trials, tmp_path, lambda line: None)
    assert "threads 1" in (tmp_path / "trials" / f"{trials[0].id}.log").read_text()


INTERRUPTED = """
import sys, msgspec
from pathlib import Path
from yolo_gradstab.sweep import Spec, Trial, run_trials
folder = Path(sys.argv[1])
spec, trials = msgspec.json.decode((folder / "input.json").read_bytes(), type=tuple[Spec, list[Trial]])
run_trials(spec, trials, folder, print)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_reaches_the_trials_and_is_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    spec = small(seeds=[0, 1], jobs=2)
    trials = acting(plan(spec, tmp_path), tmp_path, t0="wait", t1="wait")
    (tmp_path / "input.json").write_bytes(msgspec.json.encode((spec, trials)))
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], stderr=subprocess.DEVNULL) as sweep:
        deadline_s = time.monotonic() + 30
        while len(list(tmp_path.glob("trials/*/ready"))) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        sweep.send_signal(number)
        assert sweep.wait(40) != 0
    for trial in trials[:2]:
        assert read_run(tmp_path / "trials" / trial.id).status.outcome == "interrupted"
    for trial in trials[2:]:
        assert not (tmp_path / "trials" / trial.id).exists()


def test_run_sweep_starts_planned_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(task: str, arguments: dict[str, Any], folder: Path) -> list[str]:
        assert (task, arguments["optimizer"]) == ("detect", "SGD")
        return [sys.executable, "-c", TRIAL, str(folder), "completed"]

    monkeypatch.setattr(sweep_module, "trial_command", command)
    monkeypatch.chdir(tmp_path)
    Path("rates.yaml").write_text(yaml.safe_dump(SPEC | {"grid": {"lr0": [0.1]}, "seeds": [0]}))
    assert run_sweep("rates.yaml", say=lambda line: None) == Path("runs", "sweeps", "rates")
    assert run_sweep(read_spec("rates.yaml"), say=lambda line: None) == Path("runs", "sweeps", "rates")
    assert len(list(Path("runs/sweeps/rates/trials").glob("*/gradstab/status.json"))) == 1


def test_nothing_is_started_or_written_if_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="ignores lr0"):
        run_sweep(SPEC | {"train": {"model": "m", "data": "d"}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SweepError, match=r"out=.*file: cannot be made \(.*\); name another folder"):
        run_sweep(SPEC, tmp_path / "file")


def test_a_damaged_trial_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "trial.json").write_text("{")
    with pytest.raises(RunError, match=r"trial\.json: "):
        read_trial(tmp_path)
