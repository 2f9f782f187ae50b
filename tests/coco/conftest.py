"""Small COCO sets with every field defaulted, and the real data where it lies beside the project."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


class Builder:
    """Writes tiny COCO sets under a folder: `images/*.png` and JSON files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True)

    def image(self, **changes: Any) -> dict[str, Any]:
        return {"id": 1, "file_name": "a.png", "width": 100, "height": 80, **changes}

    def annotation(self, **changes: Any) -> dict[str, Any]:
        return {"id": 7, "image_id": 1, "category_id": 3, "bbox": [10, 20, 30, 40], **changes}

    def category(self, **changes: Any) -> dict[str, Any]:
        return {"id": 3, "name": "cat", **changes}

    def coco(self, **parts: Any) -> dict[str, Any]:
        default = {"images": [self.image()], "annotations": [self.annotation()], "categories": [self.category()]}
        return {**default, **parts}

    def write(self, coco: Any, name: str = "a.json", *, draw: bool = True) -> Path:
        """Write the JSON and, where it lists images properly, the image files."""
        path = self.folder / name
        path.write_text(coco if isinstance(coco, str) else json.dumps(coco), encoding="utf-8")
        if draw and isinstance(coco, dict):
            for image in coco["images"]:
                file = self.images / image["file_name"]
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(image["id"]).integers(0, 256, (image["height"], image["width"], 3))
                file.write_bytes(cv2.imencode(file.suffix, pixels.astype(np.uint8))[1].tobytes())
        return path


@pytest.fixture
def build(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "set")


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Give a folder of the shared real data, or skip the test."""

    def folder(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"needs the real data {SHARED / name}")
        return SHARED / name

    return folder
