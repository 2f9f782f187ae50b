"""How others log the norms or histograms of every gradient, to be timed beside ours.

Each takes a model whose parameters have gradients and gives what would be logged. The library's own code runs where the
library is installed (`make bench` puts two of them beside the environment); where it is not, the arithmetic that it
publishes. `source` says which.

| name                  | what is logged                     | from                                    |
|-----------------------|------------------------------------|-----------------------------------------|
| `per_parameter_item`  | a norm per parameter               | the loop of most tutorials              |
| `lightning_grad_norm` | a norm per parameter, and in total | Lightning's `grad_norm`                 |
| `composer_monitor`    | the same                           | Composer's `OptimizerMonitor`           |
| `histograms`          | 64 bins per parameter              | Weights & Biases' `watch`, sent nowhere |
"""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

__all__ = ["LIBRARIES", "composer_monitor", "histograms", "lightning_grad_norm", "per_parameter_item", "source"]

BINS = 64
LIBRARIES = {"lightning_grad_norm": "lightning", "composer_monitor": "mosaicml", "histograms": "wandb"}


def source(library: str) -> str:
    """Whose code runs: the library's, with its version, or its published arithmetic."""
    if library == "mosaicml":  # its releases ask for other releases of torch than Ultralytics'
        return "arithmetic of mosaicml"
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return f"arithmetic of {library}"


def per_parameter_item(model: nn.Module) -> dict[str, float]:
    """Norm by name, each read by itself."""
    return {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}


def lightning_grad_norm(model: nn.Module) -> dict[str, Any]:
    """Norm by name, and the total: 0-d tensors, made a single tensor by way of the host."""
    try:
        from lightning.pytorch.utilities import grad_norm
    except ImportError:
        norms = {name: p.grad.data.norm(2.0) for name, p in model.named_parameters() if p.grad is not None}
        return norms | {"total": torch.tensor(list(norms.values())).norm(2.0)}
    return dict(grad_norm(model, norm_type=2))


def composer_monitor(model: nn.Module) -> dict[str, float]:
    """Norm by name, and the total, summed one by one, each read by itself."""
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None and p.requires_grad]
    norms: dict[str, Any] = {name: torch.linalg.vector_norm(p.grad) for name, p in named}
    norms["total"] = sum(norm**2 for norm in norms.values()) ** 0.5
    return {name: norm.item() for name, norm in norms.items()}


def histograms(model: nn.Module) -> dict[str, tuple[list[float], list[float]]]:
    """Counts and edges by name; a gradient without a finite element has none."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    try:
        import wandb
        from wandb.integration.torch.wandb_torch import TorchHistory
    except ImportError:
        return {name: bins for name, grad in named if (bins := _histogram(grad)) is not None}
    history, kept = TorchHistory(), {}
    run, wandb.run = wandb.run, SimpleNamespace(_log=lambda row, commit: kept.update(row))
    try:
        for name, grad in named:
            history.log_tensor_stats(grad, name)
    finally:
        wandb.run = run
    return {name: (bins.histogram, bins.bins) for name, bins in kept.items()}


def _histogram(grad: torch.Tensor) -> tuple[list[float], list[float]] | None:
    flat = grad.detach().clone().reshape(-1).float()
    finite = torch.isfinite(flat)
    if (~finite).all().item():
        return None
    if not finite.all():
        flat = flat[finite]
    low, high = flat.min().item(), flat.max().item()
    if low == high:
        return [float(flat.numel())], [low, high]
    counts = flat.histc(bins=BINS, min=low, max=high)
    return counts.cpu().tolist(), torch.linspace(low, high, steps=BINS + 1).tolist()
