"""What a step costs, as ratios against stock's same part: both timed in turn in one process, many times.

| case                 | ours                                                        | against                        |
|----------------------|-------------------------------------------------------------|--------------------------------|
| `clip_part`          | measure and clip at norm 10, per-tensor norms kept          | `clip_grad_norm_(params, 10)`  |
| `clip_part_<policy>` | the same with that policy                                   | the same                       |
| `per_parameter_item` | stock's clip after reading each norm with `.item()`         | the same                       |
| `optimizer_step`     | measure, clip, SGD step                                     | clip, SGD step                 |
| `update_clip`        | measure, clip, SGD step, bounded update and its ratios      | clip, SGD step                 |
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from yolo_gradstab.clipping import clip_update_
from yolo_gradstab.config import CLIP_POLICIES, clip_policy
from yolo_gradstab.norms import gradient_norms
from yolo_gradstab.runs import versions

__all__ = ["run_bench"]

ROUNDS = 60
WARMUP_ROUNDS = 5


def run_bench(model: str = "yolo26n.yaml", *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time every case on the device there is.

    Args:
        model: An Ultralytics model YAML; its gradients are random.
        rounds: Pairs of timings per case.

    Returns:
        ``{"machine": ..., "cases": [...]}``; a case's `ratio` is the median over rounds of ours / stock's, `low` and
        `high` its 95 % interval (of the median, from order statistics), `median_ms` our own time.
    """
    from ultralytics import YOLO

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = YOLO(model).model.to(device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    generator = torch.Generator(device=device).manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, device=device)
    optimizer = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9, nesterov=True)
    before = [p.detach().clone() for p in parameters]

    def stock_clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)

    def stock_step() -> None:
        stock_clip()
        optimizer.step()

    def clip_with(name: str) -> Callable[[], None]:
        policy = clip_policy(name).bind(network)

        def ours() -> None:
            measured = gradient_norms([p.grad for p in parameters if p.grad is not None])
            policy.apply_(parameters, measured)

        return ours

    clip_norm = clip_with("norm")

    def our_step() -> None:
        clip_norm()
        optimizer.step()

    def our_bounded_step() -> None:
        clip_norm()
        torch._foreach_copy_(before, parameters)
        optimizer.step()
        clip_update_(parameters, before, 0.03)

    def per_parameter_item() -> None:
        _ = [p.grad.norm().item() for p in parameters if p.grad is not None]
        stock_clip()

    cases = {"clip_part": (clip_norm, stock_clip), "per_parameter_item": (per_parameter_item, stock_clip)}
    cases |= {f"clip_part_{name}": (clip_with(name), stock_clip) for name in CLIP_POLICIES if name != "norm"}
    cases |= {"optimizer_step": (our_step, stock_step), "update_clip": (our_bounded_step, stock_step)}
    about = {"model": model, "device": device.type, "precision": "fp32"}
    rows = [{"case": name, **about, **_compare(ours, stock, rounds)} for name, (ours, stock) in cases.items()]
    return {"machine": _machine(device, len(parameters), sum(p.numel() for p in parameters)), "cases": rows}


def _compare(ours: Callable[[], None], stock: Callable[[], None], rounds: int) -> dict[str, float]:
    """Time both in turn, the order swapped every round, so that what drifts hits both."""
    ratios, own_ms = [], []
    for index in range(-WARMUP_ROUNDS, rounds):
        pair = [(ours, "ours"), (stock, "stock")]
        spent_s = {name: _seconds(part) for part, name in (pair if index % 2 else reversed(pair))}
        if index >= 0:
            ratios.append(spent_s["ours"] / spent_s["stock"])
            own_ms.append(1e3 * spent_s["ours"])
    ratios.sort()
    margin = round(0.98 * rounds**0.5)  # 1.96 standard deviations of a binomial with p = 1/2
    middle = rounds // 2
    low, high = ratios[max(0, middle - margin)], ratios[min(rounds - 1, middle + margin)]
    figures = {"ratio": statistics.median(ratios), "low": low, "high": high, "median_ms": statistics.median(own_ms)}
    return {name: round(value, 4) for name, value in figures.items()}


def _seconds(part: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    part()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def _machine(device: torch.device, num_tensors: int, num_parameters: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return {"device": name, **threads, "tensors": num_tensors, "parameters": num_parameters, "versions": versions()}
