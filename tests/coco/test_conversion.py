"""`coco.conversion`: label files equal to those others made, and to the numbers that training from the JSON uses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from yolo_gradstab.coco.annotations import CocoError, read_coco
from yolo_gradstab.coco.conversion import ConversionReport, convert_coco, label_lines
from yolo_gradstab.coco.images import find_images, image_folders
from yolo_gradstab.coco.labels import ImageLabels, make_labels

from .conftest import Builder


def rows(path: Path) -> np.ndarray:
    return np.array([line.split() for line in path.read_text().splitlines()], np.float64)


def convert(build: Builder, coco: object, *, task: str = "detect", draw: bool = True) -> ConversionReport:
    return convert_coco(build.write(coco, draw=draw), images=build.images, out=build.folder / "labels", task=task)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_pose_labels_agree_with_those_made_independently(
    shared: Callable[[str], Path], tmp_path: Path, split: str
) -> None:
    root = shared("coco_open")
    json_file = root / "annotations" / f"person_keypoints_{split}.json"
    report = convert_coco(json_file, images=root / "images" / split, out=tmp_path / "labels", task="pose")
    expected = sorted((root / "yolo_labels_pose" / split).glob("*.txt"))
    assert sorted(p.name for p in (tmp_path / "labels").iterdir()) == [p.name for p in expected]
    assert report.files == len(expected)
    for path in expected:
        np.testing.assert_allclose(rows(tmp_path / "labels" / path.name), rows(path), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_labels_made_from_json_agree_with_those_made_independently(shared: Callable[[str], Path], split: str) -> None:
    root = shared("coco_open")
    coco = read_coco(root / "annotations" / f"person_keypoints_{split}.json")
    files = find_images(coco.images, image_folders(root / "images" / split))
    for image in make_labels(coco, files, task="pose").images:
        expected = root / "yolo_labels_pose" / split / f"{Path(image.file).stem}.txt"
        assert expected.exists() == bool(len(image.classes))
        if expected.exists():
            assert image.keypoints is not None
            direct = np.hstack([image.classes[:, None], image.boxes, image.keypoints.reshape(len(image.classes), -1)])
            np.testing.assert_allclose(direct, rows(expected), rtol=0, atol=1e-6)


def test_written_numbers_give_every_float32_back() -> None:
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.random((5000, 4)), 10.0 ** rng.uniform(-7, 0, (5000, 4))]).astype(np.float32)
    image = ImageLabels(1, "a.png", 100, 80, np.zeros(len(boxes), np.float32), boxes)
    read = np.array([line.split() for line in label_lines(image)], np.float32)  # as the host reads
    np.testing.assert_array_equal(read[:, 1:], boxes)


def test_only_images_with_labels_get_a_file(build: Builder) -> None:
    images = [build.image(), build.image(id=2, file_name="b.png")]
    report = convert(build, build.coco(images=images))
    assert [p.name for p in (build.folder / "labels").iterdir()] == ["a.txt"]
    assert (build.folder / "labels" / "a.txt").read_text() == "0 0.25 0.5 0.300000012 0.5\n"
    assert (report.images, report.files, report.unchanged, report.names) == (2, 1, 0, {0: "cat"})


def test_second_run_is_the_same(build: Builder) -> None:
    convert(build, build.coco())
    assert convert(build, build.coco()).unchanged == 1


@pytest.mark.parametrize("bbox", [[1, 1, 5, 5], [1, 1, 0, 0]])
def test_other_labels_in_the_folder_are_not_overwritten_nor_left_stale(build: Builder, bbox: list[float]) -> None:
    convert(build, build.coco())
    before = (build.folder / "labels" / "a.txt").read_text()
    with pytest.raises(CocoError, match=r"out: .*a\.txt exists and holds other labels than a\.png has now"):
        convert(build, build.coco(annotations=[build.annotation(bbox=bbox)]))
    assert (build.folder / "labels" / "a.txt").read_text() == before


def test_images_of_one_stem_are_refused(build: Builder) -> None:
    images = [build.image(file_name="x/a.png"), build.image(id=2, file_name="y/a.png")]
    with pytest.raises(CocoError, match=r"x/a\.png and .*y/a\.png would both be labelled in .*labels/a\.txt"):
        convert(build, build.coco(images=images))
    assert not (build.folder / "labels").exists()


def test_images_in_subfolders_are_noted(build: Builder) -> None:
    """The host would look for labels/x/a.txt, and take the image for background."""
    report = convert(build, build.coco(images=[build.image(file_name="x/a.png")]))
    assert report.notes[0].startswith("1 images lie in subfolders of the image folder, first ")
    assert "train from the JSON" in report.notes[0]
    assert convert(build, build.coco(images=[build.image(file_name="b.png")])).notes == []


def test_missing_images_are_refused_in_one_line(build: Builder) -> None:
    build.write(build.coco())
    images = [build.image(), build.image(id=2, file_name="b.png"), build.image(id=4, file_name="c.png")]
    message = re.escape("2 of 3 image files not found, first b.png (image 2), in ") + ".*images; correct the folder"
    with pytest.raises(CocoError, match=message):
        convert(build, build.coco(images=images), draw=False)


def test_images_of_another_size_are_refused(build: Builder) -> None:
    build.write(build.coco())
    with pytest.raises(CocoError, match=r"image 1: the JSON says 100x81, the file .* is 100x80"):
        convert(build, build.coco(images=[build.image(height=81)]), draw=False)


def test_out_that_is_a_file(build: Builder) -> None:
    (build.folder / "labels").touch()
    with pytest.raises(CocoError, match=r"out: .*labels is a file"):
        convert(build, build.coco())


def test_pose_report_has_what_a_data_yaml_needs(build: Builder) -> None:
    category = build.category(keypoints=["left_eye", "right_eye"])
    annotation = build.annotation(keypoints=[1, 1, 2, 2, 2, 2])
    report = convert(build, build.coco(categories=[category], annotations=[annotation]), task="pose")
    assert (report.kpt_shape, report.flip_idx) == ([2, 3], [1, 0])
