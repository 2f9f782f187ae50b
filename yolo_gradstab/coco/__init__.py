"""COCO-format data: read, checked, converted, drawn, and trained on directly.

`dataset` is not imported here: it alone needs Ultralytics and torch.
"""

from __future__ import annotations

from yolo_gradstab.coco.annotations import CocoAnnotations, CocoError, read_coco
from yolo_gradstab.coco.check import CheckReport, check_coco
from yolo_gradstab.coco.conversion import ConversionReport, convert_coco
from yolo_gradstab.coco.sample import draw_sample

__all__ = [
    "CheckReport",
    "CocoAnnotations",
    "CocoError",
    "ConversionReport",
    "check_coco",
    "convert_coco",
    "draw_sample",
    "read_coco",
]
