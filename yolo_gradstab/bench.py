"""What a step costs, as ratios against stock's same part: both timed in turn in one process, many times.

| case                 | ours                                                        | against                        |
|----------------------|-------------------------------------------------------------|--------------------------------|
| `clip_part`          | measure and clip at norm 10, per-tensor norms kept          | `clip_grad_norm_(params, 10)`  |
| `clip_part_<policy>` | the same with that policy                                   | the same                       |
| `per_parameter_item` | stock's clip after reading each norm with `.item()`         | the same                       |
| `optimizer_step`     | measure, clip, SGD step                                     | clip, SGD step                 |
| `update_clip`        | measure, clip, SGD step, bounded update and its ratios      | clip, SGD step                 |
| `guard`              | a training step with the guard on                           | the same with the guard off    |

The guard's step is the trainer's own: forward and backward pass of a real batch, made once for both, and
`optimizer_step`. On means the watch at every step, a look at the model at every fifth and a snapshot at every
twentieth, as after the first steps of a run; off means none of them.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from yolo_gradstab.clipping import clip_update_
from yolo_gradstab.coco.sample import draw_sample
from yolo_gradstab.config import CLIP_POLICIES, clip_policy, load_config
from yolo_gradstab.guard import DivergenceWatch
from yolo_gradstab.norms import gradient_norms
from yolo_gradstab.runs import versions
from yolo_gradstab.snapshot import LEAST_EVERY, MOST_EVERY
from yolo_gradstab.trainer import TASKS, trainer_for

__all__ = ["run_bench"]

ROUNDS = 60
WARMUP_ROUNDS = 5

GUARD_ROUNDS = 10  # at most: each makes a forward and backward pass and forty optimizer steps
GUARD_BATCH = 8  # images: a small batch, so that the guard's share is not flattered by a long step
GUARD_IMGSZ = 320
GUARD_STEP = 100  # from which on, past the first steps of a run, which are looked at one by one


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
    with _quiet():
        yolo = YOLO(model)
    network = yolo.model.to(device)
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
    if yolo.task in TASKS:
        rows.append({"case": "guard", **about, **_compare_guard(model, yolo.task, rounds=min(rounds, GUARD_ROUNDS))})
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
    return _figures(ratios, own_ms)


def _figures(ratios: list[float], own_ms: list[float]) -> dict[str, float]:
    rounds, ratios = len(ratios), sorted(ratios)
    margin = round(0.98 * rounds**0.5)  # 1.96 standard deviations of a binomial with p = 1/2
    middle = rounds // 2
    low, high = ratios[max(0, middle - margin)], ratios[min(rounds - 1, middle + margin)]
    figures = {"ratio": statistics.median(ratios), "low": low, "high": high, "median_ms": statistics.median(own_ms)}
    return {name: round(value, 4) for name, value in figures.items()}


class _Measured(Exception):  # noqa: N818  # no error: it ends the training once the figures are there
    def __init__(self, figures: dict[str, float]) -> None:
        self.figures = figures


class _Unwatched(DivergenceWatch):
    """Sees nothing."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        """No judgement."""


def _compare_guard(model: str, task: str, *, rounds: int) -> dict[str, float]:
    """The figures of `guard`, from a real trainer; also a snapshot's size and time, and the ratio late in a run."""

    class Timed(trainer_for(task, {"telemetry.layers_every": 10**9})):  # type: ignore[misc]
        def optimizer_step(self) -> None:
            raise _Measured(_guard_figures(self, super().optimizer_step, rounds))

    with tempfile.TemporaryDirectory() as folder, _quiet():
        data = draw_sample(Path(folder) / "data", task=task, images=3 * GUARD_BATCH, size=GUARD_IMGSZ)
        arguments = {"model": model, "data": str(data), "imgsz": GUARD_IMGSZ, "batch": GUARD_BATCH, "nbs": GUARD_BATCH}
        arguments |= {"epochs": 1, "optimizer": "SGD", "lr0": 1e-9, "warmup_epochs": 0, "workers": 0, "plots": False}
        arguments |= {"amp": False, "project": folder, "name": "run"}
        try:
            Timed(overrides=arguments).train()
        except _Measured as measured:
            return measured.figures
    raise RuntimeError("the training ended before its first optimizer step")


def _guard_figures(trainer: Any, optimizer_step: Callable[[], None], rounds: int) -> dict[str, float]:
    (batch,) = trainer._micro_batches
    parameters = [p for p in trainer.model.parameters() if p.grad is not None]
    grads = [p.grad.clone() for p in parameters]
    configs = {True: trainer._config, False: load_config({"guard": {"nonfinite": "off", "divergence": "off"}})}
    watches = {True: trainer._watch, False: _Unwatched()}
    trainer._run = None  # what is recorded is not the guard's

    def forward_backward() -> None:
        trainer.model(batch)[0].sum().backward()

    def block(guarded: bool) -> float:
        """Seconds of a step's `optimizer_step`, over as many steps as there are from snapshot to snapshot."""
        trainer._config, trainer._watch, trainer._look = configs[guarded], watches[guarded], None
        trainer._snapshots.go_back(0)
        spent_s = 0.0
        for step in range(GUARD_STEP, GUARD_STEP + LEAST_EVERY):
            trainer._step = step if guarded else GUARD_STEP + 1  # after which no look is taken
            trainer._micro_batches = [batch]
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad.clone()
            spent_s += _seconds(optimizer_step)
        return spent_s / LEAST_EVERY

    ratios, late_ratios, own_ms, snapshots_s = [], [], [], []
    for index in range(-1, rounds):
        pass_s = _seconds(forward_backward)
        spent_s = {guarded: block(guarded) for guarded in ((True, False) if index % 2 else (False, True))}
        snapshot_s = _seconds(trainer._snapshot)
        if index < 0:
            continue
        late_s = spent_s[True] - snapshot_s / LEAST_EVERY + snapshot_s / MOST_EVERY
        ratios.append((pass_s + spent_s[True]) / (pass_s + spent_s[False]))
        late_ratios.append((pass_s + late_s) / (pass_s + spent_s[False]))
        own_ms.append(1e3 * (pass_s + spent_s[True]))
        snapshots_s.append(snapshot_s)
    more = {"late_ratio": round(statistics.median(late_ratios), 4)}
    more |= {"snapshot_ms": round(1e3 * statistics.median(snapshots_s), 2)}
    more |= {"snapshot_mib": round(trainer._snapshot().num_bytes / 2**20, 1)}
    return _figures(ratios, own_ms) | more


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the host's own lines: what `bench` prints may be read by a program."""
    from ultralytics.utils import LOGGER

    level = LOGGER.level
    LOGGER.setLevel("ERROR")
    try:
        yield
    finally:
        LOGGER.setLevel(level)


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
