"""`coco.annotations`: real files as they are, and one line naming the file and the id for each thing wrong with one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from yolo_gradstab.coco.annotations import CocoError, read_coco, read_listing

from .conftest import Builder


def refused(path: Path, *, segments: bool = False) -> str:
    with pytest.raises(CocoError, match=re.escape(str(path))) as caught:
        read_coco(path, segments=segments)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["instances_train2017", "person_keypoints_val2017"])
def test_real_file_is_read_as_pycocotools_reads_it(
    shared: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shared("coco_open") / "annotations" / f"{name}.json"
    reference, coco = COCO(str(path)), read_coco(path)
    capsys.readouterr()  # pycocotools prints
    assert [image.id for image in coco.images] == [image["id"] for image in reference.dataset["images"]]
    for annotation in coco.annotations:
        expected = reference.anns[annotation.id]
        assert list(annotation.bbox) == expected["bbox"]
        assert annotation.keypoints == expected.get("keypoints")
        assert (annotation.category_id, annotation.iscrowd) == (expected["category_id"], expected["iscrowd"])


def test_absent_optional_and_unknown_fields_are_fine(build: Builder) -> None:
    coco = read_coco(build.write({**build.coco(annotations=[build.annotation(caption="x")]), "info": 1}))
    assert coco.annotations[0].iscrowd == 0
    assert coco.annotations[0].keypoints is None


def test_segmentation_is_kept_only_on_request(build: Builder) -> None:
    path = build.write(build.coco(annotations=[build.annotation(segmentation=[[1, 2, 3, 4, 5, 6]])]))
    assert not hasattr(read_coco(path).annotations[0], "segmentation")
    assert bytes(read_coco(path, segments=True).annotations[0].segmentation) == b"[[1, 2, 3, 4, 5, 6]]"


def test_byte_order_mark_is_harmless(build: Builder) -> None:
    path = build.write(build.coco())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_coco(path).images) == 1


def test_listing_is_the_images_and_categories(build: Builder) -> None:
    path = build.write(build.coco())
    coco = read_coco(path)
    assert read_listing(path) == (coco.images, coco.categories)


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.json").startswith("no such file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "is not JSON: .* at line 1 column 13"),
        ("", "is not JSON: "),
        ("[]", "expected `object`, got \\[\\]"),
        ("[" * 100_000, "is not "),
    ],
)
def test_not_coco_json(build: Builder, text: str, message: str) -> None:
    assert re.match(message, refused(build.write(text)))


def test_not_utf8(build: Builder) -> None:
    path = build.write(build.coco())
    path.write_bytes(path.read_bytes().replace(b"a.png", b"a\xff.png"))
    assert "is not UTF-8" in refused(path)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_missing_part_is_named(build: Builder, part: str) -> None:
    coco = build.coco()
    del coco[part]
    assert refused(build.write(coco, draw=False)).startswith(f"has no `{part}`")


@pytest.mark.parametrize("part", ["images", "categories"])
def test_empty_part_is_named(build: Builder, part: str) -> None:
    assert refused(build.write(build.coco(**{part: [], "annotations": []}))).startswith(f"`{part}` is empty")


ANNOTATION = "annotation 7 (annotations[0]): "
BOX_RULE = "a box is four finite numbers [x, y, width, height]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [math.nan, 1, 2, 3]}, f"{ANNOTATION}bbox: not a finite number (JSON has no nan), got [NaN, 1, 2, 3]"),
        ({"bbox": [1, 1, math.inf, 3]}, f"{ANNOTATION}bbox: not a finite number (JSON has no inf), got [1, 1, Infini"),
        ({"bbox": [1, 2, 3]}, f"{ANNOTATION}bbox: expected `array` of length 4, got [1, 2, 3]; {BOX_RULE}"),
        ({"bbox": [1, 2, None, 3]}, f"{ANNOTATION}bbox: expected `float`, got [1, 2, null, 3]"),
        ({"bbox": [1, 2, -3, 3]}, "annotation 7: bbox [1.0, 2.0, -3.0, 3.0] has a negative width or height"),
        ({"area": math.nan}, f"{ANNOTATION}area: not a finite number"),
        ({"segmentation": [[1, math.nan]]}, f"{ANNOTATION}segmentation: not a finite number"),
        ({"image_id": 5}, "annotation 7: image_id 5 is not in `images` (1 such annotations)"),
        ({"image_id": -1}, "annotation 7: image_id -1 is not in `images` (1 such annotations)"),
        ({"category_id": 5}, "annotation 7: category_id 5 is not in `categories` (1 such annotations)"),
        ({"id": "q"}, "annotation q (annotations[0]): id: expected `int`"),
        ({"id": 2**70}, "(annotations[0]): id: expected `int` <= 9223372036854775807"),
        ({"keypoints": [1, 2]}, "annotation 7: keypoints has 2 numbers; it must be x, y, visibility"),
        ({"keypoints": [1, 2, 2]}, "annotation 7: keypoints holds 1 points, but category 3 names 2"),
    ],
)
def test_bad_annotation_is_named(build: Builder, changes: dict[str, Any], message: str) -> None:
    category = build.category(keypoints=["left_eye", "right_eye"])
    coco = build.coco(annotations=[build.annotation(**changes)], categories=[category])
    assert message in refused(build.write(coco))


def test_number_too_large_for_a_float(build: Builder) -> None:
    path = build.write(json.dumps(build.coco()).replace("[10, 20", "[1e999, 20"))
    assert "bbox: number out of range" in refused(path)


def test_annotation_without_box(build: Builder) -> None:
    annotation = build.annotation()
    del annotation["bbox"]
    message = refused(build.write(build.coco(annotations=[annotation])))
    assert message == "annotation 7 (annotations[0]): object missing required field `bbox`"


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "C:\\a.png", "x/../../a.png", "\\\\host\\a.png", ""])
def test_file_name_that_leaves_the_folder(build: Builder, name: str) -> None:
    message = refused(build.write(build.coco(images=[build.image(file_name=name)]), draw=False))
    assert message.startswith(f"image 1: file_name {name!r} must be a relative path inside the image folder")


def test_image_without_size(build: Builder) -> None:
    message = refused(build.write(build.coco(images=[build.image(width=0)]), draw=False))
    assert message == "image 1 (images[0]): width: expected `int` >= 1, got 0"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("images", "image id 1 is used 2 times"),
        ("annotations", "annotation id 7 is used 2 times"),
        ("categories", "category id 3 is used 2 times"),
    ],
)
def test_repeated_id(build: Builder, part: str, message: str) -> None:
    coco = build.coco()
    coco[part] = coco[part] * 2
    assert refused(build.write(coco)).startswith(message)


def test_file_listed_under_two_ids(build: Builder) -> None:
    message = refused(build.write(build.coco(images=[build.image(), build.image(id=2)])))
    assert message.startswith("image 2: file_name 'a.png' is that of image 1 too")
    message = refused(build.write(build.coco(images=[build.image(), build.image(id=2, file_name="./a.png")])))
    assert message.startswith("image 2: file_name './a.png' is that of image 1 too")


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [], "annotations": [], "categories": [], "more": ' + "[" * 10**5 + "]" * 10**5 + "}",
        '{"images": [{"id": "x"}], "images": []}',
        '{"images": [{"id": ' + "1" * 5000 + "}]}",
    ],
)
def test_what_no_reader_can_take_is_one_line(build: Builder, text: str) -> None:
    path = build.write(build.coco())
    path.write_text(text)
    assert refused(path).startswith("is not COCO JSON: ")
