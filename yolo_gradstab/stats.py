"""Statistics of stability, right for three to five seeds: numbers in, numbers out.

An estimate says on how many seeds it stands, and in words why a value is missing. Imports neither torch nor the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, signal, stats

__all__ = [
    "Estimate",
    "LossRatio",
    "NormSummary",
    "PairedComparison",
    "basin_decades",
    "clipped_share",
    "compare_paired",
    "compare_survival",
    "depth_slope",
    "effective_lr",
    "geometric_mean_over_seeds",
    "holm",
    "jeffreys",
    "loss_ratio",
    "lr50",
    "lr_sensitivity",
    "max_stable_lr",
    "mean_over_seeds",
    "norm_summary",
    "quality_sensitivity",
    "rmst",
    "robust_spike_score",
    "seeds_note",
    "spike_score",
    "survival_curve",
]

SIGMA_FLOOR = 1e-10  # below it a window is constant and has no spikes, as in OLMo-core
MAD_TO_SIGMA = 1.4826  # of a normal distribution
MOST_BLOCKS = 12  # whose sign flips are all enumerated, 4,096 of them; more are sampled
SAMPLED_FLIPS = 20_000

Array = NDArray[np.float64]


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A number with its interval.

    Attributes:
        value: The estimate, or null.
        low: Lower end of its interval.
        high: Upper end.
        num_seeds: Fewest seeds per learning rate it stands on; for a rate, its number of runs.
        reason: Why something is null, or what so few seeds cannot support.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    num_seeds: int = 0
    reason: str | None = None


# Depth ---------------------------------------------------------------------------------------------------------------


def depth_slope(depths: Sequence[float], norms: Sequence[float | None]) -> float | None:
    """Slope of ln norm over depth: the median of the slopes between all pairs (Theil 1950, Sen 1968).

    Of gradient norms it is the mean-field rate of growth or decay (Schoenholz et al. 2017): below 0 they grow towards
    the input, above 0 they fade towards it. Null for fewer than three positive, finite norms.

    Example:
        >>> round(depth_slope([0, 1, 2, 3], [8.0, 4.0, 2.0, 100.0]), 4)
        0.0744
    """
    known = [(depth, math.log(norm)) for depth, norm in zip(depths, norms, strict=True) if norm and 0 < norm < math.inf]
    if len(known) < 3:
        return None
    x, y = zip(*known, strict=True)
    return float(stats.theilslopes(y, x).slope)


# Rates of divergence -------------------------------------------------------------------------------------------------


def jeffreys(diverged: int, trials: int, *, confidence: float = 0.95) -> Estimate:
    """Share of runs that diverged, with Jeffreys' interval, its ends pinned where no run or every run diverged.

    Over uniformly distributed true rates a 95 % interval covers .963 for three runs and .957 for five, .89 at worst.

    Example:
        >>> round(jeffreys(0, 3).high, 4)
        0.5356

    References:
        Brown, Cai, DasGupta 2001, "Interval estimation for a binomial proportion".
    """
    if trials < 0 or not 0 <= diverged <= trials:
        raise ValueError(f"diverged must be from 0 to trials={trials}, got {diverged}")
    _check_confidence(confidence)
    if trials == 0:
        return Estimate(reason="no run that counts")
    tail = (1 - confidence) / 2
    beta = stats.beta(diverged + 0.5, trials - diverged + 0.5)
    low = 0.0 if diverged == 0 else float(beta.ppf(tail))
    high = 1.0 if diverged == trials else float(beta.ppf(1 - tail))
    return Estimate(value=diverged / trials, low=low, high=high, num_seeds=trials)


def max_stable_lr(lr0: Sequence[float], diverged: Sequence[bool]) -> float | None:
    """The highest learning rate up to which, this one and all lower ones, no run diverged; as coarse as the grid.

    Args:
        lr0: A learning rate per run.
        diverged: Whether that run diverged.
    """
    stable = None
    for rate, runs in _cells(lr0, diverged).items():
        if any(runs):
            break
        stable = rate
    return stable


def lr50(lr0: Sequence[float], diverged: Sequence[bool], *, confidence: float = 0.95) -> Estimate:
    """The learning rate at which half of the runs diverge, by Spearman and Karber on log10 of the rate.

    The shares are made monotone first (pool adjacent violators). It needs a lowest rate at which no run diverged and a
    highest at which all did; otherwise it lies outside the grid. Simulated with logistic curves, 3 or 5 seeds and 2 or
    4 rates per decade, a 95 % interval covers .91 to .98. Where all runs of a rate agree it is that between two rates
    of the grid, whatever the confidence, and by itself covers less: .5 to .97, the less the finer the grid.

    Args:
        lr0: A learning rate per run.
        diverged: Whether that run diverged.
        confidence: Of the interval, normal on the log scale.

    References:
        Spearman 1908; Karber 1931; the variance as in Hamilton, Russo, Thurston 1977.
    """
    _check_confidence(confidence)
    cells = _cells(lr0, diverged)
    counts = np.array([len(runs) for runs in cells.values()])
    fewest = min(counts.tolist(), default=0)
    if len(cells) < 2:
        return Estimate(num_seeds=fewest, reason="needs at least two learning rates")
    shares = np.array([np.mean(runs) for runs in cells.values()])
    p = np.asarray(optimize.isotonic_regression(shares, weights=counts).x)
    rates = list(cells)
    if not any(shares):
        return Estimate(num_seeds=fewest, reason=f"no run diverged: it is above the grid, which ends at {rates[-1]:g}")
    if p[0] > 0:
        return Estimate(
            num_seeds=fewest, reason=f"runs diverged at the lowest rate, {rates[0]:g}: the grid is too high"
        )
    if p[-1] < 1:
        reason = f"not every run diverged at the highest rate, {rates[-1]:g}: the grid ends too early"
        return Estimate(num_seeds=fewest, reason=reason)
    x = np.log10(rates)
    center = float(np.sum(np.diff(p) * (x[1:] + x[:-1]) / 2))
    if fewest < 2:
        return Estimate(value=10**center, num_seeds=fewest, reason="one run per rate has no interval")
    variance = np.sum(((x[2:] - x[:-2]) / 2) ** 2 * p[1:-1] * (1 - p[1:-1]) / (counts[1:-1] - 1))
    if variance == 0:  # all runs of a rate agree, at every rate: the formula would claim to know it exactly
        low, high = rates[int(np.argmax(p > 0)) - 1], rates[int(np.argmax(p > 0))]
        reason = "runs of a rate agree everywhere: the interval is that between two rates of the grid"
        return Estimate(value=10**center, low=low, high=high, num_seeds=fewest, reason=reason)
    half = float(stats.norm.ppf((1 + confidence) / 2) * math.sqrt(variance))
    return Estimate(value=10**center, low=10 ** (center - half), high=10 ** (center + half), num_seeds=fewest)


# Response to the learning rate ---------------------------------------------------------------------------------------


def lr_sensitivity(lr0: Sequence[float], losses: Sequence[float | None], *, initial_loss: float) -> Estimate:
    """How much is lost, on average over the grid, by not knowing the best learning rate.

    Mean over learning rates of min(loss, initial) - best, the loss of a rate being its mean over seeds. On validation
    loss, never on training loss: a collapsed run has the lowest of all.

    Args:
        lr0: A learning rate per run, evenly spaced on a log scale.
        losses: Final validation losses; null or not finite, of runs that diverged, count as the initial one.
        initial_loss: At initialisation; it caps each run, before the mean over seeds.

    References:
        Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities".
    """
    if not math.isfinite(initial_loss):
        raise ValueError(f"initial_loss must be finite, got {initial_loss}")
    known = [initial_loss if loss is None or not math.isfinite(loss) else loss for loss in losses]
    return _sensitivity(lr0, [min(loss, initial_loss) for loss in known])


def quality_sensitivity(lr0: Sequence[float], scores: Sequence[float | None]) -> Estimate:
    """The same on a score such as mAP: mean over learning rates of best - score; null, of lost runs, counts as 0."""
    return _sensitivity(lr0, [-score for score in _scores(scores)])


def _sensitivity(lr0: Sequence[float], losses: Sequence[float]) -> Estimate:
    cells = _cells(lr0, losses)
    fewest = min((len(runs) for runs in cells.values()), default=0)
    if len(cells) < 2:
        return Estimate(num_seeds=fewest, reason="needs at least two learning rates")
    means = np.array([np.mean(runs) for runs in cells.values()])
    return Estimate(value=float((means - means.min()).mean()), num_seeds=fewest)


def basin_decades(lr0: Sequence[float], scores: Sequence[float | None], *, within: float = 0.05) -> Estimate:
    """Decades of learning rate around the best whose median score is within a share of it.

    Between rates the median is interpolated linearly on log10 of the rate. Null scores, of lost runs, count as 0.
    """
    if not 0 < within < 1:
        raise ValueError(f"within must be between 0 and 1, got {within}")
    cells = _cells(lr0, _scores(scores))
    fewest = min((len(runs) for runs in cells.values()), default=0)
    medians = np.array([np.median(runs) for runs in cells.values()])
    if not len(medians) or medians.max() <= 0:
        return Estimate(num_seeds=fewest, reason="no run has a score above 0")
    x = np.log10(list(cells))
    floor, best = (1 - within) * medians.max(), int(medians.argmax())
    ends = [_crossing(x[side], medians[side], floor) for side in (slice(best, None, -1), slice(best, None))]
    reached = [f"{10**rate:g}" for rate, end in zip((x[0], x[-1]), ends, strict=True) if end == rate]
    reason = f"at least: it reaches the end of the grid at {' and '.join(dict.fromkeys(reached))}" if reached else None
    return Estimate(value=float(ends[1] - ends[0]), num_seeds=fewest, reason=reason)


def _crossing(x: Array, y: Array, floor: float) -> float:
    """Where y, at or above the floor at first, falls under it; the last x where it does not."""
    for i in range(1, len(x)):
        if y[i] < floor:
            return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - floor) / (y[i - 1] - y[i]))
    return float(x[-1])


# Trajectories --------------------------------------------------------------------------------------------------------


def spike_score(values: ArrayLike, *, window: int = 128, threshold: float = 6.0) -> float | None:
    """Share of values more than `threshold` standard deviations above the mean of the `window` before them.

    Upward only, with the population's deviation and a full window, as OLMo-core's stability monitor counts. Values that
    are not finite are left out. Null where there are too few.

    References:
        OLMo 2, 2024, "2 OLMo 2 Furious" (2501.00656), with a window of 1,000 and 7 deviations.
    """
    series = _finite(values)
    if len(series) <= window:
        return None
    before = sliding_window_view(series, window)[:-1]
    # Of windows themselves, not of running sums: after a value of 1e20 those have lost everything smaller.
    mean, sigma = before.mean(axis=1), before.std(axis=1)
    spikes = (series[window:] > mean + threshold * sigma) & (sigma > SIGMA_FLOOR)
    return float(spikes.sum() / len(series))


def robust_spike_score(
    values: ArrayLike, *, window: int = 128, threshold: float = 5.0, ratio: float = 3.0
) -> float | None:
    """The same on log-values by median and MAD, and only values above `ratio` times the median.

    Norms are skewed, so that the plain score finds spikes where there are none; this one finds next to none. Values
    that are not positive and finite are left out.
    """
    series = _finite(values)
    series = np.log(series[series > 0])
    if len(series) <= window:
        return None
    before = sliding_window_view(series, window)[:-1]
    middle = np.median(before, axis=1)
    above = series[window:] - middle
    high = np.flatnonzero(above > math.log(ratio))  # few: only their windows need the costly second median
    sigma = MAD_TO_SIGMA * np.median(np.abs(before[high] - middle[high, None]), axis=1)
    return float((above[high] > threshold * sigma).sum() / len(series))


class LossRatio(msgspec.Struct, frozen=True):
    """Smoothed loss over its lowest before: the largest ratio, and the share of steps above the limit."""

    largest: float
    share_above: float


def loss_ratio(losses: ArrayLike, *, smoothing: float = 0.98, above: float = 1.2) -> LossRatio | None:
    """How far the smoothed loss rose above its lowest so far; null for fewer than two finite losses.

    References:
        Li, Zhang, He 2022, "The stability-efficiency dilemma".
    """
    series = _finite(losses)
    if len(series) < 2:
        return None
    weights = 1 - smoothing ** np.arange(1, len(series) + 1)  # of the mean that is not its initial zero
    smooth = np.asarray(signal.lfilter([1 - smoothing], [1, -smoothing], series)) / weights
    lowest = np.minimum.accumulate(smooth)[:-1]
    if (lowest <= 0).any():  # of a collapsed run: nothing can be divided by it
        return None
    ratios = smooth[1:] / lowest
    return LossRatio(float(ratios.max()), float((ratios > above).mean()))


class NormSummary(msgspec.Struct, frozen=True):
    """Percentiles of a run's gradient norms; `log_sigma` is their spread from step to step, on a log scale."""

    p50: float
    p90: float
    p99: float
    max: float
    p99_over_p50: float | None
    log_sigma: float | None


def norm_summary(norms: ArrayLike) -> NormSummary | None:
    """Null where no norm is finite."""
    series = _finite(norms)
    if not len(series):
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(series, [50, 90, 99]))
    logs = np.log(series[series > 0])
    sigma = None
    if len(logs) >= 3:
        residuals = np.diff(logs) / math.sqrt(2)  # differences of neighbours: any slow trend drops out
        sigma = float(MAD_TO_SIGMA * np.median(np.abs(residuals - np.median(residuals))))
    return NormSummary(p50, p90, p99, float(series.max()), p99 / p50 if p50 > 0 else None, sigma)


def clipped_share(clip_coef: ArrayLike) -> float | None:
    """Share of steps whose gradient was scaled down."""
    series = _finite(clip_coef)
    return float((series < 1).mean()) if len(series) else None


def effective_lr(lr: ArrayLike, clip_coef: ArrayLike, *, lr0: float) -> float | None:
    """What the nominal rate amounts to after clipping: lr0 times the mean coefficient, weighted by the step's rate."""
    rates, coefs = np.asarray(lr, dtype=np.float64), np.asarray(clip_coef, dtype=np.float64)
    if rates.shape != coefs.shape:
        raise ValueError(f"lr and clip_coef must be of one length, got {len(rates)} and {len(coefs)}")
    known = np.isfinite(rates) & np.isfinite(coefs) & (rates > 0)
    return float((rates * coefs)[known].sum() / rates[known].sum() * lr0) if known.any() else None


# Comparisons ---------------------------------------------------------------------------------------------------------


def survival_curve(steps: Sequence[float], diverged: Sequence[bool], *, horizon: float) -> list[tuple[float, float]]:
    """Share of runs that live on from a step, by Kaplan and Meier, from step 0 to the horizon: its corners.

    A run that did not diverge is censored at its last step. For drawing and for `rmst`; a band around it would promise
    what three or five runs cannot keep.

    Example:
        >>> survival_curve([20, 35, 100], [True, True, False], horizon=100)  # doctest: +ELLIPSIS
        [(0.0, 1.0), (20.0, 0.666...), (35.0, 0.333...), (100.0, 0.333...)]

    References:
        Kaplan, Meier 1958, "Nonparametric estimation from incomplete observations".
    """
    if len(steps) != len(diverged) or not len(steps):
        raise ValueError(f"steps and diverged must be of one length above 0, got {len(steps)} and {len(diverged)}")
    if not horizon > 0:
        raise ValueError(f"horizon must be above 0, got {horizon}")
    times, ends = np.asarray(steps, dtype=np.float64), np.asarray(diverged, dtype=bool)
    corners = [(0.0, 1.0)]
    if ends.any():
        data: Any = stats.CensoredData(uncensored=times[ends], right=times[~ends])
        curve = stats.ecdf(data).sf
        shares = zip(curve.quantiles, curve.probabilities, strict=True)
        corners += [(float(step), float(share)) for step, share in shares if step < horizon]
    return [*corners, (float(horizon), corners[-1][1])]


def rmst(steps: Sequence[float], diverged: Sequence[bool], *, horizon: float) -> float:
    """Restricted mean survival time: how many of the first `horizon` steps a run lives, on average.

    The area under `survival_curve`.

    Example:
        >>> round(rmst([20, 35, 100], [True, True, False], horizon=100), 3)
        51.667

    References:
        Royston, Parmar 2013, "Restricted mean survival time".
    """
    corners = survival_curve(steps, diverged, horizon=horizon)
    return sum((end - start) * share for (start, share), (end, _) in itertools.pairwise(corners))


class PairedComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two arms on the same learning rates and seeds.

    Attributes:
        difference: Mean of second minus first, of a seed and then over seeds, with an interval over seeds.
        p_value: Two-sided, by flipping the sign of whole seeds; null without a pair.
        smallest_p: The smallest that so many seeds, or pairs where each is flipped by itself, can give.
        num_pairs: Learning rates times seeds.
        num_seeds: Seeds.
        reason: What this cannot support, in words.
    """

    difference: Estimate
    p_value: float | None
    smallest_p: float | None
    num_pairs: int
    num_seeds: int
    reason: str | None = None


def compare_paired(
    a: Mapping[tuple[float, int], float],
    b: Mapping[tuple[float, int], float],
    *,
    per_pair: bool = False,
    confidence: float = 0.95,
) -> PairedComparison:
    """Is the second arm better than the first, over all learning rates at once?

    The same seed means the same weights and data at the start, so runs are paired by (learning rate, seed). Runs of one
    seed depend on each other, so that the signs of all its differences are flipped together, and the interval is
    Student's over the seeds' means: for normal differences its coverage is what it says, from two seeds on; for
    lognormal ones (sigma 1, three rates) a 95 % interval of 3 to 8 seeds covered .88 to .90 in simulation. A seed
    counts once, however many of its pairs there are.

    Args:
        a: Score by (lr0, seed), finite; a lost run's is 0.
        b: The same of the second arm; pairs that only one of them has are left out.
        per_pair: Flip each pair by itself, as if runs of a seed were independent.
        confidence: Of the interval.

    References:
        Fisher 1935, "The design of experiments", for the permutation of signs.
    """
    _check_confidence(confidence)
    pairs = sorted(a.keys() & b.keys())
    if not pairs:
        missing = "no learning rate and seed in both arms"
        return PairedComparison(
            difference=Estimate(reason=missing), p_value=None, smallest_p=None, num_pairs=0, num_seeds=0, reason=missing
        )
    differences: dict[int, list[float]] = {}
    for rate, seed in pairs:
        first, second = a[rate, seed], b[rate, seed]
        if not (math.isfinite(first) and math.isfinite(second)):  # a NaN would get p 0: no flip is as large
            raise ValueError(f"scores must be finite, got {first} and {second} at lr0 {rate:g}, seed {seed}")
        differences.setdefault(seed, []).append(second - first)
    means = np.array([np.mean(values) for values in differences.values()])
    # Shares of the seeds' means, so that p is that of `difference` also where seeds have unequal numbers of pairs.
    shares = np.array([value / len(values) for values in differences.values() for value in values])
    blocks = shares if per_pair else means
    count = len(differences)
    smallest = min(1.0, 2.0 ** (1 - len(blocks))) if len(blocks) <= MOST_BLOCKS else 1 / (SAMPLED_FLIPS + 1)
    reason = None
    if smallest > 1 - confidence:
        blocks_in_words = f"{len(blocks)} {'pair' if per_pair else 'seed'}{'' if len(blocks) == 1 else 's'}"
        reason = f"{blocks_in_words} cannot reach p < {1 - confidence:.2g}: the smallest p is {smallest:.3g}"
    return PairedComparison(
        difference=mean_over_seeds(means, confidence),
        p_value=_sign_flip(blocks),
        smallest_p=smallest,
        num_pairs=len(pairs),
        num_seeds=count,
        reason=reason,
    )


def _sign_flip(differences: Array) -> float:
    """Two-sided p of a sum of differences under flips of their signs; exact for few, sampled for many."""
    observed = abs(differences.sum())
    if len(differences) <= MOST_BLOCKS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))
        extra = 0
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(SAMPLED_FLIPS, len(differences)))
        extra = 1  # the observed one: a sampled p is never 0
    sums = np.abs(signs @ differences)
    # Equal sums may differ in their last digits, which are those of the terms: a sum of 0 has none of its own.
    as_large = (sums >= observed - 1e-12 * np.abs(differences).sum()).sum()
    return float((as_large + extra) / (len(signs) + extra))


def compare_survival(
    a: Mapping[tuple[float, int], tuple[float, bool]],
    b: Mapping[tuple[float, int], tuple[float, bool]],
    *,
    horizon: float,
) -> PairedComparison:
    """How much longer the second arm's runs live, in steps of `horizon`, over all learning rates.

    Each run's own time, restricted to the horizon; a run that did not diverge lives through it. Paired and tested as
    `compare_paired`.

    Args:
        a: (steps, diverged) by (lr0, seed).
        b: The same of the second arm.
        horizon: Steps of a whole run.
    """

    def times(runs: Mapping[tuple[float, int], tuple[float, bool]]) -> dict[tuple[float, int], float]:
        return {key: min(steps, horizon) if diverged else horizon for key, (steps, diverged) in runs.items()}

    return compare_paired(times(a), times(b))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted for their number; null stays null and does not count.

    Example:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]

    References:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = highest
    return adjusted


def seeds_note(num_seeds: int, *, smallest_p: float | None = None) -> str:
    """What so many seeds per setting can support, in words.

    Args:
        num_seeds: Of the setting that has the fewest.
        smallest_p: That a paired comparison can give, where seeds of pairs are others: that of `num_seeds` by default.
    """
    if num_seeds < 1:
        return "There is no run to judge by."
    high = jeffreys(0, num_seeds).high
    smallest = min(1.0, 2.0 ** (1 - num_seeds)) if smallest_p is None else smallest_p
    if num_seeds == 1 and smallest == 1:
        return (
            "With one run per setting nothing can be said about chance: another seed could change any of these "
            "numbers, and which arm is ahead."
        )
    return (
        f"With {num_seeds} run{'' if num_seeds == 1 else 's'} per setting, 0 of {num_seeds} diverged is still "
        f"compatible with a true rate of up to {high:.0%}, and no paired comparison by seed can give a p below "
        f"{smallest:.3g}"
        + (", so none can reach .05: look at the effect and its interval." if smallest > 0.05 else ".")
    )


# Parts ---------------------------------------------------------------------------------------------------------------


def _cells(lr0: Sequence[float], values: Sequence[Any]) -> dict[float, list[Any]]:
    """Values by learning rate, ascending, in the order they came."""
    if len(lr0) != len(values):
        raise ValueError(f"lr0 and the values must be of one length, got {len(lr0)} and {len(values)}")
    cells: dict[float, list[Any]] = {}
    for rate, value in zip(lr0, values, strict=True):
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"lr0 must be positive and finite, got {rate}")
        cells.setdefault(float(rate), []).append(value)
    return dict(sorted(cells.items()))


def mean_over_seeds(means: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Student's interval over one number per seed; those that are not finite are left out."""
    means = _finite(means)
    _check_confidence(confidence)
    if not len(means):
        return Estimate(reason="no run has a value")
    count, value = len(means), float(means.mean())
    if count < 2:
        return Estimate(value=value, num_seeds=count, reason="one seed has no interval")
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * means.std(ddof=1) / math.sqrt(count))
    return Estimate(value=value, low=value - half, high=value + half, num_seeds=count)


def geometric_mean_over_seeds(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The same of logarithms, for what differs by factors: Student's interval, raised again.

    A value of zero makes the mean zero, and leaves it without an interval.
    """
    known = _finite(values)
    if (known < 0).any():
        raise ValueError(f"a geometric mean is one of positive values, got {known.min():g}")
    if (known == 0).any():
        return Estimate(value=0.0, num_seeds=len(known), reason="a value of zero has no logarithm")
    logs = mean_over_seeds(np.log(known), confidence)
    value, low, high = (None if end is None else math.exp(end) for end in (logs.value, logs.low, logs.high))
    return Estimate(value=value, low=low, high=high, num_seeds=logs.num_seeds, reason=logs.reason)


def _finite(values: ArrayLike) -> Array:
    series = np.asarray(values, dtype=np.float64)
    return series[np.isfinite(series)]


def _scores(scores: Sequence[float | None]) -> list[float]:
    return [0.0 if score is None or not math.isfinite(score) else float(score) for score in scores]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
