"""The fuzzer on few inputs, in the suite; and that it would notice."""

from pathlib import Path
from typing import Any

import pytest

import yolo_gradstab.coco
from trust.fuzz_coco import fuzz


def test_broken_files_are_taken_in_order_or_refused_in_one_line(tmp_path: Path) -> None:
    tried = fuzz(tmp_path / "set", inputs=1500, seed=7)
    assert tried.accepted > 300
    assert tried.refused > 300


@pytest.mark.parametrize("error", [KeyError("images"), yolo_gradstab.coco.CocoError("two\nlines")])
def test_a_crash_and_a_refusal_of_two_lines_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(yolo_gradstab.coco, "check_coco", broken)
    with pytest.raises(AssertionError, match="input "):
        fuzz(tmp_path / "set", inputs=3, seed=0)


def test_labels_out_of_order_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_gradstab.coco import labels

    make = labels.make_labels

    def shifted(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        for image in made.images:
            image.boxes[...] += 1
        return made

    monkeypatch.setattr(labels, "make_labels", shifted)
    with pytest.raises(AssertionError, match="a box is out of range"):
        fuzz(tmp_path / "set", inputs=200, seed=0)
