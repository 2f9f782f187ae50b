"""The image files of a COCO set: found in their folders, and looked at without being touched.

The host "restores" a corrupt JPEG by rewriting the user's file; here a file is only ever read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from yolo_gradstab.coco.annotations import CocoError, CocoImage

__all__ = [
    "IMAGE_SUFFIXES",
    "check_images",
    "find_images",
    "image_file",
    "image_folders",
    "read_image_size",
    "refuse_broken",
    "refuse_missing",
    "stamp_images",
]

# The suffixes the host trains on (ultralytics.data.utils.IMG_FORMATS); a file of another kind would be skipped there.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
)
MIN_SIDE_PX = 10  # the host refuses smaller images (ultralytics.data.utils.check_image)
NUM_THREADS = min(8, os.cpu_count() or 1)

Stamps = npt.NDArray[np.int64]

_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = frozenset({5, 6, 7, 8})
_TURNED_BY_EVERY_READER = frozenset({"JPEG", "MPO", "PNG", "AVIF"})


def image_folders(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the image folders as absolute paths, resolved as the host resolves them so that files sort alike."""
    folders = [images] if isinstance(images, (str, Path)) else list(images)
    if not folders:
        raise CocoError("images: no folder given; name the folder(s) that hold the image files")
    for folder in folders:
        if not Path(folder).is_dir():
            raise CocoError(f"images: {folder} is not a folder; name the folder(s) that hold the image files")
    return [Path(folder).resolve() for folder in folders]


def find_images(images: Iterable[CocoImage], folders: Sequence[Path]) -> dict[int, str]:
    """Map image ids to files: the first folder that holds `file_name` wins. Missing images are absent."""
    roots = [str(folder) for folder in folders]
    files: dict[int, str] = {}
    for image in images:
        candidates = (image_file(root, image.file_name) for root in roots)
        if (file := next(filter(os.path.isfile, candidates), None)) is not None:
            files[image.id] = file
    return files


def image_file(root: str, file_name: str) -> str:
    """Return the path of an image in a folder, spelled as the host spells it."""
    return root.rstrip(os.sep) + os.sep + os.path.normpath(file_name)  # `join` takes three times as long


def stamp_images(files: Sequence[str]) -> Stamps:
    """Return (n, 2) size in bytes and modification time in ns, by which the host knows a file; -1 where none is."""
    stamps = []
    for file in files:
        try:
            found = os.stat(file)  # noqa: PTH116 (118,000 of them)
        except OSError:
            stamps.append((-1, -1))
        else:
            stamps.append((found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-1, -1))
    return np.array(stamps, np.int64).reshape(-1, 2)


def refuse_missing(path: str, images: Sequence[CocoImage], files: Mapping[int, str], folders: Sequence[Path]) -> None:
    """Stop, in one line, if any image file is missing: labels for a part of a set are made on request only."""
    missing = [image for image in images if image.id not in files]
    if missing:
        raise CocoError(
            f"{path}: {len(missing)} of {len(images)} image files not found, first {missing[0].file_name} (image "
            f"{missing[0].id}), in {', '.join(map(str, folders))}; correct the folder, or take them out of the JSON"
        )


def refuse_broken(found: Mapping[int, str]) -> None:
    """Stop, in one line, if `check_images` found anything."""
    if problems := list(found.values()):
        more = f" (and {len(problems) - 1} more such images; `yolo-gradstab data check` lists them)"
        raise CocoError(problems[0] + (more if len(problems) > 1 else ""))


def read_image_size(file: str | Path, *, decode: bool = False) -> tuple[int, int]:
    """Return width and height of the upright image (EXIF applied), as training will see it.

    Args:
        file: The image file.
        decode: Also decode every pixel, so that a truncated file is found (about 1 ms for a COCO image).

    Raises:
        CocoError: If the file cannot be read as an image the host can train on.
    """
    try:
        with Image.open(file) as image:
            size = _upright_size(image, file)
            if decode:
                # libjpeg still reads every byte when it decodes at an eighth of the size, several times faster.
                image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
    except Exception as error:  # a broken file can make Pillow's readers raise nearly anything
        raise CocoError(f"{file}: cannot be read as an image ({error}); restore the file or take it out") from None
    if min(size) < MIN_SIDE_PX:
        raise CocoError(f"{file}: is {size[0]}x{size[1]} pixels; sides under {MIN_SIDE_PX} cannot be trained on")
    return size


def check_images(path: str, images: Iterable[CocoImage], files: Mapping[int, str], *, decode: bool) -> dict[int, str]:
    """Map ids to a line for each image file that is broken or has another size than the JSON says, in image order."""
    found = [image for image in images if image.id in files]
    if not found:
        return {}
    with ThreadPool(NUM_THREADS) as pool:  # decoding releases the interpreter lock
        lines = pool.map(partial(_problem, path, files, decode), found)
    return {image.id: line for image, line in zip(found, lines, strict=True) if line}


def _problem(path: str, files: Mapping[int, str], decode: bool, image: CocoImage) -> str:
    file = files[image.id]
    if Path(file).suffix.lower() not in IMAGE_SUFFIXES:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        return f"{path}: image {image.id}: {file} is not of a kind that can be trained on ({kinds})"
    try:
        width, height = read_image_size(file, decode=decode)
    except CocoError as error:
        return f"{path}: image {image.id}: {error}"
    if (width, height) != (image.width, image.height):
        return (
            f"{path}: image {image.id}: the JSON says {image.width}x{image.height}, the file {file} is "
            f"{width}x{height}; correct `width` and `height`, or use the images the boxes were drawn on"
        )
    return ""


def _upright_size(image: Image.Image, file: str | Path) -> tuple[int, int]:
    width, height = image.size
    if image.getexif().get(_EXIF_ORIENTATION) not in _QUARTER_TURNS:
        return width, height
    if image.format in _TURNED_BY_EVERY_READER:
        return height, width
    pixels = cv2.imread(str(file))  # whether WebP and TIFF are turned depends on the OpenCV version: ask it
    return (width, height) if pixels is None else (pixels.shape[1], pixels.shape[0])
