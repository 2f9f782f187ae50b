"""Trials that are small programs writing real run folders: run here, killed, resumed, and on a Ray cluster."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import polars as pl
import pytest

from yolo_gradstab.executors import TrialState, _visible_gpus, devices, run_trials
from yolo_gradstab.report import build_report
from yolo_gradstab.runs import RunFolder, Status
from yolo_gradstab.telemetry import read_run
from yolo_gradstab.trial import SweepError, Trial, TrialProcess, read_trial

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks as on POSIX")

# A trial without a network: a run folder, written as the trainer writes it. `starts` and `ends` are its diary.
TRIAL = """
import os, sys, time
from pathlib import Path
from yolo_gradstab.runs import RunFolder, Status, terminable
from yolo_gradstab.telemetry import STEP_SCHEMA, PartWriter, StepRecord
folder, outcome = Path(sys.argv[1]), sys.argv[2]
seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
(folder / "starts").open("a").write("x")
if outcome == "crash":
    sys.exit("ValueError: the data is not there")
run = RunFolder(folder)
run.create({"clip": {"policy": "norm", "max_norm": 10.0}})
run.write_status(Status())
writer = PartWriter(run.steps, STEP_SCHEMA)
for step in range(3):
    writer.append([StepRecord(step=step, epoch=0, attempt=0, batch=step, images=16, lr=0.01, loss=4.0 - step, losses={},
        total_norm=1.0, clipped_norm=1.0, clip_coef=1.0, bounded_share=None, update_ratio_max=None, nonfinite=0,
        skipped=False, scale=1.0, time_s=0.0).row()])
writer.flush()
if outcome == "killed":
    os.kill(os.getpid(), 9)
if outcome in {"wait", "deaf"}:
    try:
        with terminable():
            (folder / "ready").touch()
            time.sleep(60)
    except SystemExit:
        if outcome == "deaf":
            time.sleep(60)
        run.write_status(Status(outcome="interrupted", step=3))
        raise
time.sleep(seconds)
with (folder / "results.csv").open("a") as file:
    file.write("epoch,metrics/mAP50-95(B)\\n1,0.5\\n2,0.41\\n")
print("threads", os.environ["OMP_NUM_THREADS"], "gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
divergence = "collapse" if outcome == "diverged" else None
run.write_status(Status(outcome=outcome, divergence=divergence, step=3, metrics={"metrics/mAP50-95(B)": 0.5}))
(folder / "ends").open("a").write("x")
"""


def acting(folder: Path, outcomes: list[str], seconds: float = 0.0) -> list[Trial]:
    """A trial per outcome, at learning rates of their own."""
    return [
        Trial(
            id=f"t{i:011d}",
            arm={},
            lr0=0.01 * (i + 1),
            seed=0,
            point={"lr0": 0.01 * (i + 1)},
            command=[sys.executable, "-c", TRIAL, str(folder / "trials" / f"t{i:011d}"), outcome, str(seconds)],
        )
        for i, outcome in enumerate(outcomes)
    ]


def place(folder: Path, trial: Trial) -> Path:
    return folder / "trials" / trial.id


def diary(folder: Path, trial: Trial, name: str) -> int:
    path = place(folder, trial) / name
    return len(path.read_text()) if path.exists() else 0


def silent(line: str) -> None:
    del line


# One after the other


def test_trials_run_are_recorded_and_not_run_again(tmp_path: Path) -> None:
    lines: list[str] = []
    trials = acting(tmp_path, ["completed", "diverged"])
    run_trials(trials, tmp_path, lines.append)
    assert lines[0] == f"2 trials in {tmp_path}, 0 of them already done; 1 at a time"
    assert lines[1].startswith("trial 1/2 lr0=0.01 seed=0: completed after 3 steps, mAP50-95 0.41, ")
    assert lines[2].startswith("about ")
    assert lines[3].startswith("trial 2/2 lr0=0.02 seed=0: diverged (collapse) after 3 steps, mAP50-95 0.41, ")
    assert read_trial(place(tmp_path, trials[0])) == trials[0]
    content = json.loads((place(tmp_path, trials[0]) / "trial.json").read_text())
    assert content.keys() == {"id", "arm", "lr0", "seed", "point", "command"}

    lines.clear()
    run_trials(trials, tmp_path, lines.append)
    assert lines == [f"2 trials in {tmp_path}, 2 of them already done; 1 at a time"]
    assert [diary(tmp_path, trial, "starts") for trial in trials] == [1, 1]


def test_a_failed_trial_does_not_stop_the_others_and_is_repeated_when_asked(tmp_path: Path) -> None:
    lines: list[str] = []
    trials = acting(tmp_path, ["crash", "completed"])
    run_trials(trials, tmp_path, lines.append)
    log = tmp_path / "trials" / f"{trials[0].id}.log"
    reason = "ended by exit status 1; its log ends: ValueError: the data is not there"
    assert lines[1].startswith(f"trial 1/2 lr0=0.01 seed=0: failed ({reason}), ")
    assert "trial 2/2 lr0=0.02 seed=0: completed" in lines[3]
    assert lines[-1] == f"1 of 2 trials failed; see {log}. retry=failed runs them again"
    status = read_run(place(tmp_path, trials[0])).status
    assert (status.outcome, status.reason) == ("failed", reason)

    mended = acting(tmp_path, ["completed", "completed"])
    run_trials(mended, tmp_path, silent)
    assert [diary(tmp_path, trial, "starts") for trial in trials] == [1, 1]
    run_trials(mended, tmp_path, silent, retry=True)
    assert [diary(tmp_path, trial, "starts") for trial in trials] == [2, 1]
    assert read_run(place(tmp_path, trials[0])).status.outcome == "completed"


def test_a_trial_that_was_killed_has_failed_and_says_by_what(tmp_path: Path) -> None:
    (trial,) = acting(tmp_path, ["killed"])
    run_trials([trial], tmp_path, silent)
    run = read_run(place(tmp_path, trial))
    assert run.status.outcome == "failed"
    assert run.status.reason == "ended by signal SIGKILL; its log ends: it left no output"
    assert len(run.steps) == 3


def test_records_of_an_unfinished_attempt_are_removed(tmp_path: Path) -> None:
    (trial,) = acting(tmp_path, ["completed"])
    stale = RunFolder(place(tmp_path, trial))
    stale.create({})
    stale.append_event({"event": "skip"})
    (stale.path / "results.csv").write_text("epoch,metrics/mAP50-95(B)\n1,0.9\n")
    run_trials([trial], tmp_path, silent)
    assert read_run(stale.path).events == []
    assert len(read_run(stale.path).steps) == 3
    assert read_run(stale.path).results.height == 2


@pytest.mark.parametrize("outcome", ["wait", "deaf"])
def test_a_time_limit_ends_a_trial_which_then_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    monkeypatch.setattr("yolo_gradstab.trial.STOP_GRACE_S", 1.0)
    trials = acting(tmp_path, [outcome, "completed"])
    run_trials(trials, tmp_path, silent, time_limit_s=8.0)
    status = read_run(place(tmp_path, trials[0])).status
    assert (status.outcome, status.reason) == ("failed", "not done after time_limit_s=8")
    assert read_run(place(tmp_path, trials[1])).status.outcome == "completed"


@pytest.mark.parametrize(("stop_after_s", "limit_s", "timed_out"), [(0.3, 0.6, False), (30.0, 0.3, True)])
def test_only_its_limit_times_a_trial_out(
    monkeypatch: pytest.MonkeyPatch, stop_after_s: float, limit_s: float, timed_out: bool
) -> None:
    """One that the sweep stops, and whose end takes beyond the limit, is interrupted, and goes on another time."""
    monkeypatch.setattr("yolo_gradstab.trial.STOP_GRACE_S", 1.0)
    process = TrialProcess()
    timer = threading.Timer(stop_after_s, process.stop)
    timer.start()
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    options = {"time_limit_s": limit_s, "held": None}
    assert process.run([sys.executable, "-c", deaf], subprocess.DEVNULL, os.environ, **options) is None
    timer.cancel()
    assert process.timed_out is timed_out


def test_several_trials_run_at_once_and_share_threads_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr("yolo_gradstab.executors._visible_gpus", lambda: ["2", "5"])
    trials = acting(tmp_path, ["completed"] * 4, seconds=1.0)
    run_trials(trials, tmp_path, silent, jobs=2)
    logs = [(tmp_path / "trials" / f"{trial.id}.log").read_text() for trial in trials]
    assert all(log.startswith("threads 3 gpus ") for log in logs)
    assert sorted(log.split()[-1] for log in logs[:2]) == ["2", "5"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.rmtree(tmp_path / "trials")
    run_trials(trials[:1], tmp_path, silent, jobs=2, own_device=True)
    assert (tmp_path / "trials" / f"{trials[0].id}.log").read_text().startswith("threads 1 gpus None")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch is asked in any case")
def test_torch_is_asked_for_gpus_only_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As importing it takes seconds; and of the devices that are given those are taken that it sees."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 2)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    drivers: set[str] = set()
    monkeypatch.setattr(os.path, "exists", drivers.__contains__)
    assert _visible_gpus() == []
    for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"):
        drivers.clear()
        drivers.add(driver)
        assert _visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,7")
    assert _visible_gpus() == ["3", "5"]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert _visible_gpus() == []


def test_gpus_are_dealt_out_in_turn() -> None:
    assert [devices(slot, ["0", "1"])["CUDA_VISIBLE_DEVICES"] for slot in range(5)] == ["0", "1", "0", "1", "0"]
    assert devices(0, []) == {}


def test_states_show_what_runs_and_what_has_ended(tmp_path: Path) -> None:
    looks: list[list[TrialState]] = []
    trials = acting(tmp_path, ["diverged", "completed"], seconds=2.0)
    run_trials(trials, tmp_path, silent, watch=looks.append)
    running = [states for states in looks if states[0].outcome == "running" and states[0].step]
    assert running
    assert (running[0][0].step, running[0][0].loss, running[0][0].total_norm) == (2, 2.0, 1.0)
    assert running[0][1].outcome is None
    assert [(state.outcome, state.divergence, state.metric) for state in looks[-1]] == [
        ("diverged", "collapse", 0.41),
        ("completed", None, 0.41),
    ]


def test_a_failed_trial_that_waits_to_be_run_again_is_not_shown_as_failed(tmp_path: Path) -> None:
    looks: list[list[TrialState]] = []
    trials = acting(tmp_path, ["completed", "completed"], seconds=1.5)
    for trial in trials:
        run = RunFolder(place(tmp_path, trial))
        run.create({})
        run.write_status(Status(outcome="failed", reason="OSError: disk full"))
        (run.path / "trial.json").write_bytes(msgspec.json.encode(trial))
        os.utime(run.path / "trial.json", (1e9, 1e9))
    run_trials(trials, tmp_path, silent, watch=looks.append, retry=True)
    assert {state.outcome for states in looks for state in states} == {None, "running", "completed"}
    assert [state.outcome for state in looks[-1]] == ["completed", "completed"]


HOLDER = """
import sys
from yolo_gradstab.runs import RunFolder, Status
run = RunFolder(sys.argv[1])
run.hold()
run.create({})
run.write_status(Status(step=100))
print("held", flush=True)
sys.stdin.readline()
run.append_event({"event": "skip", "step": 100})
run.write_status(Status(outcome="completed", step=200))
"""


def test_a_trial_that_is_resumed_by_hand_is_waited_for_and_its_records_are_kept(tmp_path: Path) -> None:
    (trial,) = acting(tmp_path, ["completed"])
    path = place(tmp_path, trial)
    path.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as byhand:
        assert byhand.stdout is not None
        assert byhand.stdout.readline() == "held\n"
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if "another process" in line:
                threading.Timer(0.5, byhand.communicate, ["go\n"]).start()

        run_trials([trial], tmp_path, say)
        assert byhand.wait(10) == 0
    assert "lr0=0.01 seed=0: another process trains into it; waiting for it" in said
    assert diary(tmp_path, trial, "starts") == 0  # it had come to its end
    assert [event["step"] for event in read_run(path).events] == [100]


# Interrupted and killed

SWEEP = """
import sys, msgspec
from pathlib import Path
from yolo_gradstab.executors import run_trials
from yolo_gradstab.trial import Trial
folder = Path(sys.argv[1])
trials = msgspec.json.decode((folder / "input.json").read_bytes(), type=list[Trial])
run_trials(trials, folder, print, jobs=2, executor=sys.argv[2])
"""


def start(folder: Path, trials: list[Trial], executor: str = "local") -> subprocess.Popen[bytes]:
    """A sweep in a process of its own."""
    (folder / "input.json").write_bytes(msgspec.json.encode(trials))
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(folder), executor], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def until(holds: Any, limit_s: float = 120) -> None:
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_reaches_the_trials_and_is_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    trials = acting(tmp_path, ["wait", "wait", "completed", "completed"])
    with start(tmp_path, trials) as sweep:
        until(lambda: len(list(tmp_path.glob("trials/*/ready"))) == 2)
        sweep.send_signal(number)
        assert sweep.wait(40) != 0
    for trial in trials[:2]:
        assert read_run(place(tmp_path, trial)).status.outcome == "interrupted"
    for trial in trials[2:]:
        assert not place(tmp_path, trial).exists()


def test_two_sweeps_in_one_folder_are_refused(tmp_path: Path) -> None:
    trials = acting(tmp_path, ["wait"])
    with start(tmp_path, trials) as sweep:
        until(lambda: list(tmp_path.glob("trials/*/ready")))
        with pytest.raises(SweepError, match=r"sweep\.lock: another sweep is running in this folder; wait for it"):
            run_trials(trials, tmp_path, silent)
        sweep.send_signal(signal.SIGINT)
        sweep.wait(40)


def summary(folder: Path) -> tuple[Any, Any]:
    """What a report says, without what differs from run to run: times and places."""
    build_report([folder], folder / "report")
    content = json.loads((folder / "report" / "summary.json").read_text())
    arms = [{key: value for key, value in arm.items() if key not in {"seconds", "sweep"}} for arm in content["arms"]]
    trials = pl.read_csv(folder / "report" / "trials.csv").drop("seconds", "sweep", "path")
    return arms, trials.to_dicts()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_sweep_that_is_killed_goes_on_without_running_anything_twice(tmp_path: Path, seed: int) -> None:
    """kill -9 at a random moment leaves two trials running; the next sweep waits for them and takes their results."""
    outcomes = ["completed", "diverged", "completed", "completed", "diverged", "completed"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for folder in (broken, whole):
        (folder / "trials").mkdir(parents=True)
    trials = acting(broken, outcomes, seconds=1.0)
    sweep = start(broken, trials)
    until(lambda: diary(broken, trials[1], "starts"))
    time.sleep(random.Random(seed).uniform(0, 3))
    sweep.kill()
    _, errors = sweep.communicate()
    assert errors == b""
    lines: list[str] = []
    run_trials(trials, broken, lines.append, jobs=2)
    assert [diary(broken, trial, "ends") for trial in trials] == [1] * 6
    assert [diary(broken, trial, "starts") for trial in trials] == [1] * 6  # the orphans were not lost either
    run_trials(acting(whole, outcomes), whole, silent, jobs=2)
    assert summary(broken) == summary(whole)


def test_an_orphan_that_is_killed_too_is_run_again(tmp_path: Path) -> None:
    trials = acting(tmp_path, ["wait", "completed"])
    sweep = start(tmp_path, trials)
    until(lambda: list(tmp_path.glob("trials/*/ready")))
    sweep.kill()
    sweep.communicate()
    pattern = str(place(tmp_path, trials[0]))
    subprocess.run(["pkill", "-9", "-f", pattern], check=True)
    assert read_run(place(tmp_path, trials[0])).status.outcome == "running"  # nobody could correct it
    mended = acting(tmp_path, ["completed", "completed"])
    run_trials(mended, tmp_path, silent)
    assert read_run(place(tmp_path, trials[0])).status.outcome == "completed"
    assert diary(tmp_path, trials[0], "starts") == 2


# Ray


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of two nodes on this machine, for trials of one thread."""
    pytest.importorskip("ray", reason='needs Ray: pip install "yolo-gradstab[ray]"')
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own are not ours to fail on
def test_a_ray_node_that_dies_half_way_costs_no_trial(tmp_path: Path, cluster: Any) -> None:
    outcomes = ["completed", "diverged", "crash", "completed", "completed", "completed"]
    theirs, ours = tmp_path / "ray", tmp_path / "local"
    trials = acting(theirs, outcomes, seconds=3.0)
    lines: list[str] = []
    killed = False

    def kill_a_node(states: list[TrialState]) -> None:
        nonlocal killed
        if not killed and sum(state.outcome == "running" for state in states) >= 2:
            cluster.remove_node(cluster.second, allow_graceful=False)
            killed = True

    run_trials(trials, theirs, lines.append, jobs=3, executor="ray", watch=kill_a_node)
    assert killed
    assert [diary(theirs, trial, "ends") for trial in trials] == [1, 1, 0, 1, 1, 1]
    run_trials(acting(ours, outcomes), ours, silent)
    assert summary(theirs) == summary(ours)
    assert sum(line.startswith("trial ") for line in lines) == 6


def test_an_interruption_reaches_the_trials_of_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "yolo-gradstab[ray]"')
    trials = acting(tmp_path, ["wait", "wait", "completed"])
    with start(tmp_path, trials, "ray") as sweep:
        until(lambda: len(list(tmp_path.glob("trials/*/ready"))) == 2, 240)
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(60) != 0
        assert sweep.stderr is not None
        sweep.stderr.read()
    until(lambda: read_run(place(tmp_path, trials[0])).status.outcome == "interrupted")
    until(lambda: read_run(place(tmp_path, trials[1])).status.outcome == "interrupted")
    assert not place(tmp_path, trials[2]).exists()


def test_ray_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        SweepError, match=r"executor: ray needs Ray; install it with: pip install .yolo-gradstab\[ray\]"
    ):
        run_trials(acting(tmp_path, ["completed"]), tmp_path, silent, executor="ray")
