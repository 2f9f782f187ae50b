"""`coco.labels`, with `check`, `images`, `keypoints` and `segments`: what is used, what it becomes, and the account."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from yolo_gradstab.coco.annotations import CocoCategory, CocoError, CocoImage, SegmentedAnnotation, read_coco
from yolo_gradstab.coco.check import CheckReport, check_coco
from yolo_gradstab.coco.images import find_images, image_folders, read_image_size
from yolo_gradstab.coco.keypoints import flip_index, keypoint_layout
from yolo_gradstab.coco.labels import CocoLabels, make_labels
from yolo_gradstab.coco.people import KEYPOINTS
from yolo_gradstab.coco.segments import RunLengths, cut_outline, decode_run_lengths, join_outlines, read_outlines

from .conftest import Builder

POINTS = ["left_eye", "right_eye"]
SEEN = [20, 30, 2, 25, 30, 2]


def labels_of(build: Builder, coco: dict[str, Any], *, task: str = "detect") -> CocoLabels:
    annotations = read_coco(build.write(coco), segments=task == "segment")
    return make_labels(annotations, find_images(annotations.images, image_folders(build.images)), task=task)


def check(build: Builder, coco: dict[str, Any], *, task: str = "detect", draw: bool = True) -> CheckReport:
    return check_coco(build.write(coco, draw=draw), images=build.images, task=task)


def test_box_is_centre_and_size_over_the_image(build: Builder) -> None:
    image = labels_of(build, build.coco()).images[0]
    np.testing.assert_array_equal(image.boxes, np.float32([[0.25, 0.5, 0.3, 0.5]]))  # (10+15)/100, (20+20)/80
    assert image.classes.tolist() == [0.0]
    assert image.keypoints is None


def test_classes_are_categories_in_the_order_of_their_ids(build: Builder) -> None:
    categories = [build.category(id=i, name=n) for i, n in ((90, "z"), (1, "a"), (13, "same"), (40, "same"))]
    annotations = [build.annotation(id=i, category_id=i) for i in (90, 13, 1, 40)]
    labels = labels_of(build, build.coco(categories=categories, annotations=annotations))
    assert labels.names == {0: "a", 1: "same", 2: "same", 3: "z"}
    assert labels.images[0].classes.tolist() == [3, 1, 0, 2]  # in the order of the file


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iscrowd": 1}, "crowd"),
        ({"iscrowd": True}, "crowd"),
        ({"bbox": [10, 10, 0, 5]}, "zero_area"),
        ({"bbox": [10, 10, 0, 0]}, "zero_area"),
        ({"bbox": [100, 10, 5, 5]}, "outside"),
        ({"bbox": [-5, 10, 5, 5]}, "outside"),
        ({"bbox": [1e308, 10, 1e308, 5]}, "outside"),
        ({"image_id": 2}, "missing_image"),
        ({"bbox": [50, 20, 30, 40]}, "duplicate"),
    ],
)
def test_unused_annotation_has_its_reason(build: Builder, changes: dict[str, Any], reason: str) -> None:
    good = build.annotation(id=1, bbox=[50, 20, 30, 40])
    coco = build.coco(annotations=[good, build.annotation(**changes)], images=[build.image()])
    build.write(coco)
    coco["images"].append(build.image(id=2, file_name="missing.png"))
    report = check(build, coco, draw=False)
    assert report.unused == {reason: 1}
    assert [(u.annotation_id, u.reason) for u in report.unused_annotations] == [(7, reason)]
    assert report.used == 1


def test_same_box_of_another_class_or_image_is_no_duplicate(build: Builder) -> None:
    annotations = [build.annotation(id=1), build.annotation(id=2, category_id=4), build.annotation(id=3, image_id=2)]
    images = [build.image(), build.image(id=2, file_name="b.png")]
    categories = [build.category(), build.category(id=4)]
    report = check(build, build.coco(annotations=annotations, images=images, categories=categories))
    assert (report.used, report.unused) == (3, {})


def test_duplicates_apart_in_the_file_leave_the_first_and_the_order(build: Builder) -> None:
    boxes = [[9, 9, 9, 9], [1, 1, 5, 5], [9, 9, 9, 9], [3, 3, 5, 5], [1, 1, 5, 5]]
    labels = labels_of(build, build.coco(annotations=[build.annotation(id=i, bbox=b) for i, b in enumerate(boxes)]))
    assert [u.annotation_id for u in labels.unused] == [2, 4]
    np.testing.assert_allclose(labels.images[0].boxes[:, 2] * 100, [9, 5, 5], rtol=1e-6)


def test_box_partly_outside_is_cut_and_counted(build: Builder) -> None:
    labels = labels_of(build, build.coco(annotations=[build.annotation(bbox=[-10, 70, 30, 40])]))
    np.testing.assert_allclose(labels.images[0].boxes, [[0.1, 75 / 80, 0.2, 10 / 80]], rtol=1e-6)
    assert labels.clipped == [7]
    assert not labels.unused


def test_box_that_ends_at_the_border_is_not_counted_as_cut(build: Builder) -> None:
    labels = labels_of(build, build.coco(annotations=[build.annotation(bbox=[99.9 - 33.3, 0, 33.4000000001, 80])]))
    assert labels.clipped == []
    assert labels.images[0].boxes.max() <= 1


def test_images_are_sorted_by_file_and_background_images_kept(build: Builder) -> None:
    images = [build.image(id=i, file_name=n) for i, n in ((1, "b.png"), (2, "a.png"), (3, "sub/c.png"))]
    labels = labels_of(build, build.coco(images=images))
    assert [Path(i.file).name for i in labels.images] == ["a.png", "b.png", "c.png"]
    assert [len(i.classes) for i in labels.images] == [0, 1, 0]
    report = check(build, build.coco(images=images))
    assert (report.images_without_annotations, report.background_images) == (2, 2)


def pose(build: Builder, *keypoints: list[float] | None, **changes: Any) -> dict[str, Any]:
    annotations = [
        build.annotation(id=i, bbox=[10, 20, 30 + i, 40], keypoints=k, **changes) for i, k in enumerate(keypoints)
    ]
    return build.coco(annotations=annotations, categories=[build.category(keypoints=POINTS)])


def test_unlabelled_keypoint_is_zero_and_hidden_one_is_kept(build: Builder) -> None:
    image = labels_of(build, pose(build, [50, 40, 1, 9, 9, 0]), task="pose").images[0]
    assert image.keypoints is not None
    assert image.keypoints.tolist() == [[[0.5, 0.5, 1.0], [0.0, 0.0, 0.0]]]


def test_keypoint_outside_its_box_is_data_and_outside_the_image_is_unlabelled(build: Builder) -> None:
    labels = labels_of(build, pose(build, [90, 79, 2, 101, 40, 2]), task="pose")
    assert labels.images[0].keypoints is not None
    np.testing.assert_allclose(labels.images[0].keypoints, [[[0.9, 79 / 80, 2], [0, 0, 0]]], rtol=1e-6)
    assert labels.num_keypoints_outside == 1


@pytest.mark.parametrize("points", [None, [], [0] * 6, [101, 5, 2, 0, 0, 0]])
def test_person_without_keypoints_is_not_used_for_pose(build: Builder, points: list[float] | None) -> None:
    report = check(build, pose(build, SEEN, points), task="pose")
    assert (report.used, report.unused) == (1, {"no_keypoints": 1})


def test_category_without_keypoints_is_not_used_for_pose(build: Builder) -> None:
    coco = pose(build, SEEN)
    coco["categories"].append(build.category(id=9, name="dog"))
    coco["annotations"].append(build.annotation(id=9, category_id=9))
    assert check(build, coco, task="pose").unused == {"no_keypoints": 1}


def test_same_box_with_other_keypoints_is_no_duplicate(build: Builder) -> None:
    coco = pose(build, SEEN, [21, *SEEN[1:]], SEEN)
    for annotation in coco["annotations"]:
        annotation["bbox"] = [1, 1, 50, 50]
    assert check(build, coco, task="pose").unused == {"duplicate": 1}


def test_pose_without_keypoints_is_refused(build: Builder) -> None:
    with pytest.raises(CocoError, match=r"a.json: no category has `keypoints`"):
        check(build, build.coco(), task="pose")
    with pytest.raises(CocoError, match=r"a.json: no annotation has keypoints"):
        check(build, pose(build, None), task="pose")


def test_pose_categories_must_agree_on_the_number_of_points(build: Builder) -> None:
    coco = pose(build, SEEN)
    coco["categories"].append(build.category(id=9, name="dog", keypoints=["tail"]))
    with pytest.raises(CocoError, match=r"category 3 \(cat\) has 2 keypoints, category 9 \(dog\) has 1"):
        check(build, coco, task="pose")


def test_visibility_must_be_cocos(build: Builder) -> None:
    with pytest.raises(CocoError, match=r"annotation 0: keypoint visibility must be 0 .* got"):
        check(build, pose(build, [1, 1, 0.5, 1, 1, 2]), task="pose")


COCO_FLIP = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]  # ultralytics/cfg/datasets/coco-pose.yaml


@pytest.mark.parametrize(
    ("names", "flip", "unpaired"),
    [
        (KEYPOINTS, COCO_FLIP, []),
        (["Eye_Left", "EYE_RIGHT", "tail"], [1, 0, 2], []),
        (["L_Eye", "R_Eye", "front_left_paw", "front_right_paw"], [1, 0, 3, 2], []),
        (["leftEar", "rightEar"], [1, 0], []),
        (["left_eye", "nose"], [0, 1], ["left_eye"]),
        (["left_eye", "left_eye", "right_eye"], [0, 2, 1], ["left_eye"]),
        (["鼻", "目"], [0, 1], []),
        (["lefteye", "righteye", "shoulderRight", "shoulderLeft"], [1, 0, 3, 2], []),
        (["lsho", "rsho", "Lhip", "Rhip", "lip"], [1, 0, 3, 2, 4], []),
        (["upright", "nose"], [0, 1], ["upright"]),  # noted, as ever: who knows
        (["1", "2", "3"], [0, 1, 2], []),
    ],
)
def test_flip_index(names: list[str], flip: list[int], unpaired: list[str]) -> None:
    assert flip_index(names) == (flip, unpaired)


def test_point_without_counterpart_is_noted(build: Builder) -> None:
    coco = pose(build, SEEN)
    coco["categories"][0]["keypoints"] = ["left_eye", "nose"]
    assert check(build, coco, task="pose").notes == [
        "keypoint left_eye has no counterpart on the other side; mirrored images keep it as it is"
    ]


def test_points_of_no_known_side_are_not_mirrored(build: Builder) -> None:
    """Without a flip_idx the host switches mirroring off; one that swaps nothing would mirror people into nonsense."""
    coco = pose(build, SEEN)
    coco["categories"][0]["keypoints"] = ["1", "2"]
    labels = labels_of(build, coco, task="pose")
    assert labels.layout is not None and labels.layout.flip_idx is None
    assert check(build, coco, task="pose").notes == [
        "no keypoint names tell a left from a right one, so images are not mirrored; give flip_idx in the data YAML"
    ]
    assert keypoint_layout([CocoCategory(id=1, name="pen", keypoints=["tip"])], "f").flip_idx == [0]


def segmented(build: Builder, *shapes: Any) -> dict[str, Any]:
    return build.coco(annotations=[build.annotation(id=i, segmentation=s) for i, s in enumerate(shapes)])


def test_segment_box_is_that_of_its_outline(build: Builder) -> None:
    image = labels_of(build, segmented(build, [[10, 20, 50.9, 20, 50.9, 40, 10, 40]]), task="segment").images[0]
    np.testing.assert_allclose(image.segments[0] * [100, 80], [[10, 20], [50.9, 20], [50.9, 40], [10, 40]], rtol=1e-6)
    np.testing.assert_allclose(image.boxes, [[0.3045, 0.375, 0.409, 0.25]], rtol=1e-6)


def test_index_slice_and_iteration_give_the_same_image(build: Builder) -> None:
    triangles = [[[x, x, x + 9, x, x + 9, x + 9 + x / 100]] for x in range(1, 7)]
    coco = segmented(build, *triangles)
    coco["images"] = [build.image(id=i, file_name=f"{i}.png") for i in (1, 2, 3, 4)]
    for annotation, image in zip(coco["annotations"], (1, 1, 3, 4, 4, 4), strict=True):  # the second has none
        annotation["image_id"] = image
    images = labels_of(build, coco, task="segment").images
    expected = [[[shape[0][0] / 100 for shape in own]] for own in ([*triangles[:2]], [], [triangles[2]], triangles[3:])]
    ways = [[*images], images[:], [images[i] for i in range(4)], [images[i - 4] for i in range(4)]]
    ways += [images[:2] + images[2:], images[::-1][::-1], images[:1] + images[1:3] + images[-1:]]
    for way in ways:
        assert [image.file[-5:] for image in way] == ["1.png", "2.png", "3.png", "4.png"]
        assert [len(image.classes) for image in way] == [2, 0, 1, 3]
        for image, (lefts,) in zip(way, expected, strict=True):
            np.testing.assert_allclose([outline[:, 0].min() for outline in image.segments], lefts, rtol=1e-6)
    with pytest.raises(IndexError):
        images[4]


@pytest.mark.parametrize("seed", range(20))
def test_outlines_are_cut_at_the_border_as_their_pixels_are(seed: int) -> None:
    """Against drawing them on a larger canvas, and cutting the picture."""
    random = np.random.default_rng(seed)
    angles = np.sort(random.uniform(0, 2 * np.pi, 7))
    spokes = random.uniform(40, 300, (7, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    outline = random.uniform(-100, 400, 2) + spokes
    cut = cut_outline(outline, np.array([300.0, 200.0]))

    def drawn(points: Any) -> Any:
        canvas = np.zeros((1400, 1600), np.uint8)
        cv2.fillPoly(canvas, [np.round(points + 600).astype(np.int32)], 1) if len(points) else None
        return canvas[601:799, 601:899]

    assert (drawn(outline) != drawn(cut)).mean() < 0.01  # rounding of slanted sides
    assert len(cut) == 0 or (cut.min() >= 0 and (cut <= [300, 200]).all())


def test_a_segment_that_leaves_the_image_is_cut_and_counted(build: Builder) -> None:
    """100 by 80: a corner whose cut is the whole image, and a second part that lies outside and is left out."""
    corner = [[0, 0, 250, 0, 0, 250]]
    parts = [[10, 10, 20, 10, 20, 20, 10, 20], [150, 40, 200, 40, 200, 90, 150, 90]]
    coco = segmented(build, corner, parts)
    labels = labels_of(build, coco, task="segment")
    assert labels.clipped == [0, 1]
    boxes = np.concatenate([image.boxes for image in labels.images]) * [100, 80, 100, 80]
    np.testing.assert_allclose(boxes, [[50, 40, 100, 80], [15, 15, 10, 10]], rtol=1e-5)


@pytest.mark.parametrize("shape", [None, [], [[1, 2, 3, 4]], [[5, 5, 6, 6, 7, 5]], [[200, 5, 206, 6, 207, 5]]])
def test_annotation_without_outline_is_not_used_for_segment(build: Builder, shape: Any) -> None:
    report = check(build, segmented(build, shape), task="segment")
    expected = {} if shape == [[5, 5, 6, 6, 7, 5]] else {"no_segment": 1}
    assert report.unused == expected


def test_parts_that_enclose_nothing_are_counted(build: Builder) -> None:
    triangle = [10, 20, 50, 20, 50, 40]
    report = check(build, segmented(build, [triangle, [1, 2, 3, 4]], [[5, 5, 6, 6], [7, 7]]), task="segment")
    assert (report.used, report.unused) == (1, {"no_segment": 1})
    assert report.notes == ["1 parts of segments have fewer than 3 points and are left out"]


def test_same_box_with_other_outline_is_no_duplicate(build: Builder) -> None:
    one, other = [[10, 20, 50, 20, 50, 40, 10, 40]], [[10, 20, 50, 40, 50, 20, 10, 40]]
    assert check(build, segmented(build, one, other, one), task="segment").unused == {"duplicate": 1}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("x", "neither polygons"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ({"size": [80, 100], "counts": [5]}, "broken run-length mask: run lengths sum to 5"),
        ({"size": [8, 10], "counts": [80]}, "a mask of 10x8; image 1 is 100x80"),
        ({"size": [80, 100], "counts": "\u00e9"}, "broken run-length mask"),
    ],
)
def test_broken_segmentation_is_named(build: Builder, shape: Any, message: str) -> None:
    with pytest.raises(CocoError, match=f"annotation 0: segmentation .*{message}"):
        check(build, segmented(build, shape), task="segment")


def test_run_lengths_decode_as_pycocotools_decodes_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = (int(n) for n in rng.integers(1, 40, 2))
        mask = np.asfortranarray((rng.random((height, width)) < rng.random()).astype(np.uint8))
        text = coco_mask.encode(mask)["counts"].decode()
        np.testing.assert_array_equal(decode_run_lengths(RunLengths((height, width), text)), mask)


def area(outline: Any) -> float:
    x, y = outline.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


@pytest.mark.parametrize("seed", range(50))
def test_outlines_of_a_mask_enclose_its_pixels(build: Builder, seed: int) -> None:
    """Against pycocotools' box, and scipy's filling of holes, which an outline cannot say."""
    rng = np.random.default_rng(seed)
    mask = np.asfortranarray((rng.random((80, 100)) < rng.random() ** 2).astype(np.uint8))
    mask[:, : rng.integers(90)], mask[: rng.integers(70)] = 0, 0
    mask[79, 99] = 1
    shape = {"size": [80, 100], "counts": coco_mask.encode(mask)["counts"].decode()}
    coco = build.coco(annotations=[build.annotation(segmentation=shape)])
    image = CocoImage(id=1, file_name="a.png", width=100, height=80)
    given = msgspec.json.decode(json.dumps(coco["annotations"][0]), type=SegmentedAnnotation)
    outlines = read_outlines(given, image, "f")
    assert sum(area(outline) for outline in outlines) == ndimage.binary_fill_holes(mask).sum()
    x, y, width, height = coco_mask.toBbox(coco_mask.encode(mask)) / [100, 80, 100, 80]
    (box,) = labels_of(build, coco, task="segment").images[0].boxes
    np.testing.assert_allclose(box, [x + width / 2, y + height / 2, width, height], rtol=1e-6)


def test_thin_objects_have_an_outline(build: Builder) -> None:
    for rows, columns in ((slice(5, 6), slice(7, 17)), (slice(5, 15), slice(7, 8)), (slice(5, 6), slice(7, 8))):
        mask = np.zeros((80, 100), np.uint8, order="F")
        mask[rows, columns] = 1
        shape = {"size": [80, 100], "counts": coco_mask.encode(mask)["counts"].decode()}
        report = check(build, segmented(build, shape), task="segment")
        assert (report.used, report.unused) == (1, {})


def test_many_parts_are_joined_where_they_are_nearest() -> None:
    """Large ones by a tree, whose bridges are as short as those that all distances give."""
    rng = np.random.default_rng(0)
    circle = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 400, endpoint=False)), np.sin(t)], 1)
    parts = [circle * rng.uniform(5, 40) + rng.uniform(0, 1000, 2) for _ in range(12)]
    joined, bridges = parts[0], 0.0
    for part in parts[1:]:
        bridges += float(np.sqrt(((joined[:, None] - part[None]) ** 2).sum(-1)).min())
        joined = np.concatenate([joined, part])

    def length(outline: Any) -> float:
        return float(np.linalg.norm(outline - np.roll(outline, 1, axis=0), axis=1).sum())

    assert length(join_outlines(parts)) == pytest.approx(sum(map(length, parts)) + 2 * bridges)
    assert area(join_outlines(parts)) == pytest.approx(sum(map(area, parts)))


def test_joined_outline_encloses_the_parts_and_nothing_else() -> None:
    squares = [np.array([[x, y], [x + 10, y], [x + 10, y + 10], [x, y + 10.0]]) for x, y in ((5, 5), (30, 8), (12, 40))]
    joined = join_outlines(squares)
    together, apart = np.zeros((60, 60), np.uint8), np.zeros((60, 60), np.uint8)
    cv2.fillPoly(together, [joined.astype(np.int32)], 1)
    for square in squares:
        cv2.fillPoly(apart, [square.astype(np.int32)], 1)
    assert (together >= apart).all()
    assert int(together.sum()) - int(apart.sum()) < 60  # the two bridges, one pixel wide
    assert cv2.contourArea(joined.astype(np.float32)) == pytest.approx(300)


def test_a_set_of_which_nothing_can_be_used_is_a_problem(build: Builder) -> None:
    report = check(build, build.coco(annotations=[build.annotation(iscrowd=1)]))
    assert (report.ok, report.unused) == (False, {"crowd": 1})
    assert report.problems[0].endswith(": none of 1 annotations can be used: nothing to train on")


def test_missing_images_are_all_listed(build: Builder) -> None:
    images = [build.image(id=i, file_name=f"{i}.png") for i in (1, 2, 3)]
    report = check(build, build.coco(images=images), draw=False)
    assert [problem.partition(": ")[2] for problem in report.problems] == [
        f"image {i}: {i}.png not found in {build.images}" for i in (1, 2, 3)
    ]
    assert (report.missing_images, report.unused, report.ok) == (3, {"missing_image": 1}, False)


def test_image_of_another_size_is_a_problem(build: Builder) -> None:
    coco = build.coco()
    build.write(coco)
    coco["images"][0]["width"] = 101
    (problem,) = check(build, coco, draw=False).problems
    assert "image 1: the JSON says 101x80, the file" in problem
    assert "is 100x80" in problem


@pytest.mark.parametrize("cut", [2, 700])
def test_truncated_jpeg_is_a_problem_and_left_as_it_is(build: Builder, cut: int) -> None:
    coco = build.coco(images=[build.image(file_name="a.jpg")])
    build.write(coco)
    file = build.images / "a.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    (problem,) = check(build, coco, draw=False).problems
    assert f"image 1: {file}: cannot be read as an image" in problem
    assert file.read_bytes() == whole[:-cut]
    assert [path.name for path in build.images.iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("a.png", 9, "is 9x9 pixels; sides under 10"), ("a.ppm", 20, "is not of a kind that can be trained on")],
)
def test_image_the_host_would_skip_is_a_problem(build: Builder, name: str, size: int, message: str) -> None:
    coco = build.coco(images=[build.image(file_name=name, width=size, height=size)])
    assert message in check(build, coco).problems[0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_is_that_of_the_image_as_training_reads_it(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40, 20)).save(file, exif=exif)
    pixels = cv2.imread(str(file))
    assert pixels is not None
    assert read_image_size(file, decode=True) == (pixels.shape[1], pixels.shape[0])
    if suffix == "jpg":
        assert read_image_size(file) == ((20, 40) if orientation > 4 else (40, 20))


def test_first_folder_that_holds_the_image_wins(build: Builder, tmp_path: Path) -> None:
    coco = read_coco(build.write(build.coco()))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert find_images(coco.images, image_folders([empty, build.images])) == {1: str(build.images / "a.png")}


def test_no_such_folder_and_task(build: Builder) -> None:
    path = build.write(build.coco())
    with pytest.raises(CocoError, match=r"images: .*nowhere is not a folder"):
        check_coco(path, images=build.folder / "nowhere")
    with pytest.raises(CocoError, match=r"task must be one of detect, pose, segment .* got 'obb'"):
        check_coco(path, images=build.images, task="obb")


def test_report_is_strict_json(build: Builder) -> None:
    report = check(build, build.coco(annotations=[build.annotation(iscrowd=1)]))
    data = json.loads(msgspec.json.encode(report))
    assert data["unused"] == {"crowd": 1}
    assert data["unused_annotations"] == [{"annotation_id": 7, "image_id": 1, "reason": "crowd"}]
    assert report.summary() == "1 annotations, 0 used; not used: 1 crowd"


def counted(path: Path, *, task: str) -> Counter[str]:
    """Count the unused annotations anew, from plain JSON."""
    reasons: Counter[str] = Counter()
    for annotation in json.loads(path.read_text())["annotations"]:
        if annotation["iscrowd"]:
            reasons["crowd"] += 1
        elif math.prod(annotation["bbox"][2:]) == 0:
            reasons["zero_area"] += 1
        elif task == "pose" and not any(annotation["keypoints"][2::3]):
            reasons["no_keypoints"] += 1
        elif task == "segment" and not annotation["segmentation"]:
            reasons["no_segment"] += 1
    return reasons


@pytest.mark.parametrize(
    ("name", "images", "task", "expected"),
    [
        ("bccd/annotations/instances_train.json", "images", "detect", {"zero_area": 1}),
        ("bccd/annotations/instances_val.json", "images", "detect", {"zero_area": 1}),
        ("coco_open/annotations/instances_train2017.json", "images/train2017", "segment", {"crowd": 6}),
        ("coco_open/annotations/person_keypoints_train2017.json", "images/train2017", "pose", None),
        ("coco_open/annotations/person_keypoints_val2017.json", "images/val2017", "pose", None),
    ],
)
def test_real_data_is_accounted_for(
    shared: Callable[[str], Path], name: str, images: str, task: str, expected: dict[str, int] | None
) -> None:
    root = shared(name.partition("/")[0])
    path = root.parent / name
    report = check_coco(path, images=root / images, task=task)
    assert report.unused == counted(path, task=task)
    assert expected is None or report.unused == expected
    assert (
        report.annotations
        == report.used + sum(report.unused.values())
        == len(json.loads(path.read_text())["annotations"])
    )
    assert sum(category.used for category in report.categories) == report.used
    assert report.problems == []


def test_nothing_random_is_disturbed(build: Builder) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    check(build, build.coco())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
