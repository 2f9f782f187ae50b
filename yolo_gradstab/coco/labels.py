"""COCO annotations turned into YOLO labels: the one place that decides what is used, and what becomes of it.

Checking, conversion and training all read the labels made here, so they cannot disagree. Conventions:

- Classes. COCO's category ids run from 1 to 90 with holes, YOLO's classes from 0 to 79 without. Categories are ordered
  by id and numbered from 0; subtracting 1 from the id, as is often done, is wrong from the first hole on.
- Boxes are the centre, width and height, divided by the image's. A box partly outside is cut at the image border (and
  counted); one wholly outside is not used.
- Keypoints that are not labelled (visibility 0) are 0, 0, 0. A labelled point outside the image becomes one of those
  (and is counted), as in the host, whose own augmentation does the same to points that leave the frame. A point outside
  its person's box is ordinary COCO data and is kept.
- A segment is one outline, cut at the image border, and its box is the box of the outline, as the host reads it.
- The order within an image is that of the file. Values are computed in float64 and rounded once, to float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import overload

import msgspec
import numpy as np
import numpy.typing as npt

from yolo_gradstab.coco.annotations import CocoAnnotations, CocoCategory, CocoError, CocoImage, SegmentedAnnotation
from yolo_gradstab.coco.keypoints import KeypointLayout, keypoint_layout
from yolo_gradstab.coco.segments import MIN_POINTS, cut_outline, join_outlines, read_outlines

__all__ = [
    "REASONS",
    "TASKS",
    "CocoLabels",
    "FlatLabels",
    "ImageLabels",
    "Unused",
    "check_task",
    "class_names",
    "make_labels",
]

TASKS = ("detect", "pose", "segment")
OUTLINED = ("obb", "semantic")  # which the host trains from outlines too: their smallest rectangle, their inside

REASONS = ("missing_image", "crowd", "zero_area", "outside", "no_keypoints", "no_segment", "duplicate")
"""Why an annotation is not used, in the order they are tried; an annotation has the first that applies."""

CLIP_TOLERANCE_PX = 1e-3  # float noise of x + width at the border is not worth a note
_USED = -1
_CLASS_AND_BOX = 5  # numbers in a row of labels, before the keypoints
_MULTIPLIER = np.uint64(0x100000001B3)  # FNV's prime

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Unused(msgspec.Struct, frozen=True):
    """An annotation that is not used, and why: one of `REASONS`."""

    annotation_id: int
    image_id: int
    reason: str


class ImageLabels(msgspec.Struct, frozen=True, gc=False):
    """The labels of one image; n is 0 for a background image."""

    image_id: int
    file: str
    width: int
    height: int
    classes: Labels
    """(n,) class indices, as floats because the host keeps them so"""
    boxes: Labels
    """(n, 4) x, y of the centre, width, height; fractions of the image"""
    keypoints: Labels | None = None
    """(n, points, 3) x, y as fractions of the image, and COCO's visibility; None unless the task is pose"""
    segments: list[Labels] = []
    """n outlines of (points, 2) fractions of the image; empty unless the task is segment"""


@dataclass(frozen=True, slots=True)
class FlatLabels(Sequence[ImageLabels]):
    """The labels of all images in a few arrays: as many objects as arrays, however many images there are.

    As a sequence it gives the labels of one image, views into the arrays that are made when asked for.
    """

    images: list[CocoImage]
    files: list[str]
    bounds: Integers
    """(images + 1,) image i has the rows from bounds[i] to bounds[i + 1]"""
    rows: Labels
    """(n, 5) class, x, y of the centre, width, height; (n, 5 + 3 points) for pose"""
    points: Labels
    """(all points of all outlines, 2); without rows unless the task is segment"""
    point_bounds: Integers
    """(n + 1,) row i has the points from point_bounds[i] to point_bounds[i + 1]; (0,) unless the task is segment"""

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> ImageLabels: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageLabels]: ...
    def __getitem__(self, index: int | slice) -> ImageLabels | list[ImageLabels]:
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return next(self._views(chosen, chosen + 1))
        return [*self._views(chosen.start, chosen.stop)] if chosen.step == 1 else [self[i] for i in chosen]

    def __iter__(self) -> Iterator[ImageLabels]:
        return self._views(0, len(self))

    def _views(self, first: int, end: int) -> Iterator[ImageLabels]:
        # As lists, once: a number taken from an array costs more than all else that is done for an image.
        bounds = self.bounds[first : end + 1].tolist() if end > first else [0]
        point_bounds = self.point_bounds[bounds[0] : bounds[-1] + 1].tolist()
        num_points, points = (self.rows.shape[1] - _CLASS_AND_BOX) // 3, self.points
        for index, (start, stop) in enumerate(pairwise(bounds), start=first):
            image, rows = self.images[index], self.rows[start:stop]
            outlines = point_bounds[start - bounds[0] : stop - bounds[0] + 1]
            yield ImageLabels(
                image_id=image.id,
                file=self.files[index],
                width=image.width,
                height=image.height,
                classes=rows[:, 0],
                boxes=rows[:, 1:_CLASS_AND_BOX],
                keypoints=rows[:, _CLASS_AND_BOX:].reshape(len(rows), num_points, 3) if num_points else None,
                segments=[points[a:b] for a, b in pairwise(outlines)],
            )


@dataclass(frozen=True, slots=True)
class CocoLabels:
    """What a COCO file means for a task: the labels by image, and an account of what is not in them."""

    task: str
    images: FlatLabels
    """Sorted by file, as the host sorts; only images that were found."""
    names: dict[int, str]
    layout: KeypointLayout | None
    num_annotations: int
    num_used: int
    unused: list[Unused]
    clipped: list[int]
    """Ids of used annotations whose box was cut at the image border."""
    num_keypoints_outside: int
    """Labelled points of used annotations that lie outside the image and became unlabelled."""
    num_by_class: list[int]
    num_used_by_class: list[int]
    notes: list[str]

    def unused_by_reason(self) -> dict[str, int]:
        """Count the unused annotations; reasons that did not occur are left out."""
        counts = Counter(entry.reason for entry in self.unused)
        return {reason: counts[reason] for reason in REASONS if counts[reason]}


@dataclass(slots=True)
class _Columns:
    """The annotations as columns, and `reason`: an index into `REASONS`, or -1 while an annotation is used."""

    ids: Integers
    image: Integers
    """index into the images of the file"""
    category: Integers
    """class index"""
    box: Floats
    """(n, 4) pixels"""
    size: Floats
    """(n, 2) width, height of the annotation's image"""
    reason: npt.NDArray[np.int8]

    def reject(self, mask: Mask, reason: str) -> None:
        """Give those of `mask` that are still used a reason why not."""
        self.reason[mask & (self.reason == _USED)] = REASONS.index(reason)

    def used(self) -> Integers:
        return np.flatnonzero(self.reason == _USED)


@dataclass(frozen=True, slots=True)
class _Keypoints:
    values: Floats
    """(n, points, 3) fractions of the image, visibility; zeros where not labelled"""
    num_outside: Integers


def check_task(task: str) -> None:
    """Refuse a task that COCO annotations do not describe."""
    if task not in TASKS:
        convert = "`yolo-gradstab data convert ... task=segment` writes labels that it takes"
        advice = convert if task in OUTLINED else "give data in Ultralytics' own format"
        raise CocoError(f"task must be one of {', '.join(TASKS)} for COCO JSON, got {task!r}; {advice}")


def make_labels(coco: CocoAnnotations, files: Mapping[int, str], *, task: str) -> CocoLabels:
    """Turn annotations into labels.

    Args:
        coco: A checked file, read with `segments=True` for the task segment.
        files: The image file of each image id; images without one are missing.
        task: One of `TASKS`.

    Raises:
        CocoError: If the file cannot serve the task at all, as a pose set without keypoints.
    """
    check_task(task)
    layout = keypoint_layout(coco.categories, coco.path) if task == "pose" else None
    columns = _columns(coco, files)
    boxes, cut = _clip_boxes(columns)
    points = _read_keypoints(coco, layout, columns) if layout else None
    outlines, num_short = _read_segments(coco, columns, cut) if task == "segment" else ({}, 0)
    rows = _rows(columns, boxes, points, outlines)
    columns.reject(_repeated(columns, rows, outlines), "duplicate")
    used = columns.used()
    notes = list(layout.notes) if layout else []
    if num_short:
        notes.append(f"{num_short} parts of segments have fewer than {MIN_POINTS} points and are left out")
    return CocoLabels(
        task=task,
        images=_by_image(coco.images, files, columns, rows, outlines),
        names=class_names(coco.categories),
        layout=layout,
        num_annotations=len(coco.annotations),
        num_used=len(used),
        unused=_unused(columns, coco.images),
        clipped=columns.ids[used[cut[used]]].tolist(),
        num_keypoints_outside=int(points.num_outside[used].sum()) if points else 0,
        num_by_class=np.bincount(columns.category, minlength=len(coco.categories)).tolist(),
        num_used_by_class=np.bincount(columns.category[used], minlength=len(coco.categories)).tolist(),
        notes=notes,
    )


def class_names(categories: Sequence[CocoCategory]) -> dict[int, str]:
    """Number the categories from 0 in the order of their ids; two may have the same name."""
    return {index: category.name for index, category in enumerate(sorted(categories, key=lambda c: c.id))}


def _columns(coco: CocoAnnotations, files: Mapping[int, str]) -> _Columns:
    num, image = len(coco.annotations), coco.columns.image
    sizes = np.array([(i.width, i.height) for i in coco.images], np.float64)
    columns = _Columns(
        ids=coco.columns.ids,
        image=image,
        category=coco.columns.category,
        box=coco.columns.box,
        size=sizes[image],
        reason=np.full(num, _USED, np.int8),
    )
    found = np.array([i.id in files for i in coco.images])
    columns.reject(~found[image], "missing_image")
    columns.reject(np.fromiter(map(attrgetter("iscrowd"), coco.annotations), np.bool_, num), "crowd")
    return columns


def _clip_boxes(columns: _Columns) -> tuple[Floats, Mask]:
    """Return boxes as fractions (centre, size), and which were cut at the image border."""
    low, extent, size = columns.box[:, :2], columns.box[:, 2:], columns.size
    with np.errstate(over="ignore"):  # absurd but finite numbers end up outside
        high = low + extent
    columns.reject(_either(high <= low), "zero_area")
    # Boxes inside keep their own numbers: x + width - x is not always width.
    exceeding = np.flatnonzero(_either((low < 0) | (high > size)))
    low, high, size = low[exceeding], high[exceeding], size[exceeding]
    low_inside, high_inside = np.clip(low, 0, size), np.clip(high, 0, size)
    outside, cut = np.zeros((2, len(columns.ids)), np.bool_)
    outside[exceeding] = _either(high_inside <= low_inside)
    cut[exceeding] = _either((low < -CLIP_TOLERANCE_PX) | (high > size + CLIP_TOLERANCE_PX))
    columns.reject(outside, "outside")
    box = columns.box.copy()
    box[exceeding] = np.hstack([low_inside, high_inside - low_inside])
    box[:, :2] += box[:, 2:] / 2
    box[:, :2] /= columns.size
    box[:, 2:] /= columns.size
    return box, cut


def _either(pair: Mask) -> Mask:
    """(n, 2) to (n,): true where one of x and y is; ten times faster than `any(axis=1)`."""
    return pair[:, 0] | pair[:, 1]


def _read_keypoints(coco: CocoAnnotations, layout: KeypointLayout, columns: _Columns) -> _Keypoints:
    annotations, num_points = coco.annotations, len(layout.names)
    posed = {category.id for category in coco.categories if category.keypoints}
    having = [i for i, a in enumerate(annotations) if a.keypoints and a.num_keypoints != 0 and a.category_id in posed]
    values = np.zeros((len(annotations), num_points, 3))
    values[having] = np.array([annotations[i].keypoints for i in having], np.float64).reshape(-1, num_points, 3)
    odd = ~np.isin(values[..., 2], (0, 1, 2)).all(1)
    if odd.any():
        raise CocoError(
            f"{coco.path}: annotation {columns.ids[odd.argmax()]}: keypoint visibility must be 0 (not labelled), "
            f"1 (hidden) or 2 (visible), got {sorted(set(values[odd.argmax(), :, 2].tolist()))}"
        )
    labelled = values[..., 2] > 0
    if not labelled.any():
        raise CocoError(f"{coco.path}: no annotation has keypoints; use the keypoint annotation file, or task=detect")
    xy, size = values[..., :2], columns.size[:, None]
    outside = labelled & ((xy < 0) | (xy > size)).any(-1)
    values[~labelled | outside] = 0
    values[..., :2] /= size
    columns.reject(~np.any(values[..., 2] > 0, axis=1), "no_keypoints")
    return _Keypoints(values=values, num_outside=outside.sum(1))


def _read_segments(coco: CocoAnnotations, columns: _Columns, cut: Mask) -> tuple[dict[int, Labels], int]:
    """Return an outline for each annotation that is still used and has one, by position; mark those it cuts.

    And how many of their parts enclose nothing, for want of points.
    """
    outlines: dict[int, Labels] = {}
    num_short = 0
    missing = np.zeros(len(coco.annotations), np.bool_)
    for index in columns.used().tolist():
        annotation, image = coco.annotations[index], coco.images[columns.image[index]]
        assert isinstance(annotation, SegmentedAnnotation), "the task segment needs read_coco(..., segments=True)"
        whole, size = read_outlines(annotation, image, coco.path), columns.size[index]
        closed = [part for part in whole if len(part) >= MIN_POINTS]
        parts = [cut_outline(part, size) for part in closed]
        cut[index] |= any(part is not before for part, before in zip(parts, closed, strict=True))
        inside = [part / size for part in parts if len(part)]
        if inside and (np.ptp(np.concatenate(inside), axis=0) > 0).all():
            outlines[index] = join_outlines(inside).astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
            num_short += len(whole) - len(closed)
        else:
            missing[index] = True
    columns.reject(missing, "no_segment")
    return outlines, num_short


def _rows(columns: _Columns, boxes: Floats, points: _Keypoints | None, outlines: Mapping[int, Labels]) -> Labels:
    """Return a label row for each annotation, used or not: class, box and, for pose, the keypoints."""
    num_values = 0 if points is None else points.values[0].size
    rows = np.empty((len(boxes), _CLASS_AND_BOX + num_values), np.float32)
    rows[:, 0], rows[:, 1:_CLASS_AND_BOX] = columns.category, boxes
    if points is not None:
        rows[:, _CLASS_AND_BOX:] = points.values.reshape(len(boxes), num_values)
    for index, outline in outlines.items():
        # In float32 and in this order, as the host computes the box of a segment it has read.
        low, high = outline.min(0), outline.max(0)
        rows[index, 1:3], rows[index, 3:5] = (low + high) / 2, high - low
    rows += np.float32(0)  # -0.0 becomes 0.0, so that equal rows have equal bytes
    return rows


def _repeated(columns: _Columns, rows: Labels, outlines: Mapping[int, Labels]) -> Mask:
    """Mark annotations equal to an earlier one of the same image. The host would drop them, and reorder the others."""
    used = columns.used()
    hashes = columns.image[used].astype(np.uint64)
    for column in rows[used, :_CLASS_AND_BOX].view(np.uint32).T:
        hashes = (hashes * _MULTIPLIER) ^ column
    ordered = np.sort(hashes)
    twins = ordered[1:][ordered[1:] == ordered[:-1]]
    repeated = np.zeros(len(rows), np.bool_)
    seen: set[tuple[int, bytes, bytes]] = set()
    # Few share a hash of image, class and box; only they are compared in full, in file order.
    for index in (used[np.isin(hashes, twins)] if len(twins) else used[:0]).tolist():
        outline = outlines[index].tobytes() if outlines else b""
        key = (int(columns.image[index]), rows[index].tobytes(), outline)
        repeated[index] = key in seen
        seen.add(key)
    return repeated


def _by_image(
    images: Sequence[CocoImage],
    files: Mapping[int, str],
    columns: _Columns,
    rows: Labels,
    outlines: Mapping[int, Labels],
) -> FlatLabels:
    found = sorted((i for i, image in enumerate(images) if image.id in files), key=lambda i: files[images[i].id])
    rank = np.zeros(len(images), np.int64)
    rank[found] = np.arange(len(found))
    used = columns.used()
    used = used[np.argsort(rank[columns.image[used]], kind="stable")]
    own = [outlines[index] for index in used.tolist()] if outlines else []
    counts = np.bincount(rank[columns.image[used]], minlength=len(found))
    return FlatLabels(
        images=[images[i] for i in found],
        files=[files[images[i].id] for i in found],
        bounds=np.concatenate([[0], np.cumsum(counts)]),
        rows=rows[used],
        points=np.concatenate(own) if own else np.empty((0, 2), np.float32),
        point_bounds=np.cumsum([0, *map(len, own)]) if own else np.empty(0, np.int64),
    )


def _unused(columns: _Columns, images: Sequence[CocoImage]) -> list[Unused]:
    unused = np.flatnonzero(columns.reason != _USED)
    ids, owners, reasons = (column[unused].tolist() for column in (columns.ids, columns.image, columns.reason))
    return [Unused(a, images[i].id, REASONS[r]) for a, i, r in zip(ids, owners, reasons, strict=True)]
