"""What COCO files in the world are like: each oddity is taken and right, or refused in one line that names the record.

    cd tests && python -m trust.quirks

A quirk is a small set that is in order but for one thing. Where it is taken, what is used and what is not is counted by
hand, and what pycocotools counts in the same file must be the same.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
POINTS = ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
Coco = dict[str, Any]


@dataclass(frozen=True)
class Quirk:
    """An oddity, and what is to become of it."""

    name: str
    change: Callable[[Coco, Path], Any]
    """Changes the file's content or the images in the folder in place; or returns the bytes of the file itself."""
    task: str = "detect"
    used: int = 2
    unused: dict[str, int] = field(default_factory=dict)
    """Annotations that are not used, by reason."""
    refused: tuple[str, ...] = ()
    """Parts of the one line with which it is refused; taken where there is none."""


def a_set(folder: Path, *, task: str) -> Coco:
    """Two images and two annotations, in order; the images are drawn into the folder."""
    names = ("a.png", "b.jpg")
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        (folder / name).write_bytes(cv2.imencode(Path(name).suffix, pixels)[1].tobytes())
    images = [{"id": i + 1, "file_name": n, "width": WIDTH, "height": HEIGHT} for i, n in enumerate(names)]
    one: Coco = {"category_id": 1, "iscrowd": 0, "area": 200.0}
    annotations = [
        one | {"id": 11, "image_id": 1, "bbox": [4, 5, 20, 10], "segmentation": [[4, 5, 24, 5, 24, 15, 4, 15]]},
        one | {"id": 12, "image_id": 2, "bbox": [30, 20, 10, 20], "segmentation": [[30, 20, 40, 20, 40, 40, 30, 40]]},
    ]
    category: Coco = {"id": 1, "name": "thing", "supercategory": "all"}
    if task == "pose":
        category |= {"keypoints": list(POINTS), "skeleton": [[1, 2]]}
        for annotation in annotations:
            x, y = annotation["bbox"][:2]
            annotation |= {"keypoints": [x + 1, y + 1, 2, x + 3, y + 2, 1, *[0] * 9], "num_keypoints": 2}
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": [category]}


# How a set is changed ------------------------------------------------------------------------------------------------


def image(number: int = 0, **values: Any) -> Callable[[Coco, Path], None]:
    return lambda coco, folder: coco["images"][number].update(values)


def annotation(number: int = 0, **values: Any) -> Callable[[Coco, Path], None]:
    return lambda coco, folder: coco["annotations"][number].update(values)


def without(part: str, *keys: str) -> Callable[[Coco, Path], None]:
    def change(coco: Coco, folder: Path) -> None:
        for record in coco[part]:
            for key in keys:
                record.pop(key, None)

    return change


def categories(*ids: int, of: tuple[int, int]) -> Callable[[Coco, Path], None]:
    def change(coco: Coco, folder: Path) -> None:
        coco["categories"] = [{"id": i, "name": f"name {i}"} for i in ids]
        for record, category_id in zip(coco["annotations"], of, strict=True):
            record["category_id"] = category_id

    return change


def people(points: int) -> Callable[[Coco, Path], None]:
    """Key points of another number, as faces, hands, animals and garments have them."""

    def change(coco: Coco, folder: Path) -> None:
        coco["categories"][0]["keypoints"] = [f"point {i}" for i in range(points)]
        for record in coco["annotations"]:
            record["keypoints"] = [record["bbox"][0] + 1, record["bbox"][1] + 1, 2] * points
            record["num_keypoints"] = points

    return change


def moved(name: str) -> Callable[[Coco, Path], None]:
    """The first image under another name, in the JSON and on disk."""

    def change(coco: Coco, folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (folder / "a.png").rename(file)
        coco["images"][0]["file_name"] = name

    return change


def picture(
    kind: str, suffix: str, size: tuple[int, int] = (WIDTH, HEIGHT), **how: Any
) -> Callable[[Coco, Path], None]:
    """The first image as a picture of another kind."""

    def change(coco: Coco, folder: Path) -> None:
        (folder / "a.png").unlink()
        coco["images"][0].update(file_name=f"a{suffix}", width=size[0], height=size[1])
        Image.new(kind, size).save(folder / f"a{suffix}", **how)

    return change


def turned(*, said: tuple[int, int]) -> Callable[[Coco, Path], None]:
    """A camera's image, stored on its side; the JSON says the one size or the other."""

    def change(coco: Coco, folder: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "b.jpg", exif=exif)
        coco["images"][1].update(width=said[0], height=said[1])

    return change


def mislabelled(coco: Coco, folder: Path) -> None:
    (folder / "b.jpg").write_bytes((folder / "a.png").read_bytes())


def truncated(coco: Coco, folder: Path) -> None:
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-300])


def a_page(coco: Coco, folder: Path) -> None:
    (folder / "b.jpg").write_text("<html>404 Not Found</html>")


def empty_file(coco: Coco, folder: Path) -> None:
    (folder / "b.jpg").write_bytes(b"")


def linked(coco: Coco, folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "a.png").rename(folder / "real" / "a.png")
    (folder / "a.png").symlink_to(folder / "real" / "a.png")


def dangling(coco: Coco, folder: Path) -> None:
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(folder / "nowhere.png")


def missing_image(coco: Coco, folder: Path) -> None:
    (folder / "a.png").unlink()


def latin_name_on_disk(coco: Coco, folder: Path) -> None:
    """Named by a system of another encoding; JSON can only say it with a character that stands for the byte."""
    (folder / "a.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    coco["images"][0]["file_name"] = "café.png"


def twice(part: str, **changes: Any) -> Callable[[Coco, Path], None]:
    def change(coco: Coco, folder: Path) -> None:
        coco[part].append(coco[part][0] | changes)

    return change


def emptied(part: str) -> Callable[[Coco, Path], None]:
    return lambda coco, folder: coco[part].clear()


def file(encode: Callable[[str], bytes]) -> Callable[[Coco, Path], bytes]:
    return lambda coco, folder: encode(json.dumps(coco))


def background(coco: Coco, folder: Path) -> None:
    coco["annotations"].pop()


# What is tried -------------------------------------------------------------------------------------------------------

UNCOMPRESSED = {"counts": [100, 60, WIDTH * HEIGHT - 160], "size": [HEIGHT, WIDTH]}
COMPRESSED = {"counts": "TSc0m1k05000000000000^N", "size": [HEIGHT, WIDTH]}
NESTED = [[5, 6, 2], [7, 7, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]

QUIRKS = (
    # Ids
    Quirk("category ids with holes", categories(1, 13, 90, of=(90, 13))),
    Quirk("category ids from 0", categories(0, 1, of=(0, 1))),
    Quirk("a category id below 0", categories(-1, 1, of=(-1, 1))),
    Quirk("two categories of one name", lambda c, _: c["categories"].append({"id": 2, "name": "thing"})),
    Quirk("a category that no annotation has", lambda c, _: c["categories"].append({"id": 2, "name": "none"})),
    Quirk("categories out of order", categories(9, 2, 5, of=(9, 2))),
    Quirk("a category id used twice", twice("categories"), refused=("category id 1 is used 2 times",)),
    Quirk("annotation id 0", annotation(id=0)),
    Quirk("a huge id", annotation(id=2**63 - 1)),
    Quirk("an id beyond 64 bits", annotation(id=2**64), refused=("annotation 18446744073709551616", "id")),
    Quirk("an annotation id used twice", twice("annotations", image_id=2), refused=("annotation id 11 is used 2",)),
    Quirk("an image id used twice", twice("images", file_name="c.png"), refused=("image id 1 is used 2 times",)),
    Quirk("a file name listed twice", twice("images", id=9), refused=("image 9", "'a.png' is that of image 1 too")),
    Quirk("an annotation of an unlisted image", annotation(image_id=5), refused=("annotation 11", "image_id 5")),
    Quirk("an annotation of an unknown category", annotation(category_id=5), refused=("annotation 11", "category_id")),
    Quirk("an annotation without id", without("annotations", "id"), refused=("annotation", "id")),
    Quirk("the same box twice", twice("annotations", id=13), unused={"duplicate": 1}),
    # What is left out
    Quirk("no `iscrowd`", without("annotations", "iscrowd")),
    Quirk("no `area`", without("annotations", "area")),
    Quirk("no `segmentation`", without("annotations", "segmentation")),
    Quirk("no `num_keypoints`", without("annotations", "num_keypoints"), task="pose"),
    Quirk("no `supercategory`", without("categories", "supercategory")),
    Quirk("no `info` and no `licenses`", lambda c, _: [c.pop("info"), c.pop("licenses")]),
    Quirk("`area` null", annotation(area=None)),
    Quirk("no `bbox`", without("annotations", "bbox"), refused=("annotation 11", "bbox")),
    Quirk("no image `width`", without("images", "width"), refused=("image 1", "width")),
    Quirk("no `annotations`", lambda c, _: c.pop("annotations"), refused=("annotations",)),
    Quirk("no `categories`", lambda c, _: c.pop("categories"), refused=("categories",)),
    Quirk("an empty list of annotations", emptied("annotations"), used=0),
    Quirk("an empty list of images", emptied("images"), refused=("`images` is empty",)),
    Quirk("an empty list of categories", emptied("categories"), refused=("`categories` is empty",)),
    Quirk("an image without annotations", background, used=1),
    # Key points
    *(Quirk(f"{n} key points", people(n), task="pose") for n in (1, 5, 21, 68, 133, 294)),
    Quirk("`num_keypoints` too large", annotation(keypoints=[5, 6, 2, *[0] * 12], num_keypoints=5), task="pose"),
    Quirk("`num_keypoints` 0 beside labelled points", annotation(num_keypoints=0), task="pose", used=1,
          unused={"no_keypoints": 1}),
    Quirk("a person without labelled points", annotation(keypoints=[0] * 15, num_keypoints=0), task="pose", used=1,
          unused={"no_keypoints": 1}),
    Quirk("a point outside the image", annotation(keypoints=[5, 6, 2, WIDTH + 9, 6, 2, *[0] * 9]), task="pose"),
    Quirk("points with fractions", annotation(keypoints=[5.5, 6.25, 2, *[0] * 12]), task="pose"),
    Quirk("nested key points", annotation(keypoints=NESTED), task="pose", refused=("annotation 11", "keypoints")),
    Quirk("key points of two values", annotation(keypoints=[5, 6] * 5), task="pose",
          refused=("annotation 11", "multiple of 3")),
    Quirk("too few key points", annotation(keypoints=[5, 6, 2] * 4), task="pose",
          refused=("annotation 11", "4 points")),
    Quirk("a visibility of 3", annotation(keypoints=[5, 6, 3] * 5), task="pose",
          refused=("annotation 11", "visibility")),
    Quirk("a category without key points beside one with them", task="pose", used=1, unused={"no_keypoints": 1},
          change=lambda c, _: [c["categories"].append({"id": 2, "name": "dog"}),
                               c["annotations"][1].update(category_id=2, keypoints=[], num_keypoints=0)]),
    Quirk("no key points at all", without("categories", "keypoints"), task="pose", refused=("keypoints",)),
    # Outlines
    Quirk("an uncompressed crowd", annotation(iscrowd=1, segmentation=UNCOMPRESSED), used=1, unused={"crowd": 1}),
    Quirk("a compressed crowd", annotation(iscrowd=1, segmentation=COMPRESSED), used=1, unused={"crowd": 1}),
    Quirk("`iscrowd` as true", annotation(iscrowd=True), used=1, unused={"crowd": 1}),
    Quirk("run lengths of one thing", annotation(segmentation=UNCOMPRESSED), task="segment"),
    Quirk("outlines in two parts", task="segment",
          change=annotation(segmentation=[[4, 5, 9, 5, 9, 15], [14, 5, 24, 5, 24, 15]])),
    Quirk("an empty outline", annotation(segmentation=[]), task="segment", used=1, unused={"no_segment": 1}),
    Quirk("an outline of two points", annotation(segmentation=[[4, 5, 24, 15]]), task="segment", used=1,
          unused={"no_segment": 1}),
    Quirk("an outline with half a point", annotation(segmentation=[[4, 5, 24, 5, 24]]), task="segment",
          refused=("annotation 11", "segmentation")),
    Quirk("run lengths that do not fill the image", annotation(segmentation=UNCOMPRESSED | {"counts": [5]}),
          task="segment", refused=("annotation 11", "segmentation")),
    # Boxes
    Quirk("a box without width", annotation(bbox=[4, 5, 0, 10]), used=1, unused={"zero_area": 1}),
    Quirk("a box outside its image", annotation(bbox=[WIDTH + 5, 5, 9, 9]), used=1, unused={"outside": 1}),
    Quirk("a box partly outside", annotation(bbox=[-4, 5, 20, 10])),
    Quirk("a box with fractions", annotation(bbox=[4.25, 5.5, 20.125, 10])),
    Quirk("a box as large as its image", annotation(bbox=[0, 0, WIDTH, HEIGHT])),
    Quirk("a negative width", annotation(bbox=[24, 5, -20, 10]), refused=("annotation 11", "negative")),
    Quirk("a box of five numbers", annotation(bbox=[4, 5, 20, 10, 0.3]), refused=("annotation 11", "bbox")),
    Quirk("an empty box", annotation(bbox=[]), refused=("annotation 11", "bbox")),
    Quirk("a box of null", annotation(bbox=None), refused=("annotation 11", "bbox")),
    Quirk("a box of nested corners", annotation(bbox=[[4, 5], [24, 15]]), refused=("annotation 11", "bbox")),
    Quirk("NaN in a box", annotation(bbox=[float("nan"), 5, 20, 10]), refused=("annotation 11", "bbox", "NaN")),
    Quirk("Infinity in a box", annotation(bbox=[4, 5, float("inf"), 10]), refused=("annotation 11", "bbox")),
    # Numbers
    Quirk("a number as a string in a box", annotation(bbox=["4", 5, 20, 10]), refused=("annotation 11", "bbox")),
    Quirk("an image id as a string", annotation(image_id="1"), refused=("annotation 11", "image_id")),
    Quirk("a category id as a string", annotation(category_id="1"), refused=("annotation 11", "category_id")),
    Quirk("a width as a string", image(width=str(WIDTH)), refused=("image 1", "width")),
    Quirk("ids with a decimal point", annotation(image_id=1.0, category_id=1.0), refused=("annotation 11", "got 1.0")),
    Quirk("a width of 0", image(width=0), refused=("image 1", "width")),
    Quirk("a width with a fraction", image(width=63.5), refused=("image 1", "width")),
    # File names
    Quirk("images in sub-folders", moved("sub/deep/a.png")),
    Quirk("a name with spaces and umlauts", moved("Bild 1 ä.png")),
    Quirk("a suffix in capitals", moved("A.PNG")),
    Quirk("dots in the name", moved("a..b...png")),
    Quirk("./ before the name", moved("./c.png")),
    Quirk("a path that leaves the folder", image(file_name="../a.png"), refused=("image 1", "relative path")),
    Quirk("a path that leaves it further in", image(file_name="sub/../../a.png"), refused=("image 1", "relative path")),
    Quirk("an absolute path", image(file_name="/etc/passwd"), refused=("image 1", "relative path")),
    Quirk("a Windows path", image(file_name="C:\\data\\a.png"), refused=("image 1", "relative path")),
    Quirk("a path of another machine", image(file_name="\\\\host\\a.png"), refused=("image 1", "relative path")),
    Quirk("an empty name", image(file_name=""), refused=("image 1", "relative path")),
    Quirk("an address for a name", image(file_name="http://example.com/a.png"), refused=("image 1",)),
    Quirk("a name with a NUL", image(file_name="a\0.png"), refused=("image 1",)),
    Quirk("a very long name", image(file_name="x" * 300 + ".png"), refused=("image 1",)),
    Quirk("a name that is no UTF-8 on disk", latin_name_on_disk, refused=("image 1", "not found")),
    Quirk("an image that is not there", missing_image, refused=("image 1", "not found")),
    Quirk("a link to an image", linked),
    Quirk("a link to nowhere", dangling, refused=("image 1", "not found")),
    Quirk("a folder where an image should be", refused=("image 1", "not found"),
          change=lambda c, f: [(f / "a.png").unlink(), (f / "a.png").mkdir()]),
    # Images
    Quirk("greyscale", picture("L", ".png")),
    Quirk("greyscale of 16 bits", picture("I;16", ".png")),
    Quirk("black and white", picture("1", ".png")),
    Quirk("a palette", picture("P", ".png")),
    Quirk("transparency", picture("RGBA", ".png")),
    Quirk("CMYK", picture("CMYK", ".jpg")),
    Quirk("TIFF", picture("RGB", ".tif")),
    Quirk("WebP", picture("RGB", ".webp")),
    Quirk("BMP", picture("RGB", ".bmp")),
    Quirk("GIF", picture("P", ".gif"), refused=("image 1", "not of a kind")),
    Quirk("PPM", picture("RGB", ".ppm"), refused=("image 1", "not of a kind")),
    Quirk("an image of one pixel", picture("RGB", ".png", (1, 1)), refused=("image 1", "1x1")),
    Quirk("turned by EXIF, its size said as seen", turned(said=(WIDTH, HEIGHT))),
    Quirk("turned by EXIF, its size said as stored", turned(said=(HEIGHT, WIDTH)), refused=("image 2", "48x64")),
    Quirk("another size than the JSON says", image(width=WIDTH + 1), refused=("image 1", "65x48", "64x48")),
    Quirk("a PNG named .jpg", mislabelled),
    Quirk("a truncated JPEG", truncated, refused=("image 2", "cannot be read")),
    Quirk("an error page saved as an image", a_page, refused=("image 2", "cannot be read")),
    Quirk("an empty image file", empty_file, refused=("image 2", "cannot be read")),
    # The file
    Quirk("a byte-order mark", file(lambda text: b"\xef\xbb\xbf" + text.encode())),
    Quirk("fields that COCO has not", annotation(score=0.5, attributes={"occluded": True})),
    Quirk("indented, with Windows line ends", lambda c, _: json.dumps(c, indent=1).replace("\n", "\r\n").encode()),
    Quirk("gzip", file(lambda text: gzip.compress(text.encode())), refused=("gzip",)),
    Quirk("UTF-16", file(lambda text: text.encode("utf-16")), refused=("UTF-8",)),
    Quirk("Latin-1", file(lambda text: text.replace("thing", "café").encode("latin-1")), refused=("UTF-8",)),
    Quirk("cut short", file(lambda text: text[:-40].encode()), refused=("not JSON", "line 1")),
    Quirk("an empty file", file(lambda text: b""), refused=("not JSON",)),
    Quirk("detections in place of a set", file(lambda text: b'[{"image_id": 1, "score": 0.5}]'), refused=("expected",)),
)  # fmt: skip


# How it is judged ----------------------------------------------------------------------------------------------------


def outcome(quirk: Quirk, folder: Path) -> tuple[bool, list[str]]:
    """Whether the set is taken, and what is wrong with what became of it, in lines.

    Raises:
        Exception: Whatever the reader should not have raised.
    """
    from yolo_gradstab.coco.annotations import CocoError
    from yolo_gradstab.coco.check import check_coco

    images = folder / "images"
    images.mkdir(parents=True)
    coco = a_set(images, task=quirk.task)
    changed = quirk.change(coco, images)
    path = folder / "a.json"
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(coco).encode())
    before = {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}
    lines: list[str]
    report = None
    try:
        report = check_coco(path, images=images, task=quirk.task)
        lines = report.problems
    except CocoError as error:
        lines = [str(error)]
    wrong = [f"not one line: {line!r}" for line in lines if "\n" in line]
    if before != {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}:
        wrong.append("files were written or changed")
    if quirk.refused:
        if len(lines) != 1 or str(path) not in lines[0] or any(part not in lines[0] for part in quirk.refused):
            wrong.append(f"refused with {lines}, not with one line that says {quirk.refused}")
        return not lines, wrong
    if report is None or lines:
        return False, [*wrong, f"refused with {lines}"]
    if (report.used, report.unused) != (quirk.used, quirk.unused):
        wrong.append(f"used {report.used}, not used {report.unused}; not {quirk.used} and {quirk.unused}")
    peer = of_pycocotools(path)
    ours = (report.images, report.annotations, {category.id: category.annotations for category in report.categories})
    if peer != ours:
        wrong.append(f"images, annotations and annotations by category are {ours}; pycocotools counts {peer}")
    return True, wrong


def of_pycocotools(path: Path) -> tuple[int, int, dict[int, int]]:
    """Its number of images, of annotations, and of annotations by category."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        peer = COCO()
        peer.dataset = json.loads(path.read_text(encoding="utf-8-sig"))  # its own reading knows no byte-order mark
        peer.createIndex()
    by_category = {i: len(peer.getAnnIds(catIds=[i])) for i in peer.getCatIds()}
    return len(peer.imgs), len(peer.anns), by_category


def try_all(folder: Path) -> tuple[int, int, list[str]]:
    """How many were taken and right, how many refused in one line, and what is wrong with the others."""
    taken = refused = 0
    wrong = []
    for number, quirk in enumerate(QUIRKS):
        is_taken, lines = outcome(quirk, folder / str(number))
        wrong += [f"{quirk.name}: {line}" for line in lines]
        taken, refused = taken + (not lines and is_taken), refused + (not lines and not is_taken)
    return taken, refused, wrong


def main() -> int:
    """Try all, print a line."""
    with tempfile.TemporaryDirectory() as folder:
        taken, refused, wrong = try_all(Path(folder))
    print("\n".join([*wrong, f"{taken} taken and right, {refused} refused in one line, {len(wrong)} wrong"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
