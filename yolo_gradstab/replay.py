"""Rerun a captured batch later, on any machine, loading nothing that can execute code.

Arrays are read by name, type and declared size, each checked before its data, and never unpickled. A model is built
only from module names and words that stand in the host's own model files, since the host looks names up in its own
globals and calls `eval()` on an activation; and only if this machine can hold what it would compute. A checkpoint is a
pickle: the host loads it, and only if it is named.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolo_gradstab.incident import (
    BATCH_ARRAYS,
    LOSS_ARGS,
    MAX_BYTES,
    PER_LABEL,
    TASK_MODELS,
    YAML_KEYS,
    IncidentError,
    ModelSpec,
    images_of,
    read_incident,
    read_json,
    sha256_of,
    to_array,
)
from yolo_gradstab.localisation import FirstBad, localise, seeded, tensors_in
from yolo_gradstab.runs import one_line

__all__ = ["check_weights", "replay"]

SCRATCH = "scratch"  # in place of a checkpoint: fresh weights

DTYPES = {"uint8", "int32", "int64", "float16", "float32", "float64"}
MAX_MEMBERS = 20_000  # arrays of one file; the largest stock model has about 2,000
MAX_HEADER_BYTES = 10_000  # of one array, numpy's own limit
MAX_SHOWN = 80  # characters of a value in a message

MAX_LAYERS = 200  # the largest stock model has 43
MAX_REPEATS = 500  # of all layers together; the largest stock sum is 70
MAX_ARGUMENTS = 16  # of a module
MAX_ARGUMENT = 10_000  # its value; the largest in a stock model is 2048
MAX_MULTIPLE = 4.0  # of depth and width; the largest in a stock model is 2
RGB = 3  # channels of an image, where a model's dictionary does not say
MAX_CHANNELS = 64
MAX_KEYPOINTS = 1000
FLOAT_BYTES = 4  # a rerun is in float32, or in half precision beside it
MAX_PARAMETERS = MAX_BYTES // FLOAT_BYTES  # more cannot have been captured
STRIDE_SHAPE = (1, 256, 256)  # images, height and width with which the host measures a model's strides as it builds it
ASSIGNED_TENSORS = 8  # of (images, labels, anchors) that the host's assigner holds at once, about
# The host calls eval() on this string, so it must match as a whole.
ACTIVATION = re.compile(
    r"(torch\.)?nn\.(SiLU|ReLU|ReLU6|LeakyReLU|GELU|ELU|SELU|CELU|Mish|Hardswish|Softplus|Sigmoid|Tanh|Identity)"
    r"\((\d{1,3}(\.\d{1,6})?|inplace=(True|False))?\)",
    re.ASCII,
)

_Check = Callable[[str, tuple[int, ...], np.dtype[Any]], str | None]


def replay(path: str | Path, *, weights: str | Path | None = None) -> FirstBad | None:
    """Rerun a captured batch on the CPU and say where it first goes bad now.

    Nothing that is read from the folder can execute code. A checkpoint can: it is the host's pickle, and is loaded
    only if it is named.

    Args:
        path: The incident's folder.
        weights: None for the captured ones, ``"scratch"`` for fresh ones, or a checkpoint of the same model.

    Raises:
        IncidentError: The folder is not a sound incident, or cannot be rerun with these weights; one line.
    """
    path = Path(path)
    note = read_incident(path).note or "none"
    if not (path / "model.json").is_file():
        raise IncidentError(f"{path}: holds no model.json (note: {note}), so nothing to rerun")
    spec = read_json(path / "model.json", ModelSpec)
    _check_spec(spec, path / "model.json")
    arrays = _read_batch(path, spec)
    owners = arrays.get("batch_idx", np.zeros(0)).astype(int)
    labels = int(np.bincount(owners).max()) if owners.size else 0
    model = _build(spec, path / "model.json", images=arrays["img"].shape, labels=labels)
    if weights is None:
        _load_captured(model, path)
    elif str(weights) != SCRATCH:
        _load_checkpoint(model, Path(weights))
    import torch

    images = images_of(arrays.pop("img"), spec.pixels)
    batch = {"img": torch.from_numpy(images)} | {name: torch.from_numpy(array) for name, array in arrays.items()}
    dtype = getattr(torch, spec.autocast) if spec.autocast else None
    try:
        return localise(model, batch, autocast_dtype=dtype, scale=spec.scale)
    except Exception as error:  # whatever the host makes of labels that no loader would have let through
        raise IncidentError(f"{path}: the batch cannot be run ({one_line(error)})") from None


def _build(spec: ModelSpec, path: Path, *, images: Sequence[int], labels: int) -> Any:
    """The model as it was trained, with fresh weights; `spec` has been checked.

    Args:
        spec: Of the model.
        path: For messages.
        images: The shape that it will be given.
        labels: Of the image that has the most.

    Raises:
        IncidentError: The host cannot build it, or this machine cannot run it.
    """
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.nn import tasks

    from yolo_gradstab.mitigations import apply_mitigations_

    architecture = deepcopy(spec.yaml)
    if architecture.get("scales") and not architecture.get("scale"):
        architecture["scale"] = next(iter(architecture["scales"]))  # as the host would, with a warning
    channels = architecture.get("channels", RGB)
    default_act = tasks.Conv.default_act  # which parse_model leaves changed when it fails
    try:
        with torch.device("meta"):  # shapes alone, to count first
            layers, _ = tasks.parse_model(deepcopy(architecture), ch=channels, verbose=False)
            number = sum(parameter.numel() for parameter in layers.parameters())
            if number > MAX_PARAMETERS:
                raise ValueError(f"{number:,} parameters, at most {MAX_PARAMETERS:,} can be replayed")
            count, height, width = STRIDE_SHAPE
            needed = max(_bytes(layers, (count, channels, height, width), 0), _bytes(layers, images, labels))
        if needed > (memory := _memory()):
            raise ValueError(f"a rerun takes about {needed / 2**30:,.0f} GB, this machine has {memory / 2**30:,.0f} GB")
        with seeded():
            build = getattr(tasks, TASK_MODELS[spec.task])
            model = build(architecture, ch=channels, verbose=False)
            apply_mitigations_(model, spec.mitigations, generator=torch.Generator())
        model.args = get_cfg(overrides={name: math.nan if v is None else v for name, v in spec.args.items()})
        _set_up(model, spec)
    except Exception as error:
        raise IncidentError(f"{path}: the host cannot build this model ({one_line(error)})") from None
    finally:
        tasks.Conv.default_act = default_act
    return model


def _bytes(layers: Any, images: Sequence[int], labels: int) -> int:
    """What a forward pass in training would keep, about, for layers on the meta device; called within that device."""
    import torch

    kept: list[int] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, output: kept.extend(t.numel() for t in tensors_in(output)))
        for module in layers.modules()
        if not any(True for _ in module.children())
    ]
    try:
        x: Any = torch.zeros(tuple(images))
        outputs: list[Any] = []
        for layer in layers:  # as the host's `_predict_once`
            if layer.f != -1:
                sources = [layer.f] if isinstance(layer.f, int) else layer.f
                taken = [x if source == -1 else outputs[source] for source in sources]
                x = taken[0] if isinstance(layer.f, int) else taken
            x = layer(x)
            outputs.append(x)
    finally:  # one activation serves every model of the process
        for handle in handles:
            handle.remove()
    anchors = max((t.shape[-1] for t in tensors_in(x) if t.ndim == 3), default=0)  # (images, channels, anchors)
    return FLOAT_BYTES * (sum(kept) + ASSIGNED_TENSORS * images[0] * labels * anchors)


def _memory() -> float:
    """Bytes of this machine; infinite where it does not say (Windows)."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _set_up(model: Any, spec: ModelSpec) -> None:
    """Modes, frozen parameters and what the losses read of the model."""
    import torch

    model.train()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name in spec.evaluating:
        modules[name].training = False
    for name in spec.frozen:
        parameters[name].requires_grad_(False)
    if spec.class_weights is not None:
        model.class_weights = torch.tensor(spec.class_weights)
    if spec.kpt_oks_sigmas is not None:
        model.kpt_oks_sigmas = spec.kpt_oks_sigmas
    model.criterion = model.init_criterion()
    for name, gain in spec.branch_gains.items():
        setattr(model.criterion, name, gain)


def _check_spec(spec: ModelSpec, path: Path) -> None:
    """Everything that reaches the host's parser, whose lookups and eval() trust it."""

    def require(holds: bool, key: str, value: Any, allowed: str) -> None:
        if not holds:
            raise IncidentError(f"{path}: {key} must be {allowed}, got {_shown(value)}")

    def number(value: Any, low: float, high: float, *, whole: bool = False) -> bool:
        kind = int if whole else (int, float)
        return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high

    require(spec.task in TASK_MODELS, "task", spec.task, f"one of {', '.join(TASK_MODELS)}")
    for name in spec.args:
        require(name in LOSS_ARGS, "args", name, f"of {', '.join(LOSS_ARGS)}")
    d = spec.yaml
    for key in d:
        require(key in YAML_KEYS, "yaml", key, f"of {', '.join(YAML_KEYS)}")
    require(number(d.get("nc"), 1, MAX_ARGUMENT, whole=True), "yaml.nc", d.get("nc"), f"a number up to {MAX_ARGUMENT}")
    ranges = {"reg_max": MAX_ARGUMENT, "channels": MAX_CHANNELS}
    for key, most in ranges.items():
        require(
            key not in d or number(d[key], 1, most, whole=True), f"yaml.{key}", d.get(key), f"a number up to {most}"
        )
    for key in ("depth_multiple", "width_multiple"):
        require(key not in d or number(d[key], 0, MAX_MULTIPLE), f"yaml.{key}", d.get(key), f"up to {MAX_MULTIPLE}")
    for key in ("end2end", "inplace"):
        require(d.get(key) in (None, True, False), f"yaml.{key}", d.get(key), "true or false")
    scales = d.get("scales") or {}
    require(isinstance(scales, dict), "yaml.scales", scales, "a mapping")
    for name, scale in scales.items():
        holds = isinstance(scale, list) and len(scale) == 3 and all(number(v, 0, MAX_MULTIPLE) for v in scale[:2])
        require(holds and number(scale[2], 1, 2**31), f"yaml.scales.{name}", scale, "depth, width and most channels")
    require(d.get("scale") in (None, "", *scales), "yaml.scale", d.get("scale"), "one of the scales")
    shape = d.get("kpt_shape")
    holds = shape is None or (isinstance(shape, list) and len(shape) == 2)
    holds = holds and (shape is None or (number(shape[0], 1, MAX_KEYPOINTS, whole=True) and shape[1] in (2, 3)))
    require(holds, "yaml.kpt_shape", shape, "points and 2 or 3")
    activation = d.get("activation")
    holds = activation is None or (isinstance(activation, str) and ACTIVATION.fullmatch(activation) is not None)
    require(holds, "yaml.activation", activation, "one of torch's, such as nn.ReLU()")
    _check_layers(d, require=require, number=number)


def _check_layers(d: dict[str, Any], *, require: Callable[..., None], number: Callable[..., bool]) -> None:
    for part in ("backbone", "head"):
        require(isinstance(d.get(part), list), f"yaml.{part}", d.get(part), "a list of layers")
    layers = d["backbone"] + d["head"]
    require(1 <= len(layers) <= MAX_LAYERS, "yaml", f"{len(layers)} layers", f"1 to {MAX_LAYERS} layers")
    modules, words = _stock_names()
    total = 0
    for index, layer in enumerate(layers):
        key = f"yaml layer {index}"
        require(isinstance(layer, list) and len(layer) == 4, key, layer, "from, repeats, module, arguments")
        source, repeats, module, args = layer
        sources = source if isinstance(source, list) else [source]
        holds = 1 <= len(sources) <= MAX_LAYERS and all(number(s, -index - 1, index, whole=True) for s in sources)
        require(holds, f"{key} from", source, "layers before it")
        require(number(repeats, 1, MAX_REPEATS, whole=True), f"{key} repeats", repeats, f"1 to {MAX_REPEATS}")
        total += repeats
        require(isinstance(module, str) and module in modules, f"{key} module", module, "of the host's model files")
        require(
            isinstance(args, list) and len(args) <= MAX_ARGUMENTS,
            f"{key} arguments",
            args,
            f"a list of at most {MAX_ARGUMENTS}",
        )
        for value in [v for a in args for v in (a if isinstance(a, list) else [a])]:
            holds = value is None or isinstance(value, bool) or number(value, -MAX_ARGUMENT, MAX_ARGUMENT)
            require(
                holds or (isinstance(value, str) and value in words),
                f"{key} argument",
                value,
                "a number or a known word",
            )
    require(total <= MAX_REPEATS, "yaml", f"{total} repeats", f"at most {MAX_REPEATS} in all")


@lru_cache(maxsize=1)
def _stock_names() -> tuple[frozenset[str], frozenset[str]]:
    """Module names and words in arguments that stand in the host's own model files."""
    import yaml
    from ultralytics.utils import ROOT

    modules: set[str] = set()
    words: set[str] = set()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in sorted((ROOT / "cfg" / "models").rglob("*.yaml")):
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506  # a safe loader either way
        for _, _, module, args in content["backbone"] + content["head"]:
            if module != "TorchVision":  # which downloads, and builds whatever its arguments name
                modules.add(module)
                words |= {word for word in args if isinstance(word, str)}
    return frozenset(modules), frozenset(words)


def check_weights(weights: str | Path | None) -> None:
    """Whether there is such a checkpoint, where `replay` is to be given one.

    Raises:
        IncidentError: There is none.
    """
    if weights is not None and str(weights) != SCRATCH and not Path(weights).is_file():
        raise IncidentError(f"weights={weights}: no such file; give a checkpoint (.pt), or scratch for fresh weights")


def _load_captured(model: Any, path: Path) -> None:
    import torch

    file = path / "weights.npz"
    if not file.is_file():
        left_out = read_incident(path).note or "none"
        raise IncidentError(
            f"{path}: holds no weights (note: {left_out}); give weights=last.pt with the path of its folder, or "
            "weights=scratch for fresh ones"
        )
    wanted = {name: (tuple(t.shape), to_array(t).dtype) for name, t in model.state_dict().items()}

    def check(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
        if name not in wanted:
            return "is not one of the model's"
        if (shape, dtype) != wanted[name]:
            return f"is {dtype} of shape {shape}, the model's is {wanted[name][1]} of shape {wanted[name][0]}"
        return None

    arrays = _read_npz(file, check)
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise IncidentError(f"{file}: lacks {missing[0]}, which the model has")
    arrays = {name: arrays[name] for name in wanted}
    if sha256_of(arrays) != read_incident(path).weights_sha256:
        raise IncidentError(f"{file}: these are not the weights that incident.json was written for (sha256)")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})


def _load_checkpoint(model: Any, file: Path) -> None:
    from ultralytics.nn.tasks import load_checkpoint

    check_weights(file)
    try:
        loaded, _ = load_checkpoint(file)
        model.load_state_dict(loaded.float().state_dict())
    except Exception as error:
        raise IncidentError(f"weights={file}: not weights of the captured model ({one_line(error)})") from None


def _read_batch(path: Path, spec: ModelSpec) -> dict[str, npt.NDArray[Any]]:
    """The arrays as stored, those that belong together of one length."""

    def check(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
        if name not in BATCH_ARRAYS:
            return f"is not one of {', '.join(BATCH_ARRAYS)}"
        if len(shape) not in BATCH_ARRAYS[name]:
            return f"has {len(shape)} dimensions"
        if name == "img" and dtype.name != ("float32" if spec.pixels == "float32" else "uint8"):
            return f"is {dtype}, model.json says {spec.pixels}"
        return None

    file = path / "batch.npz"
    arrays = _read_npz(file, check)
    if "img" not in arrays:
        raise IncidentError(
            f"{file}: holds no images (note: {read_incident(path).note or 'none'}), so nothing to rerun"
        )
    images = arrays["img"]
    number, channels = images.shape[:2]
    if not images.size or channels != spec.yaml.get("channels", RGB):
        raise IncidentError(
            f"{file}: images of shape {images.shape}, the model takes {spec.yaml.get('channels', RGB)} channels"
        )
    lengths = {name: len(arrays[name]) for name in PER_LABEL if name in arrays}
    if len(set(lengths.values())) > 1:
        raise IncidentError(f"{file}: labels of different number: {lengths}")
    owners = arrays.get("batch_idx", np.zeros(0))
    if not ((owners >= 0) & (owners < number)).all():
        raise IncidentError(f"{file}: batch_idx must be from 0 to {number - 1}, the images there are")
    return arrays


def _read_npz(path: Path, check: _Check) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an .npz file, each checked by name, type and declared size before its data is read; never a pickle.

    Args:
        path: The file.
        check: From name, shape and type, what is wrong with an array, or None.
    """
    if not path.is_file():
        raise IncidentError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members)
            return {member.filename[:-4]: _read_member(path, archive, member, check) for member in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise IncidentError(f"{path}: not a sound .npz file ({one_line(error)})") from None


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    if len(names) > MAX_MEMBERS or len(set(names)) < len(names):
        raise IncidentError(f"{path}: {len(names)} arrays, at most {MAX_MEMBERS} of different names")
    for member in members:
        if not member.filename.endswith(".npy") or member.flag_bits & 1:
            raise IncidentError(f"{path}: {_shown(member.filename)} is not an array")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise IncidentError(f"{path}: {_shown(member.filename)} is compressed in a way that numpy does not use")
    declared = sum(member.file_size for member in members)
    if declared > MAX_BYTES + len(members) * MAX_HEADER_BYTES:
        raise IncidentError(f"{path}: declares {declared:,} bytes, at most {MAX_BYTES:,} are kept of an incident")


def _read_member(
    path: Path,
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    check: _Check,
) -> npt.NDArray[Any]:
    name = member.filename[:-4]
    with archive.open(member) as file:
        try:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[np.lib.format.read_magic(file)](file, max_header_size=MAX_HEADER_BYTES)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
            raise
        except Exception as error:  # numpy's parser of headers raises whatever Python's does
            raise IncidentError(f"{path}: {_shown(name)} has no sound array header ({one_line(error)})") from None
        if dtype.name not in DTYPES or not dtype.isnative:
            raise IncidentError(f"{path}: {_shown(name)} is of type {_shown(str(dtype))}, which is not plain numbers")
        if any(not 0 <= length <= MAX_BYTES for length in shape):
            raise IncidentError(f"{path}: {_shown(name)} has shape {shape}")
        problem = check(name, shape, dtype)
        if problem:
            raise IncidentError(f"{path}: {_shown(name)} {problem}")
        size = math.prod(shape) * dtype.itemsize
        if size != member.file_size - file.tell():
            raise IncidentError(
                f"{path}: {_shown(name)} of shape {shape} takes {size:,} bytes, not what the file holds"
            )
        data = bytearray(file.read(size))
    if len(data) != size:
        raise IncidentError(f"{path}: {_shown(name)} ends early")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _shown(value: Any) -> str:
    """A value from a file, short and without control characters."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
