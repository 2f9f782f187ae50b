"""Training straight from COCO JSON: the data YAML, and the host's dataset fed from annotations, not label files."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_file_speeds, get_split_fraction
from ultralytics.models.rtdetr.val import RTDETRDataset
from ultralytics.utils import DATASETS_DIR, LOCAL_RANK, LOGGER, colorstr

from yolo_gradstab.coco.annotations import CocoCategory, CocoError, CocoImage, read_coco, read_listing
from yolo_gradstab.coco.cache import LabelCache, Mask, PreparedSet
from yolo_gradstab.coco.check import CheckReport, make_report
from yolo_gradstab.coco.images import (
    check_images,
    find_images,
    image_folders,
    refuse_broken,
    refuse_missing,
    stamp_images,
)
from yolo_gradstab.coco.keypoints import keypoint_layout
from yolo_gradstab.coco.labels import ImageLabels, check_task, class_names, make_labels
from yolo_gradstab.runs import one_line

__all__ = ["CocoDataset", "CocoRTDETRDataset", "build_coco_dataset", "read_data_yaml", "resolved_yaml"]

SPLITS = ("train", "val", "test")


class CocoDataset(YOLODataset):  # type: ignore[misc, unused-ignore]  # the host is untyped
    """The host's dataset with images and labels taken from a COCO JSON file; its samples are the same bit for bit.

    Give the JSON file as `img_path`, and `data` as `read_data_yaml` returns it: `data["images"]` names the folders.

    Attributes:
        coco_report: What the file holds, what is used, and how much is not, by reason (`CheckReport`). It speaks of the
            whole file, also when `fraction` selects a part.

    Raises:
        CocoError: If the file, or an image it lists, cannot be used as it is. Nothing is repaired.
    """

    coco_report: CheckReport

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        """Read the JSON or its cache, and return the image files, sorted; the labels are kept for `get_labels`."""
        if isinstance(img_path, list):
            raise CocoError(f"a split is one COCO JSON file, got {len(img_path)}; merge them first")
        task, folders = _task_of(self), _folders_of(img_path, self.data)
        cache = LabelCache(img_path, task)
        with _uninterrupted():
            cached = cache.load(folders)
            if cached.prepared:
                _say(logging.INFO, f"{self.prefix}labels from {cache.path}")
            elif cached.refused:
                _say(logging.INFO, f"{self.prefix}{cache.path} {cached.refused}; labels are made anew")
            prepared = cached.prepared or _prepare(img_path, folders, task)
            _check_layout(prepared.kpt_shape, self.data, img_path)
            self._chosen = _first(prepared.labels, self.fraction)
            in_order = cached.in_order(prepared)
        unseen = np.flatnonzero(~in_order[: len(self._chosen)]).tolist()
        images, files = prepared.labels.images, prepared.labels.files
        broken = check_images(
            img_path, [images[i] for i in unseen], {images[i].id: files[i] for i in unseen}, decode=True
        )
        in_order[unseen] = [images[i].id not in broken for i in unseen]
        if unseen or not cached.is_current:
            _save(cache, prepared, folders, in_order, self.prefix, is_new=not cached.prepared)
        refuse_broken(broken)
        self.coco_report = prepared.report
        im_files = files[: len(self._chosen)]
        # The host's speed test draws from `random`: leaving it out would change every augmentation that follows.
        check_file_speeds(list(im_files), prefix=self.prefix)
        return im_files

    def get_labels(self) -> list[dict[str, Any]]:
        """Return the labels in the form the host reads from label files, and say once what was not used."""
        chosen: list[ImageLabels] = self.__dict__.pop("_chosen")
        if self.augment and not any(len(image.classes) for image in chosen):
            raise CocoError(f"{self.img_path}: nothing to train on: {self.coco_report.summary()}")
        if LOCAL_RANK in {-1, 0}:
            _say_what_is_unused(self.coco_report, self.prefix)
        with _uninterrupted():
            labels = [_host_label(image) for image in chosen]
            self.verify_labels(labels, Path(self.coco_report.coco))
        return labels


class CocoRTDETRDataset(CocoDataset, RTDETRDataset):  # type: ignore[misc, unused-ignore]
    """The same for RT-DETR, whose images are stretched to a square."""


def build_coco_dataset(
    args: SimpleNamespace,
    img_path: str,
    batch: int | None,
    data: dict[str, Any],
    mode: str = "train",
    rect: bool = False,
    stride: int = 32,
    fraction: float | None = None,
    kind: type[CocoDataset] = CocoDataset,
) -> CocoDataset:
    """Build the dataset of one split: the host's `build_yolo_dataset`, argument for argument, for COCO JSON."""
    check_task(args.task)
    if fraction is None:
        fraction = get_split_fraction(args.fraction, "train" if mode == "train" else args.split)
    return kind(
        img_path=img_path,
        imgsz=args.imgsz,
        batch_size=batch,
        augment=mode == "train",
        hyp=args,
        rect=(args.rect or rect) and not issubclass(kind, RTDETRDataset),
        cache=args.cache or None,
        single_cls=args.single_cls or False,
        stride=stride,
        pad=0.0 if mode == "train" else 0.5,
        prefix=colorstr(f"{mode}: "),  # type: ignore[no-untyped-call, unused-ignore]
        task=args.task,
        classes=args.classes,
        data=data,
        fraction=fraction,
    )


def read_data_yaml(path: str | Path, task: str) -> dict[str, Any] | None:
    """Read a data YAML whose splits are COCO JSON files into the host's `data` dictionary.

    Paths in the YAML are relative to `path`; a relative `path` is looked for beside the YAML, then in the working
    directory, then in the host's dataset folder. `images` is a folder, a list of folders, or a mapping by split.

    Returns:
        The dictionary, or None if this is ordinary YOLO data, which is the host's to read.

    Raises:
        CocoError: If the YAML is about COCO JSON and something in it, or in the files it names, does not fit.
    """
    file = Path(path)
    if file.suffix.lower() not in {".yaml", ".yml"} or not file.is_file():
        return None
    raw = _load_yaml(file)
    if raw is None or not any(_names_json(raw.get(split)) for split in SPLITS):
        return None
    _check_splits(raw, file, task)
    root = _root(raw, file)
    jsons = {split: str((root / raw[split]).resolve()) for split in SPLITS if raw.get(split)}
    for split, json_file in jsons.items():
        if not Path(json_file).is_file():
            raise CocoError(f"{file}: {split}: {json_file} does not exist; `path` is {root}")
    listings = {split: LabelCache(j, task).listing() or read_listing(j) for split, j in jsons.items()}
    categories = _shared_categories(listings, file)
    names = class_names(categories)
    _check_names(raw, names, file)
    return {
        **raw,
        **jsons,
        "path": root,
        "images": {split: _split_folders(raw, root, split, jsons[split], listings[split][0], file) for split in jsons},
        "nc": len(names),
        "names": names,
        "channels": raw.get("channels", 3),
        "yaml_file": str(file.resolve()),
        **(_pose_keys(raw, categories, jsons["train"], file) if task == "pose" else {}),
    }


def resolved_yaml(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with absolute paths and plain types: written to a file, it means the same from any folder."""
    plain = {key: value for key, value in data.items() if key not in {"yaml_file", "validation"}}
    plain["path"] = str(Path(data["path"]).resolve())
    plain["names"] = {int(index): str(name) for index, name in dict(data["names"]).items()}
    return plain


def _task_of(dataset: CocoDataset) -> str:
    if dataset.use_obb:
        raise CocoError(f"{dataset.img_path}: COCO JSON has no oriented boxes; use task detect, pose or segment")
    return "pose" if dataset.use_keypoints else "segment" if dataset.use_segments else "detect"


def _folders_of(img_path: str, data: Mapping[str, Any]) -> list[Path]:
    """Return the folders of the split(s) this JSON file is named for."""
    images = data.get("images")
    if not isinstance(images, Mapping):
        raise CocoError(f"{img_path}: data['images'] must map splits to image folders, as read_data_yaml returns it")
    folders = [folder for split in SPLITS if data.get(split) == img_path for folder in images.get(split, ())]
    if not folders:
        raise CocoError(f"{img_path}: is none of the data's {', '.join(SPLITS)}, so its image folder is not known")
    return image_folders(list(dict.fromkeys(folders)))


def _prepare(path: str, folders: list[Path], task: str) -> PreparedSet:
    coco = read_coco(path, segments=task == "segment")
    files = find_images(coco.images, folders)
    refuse_missing(coco.path, coco.images, files, folders)
    labels = make_labels(coco, files, task=task)
    return PreparedSet(
        labels=labels.images,
        report=make_report(coco, labels),
        first=coco.images[0],
        categories=coco.categories,
        kpt_shape=labels.layout.shape if labels.layout else None,
        stamps=stamp_images(labels.images.files),
    )


def _save(
    cache: LabelCache, prepared: PreparedSet, folders: list[Path], in_order: Mask, prefix: str, *, is_new: bool
) -> None:
    """Write the cache, once in each machine; without one, training goes on all the same."""
    if LOCAL_RANK not in {-1, 0}:
        return
    existed = cache.path.exists()
    trouble = cache.save(prepared, folders, in_order)
    if trouble and is_new:
        _say(logging.WARNING, f"{prefix}labels are not cached in {cache.path} ({trouble}): each start makes them anew")
    elif not trouble and not existed:
        _say(logging.INFO, f"{prefix}labels cached in {cache.path}")


def _say(level: int, line: str) -> None:
    if LOCAL_RANK in {-1, 0}:
        LOGGER.log(level, line)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Without the garbage collector, which would go through a million new objects again and again and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_layout(shape: list[int] | None, data: Mapping[str, Any], path: str) -> None:
    if shape and list(data["kpt_shape"]) != shape:
        raise CocoError(f"{path}: keypoints have shape {shape}, but kpt_shape is {data['kpt_shape']}")


def _first(images: Sequence[ImageLabels], fraction: float | int) -> list[ImageLabels]:
    """Return the host's choice of a fraction: the first files in sorted order, a count or a share."""
    count = fraction if isinstance(fraction, int) else max(1, round(len(images) * fraction))
    return list(images[:count])


def _host_label(image: ImageLabels) -> dict[str, Any]:
    return {
        "im_file": image.file,
        "shape": (image.height, image.width),
        "cls": image.classes[:, None],
        "bboxes": image.boxes,
        "segments": image.segments,
        "keypoints": image.keypoints,
        "normalized": True,
        "bbox_format": "xywh",
    }


def _say_what_is_unused(report: CheckReport, prefix: str) -> None:
    if report.unused or report.clipped or report.keypoints_outside:
        LOGGER.warning(f"{prefix}{report.summary()} ({report.coco}; `yolo-gradstab data check` lists them)")
    for note in report.notes:
        LOGGER.warning(f"{prefix}{note}")


def _load_yaml(file: Path) -> dict[str, Any] | None:
    content = file.read_bytes()
    try:
        raw = yaml.safe_load(content.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:
        if b".json" not in content.lower():  # it is the host's, which reads other encodings too
            return None
        raise CocoError(f"{file}: is not YAML: {one_line(error)}") from None
    if isinstance(raw, dict) and "val" not in raw and "validation" in raw:
        raw["val"] = raw.pop("validation")  # the host takes this name too
    return raw if isinstance(raw, dict) else None


def _names_json(value: object) -> bool:
    entries = value if isinstance(value, list) else [value]
    return any(isinstance(entry, str) and entry.lower().endswith(".json") for entry in entries)


def _check_splits(raw: Mapping[str, Any], file: Path, task: str) -> None:
    try:
        check_task(task)
    except CocoError as error:
        raise CocoError(f"{file}: {error}") from None
    for split in SPLITS:
        value = raw.get(split)
        if value is None and split == "test":
            continue
        if value is None:
            raise CocoError(f"{file}: {split} is missing; name a COCO JSON file for train and for val")
        if isinstance(value, list):
            raise CocoError(f"{file}: {split} must be one COCO JSON file, got a list of {len(value)}; merge them first")
        if not _names_json(value):
            raise CocoError(
                f"{file}: {split} is {value!r}, but another split is COCO JSON; use JSON for all or for none"
            )


def _root(raw: Mapping[str, Any], file: Path) -> Path:
    beside, train = file.resolve().parent, raw["train"]
    if raw.get("path") is not None and not isinstance(raw["path"], str):
        raise CocoError(f"{file}: path must be a folder, got {raw['path']!r}")
    bases = dict.fromkeys([beside, Path.cwd(), Path(DATASETS_DIR)]) if raw.get("path") else {beside: None}
    roots = list(dict.fromkeys((base / (raw.get("path") or "")).resolve() for base in bases))
    for root in roots:
        if (root / train).is_file():
            return root
    raise CocoError(
        f"{file}: train: {train} not found in {', '.join(map(str, roots))}; set `path` to the folder that holds it"
    )


Listing = tuple[list[CocoImage], list[CocoCategory]]


def _shared_categories(listings: Mapping[str, Listing], file: Path) -> list[CocoCategory]:
    """Return the categories, which must be the same in every split: the same id is another class otherwise."""
    tables = {split: {c.id: (c.name, c.keypoints) for c in categories} for split, (_, categories) in listings.items()}
    for split, table in tables.items():
        differing = sorted(i for i in {**tables["train"], **table} if tables["train"].get(i) != table.get(i))
        if differing:
            first = differing[0]
            raise CocoError(
                f"{file}: train and {split} must have the same categories, but id {first} is "
                f"{_described(tables['train'].get(first))} in train and {_described(table.get(first))} in {split} "
                f"({len(differing)} such ids)"
            )
    return listings["train"][1]


def _described(category: tuple[str, list[str] | None] | None) -> str:
    if category is None:
        return "absent"
    name, keypoints = category
    return repr(name) + (f" with {len(keypoints)} keypoints" if keypoints else "")


def _check_names(raw: Mapping[str, Any], names: Mapping[int, str], file: Path) -> None:
    given, own = raw.get("names"), list(names.values())
    if given is not None and not isinstance(given, dict | list):
        raise CocoError(f"{file}: names must be a list, or numbers with names, got {given!r}; leave `names` out")
    if isinstance(given, dict):
        are_numbers = all(isinstance(key, int) or str(key).isdecimal() for key in given)
        given = [given[key] for key in sorted(given, key=int if are_numbers else str)]
    if given is not None and [str(name) for name in given] != own:
        raise CocoError(
            f"{file}: names {_clipped(given)} are not the categories of the JSON in id order, {_clipped(own)}; "
            "leave `names` out, it comes from the categories"
        )
    if raw.get("nc") is not None and raw["nc"] != len(own):
        raise CocoError(f"{file}: nc is {raw['nc']}, but the JSON has {len(own)} categories; leave `nc` out")


def _clipped(names: Sequence[object], limit: int = 6) -> str:
    return f"[{', '.join(map(str, names[:limit]))}{', ...' if len(names) > limit else ''}]"


def _split_folders(
    raw: Mapping[str, Any], root: Path, split: str, json_file: str, images: list[CocoImage], file: Path
) -> list[str]:
    given = raw.get("images")
    if given is None:
        return [_sibling_folder(root, split, json_file, images[0], file)]
    if isinstance(given, dict):
        if not given.get(split):
            raise CocoError(f"{file}: images has no folder for {split}; it has {', '.join(map(str, given)) or 'none'}")
        given = given[split]
    folders = given if isinstance(given, list) else [given]
    if not folders or not all(isinstance(folder, str) for folder in folders):
        raise CocoError(f"{file}: images must be a folder, a list of folders, or those by split, got {given!r}")
    for folder in folders:
        if not (root / folder).is_dir():
            raise CocoError(f"{file}: images: {root / folder} is not a folder; it must hold the images of {split}")
    return [str((root / folder).resolve()) for folder in folders]


def _sibling_folder(root: Path, split: str, json_file: str, image: CocoImage, file: Path) -> str:
    """Find the folder by convention: the first that holds the first image. `instances_train2017` names `train2017`."""
    name = Path(json_file).stem.rpartition("_")[2]
    tried = [root / "images" / split, root / "images" / name, root / name, root / "images", Path(json_file).parent]
    for folder in tried:
        if (folder / image.file_name).is_file():
            return str(folder.resolve())
    raise CocoError(
        f"{file}: images is not given, and {image.file_name}, the first image of {split}, is in none of "
        f"{', '.join(map(str, dict.fromkeys(tried)))}; name the folder(s) under `images`"
    )


def _pose_keys(raw: Mapping[str, Any], categories: list[CocoCategory], json_file: str, file: Path) -> dict[str, Any]:
    layout = keypoint_layout(categories, json_file)
    if raw.get("kpt_shape") is not None and raw["kpt_shape"] != layout.shape:
        raise CocoError(
            f"{file}: kpt_shape is {raw['kpt_shape']}, but the categories give {layout.shape}; leave it out"
        )
    # Names without sides say nothing about mirroring, so a flip_idx that the user wrote down has the last word.
    flip_idx, num = raw.get("flip_idx") or layout.flip_idx, len(layout.names)
    names = {i: list(c.keypoints or layout.names) for i, c in enumerate(sorted(categories, key=lambda c: c.id))}
    if flip_idx is None:  # without one the host does not mirror
        return {"kpt_shape": layout.shape, "kpt_names": names}
    if not isinstance(flip_idx, list) or len(flip_idx) != num or any(i not in flip_idx for i in range(num)):
        raise CocoError(f"{file}: flip_idx must hold each of 0 to {num - 1} once, got {flip_idx}")
    return {"kpt_shape": layout.shape, "flip_idx": flip_idx, "kpt_names": names}
