"""Shapes for a drawn detection set: circles, squares and triangles of any colour, size and rotation."""

from __future__ import annotations

import numpy as np

from yolo_gradstab.coco.scene import Figure, Part, turned, vivid

__all__ = ["SHAPES", "sketch_shape"]

SHAPES = ("circle", "square", "triangle")
MOST_SHAPES = 6

_CORNERS = {"circle": 48, "square": 4, "triangle": 3}
_CROWDED = 3  # above this many, shapes are smaller, so that they find room


def sketch_shape(rng: np.random.Generator, size: int, num_objects: int, dark: bool) -> Figure:
    """Propose a shape whose width is 18 to 50 % of the image's (36 % in a full image)."""
    category = int(rng.integers(len(SHAPES)))
    corners = _CORNERS[SHAPES[category]]
    width = size * rng.uniform(0.18, 0.36 if num_objects > _CROWDED else 0.5)
    angles = 2 * np.pi * np.arange(corners) / corners
    points = turned(np.stack([np.cos(angles), np.sin(angles)], axis=1), rng.uniform(0, 2 * np.pi))
    centre = rng.uniform(0.08 * size, 0.92 * size, 2)
    return Figure(category, [Part(centre + points * width / 2, vivid(rng, dark=dark))])
