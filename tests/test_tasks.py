"""Every task that the host trains: the same weights as the stock trainer's, records, judgement, report, command line.

One drawing gives every format: a tilted rectangle per image, its class by colour, as YOLO boxes, corners and outlines,
as a mask, as a map of depths, and as a folder per class. Models are the host's own YAMLs at an eighth of their width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import train
from test_trainer import assert_same_training
from ultralytics import YOLO
from ultralytics.utils import ROOT

from yolo_gradstab import read_run, trainer_for

SIZE = 64
NAMES = {0: "red", 1: "green"}
NUM = {"train": 8, "val": 4}


def draw(folder: Path) -> dict[str, Path]:
    """The drawn set in every format; what to give as `data=`, by task."""
    rng = np.random.default_rng(0)
    for split, num in NUM.items():
        for index in range(num):
            cls = index % len(NAMES)
            centre, sides, angle = rng.uniform(24, 40, 2), rng.uniform(16, 30, 2), rng.uniform(0, 90)
            corners = cv2.boxPoints((tuple(centre), tuple(sides), angle))
            image = rng.integers(0, 60, (SIZE, SIZE, 3)).astype(np.uint8)
            inside = cv2.fillPoly(np.zeros((SIZE, SIZE), np.uint8), [np.rint(corners).astype(np.int32)], 1)
            image[inside > 0, 2 - cls] += 180
            low, high = corners.min(0), corners.max(0)
            numbers = {
                "boxes": [*((low + high) / 2), *(high - low)],
                "outlines": corners.reshape(-1),
            }
            depth = np.linspace(1000, 3000, SIZE)[:, None] - 400.0 * inside * (1 + cls)
            for name in numbers:
                write_image(folder / name / "images" / split / f"{index}.png", image)
                label = folder / name / "labels" / split / f"{index}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text(" ".join([str(cls), *(f"{value / SIZE:.6f}" for value in numbers[name])]) + "\n")
            write_image(folder / "maps" / "images" / split / f"{index}.png", image)
            write_image(folder / "maps" / "masks" / split / f"{index}.png", inside * (1 + np.uint8(cls)))
            write_image(folder / "maps" / "depth" / split / f"{index}.png", depth.astype(np.uint16))
            write_image(folder / "classes" / split / NAMES[cls] / f"{index}.png", image)
    return {
        "detect": data_yaml(folder / "boxes", "detect", names=NAMES),
        "segment": data_yaml(folder / "outlines", "segment", names=NAMES),
        "obb": data_yaml(folder / "outlines", "obb", names=NAMES),
        "semantic": data_yaml(
            folder / "maps", "semantic", names={0: "ground", 1: "red", 2: "green"}, masks_dir="masks"
        ),
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


HOST_YAML = {
    "detect": "26/yolo26.yaml",
    "segment": "26/yolo26-seg.yaml",
    "obb": "26/yolo26-obb.yaml",
    "classify": "26/yolo26-cls.yaml",
    "semantic": "26/yolo26-sem.yaml",
    "depth": "26/yolo26-depth.yaml",
    "rtdetr": "v8/yolov8-rtdetr.yaml",
}
TASK = {"rtdetr": "detect"}


def tiny_model(folder: Path, kind: str) -> Path:
    """The host's architecture at an eighth of its width; RT-DETR's decoder is cut down too, since nothing scales it."""
    source = ROOT / "cfg" / "models" / HOST_YAML[kind]
    model = yaml.safe_load(source.read_text()) | {"scales": {"t": [0.33, 0.125, 1024]}}
    if kind == "rtdetr":
        model["head"][-1][-1] = ["nc", 32, 20, 2, 2, 2]  # width, queries, points, heads, layers
    path = folder / source.name
    path.write_text(yaml.safe_dump(model, sort_keys=False))
    return path
