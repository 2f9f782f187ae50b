"""Policies that bound the gradient before the optimizer's step, and the bound on the step itself.

Every gradient policy follows one protocol: measured norms in, a scale out, applied to the gradients in one multiply
on their own device, with no value read on the host. NaN and infinite norms pass through to the gradient as they do
in torch, and never enter a policy's state. `clip_update_` bounds what the optimizer did afterwards, whatever it was.

Works in any PyTorch loop and imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from yolo_gradstab.norms import FLOAT32_NORM_LIMIT, GradientNorms, device_index, gradient_norms, gradients, tensor_norms

__all__ = [
    "AdaptiveGradientClip",
    "AutoClip",
    "ClipPolicy",
    "Clipped",
    "NoClip",
    "NormClip",
    "Stabilizer",
    "TensorEma",
    "UpdateRatios",
    "ValueClip",
    "ZClip",
    "clip_update_",
    "multiply_",
    "update_ratios",
]

# torch's own guard against dividing by a zero norm (torch.nn.utils.clip_grad), kept so that results agree bit for bit.
NORM_EPS = 1e-6


class Clipped(NamedTuple):
    """What a policy did, both 0-d on the gradients' device.

    Attributes:
        clipped_norm: Total norm after clipping.
        clip_coef: `clipped_norm` over the norm before; exactly 1 where nothing was clipped.
    """

    clipped_norm: Tensor
    clip_coef: Tensor


class ClipPolicy:
    """Base of the gradient policies: stateless, and clips nothing until a subclass says how.

    A subclass gives `scale`, or `apply_` where its rule is not one multiplier per tensor. State lives in `_state`,
    one tensor per name.
    """

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def bind(self, model: nn.Module) -> Self:
        """Learn from the model what a bare tensor does not say: layer kinds, the head. Most policies need none."""
        del model
        return self

    @torch.no_grad()
    def clip_(self, parameters: Iterable[Tensor] | Tensor) -> Tensor:
        """Clip gradients in place, where `torch.nn.utils.clip_grad_norm_` would stand in a plain PyTorch loop.

        Args:
            parameters: Parameters after `backward()`; those without gradients are left alone.

        Returns:
            The total norm before clipping, 0-d.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        measured = gradient_norms(gradients(parameters))
        self.apply_(parameters, measured)
        return measured.total_norm

    @torch.no_grad()
    def apply_(self, parameters: Sequence[Tensor], measured: GradientNorms, *, num_images: float = 1) -> Clipped:
        """Clip gradients that have been measured already.

        Args:
            parameters: The same parameters, in the same order, at every step.
            measured: `gradient_norms` of their gradients.
            num_images: Images whose gradients were summed into this step. Adaptive policies keep their history per
                image, since accumulation ramps up during Ultralytics' warm-up.
        """
        grads = gradients(parameters)
        if not grads:
            return Clipped(measured.total_norm, torch.ones_like(measured.total_norm))
        self._move_state(measured.total_norm.device)
        scale = self.scale(parameters, measured, num_images)
        multiply_(grads, scale)
        if scale.ndim == 0:
            return Clipped(measured.total_norm * scale, scale)
        return _clipped(torch.linalg.vector_norm(measured.norms * scale), measured.total_norm)

    def scale(self, parameters: Sequence[Tensor], measured: GradientNorms, num_images: float) -> Tensor:
        """Multiplier of the whole gradient (0-d), or of each tensor that has a gradient (one-dimensional)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Copy of the state; empty for policies without one."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: The state is another policy's.
        """
        if state.keys() != self._state.keys():
            raise ValueError(
                f"state of {type(self).__name__} has {sorted(self._state)}, got {sorted(state)}: "
                "it was saved by another policy"
            )
        self._state = {name: value.clone() for name, value in state.items()}

    def _move_state(self, device: torch.device) -> None:
        for name, value in self._state.items():
            self._state[name] = value.to(device)  # returns the tensor itself when it is there already


class NoClip(ClipPolicy):
    """Measure only; the gradient is not touched, not even multiplied by one."""

    def apply_(self, parameters: Sequence[Tensor], measured: GradientNorms, *, num_images: float = 1) -> Clipped:
        """Nothing is clipped."""
        del parameters, num_images
        return Clipped(measured.total_norm, torch.ones_like(measured.total_norm))


class NormClip(ClipPolicy):
    """Scale the gradient down to a fixed global norm; equal to `torch.nn.utils.clip_grad_norm_`.

    References:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, arXiv 1211.5063.
    """

    def __init__(self, *, max_norm: float) -> None:
        super().__init__()
        self.max_norm = max_norm

    def scale(self, parameters: Sequence[Tensor], measured: GradientNorms, num_images: float) -> Tensor:
        """``min(1, max_norm / total_norm)``."""
        del parameters, num_images
        return _coef(self.max_norm, measured.total_norm)


class ValueClip(ClipPolicy):
    """Clamp every element to ``[-max_value, max_value]``; equal to `torch.nn.utils.clip_grad_value_`.

    Changes the gradient's direction. Costs a second norm pass, since the clipped norm cannot be known before.
    """

    def __init__(self, *, max_value: float) -> None:
        super().__init__()
        self.max_value = max_value

    @torch.no_grad()
    def apply_(self, parameters: Sequence[Tensor], measured: GradientNorms, *, num_images: float = 1) -> Clipped:
        """Clamp in place."""
        del num_images
        grads = gradients(parameters)
        if grads:  # torch's function refuses an empty list
            torch.nn.utils.clip_grad_value_(parameters, self.max_value)
        return _clipped(gradient_norms(grads).total_norm, measured.total_norm)


class AdaptiveGradientClip(ClipPolicy):
    """AGC: bound each output unit's gradient by a share of that unit's weight norm.

    The rule is the paper's: ``||G_i|| <= factor * max(||W_i||, eps)`` per output unit i. Without `bind`, units are
    rows of dimension 0 and one-dimensional tensors count as both bias and norm, for that is all a bare tensor tells.
    Bound to a model, transposed convolutions have their units on dimension 1, and the head is known.

    Args:
        factor: Largest ratio of a unit's gradient norm to its weight norm.
        eps: Least weight norm assumed, so that a zero-initialised unit can leave zero.
        exclude: Kinds of tensors left alone: ``bias``, ``norm`` (normalisation layers), ``head`` (the last stage's
            convolutions and linear layers that no normalisation follows).

    References:
        Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", 2021,
        arXiv 2102.06171.
    """

    UNIT_NORM_EPS = 1e-6  # the paper's guard for units with no gradient

    def __init__(self, *, factor: float, eps: float, exclude: Iterable[str]) -> None:
        super().__init__()
        self.factor = factor
        self.eps = eps
        self.exclude = frozenset(exclude)
        self._kinds: dict[int, set[str]] = {}  # by id: of the parameters of the bound model, which is kept alive
        self._transposed: dict[int, int] = {}  # id of a transposed convolution's weight -> its groups
        self._model: nn.Module | None = None

    def bind(self, model: nn.Module) -> Self:
        """Learn each parameter's kind and which weights belong to transposed convolutions."""
        self._model = model
        self._kinds, self._transposed = {}, {}
        head = _last_stage([name for name, _ in model.named_parameters()])
        for name, module in model.named_modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                kinds = {"bias"} if parameter_name == "bias" else set()
                if isinstance(module, _NORM_LAYERS):
                    kinds.add("norm")
                if f"{name}.".startswith(head) and isinstance(module, _WEIGHT_LAYERS) and module.bias is not None:
                    kinds.add("head")
                if isinstance(module, nn.modules.conv._ConvTransposeNd) and parameter_name == "weight":
                    self._transposed[id(parameter)] = module.groups
                self._kinds[id(parameter)] = kinds
        return self

    @torch.no_grad()
    def apply_(self, parameters: Sequence[Tensor], measured: GradientNorms, *, num_images: float = 1) -> Clipped:
        """Scale each unit in place."""
        del num_images
        parameters = [p for p in parameters if p.grad is not None]
        chosen = [i for i, p in enumerate(parameters) if not self._excluded(p)]
        if not chosen:
            return Clipped(measured.total_norm, torch.ones_like(measured.total_norm))
        views = [self._units(parameters[i]) for i in chosen]
        dtype = torch.promote_types(measured.norms.dtype, torch.float32)  # float64 where float32 would overflow
        grad_norms = [torch.linalg.vector_norm(g, dim=dims, keepdim=True, dtype=dtype) for _, g, dims in views]
        weight_norms = [torch.linalg.vector_norm(w, dim=dims, keepdim=True, dtype=dtype) for w, _, dims in views]
        # One vector of all units: the arithmetic below is then a handful of kernels, not a handful per tensor.
        grad_norm = torch.cat([norm.flatten() for norm in grad_norms])
        limit = self.factor * torch.cat([norm.flatten() for norm in weight_norms]).clamp_min(self.eps)
        scale = torch.where(grad_norm < limit, 1.0, limit / grad_norm.clamp_min(self.UNIT_NORM_EPS))
        for (_, grad, _), norm, part in zip(
            views, grad_norms, torch.split(scale, [norm.numel() for norm in grad_norms]), strict=True
        ):
            grad.mul_(part.view_as(norm))
        rest = torch.ones_like(measured.norms, dtype=torch.bool)
        rest.index_fill_(0, device_index(tuple(chosen), rest.device), 0)  # an assignment uploads its value, and waits
        after = torch.cat([grad_norm * scale, torch.where(rest, measured.norms, 0.0).to(grad_norm.dtype)])
        return _clipped(torch.linalg.vector_norm(after), measured.total_norm)

    def _excluded(self, parameter: Tensor) -> bool:
        kinds = self._kinds.get(id(parameter))
        if kinds is None:
            kinds = {"bias", "norm"} if parameter.ndim <= 1 else set()
        return not self.exclude.isdisjoint(kinds)

    def _units(self, parameter: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Weight and gradient seen unit by unit, and the dimensions inside a unit; a vector is one unit."""
        assert parameter.grad is not None
        groups = self._transposed.get(id(parameter))
        if groups is not None:  # (in, out/groups, ...) -> (groups, in/groups, out/groups, ...)
            shape = (groups, parameter.shape[0] // groups, *parameter.shape[1:])
            return parameter.view(shape), parameter.grad.view(shape), (1, *range(3, len(shape)))
        dims = tuple(range(parameter.ndim)) if parameter.ndim <= 1 else tuple(range(1, parameter.ndim))
        return parameter, parameter.grad, dims


class AutoClip(ClipPolicy):
    """Clip to a percentile of the run's own gradient norms, over a window that includes the current one.

    The paper keeps the whole history; a window follows norms that drift, as a detector's do.

    References:
        Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
        2020, arXiv 2007.14469.
    """

    def __init__(self, *, percentile: float, window: int) -> None:
        super().__init__()
        self.percentile = percentile
        self.window = window
        self._state = {"history": torch.full((window,), torch.nan), "count": torch.zeros((), dtype=torch.long)}

    def scale(self, parameters: Sequence[Tensor], measured: GradientNorms, num_images: float) -> Tensor:
        """``min(1, percentile / total_norm)``."""
        del parameters
        norm = measured.total_norm.float() / num_images
        history, count = self._state["history"], self._state["count"]
        finite = _sound(measured.total_norm)
        here = torch.arange(self.window, device=norm.device) == count % self.window
        self._state["history"] = history = torch.where(here & finite, norm, history)
        self._state["count"] = count + finite
        threshold = torch.nanquantile(history, self.percentile / 100)
        is_below = (norm <= threshold) | threshold.isnan()  # before the first sound norm there is nothing to go by
        return torch.where(is_below, torch.ones_like(norm), _coef(threshold, norm))


class ZClip(ClipPolicy):
    """Clip only spikes: norms whose z-score against a running mean and variance is above `z`.

    A spike is cut to ``mean + z**2 * std / z_score`` and enters the statistics at that value. The published default
    also takes the minimum with a fixed norm of 1.0, which on YOLO's summed losses overrides everything else; here a
    fixed norm is applied only when asked for.

    References:
        Kumar, Owen, Chowdhury, Guera, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv 2504.02507.
    """

    STD_EPS = 1e-6  # the reference's guard for a history without variation

    def __init__(self, *, z: float, alpha: float, warmup: int, max_norm: float | None) -> None:
        super().__init__()
        self.z = z
        self.alpha = alpha
        self.warmup = warmup
        self.max_norm = max_norm
        self._state = {
            "history": torch.zeros(warmup),
            "count": torch.zeros((), dtype=torch.long),
            "mean": torch.zeros(()),
            "var": torch.zeros(()),
        }

    def scale(self, parameters: Sequence[Tensor], measured: GradientNorms, num_images: float) -> Tensor:
        """1, or what brings a spike down to its target."""
        del parameters
        norm = measured.total_norm.float() / num_images
        mean, var = self._state["mean"], self._state["var"]
        std = var.sqrt()
        z_score = (norm - mean) / (std + self.STD_EPS)
        warm = self._state["count"] >= self.warmup
        target = torch.where(warm & (z_score > self.z), mean + self.z**2 * std / z_score, norm)
        self._observe(norm, target, warm, _sound(measured.total_norm))
        coef = torch.where(target < norm, target / (norm + NORM_EPS), torch.ones_like(norm))
        if self.max_norm is not None:
            coef = torch.minimum(coef, _coef(self.max_norm, measured.total_norm).float())
        return torch.where(torch.isfinite(norm), coef, norm * 0)  # a NaN norm must not pass as "no spike"

    def _observe(self, norm: Tensor, target: Tensor, warm: Tensor, finite: Tensor) -> None:
        """Collect the warm-up, start mean and variance from it (population variance), then follow `target`."""
        state = self._state
        here = torch.arange(self.warmup, device=norm.device) == state["count"]
        history = torch.where(here & finite, norm, state["history"])
        count = state["count"] + (finite & ~warm)
        starts = ~warm & (count == self.warmup)
        mean = self.alpha * state["mean"] + (1 - self.alpha) * target
        var = self.alpha * state["var"] + (1 - self.alpha) * (target - mean) ** 2
        follows = warm & finite
        mean = torch.where(starts, history.mean(), torch.where(follows, mean, state["mean"]))
        var = torch.where(starts, history.var(correction=0), torch.where(follows, var, state["var"]))
        self._state = {"history": history, "count": count, "mean": mean, "var": var}


class TensorEma(ClipPolicy):
    """Clip each tensor to `ratio` times the running mean of its own clipped norms (AdaGC's rule).

    The paper's ratio of 1.05 settles at a low quantile of noisy detection gradients and clips most steps; 2.0 clips
    few. During `warmup` nothing is clipped, and a tensor's mean starts at its median then. A tensor without a gradient
    so far (a head that has seen no object) starts at its first non-zero norm; one that falls silent keeps a tenth of
    its starting mean, so that its next gradient is not clipped to nothing.

    Args:
        ratio: Largest ratio of a tensor's norm to its running mean.
        beta: Decay of the running mean per step.
        warmup: Steps before clipping starts.
        max_norm: If given, warm up as the paper does instead: clip globally to this norm and start from the smallest
            clipped norm.

    References:
        Wang et al., "AdaGC: Improving Training Stability for Large Language Model Pretraining", 2025, arXiv 2502.11034.
    """

    FLOOR = 0.1  # share of its starting mean that a silent tensor keeps

    def __init__(self, *, ratio: float, beta: float, warmup: int, max_norm: float | None = None) -> None:
        super().__init__()
        self.ratio = ratio
        self.beta = beta
        self.warmup = warmup
        self.max_norm = max_norm
        self._state = {
            "count": torch.zeros((), dtype=torch.long),
            "mean": torch.zeros(0),
            "start": torch.zeros(0),
            "history": torch.zeros(0, 0),
        }

    def scale(self, parameters: Sequence[Tensor], measured: GradientNorms, num_images: float) -> Tensor:
        """One multiplier per tensor with a gradient."""
        with_grad = tuple(i for i, p in enumerate(parameters) if p.grad is not None)
        having = device_index(with_grad, measured.norms.device)
        norms = measured.norms.new_zeros(len(parameters), dtype=torch.float32)
        norms[having] = measured.norms.float() / num_images
        self._grow(norms)
        finite = _sound(measured.total_norm)
        warm = self._state["count"] >= self.warmup - (self.max_norm is not None)
        early = torch.ones_like(norms)
        if self.max_norm is not None:
            early = early * _coef(self.max_norm, measured.total_norm / num_images).float()
        mean = self._state["mean"]
        fresh = mean == 0
        late = torch.where(fresh, 1.0, (self.ratio * mean / norms.clamp_min(1e-30)).clamp_max(1.0))
        scale = torch.where(warm, late, early)
        self._observe(norms, norms * scale, warm=warm, finite=finite)
        return torch.where(torch.isfinite(norms), scale, norms * 0)[having]

    def _grow(self, norms: Tensor) -> None:
        state = self._state
        if not len(state["mean"]):
            state["mean"], state["start"] = torch.zeros_like(norms), torch.zeros_like(norms)
            state["history"] = norms.new_full((self.warmup, len(norms)), torch.nan)
        if len(state["mean"]) != len(norms):
            raise ValueError(f"tensor_ema follows {len(state['mean'])} tensors, got {len(norms)}")

    def _observe(self, norms: Tensor, clipped: Tensor, *, warm: Tensor, finite: Tensor) -> None:
        """Move the means by this step, which must be finite as a whole to count."""
        state = self._state
        mean, count = state["mean"], state["count"]
        here = (torch.arange(self.warmup, device=norms.device) == count)[:, None]
        history = torch.where(here & (norms > 0) & finite, clipped, state["history"])
        if self.max_norm is None:
            median = history.nanmedian(dim=0).values.nan_to_num(0.0)
            early = torch.where(count == self.warmup - 1, median, mean)
        else:
            early = torch.where(mean == 0, clipped, torch.minimum(mean, clipped))
        follow = torch.maximum(self.beta * mean + (1 - self.beta) * clipped, self.FLOOR * state["start"])
        late = torch.where(mean == 0, clipped, follow)
        new = torch.where(finite, torch.where(warm, late, early), mean)
        start = torch.where(torch.isfinite(new) & ((state["start"] == 0) | ~warm), new, state["start"])
        self._state = {"count": count + finite, "mean": new, "start": start, "history": history}


class Stabilizer(ClipPolicy):
    """Replace the gradient's norm by a steady one: ``target * mean(n) / sqrt(mean(n**2))``, keeping its direction.

    The global form of GradientStabilizer, with `target` in place of its 1: the step's size no longer follows the
    gradient's, a spike comes out smaller than a usual step. It can also enlarge a gradient; it is not a clip.

    References:
        Huang et al., "GradientStabilizer: Fix the Norm, Not the Gradient", 2025, arXiv 2502.17055.
    """

    def __init__(self, *, target: float, gamma1: float, gamma2: float) -> None:
        super().__init__()
        self.target = target
        self.gamma1 = gamma1
        self.gamma2 = gamma2
        self._state = {"mean": torch.zeros(()), "square": torch.zeros(()), "count": torch.zeros(())}

    def scale(self, parameters: Sequence[Tensor], measured: GradientNorms, num_images: float) -> Tensor:
        """``target * m / (sqrt(v) * n)`` with bias-corrected means m of n and v of n squared."""
        del parameters
        norm = measured.total_norm.float() / num_images
        finite = _sound(measured.total_norm)
        count = self._state["count"] + finite
        mean = torch.where(finite, self.gamma1 * self._state["mean"] + (1 - self.gamma1) * norm, self._state["mean"])
        square = self.gamma2 * self._state["square"] + (1 - self.gamma2) * norm**2
        square = torch.where(finite, square, self._state["square"])
        self._state = {"mean": mean, "square": square, "count": count}
        tiny = torch.finfo(norm.dtype).tiny  # before any sound norm every gradient becomes zero
        m_hat = mean / (1 - self.gamma1**count).clamp_min(tiny)
        v_hat = square / (1 - self.gamma2**count).clamp_min(tiny)
        scale = self.target * m_hat / (v_hat.sqrt() * norm).clamp_min(tiny) / num_images
        # A zero gradient stays zero; inf times 0 would not, nor inf times what is nearly 0.
        return torch.where(norm > 0, scale.clamp_max(torch.finfo(norm.dtype).max), torch.ones_like(norm))


class UpdateRatios(NamedTuple):
    """How far one optimizer step moved each tensor; every field has shape ``(num_tensors,)``.

    Attributes:
        ratio: ``||dW|| / max(||W||, floor)`` as the optimizer made it, before any bound.
        update_norm: ``||dW||`` before any bound.
        weight_norm: ``||W||`` before the step.
        scale: What `clip_update_` multiplied the update by; exactly 1 within the bound.
    """

    ratio: Tensor
    update_norm: Tensor
    weight_norm: Tensor
    scale: Tensor


# Least RMS of a weight that a relative step is taken against. A bias or a normalisation weight may start at zero and
# must be free to move: 0.1. A matrix that starts at zero leaves it slowly, at a rate the bound allows: 1e-4, far below
# the 0.02 to 0.3 of initialised convolutions.
VECTOR_FLOOR_RMS = 0.1
MATRIX_FLOOR_RMS = 1e-4


@torch.no_grad()
def update_ratios(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> UpdateRatios:
    """How far each tensor moved relative to itself; changes nothing.

    Args:
        parameters: Tensors after the optimizer's step; at least one.
        before: Copies of them from before it.
    """
    update_norm = tensor_norms(torch._foreach_sub(list(parameters), list(before)))
    weight_norm = tensor_norms(before)
    floor = _floors(tuple((p.ndim, p.numel()) for p in parameters), weight_norm.device, weight_norm.dtype)
    ratio = update_norm / torch.maximum(weight_norm, floor)
    return UpdateRatios(ratio, update_norm, weight_norm, torch.ones_like(ratio))


@torch.no_grad()
def clip_update_(
    parameters: Iterable[Tensor], before: Sequence[Tensor], max_ratio: float | Sequence[float] | Tensor
) -> UpdateRatios:
    """Bound how far the optimizer's step moved each tensor, relative to the tensor's own norm.

    For each tensor with ``ratio = ||W - W_before|| / max(||W_before||, floor)`` above its bound, W becomes
    ``W_before + (W - W_before) * max_ratio / ratio``. Tensors within the bound keep their exact bits, and the
    optimizer's state is left as it is. Unlike a gradient clip this bounds the real step, whatever made it: momentum,
    weight decay, Adam's denominator or Muon's orthogonalisation. A finite move whose norm is beyond float32 is not
    made; one that is not finite leaves weights that are not, for others to see.

    Args:
        parameters: Tensors after the optimizer's step; changed in place.
        before: Copies of them from before it, e.g. ``[p.detach().clone() for p in parameters]``; not changed.
        max_ratio: Largest ratio, for all tensors or one for each.

    Returns:
        The ratios before the bound, their norms, and the scale applied.

    References:
        LARC's clip mode (You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017, 1708.03888)
        bounds the gradient's share of the step; Adafactor's update clipping (Shazeer, Stern, 2018, 1804.04235) bounds
        Adam's real step against RMS 1; why relative steps per layer are the right distance: Bernstein, Vahdat, Yue,
        Liu, "On the distance between two neural networks and the stability of learning", 2020, 2002.03432.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> before = [weight.detach().clone()]
        >>> with torch.no_grad():
        ...     _ = weight.add_(torch.tensor([[0.0, 5.0]]))
        >>> clip_update_([weight], before, max_ratio=0.1).ratio
        tensor([1.])
        >>> weight.data
        tensor([[3.0000, 4.5000]])
    """
    parameters = list(parameters)
    if len(parameters) != len(before):
        raise ValueError(f"before must have one tensor per parameter, got {len(before)} for {len(parameters)}")
    if not parameters:
        return UpdateRatios(*(torch.zeros(0) for _ in range(4)))
    moved = update_ratios(parameters, before)
    bound: Any = max_ratio
    if not isinstance(bound, int | float):  # a number stays one: as a tensor it would be uploaded at every step
        bound = torch.as_tensor(bound, dtype=moved.ratio.dtype, device=moved.ratio.device)
    scale = torch.where(moved.ratio > bound, bound / moved.ratio, 1.0)
    # lerp, since it is exact at both ends: at 1 it returns the new weight's own bits, and near 0 it starts from the
    # old weight, so that cutting a step a million times the weight does not cancel the weight away.
    over: Sequence[int] = range(len(parameters))
    if scale.device.type == "cpu":  # where looking costs nothing, what is within its bound is not touched
        over = (scale < 1).nonzero().flatten().tolist()
    if over:
        bounded, old, scales = [parameters[i] for i in over], [before[i] for i in over], scale.unbind()
        weights = [scales[i].to(p.device, p.dtype) for i, p in zip(over, bounded, strict=True)]
        torch._foreach_copy_(bounded, torch._foreach_lerp(old, bounded, weights))
    return moved._replace(scale=scale)


@lru_cache(maxsize=16)
def _floors(shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Least norm of each tensor, given its number of dimensions and elements; the same at every step, so kept."""
    floors = [(VECTOR_FLOOR_RMS if ndim <= 1 else MATRIX_FLOOR_RMS) * numel**0.5 for ndim, numel in shapes]
    return torch.tensor(floors, device=device, dtype=dtype)


def multiply_(tensors: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply tensors in place by one scalar, or by one each, without reading it on an accelerator's host."""
    if scale.ndim == 0 and scale.device.type == "cpu" and scale == 1:  # where looking costs nothing, it saves a pass
        return
    groups = _group_tensors_by_device_and_dtype([list(tensors)], with_indices=True)  # as torch's own clip does
    for (device, _), ((group,), indices) in groups.items():
        if scale.ndim == 0:
            torch._foreach_mul_(cast("list[Tensor]", group), scale.to(device))
        else:
            factors = scale.to(device).unbind()
            torch._foreach_mul_(cast("list[Tensor]", group), [factors[i] for i in indices])


def _sound(total_norm: Tensor) -> Tensor:
    """Whether a norm may enter a policy's state: finite, and its square too, which a variance is made of."""
    return torch.le(total_norm, FLOAT32_NORM_LIMIT)


def _coef(max_norm: float | Tensor, total_norm: Tensor) -> Tensor:
    """torch's clip coefficient, with torch's arithmetic."""
    return torch.clamp(max_norm / (total_norm + NORM_EPS), max=1.0)


def _clipped(clipped_norm: Tensor, total_norm: Tensor) -> Clipped:
    """Effective coefficient of a rule that has no single one; a zero gradient was not clipped."""
    total = total_norm.to(clipped_norm.dtype)
    # Recomputing a norm from its parts may differ in the last bits; that is not a clip.
    same = torch.isclose(clipped_norm, total, rtol=1e-5, atol=0.0)
    coef = torch.where(same | (total == 0), torch.ones_like(total), clipped_norm / total)
    return Clipped(torch.where(same, total, clipped_norm), coef)


_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_WEIGHT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def _last_stage(parameter_names: Sequence[str]) -> str:
    """Name prefix of the last stage: ``model.23.`` of a YOLO model, the last child of any other."""
    parts = parameter_names[-1].split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1] if numbered else parts[:1]) + "."
