"""Measure gradients: per-tensor L2 norms, their total, what is not finite, and norms by layer.

Works in any PyTorch loop and imports nothing but torch. Everything stays on the device; the one function that
looks at values on the host says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

__all__ = [
    "FLOAT32_NORM_LIMIT",
    "GradientNorms",
    "Layers",
    "device_index",
    "exact_gradient_norms",
    "gradient_norms",
    "gradients",
    "tensor_norms",
]

# The largest norm whose square float32 can hold (about 1.8e19). A finite gradient beyond it makes torch's float32
# norm infinite, and torch's clip then turns the whole gradient into zeros.
FLOAT32_NORM_LIMIT = torch.finfo(torch.float32).max ** 0.5


class GradientNorms(NamedTuple):
    """Norms of one step's gradient.

    Attributes:
        norms: Shape ``(num_tensors,)``, the L2 norm of each tensor in the order given, at least float32.
        total_norm: 0-d, the L2 norm of all of them together, before any clipping.
    """

    norms: Tensor
    total_norm: Tensor

    def nonfinite(self) -> Tensor:
        """Boolean ``(num_tensors,)``: which tensors' norms are NaN or infinite."""
        return ~torch.isfinite(self.norms)


def gradients(parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Gradients of the parameters that have one (frozen and unused parameters have none). Generators are read once."""
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [grad for p in parameters if (grad := p.grad) is not None]  # each read of `.grad` makes a Python object


def tensor_norms(tensors: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """L2 norm of each tensor, shape ``(num_tensors,)``, in one foreach pass per device and dtype.

    Half precision is accumulated in float32: an fp16 norm overflows at 65504, a bf16 one keeps 8 bits.

    Args:
        tensors: Any mix of dtypes and devices; the result is on the first one's device.
        dtype: Accumulate in this dtype instead, e.g. float64 for values whose squares leave float32.
    """
    norms, order = _grouped_norms(tensors, dtype)
    if order == sorted(order):
        return norms
    return norms[device_index(tuple(order), norms.device).argsort()]


def gradient_norms(grads: Sequence[Tensor]) -> GradientNorms:
    """Measure gradients once; the result serves clipping, guard, telemetry and diagnosis alike.

    For float32 and float64 gradients `total_norm` has the same bits as `torch.nn.utils.get_total_norm`, so a clip
    computed from it equals torch's. On the CPU, where looking costs nothing, finite gradients whose float32 norm
    overflows are measured again in float64; on an accelerator the caller decides, by `exact_gradient_norms`.

    Args:
        grads: Gradient tensors, any mix of dtypes and devices; may be empty.
    """
    if not grads:
        return GradientNorms(torch.zeros(0), torch.tensor(0.0))
    norms, order = _grouped_norms(grads, None)
    total_norm = torch.linalg.vector_norm(norms)  # over torch's own order of groups: addition is not associative
    if norms.device.type == "cpu" and not torch.isfinite(total_norm):
        return exact_gradient_norms(grads)
    if order != sorted(order):
        norms = norms[device_index(tuple(order), norms.device).argsort()]
    return GradientNorms(norms, total_norm)


def exact_gradient_norms(grads: Sequence[Tensor]) -> GradientNorms:
    """As `gradient_norms`, in float64: no finite float32 gradient overflows. Slower; for steps that look infinite."""
    grads = [g.cpu() if g.device.type == "mps" else g for g in grads]  # which has no float64
    norms = tensor_norms(grads, dtype=torch.float64)
    return GradientNorms(norms, torch.linalg.vector_norm(norms))


def _grouped_norms(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, list[int]]:
    """Norms in the order torch groups them, and the index in `tensors` of each."""
    norms: list[Tensor] = []
    order: list[int] = []
    with torch.no_grad():
        groups = _group_tensors_by_device_and_dtype([list(tensors)], with_indices=True)
        for (_, group_dtype), ((group,), indices) in groups.items():
            half = group_dtype in (torch.float16, torch.bfloat16)
            tensors_here = cast("list[Tensor]", group)  # torch types groups loosely
            norms.extend(torch._foreach_norm(tensors_here, 2, dtype or (torch.float32 if half else None)))
            order.extend(indices)
        if len(groups) > 1:  # a hundred no-ops cost as much as a norm of a hundred tensors
            norms = [norm.to(tensors[0].device) for norm in norms]
        return torch.stack(norms), order


@lru_cache(maxsize=64)
def device_index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices as a tensor on the device, kept: uploading the same list at every step would stall an accelerator."""
    return torch.tensor(indices, dtype=torch.long, device=device)


class Layers:
    """Groups of tensors by layer: the stages ``model.<index>`` of a YOLO model, or each parameter by itself.

    Example:
        >>> layers = Layers.stages(["model.0.conv.weight", "model.0.bn.bias", "model.23.cv2.0.weight"])
        >>> layers.names, layers.index
        (['model.0', 'model.23'], [0, 0, 1])
        >>> layers.norms(torch.tensor([3.0, 4.0, 2.0]))
        tensor([5., 2.])
    """

    def __init__(self, names: list[str], index: list[int]) -> None:
        self.names = names
        self.index = index

    @classmethod
    def stages(cls, parameter_names: Iterable[str]) -> Layers:
        """By top-level stage; a name without a stage index (another framework's model) goes by its first part."""
        labels = [_stage(name) for name in parameter_names]
        names = list(dict.fromkeys(labels))
        position = {name: i for i, name in enumerate(names)}
        return cls(names, [position[label] for label in labels])

    @classmethod
    def parameters(cls, parameter_names: Iterable[str]) -> Layers:
        """Each parameter a layer of its own."""
        names = list(parameter_names)
        return cls(names, list(range(len(names))))

    def norms(self, tensor_norms: Tensor) -> Tensor:
        """L2 norm of each layer, shape ``(num_layers,)``, from the norms of its tensors.

        Squares are taken relative to the largest finite norm, so that no finite norm overflows on the way.
        """
        finite = torch.where(torch.isfinite(tensor_norms), tensor_norms, 0.0)
        largest = finite.max().clamp_min(torch.finfo(tensor_norms.dtype).tiny)
        return self.sums((tensor_norms / largest).square()).sqrt() * largest

    def sums(self, values: Tensor) -> Tensor:
        """Sum of `values` (one per tensor) over each layer, shape ``(num_layers,)``."""
        index = device_index(tuple(self.index), values.device)
        return values.new_zeros(len(self.names)).index_add_(0, index, values)


def _stage(name: str) -> str:
    """``model.<index>`` of a parameter name, past wrappers such as DistributedDataParallel's ``module.``."""
    match = re.search(r"(?:^|\.)(model\.\d+)(?:\.|$)", name)
    return match[1] if match else name.split(".", 1)[0]
