"""`yolo_gradstab.lr_range`: the schedule and the stop by themselves, then real range tests of a tiny model."""

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import TINY, DrawnSet
from ultralytics.utils import LOGGER

from yolo_gradstab import read_run
from yolo_gradstab.cli import main
from yolo_gradstab.config import ConfigError
from yolo_gradstab.lr_range import RangeTest, Result, run_lr_range, suggested_grid

pytestmark = pytest.mark.filterwarnings("default")  # the host's own warnings are not ours to fail on


def fed(losses: list[float], lr_min: float = 1e-4, lr_max: float = 1.0) -> RangeTest:
    test = RangeTest(lr_min, lr_max, len(losses))
    for loss in losses:
        if test.ended:
            break
        test.add(loss, 10.0)
    return test


def test_rates_rise_by_one_ratio_to_the_end() -> None:
    rates = RangeTest(1e-5, 1.0, 101).rates
    assert rates[0] == 1e-5
    assert rates[-1] == pytest.approx(1.0)
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([10**0.05] * 100)


def test_smoothing_is_the_bias_corrected_mean() -> None:
    losses = np.random.default_rng(0).uniform(5, 9, size=60).tolist()
    weights = 0.95 ** np.arange(60)[::-1]
    assert fed(losses).smoothed[-1] == pytest.approx(float(np.average(losses, weights=weights)))


def test_it_stops_at_four_times_the_lowest_smoothed_loss() -> None:
    losses = [*[8.0] * 40, *[4.0] * 30, *[30.0] * 60]
    test = fed(losses)
    smoothed = test.smoothed
    assert test.ended
    assert smoothed[-1] > 4 * min(smoothed[9:]) > smoothed[-2]
    assert test.lr_div == test.rates[len(smoothed) - 1]
    assert "the smoothed loss is 4 times its lowest" in test.result().how


def test_a_noisy_start_does_not_stop_it_and_what_is_not_finite_does() -> None:
    assert fed([1.0, 900.0, 800.0, *[700.0] * 20]).lr_div is None
    test = fed([8.0, 8.0, math.nan, 8.0])
    assert (test.lr_div, test.how) == (test.rates[2], "the loss is not finite")
    result = test.result()
    assert result.loss == [8.0, 8.0, None]
    assert b"NaN" not in msgspec.json.encode(result)


def test_a_step_that_was_left_out_keeps_its_rate_for_the_next() -> None:
    test = RangeTest(1e-4, 1.0, 20)
    for _ in range(3):
        test.leave_out()
    assert (test.rate, test.ended) == (1e-4, False)
    for loss in (8.0, 8.0):
        test.add(loss, 10.0)
    test.leave_out()
    assert test.rate == test.rates[2]
    test.add(math.inf, 10.0)
    assert (test.lr_div, test.how) == (test.rates[2], "the loss is not finite")
    test.stop(4, "later words")  # of all steps, the second that was made
    assert test.lr_div == test.rates[1]


def test_steepest_descent_is_found_and_a_flat_loss_has_none() -> None:
    x = np.linspace(-4, 0, 150)
    losses = (10 - 6 / (1 + np.exp(-(x + 1.5) * 8))).tolist()  # falls fastest at 10**-1.5; smoothing lags by 20 steps
    steepest = fed(losses).result().steepest
    assert steepest is not None
    assert -1.5 < math.log10(steepest) < -1.5 + 20 * 4 / 150
    assert fed([8.0] * 100).result().steepest is None


@pytest.mark.parametrize(
    ("lr_div", "grid"),
    [
        (0.25, [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
        (0.3, [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
        (1.0, [0.01, 0.03, 0.1, 0.3, 1.0]),
        (5.0, [0.03, 0.1, 0.3, 1.0]),  # the host takes no rate above 1
        (300.0, [1.0]),
        (0.001, [1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003]),
    ],
)
def test_the_grid_brackets_the_limit_in_half_decades(lr_div: float, grid: list[float]) -> None:
    assert suggested_grid(lr_div) == grid


def test_every_limit_has_a_grid_around_it() -> None:
    for exponent in np.linspace(-6, 0, 61):
        lr_div = 10.0**exponent
        grid = suggested_grid(lr_div)
        assert grid[0] <= lr_div / 100 * 1.001
        assert grid[-1] >= min(3 * lr_div, 1.0) * 0.999
        assert all(b / a == pytest.approx(3, rel=0.12) for a, b in pairwise(grid))


# Real runs


def arguments(drawn: DrawnSet, folder: Path, **more: Any) -> dict[str, Any]:
    own = drawn.arguments(folder, **more)
    return {
        key: value for key, value in own.items() if key not in {"epochs", "lr0", "close_mosaic", "project", "exist_ok"}
    }


def test_a_real_model_is_broken_and_all_is_left_as_found(
    drawn: dict[str, DrawnSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "info", said.append)
    random.seed(5)
    np.random.seed(6)  # noqa: NPY002  # the global one, which must be left alone
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    # This one is deep enough to collapse; the set's own model bears each of these rates.
    given = arguments(drawn["detect"], tmp_path, model=str(TINY["detect"]))
    result = run_lr_range("detect", given, {"clip": "none"}, lr_min=1e-3, lr_max=10.0, steps=60, out=tmp_path / "range")
    assert result.lr_div is not None
    assert 0.1 < result.lr_div < 10.0
    assert "nothing is matched" in result.how or "their start" in result.how  # collapse: the loss only falls
    assert len(result.lr) < 60
    assert said
    assert not any("yolo-gradstab diagnose" in line for line in said)  # to be lost is what it is for
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == deterministic
    assert msgspec.json.decode((tmp_path / "range/lr_range.json").read_bytes(), type=Result) == result
    assert (tmp_path / "range/lr_range.png").stat().st_size > 10_000
    assert not list((tmp_path / "range").rglob("*.pt"))
    steps = read_run(tmp_path / "range").steps
    assert steps["lr"].to_list() == pytest.approx(result.lr)
    assert steps["images"].to_list() == [4] * len(steps)  # accumulation does not ramp


def test_groups_keep_their_ratios_and_the_bound_does_not_relax(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    """MuSGD trains its heads' class branches at three times the rate."""
    from yolo_gradstab.trainer import GradstabMixin

    seen: list[tuple[list[float], float]] = []
    original = GradstabMixin._step_and_bound

    def look(self: Any) -> Any:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        bound = self._max_ratios(0.03, follow_lr=True)
        seen.append((rates, float(torch.as_tensor(bound).min())))
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradstabMixin, "_step_and_bound", look)
        run_lr_range(
            "detect",
            arguments(drawn["detect"], tmp_path, optimizer="MuSGD"),
            {"update_clip": 0.03},
            lr_min=1e-4,
            lr_max=1e-2,
            steps=20,
            out=tmp_path / "range",
        )
    assert len(seen) == 20
    ratios = [rate / seen[0][0][0] for rate in seen[0][0]]
    assert sorted({round(ratio, 6) for ratio in ratios}) != [1.0]  # there are groups of another rate
    for step, (rates, bound) in enumerate(seen):
        assert [rate / rates[0] for rate in rates] == pytest.approx(ratios)
        assert bound == pytest.approx(0.03)
        assert min(rates) == pytest.approx(1e-4 * 100 ** (step / 19))


def test_every_step_is_made_where_an_epoch_is_less_than_one(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    """Four micro-batches an epoch, ten to a step."""
    given = arguments(drawn["detect"], tmp_path, nbs=40)
    result = run_lr_range("detect", given, lr_min=1e-5, lr_max=1e-3, steps=20, out=tmp_path / "range")
    assert len(result.lr) == 20
    assert result.lr[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("scale", [2.0**127, math.inf], ids=["that finds its scale", "that does not"])
def test_a_gradient_scaler_that_looks_for_its_scale_is_no_limit(
    drawn: dict[str, DrawnSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """As it is from 65536 down in fp16, which the CPU does not train in; with an infinite scale it never finds one."""
    from yolo_gradstab.trainer import GradstabMixin

    original = GradstabMixin._setup_train

    def with_scaler(self: Any) -> None:
        original(self)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    monkeypatch.setattr(GradstabMixin, "_setup_train", with_scaler)
    # An epoch is a single step, of which there must be some more than rates.
    given = arguments(drawn["detect"], tmp_path, batch=16, nbs=16)
    result = run_lr_range("detect", given, lr_min=1e-5, lr_max=1e-3, steps=20, out=tmp_path / "range")
    steps = read_run(tmp_path / "range").steps
    made = steps.filter(~steps["skipped"])
    if math.isinf(scale):
        assert result.how == "20 optimizer steps in a row could not be applied"
        assert (result.lr_div, len(made), len(steps), result.lr) == (1e-5, 0, 20, [])
    else:
        assert result.lr_div is None
        assert 0 < len(steps) - len(made) < 20
        assert made["lr"].to_list() == pytest.approx(result.lr)
        assert result.lr[-1] == pytest.approx(1e-3)


def test_the_grid_is_of_rates_that_were_tried() -> None:
    test = RangeTest(1e-4, 1.0, 21)
    for _ in range(11):
        test.add(8.0, 10.0)
    assert test.result().how == "training did not break up to lr 0.01"
    assert test.result().grid == suggested_grid(0.01)


def test_command_prints_limit_grid_and_chart(
    drawn: dict[str, DrawnSet], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = arguments(drawn["detect"], tmp_path)
    words = [f"{key}={value}" for key, value in given.items() if key != "optimizer"]
    out = tmp_path / "range"
    assert main(["lr-range", "task=detect", *words, "lr_min=1e-3", "lr_max=0.01", "steps=20", f"out={out}"]) == 0
    printed = capfd.readouterr().out
    assert "20 steps from lr 0.001: training did not break up to lr 0.01\n" in printed
    assert "grid to sweep:  lr0: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03]\n" in printed
    assert f"Chart: {out}/lr_range.png" in printed
    assert printed.count("█") > 20
    assert "No optimizer was given: this is for SGD." in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data=d.yaml model=m.yaml optimizer=SGD", "task must be given"),
        ("task=detect data=d.yaml model=m.yaml optimizer=auto", "optimizer=auto ignores lr0"),
        ("task=detect data=d.yaml optimizer=SGD", "model must be given, as model=..."),
        (
            "task=detect data=d.yaml model=m.yaml optimizer=SGD lr0=0.1",
            "lr0 cannot be set in a range test; give lr_min",
        ),
        (
            "task=detect data=d.yaml model=m.yaml optimizer=SGD epochs=3",
            "epochs cannot be set in a range test; give st",
        ),
        (
            "task=detect data=d.yaml model=m.yaml plots=True",
            "plots=True cannot be had in a range test, which has plots=F",
        ),
        ("task=detect data=d.yaml model=m.yaml optimizer=SGD lr_min=0", "lr_min must be a number above 0, got 0"),
        (
            "task=detect data=d.yaml model=m.yaml optimizer=SGD lr_max=1e-6",
            "lr_max must be above lr_min=1e-05, got 1e-06",
        ),
        (
            "task=detect data=d.yaml model=m.yaml optimizer=SGD steps=5",
            "steps must be a whole number of at least 20, got",
        ),
        (
            "task=mow data=d.yaml model=m.yaml optimizer=SGD",
            "task must be one of detect, segment, semantic, depth, classify, pose, obb, or a trainer class",
        ),
        (
            "task=detect data=d.yaml model=m.yaml device=0,1",
            "device=0,1 is several, and a range test runs on one; give e.g. device=0",
        ),
        ("task=detect lr_mim=1", "unknown key lr_mim=1; the nearest valid key is"),
    ],
)
def test_wrong_use_is_one_line(words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["lr-range", *words.split()]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_arguments_are_checked_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps must be a whole number of at least 20, got 19"):
        run_lr_range("detect", {"model": "m", "data": "d", "optimizer": "SGD"}, steps=19, out=tmp_path)


def test_without_a_step_nothing_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"^no optimizer step was made, so there is nothing to suggest rates by$"):
        RangeTest(1e-5, 1.0, 100).result()
