"""COCO JSON converted to YOLO label files, for tools that read only those; training here needs no conversion."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import msgspec
import numpy as np

from yolo_gradstab.coco.annotations import CocoError, read_coco
from yolo_gradstab.coco.images import check_images, find_images, image_folders, refuse_broken, refuse_missing
from yolo_gradstab.coco.labels import CocoLabels, ImageLabels, check_task, make_labels

__all__ = ["ConversionReport", "convert_coco", "label_lines"]


class ConversionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a conversion wrote, and what a data YAML for it needs: names and, for pose, kpt_shape and flip_idx."""

    coco: str
    task: str
    out: str
    images: int
    files: int
    """Label files in `out`, one per image that has labels; the host takes an image without one for background."""
    unchanged: int
    """Files of an earlier conversion that already held just this."""
    annotations: int
    used: int
    unused: dict[str, int]
    """Counts by reason, as `check_coco` gives them."""
    clipped: int
    keypoints_outside: int
    names: dict[int, str]
    kpt_shape: list[int] | None
    flip_idx: list[int] | None
    notes: list[str]


def convert_coco(
    coco: str | Path, *, images: str | Path | Sequence[str | Path], out: str | Path, task: str = "detect"
) -> ConversionReport:
    """Write one YOLO label file, `out/<image stem>.txt`, per image that has labels.

    Reading the files back as float32 gives exactly the numbers that training from the JSON uses. A file that is there
    already and holds anything else is left alone, and stops the conversion before it has written anything.

    Raises:
        CocoError: If an image is missing, none by its header or of another size than the JSON says, two images share a
            stem, or `out` holds other labels for these images.
    """
    check_task(task)
    annotations = read_coco(coco, segments=task == "segment")
    folders = image_folders(images)
    files = find_images(annotations.images, folders)
    refuse_missing(annotations.path, annotations.images, files, folders)
    refuse_broken(check_images(annotations.path, annotations.images, files, decode=False))
    labels = make_labels(annotations, files, task=task)
    folder = Path(out)
    targets = _targets(labels, folder, annotations.path)
    unchanged = _refuse_other_labels(labels, targets, folder)
    _write(labels, targets, folder)
    return ConversionReport(
        coco=annotations.path,
        task=task,
        out=str(folder),
        images=len(labels.images),
        files=int((np.diff(labels.images.bounds) > 0).sum()),
        unchanged=unchanged,
        annotations=labels.num_annotations,
        used=labels.num_used,
        unused=labels.unused_by_reason(),
        clipped=len(labels.clipped),
        keypoints_outside=labels.num_keypoints_outside,
        names=labels.names,
        kpt_shape=labels.layout.shape if labels.layout else None,
        flip_idx=labels.layout.flip_idx if labels.layout else None,
        notes=[*labels.notes, *_nested(labels, folders)],
    )


def label_lines(image: ImageLabels) -> Iterator[str]:
    """Yield the label rows of an image: class, then box (and keypoints), or the outline for a segment."""
    for index, number in enumerate(image.classes):
        if image.segments:
            values = image.segments[index].ravel()
        elif image.keypoints is not None:
            values = np.concatenate([image.boxes[index], image.keypoints[index].ravel()])
        else:
            values = image.boxes[index]
        # Nine significant digits are what it takes to give every float32 back exactly.
        yield " ".join([f"{number:.0f}", *(f"{value:.9g}" for value in values.tolist())])


def _text(image: ImageLabels) -> str:
    return "".join(f"{line}\n" for line in label_lines(image))


def _targets(labels: CocoLabels, folder: Path, path: str) -> dict[str, Path]:
    targets: dict[str, Path] = {}
    owners: dict[str, str] = {}
    for image in labels.images:
        stem = PurePath(image.file).stem
        if (other := owners.setdefault(stem, image.file)) != image.file:
            raise CocoError(
                f"{path}: images {other} and {image.file} would both be labelled in {folder / stem}.txt; rename one, "
                "or train from the JSON, which needs no label files"
            )
        targets[image.file] = folder / f"{stem}.txt"
    return targets


def _nested(labels: CocoLabels, folders: Sequence[Path]) -> list[str]:
    """A note where the host will not find the labels: it looks for them in subfolders like those of the images."""
    nested = [image.file for image in labels.images if Path(image.file).parent not in folders]
    if not nested:
        return []
    where = f"{len(nested)} images lie in subfolders of the image folder, first {nested[0]}"
    why = "Ultralytics looks for their labels in such subfolders, and takes images without labels for background"
    return [f"{where}; {why}: train from the JSON, or move the images up"]


def _refuse_other_labels(labels: CocoLabels, targets: dict[str, Path], folder: Path) -> int:
    """Return how many files are there and right; stop at one that is not ours: hand-made labels are not overwritten."""
    if folder.exists() and not folder.is_dir():
        raise CocoError(f"out: {folder} is a file; name a folder for the label files")
    unchanged = 0
    for image in labels.images:
        target = targets[image.file]
        if not target.exists():
            continue
        if target.is_dir() or target.read_bytes() != _text(image).encode():
            raise CocoError(
                f"out: {target} exists and holds other labels than {PurePath(image.file).name} has now; give another "
                "folder, or remove the old labels"
            )
        unchanged += 1
    return unchanged


def _write(labels: CocoLabels, targets: dict[str, Path], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CocoError(f"out: {folder} cannot be made ({error.strerror}); name another folder") from None
    for image in labels.images:
        if len(image.classes):
            target = targets[image.file]
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            partial.write_text(_text(image), encoding="utf-8", newline="\n")
            partial.replace(target)  # whole or not at all, also when killed
