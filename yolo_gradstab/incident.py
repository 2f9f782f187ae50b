"""A bad batch kept: the micro-batch as it went in, the weights it met, and where it first goes bad.

The folder of an incident::

    incident.json   `Incident`: what was bad, which images, where it first went bad; read without torch
    model.json      `ModelSpec`: what the model is rebuilt from, and how it was run
    batch.npz       the micro-batch: images (uint8 where that is exact, else float32) and labels, numpy only
    weights.npz     weights and buffers before the step
    batch.jpg       the images with their labels drawn, pixels that are not finite in magenta

An incident costs one more forward and backward pass and leaves the training as it found it; a healthy run pays nothing.
`replay` reads the folder again. Importing this module loads neither torch nor ultralytics.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from yolo_gradstab.config import Mitigations
from yolo_gradstab.localisation import FirstBad, localise_worst, unwrapped
from yolo_gradstab.runs import one_line, replacing, versions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "BATCH_ARRAYS",
    "LOSS_ARGS",
    "MAX_BYTES",
    "NOT_LOCALISED",
    "PER_LABEL",
    "TASK_MODELS",
    "YAML_KEYS",
    "FirstBad",
    "ImageNote",
    "Incident",
    "IncidentError",
    "ModelSpec",
    "TensorNorm",
    "capture",
    "image_notes",
    "images_of",
    "labels_are_sound",
    "read_incident",
    "read_json",
    "sha256_of",
    "to_array",
]

log = logging.getLogger(__name__)

FORMAT = 1  # of the folder
MAX_BYTES = 512 * 2**20  # of batch and weights together, as written and as read
MAX_JSON_BYTES = 16 * 2**20

NUM_TENSORS = 20  # gradients named in an incident
NUM_PROBLEMS = 8  # named per image
NOT_LOCALISED = "not localised"  # in a note: the rerun itself failed

PIXEL_MARGIN = 1e-3  # beyond 0..1 by which a pixel may be off
BOX_MARGIN = 1e-3  # of the image's side, by which a box may be larger
KEYPOINT_MARGIN = 0.01  # of the image's side; the host hides key points that fall outside

# The host's model class of each task. Its other classes need more than a YAML dictionary to be rebuilt.
TASK_MODELS = {
    "detect": "DetectionModel",
    "pose": "PoseModel",
    "segment": "SegmentationModel",
    "obb": "OBBModel",
    "classify": "ClassificationModel",
}
# What parse_model and the model classes read of a model's dictionary, and the losses of the host's arguments.
YAML_KEYS = (
    "nc", "scales", "scale", "depth_multiple", "width_multiple", "backbone", "head", "activation", "end2end", "reg_max",
    "kpt_shape", "channels", "inplace",
)  # fmt: skip
LOSS_ARGS = ("box", "cls", "dfl", "pose", "kobj", "rle", "angle", "epochs", "overlap_mask")
# Arrays of a batch that the losses read, and how many dimensions each has.
BATCH_ARRAYS = {
    "img": (4,), "cls": (1, 2), "bboxes": (2,), "batch_idx": (1,), "keypoints": (3,), "masks": (3,), "sem_masks": (3,)
}  # fmt: skip
PER_LABEL = ("cls", "bboxes", "batch_idx", "keypoints")

# The picture.
MOSAIC_IMAGES = 16
MOSAIC_SIDE = 1920  # pixels, at most
TILE_SIDE = 320  # pixels, at least, so that text can be read
NUM_DRAWN_PROBLEMS = 4  # per image
FONT_SCALE = 0.4
LINE_HEIGHT = 16  # pixels
MAGENTA = (255, 0, 255)  # BGR, as all colours here
RED = (60, 60, 255)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)

Pixels = Literal["divided", "multiplied", "float32"]
_Content = TypeVar("_Content")
_Image = npt.NDArray[np.uint8]  # (height, width, 3), BGR


class IncidentError(ValueError):
    """A folder that is not an incident that can be read or rerun; the message is one line and names the file."""


# What is kept -------------------------------------------------------------------------------------------------------


class TensorNorm(msgspec.Struct, frozen=True):
    """The gradient of one parameter; null where its norm is not finite."""

    name: str
    norm: float | None


class ImageNote(msgspec.Struct, kw_only=True):
    """One image of the batch.

    Attributes:
        path: As the loader named it.
        nonfinite: Pixels of which a channel is NaN or inf.
        min, max: Of the finite values; 0 to 1 is normal.
        labels: How many.
        problems: In words, at most `NUM_PROBLEMS` and a count.
        bad_labels, bad_pixels: Which kind they are of.
    """

    path: str
    nonfinite: int
    min: float | None
    max: float | None
    labels: int
    problems: list[str] = []
    bad_labels: bool = False
    bad_pixels: bool = False


class Incident(msgspec.Struct, kw_only=True):
    """`incident.json`.

    Attributes:
        step, epoch, batch: As in the step records.
        reason: Of the skip, the kind of divergence, ``spike``, or ``input`` for what was noticed before any trouble.
        task: Of the model.
        loss, losses: Of the step, as the trainer summed them; null where not finite.
        total_norm: Of the gradient before clipping.
        tensors: Gradients, those that are not finite first, in forward order, then the largest.
        weights_sha256: Over names and bytes of weights and buffers, in order.
        nonfinite_weights: Parameters holding NaN or inf.
        images: Of the micro-batch that was kept.
        first_bad: Null where nothing stands out.
        versions: Of what decides the numbers.
        note: What could not be done or kept, in words.
    """

    step: int
    epoch: int
    batch: int
    reason: str
    task: str
    loss: float | None
    losses: dict[str, float | None]
    total_norm: float | None
    tensors: list[TensorNorm]
    format: int = FORMAT
    weights_sha256: str = ""
    nonfinite_weights: list[str] = []
    images: list[ImageNote] = []
    first_bad: FirstBad | None = None
    versions: dict[str, str] = {}
    note: str = ""


class ModelSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`model.json`: what the model is rebuilt from, and how it was run.

    Attributes:
        task: Key of `TASK_MODELS`.
        yaml: The host's model dictionary.
        mitigations: What was changed in the model that the host builds from it.
        args: What the losses read of the host's arguments.
        autocast: The dtype of mixed precision.
        scale: By which the loss was multiplied (fp16).
        evaluating: Modules in evaluation mode (frozen BatchNorm).
        frozen: Parameters without a gradient.
        class_weights, kpt_oks_sigmas: What the losses read of the model.
        branch_gains: Of an end-to-end loss, which the host changes from epoch to epoch.
        pixels: How the images of `batch.npz` become those of the batch.
    """

    task: str
    yaml: dict[str, Any]
    format: int = FORMAT
    mitigations: Mitigations = Mitigations()
    args: dict[str, bool | int | float | None] = {}
    autocast: Literal["float16", "bfloat16"] | None = None
    scale: float = 1.0
    evaluating: list[str] = []
    frozen: list[str] = []
    class_weights: list[float] | None = None
    kpt_oks_sigmas: list[float] | None = None
    branch_gains: dict[Literal["o2m", "o2o"], float] = {}
    pixels: Pixels = "float32"


class _Format(msgspec.Struct):
    format: int


def read_incident(path: str | Path) -> Incident:
    """Read `incident.json` of an incident's folder; loads neither torch nor ultralytics.

    Raises:
        IncidentError: It is missing, damaged, or of another format.
    """
    return read_json(Path(path) / "incident.json", Incident)


def read_json(path: Path, kind: type[_Content]) -> _Content:
    """Read one of the folder's JSON files.

    Raises:
        IncidentError: It is missing, damaged, or of another format.
    """
    data = _read_small(path)
    try:
        number = msgspec.json.decode(data, type=_Format).format
        if number != FORMAT:
            raise IncidentError(f"{path}: format {number}, this version reads format {FORMAT}")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise IncidentError(f"{path}: {one_line(error)}") from None


def _read_small(path: Path) -> bytes:
    if not path.is_file():  # nor a pipe, which would never end
        raise IncidentError(
            f"{path}: no such file, so not an incident; give a folder such as RUN/gradstab/incidents/12"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise IncidentError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_JSON_BYTES:
        raise IncidentError(f"{path}: larger than {MAX_JSON_BYTES // 2**20} MB, which no incident is")
    return data


def capture(
    folder: str | Path,
    *,
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    losses: Mapping[str, float],
    step: int,
    epoch: int,
    batch: int,
    reason: str,
    task: str,
    total_norm: float,
    grads: Mapping[str, float],
    loss: float = math.nan,
    autocast_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    max_bytes: int = MAX_BYTES,
) -> Incident:
    """Keep the micro-batch that shows the trouble, and say where it first goes bad.

    To be called before the step changes the weights. The model, its buffers, `p.grad` and every random state are as
    before afterwards, so a run with a capture equals one without. Costs a forward pass per micro-batch if there are
    several, and one forward and backward pass. Never raises for want of disk or memory: what could not be done stands
    in the incident's `note`.

    Args:
        folder: Where it goes, replaced as a whole if it is there.
        model: As trained; DDP and compiled models are unwrapped.
        batches: What `preprocess_batch` returned since the last optimizer step, in order. Of several, the first with a
            loss that is not finite is kept, else the one with the largest loss; where the gradient is not finite, the
            first of these that shows it.
        losses: Components as the trainer has them.
        step, epoch, batch: As in the step records.
        reason: As `Incident` has it.
        task: The host's.
        total_norm: Of the gradient before clipping.
        grads: Norm of each gradient tensor by parameter name, in forward order.
        loss: Per image.
        autocast_dtype: Of mixed precision; None runs in full.
        scale: Of the gradient scaler.
        max_bytes: Of arrays on disk. Beyond it the weights are left out, then the images; at most `MAX_BYTES`.
    """
    folder = Path(folder)
    notes: list[str] = []
    incident = Incident(
        step=step,
        epoch=epoch,
        batch=batch,
        reason=reason,
        task=task,
        loss=_finite(loss),
        losses={name: _finite(value) for name, value in losses.items()},
        total_norm=_finite(total_norm),
        tensors=_worst(grads),
        versions=versions(),
    )
    whole = unwrapped(model)
    index = 0
    with _noted(notes, NOT_LOCALISED):
        nonfinite = not all(map(math.isfinite, [total_norm, *grads.values()]))
        index, incident.first_bad = localise_worst(
            whole, batches, nonfinite=nonfinite, autocast_dtype=autocast_dtype, scale=scale
        )
    arrays: dict[str, npt.NDArray[Any]] = {}
    with _noted(notes, "images and labels not read"):
        arrays = _arrays(batches[index])
        # A name that is no UTF-8 cannot be written down as it is, and to draw it would end the process.
        paths = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in batches[index].get("im_file", ())]
        incident.images = image_notes(arrays, paths=paths, num_classes=_num_classes(whole))
    weights: dict[str, npt.NDArray[Any]] = {}
    with _noted(notes, "weights not read"):
        weights = {name: to_array(tensor) for name, tensor in whole.state_dict().items()}
        incident.weights_sha256 = sha256_of(weights)
        parameters = [name for name, _ in whole.named_parameters()]  # BatchNorm's statistics this very batch may spoil
        incident.nonfinite_weights = [name for name in parameters if not np.isfinite(weights[name]).all()]
    spec: ModelSpec | None = None
    with _noted(notes, "model not described, so no replay"):
        spec = _spec(whole, task=task, autocast_dtype=autocast_dtype, scale=scale)
    with _noted(notes, "not written"), _replacing_folder(folder) as temporary:
        with _noted(notes, "no picture"):
            (temporary / "batch.jpg").write_bytes(_picture(arrays, incident.images))
        with _noted(notes, "batch and weights not written"):
            _write_arrays(temporary, arrays, weights, spec, limit=min(max_bytes, MAX_BYTES), notes=notes)
        incident.note = "; ".join(notes)
        _write_json(temporary / "incident.json", incident)
    incident.note = "; ".join(notes)
    if incident.note:
        log.warning("%s: an incident was not kept in full (%s)", folder, incident.note)
    return incident


@contextmanager
def _noted(notes: list[str], what: str) -> Iterator[None]:
    """An incident must not end a training that would have gone on: what fails here is noted, and left out."""
    try:
        yield
    except Exception as error:
        notes.append(f"{what}: {one_line(error)}")


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _worst(norms: Mapping[str, float]) -> list[TensorNorm]:
    bad = [TensorNorm(name, None) for name, norm in norms.items() if not math.isfinite(norm)]
    largest = sorted(((norm, name) for name, norm in norms.items() if math.isfinite(norm)), reverse=True)
    return (bad + [TensorNorm(name, norm) for norm, name in largest])[:NUM_TENSORS]


def _arrays(batch: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The batch's tensors that the losses read, as they are, on the host."""
    import torch

    return {name: to_array(torch.as_tensor(batch[name])) for name in BATCH_ARRAYS if name in batch}


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    """On the host, contiguous, in a type that numpy has."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        tensor = tensor.float()
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(tuple(tensor.shape))


def sha256_of(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Over names and bytes, in order."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(name.encode() + b"\0")
        digest.update(array.tobytes())
    return digest.hexdigest()


def _spec(model: Any, *, task: str, autocast_dtype: torch.dtype | None, scale: float) -> ModelSpec:
    if TASK_MODELS.get(task) != type(model).__name__:  # RT-DETR's task is detect, too
        raise ValueError(f"{type(model).__name__} is none of {', '.join(TASK_MODELS.values())}")
    from yolo_gradstab.mitigations import structure_of

    args = model.args if isinstance(model.args, dict) else vars(model.args)
    weights = getattr(model, "class_weights", None)
    sigmas = getattr(model, "kpt_oks_sigmas", None)
    criterion = getattr(model, "criterion", None)
    return ModelSpec(
        task=task,
        yaml={key: msgspec.to_builtins(model.yaml[key]) for key in YAML_KEYS if key in model.yaml},
        mitigations=structure_of(model),
        args={name: args[name] for name in LOSS_ARGS if name in args},
        autocast=None if autocast_dtype is None else str(autocast_dtype).removeprefix("torch."),  # type: ignore[arg-type]
        scale=scale,
        evaluating=[name for name, module in model.named_modules() if not module.training],
        frozen=[name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        class_weights=None if weights is None else weights.flatten().tolist(),
        kpt_oks_sigmas=None if sigmas is None else np.asarray(sigmas, dtype=float).flatten().tolist(),
        branch_gains={name: float(getattr(criterion, name)) for name in ("o2m", "o2o") if hasattr(criterion, name)},
    )


def _write_arrays(
    folder: Path,
    arrays: dict[str, npt.NDArray[Any]],
    weights: dict[str, npt.NDArray[Any]],
    spec: ModelSpec | None,
    *,
    limit: int,
    notes: list[str],
) -> None:
    """What fits, and a note of what does not."""
    if "img" in arrays and spec is not None:
        images, spec.pixels = _exact_pixels(arrays["img"].astype(np.float32))
        arrays = {**arrays, "img": images}
    size = sum(array.nbytes for array in arrays.values())
    if size + sum(array.nbytes for array in weights.values()) > limit:
        notes.append(f"weights left out: with the batch they exceed {limit / 1e6:.3g} MB")
        weights = {}
    if size > limit:
        notes.append(f"images left out: they exceed {limit / 1e6:.3g} MB")
        arrays = {name: array for name, array in arrays.items() if name in PER_LABEL}
    if spec is not None:
        _write_json(folder / "model.json", spec)
    if arrays:
        with replacing(folder / "batch.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes `allow_pickle` for one
    if weights:
        with replacing(folder / "weights.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **weights)  # type: ignore[arg-type]


def _exact_pixels(images: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], Pixels]:
    """Images as bytes if these give the same bits back: an accelerator multiplies by 1/255 where a CPU divides."""
    if ((images >= 0) & (images <= 1)).all():  # NaN is not
        pixels = np.rint(images * 255).astype(np.uint8)
        ways: tuple[Pixels, ...] = ("divided", "multiplied")
        for way in ways:
            if np.array_equal(images_of(pixels, way).view(np.uint32), images.view(np.uint32)):
                return pixels, way
    return images, "float32"


def images_of(pixels: npt.NDArray[Any], way: Pixels) -> npt.NDArray[np.float32]:
    """The images as they went in, from what `batch.npz` holds."""
    values = pixels.astype(np.float32)
    if way == "divided":
        return values / np.float32(255)
    return values * (np.float32(1) / np.float32(255)) if way == "multiplied" else values


def _write_json(path: Path, content: msgspec.Struct) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder`, in one rename, if the block ends without an error."""
    token = secrets.token_hex(4)
    temporary, old = (folder.with_name(f".{folder.name}.{token}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():  # of the same step before a resume or a rollback
            folder.replace(old)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def image_notes(
    arrays: Mapping[str, npt.NDArray[Any]], *, paths: Sequence[str] = (), num_classes: int | None = None
) -> list[ImageNote]:
    """What is wrong with each image of a batch and its labels.

    Args:
        arrays: ``img`` of shape (images, channels, height, width), normally 0 to 1; optionally ``cls``, ``bboxes``
            (labels, 4) as centre and size relative to the image, ``batch_idx`` (labels,) and ``keypoints`` (labels,
            points, 2 or 3) relative to the image, the third being visibility.
        paths: Of the images.
        num_classes: Of the model.
    """
    images = arrays["img"]
    owners = arrays.get("batch_idx", np.arange(len(arrays.get("cls", ()))))
    notes = []
    for index, image in enumerate(images):
        path = paths[index] if index < len(paths) else "?"
        finite = np.isfinite(image)
        values = image[finite]
        nonfinite = int((~finite).any(axis=0).sum())
        low, high = (float(values.min()), float(values.max())) if values.size else (None, None)
        pixel_problems = (
            [f"{nonfinite} {'pixels are' if nonfinite > 1 else 'pixel is'} not finite"] if nonfinite else []
        )
        if low is not None and high is not None and (low < -PIXEL_MARGIN or high > 1 + PIXEL_MARGIN):
            pixel_problems.append(f"pixels from {low:.4g} to {high:.4g}, normal is 0 to 1")
        mine = np.flatnonzero(owners.reshape(-1) == index)
        labels = {name: arrays[name][mine] for name in PER_LABEL if name in arrays and name != "batch_idx"}
        label_problems = _label_problems(labels, num_classes)
        problems = pixel_problems + label_problems
        if len(problems) > NUM_PROBLEMS:
            problems = [*problems[:NUM_PROBLEMS], f"and {len(problems) - NUM_PROBLEMS} more"]
        notes.append(
            ImageNote(
                path=path,
                nonfinite=nonfinite,
                min=low,
                max=high,
                labels=len(mine),
                problems=problems,
                bad_labels=bool(label_problems),
                bad_pixels=bool(pixel_problems),
            )
        )
    return notes


def labels_are_sound(batch: Mapping[str, Any], *, num_classes: int | None = None) -> bool:
    """Whether `image_notes` would find nothing wrong with the labels; quick, since every batch is asked.

    Args:
        batch: ``cls``, ``bboxes`` and ``keypoints`` as there, arrays or tensors; on an accelerator they are believed.
        num_classes: Of the model.
    """
    here = {name: value for name, value in batch.items() if str(getattr(value, "device", "cpu")) == "cpu"}
    boxes, classes, points = (np.asarray(here.get(name, ())) for name in ("bboxes", "cls", "keypoints"))
    wrong = (classes < 0) | (classes >= (num_classes or math.inf)) | (classes != np.rint(classes))
    if wrong.any():  # NaN is, too
        return False
    if boxes.ndim == 2 and boxes.shape[1] == 4:
        centre, size = boxes[:, :2], boxes[:, 2:]
        inside = (centre + size / 2 > 0) & (centre - size / 2 < 1)
        if not (np.isfinite(boxes).all() and (inside & (size > 0) & (size <= 1 + BOX_MARGIN)).all()):
            return False
    if points.ndim == 3 and points.shape[-1] > 2:
        seen = points[points[..., 2] > 0, :2]
        off = (seen < -KEYPOINT_MARGIN) | (seen > 1 + KEYPOINT_MARGIN)
        return bool(np.isfinite(points).all() and not off.any())
    return bool(np.isfinite(points).all())


def _label_problems(labels: Mapping[str, npt.NDArray[Any]], num_classes: int | None) -> list[str]:
    problems = [
        f"box {i} {problem}" for i, box in enumerate(labels.get("bboxes", ())) if (problem := _box_problem(box))
    ]
    for value in labels.get("cls", np.zeros(0)).reshape(-1).tolist():
        if not math.isfinite(value) or value != int(value) or value < 0 or (num_classes and value >= num_classes):
            problems.append(f"class {value:g} of {num_classes or '?'}")
    for i, points in enumerate(labels.get("keypoints", ())):
        if not np.isfinite(points).all():
            problems.append(f"key points of box {i} are not finite")
        # Without visibility there is no telling a point that was cut off from one that never was on the map.
        elif points.shape[-1] > 2:
            seen = points[points[:, 2] > 0, :2]
            if ((seen < -KEYPOINT_MARGIN) | (seen > 1 + KEYPOINT_MARGIN)).any():
                problems.append(f"key point of box {i} off the map")
    return problems


def _box_problem(box: npt.NDArray[Any]) -> str | None:
    """What is wrong with one box of centre, size and perhaps an angle, or None."""
    if not np.isfinite(box).all():
        return "is not finite"
    x, y, width, height = (float(value) for value in box[:4])
    if width < 0 or height < 0:
        return f"has negative size ({width:.3g} x {height:.3g})"
    if width == 0 or height == 0:
        return "has zero size"
    if len(box) > 4:  # a rotated box may be longer than the image is wide
        return None
    if width > 1 + BOX_MARGIN or height > 1 + BOX_MARGIN:
        return f"is larger than the image ({width:.3g} x {height:.3g} of it)"
    outside = any(c + size / 2 <= 0 or c - size / 2 >= 1 for c, size in ((x, width), (y, height)))
    return "lies outside the image" if outside else None


def _num_classes(model: Any) -> int | None:
    number = getattr(model, "yaml", {}).get("nc")
    return number if isinstance(number, int) else None


def _picture(arrays: Mapping[str, npt.NDArray[Any]], notes: Sequence[ImageNote]) -> bytes:
    """JPEG of the images with labels drawn; where there are too many, those with problems first."""
    import cv2

    images = arrays["img"]
    order = sorted(range(len(images)), key=lambda i: not notes[i].problems)[:MOSAIC_IMAGES]
    across = math.ceil(len(order) ** 0.5)
    height, width = images.shape[2:]
    # Enlarged by a whole factor, so that a pixel stays a pixel.
    scale = max(1.0, math.ceil(TILE_SIDE / max(height, width)))
    scale = min(scale, MOSAIC_SIDE / across / max(height, width))
    tiles = [_tile(arrays, index, notes[index], scale) for index in sorted(order)]
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % across)
    rows = [np.hstack(tiles[i : i + across]) for i in range(0, len(tiles), across)]
    done, data = cv2.imencode(".jpg", np.vstack(rows))
    if not done:
        raise ValueError("the picture could not be encoded")
    return bytes(data)


def _tile(arrays: Mapping[str, npt.NDArray[Any]], index: int, note: ImageNote, scale: float) -> _Image:
    import cv2

    image = arrays["img"][index]
    shown = np.repeat(image[:1], 3, axis=0) if len(image) < 3 else image[:3]  # grey; or more than RGB
    pixels = (np.clip(np.nan_to_num(shown, nan=0.0), 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)[..., ::-1]
    bad = (~np.isfinite(image)).any(axis=0).astype(np.uint8)
    size = (max(1, round(image.shape[2] * scale)), max(1, round(image.shape[1] * scale)))
    way = cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA
    tile = np.asarray(cv2.resize(np.ascontiguousarray(pixels), size, interpolation=way), dtype=np.uint8)
    tile[cv2.resize(bad * 255, size, interpolation=way) > 0] = MAGENTA
    owners = arrays.get("batch_idx", np.zeros(0)).reshape(-1)
    for label in np.flatnonzero(owners == index).tolist():
        _draw_label(tile, {name: arrays[name][label].astype(float) for name in PER_LABEL if name in arrays})
    cv2.rectangle(tile, (0, 0), (size[0] - 1, size[1] - 1), WHITE, 1)
    _write(tile, f"{index} {Path(note.path).name}", (4, LINE_HEIGHT), WHITE)
    for line, problem in enumerate(note.problems[:NUM_DRAWN_PROBLEMS], 2):
        _write(tile, problem, (4, LINE_HEIGHT * line), RED)
    return tile


def _draw_label(tile: _Image, label: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Box, class and key points, as far as they are numbers; drawn no further off than the tile is wide."""
    import cv2

    height, width = tile.shape[:2]
    size = np.array([width, height])

    def place(point: npt.NDArray[np.float64]) -> tuple[int, int]:
        x, y = np.clip(point * size, -size, 2 * size).astype(int).tolist()
        return x, y

    number = float(label["cls"].reshape(-1)[0]) if "cls" in label else 0.0
    colour = _colour(number)
    box = label.get("bboxes")
    if box is not None and np.isfinite(box).all():
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * box[2:4] * size / 2  # in pixels, about the centre
        cosine, sine = (np.cos(box[4]), np.sin(box[4])) if len(box) > 4 else (1.0, 0.0)  # a rotated box has an angle
        turned = corners @ np.array([[cosine, sine], [-sine, cosine]])
        points = [place((corner + box[:2] * size) / size) for corner in turned]
        cv2.polylines(tile, [np.array(points, dtype=np.int32)], True, colour, 2)
        x, y = points[0]
        at = (min(max(x, 0), width - 2 * LINE_HEIGHT) + 3, min(max(y, 0), height - LINE_HEIGHT) + LINE_HEIGHT)
        _write(tile, f"{number:g}", at, colour)
    for point in label.get("keypoints", ()):
        if np.isfinite(point).all() and (len(point) == 2 or point[2] > 0):  # the third is visibility
            cv2.circle(tile, place(point[:2]), 3, colour, -1)


def _colour(number: float) -> tuple[int, int, int]:
    """A colour per class, apart by the golden angle."""
    import cv2

    hue = (
        int(number * 69) % 180 if math.isfinite(number) else 0
    )  # half degrees; 180 times the golden section is about 69
    blue, green, red = cv2.cvtColor(np.array([[[hue, 200, 255]]], dtype=np.uint8), cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def _write(tile: _Image, text: str, at: tuple[int, int], colour: tuple[int, int, int]) -> None:
    import cv2

    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, 1)
    cv2.rectangle(tile, (at[0] - 2, at[1] - height - 2), (at[0] + width + 2, at[1] + 3), BLACK, -1)
    cv2.putText(tile, text, at, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, colour, 1, cv2.LINE_AA)
