"""How fast, and in how much memory, a COCO file as large as train2017 is read and checked: `make bench-coco`.

In tests/ it is `python -m coco.bench_reading`, with

    out=DIR         keep the set there (600 MB), and use it again
    rounds=5        pairs of readings
    size=1.0        share of train2017's 118,287 images and 860,001 annotations

The file is synthetic and the same every time; its outlines have as many numbers as COCO's. `detect` and `segment` are
what `data check` does apart from the image files: read, check, make the labels, account for what is unused. Against
them stands `pycocotools.coco.COCO(file)`, which reads and indexes. A *start* is all that training does before it has
its labels: the data YAML, the JSON, the images, and labels in the host's form. The first one decodes every image (JPEGs
of COCO's size, 118,287 names of a few files, so read from memory); the second one finds the cache. First starts are
made once, and not where `out` has their cache already; all else in each round.

Each reading is a process of its own, in turn; ratios are of processor time, of all threads, and of memory, which is the
peak over what the imports took. They are ours by pycocotools', with the 95 % interval of their median.
"""

from __future__ import annotations

import contextlib
import io
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

NUM_IMAGES, NUM_ANNOTATIONS, NUM_CATEGORIES = 118_287, 860_001, 80
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
CROWD_EVERY = 86
# Numbers in an outline of COCO's val2017: median 32, mean 43; 8 % of the objects have a second part.
MEDIAN_POINTS, LOG_DEVIATION = 16, 0.77
TWO_PARTS_EVERY = 12


def write_set(path: Path, *, size: float = 1.0, seed: int = 0) -> None:
    """Write a COCO file of train2017's make; the same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    num_annotations = max(1, round(size * NUM_ANNOTATIONS))
    sizes = _sizes(rng, size)
    categories = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in range(1, NUM_CATEGORIES + 1)]
    with path.open("wb") as file:
        file.write(b'{"info":{"description":"synthetic"},"licenses":[],"images":[')
        _write_all(file, (_image(number, *SIZES[which]) for number, which in enumerate(sizes, start=1)))
        file.write(b'],"annotations":[')
        _write_all(file, _annotations(rng, sizes, num_annotations))
        file.write(b'],"categories":' + msgspec.json.encode(categories) + b"}")


def _sizes(rng: np.random.Generator, size: float) -> list[int]:
    """Return which of `SIZES` each image has: the first numbers that are drawn."""
    return rng.integers(len(SIZES), size=max(1, round(size * NUM_IMAGES))).tolist()


def _write_all(file: io.BufferedWriter, records: Iterator[dict[str, Any]]) -> None:
    for number, record in enumerate(records):
        file.write((b"," if number else b"") + msgspec.json.encode(record))


def _image(number: int, width: int, height: int) -> dict[str, Any]:
    name = f"{number:012d}.jpg"
    return {
        "license": 3,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/train2017/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": f"http://farm9.staticflickr.com/8186/{number:010d}_4e622c8349_z.jpg",
        "id": number,
    }


def _annotations(rng: np.random.Generator, sizes: list[int], num: int) -> Iterator[dict[str, Any]]:
    owners = rng.integers(len(sizes), size=num).tolist()
    categories = rng.integers(1, NUM_CATEGORIES + 1, num).tolist()
    num_points = np.clip(rng.lognormal(np.log(MEDIAN_POINTS), LOG_DEVIATION, num), 4, 600).astype(int).tolist()
    places = rng.random((num, 4))
    circles: dict[int, np.ndarray] = {}
    for index in range(num):
        width, height = SIZES[sizes[owners[index]]]
        extent = 8 + places[index, 2:] * (np.array([width, height]) / 2 - 8)
        corner = places[index, :2] * (np.array([width, height]) - extent)
        points = num_points[index]
        if points not in circles:
            angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
            circles[points] = 0.5 + np.stack([np.cos(angles), np.sin(angles)], axis=1) / 2
        outline = (corner + extent * circles[points]).round(2).ravel().tolist()
        crowd = index % CROWD_EVERY == 0
        parts = [outline, outline[:6]] if index % TWO_PARTS_EVERY == 0 else [outline]
        runs = [int(width * height) // 50] * 49
        yield {
            "segmentation": {"counts": [*runs, width * height - sum(runs)], "size": [height, width]}
            if crowd
            else parts,
            "area": round(float(extent.prod()) * 0.78, 4),
            "iscrowd": int(crowd),
            "image_id": owners[index] + 1,
            "bbox": [round(value, 2) for value in [*corner.tolist(), *extent.tolist()]],
            "category_id": categories[index],
            "id": index + 1,
        }


def write_start(path: Path, *, size: float) -> None:
    """Write what a start needs beside the JSON: the images, a small set to validate on, and the data YAML."""
    images, val = path.with_suffix(""), path.with_suffix(".val.json")
    yaml_text = f"train: {path.name}\nval: {val.name}\nimages: {images.name}\n"
    path.with_suffix(".yaml").write_text(yaml_text, encoding="utf-8")
    write_set(val, size=1e-3)
    if images.is_dir():
        return
    images.mkdir()
    rng = np.random.default_rng(0)
    # Not from the JSON: a child's peak of memory begins with what this process holds.
    for index, which in enumerate(_sizes(np.random.default_rng(0), size)):
        width, height = SIZES[which]
        # A file of its own for every so many: a file system allows only so many names for one.
        source = images.parent / f"{path.stem}-{width}x{height}-{index // 50_000}.jpg"
        if not source.is_file():
            coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
            noisy = np.clip(pixels + rng.integers(-12, 12, pixels.shape), 0, 255).astype(np.uint8)
            source.write_bytes(cv2.imencode(".jpg", noisy)[1].tobytes())
        (images / f"{index + 1:012d}.jpg").hardlink_to(source)


def ours(task: str) -> Callable[[str], int]:
    """Everything `data check` does apart from the image files, all of which are taken as found."""
    from yolo_gradstab.coco.annotations import read_coco
    from yolo_gradstab.coco.check import make_report
    from yolo_gradstab.coco.labels import make_labels

    def check(path: str) -> int:
        coco = read_coco(path, segments=task == "segment")
        labels = make_labels(coco, {image.id: f"/images/{image.file_name}" for image in coco.images}, task=task)
        return make_report(coco, labels).annotations

    return check


def theirs() -> Callable[[str], int]:
    """pycocotools, which reads and indexes."""
    from pycocotools.coco import COCO

    def read(path: str) -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            return len(COCO(path).anns)

    return read


def start(task: str, *, first: bool) -> Callable[[str], int]:
    """All that training does before it has its labels; the first time, or with what that has left."""
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import DEFAULT_CFG, LOGGER

    from yolo_gradstab.coco import dataset
    from yolo_gradstab.coco.cache import LabelCache

    class LabelsReadError(Exception):
        pass

    class UpToLabels(dataset.CocoDataset):
        def update_labels(self, include_class: list[int] | None) -> None:  # what follows is the host's own
            raise LabelsReadError(self.coco_report.annotations)

    LOGGER.setLevel("ERROR")
    dataset.CocoDataset = UpToLabels
    arguments = get_cfg(DEFAULT_CFG, {"task": task})

    def read(path: str) -> int:
        cache = LabelCache(path, task)
        if first:
            cache.path.unlink(missing_ok=True)
        assert bool(cache.listing()) is not first, f"{cache.path} is of other code or data; remove it"
        data = dataset.read_data_yaml(Path(path).with_suffix(".yaml"), task)
        try:
            dataset.build_coco_dataset(arguments, data["train"], 16, data)
        except LabelsReadError as done:
            return int(done.args[0])
        raise AssertionError("the labels were not read")

    return read


READERS = {
    "pycocotools": theirs,
    "detect": lambda: ours("detect"),
    "segment": lambda: ours("segment"),
    "detect, first start": lambda: start("detect", first=True),
    "segment, first start": lambda: start("segment", first=True),
    "detect, second start": lambda: start("detect", first=False),
    "segment, second start": lambda: start("segment", first=False),
}


def measure(reader: str, path: str) -> dict[str, float]:
    """Read once, in this process; seconds, and MiB at the peak over what the imports took."""
    read = READERS[reader]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    annotations = read(path)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": processor, "wall": wall, "mib": (peak - before) / 2**10, "annotations": annotations}


def measured(reader: str, path: Path) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "coco.bench_reading", f"measure={reader}", f"file={path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(msgspec.json.decode(done.stdout.splitlines()[-1]))


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval from order statistics; with few values that is all of them."""
    values, middle, margin = sorted(values), len(values) // 2, round(0.98 * len(values) ** 0.5)
    return statistics.median(values), values[max(0, middle - margin)], values[min(len(values) - 1, middle + margin)]


def compare(path: Path, *, rounds: int) -> None:
    """Print seconds, MiB and the ratios of every reader against pycocotools."""
    every_round = [name for name in READERS if "first" not in name]
    cached = {name for name in READERS if path.with_suffix(f".{name.partition(',')[0]}.gradstab.cache").exists()}
    once = [name for name in READERS if name not in every_round and name not in cached]
    found = {name: [measured(name, path)] if name in once else [] for name in READERS}
    for index in range(rounds):
        for name in every_round if index % 2 else reversed(every_round):
            found[name].append(measured(name, path))
    print(f"{'':22} {'seconds':>8} {'by clock':>8} {'MiB':>6}   time, and memory, by pycocotools'")
    for name, own in filter(itemgetter(1), found.items()):
        seconds, wall, mib = (
            statistics.median(reading[what] for reading in own) for what in ("seconds", "wall", "mib")
        )
        line = f"{name:22} {seconds:8.2f} {wall:8.2f} {mib:6.0f}"
        for what in ("seconds", "mib"):
            ratios = [mine[what] / other[what] for mine, other in zip(own, found["pycocotools"], strict=False)]
            line += "   {:.3f} [{:.3f}, {:.3f}]".format(*median_interval(ratios))
        print(line, flush=True)


def main(arguments: list[str]) -> None:
    """Run what the module says above."""
    options = {"rounds": "5", "size": "1.0", **dict(argument.split("=", 1) for argument in arguments)}
    if "measure" in options:
        print(msgspec.json.encode(measure(options["measure"], options["file"])).decode())
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.get("out", temporary))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"instances_{options['size']}.json"
        if not path.is_file():
            write_set(path, size=float(options["size"]))
        write_start(path, size=float(options["size"]))
        print(f"{path.stat().st_size / 1e6:.0f} MB", flush=True)
        compare(path, rounds=int(options["rounds"]))


if __name__ == "__main__":
    main(sys.argv[1:])
