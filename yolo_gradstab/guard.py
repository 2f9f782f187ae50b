"""Judge a step and a run: is the gradient a spike, is the model calm, has the run diverged, how, and at which step.

The same judgement of divergence for the trainer while it trains, for a sweep, and for a report from the records alone.
Imports neither torch nor ultralytics.

| kind      | when                                                                                                    |
|-----------|---------------------------------------------------------------------------------------------------------|
| nonfinite | a step whose loss or gradient norm is not finite was applied, or 20 steps in a row could not be applied |
| blowup    | the loss is 100 times its start; or its running mean is 4 times the lowest it has been and twice the     |
|           | start, with the loss itself above the start, for 20 steps                                                |
| collapse  | a detector's loss and norm are a thousandth of their start; or what only matched anchors have of the     |
|           | loss is, in ten of twelve steps, where most steps before had matches; or a layer's weights are 100 times |
|           | their start, or a BatchNorm variance is above 1e8; or the loss passed 10 times its start and the run     |
|           | ends at mAP50 0                                                                                          |

The start is the median of the first ten finite values. Nothing is judged before ten steps: a detector's loss may rise
while its assigner settles. Collapse is a detector's own end: its class logits go so far down that nothing is matched
any more, and loss and gradient become exactly or nearly 0. A low, finite loss is then the worst outcome, not the best.
In a classifier it is the best: such losses say nothing there, and neither do those of a dense map (semantic, depth).

Before the loss shows anything, weights, BatchNorm variances and the size of the updates do (`HealthWatch`). Where one
grows abruptly the state of that moment is none to go back to, and a run that may go back does so at once.

References:
    Spikes by a robust z-score of the log-norm: the median and the median absolute deviation, which a spike among the
    norms does not move (Hampel 1974, "The influence curve and its role in robust estimation").
    The rise over the lowest smoothed loss is fastai's and Lightning's stopping rule for learning-rate range tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

import msgspec
import polars as pl

from yolo_gradstab.runs import DivergenceKind
from yolo_gradstab.stats import MAD_TO_SIGMA

__all__ = [
    "DEAD_STEPS",
    "LOOK_EVERY",
    "NO_QUALITY",
    "USUAL_SCALE",
    "Divergence",
    "DivergenceWatch",
    "HealthWatch",
    "Spike",
    "SpikeWatch",
    "Unrest",
    "UnrestKind",
    "find_divergences",
    "is_detector",
    "is_look",
    "matched_loss",
]

FIRST_STEPS = 10  # that set the scale, and before which nothing is judged
SMOOTHING = 0.98  # of the running mean of the loss
RISE = 4.0  # of the running mean over its lowest value
ABOVE_START = 2.0
LASTING_STEPS = 20  # of a risen loss, and of steps that could not be applied: a gradient scaler needs at most 16
BLOWUP = 100.0  # of a single loss over the start
# Nats, the least start of what is no detector: one fine-tuned from weights that fit starts near 0, and a single wrong
# label is then any multiple of that.
LEAST_START = 1.0
# The same of a detector, and of its norm: one that starts from collapsed weights has a loss of 0 from the start.
LEAST_DETECTOR_START = 1e-3
COLLAPSE = 1e-3  # of loss, of its matched part and of the norm under the start
COLLAPSED_STEPS = 10  # in a row: a batch without objects may be near zero once
COLLAPSED_STEPS_AFTER_RISE = 3  # the same once the loss has passed `HIGH`
HIGH = 10.0
# Of 42 drawn-set runs that learned none had a step whose matched loss was under 0.2 of its start; of those that had
# collapsed most steps were under a thousandth, and nothing matched again but by chance.
UNMATCHED_STEPS, UNMATCHED_OF = 10, 12
EVERYWHERE = {"cls", "dis"}  # components that every anchor has, whether it is matched or not
RARELY = 0.15  # of the steps before: sets with many images without objects have such steps all along
WEIGHT_GROWTH = 100.0
RUNNING_VAR = 1e8
NO_QUALITY = 1e-3  # mAP50 below which a run has learned nothing
DEAD_STEPS = 50  # in a row without any gradient, after which a tensor is said to be dead
USUAL_SCALE = (0.001, 100.0)  # of a weight at the start, over PyTorch's own; the host's pose head has some at 0.004

LOOK_EVERY = 5  # steps between looks at the model itself
EARLY_STEPS = 20  # that are looked at one by one: a rate that is far too high destroys a model in two or three
# Of 30 runs (tiny YOLO26, drawn detect and pose sets, stock's clip, SGD, MuSGD and AdamW from 0.01 to 1.0, one seed),
# each optimizer's best grew a variance at most 21 times within ten early steps, others that learned at most 38 times
# (52 without a clip), and weights at most 3.4 times within forty, but for AdamW at 0.1 and 0.3. Of 14 that went beyond
# one of these limits, 12 were lost; their largest update over weight was 0.07 to 0.6 by then, that of the best 0.013 to
# 0.036 with SGD and MuSGD. On blood cells, with a longer warm-up, a lost run grew weights 8 times, but in forty steps.
UNREST_GROWTH = ((10, 4.0), (40, 5.0))  # within so many steps, so many times
UNREST_VARIANCE = (10, 70.0)
UNREST_RATIO = 0.3
UNBOUNDED_LOOKS = 10  # in a row beyond it, of what an update would have been without its bound
BEARABLE_RATIO = 0.01  # median update over weight that a lowered rate is aimed at
LARGEST_RATIO = 1.0  # that is believed: one torn step must not lower the rate to nothing
# The same of a run that was not clipped, and will be: its updates tell the size of a blow-up, and hardly how far the
# rate is from one that would do.
LARGEST_UNCLIPPED_RATIO = 0.16

SPIKE_WINDOW = 128  # accepted norms that make the history
SPIKE_HISTORY = 20  # of them before anything is a spike
SPIKE_Z = 6.0
SPIKE_RISE = 3.0  # over the median, at least
SPIKE_SPREAD = 0.05  # least standard deviation of a log-norm: equal norms must not make every other one a spike
SPIKES_IN_A_ROW = 10  # after which the level is believed to be a new one


UnrestKind = Literal["weight_growth", "running_var", "update_ratio", "unbounded_ratio"]


class Divergence(msgspec.Struct, frozen=True):
    """A divergence, at the optimizer step it was found at, in words."""

    kind: DivergenceKind
    step: int
    reason: str


class DivergenceWatch(msgspec.Struct):
    """Sees a run step by step and says when it has diverged; each kind once.

    Its fields are its whole state, plain numbers, so that a resumed run is judged as if it had not been interrupted.

    Example:
        >>> watch = DivergenceWatch()
        >>> for step in range(10):
        ...     watch.add(step, loss=200.0, total_norm=700.0)
        >>> watch.add(10, loss=2.25e8, total_norm=6.6e6).kind
        'blowup'
    """

    losses: list[float] = msgspec.field(default_factory=list)  # the first ten finite ones
    norms: list[float] = msgspec.field(default_factory=list)
    num_steps: int = 0
    mean: float = 0.0  # running, not yet divided by `share`
    share: float = 0.0  # of the running mean that is loss and not its initial zero
    lowest_mean: float = math.inf
    highest_loss: float = 0.0
    num_risen: int = 0  # steps in a row
    num_small: int = 0
    num_not_applied: int = 0
    matched_losses: list[float] = msgspec.field(default_factory=list)  # the first ten
    unmatched: list[bool] = msgspec.field(default_factory=list)  # the last twelve
    num_unmatched: int = 0  # of those before
    num_judged: int = 0
    weight_norms: dict[str, float] = msgspec.field(default_factory=dict)  # of each layer when first seen
    kinds: list[DivergenceKind] = msgspec.field(default_factory=list)  # found so far, in order

    def add(
        self,
        step: int,
        *,
        loss: float,
        total_norm: float,
        skipped: bool = False,
        matched_loss: float | None = None,
        is_detector: bool = True,
    ) -> Divergence | None:
        """Judge one optimizer step.

        Args:
            step: Its number.
            loss: Per image.
            total_norm: Of the gradient before clipping.
            skipped: The step was not applied; its loss and norm are not counted.
            matched_loss: The components of the loss that only matched anchors have, 0 where nothing is matched; None
                where they are not known, or there was nothing to match.
            is_detector: A loss of 0 is the end of it, and not the best it can come to; see the function of this name.
        """
        self.num_steps += 1
        finite = math.isfinite(loss) and math.isfinite(total_norm)
        self.num_not_applied = self.num_not_applied + 1 if skipped else 0
        if self.num_not_applied >= LASTING_STEPS:
            return self._found("nonfinite", step, f"{LASTING_STEPS} optimizer steps in a row could not be applied")
        if skipped:
            return None
        if not finite:
            what = "gradient norm" if math.isfinite(loss) else "loss"
            return self._found("nonfinite", step, f"the {what} is not finite")
        if len(self.losses) < FIRST_STEPS:
            self.losses.append(loss)
            self.norms.append(total_norm)
        return self._judge(step, loss, total_norm, is_detector) or self._judge_matches(step, matched_loss)

    def _judge_matches(self, step: int, matched_loss: float | None) -> Divergence | None:
        if matched_loss is None:
            return None
        if len(self.matched_losses) < FIRST_STEPS:
            self.matched_losses.append(matched_loss)
            return None
        self.unmatched.append(not matched_loss > COLLAPSE * median(self.matched_losses))
        if len(self.unmatched) > UNMATCHED_OF:
            self.num_judged += 1
            self.num_unmatched += self.unmatched.pop(0)
        num = sum(self.unmatched)
        usual = self.num_unmatched + sum(value == 0 for value in self.matched_losses)
        if num >= UNMATCHED_STEPS and usual <= RARELY * (self.num_judged + FIRST_STEPS):
            reason = f"{num} of the last {len(self.unmatched)} steps had no loss but that of the classes"
            return self._found("collapse", step, f"{reason}: nothing is matched any more")
        return None

    def _judge(self, step: int, loss: float, total_norm: float, is_detector: bool) -> Divergence | None:
        start = max(median(self.losses), LEAST_DETECTOR_START if is_detector else LEAST_START)
        start_norm = max(median(self.norms), LEAST_DETECTOR_START)
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        self.share = SMOOTHING * self.share + (1 - SMOOTHING)
        mean = self.mean / self.share
        self.lowest_mean = min(self.lowest_mean, mean)
        self.highest_loss = max(self.highest_loss, loss)
        # The loss itself too: after one spike the mean stays up for long, although the run has healed.
        risen = mean > RISE * self.lowest_mean and mean > ABOVE_START * start and loss > start
        self.num_risen = self.num_risen + 1 if risen else 0
        small = is_detector and loss < COLLAPSE * start and total_norm < COLLAPSE * start_norm
        self.num_small = self.num_small + 1 if small else 0
        if self.num_steps <= FIRST_STEPS:
            return None
        if loss > BLOWUP * start:
            return self._found("blowup", step, f"the loss is {loss / start:.3g} times its start of {start:.3g}")
        if self.num_risen >= LASTING_STEPS:
            reason = f"the loss has been far above its lowest for {LASTING_STEPS} steps, now {loss:.3g}"
            return self._found("blowup", step, f"{reason} (start {start:.3g})")
        had_risen = self.highest_loss > HIGH * start
        if self.num_small >= (COLLAPSED_STEPS_AFTER_RISE if had_risen else COLLAPSED_STEPS):
            reason = f"the loss is {loss:.2g} (start {start:.3g}) and the gradient norm {total_norm:.2g}"
            return self._found("collapse", step, f"{reason} (start {start_norm:.3g}): nothing is matched any more")
        return None

    def add_state(
        self, step: int, *, weight_norms: dict[str, float], running_var: float | None = None
    ) -> Divergence | None:
        """Judge the model itself, at whatever steps it was looked at.

        Args:
            step: Its number.
            weight_norms: Per layer.
            running_var: The largest of the model's BatchNorm variances.
        """
        for layer, norm in weight_norms.items():
            if not math.isfinite(norm):
                return self._found("nonfinite", step, f"the weights of {layer} are not finite")
            start = self.weight_norms.setdefault(layer, norm)
            if start > 0 and norm > WEIGHT_GROWTH * start:
                return self._found("collapse", step, f"the weights of {layer} are {norm / start:.3g} times their start")
        if running_var is not None and running_var > RUNNING_VAR:
            return self._found("collapse", step, f"a BatchNorm running variance is {running_var:.2g}")
        return None

    def end(self, step: int, *, map50: float | None) -> Divergence | None:
        """Judge the end of a run by its final mAP50; nothing where that is not known."""
        if map50 is None or map50 >= NO_QUALITY or len(self.losses) < FIRST_STEPS:
            return None
        start = max(median(self.losses), LEAST_DETECTOR_START)
        if self.highest_loss > HIGH * start:
            reason = f"the loss had been {self.highest_loss / start:.3g} times its start, and mAP50 is {map50:.2g}"
            return self._found("collapse", step, reason)
        return None

    def _found(self, kind: DivergenceKind, step: int, reason: str) -> Divergence | None:
        if kind in self.kinds:
            return None
        self.kinds.append(kind)
        return Divergence(kind, step, reason)


def is_look(step: int) -> bool:
    """Whether the model itself is looked at after this step."""
    return step < EARLY_STEPS or step % LOOK_EVERY == 0


class Unrest(msgspec.Struct, frozen=True):
    """An early warning: what grew, by how much, and the limit."""

    kind: UnrestKind
    layer: str | None
    value: float
    limit: float
    steps: int  # within which it grew; looks in a row, of `unbounded_ratio`

    @property
    def reason(self) -> str:
        """In words."""
        value, limit = f"{self.value:.3g}", f"(limit {self.limit:g})"
        if self.kind == "update_ratio":
            return f"the median layer moved by {value} of its weights in one step {limit}"
        if self.kind == "unbounded_ratio":
            would = f"would have moved by {value} of its weights in one step"
            return f"without update_clip the median layer {would}, the last of {self.steps} such looks {limit}"
        grew = "a BatchNorm variance has" if self.layer is None else f"the weights of {self.layer} have"
        return f"{grew} grown {value} times within {self.steps} steps {limit}"


class HealthWatch(msgspec.Struct):
    """Looks at the model now and then, and says what has grown abruptly, before the loss knows.

    Example:
        >>> watch = HealthWatch()
        >>> for step, norm in ((0, 1.0), (5, 2.5), (10, 4.5)):
        ...     found = watch.look(step, weight_norms={"model.0": norm}, running_var=1.0)
        >>> found
        Unrest(kind='weight_growth', layer='model.0', value=4.5, limit=4.0, steps=10)
    """

    steps: list[int] = msgspec.field(default_factory=list)  # of the last looks, oldest first
    weight_norms: list[dict[str, float]] = msgspec.field(default_factory=list)
    running_vars: list[float] = msgspec.field(default_factory=list)
    highest_ratio: float = 0.0  # of the median updates that were measured
    num_unbounded: int = 0  # looks in a row

    def look(
        self,
        step: int,
        *,
        weight_norms: dict[str, float],
        running_var: float,
        update_ratio: float | None = None,
        unbounded_ratio: float | None = None,
    ) -> Unrest | None:
        """Compare the model with how it was a number of steps before, or at the start if that is nearer.

        Args:
            step: After which this was seen.
            weight_norms: Per layer.
            running_var: The largest of the model's BatchNorm variances.
            update_ratio: Median over the layers of the update's norm over the weights', where it was measured.
            unbounded_ratio: The same as it would have been without `update_clip`, for a run whose gradient is not
                clipped. A bound hides a blow-up and does not end it: such runs do not diverge, and learn little.
        """
        old = sum(1 for seen in self.steps if seen < step - UNREST_GROWTH[-1][0])
        self.steps = [*self.steps[old:], step]
        self.weight_norms = [*self.weight_norms[old:], weight_norms]
        self.running_vars = [*self.running_vars[old:], running_var]
        if update_ratio is not None and not update_ratio <= self.highest_ratio:
            self.highest_ratio = math.inf if math.isnan(update_ratio) else update_ratio
        if unbounded_ratio is not None:  # a look at which it was not measured says nothing
            self.num_unbounded = 0 if unbounded_ratio <= UNREST_RATIO else self.num_unbounded + 1
        for steps, limit in UNREST_GROWTH:
            before = self.weight_norms[self._index(step - steps)]
            growth = {name: norm / before[name] for name, norm in weight_norms.items() if before.get(name, 0.0) > 0}
            layer = max(growth, key=lambda name: (math.isnan(growth[name]), growth[name]), default=None)
            if layer is not None and not growth[layer] <= limit:
                return Unrest("weight_growth", layer, growth[layer], limit, steps)
        steps, limit = UNREST_VARIANCE
        variance = max(self.running_vars[self._index(step - steps)], 1.0)  # which variances start at
        if not running_var <= limit * variance:
            return Unrest("running_var", None, running_var / variance, limit, steps)
        if update_ratio is not None and not update_ratio <= UNREST_RATIO:
            return Unrest("update_ratio", None, update_ratio, UNREST_RATIO, 1)
        if self.num_unbounded >= UNBOUNDED_LOOKS and unbounded_ratio is not None:
            return Unrest("unbounded_ratio", None, unbounded_ratio, UNREST_RATIO, UNBOUNDED_LOOKS)
        return None

    def _index(self, step: int) -> int:
        """Of the earliest look at this step or later."""
        return next(i for i, seen in enumerate(self.steps) if seen >= step)

    def num_backoffs(self, backoff: float, *, largest: float = LARGEST_RATIO) -> int:
        """How many times the rate is to be lowered by `backoff`, at least once, for updates that a run can bear.

        An update is proportional to the rate where the gradient is clipped or the optimizer adaptive, so that the
        largest that was seen says how much lower the rate must be.

        Args:
            backoff: What the rate is multiplied by each time.
            largest: Update over weight that is believed.
        """
        if not self.highest_ratio > BEARABLE_RATIO or backoff == 1:
            return 1
        ratio = min(self.highest_ratio, largest)
        return max(1, math.ceil(math.log(ratio / BEARABLE_RATIO) / -math.log(backoff)))


class Spike(msgspec.Struct, frozen=True):
    """A gradient norm far above the run's own.

    Attributes:
        z: Standard deviations of the log-norm above its median.
        median: Of the accepted norms, for as many images as this step's.
        limit: The largest norm of such a step that would not have been a spike.
        is_new_level: It is one of so many in a row that they are not spikes, but how the run is now.
    """

    z: float
    median: float
    limit: float
    is_new_level: bool


class SpikeWatch(msgspec.Struct):
    """Finds spikes of the gradient norm against the run's accepted norms, which spikes never enter.

    Its fields are its whole state, plain numbers.

    Example:
        >>> watch = SpikeWatch()
        >>> for norm in (9.0, 10.0, 11.0) * 10:
        ...     assert watch.judge(norm, images=16) is None
        >>> watch.judge(1000.0, images=16).limit < 100
        True
    """

    history: list[float] = msgspec.field(default_factory=list)  # logs of norms per image
    num_in_a_row: int = 0

    def judge(self, total_norm: float, *, images: int) -> Spike | None:
        """Judge one step's gradient norm; what is no spike becomes part of the history.

        Args:
            total_norm: Finite; a sum over the images of the step, whose number changes in warm-up.
            images: In the step.
        """
        if not total_norm > 0:  # zero, which has no logarithm: no spike, and no level
            return None
        value = math.log(total_norm / images)
        if len(self.history) >= SPIKE_HISTORY:
            center = median(self.history)
            spread = max(MAD_TO_SIGMA * median(abs(past - center) for past in self.history), SPIKE_SPREAD)
            limit = max(center + SPIKE_Z * spread, center + math.log(SPIKE_RISE))
            if value > limit:
                self.num_in_a_row += 1
                is_new_level = self.num_in_a_row > SPIKES_IN_A_ROW
                if is_new_level:
                    self.history, self.num_in_a_row = [value], 0
                z = (value - center) / spread
                return Spike(z, math.exp(center) * images, math.exp(limit) * images, is_new_level)
        self.num_in_a_row = 0
        self.history = [*self.history[1 - SPIKE_WINDOW :], value]
        return None


def is_detector(parts: Iterable[str]) -> bool:
    """Whether these components are those of a loss that matches predictions with objects: boxes beside classes.

    Args:
        parts: Names, with or without the host's ``_loss``.
    """
    return "cls" in {name.removesuffix("_loss") for name in parts}


def matched_loss(parts: Mapping[str, Any]) -> Any:
    """The sum of those components that only matched anchors have: all but those of the classes and of distillation.

    None without any, and for what is no detector.

    Args:
        parts: By name, with or without the host's ``_loss``; numbers, tensors, or columns.
    """
    values = [abs(value) for name, value in parts.items() if name.removesuffix("_loss") not in EVERYWHERE]
    return sum(values) if values and is_detector(parts) else None


def find_divergences(
    steps: pl.DataFrame, layers: pl.DataFrame | None = None, *, map50: float | None = None
) -> list[Divergence]:
    """Every divergence of a run from its records, in order; the first is the one that counts.

    Args:
        steps: Step records: `step`, `loss` and its components, `total_norm`, `skipped`.
        layers: Layer records: `step`, `layer`, `weight_norm`.
        map50: The run's final mAP50, for a run that has ended. One that learned something had matches: that some steps
            had none is their images', which records do not tell from a detector that matches nothing.
    """
    watch = DivergenceWatch()
    found: list[Divergence | None] = []
    columns = [steps[name].to_list() for name in ("step", "loss", "total_norm", "skipped")]
    parts = {name.removeprefix("loss_"): pl.col(name) for name in steps.columns if name.startswith("loss_")}
    total = matched_loss(parts) if map50 is None or map50 < NO_QUALITY else None
    columns.append([None] * len(steps) if total is None else steps.select(total).to_series().to_list())
    matches = not parts or is_detector(parts)  # of records without components it is not known; most are detectors'
    for step, loss, total_norm, skipped, matched in zip(*columns, strict=True):
        known = {"loss": _number(loss), "total_norm": _number(total_norm), "matched_loss": matched}
        found.append(watch.add(step, **known, skipped=bool(skipped), is_detector=matches))
    if layers is not None:
        for step, table in _grown(layers):
            found.append(watch.add_state(step, weight_norms=table))
    last = columns[0][-1] if columns[0] else 0
    found.append(watch.end(last, map50=map50))
    return sorted((finding for finding in found if finding), key=lambda finding: finding.step)


def _grown(layers: pl.DataFrame) -> Sequence[tuple[int, dict[str, float]]]:
    """Weight norms at the first recorded step and at the first at which one has grown too far, if one has."""
    start = pl.col("weight_norm").first().over("layer", order_by="step")
    grown = layers.filter(pl.col("weight_norm") > WEIGHT_GROWTH * start, start > 0).sort("step")
    if grown.is_empty():
        return []
    wanted = (layers["step"].min(), grown["step"][0])
    return [
        (step, dict(layers.filter(pl.col("step") == step).select("layer", "weight_norm").iter_rows()))
        for step in wanted
        if isinstance(step, int)
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
