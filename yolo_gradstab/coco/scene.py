"""A drawn scene with exactly known labels: parts are painted over each other, and what stays visible is what counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["Drawn", "Figure", "Part", "Scene", "Sketch", "draw_scene", "mixed", "turned", "vivid"]

SUPERSAMPLE = 4  # a power of two: extents in quarters of a pixel are exact in binary and short in JSON
MIN_VISIBLE = 0.6  # of an object's area; less would be a label for something one cannot recognise
TRIES_PER_OBJECT = 12

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One painted piece: a filled polygon, or with a radius a thick line (of one point: a disc)."""

    points: Floats
    """(n, 2) x, y in pixels of the image"""
    colour: Colour
    radius: float = 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """An object before it is painted: parts from back to front and, for pose, its points."""

    category: int
    parts: list[Part]
    keypoints: Floats | None = None
    """(k, 2) x, y in pixels of the image"""
    owners: list[frozenset[int]] = field(default_factory=list)
    """For each keypoint the indices of the parts that show it; under any other part it is hidden."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """An object as it can be seen: all numbers are those of its visible pixels, in pixels of the image."""

    category: int
    bbox: list[float]
    area: float
    segmentation: list[list[float]]
    keypoints: list[list[float]] | None
    """x, y, visibility: 2 seen, 1 hidden behind something in the image, 0 (with x = y = 0) outside the image"""


@dataclass(frozen=True, slots=True)
class Scene:
    """An image (BGR) and the objects in it."""

    image: Pixels
    objects: list[Drawn]


Sketch = Callable[[np.random.Generator, int, int, bool], Figure]
"""Proposes an object: generator, image size, number of objects the scene will have, whether the background is dark."""


def draw_scene(rng: np.random.Generator, sketch: Sketch, *, size: int, most: int) -> Scene:
    """Draw 1 to `most` objects; one that would hide too much of another, or of itself, is proposed anew."""
    dark = bool(rng.random() < 0.5)
    background = _background(rng, size, dark)
    canvas = _Canvas(size)
    num_objects = int(rng.integers(1, most + 1))
    for _ in range(num_objects):
        for _ in range(TRIES_PER_OBJECT):
            if canvas.add(sketch(rng, size, num_objects, dark)):
                break
    return Scene(image=canvas.render(background), objects=canvas.objects())


class _Canvas:
    """The image at high resolution: for each pixel the object and the part that are seen there."""

    def __init__(self, size: int) -> None:
        self.size = size
        side = size * SUPERSAMPLE
        self.owner = np.full((side, side), -1, np.int8)
        self.part = np.zeros((side, side), np.uint8)
        self.colour = np.zeros((side, side, 3), np.uint8)
        self.figures: list[Figure] = []
        self.areas: list[int] = []

    def add(self, figure: Figure) -> bool:
        """Paint a figure over the others, unless too little of it or of one of them would be seen."""
        whole = self._paint(figure)
        side, margin = len(self.owner), len(self.owner) // 2
        part = whole[margin : margin + side, margin : margin + side]
        covered = part > 0
        owner = np.where(covered, np.int8(len(self.figures)), self.owner)
        areas = [*self.areas, int(np.count_nonzero(whole))]
        visible = np.bincount(owner[owner >= 0], minlength=len(areas))
        if (visible < MIN_VISIBLE * np.array(areas)).any():
            return False
        palette = np.array([piece.colour for piece in figure.parts], np.uint8)
        self.colour[covered] = palette[part[covered] - 1]
        self.part[covered] = part[covered]
        self.owner, self.areas = owner, areas
        self.figures.append(figure)
        return True

    def _paint(self, figure: Figure) -> Pixels:
        """Return part numbers, from 1, on a canvas twice as wide, so that what is outside counts too."""
        side = 2 * len(self.owner)
        part = np.zeros((side, side), np.uint8)
        for number, piece in enumerate(figure.parts, start=1):
            points = np.rint(piece.points * SUPERSAMPLE).astype(np.int32) + side // 4
            if not piece.radius:
                cv2.fillPoly(part, [points], (number,))
                continue
            radius = max(1, round(piece.radius * SUPERSAMPLE))
            for start, end in pairwise(points.tolist()):
                cv2.line(part, start, end, (number,), thickness=2 * radius)
            for point in points.tolist():
                cv2.circle(part, point, radius, (number,), thickness=-1)
        return part

    def render(self, background: Floats) -> Pixels:
        covered = (self.owner >= 0).astype(np.float32)
        coverage = cv2.resize(covered, (self.size, self.size), interpolation=cv2.INTER_AREA)[..., None]
        painted = cv2.resize(self.colour.astype(np.float32), (self.size, self.size), interpolation=cv2.INTER_AREA)
        return np.clip(np.rint(background * (1 - coverage) + painted), 0, 255).astype(np.uint8)

    def objects(self) -> list[Drawn]:
        return [self._drawn(index, figure) for index, figure in enumerate(self.figures)]

    def _drawn(self, index: int, figure: Figure) -> Drawn:
        mask = self.owner == index
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        left, top = columns[0] / SUPERSAMPLE, rows[0] / SUPERSAMPLE
        right, bottom = (columns[-1] + 1) / SUPERSAMPLE, (rows[-1] + 1) / SUPERSAMPLE
        return Drawn(
            category=figure.category,
            bbox=[float(left), float(top), float(right - left), float(bottom - top)],
            area=float(np.count_nonzero(mask) / SUPERSAMPLE**2),
            segmentation=_outlines(mask),
            keypoints=self._seen(index, figure),
        )

    def _seen(self, index: int, figure: Figure) -> list[list[float]] | None:
        if figure.keypoints is None:
            return None
        seen = []
        for (x, y), owners in zip(figure.keypoints.round(2).tolist(), figure.owners, strict=True):
            if not (0 <= x < self.size and 0 <= y < self.size):
                seen.append([0.0, 0.0, 0])
                continue
            pixel = int(y * SUPERSAMPLE), int(x * SUPERSAMPLE)
            shown = self.owner[pixel] == index and int(self.part[pixel]) - 1 in owners
            seen.append([x, y, 2 if shown else 1])
        return seen


def _outlines(mask: npt.NDArray[np.bool_]) -> list[list[float]]:
    """Return the outer contours as COCO polygons, to within a quarter of a pixel."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = [cv2.approxPolyDP(contour, 1.0, closed=True).reshape(-1, 2) for contour in contours]
    return [((polygon + 0.5) / SUPERSAMPLE).ravel().tolist() for polygon in polygons if len(polygon) > 2]


def _background(rng: np.random.Generator, size: int, dark: bool) -> Floats:
    """Return a muted gradient with blotches and grain, (size, size, 3)."""
    low, high = (35, 95) if dark else (165, 230)
    corners = rng.uniform(low, high, (2, 2, 1)) + rng.uniform(-14, 14, (2, 2, 3))
    gradient = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)
    blotches = cv2.resize(
        rng.normal(0, 9, (7, 7, 1)) + rng.normal(0, 3, (7, 7, 3)), (size, size), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(gradient + blotches + rng.normal(0, 5, (size, size, 1)), 0, 255)


def vivid(rng: np.random.Generator, *, dark: bool) -> Colour:
    """Return a saturated colour that stands out from the background: bright on dark, deep on light."""
    value = rng.integers(190, 256) if dark else rng.integers(70, 150)
    hsv = np.array([[[rng.integers(0, 180), rng.integers(170, 256), value]]], np.uint8)
    blue, green, red = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def mixed(colour: Sequence[int], other: Sequence[int], share: float) -> Colour:
    """Return `colour` with a share of `other`."""
    blue, green, red = (round((1 - share) * a + share * b) for a, b in zip(colour, other, strict=True))
    return blue, green, red


def turned(points: Floats, angle: float) -> Floats:
    """Rotate points (n, 2) about the origin by an angle in radians."""
    sine, cosine = np.sin(angle), np.cos(angle)
    rotation: Floats = np.array([[cosine, sine], [-sine, cosine]])
    rotated: Floats = points @ rotation
    return rotated
