"""`coco.dataset`: samples equal to the host's from converted labels, bit for bit, and data YAMLs read or refused."""

from __future__ import annotations

import json
import logging
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG, LOGGER

from yolo_gradstab.coco.annotations import CocoError
from yolo_gradstab.coco.conversion import convert_coco
from yolo_gradstab.coco.dataset import CocoDataset, build_coco_dataset, read_data_yaml, resolved_yaml
from yolo_gradstab.coco.sample import draw_sample

from .conftest import Builder

PROJECT = Path(__file__).resolve().parents[2]
POINTS = ["left_eye", "right_eye"]


def arguments(task: str, **changes: Any) -> SimpleNamespace:
    return get_cfg(DEFAULT_CFG, {"task": task, "imgsz": 96, "plots": False, **changes})


def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what the host augments from)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `images` and `labels` for the host, and the same images as COCO JSON, by task; the set is awkward."""
    folders = {}
    for task in ("detect", "pose", "segment"):
        folder = tmp_path_factory.mktemp(task)
        draw_sample(folder, task="pose" if task == "pose" else "detect", images=9, size=96)
        add_trouble(folder, task)
        annotations = next((folder / "annotations").glob("*_train.json"))
        convert_coco(annotations, images=folder / "images" / "train", out=folder / "labels" / "train", task=task)
        folders[task] = folder
    return folders


def add_trouble(folder: Path, task: str) -> None:
    """Add a background image, a crowd, a repeated annotation and a box over the border, and shuffle the images."""
    path = next((folder / "annotations").glob("*_train.json"))
    coco = json.loads(path.read_text())
    shutil.copy(folder / "images/train/000000.png", folder / "images/train/background.png")
    coco["images"] = [*coco["images"][::-1], {**coco["images"][0], "id": 900, "file_name": "background.png"}]
    first = coco["annotations"][0]
    coco["annotations"] += [
        {**first, "id": 9001},
        {**first, "id": 9002, "iscrowd": 1},
        {**first, "id": 9003, "bbox": [-4, 50.3, 30.7, 60]},
    ]
    path.write_text(json.dumps(coco))


def both(folder: Path, task: str, *, mode: str = "train", **changes: Any) -> Iterator[Any]:
    """Build the host's dataset from label files and ours from the JSON, each under the same seed."""
    data = read_data_yaml(folder / "data.yaml", task)
    assert data is not None
    for build, source in ((build_yolo_dataset, str(folder / "images" / "train")), (build_coco_dataset, data["train"])):
        seeded()
        yield build(arguments(task, **changes), source, 4, data, mode=mode, rect=mode == "val", stride=32)


def assert_same(host: Any, ours: Any, where: str) -> None:
    assert type(host) is type(ours), where
    if isinstance(host, torch.Tensor):
        assert host.dtype == ours.dtype, where
        assert torch.equal(host, ours), where
    elif isinstance(host, np.ndarray):
        assert (host.dtype, host.shape) == (ours.dtype, ours.shape), where
        assert host.tobytes() == ours.tobytes(), where
    elif isinstance(host, dict):
        assert list(host) == list(ours), where
        for key in host:
            assert_same(host[key], ours[key], f"{where}.{key}")
    elif isinstance(host, list | tuple):
        assert len(host) == len(ours), where
        for index, (one, other) in enumerate(zip(host, ours, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert host == ours, where


@pytest.mark.parametrize("task", ["detect", "pose", "segment"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "val"},
        {"mosaic": 0.0, "mixup": 0.5, "degrees": 10.0},
        {"single_cls": True, "fraction": 0.5},
        {"classes": [0], "fraction": 4},
        {"cache": "ram"},
    ],
    ids=str,
)
def test_labels_and_samples_are_the_hosts(sets: dict[str, Path], task: str, changes: dict[str, Any]) -> None:
    host, ours = both(sets[task], task, **changes)
    assert host.im_files == ours.im_files
    assert_same(host.labels, ours.labels, "labels")
    seeded()
    expected = [host[index] for index in range(len(host))]
    seeded()
    assert_same(expected, [ours[index] for index in range(len(ours))], "samples")


@pytest.mark.parametrize("task", ["detect", "pose", "segment"])
def test_real_samples_are_the_hosts(shared: Callable[[str], Path], tmp_path: Path, task: str) -> None:
    root = shared("coco_open")
    name = "person_keypoints" if task == "pose" else "instances"
    json_file = root / "annotations" / f"{name}_val2017.json"
    images = tmp_path / "images"
    images.mkdir()
    for image in json.loads(json_file.read_text())["images"]:  # the folder holds more than this JSON lists
        shutil.copy(root / "images" / "val2017" / image["file_name"], images)
    convert_coco(json_file, images=images, out=tmp_path / "labels", task=task)
    data = read_data_yaml(PROJECT / "datasets" / f"coco_open_{'pose' if task == 'pose' else 'detect'}.yaml", task)
    assert data is not None
    data["images"] = {"val": [str(images)]}
    datasets = []
    for build, source in ((build_yolo_dataset, str(images)), (build_coco_dataset, data["val"])):
        seeded()
        datasets.append(build(arguments(task), source, 4, data, mode="train"))
    host, ours = datasets
    assert_same(host.labels, ours.labels, "labels")
    seeded()
    expected = [host[index] for index in range(0, len(host), 9)]
    seeded()
    assert_same(expected, [ours[index] for index in range(0, len(ours), 9)], "samples")


def test_building_draws_as_many_random_numbers_as_the_host(sets: dict[str, Path]) -> None:
    states = []
    for _ in both(sets["detect"], "detect"):
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))  # noqa: NPY002
    assert states[0] == states[1]


@pytest.mark.parametrize("task", ["detect", "pose"])
def test_batches_are_the_hosts(sets: dict[str, Path], task: str) -> None:
    host, ours = both(sets[task], task)
    batches = []
    for dataset in (host, ours):
        seeded()
        batches.append(dataset.collate_fn([dataset[index] for index in range(3)]))
    assert_same(*batches, "batch")


def test_dataset_reaches_worker_processes(sets: dict[str, Path]) -> None:
    _, ours = both(sets["pose"], "pose")
    copy = pickle.loads(pickle.dumps(ours))
    seeded()
    expected = ours[0]
    seeded()
    assert_same(expected, copy[0], "sample")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    handler = Lines()
    LOGGER.addHandler(handler)
    yield handler.lines
    LOGGER.removeHandler(handler)


def test_what_is_unused_is_said_once(sets: dict[str, Path], warned: list[str]) -> None:
    _, ours = both(sets["detect"], "detect")
    report = ours.coco_report
    assert report.unused == {"crowd": 1, "duplicate": 1}
    said = [line for line in warned if "not used" in line]
    assert len(said) == 1
    assert f"{report.annotations} annotations, {report.used} used; not used: 1 crowd, 1 duplicate" in said[0]
    assert "1 boxes cut at the image border" in said[0]


def test_set_in_perfect_order_says_nothing(tmp_path: Path, warned: list[str]) -> None:
    data = read_data_yaml(draw_sample(tmp_path, images=2, size=64), "detect")
    assert data is not None
    build_coco_dataset(arguments("detect"), data["train"], 2, data)
    assert [line for line in warned if "annotations" in line] == []


def test_images_that_are_no_good_are_refused_and_left_alone(build: Builder) -> None:
    coco = build.coco(images=[build.image(file_name="a.jpg"), build.image(id=2, file_name="b.jpg")])
    data = data_of(build, coco)
    for image in build.images.iterdir():
        image.write_bytes(image.read_bytes()[:-50])
    before = {image.name: image.read_bytes() for image in build.images.iterdir()}
    with pytest.raises(CocoError, match=r"a\.jpg: cannot be read .* \(and 1 more such images; `yolo-gradstab data che"):
        build_coco_dataset(arguments("detect"), data["train"], 2, data)
    assert {image.name: image.read_bytes() for image in build.images.iterdir()} == before
    (build.images / "b.jpg").unlink()
    with pytest.raises(CocoError, match=r"1 of 2 image files not found, first b\.jpg \(image 2\)"):
        build_coco_dataset(arguments("detect"), data["train"], 2, data)


def test_nothing_but_the_cache_is_written_beside_the_data(build: Builder) -> None:
    data = data_of(build, build.coco())
    before = {path: path.stat().st_mtime_ns for path in build.folder.rglob("*") if path.is_file()}
    build_coco_dataset(arguments("detect"), data["train"], 2, data)
    after = {path: path.stat().st_mtime_ns for path in build.folder.rglob("*") if path.is_file()}
    assert after.pop(build.folder / "a.detect.gradstab.cache")
    assert after == before


def test_nothing_to_train_on(build: Builder) -> None:
    data = data_of(build, build.coco(annotations=[build.annotation(iscrowd=1)]))
    with pytest.raises(CocoError, match="nothing to train on: 1 annotations, 0 used; not used: 1 crowd"):
        build_coco_dataset(arguments("detect"), data["train"], 2, data)


def test_oriented_boxes_are_refused(build: Builder) -> None:
    data = data_of(build, build.coco())
    with pytest.raises(CocoError, match="no oriented boxes"):
        CocoDataset(img_path=data["train"], data=data, task="obb", augment=False, hyp=arguments("obb"))


def write_yaml(build: Builder, **keys: Any) -> Path:
    keys = {"train": "a.json", "val": "a.json", "images": "images", **keys}
    path = build.folder / "data.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return path


def data_of(build: Builder, coco: dict[str, Any], *, task: str = "detect", **keys: Any) -> dict[str, Any]:
    build.write(coco)
    data = read_data_yaml(write_yaml(build, **keys), task)
    assert data is not None
    return data


@pytest.mark.parametrize("train", ["images/train", ["images/a", "images/b"], "train.txt"])
def test_ordinary_yolo_data_is_the_hosts(build: Builder, train: Any) -> None:
    assert read_data_yaml(write_yaml(build, train=train, val="images/val"), "detect") is None


def test_names_of_the_hosts_own_sets_are_the_hosts() -> None:
    for name in ("coco8.yaml", "coco8", "https://example.org/a.zip"):
        assert read_data_yaml(name, "detect") is None


def test_data_has_what_the_host_needs(build: Builder) -> None:
    data = data_of(build, build.coco(categories=[build.category(id=9, name="dog"), build.category()]), extra=5)
    assert data["train"] == data["val"] == str(build.folder / "a.json")
    assert data["images"] == {"train": [str(build.images)], "val": [str(build.images)]}
    assert (data["nc"], data["names"], data["channels"], data["extra"]) == (2, {0: "cat", 1: "dog"}, 3, 5)
    assert data["path"] == build.folder
    assert "kpt_shape" not in data


def test_pose_data_comes_from_the_categories(build: Builder) -> None:
    coco = build.coco(categories=[build.category(keypoints=POINTS)])
    data = data_of(build, coco, task="pose")
    assert (data["kpt_shape"], data["flip_idx"], data["kpt_names"]) == ([2, 3], [1, 0], {0: POINTS})
    assert data_of(build, coco, task="pose", flip_idx=[0, 1])["flip_idx"] == [0, 1]


@pytest.mark.parametrize("task", ["detect", "pose"])
def test_resolved_yaml_passes_the_hosts_check(sets: dict[str, Path], tmp_path: Path, task: str) -> None:
    data = read_data_yaml(sets[task] / "data.yaml", task)
    assert data is not None
    path = tmp_path / "elsewhere" / "resolved.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(resolved_yaml(data)))
    checked = check_det_dataset(str(path))
    for key in ("train", "val", "names", "nc", "images", "channels", *(("kpt_shape", "flip_idx") * (task == "pose"))):
        assert checked[key] == data[key]
    assert len(build_coco_dataset(arguments(task), checked["val"], 2, checked, mode="val")) == 3  # as final validation
    again = read_data_yaml(path, task)
    assert again is not None
    assert {**again, "yaml_file": None} == {**data, "yaml_file": None}


@pytest.mark.parametrize("form", ["absolute", "beside the yaml", "working directory", "none"])
def test_path_may_be_given_in_the_usual_ways(build: Builder, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    root = {"absolute": str(build.folder), "beside the yaml": ".", "working directory": "set", "none": None}[form]
    build.write(build.coco())
    path = write_yaml(build, path=root)
    if form == "working directory":
        monkeypatch.chdir(build.folder.parent)
        path = path.rename(build.folder.parent.parent / f"{build.folder.parent.name}.yaml")
    data = read_data_yaml(path, "detect")
    path.unlink()
    assert data is not None
    assert data["path"] == build.folder


@pytest.mark.parametrize(
    ("images", "folders"),
    [
        ("images", ["images"]),
        (["other", "images"], ["other", "images"]),
        ({"train": "images", "val": ["other", "images"]}, ["images"]),
    ],
)
def test_images_may_be_given_in_three_ways(build: Builder, images: Any, folders: list[str]) -> None:
    (build.folder / "other").mkdir()
    data = data_of(build, build.coco(), images=images)
    assert data["images"]["train"] == [str(build.folder / folder) for folder in folders]


@pytest.mark.parametrize("folder", ["images/train", "images/train2017", "train2017", "images", "."])
def test_images_are_found_by_convention(build: Builder, folder: str) -> None:
    coco = build.coco()
    build.write(coco, "instances_train2017.json")
    target = build.folder / folder
    target.mkdir(parents=True, exist_ok=True)
    if target != build.images:
        (build.images / "a.png").rename(target / "a.png")
    build.write(coco, "b.json", draw=False)
    val = build.folder / "images" / "val"
    val.mkdir(parents=True)
    shutil.copy(target / "a.png", val)
    path = write_yaml(build, train="instances_train2017.json", val=None, validation="b.json", images=None)
    data = read_data_yaml(path, "detect")
    assert data is not None
    assert data["images"] == {"train": [str(target.resolve())], "val": [str(val)]}


def test_images_that_no_convention_finds(build: Builder) -> None:
    build.write(build.coco(), draw=False)
    with pytest.raises(CocoError, match=r"images is not given, and a\.png, the first image of train, is in none of"):
        read_data_yaml(write_yaml(build, images=None), "detect")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"val": "images/val"}, "val is 'images/val', but another split is COCO JSON; use JSON for all or for none"),
        ({"val": None}, "val is missing; name a COCO JSON file for train and for val"),
        ({"test": "images/test"}, "test is 'images/test', but another split is COCO JSON"),
        ({"train": ["a.json", "b.json"]}, "train must be one COCO JSON file, got a list of 2; merge them first"),
        ({"train": "no.json"}, r"train: no\.json not found in .*/set; set `path` to the folder that holds it"),
        ({"val": "no.json"}, r"val: .*/no\.json does not exist; `path` is "),
        ({"path": ["x"]}, r"path must be a folder, got \['x'\]"),
        ({"names": 5}, "names must be a list, or numbers with names, got 5; leave `names` out"),
        (
            {"names": ["dog"]},
            r"names \[dog\] are not the categories of the JSON in id order, \[cat\]; leave `names` out",
        ),
        ({"nc": 80}, "nc is 80, but the JSON has 1 categories"),
        ({"images": "nowhere"}, "images: .*nowhere is not a folder; it must hold the images of train"),
        ({"images": {"train": "images"}}, "images has no folder for val; it has train"),
        ({"images": 5}, "images must be a folder, a list of folders, or those by split, got 5"),
        ({"images": []}, r"images must be a folder, .* got \[\]"),
    ],
)
def test_yaml_that_does_not_fit(build: Builder, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CocoError, match=rf"data\.yaml: {message}"):
        data_of(build, build.coco(), **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kpt_shape": [17, 3]}, r"kpt_shape is \[17, 3\], but the categories give \[2, 3\]; leave it out"),
        ({"flip_idx": [0, 0]}, r"flip_idx must hold each of 0 to 1 once, got \[0, 0\]"),
        ({"flip_idx": 5}, "flip_idx must hold each of 0 to 1 once, got 5"),
        ({"flip_idx": [0, 1, 1]}, r"flip_idx must hold each of 0 to 1 once"),
    ],
)
def test_pose_yaml_that_does_not_fit(build: Builder, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CocoError, match=message):
        data_of(build, build.coco(categories=[build.category(keypoints=POINTS)]), task="pose", **keys)


def test_given_names_that_agree_are_fine(build: Builder) -> None:
    assert data_of(build, build.coco(), names={0: "cat"}, nc=1)["names"] == {0: "cat"}


def test_given_names_with_numbers_in_quotes_are_in_the_order_of_the_numbers(build: Builder) -> None:
    categories = [build.category(id=i + 3, name=f"n{i}") for i in range(12)]
    names = {f"{i}": f"n{i}" for i in range(12)}
    assert data_of(build, build.coco(categories=categories), names=names)["nc"] == 12


def test_a_yaml_of_the_hosts_is_left_to_it_whatever_its_encoding(build: Builder) -> None:
    path = build.folder / "data.yaml"
    path.write_bytes("# donn\u00e9es\ntrain: images\nval: images\nnames: [caf\u00e9]\n".encode("latin-1"))
    assert read_data_yaml(path, "detect") is None


def test_yaml_that_is_none(build: Builder) -> None:
    path = build.folder / "data.yaml"
    path.write_text("train: [a.json\nval: {")
    with pytest.raises(CocoError, match=r"data\.yaml: is not YAML: while parsing"):
        read_data_yaml(path, "detect")


def test_other_tasks_are_refused(build: Builder) -> None:
    with pytest.raises(
        CocoError, match=r"data\.yaml: task must be one of detect, pose, segment for COCO JSON, got 'obb'"
    ):
        data_of(build, build.coco(), task="obb")


def test_categories_must_be_the_same_in_every_split(build: Builder) -> None:
    build.write(build.coco(categories=[build.category(), build.category(id=5, name="dog")]), "b.json")
    message = "train and val must have the same categories, but id 5 is absent in train and 'dog' in val"
    with pytest.raises(CocoError, match=message):
        data_of(build, build.coco(), val="b.json")


def test_pose_without_keypoint_categories_is_refused(build: Builder) -> None:
    with pytest.raises(CocoError, match="no category has `keypoints`"):
        data_of(build, build.coco(), task="pose")


@pytest.mark.parametrize("name", ["bccd", "coco_open_detect", "coco_open_pose"])
def test_shipped_yamls_read_the_shared_data(shared: Callable[[str], Path], name: str) -> None:
    shared("bccd" if name == "bccd" else "coco_open")
    data = read_data_yaml(PROJECT / "datasets" / f"{name}.yaml", "pose" if name.endswith("pose") else "detect")
    assert data is not None
    assert data["nc"] == {"bccd": 3, "coco_open_detect": 80, "coco_open_pose": 1}[name]


@pytest.mark.parametrize("task", ["detect", "pose"])
def test_shipped_sample_yaml_reads_a_drawn_set(tmp_path: Path, task: str) -> None:
    shutil.copy(PROJECT / "datasets" / f"sample_{task}.yaml", tmp_path)
    draw_sample(tmp_path / f"sample_{task}", task=task, images=2, size=32)
    data = read_data_yaml(tmp_path / f"sample_{task}.yaml", task)
    assert data is not None
    assert data["nc"] == {"detect": 3, "pose": 1}[task]


def imported(module: str) -> set[str]:
    code = f"import {module}, sys; print([m for m in ('torch', 'ultralytics') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return set(yaml.safe_load(run.stdout.splitlines()[-1]))


def test_only_the_dataset_knows_the_host() -> None:
    names = ("annotations", "labels", "conversion", "sample", "check", "cache")
    assert imported(", ".join(f"yolo_gradstab.coco.{name}" for name in names)) == set()
    assert imported("yolo_gradstab.coco.dataset") == {"torch", "ultralytics"}  # the check can fail
