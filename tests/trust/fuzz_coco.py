"""COCO files at random: each must be taken, with labels that are in order, or refused with one line.

    cd tests && python -m trust.fuzz_coco [inputs=100000] [seed=0] [guided=true]

An input is a string of bytes that decides how a valid file is changed: values of any kind in any place, parts left
out, repeated or swapped, records that point nowhere, numbers at the edge, bytes cut off. With atheris the bytes are
guided by what they reach in our code (libFuzzer); without it they are drawn from a seeded generator.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TASKS = ("detect", "pose", "segment")
MOST_SECONDS = 10.0  # of one input, before it is said to hang
MOST_BYTES = 4 * 2**30  # of memory, above which an allocation fails

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", "1", "0.5", "a.png", "../a.png", "/etc/passwd", "C:\\a.png", "a\x00.png",
    "sub/../../a.png", "é.png", "\ud800", "x" * 300, [], {}, [[]], [None], {"a": 1}, [1, 2], [0, 0, 0, 0], [1] * 500,
    [math.nan] * 4, [1e308] * 4, [[1, 2, 3, 4, 5, 6]], {"counts": "0", "size": [8, 8]},
    {"counts": [2**40], "size": [2**31, 2**31]}, {"counts": "PPYo1", "size": [80, 100]},
    {"counts": [5, 3], "size": [2, 4]},
)  # fmt: skip


class Choices:
    """Decisions read from bytes, as a coverage-guided fuzzer needs them; past the end all are the first."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def below(self, count: int) -> int:
        """A whole number from 0 to below `count`."""
        size = 1 if count <= 256 else 4
        taken = self.data[self.position : self.position + size]
        self.position += size
        return int.from_bytes(taken, "little") % count

    def one_of(self, values: Any) -> Any:
        return values[self.below(len(values))]


def valid_files() -> list[dict[str, Any]]:
    """What is changed: boxes, key points, outlines and run lengths."""
    images = [
        {"id": i, "file_name": name, "width": 40, "height": 32}
        for i, name in enumerate(("a.png", "b.png", "sub/c.png", "grey.png", "missing.png"))
    ]
    box = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [4, 5, 20, 10], "iscrowd": 0, "area": 200.0}
    points = box | {"id": 2, "image_id": 1, "keypoints": [5, 6, 2, 9, 9, 1, 0, 0, 0], "num_keypoints": 2}
    outline = box | {"id": 3, "segmentation": [[4, 5, 24, 5, 24, 15], [1, 1, 3, 1, 3, 3]]}
    lengths = box | {
        "id": 4,
        "image_id": 2,
        "iscrowd": 1,
        "segmentation": {"counts": [100, 60, 1120], "size": [32, 40]},
    }
    person = {"id": 3, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2]]}
    other = {"id": 9, "name": "other"}
    return [
        {"images": images, "annotations": [box, outline, lengths], "categories": [{"id": 3, "name": "a"}, other]},
        {"images": images, "annotations": [points, points | {"id": 5, "image_id": 0}], "categories": [person]},
        {"info": {}, "licenses": [], "images": images[:1], "annotations": [box], "categories": [other | {"id": 3}]},
    ]


def changed(choose: Choices, files: list[dict[str, Any]]) -> bytes:
    """A file, some places in it changed, perhaps damaged as bytes."""
    content = copy.deepcopy(choose.one_of(files))
    for _ in range(choose.below(4)):
        change(choose, content)
    # Python writes NaN and surrogates as JSON has none: the reader must say so.
    text = json.dumps(content, ensure_ascii=bool(choose.below(2))).encode("utf-8", "surrogatepass")
    damage = choose.below(12)
    if damage == 1:
        return text[: choose.below(len(text) + 1)]
    if damage == 2:
        place = choose.below(len(text))
        return text[:place] + bytes([choose.below(256)]) + text[place + 1 :]
    if damage == 3:
        return b"\xef\xbb\xbf" + text
    if damage == 4:
        return text.decode("utf-8", "replace").encode("utf-16")
    return text


def change(choose: Choices, content: Any) -> None:
    """One change at a random place."""
    holder, key = content, choose.one_of(sorted(content)) if content else None
    while key is not None and choose.below(8) and isinstance(holder[key], dict | list) and holder[key]:
        holder = holder[key]
        key = choose.one_of(sorted(holder, key=str)) if isinstance(holder, dict) else choose.below(len(holder))
    if key is None:
        return
    kind = choose.below(10)
    if kind == 9:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[choose.below(len(holder))]))
    elif kind == 2 and isinstance(holder, dict):
        holder[choose.one_of(sorted(holder, key=str))] = copy.deepcopy(holder[key])
    elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        with contextlib.suppress(OverflowError):
            holder[key] = holder[key] * choose.one_of((-1, 0.5, 10, 1000, 1e300))
    elif kind == 4 and isinstance(holder[key], list):
        holder[key] = holder[key] * choose.one_of((0, 2, 3))
    elif kind == 5:
        holder[key] = str(holder[key])
    elif kind > 5:
        holder[key] = copy.deepcopy(choose.one_of(STRANGE))


class Fuzz:
    """Runs inputs and counts what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        (self.images / "sub").mkdir(parents=True)
        for name in ("a.png", "b.png", "sub/c.png"):
            Image.fromarray(np.full((32, 40, 3), 90, np.uint8)).save(self.images / name)
        Image.fromarray(np.full((32, 40), 90, np.uint8)).save(self.images / "grey.png")
        self.files = valid_files()
        self.accepted = self.refused = 0
        self.slowest_s = 0.0

    def run(self, data: bytes) -> None:
        """One input, for one task.

        Raises:
            AssertionError: Labels that are out of order, or a refusal that is not one line.
        """
        from yolo_gradstab.coco import CocoError, check_coco

        choose = Choices(data)
        task = choose.one_of(TASKS)
        path = self.folder / "fuzzed.json"
        path.write_bytes(changed(choose, self.files))
        started_s = time.monotonic()
        try:
            report = check_coco(path, images=self.images, task=task)
        except CocoError as error:
            assert len(str(error).splitlines()) == 1, f"not one line: {error!r}"
            assert str(error).strip(), "refused without a word"
            self.refused += 1
        else:
            self.in_order(path, report, task)
            self.accepted += 1
        spent_s = time.monotonic() - started_s
        self.slowest_s = max(self.slowest_s, spent_s)
        assert spent_s < MOST_SECONDS, f"took {spent_s:.1f} s"

    def in_order(self, path: Path, report: Any, task: str) -> None:
        """What is accepted adds up, agrees with a plain reading of the file, and is in range."""
        from yolo_gradstab.coco.annotations import read_coco
        from yolo_gradstab.coco.images import find_images
        from yolo_gradstab.coco.labels import make_labels

        # A broken byte in a field that is not read is none of the reader's business.
        plain = json.loads(path.read_bytes().decode("utf-8-sig", "replace"))
        assert report.images == len(plain["images"])
        assert report.annotations == len(plain["annotations"]) == report.used + sum(report.unused.values())
        coco = read_coco(path, segments=task == "segment")
        labels = make_labels(coco, find_images(coco.images, [self.images]), task=task)
        assert sum(len(image.classes) for image in labels.images) == report.used
        for image in labels.images:
            boxes = np.asarray(image.boxes)
            assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 1).all(), "a box is out of range"
            assert (boxes[:, 2:] > 0).all(), "a box has no size"
            assert (image.classes >= 0).all() and (image.classes < len(plain["categories"])).all(), "no such class"
            if task == "pose" and image.keypoints is not None and len(image.keypoints):
                points = np.asarray(image.keypoints)
                assert np.isfinite(points).all(), "a key point is not finite"
                assert (points[..., :2] >= 0).all() and (points[..., :2] <= 1).all(), "a key point is out of range"
            for outline in image.segments:
                assert np.isfinite(outline).all(), "an outline is not finite"


def fuzz(folder: Path, *, inputs: int, seed: int) -> Fuzz:
    """So many inputs from a seeded generator; the first that fails is raised, with its bytes."""
    random_ = random.Random(seed)
    tried = Fuzz(folder)
    for _ in range(inputs):
        data = random_.randbytes(random_.choice((4, 16, 40)))
        try:
            tried.run(data)
        except Exception as error:
            raise AssertionError(f"input {data.hex()}: {type(error).__name__}: {error}") from error
    return tried


def main() -> int:
    """Fuzz in this process; libFuzzer, where it is used, ends the process itself."""
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    inputs, seed = int(given.get("inputs", 100_000)), int(given.get("seed", 0))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        if given.get("guided", "false") == "true":
            return guided(Path(folder), inputs=inputs, seed=seed)
        tried = fuzz(Path(folder) / "set", inputs=inputs, seed=seed)
    say(tried)
    return 0


def guided(folder: Path, *, inputs: int, seed: int) -> int:
    """By coverage of our reader."""
    import atheris

    with atheris.instrument_imports(include=["yolo_gradstab.coco"]):
        import yolo_gradstab.coco.check
        import yolo_gradstab.coco.segments  # noqa: F401
    tried = Fuzz(folder / "set")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(200):
        (corpus / str(i)).write_bytes(random.Random(seed + i).randbytes(40))
    words = [sys.argv[0], f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=200", "-print_final_stats=1", str(corpus)]

    def one(data: bytes) -> None:
        tried.run(data)
        if tried.accepted + tried.refused == inputs:
            say(tried)
            sys.stdout.flush()

    atheris.Setup(words, one)
    atheris.Fuzz()
    return 0


def say(tried: Fuzz) -> None:
    """The row of the table."""
    count = tried.accepted + tried.refused
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{count} inputs: {tried.accepted} taken with labels in order, {tried.refused} refused in one line, 0 crashes; "
        f"slowest {tried.slowest_s:.2f} s, peak memory {peak:.0f} MiB"
    )


if __name__ == "__main__":
    os.environ.setdefault("YOLO_OFFLINE", "true")
    sys.exit(main())
