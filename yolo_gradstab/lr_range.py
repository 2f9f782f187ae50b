"""A learning-rate range test: the rate rises step by step until training breaks, which brackets the grid of a sweep.

It respects the host: there is no warm-up, every parameter group is scaled by the same factor (MuSGD's groups keep their
ratios), accumulation is fixed and mosaic stays on. Its limit is no verdict: a few steps per rate overestimate what is
stable for long, and a real run's warm-up may allow more. A sweep of the suggested grid decides.

References:
    Smith 2017, "Cyclical learning rates for training neural networks"; the stop at four times the lowest smoothed loss,
    and the steepest descent in log rate, as in fastai's `lr_find`.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import polars as pl

from yolo_gradstab.config import Config, ConfigError
from yolo_gradstab.diagnosis.case import HIGHEST_LR0
from yolo_gradstab.runs import make_out, replacing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RangeTest", "Result", "refuse_keys", "run_lr_range", "suggested_grid"]

SMOOTHING = 0.95
FIRST_STEPS = 10  # while the running mean of the loss settles
SLOPE_STEPS = 8  # to each side, for the steepest descent
RISE = 4.0  # of the smoothed loss over its lowest: the course is left
OPTIMIZER = "SGD"  # where none is given: the host's own default, auto, ignores the learning rate

# What the test decides by itself.
SET_BY_THE_TEST = {
    "lr0": "give lr_min and lr_max",
    "guard.divergence": "it ends where the run diverges",
    "epochs": "give steps",
    "time": "give steps",
    "resume": "start it again",
    "warmup_epochs": "it has no warm-up",
    "warmup_bias_lr": "it has no warm-up",
    "warmup_momentum": "it has no warm-up",
    "close_mosaic": "mosaic stays on",
    "lrf": "the rate rises",
    "cos_lr": "the rate rises",
    "val": "nothing is validated",
    "project": "give out",
    "name": "give out",
    "save_dir": "give out",
}


class Result(msgspec.Struct, kw_only=True):
    """What a range test found; saved as `lr_range.json`.

    Attributes:
        lr_div: The rate at which training broke, or null where it did not.
        how: In words.
        steepest: The rate at which the smoothed loss fell fastest per decade, or null where it did not fall.
        grid: Rates for a sweep, half a decade apart, from a hundredth of `lr_div` to three times it.
        lr: Of each step; `loss` per image, `smoothed_loss` and `total_norm` beside it, null where not finite.
    """

    lr_div: float | None
    how: str
    steepest: float | None
    grid: list[float]
    lr: list[float]
    loss: list[float | None]
    smoothed_loss: list[float | None]
    total_norm: list[float | None]


class RangeTest:
    """Which rate comes next, and whether to go on; knows no model.

    Args:
        lr_min: First rate.
        lr_max: Last rate.
        steps: From the first to the last, at equal ratios.
    """

    def __init__(self, lr_min: float, lr_max: float, steps: int) -> None:
        self.rates = [lr_min * (lr_max / lr_min) ** (i / (steps - 1)) for i in range(steps)]
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.norms: list[float] = []
        self.lr_div: float | None = None
        self.how = ""
        self._mean = 0.0
        self._places: list[int] = []  # of each optimizer step, also of one that was not made, among the rates

    @property
    def ended(self) -> bool:
        """Whether training broke or the rates are used up."""
        return self.lr_div is not None or len(self.losses) == len(self.rates)

    @property
    def rate(self) -> float:
        """Of the next step."""
        rate: float = self.rates[min(len(self.losses), len(self.rates) - 1)]
        return rate

    def add(self, loss: float, total_norm: float) -> None:
        """The values of a step made at `rate`, whose loss was computed before it."""
        self.losses.append(loss)
        self.norms.append(total_norm)
        count = len(self.losses)
        self._places.append(count - 1)
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        self.smoothed.append(self._mean / (1 - SMOOTHING**count))
        if not (math.isfinite(loss) and math.isfinite(total_norm)):
            self.stop(len(self._places) - 1, f"the {'gradient norm' if math.isfinite(loss) else 'loss'} is not finite")
        elif count > FIRST_STEPS and self.smoothed[-1] > RISE * min(self.smoothed[FIRST_STEPS - 1 :]):
            self.stop(len(self._places) - 1, f"the smoothed loss is {RISE:g} times its lowest")

    def leave_out(self) -> None:
        """A step that was not made, for a reason that is not the rate's: it is the next step's again."""
        self._places.append(min(len(self.losses), len(self.rates) - 1))

    def stop(self, step: int, how: str) -> None:
        """Training broke at this optimizer step."""
        self.lr_div, self.how = self.rates[self._places[step]], how

    def result(self) -> Result:
        """What was found so far.

        Raises:
            ValueError: No step has been made, and nothing said why.
        """
        count = len(self.losses)
        if not count and not self.how:
            raise ValueError("no optimizer step was made, so there is nothing to suggest rates by")
        how = self.how or f"training did not break up to lr {self.rates[count - 1]:.3g}"
        return Result(
            lr_div=self.lr_div,
            how=how,
            steepest=self._steepest(),
            grid=suggested_grid(self.lr_div or self.rates[count - 1]),
            lr=self.rates[:count],
            loss=[_finite(value) for value in self.losses],
            smoothed_loss=[_finite(value) for value in self.smoothed],
            total_norm=[_finite(value) for value in self.norms],
        )

    def _steepest(self) -> float | None:
        """Where the smoothed loss falls fastest per decade, before its lowest point; a collapse is no descent."""
        end = len(self.losses) if self.lr_div is None else self.rates.index(self.lr_div)
        values = self.smoothed[:end]
        if len(values) <= FIRST_STEPS + 1:
            return None
        lowest = min(range(FIRST_STEPS, len(values)), key=values.__getitem__)
        # Over some steps to each side: a mean of 20 noisy losses still has slopes of its own from step to step.
        first, last = FIRST_STEPS + SLOPE_STEPS, min(lowest, len(values) - SLOPE_STEPS - 1)
        slopes = {i: values[i + SLOPE_STEPS] - values[i - SLOPE_STEPS] for i in range(first, last + 1)}
        best = min(slopes, key=slopes.__getitem__, default=None)
        return None if best is None or slopes[best] >= 0 else self.rates[best]


def suggested_grid(lr_div: float) -> list[float]:
    """Half-decade rates (1, 3 times powers of ten) from a hundredth of `lr_div` to three times it, at most 1.

    Example:
        >>> suggested_grid(0.25)
        [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    """
    lr_div = min(lr_div, 100 * HIGHEST_LR0)  # of which a hundredth can still be set
    exponents = range(math.floor(math.log10(lr_div)) - 3, math.ceil(math.log10(lr_div)) + 2)
    rates = [float(f"{mantissa}e{exponent}") for exponent in exponents for mantissa in (1, 3)]
    # Widened to the next rate outside: the limit itself is uncertain by more than that.
    low = max(rate for rate in rates if rate <= lr_div / 100 * 1.001 or rate == rates[0])
    high = min((rate for rate in rates if rate >= 3 * lr_div * 0.999), default=rates[-1])
    return [rate for rate in rates if low <= rate <= min(high, HIGHEST_LR0)]


def run_lr_range(
    task: str,
    arguments: dict[str, Any],
    config: Config | dict[str, Any] | None = None,
    *,
    lr_min: float = 1e-5,
    lr_max: float = 1.0,
    steps: int = 150,
    out: str | Path = "runs/lr_range",
) -> Result:
    """Raise the learning rate over `steps` optimizer steps of a fresh training run, and say where it broke.

    The global random states and torch's determinism settings are left as found; no weights are saved.

    Args:
        task: One of the host's; the trainer is the model's own.
        arguments: Ultralytics' training arguments, without those the test sets itself; the optimizer is SGD by default.
        config: Keys of ours, as for `trainer_for`; `guard.divergence` is `stop` in any case.
        lr_min: First rate.
        lr_max: Last rate; above 1 it is beyond what Ultralytics takes as lr0.
        steps: Optimizer steps, 100 to 200 for a factor of 1.05 to 1.1 between them.
        out: Where the records, `lr_range.json` and `lr_range.png` go.

    Raises:
        ConfigError: An argument is wrong; nothing has been started.
    """
    _check(arguments, lr_min=lr_min, lr_max=lr_max, steps=steps)
    from yolo_gradstab import figures
    from yolo_gradstab.trainer import host_model, trainer_for

    # After this check the guard's own: it stops on collapse, which a rise of the loss does not show.
    stopping = {"guard.divergence": "stop"}
    trainer_for(task, config, **stopping)  # which checks both, before anything is built
    test = RangeTest(lr_min, lr_max, steps)
    folder = Path(out)
    make_out(folder, ConfigError)
    own: dict[str, Any] = {
        "epochs": steps,
        "lr0": HIGHEST_LR0,
        "lrf": 1.0,
        "warmup_epochs": 0.0,
        "close_mosaic": 0,
        "plots": False,
    }
    own |= {"val": False, "save": False, "exist_ok": True, "cos_lr": False}
    own |= {"project": str(folder.parent.absolute()), "name": folder.name}
    with _left_as_found():
        host = host_model(task, arguments["model"])[1]  # which draws the weights of a model
        ranging = type("Ranging", (_Ranging, trainer_for(host, config, **stopping)), {"range_test": test})
        trainer = ranging(overrides={"optimizer": OPTIMIZER, **arguments, **own})
        # An epoch may be a single micro-batch, and a step several of them, as many as the host counts; or, where it is
        # to find the batch itself, at most one for each image of the nominal batch. The test ends itself.
        args = trainer.args
        per_step = max(1, round(args.nbs / args.batch)) if args.batch >= 1 else args.nbs
        trainer.epochs = args.epochs = steps * per_step
        trainer.train()
        trainer.take_divergence()  # growth of the weights is judged a step later, of the last ones at the end
    result = test.result()
    with replacing(folder / "lr_range.json") as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    values = {name: getattr(result, name) for name in ("lr", "loss", "smoothed_loss")}
    table = pl.DataFrame(values, schema=dict.fromkeys(values, pl.Float64), strict=False)
    figures.save(figures.lr_range(table, lr_div=result.lr_div, grid=result.grid), folder / "lr_range.png")
    return result


class _Ranging:
    """In front of a trainer of ours: each optimizer step at the next rate."""

    range_test: RangeTest

    def optimizer_step(self: Any) -> None:
        """At the rate whose turn it is, all groups scaled by the same factor."""
        if self.range_test.ended:  # pending batches of the last epoch
            return
        if self._step == 0:
            self._ratios = [group["initial_lr"] / HIGHEST_LR0 for group in self.optimizer.param_groups]
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            # The initial rate too: `update_clip` relaxes with the schedule, and here there is none.
            group["lr"] = group["initial_lr"] = self.range_test.rate * ratio
        super().optimizer_step()  # type: ignore[misc]
        self.take_divergence()
        if self.range_test.ended:
            self.stop = True

    def take_divergence(self: Any) -> None:
        """What the watch has found, a collapse at the first of its quiet steps."""
        found = self._divergence
        if found is not None and self.range_test.lr_div is None:
            quiet = self._watch.num_small if found.kind == "collapse" else 0
            self.range_test.stop(max(0, min(found.step, self._step - quiet)), found.reason)

    def _read(self: Any, total_norm: Tensor) -> tuple[float, float]:
        norm, loss = super()._read(total_norm)  # type: ignore[misc]
        # An fp16 scaler that looks for its scale; too many such steps in a row are a divergence to the watch.
        if self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm):
            self.range_test.leave_out()
            self.epochs += self.accumulate  # where an epoch may be less than a step
        else:
            self.range_test.add(loss, norm)
        return norm, loss

    def validate(self: Any) -> tuple[dict[str, float], float]:
        """Nothing: its weights are not kept."""
        return {}, 0.0

    def save_model(self: Any) -> bool:
        """Nothing."""
        return False

    def _last_words(self: Any, run: Any) -> None:
        """Nothing: to be lost is what the test is for."""


def refuse_keys(keys: Iterable[str]) -> None:
    """Refuse what the test decides by itself.

    Raises:
        ConfigError: One line naming the key.
    """
    for key in keys:
        if key in SET_BY_THE_TEST:
            raise ConfigError(f"{key} cannot be set in a range test; {SET_BY_THE_TEST[key]}")


def _check(arguments: dict[str, Any], *, lr_min: float, lr_max: float, steps: int) -> None:
    refuse_keys(arguments)
    for key, its_own in {"plots": False, "save": False, "exist_ok": True}.items():
        if arguments.get(key, its_own) != its_own:
            raise ConfigError(f"{key}={arguments[key]} cannot be had in a range test, which has {key}={its_own}")
    if str(arguments.get("optimizer", OPTIMIZER)).lower() == "auto":
        raise ConfigError(
            "optimizer=auto ignores lr0, and would choose by the test's length; give e.g. SGD, MuSGD or AdamW"
        )
    for name, value in (("lr_min", lr_min), ("lr_max", lr_max)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a number above 0, got {value!r}")
    if lr_max <= lr_min:
        raise ConfigError(f"lr_max must be above lr_min={lr_min!r}, got {lr_max!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2 * FIRST_STEPS:
        raise ConfigError(f"steps must be a whole number of at least {2 * FIRST_STEPS}, got {steps!r}")
    device = re.sub(r"[\[\]() ]", "", str(arguments.get("device")))
    if "," in device:
        raise ConfigError(f"device={device} is several, and a range test runs on one; give e.g. device=0")
    for key in ("model", "data"):
        if not arguments.get(key):
            raise ConfigError(f"{key} must be given, as {key}=...")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _left_as_found() -> Iterator[None]:
    """Random states, determinism and environment as before: the host seeds and sets them globally."""
    import numpy as np
    import torch

    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002  # the host's generator
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn, fill = torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    names = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED")
    environment = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.backends.cudnn.deterministic = cudnn
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
