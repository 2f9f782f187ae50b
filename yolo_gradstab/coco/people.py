"""Articulated figures for a drawn pose set, with COCO's seventeen keypoints.

A figure faces the viewer, so its left is on the right of the image. Lengths are shares of its height.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from yolo_gradstab.coco.scene import Colour, Figure, Part, mixed, turned, vivid

__all__ = ["KEYPOINTS", "SKELETON", "sketch_person"]

KEYPOINTS = [
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
]  # fmt: skip
SKELETON = [  # as in COCO: pairs of keypoints, numbered from 1
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9],
    [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
]  # fmt: skip
MOST_PEOPLE = 3

_TORSO, _NECK, _HEAD = 0.30, 0.115, 0.075  # hip to shoulder line, shoulder line to head centre, head radius
_SHOULDER, _HIP = 0.105, 0.065  # half widths
_UPPER_ARM, _FOREARM, _THIGH, _SHIN = 0.165, 0.15, 0.235, 0.235
_SKIN: tuple[Colour, ...] = ((175, 205, 240), (120, 165, 215), (80, 120, 175), (50, 80, 125))  # BGR

Floats = npt.NDArray[np.float64]


def sketch_person(rng: np.random.Generator, size: int, num_objects: int, dark: bool) -> Figure:
    """Propose a figure 55 to 95 % of the image high (75 % where there are several)."""
    height = size * rng.uniform(0.55, 0.95 if num_objects == 1 else 0.75)
    joints = _joints(rng)
    middle = (joints.min(0) + joints.max(0)) / 2
    free = 0.5 - min(0.45, 0.3 * height / size)  # mostly inside, now and then a limb outside
    centre = size * (0.5 + rng.uniform(-free, free, 2))
    points = centre + (joints - middle) * height
    return _figure(rng, points, height, dark)


def _joints(rng: np.random.Generator) -> Floats:
    """Return the keypoints of a random pose, hips at the origin, y downwards."""
    lean = np.radians(rng.uniform(-14, 14))
    tilt = lean + np.radians(rng.uniform(-18, 18))
    head = np.array([[0.0, -_TORSO - _NECK]])
    gaze = rng.uniform(-0.02, 0.02)  # the face turns a little to a side
    face = np.array([[gaze, 0.012], [0.028 + gaze, -0.016], [-0.028 + gaze, -0.016], [0.068, 0.0], [-0.068, 0.0]])
    joints = np.zeros((len(KEYPOINTS), 2))
    joints[:5] = turned(head, lean) + turned(face, tilt)
    for side, sign in ((0, 1.0), (1, -1.0)):  # the figure's left is to the right of the image
        shoulder = turned(np.array([[sign * _SHOULDER, -_TORSO]]), lean)[0]
        hip = np.array([sign * _HIP, 0.0])
        raised, bent = np.radians(rng.uniform(-5, 140)), np.radians(rng.uniform(-20, 120))
        elbow = shoulder + _UPPER_ARM * _down(sign * raised)
        wrist = elbow + _FOREARM * _down(sign * (raised + bent * rng.choice([-1.0, 1.0])))
        spread, knee_bent = np.radians(rng.uniform(-3, 42)), np.radians(rng.uniform(0, 38))
        knee = hip + _THIGH * _down(sign * spread)
        ankle = knee + _SHIN * _down(sign * (spread - knee_bent))
        joints[5 + side :: 2][:6] = [shoulder, elbow, wrist, hip, knee, ankle]
    return joints


def _down(angle: float) -> Floats:
    """Return the unit vector that hangs down, swung outwards (to the right for positive angles)."""
    return np.array([np.sin(angle), np.cos(angle)])


def _figure(rng: np.random.Generator, points: Floats, height: float, dark: bool) -> Figure:
    """Dress the joints: trousers, shirt, arms before or behind the trunk, head and face on top."""
    shirt, trousers = vivid(rng, dark=dark), vivid(rng, dark=dark)
    skin = _SKIN[int(rng.integers(len(_SKIN)))]
    parts: list[Part] = []
    owners: list[set[int]] = [set() for _ in KEYPOINTS]

    def paint(names: str, colour: Colour, radius: float, *, polygon: bool = False) -> None:
        indices = [KEYPOINTS.index(name) for name in names.split()]
        for index in indices:
            owners[index].add(len(parts))
        parts.append(Part(points[indices], colour, radius * height))
        if polygon:  # thick outline and filling are two parts of one piece
            for index in indices:
                owners[index].add(len(parts))
            parts.append(Part(points[indices], colour))

    def paint_arm(side: str) -> None:
        paint(f"{side}_shoulder {side}_elbow", mixed(shirt, (0, 0, 0), 0.18), 0.028)
        paint(f"{side}_elbow {side}_wrist", skin, 0.024)

    behind = {side: bool(rng.random() < 0.4) for side in ("left", "right")}
    for side in behind:
        paint(f"{side}_hip {side}_knee", trousers, 0.038)
        paint(f"{side}_knee {side}_ankle", mixed(trousers, (0, 0, 0), 0.15), 0.030)
    for side in (side for side, hidden in behind.items() if hidden):
        paint_arm(side)
    paint("left_shoulder right_shoulder right_hip left_hip left_shoulder", shirt, 0.030, polygon=True)
    for side in (side for side, hidden in behind.items() if not hidden):
        paint_arm(side)
    _paint_head(parts, owners, points, skin, height)
    return Figure(0, parts, points, [frozenset(own) for own in owners])


def _paint_head(parts: list[Part], owners: list[set[int]], points: Floats, skin: Colour, height: float) -> None:
    """Add neck, ears, head and face; the five points of the head are shown by any of them."""
    nose, eyes, ears = points[0], points[1:3], points[3:5]
    centre, neck = ears.mean(0), points[5:7].mean(0)
    first = len(parts)
    parts.append(Part(np.stack([neck, centre]), mixed(skin, (0, 0, 0), 0.12), 0.026 * height))
    parts += [Part(ear[None], mixed(skin, (0, 0, 0), 0.2), 0.018 * height) for ear in ears]
    parts.append(Part(centre[None], skin, _HEAD * height))
    parts += [Part(eye[None], (30, 25, 25), 0.010 * height) for eye in eyes]
    parts.append(Part(nose[None], mixed(skin, (0, 0, 150), 0.45), 0.010 * height))
    for own in owners[:5]:
        own.update(range(first, len(parts)))
