"""`yolo_gradstab.trackers`: what real trackers hold after a real training run equals the run's own records.

The host logs to none while pytest runs, so each run is a process of its own; and trackers are not among the packages of
the suite, since the host would log every run to them: `make test-trackers` puts them beside it.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import DrawnSet

from yolo_gradstab import read_run
from yolo_gradstab.trackers import COLUMNS, Trackers

TRAIN = """
import json, sys
from ultralytics import settings
settings.update(json.loads(sys.argv[1]))
from yolo_gradstab import trainer_for
trainer_for("detect", update_clip=0.1)(overrides=json.loads(sys.argv[2])).train()
"""

EPOCH_COLUMNS = ("grad/norm_p50", "grad/norm_max", "grad/clipped_share", "grad/lr_eff", "grad/skipped")


def train(drawn: DrawnSet, folder: Path, **settings: bool) -> dict[str, Any]:
    """One run with these trackers on and all others off; its own records by column, and the epochs' table."""
    off = dict.fromkeys(("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb"), False)
    words = [json.dumps(off | settings), json.dumps(drawn.arguments(folder, name="run"))]
    more = {"YOLO_CONFIG_DIR": str(folder / "settings"), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    more |= {"MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | more
    (folder / "settings").mkdir()
    command = [sys.executable, "-c", TRAIN, *words]
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "not logged" not in ran.stderr + ran.stdout
    steps = read_run(folder / "run").steps
    assert len(steps) == 8
    epochs = pl.read_csv(folder / "run" / "results.csv").rename(str.strip)
    return {"steps": {name: steps[name].to_list() for name in COLUMNS}, "epochs": epochs}


def test_tensorboard_holds_every_step_and_the_epochs_columns(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard; run `make test-trackers`"
    )
    known = train(drawn["detect"], tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name in COLUMNS:
        scalars = events.Scalars(f"step/{name}")
        assert [scalar.step for scalar in scalars] == list(range(8))
        assert [scalar.value for scalar in scalars] == pytest.approx(known["steps"][name], rel=1e-6)
    for name in EPOCH_COLUMNS:
        values = [scalar.value for scalar in events.Scalars(name)]
        assert values[:2] == pytest.approx(known["epochs"][name].to_list(), rel=1e-4)


def test_mlflow_holds_every_step_and_the_epochs_columns(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="no mlflow; run `make test-trackers`")
    known = train(drawn["detect"], tmp_path, mlflow=True)
    (metrics,) = (tmp_path / "mlruns").glob("*/*/metrics")  # a line each: time, value, step
    for name in COLUMNS:
        lines = [line.split() for line in (metrics / "step" / name).read_text().splitlines()]
        assert [int(line[2]) for line in lines] == list(range(8))
        assert [float(line[1]) for line in lines] == pytest.approx(known["steps"][name], rel=1e-12)
    for name in EPOCH_COLUMNS:
        lines = [line.split() for line in (metrics / name).read_text().splitlines()]
        assert [float(line[1]) for line in lines][:2] == pytest.approx(known["epochs"][name].to_list(), rel=1e-4)


def test_wandb_offline_holds_every_step_and_the_epochs_columns(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="no wandb; run `make test-trackers`")
    from wandb.proto import wandb_internal_pb2

    known = train(drawn["detect"], tmp_path, wandb=True)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    rows: list[dict[str, Any]] = []
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    steps = [row for row in rows if "step/total_norm" in row]
    assert [row["step/optimizer_step"] for row in steps] == list(range(8))
    for name in COLUMNS:
        assert [row[f"step/{name}"] for row in steps] == pytest.approx(known["steps"][name], rel=1e-12)
    epochs = [row for row in rows if "grad/norm_p50" in row]
    for name in EPOCH_COLUMNS:
        assert [row[name] for row in epochs][:2] == pytest.approx(known["epochs"][name].to_list(), rel=1e-4)


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, as W&B writes it: 7 bytes of its own, then blocks of 32 KiB holding pieces of records.

    A piece is a checksum (4 bytes), a length (2), a type (1: whole, 2: first, 3: middle, 4: last), and its bytes.
    """
    position, whole = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # too few for a piece: filled with zeros
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:
            yield whole
            whole = b""


class Writer:
    """TensorBoard's, which can break."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []
        self.is_broken = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.is_broken:
            raise OSError("No space left\non device")
        self.seen.append((name, value, step))


def test_only_a_tracker_at_work_gets_steps_and_one_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.utils.callbacks import tensorboard

    writer = Writer()
    monkeypatch.setattr(tensorboard, "WRITER", writer, raising=False)  # the host has none under pytest
    row = {"step": 3, "total_norm": 2.0, "loss": 1.5, "lr": None, "images": 16}

    assert Trackers({"on_fit_epoch_end": [train]}).log_steps([row]) == []
    assert writer.seen == []

    trackers = Trackers({"on_fit_epoch_end": [train, tensorboard.on_fit_epoch_end]})
    assert trackers.log_steps([]) == []
    assert trackers.log_steps([row]) == []
    assert writer.seen == [("step/total_norm", 2.0, 3), ("step/loss", 1.5, 3)]

    writer.is_broken = True
    said = trackers.log_steps([row])
    assert said == ["tensorboard: steps are not logged to it any more (No space left on device)"]
    assert trackers.log_steps([row]) == []
