"""`yolo_gradstab.guard` on recorded and made series; collapses of real runs are in `test_trainer.py`."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest

from yolo_gradstab.guard import (
    LARGEST_UNCLIPPED_RATIO,
    SPIKES_IN_A_ROW,
    Divergence,
    DivergenceWatch,
    HealthWatch,
    SpikeWatch,
    find_divergences,
    is_look,
)

# A run of yolo11n, SGD at 0.1 without clipping, that ended at a loss of 1e-8 and mAP 0 (ALGORITHMS F14).
LOSSES = [227, 218, 201, 241, 200, 391, 4240, 14216, 268, 237, 161, 7681, 2.25e8, 0.0099, 0.0011, 0.0033]
NORMS = [712, 1007, 470, 662, 228, 1231, 3.8e4, 1.4e5, 105, 128, 413, 2.2e4, 6.6e6, 0.33, 0.65, 0.24]


def table(losses: Any, norms: Any = None, skipped: Any = None, first: int = 0) -> pl.DataFrame:
    losses = [float(loss) for loss in losses]
    columns = {
        "step": range(first, first + len(losses)),
        "loss": losses,
        "total_norm": [10.0] * len(losses) if norms is None else [float(norm) for norm in norms],
        "skipped": [False] * len(losses) if skipped is None else skipped,
    }
    return pl.DataFrame(columns)


def kinds(found: list[Divergence]) -> list[tuple[str, int]]:
    return [(finding.kind, finding.step) for finding in found]


def healthy(count: int, *, seed: int = 0, start: float = 200.0, end: float = 40.0) -> list[float]:
    """A falling loss with the spread of a detector's batches."""
    noise = np.random.default_rng(seed).lognormal(sigma=0.35, size=count)
    return list(np.geomspace(start, end, count) * noise)


def test_the_recorded_collapse_is_a_blowup_and_then_a_collapse() -> None:
    assert kinds(find_divergences(table(LOSSES, NORMS))) == [("blowup", 12), ("collapse", 15)]


def test_nothing_is_judged_before_ten_steps() -> None:
    assert find_divergences(table(LOSSES[:12], NORMS[:12])) == []
    assert find_divergences(table([200.0] * 6 + [1e5] + [200.0] * 20)) == []
    # ...but what is not finite cannot come back
    assert kinds(find_divergences(table([200.0, math.nan, 200.0]))) == [("nonfinite", 1)]


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_healthy_run_is_none(seed: int) -> None:
    losses = healthy(2000, seed=seed)
    norms = np.random.default_rng(seed + 100).lognormal(mean=6, sigma=0.5, size=2000)
    norms[700], losses[700] = 1e5, 80 * float(np.median(losses[:10]))  # a spike that heals
    layers = pl.DataFrame({"step": [0, 10], "layer": ["model.0"] * 2, "weight_norm": [0.5, 20.0]})
    assert find_divergences(table(losses, norms), layers, map50=0.4) == []


def test_a_loss_that_stays_high_is_a_blowup_within_its_lasting_steps() -> None:
    losses = [200.0] * 50 + [1500.0] * 60
    (found,) = find_divergences(table(losses))
    # By hand: the mean passes 2 x 200 at the 9th of the high steps, 4 x its lowest (200) at the 31st; then 20 steps.
    share = [(1 - 0.98**i) * 1300 / (1 - 0.98 ** (50 + i)) + 200 for i in range(1, 60)]
    first = next(i for i, mean in enumerate(share) if mean > 800)
    assert (found.kind, found.step) == ("blowup", 50 + first + 19)
    assert "far above its lowest for 20 steps, now 1.5e+03 (start 200)" in found.reason


def test_a_loss_a_hundred_times_its_start_is_a_blowup_at_once() -> None:
    assert kinds(find_divergences(table([*healthy(30, end=200), 2.9e4]))) == [("blowup", 30)]
    assert find_divergences(table([200.0] * 30 + [1.99e4, 200.0])) == []


def test_the_echo_of_a_spike_in_the_mean_is_no_blowup() -> None:
    losses = [200.0] * 10 + [80.0] * 30 + [1.9e4] + [80.0] * 60
    means = pl.Series(losses).ewm_mean(alpha=0.02)
    assert ((means > 400) & (means > 4 * means.cum_min())).sum() > 20
    assert find_divergences(table(losses)) == []


def test_collapse_without_a_blowup_needs_ten_steps_and_the_norm() -> None:
    quiet = [200.0] * 20 + [0.0] * 12
    small = [700.0] * 20 + [0.0] * 12
    assert kinds(find_divergences(table(quiet, small))) == [("collapse", 29)]
    assert find_divergences(table(quiet[:29], small[:29])) == []  # batches without objects
    assert find_divergences(table(quiet, [700.0] * 32)) == []  # a small loss that still has gradients
    (found,) = find_divergences(table([200.0] * 20 + [1e-8] * 12, [700.0] * 20 + [1e-5] * 12))
    assert found.reason == (
        "the loss is 1e-08 (start 200) and the gradient norm 1e-05 (start 700): nothing is matched any more"
    )


def test_ten_of_twelve_steps_without_a_match_are_a_collapse_where_most_steps_had_matches() -> None:
    def found(box: list[float], **others: Any) -> list[tuple[str, int]]:
        steps = table([200.0] * 20 + [5.0] * (len(box) - 20))  # the classes still have a loss, the norm is as it was
        columns = {"loss_box": box, "loss_cls": [4.0] * len(box), **others}
        return kinds(find_divergences(steps.with_columns(**{name: pl.Series(v) for name, v in columns.items()})))

    died = [6.0] * 20 + [0.0] * 10
    assert found(died) == [("collapse", 29)]
    assert found(died[:-1]) == []
    assert found([*died[:25], 1e-4, 3.0, *died[20:25]]) == [("collapse", 30)]  # once by chance; 1e-4 is nothing
    assert found(died, loss_l1=[0.1] * 30) == []
    # sets with many images without objects, a gain that is 0, and a loss that has no such part
    sparse = [0.0 if i % 5 == 0 else 6.0 for i in range(20)] + [0.0] * 10
    assert found(sparse) == []
    assert found([0.0] * 30) == []
    watch = DivergenceWatch()
    assert all(watch.add(i, loss=1.0, total_norm=1.0, matched_loss=None) is None for i in range(40))
    # Images without objects leave the same records; a run that learned something had such images.
    records = table([200.0] * 20 + [5.0] * 10).with_columns(loss_box=pl.Series(died), loss_cls=pl.lit(4.0))
    assert kinds(find_divergences(records, map50=0.4)) == []
    assert kinds(find_divergences(records, map50=0.0)) == [("collapse", 29)]


def test_a_loss_that_is_zero_from_the_start_is_a_collapse() -> None:
    """Of a detector that goes on from weights that had collapsed."""
    assert kinds(find_divergences(table([0.0] * 30, norms=[0.0] * 30))) == [("collapse", 10)]
    watch = DivergenceWatch()
    losses = [0.0] * 10 + [1e-7] * 5
    found = [watch.add(i, loss=loss, total_norm=0.0) for i, loss in enumerate(losses)]
    assert [divergence.kind for divergence in found if divergence] == ["collapse"]
    late = DivergenceWatch()
    assert [late.add(i, loss=0.0, total_norm=0.0) for i in range(9)] == [None] * 9
    assert late.end(9, map50=0.0) is None
    late.add(9, loss=0.0, total_norm=0.0)
    assert late.end(9, map50=0.0) is None


def test_a_classifier_that_has_fit_is_no_collapse() -> None:
    def found(name: str) -> list[tuple[str, int]]:
        steps = table([2.0] * 20 + [1e-6] * 30, [5.0] * 20 + [1e-5] * 30)
        return kinds(find_divergences(steps.with_columns(pl.col("loss").alias(name))))

    assert found("loss_loss") == found("loss_ce") == []
    assert found("loss_cls") == [("collapse", 29)]


def test_a_wrong_label_in_a_classifier_that_starts_fit_is_no_blowup() -> None:
    def found(name: str, wrong: float) -> list[tuple[str, int]]:
        steps = table([1e-4] * 20 + [wrong] + [1e-4] * 20)
        return kinds(find_divergences(steps.with_columns(pl.col("loss").alias(name))))

    assert found("loss_loss", 12.0) == []
    assert found("loss_loss", 101.0) == [("blowup", 20)]
    assert found("loss_cls", 12.0) == [("blowup", 20)]


def test_a_step_that_was_skipped_is_not_a_divergence_but_twenty_in_a_row_are() -> None:
    losses = [200.0] * 40
    losses[15] = math.nan
    assert find_divergences(table(losses, skipped=[i == 15 for i in range(40)])) == []
    assert kinds(find_divergences(table(losses))) == [("nonfinite", 15)]
    skipped = [i >= 15 for i in range(40)]
    norms = [10.0] * 15 + [math.inf] * 25
    assert kinds(find_divergences(table([200.0] * 40, norms, skipped))) == [("nonfinite", 34)]
    assert find_divergences(table([200.0] * 34, norms[:34], skipped[:34])) == []  # a scaler that looks for its scale


def test_weights_and_variances_that_grow_are_a_collapse() -> None:
    watch = DivergenceWatch()
    assert watch.add_state(0, weight_norms={"model.0": 2.0, "model.23": 0.0}, running_var=1.0) is None
    assert watch.add_state(10, weight_norms={"model.0": 199.0, "model.23": 5.0}, running_var=9.9e7) is None
    found = watch.add_state(20, weight_norms={"model.0": 201.0, "model.23": 5.0}, running_var=1.0)
    assert found == Divergence("collapse", 20, "the weights of model.0 are 100 times their start")
    found = DivergenceWatch().add_state(5, weight_norms={}, running_var=2e8)
    assert found == Divergence("collapse", 5, "a BatchNorm running variance is 2e+08")
    layers = pl.DataFrame(
        {"step": [0, 0, 10, 10, 20, 20], "layer": ["a", "b"] * 3, "weight_norm": [1.0, 1.0, 2.0, 101.0, 300.0, 500.0]}
    )
    (found,) = find_divergences(table([200.0] * 30), layers)
    assert (found.kind, found.step, found.reason) == ("collapse", 10, "the weights of b are 101 times their start")


def test_the_end_decides_whether_a_high_loss_was_a_collapse() -> None:
    losses = [200.0] * 20 + [3000.0] + [150.0] * 100
    assert find_divergences(table(losses), map50=0.2) == []
    assert find_divergences(table(losses), map50=None) == []
    (found,) = find_divergences(table(losses), map50=0.0005)
    assert (found.kind, found.step) == ("collapse", 120)
    assert find_divergences(table([200.0] * 100), map50=0.0) == []  # it did not learn, which is not a divergence


def test_state_survives_a_checkpoint() -> None:
    whole, first = DivergenceWatch(), DivergenceWatch()
    for step in range(13):
        whole.add(step, loss=LOSSES[step], total_norm=NORMS[step])
        first.add(step, loss=LOSSES[step], total_norm=NORMS[step])
    second = msgspec.convert(msgspec.to_builtins(first), DivergenceWatch)
    for step in range(13, 16):
        assert whole.add(step, loss=LOSSES[step], total_norm=NORMS[step]) == second.add(
            step, loss=LOSSES[step], total_norm=NORMS[step]
        )
    assert whole == second
    assert whole.kinds == ["blowup", "collapse"]


def test_records_without_a_value_and_empty_ones_are_read() -> None:
    assert find_divergences(table([])) == []
    gap = table([200.0] * 12).with_columns(loss=pl.Series([200.0] * 11 + [None]))
    assert kinds(find_divergences(gap)) == [("nonfinite", 11)]


RESULTS = Path(__file__).parents[1] / "notebooks" / "results" / "2026-11-23-drawn-detect-cpu"


def test_real_runs_that_collapsed_are_found_early_and_no_other_is() -> None:
    """30 recorded runs of stock and of `update_clip`: the six that ended at mAP 0, within a third of their steps."""
    steps, layers = pl.read_parquet(RESULTS / "steps.parquet"), pl.read_parquet(RESULTS / "layers.parquet")
    lost = 0
    for trial in json.loads((RESULTS / "trials.json").read_text()):
        mine = pl.col("id") == trial["id"]
        found = find_divergences(steps.filter(mine).sort("step"), layers.filter(mine), map50=None)
        assert bool(found) == (trial["final_metric"] < 1e-3), trial["command"]
        assert all(finding.step < 60 for finding in found)
        lost += bool(found)
    assert lost == 6


# Early warnings


def looks(
    norms: list[float], variances: list[float] | None = None, ratio: float | None = None, every: int = 5
) -> list[str | None]:
    """What each look finds, so many steps apart."""
    watch = HealthWatch()
    found = [
        watch.look(every * i, weight_norms={"model.0": 1.0, "model.1": norm}, running_var=variance, update_ratio=ratio)
        for i, (norm, variance) in enumerate(zip(norms, variances or [1.0] * len(norms), strict=True))
    ]
    return [unrest and f"{unrest.kind} {unrest.layer} {unrest.value:.3g}" for unrest in found]


def test_abrupt_growth_is_unrest_and_slow_growth_is_none() -> None:
    # recorded (drawn set, SGD, stock's clip), a stage's weights every five steps: lr0 1.0 is lost, 0.1 is kept
    assert looks([1, 1.19, 2.7, 5.43]) == [None] * 3 + ["weight_growth model.1 4.56"]
    assert looks([1, 1.01, 1.06, 1.24, 1.52, 1.9, 2.23]) == [None] * 7
    # blood cells, a longer warm-up, every ten steps: 0.3 is lost, 0.1 is kept
    lost, kept = [1, 1.04, 1.38, 1.74, 4.01, 8.31], [1, 1.01, 1.03, 1.17, 1.56, 1.95, 2.25, 2.46, 2.6]
    assert [found and found.split()[2] for found in looks(lost, every=10)] == [None] * 5 + ["7.99"]  # 8.31 / 1.04
    assert looks(kept, every=10) == [None] * 9
    assert looks([2.1**i for i in range(4)])[2:] == ["weight_growth model.1 4.41"] * 2
    assert looks([1.05**i for i in range(200)]) == [None] * 200


def test_variances_and_updates_are_looked_at_too() -> None:
    assert looks([1] * 3, [1, 69, 71]) == [None, None, "running_var None 71"]
    assert looks([1] * 4, [1, 7, 49, 497]) == [None, None, None, "running_var None 71"]  # against 7
    assert looks([1] * 3, [0.001, 0.01, 1]) == [None] * 3  # below where variances start, nothing is abrupt
    assert looks([1] * 2, ratio=0.31) == ["update_ratio None 0.31"] * 2
    assert looks([1] * 2, ratio=0.29) == [None] * 2
    assert looks([1, 1, math.nan]) == [None, None, "weight_growth model.1 nan"]


def test_updates_that_only_the_bound_holds_back_are_unrest_at_the_tenth_look_in_a_row() -> None:
    def found(ratios: list[float | None]) -> list[int]:
        watch = HealthWatch()
        seen = [
            watch.look(i, weight_norms={"a": 1.0}, running_var=1.0, update_ratio=0.03, unbounded_ratio=ratio)
            for i, ratio in enumerate(ratios)
        ]
        assert {unrest.kind for unrest in seen if unrest} <= {"unbounded_ratio"}
        return [i for i, unrest in enumerate(seen) if unrest]

    # recorded (drawn pose, no clip, update_clip 0.03): SGD at 1.0 learned nothing; AdamW at 0.01 is its best rate
    at_one = [2.1, 107.9, 157.3, 195.6, 168.2, 191.1, 205.2, 196.5, 183.7, 189.0, 196.0, 200.2]
    at_hundredth = [0.0866, 0.0573, 0.0429, 0.0347, 0.0289, 0.0255, 0.0232, 0.0197, 0.0168, 0.0161, 0.0157, 0.0155]
    assert found(at_one) == [9, 10, 11]
    assert found(at_hundredth) == []
    assert found([0.31] * 9 + [0.29] + [0.31] * 9) == []  # not in a row
    assert found([0.31] * 9 + [None] + [0.31]) == [10]  # a look without a measurement says nothing
    assert found([math.nan] * 10) == [9]
    watch = HealthWatch()
    for i in range(10):
        unrest = watch.look(i, weight_norms={"a": 1.0}, running_var=1.0, unbounded_ratio=2.0)
    assert unrest is not None
    assert unrest.reason == (
        "without update_clip the median layer would have moved by 2 of its weights in one step, "
        "the last of 10 such looks (limit 0.3)"
    )


def test_early_steps_are_looked_at_one_by_one_and_compared_over_ten() -> None:
    assert [step for step in range(41) if is_look(step)] == [*range(20), 20, 25, 30, 35, 40]
    watch = HealthWatch()
    found = [watch.look(i, weight_norms={"a": 1.15**i}, running_var=1.0) for i in range(20)]
    assert [i for i, unrest in enumerate(found) if unrest] == list(range(10, 20))  # 1.15^9 = 3.52, 1.15^10 = 4.05
    assert {round(unrest.value, 3) for unrest in found if unrest} == {4.046}
    first = next(unrest for unrest in found if unrest)
    assert first.reason == "the weights of a have grown 4.05 times within 10 steps (limit 4)"


@pytest.mark.parametrize(
    ("ratios", "backoff", "number"),
    [
        ([], 0.5, 1),
        ([0.001, 0.01, None], 0.5, 1),
        ([0.015], 0.5, 1),
        ([0.03, 0.005], 0.5, 2),  # the largest counts: 0.03 / 4 is below 0.01, 0.03 / 2 is not
        ([0.15], 0.5, 4),
        ([0.15], 0.1, 2),
        ([0.15], 1.0, 1),
        ([math.nan, 0.1], 0.5, 7),  # not known how large: as the largest that is believed, 1
        ([1e9], 0.2, 3),  # log5(1 / 0.01) = 2.9
    ],
)
def test_the_rate_is_lowered_as_often_as_the_largest_update_calls_for(
    ratios: list[float | None], backoff: float, number: int
) -> None:
    watch = HealthWatch()
    for i, ratio in enumerate(ratios):
        watch.look(i, weight_norms={"a": 1.0}, running_var=1.0, update_ratio=ratio)
    assert watch.num_backoffs(backoff) == number


def test_no_more_than_the_largest_believed_update_counts() -> None:
    watch = HealthWatch()
    watch.look(0, weight_norms={"a": 1.0}, running_var=1.0, update_ratio=7.47)
    assert watch.num_backoffs(0.5, largest=LARGEST_UNCLIPPED_RATIO) == 4  # 0.16 / 2^4 = 0.01
    assert watch.num_backoffs(0.5) == 7  # 1 / 2^7 < 0.01


# Spikes

LOGS = np.random.default_rng(0).normal(scale=0.3, size=60)
STEADY = [float(norm) for norm in 100 * np.exp(LOGS)]


def spikes(norms: list[float], images: list[int] | None = None) -> list[int]:
    watch = SpikeWatch()
    judged = [watch.judge(norm, images=n) for norm, n in zip(norms, images or [16] * len(norms), strict=True)]
    return [step for step, spike in enumerate(judged) if spike]


def test_a_spike_is_found_and_its_limit_is_the_formulas() -> None:
    watch = SpikeWatch()
    assert [watch.judge(norm, images=16) for norm in STEADY] == [None] * 60
    spike = watch.judge(5000.0, images=16)
    assert spike is not None
    center = np.median(np.log(STEADY))
    sigma = 1.4826 * np.median(abs(np.log(STEADY) - center))
    assert spike.median == pytest.approx(math.exp(center))
    assert spike.z == pytest.approx((math.log(5000) - center) / sigma)
    assert spike.limit == pytest.approx(math.exp(center + max(6 * sigma, math.log(3))))
    assert not spike.is_new_level
    assert watch.judge(5000.0, images=16).z == pytest.approx(spike.z)  # type: ignore[union-attr]  # it did not enter


def test_norms_are_compared_per_image() -> None:
    ramp = [4] * 20 + [64] * 20
    assert spikes([10.0 * n for n in ramp], ramp) == []  # accumulation ramps in warm-up, and norms are sums
    assert spikes([40.0] * 20 + [640.0] * 20) != []


def test_equal_norms_flag_a_large_one_and_not_a_near_one() -> None:
    assert spikes([10.0] * 128 + [1e4]) == [128]
    assert spikes([10.0] * 128 + [12.0, 25.0]) == []
    assert spikes([10.0] * 19 + [1e4]) == []  # too short a history
    assert spikes([0.0] * 200) == []


def test_a_level_that_lasts_is_believed() -> None:
    watch = SpikeWatch()
    judged = [watch.judge(norm, images=1) for norm in [10.0] * 30 + [1e4] * 40]
    found = [spike for spike in judged if spike]
    assert [spike.is_new_level for spike in found] == [False] * SPIKES_IN_A_ROW + [True]
    assert all(spike is None for spike in judged[30 + SPIKES_IN_A_ROW + 1 :])


def test_the_spike_watch_survives_its_checkpoint() -> None:
    watch = SpikeWatch()
    for norm in STEADY[:30]:
        watch.judge(norm, images=16)
    again = msgspec.convert(msgspec.to_builtins(watch), SpikeWatch)
    rest = [*STEADY[30:], 5000.0]
    assert [again.judge(norm, images=16) for norm in rest] == [watch.judge(norm, images=16) for norm in rest]
