"""The labels of a COCO file kept beside it, so that a second start neither parses the JSON nor opens the images.

`instances_train2017.json` gets `instances_train2017.detect.gradstab.cache`, one for each task. It is used only while
all that labels come from is as it was:

- the code: the sources of this folder, and the versions of the libraries that compute and open images;
- the JSON file: size, times of change and inode, and where any of them differs the content. A program can set a file's
  modification time, as `cp -p` does, but not the time that the system notes beside it (ctime): equal numbers mean an
  untouched file, and cost nothing. Comparing only contents would have every start read all of it from a cold disk. A
  file younger than `SETTLING_NS` could change again within the same tick; it is always compared by content.
- the images: every one is still there, and the files sort as they did.

What depends on more is not kept but done at each start: `kpt_shape` is compared; `single_cls`, `classes` and `fraction`
are applied. An image found in order is opened again when its path, size or modification time is another, which is all
the host goes by too. That holds when the JSON has changed as well: editing annotations is no reason to decode 118,000
images.

The file is msgpack of fixed types and arrays of numbers, each with a checksum; reading it executes nothing. It is
replaced in one rename: of trials that start at once, each reads a whole one, and the last to write wins.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import PIL

from yolo_gradstab.coco.annotations import CocoCategory, CocoImage
from yolo_gradstab.coco.check import CheckReport
from yolo_gradstab.coco.images import Stamps, find_images, image_file, stamp_images
from yolo_gradstab.coco.labels import FlatLabels
from yolo_gradstab.runs import replacing

__all__ = ["Cached", "LabelCache", "PreparedSet", "Seen"]

SETTLING_NS = 2_000_000_000  # the coarsest time stamps in use, those of FAT; ext4's are 4 ms

_MAGIC = b"yolo-gradstab coco labels\n"
_BLOCK_HEAD = struct.Struct("<QI")  # bytes, and their CRC-32, as zip has it: against damage, not against forgery

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
T = TypeVar("T")


class Seen(NamedTuple):
    """An image file that was in order, and the size in pixels that it was compared with."""

    num_bytes: int
    mtime_ns: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class PreparedSet:
    """All that training takes from a COCO file."""

    labels: FlatLabels
    report: CheckReport
    first: CocoImage
    """In the order of the JSON"""
    categories: list[CocoCategory]
    kpt_shape: list[int] | None
    """Points, and x, y, visibility; None unless the task is pose"""
    stamps: Stamps
    """(images, 2) of the image files, taken before they are looked at"""


@dataclass(frozen=True, slots=True)
class Cached:
    """What a cache gave: the set or, in words, why not; and which images were in order."""

    prepared: PreparedSet | None = None
    unchanged: Mask | None = None
    """(images,) those of the set that need no second look"""
    seen: dict[str, Seen] = field(default_factory=dict)
    """By file, where there is no set"""
    refused: str = ""
    """Why there is no set; empty also where there was no cache"""
    is_current: bool = False
    """Whether writing it again would bring the next start nothing"""

    def in_order(self, prepared: PreparedSet) -> Mask:
        """Tell which images of a set, this one or one made anew, need no second look."""
        if self.unchanged is not None:
            return self.unchanged
        rows = zip(prepared.labels.files, prepared.stamps.tolist(), prepared.labels.images, strict=True)
        seen = self.seen.get
        return np.array([seen(file) == (*stamp, image.width, image.height) for file, stamp, image in rows], np.bool_)


class _FileState(msgspec.Struct, frozen=True, array_like=True):
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    maker: str
    json: _FileState
    was_settled: bool
    """Whether a further change would have shown in the times"""
    content: bytes
    first: CocoImage
    categories: list[CocoCategory]


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    folders: list[str]
    report: CheckReport
    kpt_shape: list[int] | None
    row_values: int
    images: list[CocoImage]


class _DamagedError(Exception):
    pass


class LabelCache:
    """The cache of one COCO file for one task.

    Args:
        json_file: The COCO file. Make this object before reading it, so that a change meanwhile shows.
        task: One of `labels.TASKS`.
    """

    def __init__(self, json_file: str | Path, task: str) -> None:
        self.json_file = Path(json_file)
        self.path = self.json_file.with_suffix(f".{task}.gradstab.cache")
        self._maker = f"{task} {_code()}"
        self._state = _state(self.json_file)
        self._is_settled = time.time_ns() - max(self._state.mtime_ns, self._state.ctime_ns) > SETTLING_NS
        self._content: bytes | None = None

    def listing(self) -> tuple[list[CocoImage], list[CocoCategory]] | None:
        """Return the first image and all categories, or None if the JSON must be read to know them."""
        try:
            with self.path.open("rb") as file:
                header = _read_header(file)
        except (OSError, _DamagedError):
            return None
        return ([header.first], header.categories) if self._is_of(header) else None

    def load(self, folders: Sequence[Path]) -> Cached:
        """Read the cache. Whatever is in the file, this does not raise."""
        if not self.json_file.is_file():
            return Cached()
        try:
            if not self._is_settled:
                self._content = _content(self.json_file)
            if not self.path.exists():
                return Cached()
            with self.path.open("rb") as file:
                header = _read_header(file)
                if header.maker != self._maker:
                    return Cached(refused="was made by another version or for another task")
                body, labels, stamps = _read_body(file, folders)
            return self._judged(header, body, labels, stamps, folders)
        except OSError as error:
            return Cached(refused=f"cannot be read ({error.strerror or error})")
        except _DamagedError:
            return Cached(refused="is damaged, or not ours")

    def save(self, prepared: PreparedSet, folders: Sequence[Path], in_order: Mask) -> str:
        """Write the cache.

        Args:
            prepared: As made from the JSON, before anything is applied to its labels.
            folders: The image folders.
            in_order: (images,) those that the next start need not look at.

        Returns:
            Why it could not be written; empty if it was.
        """
        labels = prepared.labels
        try:
            if not stat.S_IMODE(self.path.parent.stat().st_mode) & 0o222:  # root could, and should not
                return "the folder is read-only"
            content = self._content if self._content and self._is_settled else _content(self.json_file)
            if _state(self.json_file) != self._state or self._content not in {None, content}:
                return "the JSON was changed while it was read"
            header = _Header(
                maker=self._maker,
                json=self._state,
                was_settled=self._is_settled,
                content=content,
                first=prepared.first,
                categories=prepared.categories,
            )
            body = _Body(
                folders=[str(folder) for folder in folders],
                report=prepared.report,
                kpt_shape=prepared.kpt_shape,
                row_values=labels.rows.shape[1],
                images=labels.images,
            )
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                file.write(_MAGIC)
                for part in (header, body):
                    _write_block(file, msgspec.msgpack.encode(part))
                stamps = np.where(in_order[:, None], prepared.stamps, -1)
                for array in (stamps, labels.bounds, labels.rows, labels.points, labels.point_bounds):
                    _write_block(file, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        except OSError as error:
            return str(error.strerror or error)
        return ""

    def _is_of(self, header: _Header) -> bool:
        return (header.maker, header.json, header.was_settled) == (self._maker, self._state, True)

    def _judged(
        self, header: _Header, body: _Body, labels: FlatLabels, stamps: Stamps, folders: Sequence[Path]
    ) -> Cached:
        are_here = body.folders == [str(folder) for folder in folders]
        is_known = self._is_of(header)
        self._content = self._content or (header.content if is_known else _content(self.json_file))
        stamps_now = stamp_images(labels.files)
        refused = ""
        if self._content != header.content:
            refused = "is of another content of the JSON"
        elif (stamps_now[:, 0] < 0).any():
            refused = "has images that are gone"
        elif labels.files != sorted(labels.files):
            refused = "has the images in other folders"
        if refused:
            rows = zip(labels.files, stamps.tolist(), labels.images, strict=True)
            seen = {file: Seen(size, mtime, i.width, i.height) for file, (size, mtime), i in rows if size >= 0}
            return Cached(seen=seen if are_here else {}, refused=refused)
        report = msgspec.structs.replace(body.report, coco=str(self.json_file))
        return Cached(
            prepared=PreparedSet(labels, report, header.first, header.categories, body.kpt_shape, stamps_now),
            unchanged=(stamps == stamps_now).all(1) & are_here,
            is_current=is_known or not self._is_settled,
        )


@cache
def _code() -> str:
    """Name the code that labels and verdicts on images come from: no number that someone must remember to raise."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return f"{digest.hexdigest()} numpy {np.__version__} cv2 {cv2.__version__} PIL {PIL.__version__} {sys.byteorder}"


def _state(path: Path) -> _FileState:
    try:
        found = path.stat()
    except OSError:
        return _FileState(-1, 0, 0, 0)  # whoever reads the file says so
    return _FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _write_block(file: BufferedWriter, data: bytes | memoryview) -> None:
    file.write(_BLOCK_HEAD.pack(len(data), zlib.crc32(data)))
    file.write(data)


def _read_block(file: BufferedReader) -> Bytes:
    """Return the next block; writable, since the host writes into the labels (`single_cls`)."""
    try:
        length, checksum = _BLOCK_HEAD.unpack(file.read(_BLOCK_HEAD.size))
    except struct.error:
        raise _DamagedError from None
    if length > os.fstat(file.fileno()).st_size:  # not to ask for the memory
        raise _DamagedError
    block = np.empty(length, np.uint8)
    if file.readinto(block.data) != length or zlib.crc32(block.data) != checksum:
        raise _DamagedError
    return block


def _read_struct(file: BufferedReader, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(_read_block(file).data, type=kind)
    except (msgspec.MsgspecError, ValueError):
        raise _DamagedError from None


def _read_array(file: BufferedReader, kind: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        return _read_block(file).view(kind).reshape(shape)
    except ValueError:
        raise _DamagedError from None


def _read_header(file: BufferedReader) -> _Header:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise _DamagedError
    return _read_struct(file, _Header)


def _read_body(file: BufferedReader, folders: Sequence[Path]) -> tuple[_Body, FlatLabels, Stamps]:
    body = _read_struct(file, _Body)
    num_images = len(body.images)
    stamps = _read_array(file, np.int64, (num_images, 2))
    bounds = _read_array(file, np.int64, (num_images + 1,))
    rows = _read_array(file, np.float32, (int(bounds[-1]), body.row_values))
    points = _read_array(file, np.float32, (-1, 2))
    point_bounds = _read_array(file, np.int64, (-1,))
    if file.read(1):
        raise _DamagedError
    files = _files(body.images, folders)
    return body, FlatLabels(body.images, files, bounds, rows, points, point_bounds), stamps


def _files(images: Sequence[CocoImage], folders: Sequence[Path]) -> list[str]:
    """Return the file of each image; with several folders, one has to look where it is now."""
    if len(folders) == 1:
        root = str(folders[0])
        return [image_file(root, image.file_name) for image in images]
    found = find_images(images, folders)
    return [found.get(image.id, "") for image in images]
