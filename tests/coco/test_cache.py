"""`coco.cache`: the labels of a second start are those of the first, bit for bit; no cache that might lie is believed.

Beside each claim stands what was opened and read, so that a cache that is never used would fail as one that is stale.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from ultralytics.utils import LOGGER

from yolo_gradstab.coco import annotations, cache, images
from yolo_gradstab.coco.annotations import CocoError
from yolo_gradstab.coco.cache import LabelCache
from yolo_gradstab.coco.dataset import CocoDataset, build_coco_dataset, read_data_yaml
from yolo_gradstab.coco.sample import draw_sample

from .test_dataset import add_trouble, arguments, assert_same, seeded

TASKS = ("detect", "pose", "segment")
NUM_IMAGES = 7  # in the drawn training set, the background image included


class Set:
    """A drawn and awkward COCO set: starts on it, and what they said, opened and read."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task
        self.json = next((folder / "annotations").glob("*_train.json"))
        self.cache = self.json.with_suffix(f".{task}.gradstab.cache")
        self.images = folder / "images" / "train"
        self.lines: list[str] = []
        self.opened: list[str] = []
        self.read: list[str] = []

    def data(self) -> dict[str, Any]:
        data = read_data_yaml(self.folder / "data.yaml", self.task)
        assert data is not None
        return data

    def start(self, **changes: Any) -> CocoDataset:
        """Start as the trainer does; `data` may be given, all else is an argument of the host."""
        for noted in (self.lines, self.opened, self.read):
            noted.clear()
        data = changes.pop("data", None) or self.data()
        seeded()
        return build_coco_dataset(arguments(self.task, **changes), data["train"], 4, data)

    def change(self, **fields: Any) -> None:
        """Change the first annotation."""
        coco = json.loads(self.json.read_text())
        coco["annotations"][0].update(fields)
        self.json.write_text(json.dumps(coco))

    def said(self, words: str) -> list[str]:
        return [line for line in self.lines if words in line]

    def of_cache(self) -> list[str]:
        return self.said("gradstab.cache")

    def only_line(self) -> str:
        (line,) = self.of_cache()
        return line


class Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for task in TASKS:
        folders[task] = tmp_path_factory.mktemp(task)
        draw_sample(folders[task], task="pose" if task == "pose" else "detect", images=9, size=64)
        add_trouble(folders[task], task)
    return folders


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old at once: the JSON of a second start is known by its times."""
    monkeypatch.setattr(cache, "SETTLING_NS", 0)


@pytest.fixture
def coco(request: pytest.FixtureRequest, drawn: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> Iterator[Set]:
    task = getattr(request, "param", "detect")
    made = Set(shutil.copytree(drawn[task], tmp_path / "set"), task)
    decode, look = annotations._decode, images.read_image_size

    def noting_decode(path: Path, kind: Any) -> Any:
        if path == made.json:
            made.read.append(path.name)
        return decode(path, kind)

    def noting_look(file: str, **how: bool) -> tuple[int, int]:
        made.opened.append(Path(file).name)
        return look(file, **how)

    monkeypatch.setattr(annotations, "_decode", noting_decode)
    monkeypatch.setattr(images, "read_image_size", noting_look)
    handler = Lines(made.lines)
    LOGGER.addHandler(handler)
    yield made
    LOGGER.removeHandler(handler)


every_task = pytest.mark.parametrize("coco", TASKS, indirect=True)


def assert_same_set(one: CocoDataset, other: CocoDataset) -> None:
    assert one.im_files == other.im_files
    assert_same(one.labels, other.labels, "labels")
    assert one.coco_report == other.coco_report
    assert_same(samples(one), samples(other), "samples")


def samples(dataset: CocoDataset) -> list[Any]:
    """Every sample, drawn once: the host keeps a buffer for mosaics."""
    if not hasattr(dataset, "samples_drawn"):
        seeded()
        dataset.samples_drawn = [dataset[index] for index in range(len(dataset))]
    return list(dataset.samples_drawn)


@every_task
@pytest.mark.usefixtures("settled")
def test_second_start_reads_nothing_and_gives_the_same_bits(coco: Set) -> None:
    first = coco.start()
    assert len(coco.opened) == NUM_IMAGES == len(first)
    assert coco.read
    states = [(random.getstate(), torch.get_rng_state().tolist())]
    second = coco.start()
    assert (coco.opened, coco.read) == ([], [])
    assert coco.of_cache()[0].endswith(f"labels from {coco.cache}")
    states.append((random.getstate(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]  # the augmentations that follow are the same
    assert_same_set(first, second)
    coco.cache.unlink()
    coco.json.parent.chmod(0o555)
    without = coco.start()
    coco.json.parent.chmod(0o755)
    assert len(coco.opened) == NUM_IMAGES
    assert_same_set(second, without)


@every_task
def test_what_is_unused_is_said_again(coco: Set) -> None:
    coco.start()
    said = coco.said("not used")
    assert len(said) == 1
    assert f"1 crowd, {2 if coco.task == 'segment' else 1} duplicate" in said[0]
    coco.start()
    assert coco.said("not used") == said


@every_task
def test_labels_take_no_more_memory(coco: Set) -> None:
    def memory(dataset: CocoDataset) -> tuple[int, int]:
        arrays = [label[key] for label in dataset.labels for key in ("cls", "bboxes", "keypoints")]
        arrays += [outline for label in dataset.labels for outline in label["segments"]]
        roots = {}
        for array in filter(lambda a: a is not None, arrays):
            root = array
            while isinstance(root.base, np.ndarray):
                root = root.base
            roots[id(root)] = root.nbytes
        return len(roots), sum(roots.values())

    fresh = memory(coco.start())
    assert memory(coco.start()) == fresh
    assert fresh[0] == (2 if coco.task == "segment" else 1)


@every_task
def test_what_a_start_selects_does_not_reach_the_next(coco: Set) -> None:
    plain = coco.start()
    for changes in ({"single_cls": True}, {"classes": [0]}, {"fraction": 2}, {"single_cls": True, "classes": [0]}):
        selected = coco.start(**changes)
        coco.cache.unlink()
        assert_same_set(coco.start(**changes), selected)
    assert_same_set(coco.start(), plain)


def test_images_of_a_larger_fraction_are_looked_at_then(coco: Set) -> None:
    coco.start(fraction=3)
    assert len(coco.opened) == 3
    coco.start()
    assert len(coco.opened) == NUM_IMAGES - 3
    coco.start(fraction=2)
    coco.start()
    assert coco.opened == []


def test_changed_image_is_looked_at_again(coco: Set) -> None:
    coco.start()
    image = coco.images / "000002.png"
    whole = image.read_bytes()
    os.utime(image, ns=(1, 1))
    coco.start()
    assert coco.opened == ["000002.png"]
    image.write_bytes(whole[:-80])
    for _ in range(2):  # one that is broken is not taken as seen
        with pytest.raises(CocoError, match=r"000002\.png: cannot be read"):
            coco.start()
        assert coco.opened == ["000002.png"]
    image.write_bytes(cv2.imencode(".png", np.zeros((40, 30, 3), np.uint8))[1].tobytes())
    with pytest.raises(CocoError, match=r"the JSON says 64x64, the file .*000002\.png is 30x40"):
        coco.start()
    image.write_bytes(whole)
    coco.start()
    assert coco.opened == ["000002.png"]
    coco.start()
    assert coco.opened == []


def test_images_in_order_are_kept_when_another_is_broken(coco: Set) -> None:
    image = coco.images / "000002.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-80])
    with pytest.raises(CocoError, match=r"000002\.png: cannot be read"):
        coco.start()
    image.write_bytes(whole)
    coco.start()
    assert coco.opened == ["000002.png"]


def test_missing_image_is_missed(coco: Set) -> None:
    coco.start()
    (coco.images / "000002.png").unlink()
    with pytest.raises(CocoError, match=r"1 of 7 image files not found, first 000002\.png"):
        coco.start()
    assert coco.only_line().endswith(f"{coco.cache} has images that are gone; labels are made anew")


def test_image_that_turns_up_in_an_earlier_folder_is_taken(coco: Set) -> None:
    data, other = coco.data(), coco.folder / "other"
    other.mkdir()
    data["images"]["train"] = [str(other), str(coco.images)]
    coco.start(data=data)
    coco.start(data=data)
    assert coco.opened == []
    shutil.copy(coco.images / "000002.png", other)  # with a new time, and before all others in sorted order
    moved = coco.start(data=data)
    assert str(other / "000002.png") in moved.im_files
    assert coco.opened == ["000002.png"]
    coco.cache.unlink()
    assert_same_set(coco.start(data=data), moved)


def test_images_of_another_folder_are_all_looked_at(coco: Set) -> None:
    coco.start()
    data = coco.data()
    data["images"]["train"] = [str(shutil.copytree(coco.images, coco.folder / "other"))]  # with their times
    moved = coco.start(data=data)
    assert len(coco.opened) == NUM_IMAGES
    coco.cache.unlink()
    assert_same_set(coco.start(data=data), moved)


@pytest.mark.usefixtures("settled")
def test_changed_json_is_read_and_images_in_order_stay_so(coco: Set) -> None:
    coco.start()
    coco.change(bbox=[1, 2, 3, 4])
    changed = coco.start()
    assert coco.only_line().endswith(f"{coco.cache} is of another content of the JSON; labels are made anew")
    assert coco.opened == []
    coco.start()
    assert coco.read == []
    coco.cache.unlink()
    assert_same_set(coco.start(), changed)


@pytest.mark.usefixtures("settled")
def test_size_of_an_image_that_the_json_changes_is_checked(coco: Set) -> None:
    coco.start()
    listed = json.loads(coco.json.read_text())
    listed["images"][0]["width"] += 1
    coco.json.write_text(json.dumps(listed))
    with pytest.raises(CocoError, match="the JSON says 65x64"):
        coco.start()
    assert len(coco.opened) == 1


@pytest.mark.usefixtures("settled")
def test_change_that_leaves_size_and_time_is_noticed(coco: Set) -> None:
    text, times = coco.json.read_text(), coco.json.stat()
    first = coco.start()
    coco.json.write_text(text.replace('"category_id": 1', '"category_id": 2'))
    os.utime(coco.json, ns=(times.st_atime_ns, times.st_mtime_ns))
    now = coco.json.stat()
    assert (now.st_size, now.st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    second = coco.start()
    assert coco.said("is of another content")
    assert second.coco_report.categories != first.coco_report.categories


def test_change_within_a_tick_is_noticed(coco: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    same = cache._state(coco.json)
    monkeypatch.setattr(cache, "_state", lambda path: same)
    coco.start()
    coco.start()
    assert coco.only_line().endswith(f"labels from {coco.cache}")
    coco.change(bbox=[1, 2, 3, 4])
    coco.start()
    assert coco.said("is of another content")


@pytest.mark.parametrize("is_settled", [True, False])
def test_json_that_changes_while_it_is_read_is_not_cached(
    coco: Set, monkeypatch: pytest.MonkeyPatch, is_settled: bool
) -> None:
    if is_settled:
        monkeypatch.setattr(cache, "SETTLING_NS", 0)
    else:  # within a tick, so that the times do not tell
        same = cache._state(coco.json)
        monkeypatch.setattr(cache, "_state", lambda path: same)
    data, decode = coco.data(), annotations._decode

    def changing(path: Path, kind: Any) -> Any:
        read = decode(path, kind)
        coco.change(bbox=[1, 2, 3, 4])
        return read

    with monkeypatch.context() as patch:
        patch.setattr(annotations, "_decode", changing)
        coco.start(data=data)
    assert not coco.cache.exists()
    assert coco.said("the JSON was changed while it was read")


@pytest.mark.usefixtures("settled")
def test_copied_or_touched_json_is_known_by_its_content(coco: Set) -> None:
    coco.start()
    copy = coco.json.with_name("copy")
    copy.write_bytes(coco.json.read_bytes())
    copy.replace(coco.json)
    data = coco.data()
    coco.start(data=data)
    line = f"labels from {coco.cache}"
    assert (coco.read, coco.only_line()[-len(line) :]) == ([], line)
    assert LabelCache(coco.json, coco.task).listing()  # written anew, so that the next start need not read it
    coco.start()
    assert coco.read == []


@pytest.mark.usefixtures("settled")
def test_other_code_makes_its_own_labels(coco: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    coco.start()
    monkeypatch.setattr(cache, "_code", lambda: "another")
    coco.start()
    assert len(coco.opened) == NUM_IMAGES
    assert coco.only_line().endswith(
        f"{coco.cache} was made by another version or for another task; labels are made anew"
    )


def test_code_is_named_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(Path(cache.__file__).parent, tmp_path / "coco"))
    before = cache._code()
    monkeypatch.setattr(cache, "__file__", str(folder / "cache.py"))
    assert cache._code.__wrapped__() == before
    with (folder / "segments.py").open("a") as file:
        file.write("\n")
    assert cache._code.__wrapped__() != before


def test_cache_of_another_task_is_not_taken(coco: Set) -> None:
    first = coco.start()
    other = coco.json.with_suffix(".segment.gradstab.cache")
    coco.cache.rename(other)
    assert LabelCache(coco.json, "segment").load([coco.images]).refused.startswith("was made by")
    assert_same_set(coco.start(), first)


@pytest.mark.parametrize("coco", ["pose"], indirect=True)
def test_kpt_shape_is_compared_at_each_start(coco: Set) -> None:
    coco.start()
    with pytest.raises(CocoError, match="but kpt_shape is"):
        coco.start(data={**coco.data(), "kpt_shape": [2, 3]})
    coco.start()
    assert coco.opened == []


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def foreign(kind: str, good: bytes, folder: Path) -> bytes:
    match kind:
        case "empty":
            return b""
        case "truncated":
            return good[: len(good) // 2]
        case "longer":
            return good + b"\0"
        case "garbage":
            return np.random.default_rng(0).bytes(5000)
        case "zeros":
            return bytes(len(good))
        case "pickle":
            return pickle.dumps(Bomb(folder / "exploded"))
        case _:  # the host's own kind of cache, a pickle within an array
            np.save(folder / "host.npy", np.array({"labels": Bomb(folder / "exploded")}), allow_pickle=True)
            return (folder / "host.npy").read_bytes()


@pytest.mark.parametrize("kind", ["empty", "truncated", "longer", "garbage", "zeros", "pickle", "host"])
def test_damaged_or_foreign_file_is_made_anew_with_one_line(coco: Set, tmp_path: Path, kind: str) -> None:
    first = coco.start()
    good = coco.cache.read_bytes()
    coco.cache.write_bytes(foreign(kind, good, tmp_path))
    second = coco.start()
    assert coco.only_line().endswith(f"{coco.cache} is damaged, or not ours; labels are made anew")
    assert_same_set(first, second)
    assert not (tmp_path / "exploded").exists()
    coco.start()
    assert coco.opened == []


def test_folder_in_place_of_the_cache_is_left(coco: Set) -> None:
    first = coco.start()
    coco.cache.unlink()
    coco.cache.mkdir()
    assert_same_set(first, coco.start())
    assert len(coco.of_cache()) == 2  # that it cannot be read, and that it cannot be written


@every_task
def test_no_damage_goes_unnoticed(coco: Set) -> None:
    coco.start()
    good, kept = coco.cache.read_bytes(), LabelCache(coco.json, coco.task)
    folders = [coco.images]
    assert kept.load(folders).prepared
    rng = np.random.default_rng(0)
    for place in [*range(60), *rng.integers(len(good), size=60).tolist()]:
        coco.cache.write_bytes(good[:place])
        assert kept.load(folders).refused == "is damaged, or not ours", f"{place} bytes"
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        coco.cache.write_bytes(bad)
        assert kept.load(folders).refused == "is damaged, or not ours", f"byte {place}"


def test_forged_file_with_right_checksums_raises_nothing(coco: Set) -> None:
    coco.start()
    kept = LabelCache(coco.json, coco.task)
    with coco.cache.open("rb") as file:
        header = cache._read_header(file)
        rest = file.read()
    for blocks in ([b"\xc1"], [b"\x80"], [msgspec.msgpack.encode(header), b"\x80"], [msgspec.msgpack.encode([1])]):
        with coco.cache.open("wb") as file:
            file.write(cache._MAGIC)
            for block in blocks:
                cache._write_block(file, block)
            file.write(rest)
        assert kept.load([coco.images]).refused == "is damaged, or not ours"


def test_read_only_folder_works_without(coco: Set) -> None:
    first = coco.start()
    coco.cache.unlink()
    coco.json.parent.chmod(0o555)
    try:
        second = coco.start()
        left = list(coco.json.parent.iterdir())
    finally:
        coco.json.parent.chmod(0o755)
    assert coco.only_line().endswith(
        f"labels are not cached in {coco.cache} (the folder is read-only): each start makes them anew"
    )
    assert coco.cache not in left
    assert not [path for path in left if path.suffix == ".tmp"]
    assert_same_set(first, second)


def test_full_disk_leaves_what_was_there(coco: Set) -> None:
    coco.start()
    before = coco.cache.read_bytes()
    kept = LabelCache(coco.json, coco.task)
    prepared = kept.load([coco.images]).prepared
    assert prepared
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        trouble = kept.save(prepared, [coco.images], np.ones(NUM_IMAGES, np.bool_))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert trouble == "File too large"
    assert coco.cache.read_bytes() == before
    assert not list(coco.json.parent.glob(".*"))


def test_start_that_writes_beside_others_reads_whole_files(coco: Set) -> None:
    first = coco.start()
    program = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from yolo_gradstab.coco.cache import LabelCache
        json, images = sys.argv[1:]
        kept, folders = LabelCache(json, "detect"), [Path(images)]
        made = kept.load(folders).prepared
        print("ready", flush=True)
        while kept.path.with_suffix(".go").exists():
            assert kept.save(made, folders, np.ones(len(made.labels), np.bool_)) == ""
    """
    go = coco.cache.with_suffix(".go")
    go.touch()
    command = [sys.executable, "-c", program, str(coco.json), str(coco.images)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [writer.stdout and writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
        inodes = set()
        for _ in range(150):
            kept = LabelCache(coco.json, coco.task)
            assert kept.load([coco.images]).prepared
            inodes.add(coco.cache.stat().st_ino)
    finally:
        go.unlink()
        assert [writer.wait() for writer in writers] == [0, 0]
        for writer in writers:
            assert writer.stdout
            writer.stdout.close()
    assert len(inodes) > 1  # they did write meanwhile
    assert not list(coco.json.parent.glob(".*"))
    second = coco.start()
    assert coco.opened == []
    assert_same_set(first, second)
