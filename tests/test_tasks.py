"""Every task that the host trains: the same weights as the stock trainer's, records, judgement, report, command line.

One drawing gives every format: a tilted rectangle per image, its class by colour, as YOLO boxes, as corners (which are
outlines as well), as a mask, as a map of depths, and as a folder per class. Models are the host's own YAMLs at an
eighth of their width. What YOLO-World and YOLOE need of CLIP is drawn at random here: its weights are a download.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import DrawnSet, InterruptionError, train
from test_trainer import assert_same_training, faulty
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import TASK2METRIC
from ultralytics.cfg import TASKS as HOST_TASKS
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.nn.tasks import WorldModel, YOLOEModel
from ultralytics.utils import ROOT

from yolo_gradstab import build_report, read_run, trainer_for
from yolo_gradstab.cli import main
from yolo_gradstab.coco import CocoError
from yolo_gradstab.config import TASKS, ConfigError
from yolo_gradstab.guard import find_divergences
from yolo_gradstab.incident import read_incident
from yolo_gradstab.telemetry import QUALITY
from yolo_gradstab.trainer import host_model

pytestmark = pytest.mark.filterwarnings("default")  # the host's own warnings are not ours to fail on

SIZE = 64
NAMES = {0: "red", 1: "green"}
NUM = {"train": 8, "val": 4}

# Of each kind of model: its YAML in the host, and its loss's parts as the host names them.
KINDS: dict[str, tuple[str, set[str]]] = {
    "segment": ("26/yolo26-seg.yaml", {"box", "seg", "cls", "l1", "sem"}),
    "obb": ("26/yolo26-obb.yaml", {"box", "cls", "l1", "angle"}),
    "classify": ("26/yolo26-cls.yaml", {"loss"}),
    "rtdetr": ("v8/yolov8-rtdetr.yaml", {"giou", "cls", "l1"}),
    "semantic": ("26/yolo26-sem.yaml", {"ce", "dice", "aux"}),
    "depth": ("26/yolo26-depth.yaml", {"dlog", "dgrad"}),
    "world": ("v8/yolov8-worldv2.yaml", {"box", "cls", "dfl"}),
    "yoloe": ("v8/yoloe-v8.yaml", {"box", "cls", "dfl"}),
    "yoloe-seg": ("v8/yoloe-v8-seg.yaml", {"box", "seg", "cls", "dfl", "sem"}),
}
TASK_OF = {"rtdetr": "detect", "world": "detect", "yoloe": "detect", "yoloe-seg": "segment"}
FAST = ("segment", "classify", "rtdetr")


def kinds(*fast: str) -> list[Any]:
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def draw(folder: Path) -> dict[str, Path]:
    """The drawn set in every format; what to give as `data=`, by task."""
    rng = np.random.default_rng(0)
    for split, num in NUM.items():
        for index in range(num):
            cls = index % len(NAMES)
            box = (tuple(rng.uniform(24, 40, 2)), tuple(rng.uniform(16, 30, 2)), rng.uniform(0, 90))
            corners = cv2.boxPoints(box)
            image = rng.integers(0, 60, (SIZE, SIZE, 3)).astype(np.uint8)
            inside = cv2.fillPoly(np.zeros((SIZE, SIZE), np.uint8), [np.rint(corners).astype(np.int32)], 1)
            image[inside > 0, 2 - cls] += 180
            low, high = corners.min(0), corners.max(0)
            depth = np.linspace(1000, 3000, SIZE)[:, None] - 400.0 * inside * (1 + cls)  # mm
            for name, numbers in (("boxes", [*(low + high) / 2, *high - low]), ("corners", [*corners.ravel()])):
                write_image(folder / name / "images" / split / f"{index}.png", image)
                label = folder / name / "labels" / split / f"{index}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text(" ".join([str(cls), *(f"{number / SIZE:.6f}" for number in numbers)]) + "\n")
            write_image(folder / "maps" / "images" / split / f"{index}.png", image)
            write_image(folder / "maps" / "masks" / split / f"{index}.png", inside * np.uint8(1 + cls))
            write_image(folder / "maps" / "depth" / split / f"{index}.png", depth.astype(np.uint16))
            write_image(folder / "classes" / split / NAMES[cls] / f"{index}.png", image)
    ground = {0: "ground", 1: "red", 2: "green"}
    return {
        "detect": data_yaml(folder / "boxes", "detect", names=NAMES),
        "segment": data_yaml(folder / "corners", "segment", names=NAMES),
        "obb": data_yaml(folder / "corners", "obb", names=NAMES),
        "semantic": data_yaml(folder / "maps", "semantic", names=ground, masks_dir="masks"),
        "depth": data_yaml(folder / "maps", "depth", names={0: "depth"}, nc=1, depth_scale=1000),
        "classify": folder / "classes",
    }


def write_image(path: Path, image: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def data_yaml(folder: Path, task: str, **keys: Any) -> Path:
    path = folder / f"{task}.yaml"
    folders = {"path": str(folder), "train": "images/train", "val": "images/val"}
    path.write_text(yaml.safe_dump(folders | keys))
    return path


def tiny_model(folder: Path, kind: str) -> Path:
    """The host's architecture at an eighth of its width; RT-DETR's decoder is cut down too, which no scale does."""
    source = ROOT / "cfg" / "models" / KINDS[kind][0]
    model = yaml.safe_load(source.read_text()) | {"scales": {"t": [0.33, 0.125, 1024]}}
    if kind == "rtdetr":
        model["head"][-1][-1] = ["nc", 32, 20, 2, 2, 2]  # width, queries, points, heads, layers
    path = folder / source.name
    path.write_text(yaml.safe_dump(model, sort_keys=False))
    return path


class Tasks:
    """The drawn data and, made when first asked for, a run of each kind with our trainer and the stock one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = draw(folder / "data")
        self._runs: dict[str, tuple[Any, Any]] = {}

    def arguments(self, kind: str, folder: Path, **more: Any) -> dict[str, Any]:
        """Two batches of four, six times."""
        task = TASK_OF.get(kind, kind)
        arguments = {"model": str(tiny_model(self.folder, kind)), "data": str(self.data[task]), "task": task}
        arguments |= {"epochs": 6, "imgsz": SIZE, "batch": 4, "nbs": 4, "optimizer": "SGD", "lr0": 0.01}
        arguments |= {"device": "cpu", "workers": 0, "plots": False, "verbose": False, "val": False, "close_mosaic": 2}
        return arguments | {"project": str(folder), "exist_ok": True} | more

    def trainer(self, kind: str) -> type:
        """The stock one, as the host finds it."""
        return host_model(TASK_OF.get(kind, kind), str(tiny_model(self.folder, kind)))[1]

    def runs(self, kind: str) -> tuple[Any, Any]:
        if kind not in self._runs:
            stock, arguments = self.trainer(kind), self.arguments(kind, self.folder)
            ours = train(trainer_for(stock), arguments | {"name": kind})
            self._runs[kind] = ours, train(stock, arguments | {"name": f"{kind}-stock"})
        return self._runs[kind]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return Tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def drawn_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of a text that depend on nothing but the text."""

    def features(self: Any, text: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        seeds = (sum(map(ord, word)) for word in text)
        drawn = [torch.randn(512, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.nn.functional.normalize(torch.stack(drawn), dim=-1)[None]

    monkeypatch.setattr(WorldModel, "get_text_pe", features)
    monkeypatch.setattr(YOLOEModel, "get_text_pe", features)


# Every task ----------------------------------------------------------------------------------------------------------


def test_our_tasks_and_metrics_are_the_hosts() -> None:
    assert TASKS == HOST_TASKS
    assert set(TASK2METRIC.values()) == set(QUALITY)


@pytest.mark.parametrize("task", TASKS)
def test_trainer_for_a_task_is_the_hosts(task: str) -> None:
    ours = trainer_for(task)
    stock = YOLO.task_map.fget(None)[task]["trainer"]
    assert ours.__mro__[2] is stock
    assert ours.__name__ == f"Gradstab{stock.__name__}"


@pytest.mark.parametrize("kind", kinds(*FAST))
def test_default_is_stock_bit_for_bit(tasks: Tasks, kind: str) -> None:
    assert_same_training(*tasks.runs(kind))


@pytest.mark.parametrize("kind", kinds(*FAST))
def test_a_run_is_recorded_judged_and_reported(tasks: Tasks, tmp_path: Path, kind: str) -> None:
    trainer, _ = tasks.runs(kind)
    run = read_run(trainer.save_dir)
    assert (run.status.outcome, run.status.reason, run.status.divergence) == ("completed", None, None)
    assert len(run.steps) == 12
    parts = {name.removeprefix("loss_") for name in run.steps.columns if name.startswith("loss_")}
    assert parts == KINDS[kind][1]
    metric = TASK2METRIC[TASK_OF.get(kind, kind)]
    with (trainer.save_dir / "results.csv").open() as file:
        last = [{name.strip(): value for name, value in row.items()} for row in csv.DictReader(file)][-1]
    assert run.metric == pytest.approx(float(last[metric]))
    assert run.metric_name == QUALITY[metric]
    assert [event for event in run.events if event["event"] not in {"init"}] == []
    assert find_divergences(run.steps, run.layers, map50=run.map50) == []
    assert [finding for finding in run.diagnose() if finding.severity == "error"] == []
    report = build_report([trainer.save_dir], out=tmp_path / "report")
    text = report.with_name("report.md").read_text()
    assert f"final {QUALITY[metric]} {run.metric:.3f}" in text
    assert "nan" not in (report.with_name("summary.json")).read_text().lower()


@pytest.mark.parametrize("kind", kinds("classify"))
def test_the_loss_is_that_of_an_image_or_the_batchs_mean(tasks: Tasks, tmp_path: Path, kind: str) -> None:
    """Batches of 3, 3 and 2, two of them summed: whatever their sizes, the recorded loss is on the scale of one."""
    stock = tasks.trainer(kind)
    by_hand: list[float] = []
    pending: list[tuple[float, int]] = []

    class Watching(trainer_for(stock)):  # type: ignore[misc]
        def optimizer_step(self) -> None:
            pending.append((self.loss.item(), self._batch_images))
            total = sum(loss for loss, _ in pending)
            by_hand.append(total / (len(pending) if kind in {"classify", "rtdetr"} else sum(n for _, n in pending)))
            pending.clear()
            super().optimizer_step()

        def _end_batch(self) -> None:
            if not self._stepped:
                pending.append((self.loss.item(), self._batch_images))
            super()._end_batch()

    arguments = tasks.arguments(kind, tmp_path, name="run", batch=3, nbs=6, epochs=2, warmup_epochs=0)
    train(Watching, arguments)
    losses = read_run(tmp_path / "run").steps["loss"].to_list()
    assert losses == pytest.approx(by_hand, rel=1e-5)
    assert len(losses) == 3


@pytest.mark.parametrize("kind", kinds("classify"))
def test_resume_equals_the_uninterrupted_run(tasks: Tasks, tmp_path: Path, kind: str) -> None:
    whole, _ = tasks.runs(kind)
    stock = tasks.trainer(kind)

    def interrupt(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        train(trainer_for(stock), tasks.arguments(kind, tmp_path, name="parts"), on_train_epoch_end=interrupt)
    resumed = YOLO(tmp_path / "parts/weights/last.pt")
    resumed.train(resume=True, trainer=trainer_for(stock))
    assert_same_training(resumed.trainer, whole)
    a, b = (read_run(path).steps.drop("time_s") for path in (whole.save_dir, tmp_path / "parts"))
    assert a.equals(b)
    assert read_run(tmp_path / "parts").status.outcome == "completed"


@pytest.mark.parametrize("kind", kinds("classify", "rtdetr"))
def test_the_command_line_trains_it(
    tasks: Tasks, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tasks.arguments(kind, tmp_path, name="run", epochs=1)
    task = arguments.pop("task")
    assert main([task, "train", *(f"{key}={value}" for key, value in arguments.items()), "clip=agc"]) == 0
    assert "2 optimizer steps: gradient norm" in capsys.readouterr().out
    run = read_run(tmp_path / "run")
    assert (run.status.outcome, run.config["clip"]["policy"]) == ("completed", "agc")
    assert run.args["task"] == task


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_healthy_run_is_left_alone(tasks: Tasks, tmp_path: Path, kind: str) -> None:
    """It learns (its loss falls), the guard undoes nothing, and nothing that is found is an error."""
    arguments = tasks.arguments(kind, tmp_path, name="run", epochs=25, optimizer="AdamW", lr0=0.002, mosaic=0.0)
    train(trainer_for(tasks.trainer(kind)), arguments)
    run = read_run(tmp_path / "run")
    losses = run.steps["loss"]
    assert losses.tail(10).mean() < 0.8 * losses.head(10).mean()
    assert run.status.outcome == "completed"
    assert {event["event"] for event in run.events} <= {"init", "dead"}
    assert [finding.kind for finding in run.diagnose() if finding.severity == "error"] == []


def test_an_incident_of_a_model_that_cannot_be_rebuilt_says_so(tasks: Tasks, tmp_path: Path) -> None:
    cls = faulty(trainer_for(RTDETRTrainer), float("nan"), at=1)
    train(cls, tasks.arguments("rtdetr", tmp_path, name="run", epochs=1))
    incident = read_incident(tmp_path / "run/gradstab/incidents/1")
    assert incident.reason == "nonfinite_gradient"
    assert "so no replay: RTDETRDetectionModel is none of DetectionModel, PoseModel" in incident.note
    assert not (tmp_path / "run/gradstab/incidents/1/model.json").exists()


# What a user gets wrong ----------------------------------------------------------------------------------------------


def test_a_model_with_a_trainer_of_its_own_is_not_trained_by_another(tasks: Tasks, tmp_path: Path) -> None:
    arguments = tasks.arguments("rtdetr", tmp_path, name="run")
    model = RTDETR(arguments["model"])
    with pytest.raises(ConfigError, match="GradstabDetectionTrainer cannot train RTDETRDecoder; give trainer_for"):
        model.train(trainer=trainer_for("detect"), **arguments)
    assert model.task_map["detect"]["trainer"] is RTDETRTrainer
    with pytest.raises(ConfigError, match=r"task must be one of detect, segment, .* or a trainer class"):
        trainer_for(trainer_for("detect"))


# COCO JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segment", pytest.param("rtdetr", marks=pytest.mark.slow)])
def test_coco_json_gives_the_weights_of_the_labels_converted_from_it(tasks: Tasks, tmp_path: Path, kind: str) -> None:
    drawn = DrawnSet(tmp_path / "drawn", TASK_OF.get(kind, kind), images=12)
    stock, arguments = tasks.trainer(kind), tasks.arguments(kind, tmp_path, epochs=1)
    ours = train(trainer_for(stock), arguments | {"data": str(drawn.coco), "name": "coco"})
    labels = train(stock, arguments | {"data": str(drawn.yolo), "name": "labels"})
    assert_same_training(ours, labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["obb", "semantic"])
def test_converted_outlines_train_what_coco_json_does_not(tasks: Tasks, tmp_path: Path, kind: str) -> None:
    drawn = DrawnSet(tmp_path / "drawn", "segment", images=12)
    arguments = tasks.arguments(kind, tmp_path, epochs=1, name="run")
    with pytest.raises(CocoError, match=rf"got '{kind}'; `yolo-gradstab data convert \.\.\. task=segment` writes"):
        train(trainer_for(kind), arguments | {"data": str(drawn.coco)})
    train(trainer_for(kind), arguments | {"data": str(drawn.yolo)})
    assert read_run(tmp_path / "run").status.outcome == "completed"


def test_tasks_that_coco_json_says_nothing_of_are_refused(tasks: Tasks, tmp_path: Path) -> None:
    drawn = DrawnSet(tmp_path / "drawn", "detect", images=4)
    with pytest.raises(CocoError, match=r"got 'depth'; give data in Ultralytics' own format"):
        train(trainer_for("depth"), tasks.arguments("depth", tmp_path, data=str(drawn.coco)))
    with pytest.raises(CocoError, match=r"GradstabWorldTrainer has a dataset .* data convert .* task=detect`"):
        train(trainer_for(tasks.trainer("world")), tasks.arguments("world", tmp_path, data=str(drawn.coco)))
