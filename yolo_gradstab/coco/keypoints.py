"""The keypoint layout of a pose set: how many points, their names, and which swap when an image is mirrored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from yolo_gradstab.coco.annotations import CocoCategory, CocoError

__all__ = ["KeypointLayout", "flip_index", "keypoint_layout"]

# `left_eye`, `eye-left`, `LeftEye`, `L_Eye`: words are split at punctuation and before capitals.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
_SIDE = re.compile(r"left|right", re.IGNORECASE)
_GLUED = re.compile(r"(left|right)(\w+)|(\w+?)(left|right)")  # `lefteye`, `eyeright`


@dataclass(frozen=True, slots=True)
class KeypointLayout:
    """The points every pose category of a set shares."""

    names: list[str]
    flip_idx: list[int] | None
    """None where the names tell no side of any of several points: which of them swap is not known."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, such as a left point whose right counterpart is missing."""

    @property
    def shape(self) -> list[int]:
        """The host's `kpt_shape`: points, and x, y, visibility."""
        return [len(self.names), 3]


def keypoint_layout(categories: Sequence[CocoCategory], path: str) -> KeypointLayout:
    """Return the layout the categories share; categories without keypoints do not take part.

    Raises:
        CocoError: If no category has keypoints, or two have different numbers of them: a pose model has one number.
    """
    posed = [category for category in categories if category.keypoints]
    if not posed:
        raise CocoError(f"{path}: no category has `keypoints`; pose needs their names there, use task=detect otherwise")
    first = posed[0]
    names = list(first.keypoints or ())
    notes: list[str] = []
    for other in posed[1:]:
        if len(other.keypoints or ()) != len(names):
            raise CocoError(
                f"{path}: category {first.id} ({first.name}) has {len(names)} keypoints, category {other.id} "
                f"({other.name}) has {len(other.keypoints or ())}; a pose model needs one number, split the file"
            )
        if other.keypoints != names:
            notes.append(f"keypoint names of category {other.name} differ from those of {first.name}, which are used")
    flip_idx, unpaired = flip_index(names)
    notes += [
        f"keypoint {name} has no counterpart on the other side; mirrored images keep it as it is" for name in unpaired
    ]
    is_known = len(names) == 1 or bool(unpaired) or flip_idx != list(range(len(names)))
    if not is_known:
        notes.append(
            "no keypoint names tell a left from a right one, so images are not mirrored; give flip_idx in the data YAML"
        )
    return KeypointLayout(names=names, flip_idx=flip_idx if is_known else None, notes=notes)


def flip_index(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return for each point the one it becomes in a mirrored image, and the names with a side but no counterpart.

    >>> flip_index(["nose", "left_eye", "right_eye"])
    ([0, 2, 1], [])
    """
    words = [tuple(part for word in _WORD.findall(name) for part in _parted(word.lower())) for name in names]
    place = {key: index for index, key in enumerate(words)}
    mirrored = [place.get(tuple(_OTHER_SIDE.get(word, word) for word in key)) for key in words]
    # `lsho` and `rsho`, or `Lshoulder`: a letter that is a side only because the other name is there.
    letters = {name.lower(): index for index, name in enumerate(names)}
    if len(letters) == len(names):
        for name, i in letters.items():
            other = _OTHER_SIDE.get(name[:1], "") + name[1:]
            if mirrored[i] in {None, i} and other in letters:
                mirrored[i] = letters[other]
    flip = [i if j is None or mirrored[j] != i else j for i, j in enumerate(mirrored)]  # a swap must go both ways
    return flip, [name for i, name in enumerate(names) if flip[i] == i and _SIDE.search(name)]


def _parted(word: str) -> list[str]:
    """A word, or the side and the rest where they are written as one."""
    glued = _GLUED.fullmatch(word)
    return [part for part in glued.groups() if part] if glued else [word]
