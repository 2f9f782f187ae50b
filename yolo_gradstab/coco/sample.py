"""A drawn COCO set with exactly known labels: offline, in seconds, and learnable by a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from yolo_gradstab.coco.annotations import CocoError
from yolo_gradstab.coco.conversion import convert_coco
from yolo_gradstab.coco.people import KEYPOINTS, MOST_PEOPLE, SKELETON, sketch_person
from yolo_gradstab.coco.scene import Drawn, Sketch, draw_scene
from yolo_gradstab.coco.shapes import MOST_SHAPES, SHAPES, sketch_shape

__all__ = ["SAMPLE_TASKS", "draw_sample", "label_sample"]

SAMPLE_TASKS = ("detect", "pose")
MIN_SIZE_PX = 32  # the host's largest stride
MAX_SIZE_PX = 4096  # of a side: one such image is 50 MB

_SKETCHES: Mapping[str, tuple[Sketch, int]] = {
    "detect": (sketch_shape, MOST_SHAPES),
    "pose": (sketch_person, MOST_PEOPLE),
}
_FILES = {"detect": "instances", "pose": "person_keypoints"}


def draw_sample(out: str | Path, *, task: str = "detect", images: int = 96, size: int = 160, seed: int = 0) -> Path:
    """Draw a COCO set and return its data YAML, which trains as it is. The same arguments give the same bytes.

    Two thirds of the images are for training, one third for validation. Boxes, areas and outlines are those of the
    visible pixels, to a quarter of a pixel.

    Args:
        out: A new or empty folder, or one that holds the same drawn set.
        task: `detect` (circles, squares, triangles) or `pose` (figures with COCO's 17 keypoints).
        images: How many images, at least 2.
        size: Width and height in pixels, at least 32.
        seed: Seeds a generator of its own; the global one is not used.

    Raises:
        CocoError: If an argument is out of range, or `out` holds something else.
    """
    check_arguments(task=task, images=images, size=size, seed=seed)
    folder = Path(out)
    heading = f"# Drawn by yolo_gradstab: task={task} images={images} size={size} seed={seed}\n"
    _check_folder(folder, heading)
    folder.mkdir(parents=True, exist_ok=True)
    yaml_file = folder / "data.yaml"
    yaml_file.write_text(heading, encoding="utf-8", newline="\n")  # by which a drawing that was cut off is known again
    num_val = max(1, round(images / 3))
    splits = {"train": range(images - num_val), "val": range(images - num_val, images)}
    for split, indices in splits.items():
        _write_split(folder, split, indices, task=task, size=size, seed=seed)
    yaml_file.write_text(heading + _data_yaml(task), encoding="utf-8", newline="\n")
    return yaml_file


def label_sample(data_yaml: Path, *, task: str) -> Path:
    """Give a drawn set the host's own form too, from which stock trains: label files, and the YAML returned.

    Args:
        data_yaml: What `draw_sample` returned.
        task: Of the labels: that it was drawn for, or `segment`.
    """
    folder = data_yaml.parent
    data: dict[str, Any] = {"path": str(folder)}
    for split in ("train", "val"):
        (coco,) = (folder / "annotations").glob(f"*_{split}.json")
        report = convert_coco(coco, images=folder / "images" / split, out=folder / "labels" / split, task=task)
        keys = {"names": report.names, "kpt_shape": report.kpt_shape, "flip_idx": report.flip_idx}
        data |= {split: f"images/{split}", **{key: value for key, value in keys.items() if value is not None}}
    path = folder / "yolo.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def check_arguments(*, task: str, images: int, size: int, seed: int) -> None:
    """Refuse what `draw_sample` cannot draw, before anything is written.

    Raises:
        CocoError: With the argument, its value, and what is allowed.
    """
    if task not in SAMPLE_TASKS:
        raise CocoError(f"task must be one of {', '.join(SAMPLE_TASKS)} for a drawn set, got {task!r}")
    for name, value, least in (("images", images, 2), ("size", size, MIN_SIZE_PX), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise CocoError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if size > MAX_SIZE_PX:
        raise CocoError(f"size must be a whole number of at most {MAX_SIZE_PX}, got {size}")


def _check_folder(folder: Path, heading: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise CocoError(f"out: {folder} is a file; name a folder for the drawn set")
    if not folder.exists() or not any(folder.iterdir()):
        return
    yaml_file = folder / "data.yaml"
    if not yaml_file.is_file() or not yaml_file.read_text(encoding="utf-8").startswith(heading):
        raise CocoError(f"out: {folder} is not empty and holds something else than this drawn set; name another folder")


def _write_split(folder: Path, split: str, indices: range, *, task: str, size: int, seed: int) -> None:
    image_folder, annotation_folder = folder / "images" / split, folder / "annotations"
    image_folder.mkdir(parents=True, exist_ok=True)
    annotation_folder.mkdir(parents=True, exist_ok=True)
    sketch, most = _SKETCHES[task]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in indices:
        # A generator per image: an image does not depend on how many there are.
        rng = np.random.default_rng([seed, SAMPLE_TASKS.index(task), index])
        scene = draw_scene(rng, sketch, size=size, most=most)
        name = f"{index:06d}.png"
        (image_folder / name).write_bytes(cv2.imencode(".png", scene.image)[1].tobytes())
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        annotations += [_annotation(index + 1, number, drawn) for number, drawn in enumerate(scene.objects)]
    coco = {
        "info": {"description": f"drawn by yolo_gradstab, {task}, seed {seed}", "version": "1"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": _categories(task),
    }
    text = json.dumps(coco, allow_nan=False, separators=(",", ":"))
    (annotation_folder / f"{_FILES[task]}_{split}.json").write_text(text, encoding="utf-8", newline="\n")


def _annotation(image_id: int, number: int, drawn: Drawn) -> dict[str, Any]:
    annotation: dict[str, Any] = {
        "id": 100 * image_id + number,
        "image_id": image_id,
        "category_id": drawn.category + 1,
        "bbox": drawn.bbox,
        "area": drawn.area,
        "iscrowd": 0,
        "segmentation": drawn.segmentation,
    }
    if drawn.keypoints is not None:
        annotation["num_keypoints"] = sum(visibility > 0 for _, _, visibility in drawn.keypoints)
        annotation["keypoints"] = [number for point in drawn.keypoints for number in point]
    return annotation


def _categories(task: str) -> list[dict[str, Any]]:
    if task == "detect":
        return [{"id": index, "name": name, "supercategory": "shape"} for index, name in enumerate(SHAPES, start=1)]
    person = {"id": 1, "name": "person", "supercategory": "person", "keypoints": list(KEYPOINTS), "skeleton": SKELETON}
    return [person]


def _data_yaml(task: str) -> str:
    lines = [f"{split}: annotations/{_FILES[task]}_{split}.json" for split in ("train", "val")]
    return "\n".join([*lines, "images: {train: images/train, val: images/val}", ""])
