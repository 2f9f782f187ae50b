"""COCO segmentations (polygons or run-length masks) as the one closed outline per object that YOLO trains on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from yolo_gradstab.coco.annotations import CocoError, CocoImage, SegmentedAnnotation

__all__ = ["MIN_POINTS", "Outline", "RunLengths", "cut_outline", "decode_run_lengths", "join_outlines", "read_outlines"]

Outline = npt.NDArray[np.float64]  # (points, 2): x, y in pixels

MIN_POINTS = 3  # fewer enclose no area
FEW_PAIRS = 1 << 16


class RunLengths(msgspec.Struct):
    """A COCO run-length mask: `size` is height, width; `counts` alternate background and object, column by column."""

    size: tuple[int, int]
    counts: list[int] | str


def read_outlines(annotation: SegmentedAnnotation, image: CocoImage, path: str) -> list[Outline]:
    """Decode the segmentation of one annotation, with parts of fewer points than `MIN_POINTS`.

    Raises:
        CocoError: If the segmentation is neither polygons nor a run-length mask of the image's size.
    """
    where = f"{path}: annotation {annotation.id}: segmentation"
    try:
        shape = msgspec.json.decode(annotation.segmentation, type=list[list[float]] | RunLengths | None)
    except msgspec.ValidationError as error:
        raise CocoError(f"{where} is neither polygons [[x, y, ...]] nor a run-length mask: {error}") from None
    if isinstance(shape, RunLengths):
        if shape.size != (image.height, image.width):
            height, width = shape.size
            raise CocoError(f"{where} is a mask of {width}x{height}; image {image.id} is {image.width}x{image.height}")
        return _contours(_decoded(shape, where))
    odd = [len(polygon) for polygon in shape or () if len(polygon) % 2]
    if odd:
        raise CocoError(f"{where} has a polygon of {odd[0]} numbers; x, y pairs make an even number")
    return [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in shape or ()]


def decode_run_lengths(shape: RunLengths) -> npt.NDArray[np.uint8]:
    """Return the mask (height, width) of a run-length encoding, compressed or not.

    References:
        https://github.com/cocodataset/cocoapi, common/maskApi.c (`rleFrString`): each count is a little-endian number
        in characters of five bits and a continuation bit, offset by 48; from the third on, the difference to the count
        two before it.
    """
    height, width = shape.size
    counts = _expand(shape.counts) if isinstance(shape.counts, str) else shape.counts
    if min(height, width, *counts, 0) < 0 or sum(counts) != height * width:
        raise ValueError(f"run lengths sum to {sum(counts)}, but size {height}x{width} has {height * width} pixels")
    values = np.arange(len(counts)) % 2
    return np.repeat(values.astype(np.uint8), counts).reshape(width, height).T


def cut_outline(outline: Outline, size: npt.NDArray[np.float64]) -> Outline:
    """The part of an outline within the image, of no points where there is none.

    Args:
        outline: Points in order.
        size: Width and height of the image.

    References:
        Sutherland, Hodgman 1974, "Reentrant polygon clipping": one side of the image after the other.
    """
    for axis, bound, sign in ((0, 0.0, 1), (0, size[0], -1), (1, 0.0, 1), (1, size[1], -1)):
        depth = sign * (outline[:, axis] - bound)
        if (depth >= 0).all():
            continue
        points = []
        for i in range(len(outline)):
            if (depth[i] >= 0) != (depth[i - 1] >= 0):
                share = depth[i - 1] / (depth[i - 1] - depth[i])
                crossing = outline[i - 1] + share * (outline[i] - outline[i - 1])
                crossing[axis] = bound
                points.append(crossing)
            if depth[i] >= 0:
                points.append(outline[i])
        outline = np.array(points).reshape(-1, 2)
    return outline


def join_outlines(outlines: Sequence[Outline]) -> Outline:
    """Join the parts of one object into a single outline, by a thin bridge between nearest points.

    A YOLO label has one polygon per object. Each further part is walked round and left where it was entered, so the
    bridges enclose no area. Parts are added in their own order.
    """
    joined = outlines[0]
    for part in outlines[1:]:
        here, there = _nearest(joined, part)
        loop = np.roll(part, -there, axis=0)
        joined = np.concatenate([joined[: here + 1], loop, loop[:1], joined[here:]])
    return joined


def _nearest(first: Outline, second: Outline) -> tuple[int, int]:
    """Where two outlines come closest: an index into each."""
    if len(first) * len(second) <= FEW_PAIRS:  # where all distances are sooner had than a tree
        squared = ((first[:, None] - second[None]) ** 2).sum(-1)
        here, there = np.unravel_index(int(squared.argmin()), squared.shape)
        return int(here), int(there)
    distances, places = cKDTree(first, balanced_tree=False, compact_nodes=False).query(second)
    nearest = int(distances.argmin())
    return int(places[nearest]), nearest


def _decoded(shape: RunLengths, where: str) -> npt.NDArray[np.uint8]:
    try:
        return decode_run_lengths(shape)
    except ValueError as error:
        raise CocoError(f"{where} is a broken run-length mask: {error}") from None


def _expand(text: str) -> list[int]:
    differences: list[int] = []
    value, shift = 0, 0
    for character in text.encode("ascii", errors="strict"):
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            differences.append(value - (1 << shift) if bits & 16 else value)
            value, shift = 0, 0
    first, rest = differences[:1], differences[1:]
    # Counts 1 and 2 stand for themselves; every later one adds to the count two before it.
    odd, even = accumulate(rest[0::2]), accumulate(rest[1::2])
    counts = [0] * len(rest)
    counts[0::2], counts[1::2] = list(odd), list(even)
    return first + counts


def _contours(mask: npt.NDArray[np.uint8]) -> list[Outline]:
    """Outlines along the edges of the pixels, which enclose just the area of the mask (but for its holes)."""
    # OpenCV's contours go through the middle of pixels. Of a mask of twice the size they go through each pixel's own
    # left and right half, whose numbers, 2x and 2x + 1, tell the edges x and x + 1.
    mask = np.ascontiguousarray(mask)
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return []
    part = mask[top : top + height, left : left + width]
    twice = cv2.resize(part, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
    found, _ = cv2.findContours(twice, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    offset = np.array([left, top])
    return [_corners((contour.reshape(-1, 2) + 1) // 2) + offset for contour in found]


def _corners(points: npt.NDArray[Any]) -> Outline:
    """The points at which a closed outline of unit steps turns."""
    step = points - np.roll(points, 1, axis=0)
    moves = step.any(axis=1)
    points, step = points[moves], step[moves]
    turns = (step != np.roll(step, -1, axis=0)).any(axis=1)
    corners: Outline = points[turns].astype(np.float64)
    return corners
