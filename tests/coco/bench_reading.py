"""How fast, and in how much memory, a COCO file as large as train2017 is read and checked: `make bench-coco`.

In tests/ it is `python -m coco.bench_reading`, with

    out=DIR         keep the set there (450 MB), and use it again
    rounds=5        pairs of readings
    size=1.0        share of train2017's 118,287 images and 860,001 annotations

The file is synthetic and the same every time; its outlines have as many numbers as COCO's. Ours is what `data check`
does apart from the image files: read, check, make the labels, account for what is unused. Against it stands
`pycocotools.coco.COCO(file)`, which reads and indexes. Each reading is a process of its own, in turn; seconds are of
processor time (both use one core), memory is the peak over what the imports took. Ratios are ours by pycocotools', with
the 95 % interval of their median.
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
from pathlib import Path
from typing import Any

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
    num_images, num_annotations = max(1, round(size * NUM_IMAGES)), max(1, round(size * NUM_ANNOTATIONS))
    sizes = rng.integers(len(SIZES), size=num_images).tolist()
    categories = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in range(1, NUM_CATEGORIES + 1)]
    with path.open("wb") as file:
        file.write(b'{"info":{"description":"synthetic"},"licenses":[],"images":[')
        _write_all(file, (_image(number, *SIZES[which]) for number, which in enumerate(sizes, start=1)))
        file.write(b'],"annotations":[')
        _write_all(file, _annotations(rng, sizes, num_annotations))
        file.write(b'],"categories":' + msgspec.json.encode(categories) + b"}")


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


READERS = {"pycocotools": theirs, "detect": lambda: ours("detect"), "segment": lambda: ours("segment")}


def measure(reader: str, path: str) -> dict[str, float]:
    """Read once, in this process; seconds, and MiB at the peak over what the imports took."""
    read = READERS[reader]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    annotations = read(path)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / 2**10, "annotations": annotations}


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
    found: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
    for index in range(rounds):
        for name in READERS if index % 2 else reversed(READERS):
            found[name].append(measured(name, path))
    print(f"{'':12} {'seconds':>8} {'MiB':>7}   time, and memory, by pycocotools'")
    for name, own in found.items():
        seconds, mib = (statistics.median(reading[what] for reading in own) for what in ("seconds", "mib"))
        line = f"{name:12} {seconds:8.2f} {mib:7.0f}"
        for what in ("seconds", "mib"):
            ratios = [mine[what] / other[what] for mine, other in zip(own, found["pycocotools"], strict=True)]
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
        print(f"{path.stat().st_size / 1e6:.0f} MB", flush=True)
        compare(path, rounds=int(options["rounds"]))


if __name__ == "__main__":
    main(sys.argv[1:])
