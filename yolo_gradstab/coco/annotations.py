"""COCO JSON read into typed records, with errors that name the file and the id.

Everything that can be wrong with the *file* is found here; what the labels mean for a task is decided in `labels`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = [
    "AnnotationColumns",
    "CocoAnnotation",
    "CocoAnnotations",
    "CocoCategory",
    "CocoError",
    "CocoImage",
    "SegmentedAnnotation",
    "read_coco",
    "read_listing",
]

# Ids are compared in numpy int64 columns; a larger one must fail as an error of the file, not as an overflow.
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Box = tuple[float, float, float, float]

_MSGSPEC_PATH = re.compile(r"^(?P<problem>.*?) - at `(?P<path>\$.*)`$", re.DOTALL)
_PATH_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_PLAIN_NAME = re.compile(
    r"[\w-][\w .-]*"
)  # of one part that is no `..`: nearly every file name, known safe at a glance
_RECORD_NAMES = {"images": "image", "annotations": "annotation", "categories": "category"}


Integers = npt.NDArray[np.int64]
T = TypeVar("T")


class CocoError(ValueError):
    """COCO data that cannot be used as it is; the message is one line for the user."""


class CocoImage(msgspec.Struct, frozen=True, gc=False):
    """One entry of `images`; width and height are those of the upright image (EXIF applied)."""

    id: Id
    file_name: str
    width: Pixels
    height: Pixels


class CocoCategory(msgspec.Struct, frozen=True):
    """One entry of `categories`; `keypoints` are the point names of a pose category."""

    id: Id
    name: str
    keypoints: list[str] | None = None


class CocoAnnotation(msgspec.Struct, frozen=True, gc=False):
    """One entry of `annotations`; `bbox` is x, y, width, height in pixels from the top left corner."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: Box
    iscrowd: bool | int = 0
    area: float | None = None
    num_keypoints: int | None = None
    keypoints: list[float] | None = None


class SegmentedAnnotation(CocoAnnotation, frozen=True, gc=False):
    """An annotation with its `segmentation` (polygons, or RLE) still encoded; `segments` decodes it."""

    segmentation: msgspec.Raw = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class AnnotationColumns:
    """The annotations as columns, in the order of the file: 860,000 numbers are checked at once, not one by one."""

    ids: Integers
    image: Integers
    """index into the images of the file"""
    category: Integers
    """index into the categories in the order of their ids, which is the class"""
    box: npt.NDArray[np.float64]
    """(n, 4) x, y, width, height in pixels"""


@dataclass(frozen=True, slots=True)
class CocoAnnotations:
    """A checked COCO file: ids are unique, every reference resolves, every box is four numbers."""

    path: str
    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]
    columns: AnnotationColumns


class _Boxes(msgspec.Struct):
    images: list[CocoImage] | None = None
    annotations: list[CocoAnnotation] | None = None
    categories: list[CocoCategory] | None = None


class _Segments(msgspec.Struct):
    images: list[CocoImage] | None = None
    annotations: list[SegmentedAnnotation] | None = None
    categories: list[CocoCategory] | None = None


class _Listing(msgspec.Struct):
    images: list[CocoImage] | None = None
    categories: list[CocoCategory] | None = None


def read_coco(path: str | Path, *, segments: bool = False) -> CocoAnnotations:
    """Read and check a COCO annotation file.

    Args:
        path: The JSON file.
        segments: Keep `segmentation`. It is most of the bytes of a COCO file and keeps the whole file in memory, so it
            is left out where no task needs it.

    Raises:
        CocoError: If the file is missing, is not COCO JSON, or contradicts itself; names the file and the id.
    """
    file: _Boxes | _Segments = _decode(Path(path), _Segments) if segments else _decode(Path(path), _Boxes)
    _check_parts(str(path), file, ("images", "annotations", "categories"))
    images, categories = file.images or [], file.categories or []
    annotations: list[CocoAnnotation] = [*(file.annotations or ())]
    _check_images(str(path), images)
    _check_categories(str(path), categories)
    columns = _columns(str(path), images, annotations, categories)
    _check_annotations(str(path), annotations, categories, columns)
    return CocoAnnotations(str(path), images, annotations, categories, columns)


def read_listing(path: str | Path) -> tuple[list[CocoImage], list[CocoCategory]]:
    """Read only the images and categories of a COCO file, several times faster than all of it."""
    file = _decode(Path(path), _Listing)
    _check_parts(str(path), file, ("images", "categories"))
    images, categories = file.images or [], file.categories or []
    _check_images(str(path), images)
    _check_categories(str(path), categories)
    return images, categories


def _decode(path: Path, kind: type[T]) -> T:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise CocoError(f"{path}: {what}; give the COCO annotation file (JSON)")
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is common on Windows, and harmless
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CocoError(f"{path}: {_explain(raw, error)}") from None


def _explain(raw: bytes, error: Exception) -> str:
    """Say what msgspec refused, in the file's own terms. Slow: parses again with Python's lenient reader."""
    if raw.startswith(b"\x1f\x8b"):
        return "is packed with gzip; unpack it (gunzip) and give the JSON"
    try:
        data = json.loads(raw.decode())  # of bytes, it would guess at other encodings
    except json.JSONDecodeError as syntax:
        return f"is not JSON: {syntax.msg} at line {syntax.lineno} column {syntax.colno} (character {syntax.pos})"
    except UnicodeDecodeError as text:
        return f"is not JSON: byte {text.start} is not UTF-8; save it as UTF-8"
    except (RecursionError, ValueError):  # nested without end, or a number of thousands of digits
        return f"is not COCO JSON: {error}"
    if isinstance(error, msgspec.ValidationError):
        match = _MSGSPEC_PATH.match(str(error))
        problem, path = match.group("problem", "path") if match else (str(error), "$")
        steps: list[str | int] = [int(index) if index else key for key, index in _PATH_STEP.findall(path)]
        try:
            return _locate(data, steps, problem[:1].lower() + problem[1:])
        except (LookupError, TypeError):  # a key that is there twice: Python keeps the last, msgspec read the first
            return f"is not COCO JSON: {error}"
    # JSON has no NaN or Infinity, yet Python writes them and reads them back: what msgspec refused was such a number.
    for steps, value in _non_finite(data, []):
        return _locate(data, steps, f"not a finite number (JSON has no {value})")
    return f"is not JSON: {error}"


def _non_finite(value: Any, steps: list[str | int]) -> Iterable[tuple[list[str | int], float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield steps, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _non_finite(item, [*steps, key])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _non_finite(item, [*steps, index])


def _locate(data: Any, steps: list[str | int], problem: str) -> str:
    """Name the record by its id and the field with its value: `annotation 7 (annotations[0]): bbox: <problem>`."""
    where, field, value = [], list(steps), data
    if len(steps) > 1 and steps[0] in _RECORD_NAMES and isinstance(steps[1], int):
        value = data[steps[0]][steps[1]]
        record_id = value.get("id", "without id") if isinstance(value, dict) else "that is no object"
        where.append(f"{_RECORD_NAMES[str(steps[0])]} {record_id} ({steps[0]}[{steps[1]}])")
        field = steps[2:3]  # the field whole, [NaN, 1, 2, 3], rather than the one number in it
    for step in field:
        value = value[step]
    if not problem.startswith("object missing"):
        problem = f"{problem.partition(', got ')[0].replace(' | null', '')}, got {_short(value)}"
    hint = "; a box is four finite numbers [x, y, width, height]" if field[:1] == ["bbox"] else ""
    return ": ".join([*where, *map(str, field), problem + hint])


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _check_parts(path: str, file: object, keys: tuple[str, ...]) -> None:
    for key in keys:
        if getattr(file, key) is None:
            raise CocoError(f"{path}: has no `{key}`; a COCO file needs `images`, `annotations` and `categories`")
        if key != "annotations" and not getattr(file, key):
            raise CocoError(f"{path}: `{key}` is empty; there is nothing to train or check")


def _check_images(path: str, images: list[CocoImage]) -> None:
    _check_unique_ids(path, "image", [image.id for image in images])
    owners: dict[str, int] = {}
    for image in images:
        if not _is_inside(image.file_name):
            raise CocoError(
                f"{path}: image {image.id}: file_name {image.file_name!r} must be a relative path inside the image "
                "folder, without `..`"
            )
        if (other := owners.setdefault(os.path.normpath(image.file_name), image.id)) != image.id:
            raise CocoError(
                f"{path}: image {image.id}: file_name {image.file_name!r} is that of image {other} too; "
                "each image may be listed once"
            )


def _check_categories(path: str, categories: list[CocoCategory]) -> None:
    _check_unique_ids(path, "category", [category.id for category in categories])


def _is_inside(file_name: str) -> bool:
    if _PLAIN_NAME.fullmatch(file_name):
        return True
    name = PureWindowsPath(file_name)  # understands both kinds of separator and drive letters
    return not (name.is_absolute() or name.root or name.drive or ".." in name.parts or not name.name)


def _columns(
    path: str, images: list[CocoImage], annotations: list[CocoAnnotation], categories: list[CocoCategory]
) -> AnnotationColumns:
    num = len(annotations)
    ids, image_ids, category_ids = (
        np.fromiter(map(attrgetter(name), annotations), np.int64, num) for name in ("id", "image_id", "category_id")
    )
    boxes = chain.from_iterable(map(attrgetter("bbox"), annotations))
    return AnnotationColumns(
        ids=ids,
        image=_positions(path, "image_id", ids, image_ids, [image.id for image in images]),
        category=_positions(path, "category_id", ids, category_ids, sorted(category.id for category in categories)),
        box=np.fromiter(boxes, np.float64, 4 * num).reshape(num, 4),
    )


def _check_annotations(
    path: str, annotations: list[CocoAnnotation], categories: list[CocoCategory], columns: AnnotationColumns
) -> None:
    _check_unique_ids(path, "annotation", columns.ids)
    negative = (columns.box[:, 2:] < 0).any(1)  # finiteness needs no look: JSON has no NaN, and msgspec refuses 1e999
    if negative.any():
        first = annotations[int(np.argmax(negative))]
        raise CocoError(
            f"{path}: annotation {first.id}: bbox {list(first.bbox)} has a negative width or height; "
            "COCO boxes are [x, y, width, height]"
        )
    point_names = {category.id: category.keypoints for category in categories}
    for a in filter(attrgetter("keypoints"), annotations):
        _check_keypoints(path, a, point_names[a.category_id])


def _check_keypoints(path: str, annotation: CocoAnnotation, names: list[str] | None) -> None:
    num_values = len(annotation.keypoints or ())
    if num_values % 3:
        raise CocoError(
            f"{path}: annotation {annotation.id}: keypoints has {num_values} numbers; it must be x, y, visibility "
            "for each point, a multiple of 3"
        )
    if names and num_values != 3 * len(names):
        raise CocoError(
            f"{path}: annotation {annotation.id}: keypoints holds {num_values // 3} points, but category "
            f"{annotation.category_id} names {len(names)}"
        )


def _check_unique_ids(path: str, what: str, ids: Sequence[int] | Integers) -> None:
    values = np.sort(np.asarray(ids, np.int64))
    repeated = values[1:][values[1:] == values[:-1]]
    if len(repeated):
        first = int(repeated[0])
        raise CocoError(f"{path}: {what} id {first} is used {int((values == first).sum())} times; ids must be unique")


def _positions(path: str, field: str, ids: Integers, wanted: Integers, listed: Sequence[int]) -> Integers:
    """Return where each wanted id stands in the list, and refuse one that does not."""
    values = np.asarray(listed, np.int64)
    order = np.argsort(values)
    positions: Integers = order[np.searchsorted(values, wanted, sorter=order).clip(max=len(values) - 1)]
    unknown = values[positions] != wanted
    if unknown.any():
        first = int(np.argmax(unknown))
        raise CocoError(
            f"{path}: annotation {int(ids[first])}: {field} {int(wanted[first])} is not in "
            f"`{'images' if field == 'image_id' else 'categories'}` ({int(unknown.sum())} such annotations)"
        )
    return positions
