"""`yolo_gradstab.stats` against published and hand-computed values, slow re-implementations, scipy, and simulation."""

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from yolo_gradstab.stats import (
    Estimate,
    basin_decades,
    clipped_share,
    compare_paired,
    compare_survival,
    depth_slope,
    effective_lr,
    geometric_mean_over_seeds,
    holm,
    jeffreys,
    loss_ratio,
    lr50,
    lr_sensitivity,
    max_stable_lr,
    mean_over_seeds,
    norm_summary,
    quality_sensitivity,
    rmst,
    robust_spike_score,
    seeds_note,
    spike_score,
)

RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]


def runs(counts: list[int], seeds: int = 3, rates: list[float] = RATES) -> tuple[list[float], list[bool]]:
    """A run per rate and seed, the first `count` of each rate diverged."""
    lr0 = [rate for rate in rates for _ in range(seeds)]
    return lr0, [seed < count for count in counts for seed in range(seeds)]


# Rates of divergence


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 3, 0, 0.5356), (1, 5, 0.0225, 0.6286), (3, 3, 0.4644, 1), (0, 5, 0, 0.3794)]
)
def test_jeffreys_reference_values(k: int, n: int, low: float, high: float) -> None:
    found = jeffreys(k, n)
    assert (found.value, found.num_seeds) == (k / n, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(("n", "average"), [(3, 0.963), (5, 0.957)])
def test_jeffreys_covers_what_it_says(n: int, average: float) -> None:
    """Exactly, by summing the binomial over a fine grid of true rates: the published averages and minimum."""
    p = np.linspace(0.0005, 0.9995, 1000)
    covered = np.zeros_like(p)
    for k in range(n + 1):
        found = jeffreys(k, n)
        assert found.low is not None and found.high is not None
        covered += scipy_stats.binom.pmf(k, n, p) * ((found.low <= p) & (p <= found.high))
    assert covered.mean() == pytest.approx(average, abs=0.002)
    assert covered.min() > 0.88


def test_max_stable_rate_stops_at_the_first_loss() -> None:
    assert max_stable_lr(*runs([0, 0, 0, 1, 0, 3])) == 1e-2  # 0.1 is above a rate that lost a run
    assert max_stable_lr(*runs([1, 0, 0, 0, 0, 0])) is None
    assert max_stable_lr(*runs([0] * 6)) == 0.3
    lr0, diverged = runs([0, 0, 0, 1, 0, 3])
    assert max_stable_lr(lr0[::-1], diverged[::-1]) == 1e-2
    assert max_stable_lr([], []) is None


def test_lr50_reference_value() -> None:
    found = lr50(*runs([0, 0, 1, 1, 3, 3]))
    assert found.value == pytest.approx(0.0254, abs=5e-5)
    assert found.low is not None and found.high is not None
    assert (math.log10(found.high) - math.log10(found.low)) / 2 / 1.95996 == pytest.approx(0.236, abs=5e-4)
    assert (found.low, found.high) == (pytest.approx(0.0088, abs=1e-4), pytest.approx(0.0737, abs=2e-4))
    assert found.num_seeds == 3


def test_lr50_makes_shares_monotone_first() -> None:
    """By hand: 0 1/2 0 1 pools to 0 1/4 1/4 1; on x = -3 -2 -1/2 0 that is 1/4 x -5/2 + 3/4 x -1/4 = -13/16."""
    found = lr50(*runs([0, 1, 0, 2], seeds=2, rates=[1e-3, 1e-2, 10**-0.5, 1.0]))
    assert found.value == pytest.approx(10 ** (-13 / 16))
    # pooled by the number of runs: 0 1/1 0/3 1 becomes 0 1/4 1/4 1; 1/4 x -5/2 + 3/4 x -1/2 = -1
    unequal = lr50([1e-3, 1e-2, 0.1, 0.1, 0.1, 1.0], [False, True, False, False, False, True])
    assert unequal.value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([0] * 6, "no run diverged: it is above the grid, which ends at 0.3"),
        ([1, 1, 1, 2, 3, 3], "runs diverged at the lowest rate, 0.001"),
        ([0, 0, 0, 0, 1, 2], "not every run diverged at the highest rate, 0.3"),
    ],
)
def test_lr50_outside_the_grid_is_said(counts: list[int], words: str) -> None:
    found = lr50(*runs(counts))
    assert (found.value, found.low, found.high, found.num_seeds) == (None, None, None, 3)
    assert words in str(found.reason)


def test_lr50_of_one_seed_or_of_agreeing_seeds() -> None:
    one = lr50(*runs([0, 0, 0, 0, 1, 1], seeds=1))
    assert one.value == pytest.approx(math.sqrt(0.03 * 0.1))
    assert (one.low, one.num_seeds, one.reason) == (None, 1, "one run per rate has no interval")
    agreeing = lr50(*runs([0, 0, 0, 0, 3, 3]))
    assert (agreeing.low, agreeing.high) == (0.03, 0.1)
    assert "between two rates of the grid" in str(agreeing.reason)
    assert lr50([], []).reason == "needs at least two learning rates"


@pytest.mark.parametrize("seeds", [3, 5])
def test_lr50_interval_covers_the_true_rate(seeds: int) -> None:
    """Runs that diverge by a logistic curve: of the sweeps in which it can be estimated, about 95 % cover it."""
    generator = np.random.default_rng(0)
    rates = np.logspace(-3, 0.5, 8)
    covered, estimated = 0, 0
    for _ in range(400):
        truth = 10 ** generator.uniform(-1.6, -0.9)
        share = 1 / (1 + np.exp(-6 * (np.log10(rates) - math.log10(truth))))
        counts = generator.binomial(seeds, share).tolist()
        found = lr50(*runs(counts, seeds=seeds, rates=rates.tolist()))
        if found.low is not None and found.high is not None:
            estimated += 1
            covered += found.low <= truth <= found.high
    assert estimated > 300
    assert covered / estimated > 0.89  # normal approximation of few runs: .90 to .95


# Response to the rate


def test_lr_sensitivity_by_hand() -> None:
    # best 2; capped at the initial 5: 0, 1, 3 (9 is capped), 3 (diverged) -> 7 / 4
    assert lr_sensitivity([0.01, 0.1, 0.3, 1.0], [2.0, 3.0, 9.0, None], initial_loss=5.0).value == 7 / 4
    assert lr_sensitivity([0.01, 0.1], [2.0, math.nan], initial_loss=5.0).value == 1.5
    # over seeds: means 3 and 4 -> (0 + 1) / 2
    found = lr_sensitivity([0.01, 0.01, 0.1, 0.1], [2.0, 4.0, 4.0, 4.0], initial_loss=5.0)
    assert (found.value, found.num_seeds) == (0.5, 2)
    assert lr_sensitivity([0.01, 0.1, 1.0], [2.0, math.inf, -math.inf], initial_loss=5.0).value == 2
    # a collapsed run's training loss of 0 is not what this is given; its validation loss, missing, counts as initial
    assert lr_sensitivity([0.01], [1.0], initial_loss=5.0) == Estimate(
        num_seeds=1, reason="needs at least two learning rates"
    )


def test_quality_sensitivity_by_hand() -> None:
    assert quality_sensitivity([0.01, 0.1, 1.0], [0.3, 0.6, None]).value == pytest.approx((0.3 + 0 + 0.6) / 3)


def test_basin_by_hand() -> None:
    # 5 % of 0.6: 0.57. To the left 0.3 -> 0.6 over one decade crosses at a tenth of it; to the right 0.6 -> 0 at .05.
    found = basin_decades([0.01, 0.1, 1.0], [0.3, 0.6, 0.0])
    assert found.value == pytest.approx(0.1 + 0.05)
    assert found.reason is None
    twenty = basin_decades([0.01, 0.1, 1.0], [0.3, 0.6, 0.0], within=0.2)
    assert twenty.value == pytest.approx(0.4 + 0.2)
    ends = basin_decades([0.01, 0.1, 1.0], [0.3, 0.59, 0.6])
    assert ends.value == pytest.approx(1 + (0.59 - 0.57) / 0.29)
    assert ends.reason == "at least: it reaches the end of the grid at 1"
    flat = basin_decades([1.0, 0.01, 0.1], [0.6, 0.6, 0.6])
    assert (flat.value, flat.reason) == (2, "at least: it reaches the end of the grid at 0.01 and 1")
    assert basin_decades([0.01, 0.1], [None, 0.0]).reason == "no run has a score above 0"
    # the median over seeds, and the stretch around the best: a second hill is not counted
    hills = basin_decades([0.001, 0.01, 0.1, 1.0] * 3, [0.6, 0.0, 0.6001, 0.0] * 2 + [0.0] * 4)
    assert hills.value == pytest.approx(0.1, abs=1e-3)
    assert hills.num_seeds == 3
    one_lost = basin_decades([0.01, 0.1, 1.0] * 3, [0.6, 0.6, 0.0] * 2 + [None, 0.6, 0.0])
    assert one_lost.value == pytest.approx(1 + 0.05)


# Trajectories


def slow_spikes(values: list[float], window: int, threshold: float) -> float:
    count = 0
    for i in range(window, len(values)):
        before = values[i - window : i]
        mean = sum(before) / window
        sigma = math.sqrt(sum((value - mean) ** 2 for value in before) / window)
        count += sigma > 1e-10 and values[i] > mean + threshold * sigma
    return count / len(values)


@pytest.mark.parametrize("seed", range(3))
def test_spike_score_equals_the_slow_one(seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(sigma=1.0, size=600)
    values[[300, 450]] *= 100
    values[500] = 1e12
    assert spike_score(values) == slow_spikes(values.tolist(), 128, 6.0)
    assert spike_score(values, window=40, threshold=7) == slow_spikes(values.tolist(), 40, 7.0)


def slow_robust_spikes(values: list[float]) -> float:
    count = 0
    for i in range(128, len(values)):
        before = np.log(values[i - 128 : i])
        middle = np.median(before)
        sigma = scipy_stats.median_abs_deviation(before) * 1.4826
        count += math.log(values[i]) > middle + 5 * sigma and values[i] > 3 * math.exp(middle)
    return count / len(values)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_robust_spike_score_equals_the_slow_one(sigma: float) -> None:
    """At .05 the ratio decides, at 1 the deviation, at .3 either."""
    values = np.random.default_rng(7).lognormal(sigma=sigma, size=600)
    spikes = np.random.default_rng(8).choice(np.arange(128, 600), size=40, replace=False)
    values[spikes] = np.geomspace(1.5, 1e3, 40)
    found = robust_spike_score(values)
    assert found == slow_robust_spikes(values.tolist())
    assert found is not None
    assert 0 < found < 40 / 600


@pytest.mark.parametrize("score", [spike_score, robust_spike_score])
def test_one_spike_is_one_and_a_constant_has_none(score: Callable[..., float | None]) -> None:
    values = np.random.default_rng(0).lognormal(sigma=0.25, size=200)
    assert score(np.append(values[:128], 10 * np.median(values))) == pytest.approx(1 / 129)
    assert score([3.0] * 500) == 0
    assert score([3.0] * 128) is None
    assert score([*[math.nan] * 10, *[3.0] * 128]) is None
    assert score([]) is None


def test_a_constant_series_has_no_deviation_to_measure_a_rise_by() -> None:
    """As OLMo-core has it; the robust score needs none to see a value of three times the median."""
    assert spike_score([3.0] * 128 + [30.0]) == 0
    assert robust_spike_score([3.0] * 128 + [30.0]) == 1 / 129


def test_a_rise_of_a_quiet_series_is_no_robust_spike() -> None:
    values = np.random.default_rng(0).lognormal(sigma=0.05, size=128)
    assert robust_spike_score(np.append(values, 2.0)) == 0
    assert robust_spike_score(np.append(values, 3.5)) == 1 / 129


@pytest.mark.parametrize(("sigma", "expected"), [(0.25, 1.7), (0.5, 12.5), (1.0, 57)])
def test_false_spikes_of_skewed_norms_are_as_many_as_known(sigma: float, expected: float) -> None:
    values = np.random.default_rng(1).lognormal(sigma=sigma, size=200_000)
    found = spike_score(values)
    assert found is not None
    # The reference is itself simulated; counts of Poisson size at 200,000 values, and a fifth for that.
    assert found * 1e4 == pytest.approx(expected, rel=0.2, abs=3 * math.sqrt(expected * 20) / 20)
    robust = robust_spike_score(values[:50_000])
    assert robust is not None
    assert robust * 1e4 < 1


def test_loss_ratio_equals_the_slow_one() -> None:
    losses = (np.linspace(10, 2, 300) * np.random.default_rng(0).lognormal(sigma=0.3, size=300)).tolist()
    losses[150:160] = [200.0] * 10
    mean, smooth = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = 0.98 * mean + 0.02 * loss
        smooth.append(mean / (1 - 0.98**i))
    ratios = [smooth[i] / min(smooth[:i]) for i in range(1, 300)]
    found = loss_ratio(losses)
    assert found is not None
    assert found.largest == pytest.approx(max(ratios))
    assert found.share_above == pytest.approx(sum(ratio > 1.2 for ratio in ratios) / 299)
    assert loss_ratio([1.0]) is None
    assert loss_ratio([0.0, 0.0, 1.0]) is None
    assert loss_ratio([math.nan, 2.0, 1.0]) is not None


def test_norm_summary() -> None:
    found = norm_summary([*range(1, 101), math.inf, math.nan])
    assert found is not None
    assert (found.p50, found.p90, found.p99, found.max) == pytest.approx((50.5, 90.1, 99.01, 100))
    assert found.p99_over_p50 == pytest.approx(99.01 / 50.5)
    trend = np.geomspace(1, 1e4, 4000) * np.random.default_rng(0).lognormal(sigma=0.4, size=4000)
    detrended = norm_summary(trend)
    assert detrended is not None
    assert detrended.log_sigma == pytest.approx(0.4, rel=0.05)
    assert norm_summary([]) is None
    zero = norm_summary([0.0, 0.0])
    assert zero is not None
    assert (zero.p99_over_p50, zero.log_sigma) == (None, None)


def test_clip_share_and_effective_rate_by_hand() -> None:
    assert clipped_share([1.0, 0.5, 0.1, 1.0, math.nan]) == 0.5
    assert clipped_share([]) is None
    # lr alternates 0.03 (not clipped) and 0.01 (to a quarter): (0.03 + 0.0025) / 0.04 of lr0; a rate of 0 has no weight
    found = effective_lr([0.03, 0.01, 0.03, 0.01, 0.0], [1.0, 0.25, 1.0, 0.25, 0.5], lr0=0.1)
    assert found == pytest.approx(0.1 * 0.0325 / 0.04)
    assert effective_lr([0.0, math.nan], [1.0, 1.0], lr0=0.1) is None
    with pytest.raises(ValueError, match="of one length, got 1 and 2"):
        effective_lr([1.0], [1.0, 1.0], lr0=0.1)


# Comparisons


def test_rmst_reference_values() -> None:
    assert rmst([20, 35, 100], [True, True, False], horizon=100) == pytest.approx(51.667, abs=1e-3)
    assert rmst([100, 100, 100], [False] * 3, horizon=100) == 100
    assert rmst([100], [False], horizon=100) == 100
    assert rmst([10, 30], [True, True], horizon=100) == 20
    # by hand: a run censored at 20 leaves the risk set: 1 to 10, then 2/3 to 30, then 0
    assert rmst([10, 20, 30], [True, False, True], horizon=100) == pytest.approx(10 + 20 * 2 / 3)
    assert rmst([10, 300], [True, True], horizon=100) == 10 + 90 * 0.5
    with pytest.raises(ValueError, match="of one length above 0, got 0 and 0"):
        rmst([], [], horizon=10)


@pytest.mark.parametrize("seed", range(20))
def test_rmst_equals_the_slow_one(seed: int) -> None:
    """Kaplan and Meier by their product, on small numbers of steps, so that deaths and censoring often tie."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    steps, diverged = generator.integers(1, 15, count).tolist(), (generator.random(count) < 0.5).tolist()
    alive, area, last = 1.0, 0.0, 0
    for step in sorted({step for step in steps if step < 12}):
        area, last = area + alive * (step - last), step
        lost = sum(s == step and d for s, d in zip(steps, diverged, strict=True))
        alive *= 1 - lost / sum(s >= step for s in steps)
    assert rmst(steps, diverged, horizon=12) == pytest.approx(area + alive * (12 - last))


def by_seed(values: list[float], rates: tuple[float, ...] = (0.1,)) -> dict[tuple[float, int], float]:
    return {(rate, seed): value for rate in rates for seed, value in enumerate(values)}


def test_paired_comparison_by_hand() -> None:
    found = compare_paired(by_seed([0.0] * 5), by_seed([1.0, 2, 3, 4, 5]))
    assert (found.p_value, found.smallest_p, found.num_pairs, found.num_seeds) == (0.0625, 0.0625, 5, 5)
    assert found.difference.value == 3
    interval = scipy_stats.ttest_rel([1, 2, 3, 4, 5], [0] * 5).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.reason == "5 seeds cannot reach p < 0.05: the smallest p is 0.0625"


def test_paired_comparison_equals_scipys_permutation() -> None:
    values = np.random.default_rng(3).normal(0.4, 1, size=8)

    def mean(x: Any, axis: int) -> Any:
        return np.mean(x, axis=axis)

    expected = scipy_stats.permutation_test((values,), mean, permutation_type="samples", n_resamples=np.inf)
    assert compare_paired(by_seed([0.0] * 8), by_seed(values.tolist())).p_value == pytest.approx(expected.pvalue)


def test_seeds_are_flipped_whole_unless_asked() -> None:
    rates = (0.01, 0.1, 1.0)
    a, b = by_seed([0.0] * 3, rates), by_seed([1.0, 1.0, 1.0], rates)
    assert compare_paired(a, b).p_value == 0.25
    each = compare_paired(a, b, per_pair=True)
    assert (each.p_value, each.smallest_p, each.num_pairs) == (2 / 2**9, 2 / 2**9, 9)
    few = compare_paired({(r, 0): 0.0 for r in rates}, {(r, 0): 1.0 for r in rates}, per_pair=True)
    assert few.reason == "3 pairs cannot reach p < 0.05: the smallest p is 0.25"


def test_only_common_pairs_count() -> None:
    found = compare_paired({(0.1, 0): 0.2, (0.1, 1): 0.3, (0.3, 0): 0.9}, {(0.1, 0): 0.4, (0.1, 1): 0.5})
    assert (found.num_pairs, found.difference.value) == (2, pytest.approx(0.2))
    nothing = compare_paired({(0.1, 0): 1.0}, {(0.3, 0): 1.0})
    assert (nothing.p_value, nothing.reason) == (None, "no learning rate and seed in both arms")
    one = compare_paired({(0.1, 0): 1.0}, {(0.1, 0): 2.0})
    assert (one.difference.value, one.difference.low, one.p_value) == (1.0, None, 1.0)
    assert one.difference.reason == "one seed has no interval"


def test_a_seed_counts_once_however_many_pairs_it_has() -> None:
    """By hand: seed means 4, 1, 1, so 2, with an interval around it; all of one sign, so p is 2/8."""
    b = {(rate, 0): 4.0 for rate in (0.01, 0.1, 0.3, 1.0)} | {(0.1, 1): 1.0, (0.1, 2): 1.0}
    found = compare_paired(dict.fromkeys(b, 0.0), b)
    interval = scipy_stats.ttest_1samp([4.0, 1.0, 1.0], 0).confidence_interval(0.95)
    assert (found.difference.value, found.p_value, found.num_pairs, found.num_seeds) == (2, 0.25, 6, 3)
    assert (found.difference.low, found.difference.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    # seed means -2, 1, 1 cancel, though the pairs do not
    balanced = compare_paired(dict.fromkeys(b, 0.0), {key: 1.0 if key[1] else -2.0 for key in b})
    assert (balanced.difference.value, balanced.p_value) == (0, 1)
    # each pair flipped by itself has its share of the seed: four quarters against 1 cancel, four ones would not
    shares = {key: -1.0 if key[1] else 1.0 for key in b if key[1] < 2}
    each = compare_paired(dict.fromkeys(shares, 0.0), shares, per_pair=True)
    assert (each.difference.value, each.p_value, each.num_pairs) == (0, 1, 5)


@pytest.mark.parametrize("differences", [[0.1, 0.2, -0.3], [0.1, 0.2, 0.3, -0.6], [0.7, 0.1, -0.8, 0.3, -0.3]])
def test_differences_that_cancel_have_p_one(differences: list[float]) -> None:
    """Their sum is 0 up to rounding, and every other one is as large."""
    assert compare_paired(by_seed([0.0] * len(differences)), by_seed(differences)).p_value == 1


def test_many_seeds_are_sampled_and_never_p_zero() -> None:
    found = compare_paired(by_seed([0.0] * 30), by_seed([1.0] * 30))
    assert found.p_value is not None
    assert 0 < found.p_value < 1e-3
    assert found.smallest_p == 1 / 20_001  # of the sampled flips, not of all 2^30
    assert found.smallest_p <= found.p_value


@pytest.mark.parametrize("seeds", [3, 5])
def test_paired_interval_and_p_hold_in_simulation(seeds: int) -> None:
    """Differences of a seed share a part, as real ones do; 2,000 sweeps of three rates, no true difference."""
    generator = np.random.default_rng(seeds)
    rates = (0.01, 0.1, 1.0)
    covered = 0
    p_values = []
    for _ in range(2000):
        shared = generator.normal(size=seeds)
        b = {(r, s): shared[s] + generator.normal() for r, s in itertools.product(rates, range(seeds))}
        found = compare_paired(dict.fromkeys(b, 0.0), b)
        assert found.difference.low is not None and found.difference.high is not None and found.p_value is not None
        covered += found.difference.low <= 0 <= found.difference.high
        p_values.append(found.p_value)
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors
    for alpha in np.arange(2, 2**seeds, 2) / 2**seeds:  # all values p can take: it is uniform on them
        assert np.mean(np.array(p_values) <= alpha) == pytest.approx(alpha, abs=3.5 * math.sqrt(alpha / 2000))


def test_survival_is_compared_in_steps() -> None:
    a = {(0.1, 0): (20.0, True), (0.1, 1): (35.0, True), (1.0, 0): (10.0, True), (1.0, 1): (400.0, True)}
    b = dict.fromkeys(a, (60.0, False))  # shorter, but did not diverge: lives through the horizon
    found = compare_survival(a, b, horizon=100)
    assert found.difference.value == pytest.approx((80 + 65 + 90 + 0) / 4)
    assert (found.num_seeds, found.p_value) == (2, 0.5)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_what_seeds_support_is_said() -> None:
    assert "nothing can be said about chance" in seeds_note(1)
    assert "up to 54%" in seeds_note(3)
    assert "below 0.25, so none can reach .05" in seeds_note(3)
    assert seeds_note(6).endswith("below 0.0312.")
    assert "0 of 3 diverged" in seeds_note(3, smallest_p=0.0625)  # a pair may have more seeds than the fewest
    assert "below 0.0625, so none" in seeds_note(3, smallest_p=0.0625)
    assert "With 1 run per setting, 0 of 1 diverged" in seeds_note(1, smallest_p=0.0625)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jeffreys(4, 3), "diverged must be from 0 to trials=3, got 4"),
        (lambda: jeffreys(1, 3, confidence=1.0), "confidence must be between 0 and 1, got 1.0"),
        (lambda: max_stable_lr([0.1], []), "of one length, got 1 and 0"),
        (lambda: lr50([0.1, math.nan], [True, True]), "lr0 must be positive and finite, got nan"),
        (lambda: lr50([math.inf, 0.1], [True, True]), "lr0 must be positive and finite, got inf"),
        (lambda: lr50([0.0], [True]), "lr0 must be positive and finite, got 0.0"),
        (lambda: basin_decades([0.1], [1.0], within=1.0), "within must be between 0 and 1, got 1.0"),
        (lambda: rmst([1], [True], horizon=0), "horizon must be above 0, got 0"),
        (lambda: lr_sensitivity([0.1], [1.0], initial_loss=math.nan), "initial_loss must be finite, got nan"),
        (
            lambda: compare_paired(by_seed([0.0, 0.0]), by_seed([1.0, math.nan])),
            "scores must be finite, got 0.0 and nan at lr0 0.1, seed 1",
        ),
    ],
)
def test_bad_input_is_one_line(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)


# Depth


def test_depth_slope_is_the_median_over_all_pairs_of_usable_norms() -> None:
    rng = np.random.default_rng(0)
    depths, norms = list(range(11)), np.exp(rng.normal(size=11)).tolist()
    pairs = itertools.combinations(range(11), 2)
    slopes = [(math.log(norms[j]) - math.log(norms[i])) / (j - i) for i, j in pairs]
    assert depth_slope(depths, norms) == pytest.approx(statistics.median(slopes))
    # ln 2 per stage, whatever has no logarithm; too few stages have no slope
    assert depth_slope([0, 1, 2, 3, 4, 5], [1.0, 2.0, 0.0, 8.0, math.inf, None]) == pytest.approx(math.log(2))
    assert depth_slope([0, 1, 2], [1.0, 2.0, math.nan]) is None


def test_mean_over_seeds_is_students_interval() -> None:
    """By hand: mean 2, deviation 1, t(0.975, 2) = 4.302653, so 2 +- 4.302653 / sqrt(3)."""
    found = mean_over_seeds([1.0, 2.0, 3.0, math.nan])
    assert (found.value, found.num_seeds) == (2.0, 3)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert mean_over_seeds([]).reason == "no run has a value"


def test_a_geometric_mean_over_seeds_has_the_interval_of_its_logarithm() -> None:
    """By hand: logs 0 and 2 have mean 1, deviation sqrt(2) and t(0.975, 1) = 12.7062."""
    found = geometric_mean_over_seeds([1.0, math.exp(2), math.inf])
    assert (found.value, found.num_seeds) == (pytest.approx(math.e), 2)
    assert found.low == pytest.approx(math.exp(1 - 12.7062), rel=1e-4)
    assert found.high == pytest.approx(math.exp(1 + 12.7062), rel=1e-4)
    assert geometric_mean_over_seeds([3.0]).value == pytest.approx(3.0)
    assert geometric_mean_over_seeds([]).reason == "no run has a value"
    vanished = geometric_mean_over_seeds([0.0, 1.0])
    assert (vanished.value, vanished.low, vanished.num_seeds) == (0.0, None, 2)
    assert "zero" in vanished.reason
    with pytest.raises(ValueError, match="positive values, got -1"):
        geometric_mean_over_seeds([1.0, -1.0])
