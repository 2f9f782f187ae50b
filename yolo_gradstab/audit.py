"""Look into a checkpoint for weights that were not finite when it was saved.

The host saves NaN as 0 and inf as the largest number of half precision, 65504 (`BaseTrainer.save_model`), so that a
lost run leaves a checkpoint that loads without a word. What is found here are weights that are all 0, or that hold such
ends.

A checkpoint is a pickle, and a pickle can run code. This reader runs none: it rebuilds arrays and dictionaries, and
puts an inert stand-in for everything else. It imports neither torch nor ultralytics.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_gradstab.diagnosis import Finding, Measured
from yolo_gradstab.runs import one_line

__all__ = ["AuditError", "audit_checkpoint", "read_tensors"]

# By the name of torch's storage class; bfloat16 is the upper half of a float32.
DTYPES = {
    "HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8", "BFloat16Storage": "<u2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip
BFLOAT16_SHIFT = 16  # bits
MODELS = ("ema", "model")  # keys of the host's checkpoints; one of them is null
LEAST_DIMENSIONS = 1  # of a weight: a single number may well be 0
MOST_BYTES = 16 * 2**30  # of all tensors together, which may share what is stored
MOST_NAMED = 5

Tensor = NDArray[Any]


class AuditError(ValueError):
    """A file that is no checkpoint; the message is one line and names it."""


class _Mapping(dict[Any, Any]):
    """An ordered dictionary; its attributes are left out."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Stub:
    """Stands for an object of any class, and keeps its attributes; its class's own code is never loaded."""

    def __new__(cls, *_: Any, **__: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Function:
    """A function that a pickle may call, and not change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _StorageType:
    """A storage class of torch, by its name alone."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Reader(pickle.Unpickler):
    """Rebuilds tensors as arrays; whatever else a pickle names becomes a stub."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive = archive
        self._root = root
        self._bytes = 0
        self._storages: dict[tuple[str, str], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): _Mapping,
            ("torch._utils", "_rebuild_tensor_v2"): _Function(self._tensor),
            ("torch._utils", "_rebuild_parameter"): _Function(self._parameter),
            ("torch._utils", "_rebuild_parameter_with_state"): _Function(self._parameter),
        }
        if (module, name) in known:
            return known[module, name]
        if module in {"torch", "torch.storage"} and name in DTYPES:
            return _StorageType(name)
        return type("Stub", (_Stub,), {})  # of its own, so that a pickle cannot change those of another

    def persistent_load(self, pid: Any) -> Tensor:
        _, kind, key, _, _ = pid
        if (kind.name, key) not in self._storages:  # which a pickle may name any number of times
            stored = np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype=DTYPES[kind.name])
            if kind.name == "BFloat16Storage":
                stored = (stored.astype(np.uint32) << BFLOAT16_SHIFT).view(np.float32)
            self._storages[kind.name, key] = stored
        return self._storages[kind.name, key]

    def _tensor(self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(list(size))
        if min([offset, *size, *stride]) < 0 or (count and last >= len(storage)):
            raise ValueError("a tensor reaches outside of what is stored")
        if count > len(storage):
            raise ValueError("a tensor has more elements than are stored")
        self._bytes += count * storage.itemsize
        if self._bytes > MOST_BYTES:
            raise ValueError("its tensors are larger than any model")
        if not count:
            return np.empty(size, storage.dtype)
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the model in a checkpoint, in forward order, by their names; nothing in the file is executed.

    Raises:
        AuditError: It is no checkpoint, or holds no model.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _content(archive)
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror}); give the path of a checkpoint") from None
    except zipfile.BadZipFile:
        raise AuditError(f"{path}: is not a checkpoint as torch.save writes it; give a .pt file of a run") from None
    except Exception as error:  # whatever a damaged or hostile pickle makes the unpickler raise
        raise AuditError(f"{path}: is damaged, or no checkpoint ({one_line(error)})") from None
    models = [content.get(name) for name in MODELS] if isinstance(content, dict) else []
    model = next((model for model in models if model is not None), content)
    tensors = dict(_named(model))
    if not tensors:
        raise AuditError(f"{path}: holds no model; give a checkpoint of a run, such as weights/last.pt")
    return tensors


def _content(archive: zipfile.ZipFile) -> Any:
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise zipfile.BadZipFile
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):  # torch stores; a bomb would not
        raise ValueError("it is compressed, which torch.save does not do")
    return _Reader(archive, roots[0]).load()


def _named(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a stand-in for a module, or the tensors of a state dictionary."""
    if isinstance(model, dict):
        yield from ((str(name), value) for name, value in model.items() if isinstance(value, np.ndarray))
        return
    waiting = [("", model)]
    seen = set()
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module, _Stub) or id(module) in seen:
            continue
        seen.add(id(module))
        for group in ("_parameters", "_buffers"):
            values = module.state.get(group)
            if isinstance(values, dict):
                yield from ((f"{prefix}{name}", v) for name, v in values.items() if isinstance(v, np.ndarray))
        children = module.state.get("_modules")
        if isinstance(children, dict):
            waiting += [(f"{prefix}{name}.", child) for name, child in reversed(children.items())]


def audit_checkpoint(path: str | Path) -> list[Finding]:
    """Whether the weights of a checkpoint were finite when it was saved.

    A bias or a running mean may be all 0; the weights of a convolution, of a linear layer or of a normalisation, and
    a running variance, may not.

    Raises:
        AuditError: It is no checkpoint, or holds no model; the message is one line.
    """
    tensors = {name: t for name, t in read_tensors(path).items() if np.issubdtype(t.dtype, np.floating) and t.size}
    nonfinite = {name: int((~np.isfinite(t)).sum()) for name, t in tensors.items()}
    ends = {name: float((np.abs(t) == np.finfo(t.dtype).max).mean()) for name, t in tensors.items()}
    zeros = [name for name, t in tensors.items() if _must_not_be_zero(name, t) and not t.any()]
    nonfinite = {name: count for name, count in nonfinite.items() if count}
    ends = {name: share for name, share in ends.items() if share}
    if not nonfinite and not ends and not zeros:
        return []
    evidence = {
        "tensors holding NaN or inf": Measured(len(nonfinite), 0),
        "tensors holding the largest number, which stands for inf": Measured(len(ends), 0),
        "largest share of such elements in one": Measured(max(ends.values(), default=0.0), 0.0),
        "weights that are all 0, which stands for NaN": Measured(len(zeros), 0),
        "tensors": Measured(len(tensors)),
    }
    named = [name for name in tensors if name in nonfinite or name in ends or name in zeros]
    more = len(named) - MOST_NAMED
    # Variances of a run that went too far are often finite, and only beyond half precision.
    only_statistics = all(_is_statistic(name) for name in named)
    what = "normalisation statistics were beyond half precision" if only_statistics else "weights were not finite"
    return [
        Finding(
            kind="nonfinite_weights",
            severity="warning" if only_statistics else "error",
            message=f"{what} when this checkpoint was saved",
            where=", ".join(named[:MOST_NAMED]) + (f" and {more} more" if more > 0 else ""),
            evidence=evidence,
            advice="Start from an earlier checkpoint, with guard.nonfinite=skip, which keeps NaN out of the weights.",
        )
    ]


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in {"running_mean", "running_var"}


def _must_not_be_zero(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= LEAST_DIMENSIONS and name.rpartition(".")[2] in {"weight", "running_var"}
