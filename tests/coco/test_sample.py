"""`coco.sample`: the drawn set is the same for the same arguments, valid COCO, and its labels are what was drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from yolo_gradstab.coco import sample
from yolo_gradstab.coco.annotations import CocoError
from yolo_gradstab.coco.check import check_coco
from yolo_gradstab.coco.keypoints import flip_index
from yolo_gradstab.coco.people import KEYPOINTS
from yolo_gradstab.coco.sample import draw_sample

NAMES = {"detect": "instances", "pose": "person_keypoints"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drawn")
    return {task: draw_sample(folder / task, task=task, images=18, size=128).parent for task in NAMES}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read(folder: Path, task: str, split: str = "train") -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "annotations" / f"{NAMES[task]}_{split}.json").read_text())
    return data


@pytest.mark.parametrize("task", NAMES)
def test_same_arguments_same_bytes_and_seed_matters(tmp_path: Path, task: str) -> None:
    first, again, other = (
        contents(draw_sample(tmp_path / str(i), task=task, images=3, size=64, seed=seed).parent)
        for i, seed in enumerate((5, 5, 6))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert first["images/train/000000.png"] != other["images/train/000000.png"]


def test_global_generators_are_untouched(tmp_path: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    draw_sample(tmp_path, images=2, size=32)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_two_thirds_train(drawn: dict[str, Path], tmp_path: Path) -> None:
    assert [len(read(drawn["detect"], "detect", split)["images"]) for split in ("train", "val")] == [12, 6]
    draw_sample(tmp_path, images=2, size=32)
    assert [len(read(tmp_path, "detect", split)["images"]) for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_everything_drawn_is_used(drawn: dict[str, Path], task: str, split: str) -> None:
    folder = drawn[task]
    path = folder / "annotations" / f"{NAMES[task]}_{split}.json"
    for as_task in {task, "detect", "segment"}:
        report = check_coco(path, images=folder / "images" / split, task=as_task)
        assert (report.problems, report.unused, report.clipped, report.notes) == ([], {}, 0, [])
        assert report.used == report.annotations > 0
        assert report.background_images == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools with numpy 2
@pytest.mark.parametrize("task", NAMES)
def test_valid_for_pycocotools_and_masks_agree_with_areas(
    drawn: dict[str, Path], task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = COCO(str(drawn[task] / "annotations" / f"{NAMES[task]}_train.json"))
    capsys.readouterr()
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(annotation)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.35 if task == "pose" else 0.08)
        x, y, width, height = cv2.boundingRect(mask)
        np.testing.assert_allclose([x, y, x + width, y + height], corners(annotation), atol=1.5)


def corners(annotation: dict[str, Any]) -> list[float]:
    x, y, width, height = annotation["bbox"]
    return [x, y, x + width, y + height]


def test_box_is_the_extent_of_the_drawn_pixels(drawn: dict[str, Path]) -> None:
    folder, compared = drawn["detect"], 0
    coco = read(folder, "detect")
    for image in coco["images"]:
        own = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        pixels = cv2.imread(str(folder / "images" / "train" / image["file_name"]))
        assert pixels is not None
        for annotation in own:
            outline = np.array(annotation["segmentation"][0]).reshape(-1, 2)
            mask = np.zeros(pixels.shape[:2], np.uint8)
            cv2.fillPoly(mask, [outline.astype(np.int32)], 1)
            inner = cv2.erode(mask, np.ones((7, 7), np.uint8), borderValue=0)
            if not inner.any():
                continue
            colours, counts = np.unique(pixels[inner > 0], axis=0, return_counts=True)
            assert len(colours) == 1, "the inside of an outline is one flat colour"
            flat = (pixels == colours[counts.argmax()]).all(-1).astype(np.uint8)
            x, y, width, height = cv2.boundingRect(flat)
            # Pixels half covered at the edge are mixed with what is behind: up to a pixel on each side, more at a tip.
            np.testing.assert_allclose([x, y, x + width, y + height], corners(annotation), atol=3)
            compared += 1
    assert compared > 20


def test_keypoints_are_cocos(drawn: dict[str, Path]) -> None:
    (category,) = read(drawn["pose"], "pose")["categories"]
    assert category["keypoints"] == KEYPOINTS
    assert len(category["skeleton"]) == 19
    assert flip_index(KEYPOINTS)[0] == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def test_skeleton_and_names_are_those_of_real_coco(shared: Callable[[str], Path], drawn: dict[str, Path]) -> None:
    path = shared("coco_open") / "annotations" / "person_keypoints_val2017.json"
    (real,), (ours,) = json.loads(path.read_text())["categories"], read(drawn["pose"], "pose")["categories"]
    assert (ours["keypoints"], ours["skeleton"]) == (real["keypoints"], real["skeleton"])


def test_visibility_is_of_all_three_kinds_and_means_what_coco_means(drawn: dict[str, Path]) -> None:
    seen: set[int] = set()
    for annotation in read(drawn["pose"], "pose")["annotations"]:
        points = np.array(annotation["keypoints"]).reshape(-1, 3)
        seen |= {int(v) for v in points[:, 2]}
        assert annotation["num_keypoints"] == (points[:, 2] > 0).sum() > 0
        assert not points[points[:, 2] == 0].any()
        assert (points[:, :2] < 128).all()
        left, top, right, bottom = corners(annotation)
        x, y, visibility = points.T
        shown = visibility == 2  # a point that is seen lies on seen pixels, so in the box
        assert ((x >= left) & (x <= right) & (y >= top) & (y <= bottom))[shown].all()
    assert seen == {0, 1, 2}


def test_left_is_the_right_of_the_image(drawn: dict[str, Path]) -> None:
    for annotation in read(drawn["pose"], "pose")["annotations"]:
        points = np.array(annotation["keypoints"]).reshape(-1, 3)
        if points[1, 2] and points[2, 2]:
            assert points[1, 0] > points[2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "segment"}, "task must be one of detect, pose for a drawn set, got 'segment'"),
        ({"images": 1}, "images must be a whole number of at least 2, got 1"),
        ({"size": 31}, "size must be a whole number of at least 32, got 31"),
        ({"size": 64.5}, "size must be a whole number of at least 32, got 64.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_argument(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CocoError, match=message):
        draw_sample(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    draw_sample(tmp_path, images=2, size=32)
    draw_sample(tmp_path, images=2, size=32)
    before = contents(tmp_path)
    with pytest.raises(CocoError, match=r"out: .* is not empty and holds something else"):
        draw_sample(tmp_path, images=2, size=64)
    assert contents(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(CocoError, match=r"out: .*file is a file"):
        draw_sample(tmp_path / "file", images=2, size=32)


def test_a_drawing_that_was_cut_off_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = sample._write_split

    def interrupted(folder: Path, split: str, *args: Any, **kwargs: Any) -> None:
        if split == "val":
            raise KeyboardInterrupt
        write(folder, split, *args, **kwargs)

    monkeypatch.setattr(sample, "_write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / "set", images=4, size=64)
    monkeypatch.setattr(sample, "_write_split", write)
    again, whole = (draw_sample(tmp_path / name, images=4, size=64).parent for name in ("set", "whole"))
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) == 7  # four images, two JSON files, the YAML
    assert all((again / file).read_bytes() == (whole / file).read_bytes() for file in files)
