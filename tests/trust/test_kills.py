"""What the killer would notice, on folders made by hand; and real kills, which take minutes, as slow tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_telemetry import record

from trust.kills import MOST_LOST_S, SHAPES, Training, readable, unequal
from yolo_gradstab.runs import RunFolder, Status
from yolo_gradstab.telemetry import STEP_SCHEMA, PartWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches folders by inotify, and forks")


def killed(folder: Path, *, made: range, recorded: list[int], apart_s: float = 0.01) -> tuple[Training, float]:
    """A run that made these steps, so many seconds apart, and recorded those."""
    training = Training(folder, SHAPES[0], folder / "data.yaml")
    training.parts = 1
    now = time.time()
    lines = [f"1 {step} {now - apart_s * (len(made) - i)}\n" for i, step in enumerate(made)]
    training.diary.write_text("".join(lines))
    run = RunFolder(training.run)
    run.hold()
    run.create({})
    run.write_status(Status())
    run.release()  # as its end would
    writer = PartWriter(run.steps, STEP_SCHEMA)
    writer.append(record(step).row() for step in recorded)
    writer.close()
    return training, now


def test_a_run_that_lost_its_last_moments_is_in_order(tmp_path: Path) -> None:
    training, now = killed(tmp_path, made=range(10), recorded=list(range(8)), apart_s=0.5)
    found = readable(training, now)
    assert found["wrong"] == []
    assert (found["lost_steps"], round(found["lost_s"], 1), found["outcome"]) == (2, 1.0, "interrupted")


@pytest.mark.parametrize(
    ("recorded", "apart_s", "words"),
    [
        ([0, 1, 2, 2, 3], 0.01, "a record is there twice"),
        ([0, 1, 3, 4], 0.01, "steps are missing before the last one"),
        ([0, 1], MOST_LOST_S, "s of records lost"),
    ],
)
def test_what_is_wrong_is_noticed(tmp_path: Path, recorded: list[int], apart_s: float, words: str) -> None:
    training, now = killed(tmp_path, made=range(5), recorded=recorded, apart_s=apart_s)
    assert any(words in wrong for wrong in readable(training, now)["wrong"])


def test_a_status_that_is_not_true_and_an_epoch_that_is_there_twice_are_noticed(tmp_path: Path) -> None:
    training, now = killed(tmp_path, made=range(5), recorded=list(range(5)))
    (training.run / "results.csv").write_text("epoch,time\n1,0.1\n2,0.2\n2,0.2\n")
    RunFolder(training.run).lock.unlink()
    assert readable(training, now)["wrong"] == ["the status says running", "an epoch is twice in results.csv"]


def test_one_bit_is_a_difference() -> None:
    import torch

    state = {"model": {"a": torch.ones(3), "b": [1, float("nan")]}, "step": 4}
    other = {"model": {"a": torch.ones(3), "b": [1, float("nan")]}, "step": 4}
    assert unequal(state, other, "state") == []
    other["model"]["a"][1] = torch.nextafter(torch.ones(()), torch.zeros(()))  # type: ignore[index]
    other["step"] = 5
    assert unequal(state, other, "state") == ["state.model.a", "state.step"]


def run(*words: str) -> list[dict[str, Any]]:
    """The command, which says what did not hold."""
    done = subprocess.run(
        [sys.executable, "-m", "trust.kills", "format=json", *words],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [words for row in rows for words in row["wrong"] if not words.startswith("skipped")] == []
    assert done.returncode == 0
    return rows


@pytest.mark.slow
def test_fifty_kills_and_ten_terminations() -> None:
    rows = run("only=training,terms", "kills=50", "terms=10")
    assert sum(row["kills"] for row in rows) == 60
    assert all(row["most_lost_s"] <= MOST_LOST_S for row in rows)
    assert sum(row["resumed"] for row in rows) >= 15


@pytest.mark.slow
def test_killed_sweeps_full_and_read_only_disks_and_shared_folders() -> None:
    assert len(run("only=sweeps,disks,neighbours", "sweeps=3")) == 8
