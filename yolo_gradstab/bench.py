"""What a step costs, as ratios against stock's same part: both timed in turn in one process, many times.

| case                  | ours                                                        | against                        |
|-----------------------|-------------------------------------------------------------|--------------------------------|
| `clip_part`           | measure and clip at norm 10, per-tensor norms kept          | `clip_grad_norm_(params, 10)`  |
| `clip_part_<policy>`  | the same with that policy                                   | the same                       |
| `per_parameter_item`, | stock's clip after what others do to log every gradient     | the same                       |
| `lightning_grad_norm`,| (`peers.py`)                                                |                                |
| `composer_monitor`,   |                                                             |                                |
| `histograms`          |                                                             |                                |
| `optimizer_step`      | measure, clip, SGD step                                     | clip, SGD step                 |
| `update_clip`         | measure, clip, SGD step, bounded update and its ratios      | clip, SGD step                 |
| `guard`               | a training step with the guard on                           | the same with the guard off    |
| `train_step`          | a step of a whole training run, default configuration       | the same of a stock run        |
| `train_step_bounded`  | the same with `update_clip=0.03`                            | the same                       |

`clip_part` also has `read_ms`: what reading as many bytes once, as one tensor, takes here; no measure of a gradient can
cost less.

The guard's step is the trainer's own: forward and backward pass of a real batch, made once for both, and
`optimizer_step`. On means the watch at every step, a look at the model at every fifth and a snapshot at every
twentieth, as after the first steps of a run; off means none of them.

`train_step` is from the beginning of a batch to its end in the host's own loop, without loading the data: whole
training runs in one process, ours and one of stock, which take turns step by step. Their sums over twenty steps are
compared, so that what is done at every tenth or twentieth step counts. A step's forward and backward pass are the same
code in both, and most of the noise; on a CPU `added_ms`, with its interval, is the difference of what lies outside of
them: the host's `preprocess_batch` and `optimizer_step`.

On a GPU every case but the guard's also has `syncs` and `stock_syncs`, how often the host waited for the device (in
whole steps the mean of twenty), and each part of a step `kernels` and `stock_kernels`, and `extra_mib`, the most memory
that ours had beyond stock's.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from torch.profiler import DeviceType, ProfilerActivity, profile

from yolo_gradstab import peers
from yolo_gradstab.clipping import clip_update_
from yolo_gradstab.coco.sample import SAMPLE_TASKS, draw_sample, label_sample
from yolo_gradstab.config import CLIP_POLICIES, clip_policy, load_config
from yolo_gradstab.guard import DivergenceWatch
from yolo_gradstab.lockstep import run_in_turns
from yolo_gradstab.norms import gradient_norms
from yolo_gradstab.runs import versions
from yolo_gradstab.snapshot import LEAST_EVERY, MOST_EVERY
from yolo_gradstab.trainer import trainer_for

__all__ = ["PRECISIONS", "run_bench"]

ROUNDS = 60
WARMUP_ROUNDS = 5

GUARD_ROUNDS = 10  # at most: each makes a forward and backward pass and forty optimizer steps
GUARD_BATCH = 8  # images: a small batch, so that the guard's share is not flattered by a long step
GUARD_IMGSZ = 320
GUARD_STEP = 100  # from which on, past the first steps of a run, which are looked at one by one

BLOCKS = 10  # of whole training steps
BLOCK_STEPS = LEAST_EVERY  # so that each block holds all that is done at a cadence, early in a run
PRECISIONS: dict[str, bool | str] = {"fp32": False, "bf16": "bf16", "fp16": True}  # and what the host calls them


def run_bench(
    models: Iterable[str] = ("yolo26n.yaml",),
    *,
    rounds: int = ROUNDS,
    blocks: int = BLOCKS,
    batches: Iterable[int] = (16,),
    imgsz: int = 160,
    optimizers: Iterable[str] = ("SGD",),
    precisions: Iterable[str] = ("fp32",),
) -> dict[str, Any]:
    """Time every case on the device there is.

    Args:
        models: Ultralytics model YAMLs; except in whole steps their gradients are random.
        rounds: Pairs of timings per case.
        blocks: Pairs of blocks of `BLOCK_STEPS` whole training steps, for every batch size, optimizer and precision; 0
            leaves out whole steps, the guard's among them.
        batches: Images per training step.
        imgsz: Pixels of a training image's side.
        optimizers: The host's names.
        precisions: Of `PRECISIONS`; fp16 needs a GPU.

    Returns:
        ``{"machine": ..., "cases": [...]}``; a case's `ratio` is the median over rounds of ours / stock's, `low` and
        `high` its interval (of the median, from order statistics; 95 % from six rounds on, with five 94 %), `median_ms`
        our own time.

    Raises:
        ValueError: fp16 without a GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = list(precisions)
    if device.type == "cpu" and "fp16" in precisions:
        raise ValueError("precision=fp16 needs a GPU; on a CPU Ultralytics trains in fp32 or bf16")
    grid = list(product(batches, optimizers, precisions))
    rows: list[dict[str, Any]] = []
    for model in models:
        task, own_rows = _step_parts(model, device, rounds)
        rows += own_rows
        if task not in SAMPLE_TASKS or not blocks:
            continue
        about = {"model": model, "device": device.type}
        guard = _compare_guard(model, task, rounds=min(rounds, GUARD_ROUNDS))
        rows.append({"case": "guard", **about, "precision": "fp32", **guard})
        for batch, optimizer, precision in grid:
            setting: dict[str, Any] = {"batch": batch, "optimizer": optimizer, "imgsz": imgsz}
            by_case = _compare_runs(model, task, amp=PRECISIONS[precision], blocks=blocks, **setting)
            rows += [{"case": case, **about, "precision": precision, **setting, **by_case[case]} for case in by_case]
    return {"machine": _machine(device), "cases": rows}


def _step_parts(model: str, device: torch.device, rounds: int) -> tuple[str, list[dict[str, Any]]]:
    """The model's task; the cases between backward pass and next batch, on random gradients."""
    from ultralytics import YOLO

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

    def logged_by(log: Callable[[torch.nn.Module], Any]) -> Callable[[], None]:
        def theirs() -> None:
            log(network)
            stock_clip()

        return theirs

    logs = (peers.per_parameter_item, peers.lightning_grad_norm, peers.composer_monitor, peers.histograms)
    cases = {"clip_part": (clip_norm, stock_clip)}
    cases |= {f"clip_part_{name}": (clip_with(name), stock_clip) for name in CLIP_POLICIES if name != "norm"}
    cases |= {log.__name__: (logged_by(log), stock_clip) for log in logs}
    cases |= {"optimizer_step": (our_step, stock_step), "update_clip": (our_bounded_step, stock_step)}
    about = {"model": model, "device": device.type, "precision": "fp32"}
    rows = [
        {"case": name, **about, **_compare(ours, stock, rounds), **_counts(ours, stock, device)}
        for name, (ours, stock) in cases.items()
    ]
    by_case = {row["case"]: row for row in rows}
    elements = sum(p.numel() for p in parameters)
    by_case["clip_part"] |= {"tensors": len(parameters), "parameters": elements}
    by_case["clip_part"]["read_ms"] = round(1e3 * _seconds_of_a_read(elements, device, rounds), 4)
    for case, library in peers.LIBRARIES.items():
        by_case[case]["source"] = peers.source(library)
    return yolo.task, rows


def _seconds_of_a_read(elements: int, device: torch.device, rounds: int) -> float:
    """Median seconds of reading that many float32 numbers once, as the norm of one tensor."""
    flat = torch.randn(elements, device=device)
    times = [_seconds(lambda: torch.linalg.vector_norm(flat)) for _ in range(WARMUP_ROUNDS + rounds)]
    return statistics.median(times[WARMUP_ROUNDS:])


def _counts(ours: Callable[[], None], stock: Callable[[], None], device: torch.device) -> dict[str, float]:
    """On a GPU: waits for the device, kernels launched, and memory beyond stock's; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    counts: dict[str, float] = {}
    peak_mib = {}
    for prefix, part in (("", ours), ("stock_", stock)):
        with _counted_syncs() as syncs:
            part()
        counts[f"{prefix}syncs"] = len(syncs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            part()
            torch.cuda.synchronize()
        ran = [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]
        counts[f"{prefix}kernels"] = sum(not name.startswith(("Memcpy", "Memset")) for name in ran)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        part()
        peak_mib[prefix] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return counts | {"extra_mib": round(peak_mib[""] - peak_mib["stock_"], 2)}


@contextmanager
def _counted_syncs() -> Iterator[list[Any]]:
    """Every wait for a CUDA device inside, as the warning that torch makes of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # such as the one that this mode is a prototype
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _compare_runs(
    model: str, task: str, *, batch: int, imgsz: int, optimizer: str, amp: bool | str, blocks: int
) -> dict[str, dict[str, float]]:
    """By case, the figures of whole training steps, ours against those of one stock run that takes turns with all."""
    from ultralytics import YOLO

    configs: dict[str, dict[str, Any]] = {"train_step": {}, "train_step_bounded": {"update_clip": 0.03}}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainers = {case: trainer_for(task, config) for case, config in configs.items()}
        trainers["stock"] = YOLO(model).task_map[task]["trainer"]
        drawn = draw_sample(Path(folder) / "data", task=task, images=max(3 * batch, 12), size=imgsz)
        arguments = {"model": model, "data": str(label_sample(drawn, task=task)), "imgsz": imgsz, "amp": amp}
        arguments |= {"batch": batch, "nbs": batch, "optimizer": optimizer, "lr0": 1e-4, "workers": 0, "plots": False}
        arguments |= {"val": False, "save": False, "epochs": 10**4, "close_mosaic": 0, "project": folder}
        outside_s: dict[str, list[float]] = {name: [] for name in trainers}
        trainers = {name: _timed_outside(trainer, outside_s[name]) for name, trainer in trainers.items()}
        makers = {name: partial(trainer, overrides={**arguments, "name": name}) for name, trainer in trainers.items()}
        spent_s = run_in_turns(makers, steps=(blocks + 1) * BLOCK_STEPS)
        syncs = _syncs_of_steps(makers) if torch.cuda.is_available() else {}
    whole, outside = ({name: _by_block(times) for name, times in part.items()} for part in (spent_s, outside_s))
    rows = {}
    for case in configs:
        pairs = zip(whole[case], whole["stock"], strict=True)
        rows[case] = _figures([ours / stock for ours, stock in pairs], [1e3 * ours for ours in whole[case]])
        if syncs:
            rows[case] |= {"syncs": syncs[case], "stock_syncs": syncs["stock"]}
        else:
            pairs = zip(outside[case], outside["stock"], strict=True)
            added = _figures([1e3 * (ours - stock) for ours, stock in pairs], [0.0])
            rows[case] |= {"added_ms": added["ratio"], "added_low_ms": added["low"], "added_high_ms": added["high"]}
    return rows


def _by_block(times: list[float]) -> list[float]:
    """Mean of each block after the first."""
    starts = range(BLOCK_STEPS, len(times), BLOCK_STEPS)
    return [statistics.mean(times[start : start + BLOCK_STEPS]) for start in starts]


def _timed_outside(trainer: type, outside_s: list[float]) -> type:
    """This trainer, which adds the seconds of each step outside of its forward and backward pass to a list."""

    class Timed(trainer):  # type: ignore[misc]
        def preprocess_batch(self, batch: dict[str, Any]) -> Any:
            began_s = time.perf_counter()
            batch = super().preprocess_batch(batch)
            self._preprocess_s = time.perf_counter() - began_s
            return batch

        def optimizer_step(self) -> None:
            began_s = time.perf_counter()
            super().optimizer_step()
            outside_s.append(self._preprocess_s + time.perf_counter() - began_s)

    return Timed


def _syncs_of_steps(makers: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """By run, how often the host waits for the device in a training step: the mean of a block after the first."""
    with _counted_syncs() as caught:
        counts = run_in_turns(makers, steps=2 * BLOCK_STEPS, read=lambda: len(caught))
    return {name: _by_block(per_step)[0] for name, per_step in counts.items()}


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
    # As many ratios outside on each side as still cover the median in 95 of 100; of fewer than six, none.
    outside = max(0, int(binom.ppf(0.025, rounds, 0.5)) - 1)
    low, high = ratios[outside], ratios[rounds - 1 - outside]
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


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "versions": versions()}
