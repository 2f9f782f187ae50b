"""Figures of a report: a polars table in, an Altair chart out.

The same chart gives the interactive page, offline, and the PNG and SVG files. Imports neither torch nor ultralytics.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import polars as pl

__all__ = [
    "depth_profile",
    "embedded",
    "javascript_bundle",
    "layer_norms",
    "lr_range",
    "metric_against_lr",
    "metric_heatmap",
    "save",
    "survival",
    "technique_matrix",
    "thin",
    "trajectories",
]

INK, QUIET, GRID, LOST = "#1f2328", "#59636e", "#e6e8eb", "#b3261e"
# Okabe and Ito's colours, distinct for all kinds of colour vision; their yellow is too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("circle", "square", "diamond", "cross", "triangle-right", "triangle-left", "circle")  # not those of `MARKS`


class Mark(NamedTuple):
    """How what became of a run is drawn, and named where shapes cannot be."""

    path: str
    filled: bool
    sign: str
    words: str
    color: str = LOST


MARKS = {
    "collapse": Mark("triangle-down", True, "▼", "silent collapse"),
    "blowup": Mark("triangle-up", True, "▲", "blow-up"),
    "nonfinite": Mark("M-1,-1L1,1M-1,1L1,-1", False, "×", "not finite"),
}
# What happens to a run, in `trajectories`, by its number there.
EVENTS = {
    1: Mark(MARKS["nonfinite"].path, False, "×", "a red × where one diverged"),
    2: Mark("triangle-left", True, "◀", "a black triangle where the guard went back", INK),
}
MOST_TICKS = 12  # of learning rates
MOST_ARMS = 7  # lines that can be told apart

WIDTH_PX = 620  # of the plot against learning rate; labels stand to its right
COLUMNS_PX = 760  # of all columns of the trajectories
LABEL_SIZE = 12.5  # of legends and of the heads of columns
LABEL_PX = 7  # of a letter of that size, about
SYMBOL_PX = 20  # of a legend, beside its label
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"

MOST_COLUMNS = 5  # learning rates beside each other in `trajectories`
LAYER_COLUMNS = 120  # of a heat map of stages over steps
LINE_POINTS = 400  # most points of one line: about two per pixel of a column
FIGURE_POINTS = 60_000  # of all lines together, 45 bytes each: a page of them stays under 5 MB

# Ticks of learning rates and norms: plain where that is short, powers where it is not.
_PLAIN = "(datum.value >= 1e5 || datum.value < 1e-4) ? format(datum.value, '.0e') : format(datum.value, '~g')"

_TWO_LINES = "split(datum.label, '|')"  # of a column's heading


# Final metric against learning rate ----------------------------------------------------------------------------------


def metric_against_lr(
    trials: pl.DataFrame, metric: str = "mAP50-95", *, rate: str = "learning rate lr0"
) -> alt.LayerChart:
    """Final metric against nominal learning rate: a point per trial, a line through each arm's medians.

    A trial that diverged is a mark in its arm's row under the axis, one shape for each kind of divergence, and counts
    as 0 in the median. A trial that did not learn is a hollow point.

    Args:
        trials: Columns `arm`, `lr0`, `seed`, `metric` (null where there is none) and `verdict`. Arms are coloured in
            the order of their first row; of more than seven the first and the six with the best metric are shown.
        metric: What the metric is called.
        rate: What `lr0` holds, where that is another rate.
    """
    arms, left_out = _most_arms(trials)
    table = trials.select("arm", "lr0", "seed", "metric", "verdict").filter(pl.col("arm").is_in(arms))
    table = _dodged(table.with_columns(lost=pl.col("verdict").is_in(list(MARKS))), arms)
    kept = table.filter(~pl.col("lost"), pl.col("metric").is_not_null())
    lost = table.filter("lost")
    top = _nice_top(max(kept["metric"].to_list(), default=0.0))
    rows = [arm for arm in arms if arm in lost["arm"].to_list()]
    height_px, row_px = 300, 17
    row = top * row_px / height_px  # of the axis, per row of marks
    bottom = -(len(rows) + 0.6) * row if rows else 0.0
    lost = lost.with_columns(y=pl.col("arm").replace_strict(_row_heights(rows, row), return_dtype=pl.Float64))

    color = alt.Color("arm:N", scale=alt.Scale(domain=arms, range=_cycled(COLORS, len(arms))), legend=None)
    shape = alt.Shape("arm:N", scale=alt.Scale(domain=arms, range=_cycled(SHAPES, len(arms))), legend=None)
    x = alt.X("at:Q", scale=_rate_scale(table["lr0"]), title=rate, axis=_rate_axis(trials["lr0"]))
    y_axis = alt.Axis(values=_ticks(top), format="~g", titleY=height_px / 2, domain=False)
    y_scale = alt.Scale(domain=[bottom, top], nice=False)
    y = alt.Y("metric:Q", scale=y_scale, title=f"final {metric}", axis=y_axis)
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("lr0:Q", format=".3~g", title=rate),
        alt.Tooltip("seed:O"),
        alt.Tooltip("verdict:N"),
        alt.Tooltip("metric:Q", format=".3f", title=metric),
    ]

    medians = _medians(table)
    line = alt.Chart(_values(medians)).mark_line(strokeWidth=2.2).encode(x=x, y=y, color=color)
    layers: list[alt.Chart] = [line]
    for is_stalled in (False, True):
        points = kept.filter((pl.col("verdict") == "stalled") == is_stalled)
        if len(points) or not is_stalled:
            mark = alt.Chart(_values(points)).mark_point(
                filled=not is_stalled, size=64, opacity=0.9 if is_stalled else 0.6
            )
            layers.append(mark.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip))
    labels = _end_labels(medians, gap=top * 15 / height_px).mark_text(align="left", dx=8, fontSize=12.5)
    layers.append(labels.encode(x=alt.value(WIDTH_PX), y=y, color=color, text="arm:N"))
    kinds = [kind for kind in MARKS if kind in lost["verdict"].to_list()]
    if rows:
        zero = alt.Chart(_values(pl.DataFrame({"metric": [0.0]}))).mark_rule(color=QUIET).encode(y=y)
        layers = [zero, *layers, _lost_heading(-(len(rows) + 1) / 2 * row, y_scale)]
        for kind in kinds:
            mark = alt.Chart(_values(lost.filter(pl.col("verdict") == kind))).mark_point(
                shape=MARKS[kind].path, filled=MARKS[kind].filled, size=58, strokeWidth=2.2, opacity=1
            )
            layers.append(mark.encode(x=x, y=alt.Y("y:Q", scale=y_scale), color=color, tooltip=tooltip[:4]))
    note = ["Points are seeds, lines their medians" + ("" if rows else "; no run diverged") + "."]
    if rows:
        names = ", ".join(f"{MARKS[kind].sign} {MARKS[kind].words}" for kind in kinds)
        note = ["Points are seeds, lines their medians. Under the axis: runs that diverged, which count as 0.", names]
    if (kept["verdict"] == "stalled").any():
        note.append("Hollow points: runs that did not learn, and did not diverge.")
    if left_out:
        note.append(f"{left_out} further arms are not drawn here; the table has them.")
    chart = alt.layer(*layers).properties(
        width=WIDTH_PX,
        height=height_px + int(row_px * (len(rows) + 0.6) if rows else 0),
        title=alt.Title(f"Final {metric} against {rate.removesuffix(' lr0')}", subtitle=note),
    )
    styled: alt.LayerChart = _styled(chart)
    return styled


def _most_arms(trials: pl.DataFrame) -> tuple[list[str], int]:
    """Arms to draw, in their order, and how many are left out."""
    arms: list[str] = trials["arm"].unique(maintain_order=True).to_list()
    if len(arms) <= MOST_ARMS:
        return arms, 0
    by_quality = trials.group_by("arm").agg(pl.col("metric").max().fill_null(0.0)).sort("metric", descending=True)
    chosen = {arms[0], *[arm for arm in by_quality["arm"].to_list() if arm != arms[0]][: MOST_ARMS - 1]}
    return [arm for arm in arms if arm in chosen], len(arms) - MOST_ARMS


def _dodged(trials: pl.DataFrame, arms: list[str]) -> pl.DataFrame:
    """`at`: lr0 moved a few pixels by arm, and for lost trials by seed, so that equal values do not hide each other."""
    low, high = _rate_limits(trials["lr0"])
    pixel = math.log10(high / low) / WIDTH_PX
    places = {arm: i - (len(arms) - 1) / 2 for i, arm in enumerate(arms)}
    arm = pl.col("arm").replace_strict(places, return_dtype=pl.Float64)
    place = pl.col("seed").rank("ordinal").over("arm", "lr0", "lost").cast(pl.Float64)
    count = pl.len().over("arm", "lr0", "lost").cast(pl.Float64)
    moved = pl.when("lost").then((place - (count + 1) / 2) * 12).otherwise(arm * min(4.0, 16 / len(arms)))
    return trials.with_columns(at=pl.col("lr0") * 10.0 ** (moved * pixel))


def _medians(table: pl.DataFrame) -> pl.DataFrame:
    metric = pl.when("lost").then(0.0).otherwise(pl.col("metric"))
    medians = table.with_columns(metric=metric).group_by("arm", "lr0", maintain_order=True)
    return medians.agg(pl.col("metric").median()).drop_nulls().sort("arm", "lr0").with_columns(at=pl.col("lr0"))


def _row_heights(rows: list[str], row: float) -> dict[str, float]:
    return {arm: -(i + 1.0) * row for i, arm in enumerate(rows)}


def _end_labels(medians: pl.DataFrame, *, gap: float) -> alt.Chart:
    """A label at the right end of each arm's line, moved apart where lines end close together."""
    ends = medians.group_by("arm", maintain_order=True).last().sort("metric")
    return alt.Chart(_values(ends.with_columns(pl.Series("metric", _spread(ends["metric"].to_list(), gap)))))


def _spread(values: list[float], gap: float) -> list[float]:
    """Ascending values, moved apart to at least `gap`, the lowest staying where it is or above.

    Example:
        >>> _spread([0.0, 0.1, 1.0], 0.5)
        [0.0, 0.5, 1.0]
    """
    moved: list[float] = []
    for value in values:
        moved.append(max(value, moved[-1] + gap) if moved else value)
    return moved


def _lost_heading(height: float, scale: alt.Scale) -> alt.Chart:
    table = pl.DataFrame({"y": [height], "text": ["lost"]})
    mark = alt.Chart(_values(table)).mark_text(align="right", dx=-8, color=QUIET, fontSize=12)
    heading: alt.Chart = mark.encode(x=alt.value(0), y=alt.Y("y:Q", scale=scale), text="text:N")
    return heading


def _rate_limits(rates: pl.Series) -> tuple[float, float]:
    """A little beyond the rates there are."""
    low, high = _extremes(rates)
    margin = (high / low) ** 0.04 if high > low else 2.0
    return low / margin, high * margin


def _extremes(values: pl.Series) -> tuple[float, float]:
    numbers = [float(value) for value in values.to_list()]
    return min(numbers), max(numbers)


def _rate_scale(rates: pl.Series) -> alt.Scale:
    return alt.Scale(type="log", domain=list(_rate_limits(rates)), nice=False)


def _rate_axis(rates: pl.Series) -> alt.Axis:
    values = rates.unique().sort().to_list()
    if len(values) > MOST_TICKS or any(f"{value:.1g}" != f"{value:.3g}" for value in values):  # not a grid's
        values = [mantissa * 10.0**exponent for exponent in range(-9, 3) for mantissa in (1, 3)]
    return alt.Axis(values=values, labelExpr=_PLAIN, grid=True, labelOverlap=True)


def _nice_top(highest: float) -> float:
    """The end of a metric's axis: the next 0.05 above, at least 0.1, at most 1."""
    return min(1.0, max(0.1, math.ceil(highest * 1.06 / 0.05) * 0.05))


def _ticks(top: float) -> list[float]:
    step = next(step for step in (0.02, 0.05, 0.1, 0.2) if top / step <= 6.5 or step == 0.2)
    return [round(i * step, 4) for i in range(int(top / step + 1e-6) + 1)]


# Trajectories --------------------------------------------------------------------------------------------------------


def trajectories(
    steps: pl.DataFrame, rollbacks: pl.DataFrame | None = None, *, most_points: int = FIGURE_POINTS
) -> alt.VConcatChart:
    """Loss, gradient norm and clip share over optimizer steps: a column per learning rate, a thin line per trial.

    Args:
        steps: The step records of the trials (`step`, `loss`, `total_norm`, `clip_coef`) with the columns `trial`,
            `arm`, `lr0` and `diverged_at` (null where the trial did not diverge). At most five learning rates are
            shown: those around the lowest at which a trial diverged, or the highest.
        rollbacks: Where the guard went back: `trial`, and the `step` after which it did.
        most_points: Of all lines together; a page of several such figures shares `FIGURE_POINTS` among them.
    """
    arms = steps["arm"].unique(maintain_order=True).to_list()
    rates = _columns(steps)
    shown = steps.filter(pl.col("lr0").is_in(rates)).sort("trial", "step", maintain_order=True)
    points = max(60, min(LINE_POINTS, most_points // (3 * max(1, shown["trial"].n_unique()))))
    panels: list[tuple[pl.DataFrame, alt.Y]] = []
    dropped: dict[str, int] = {}
    for name, title in (("loss", "loss"), ("total_norm", "gradient norm")):
        table = shown.rename({name: "value"}).select("trial", "arm", "lr0", "step", "value")
        positive = table.filter(pl.col("value").is_finite() & (pl.col("value") > 0))
        dropped[title] = len(table) - len(positive)
        axis = alt.Axis(labelExpr=_PLAIN, tickCount=5, gridOpacity=0.7)
        panels.append((positive, alt.Y("value:Q", scale=alt.Scale(type="log", nice=False), title=title, axis=axis)))
    scale = alt.Scale(domain=[0, 100])
    panels.append((_clip_share(shown), alt.Y("value:Q", scale=scale, title="clipped steps (%)")))
    marks = _marks(shown, rollbacks)
    charts = [
        _panel(_marked(thin(table, points), marks), y, arms, rates, is_first=i == 0, is_last=i == len(panels) - 1)
        for i, (table, y) in enumerate(panels)
    ]
    drawn = [mark.words for kind, mark in EVENTS.items() if (marks["mark"] == kind).any()]
    note = [
        "A line per run, thinned so that extremes stay" + "".join(f"; {words}" for words in drawn) + ".",
        "Norms are those before clipping, the share is a rolling one.",
    ]
    if missing := [f"{count} of the {name}" for name, count in dropped.items() if count]:
        note.append(f"Left out, being zero or not finite and so without a place on a log axis: {', '.join(missing)}.")
    if len(rates) < steps["lr0"].n_unique():
        note.append(f"{len(rates)} of {steps['lr0'].n_unique()} learning rates are shown, those around the edge.")
    heading = alt.Title("Loss, gradient norm and clipping over optimizer steps", subtitle=note)
    styled: alt.VConcatChart = _styled(
        alt.vconcat(*charts, spacing=14).resolve_scale(color="independent").properties(title=heading)
    )
    return styled


def _marks(steps: pl.DataFrame, rollbacks: pl.DataFrame | None) -> pl.DataFrame:
    """`trial`, `step` and `mark`, the kind of what happened there, of `EVENTS`."""
    lost = steps.group_by("trial").agg(step=pl.col("diverged_at").first()).drop_nulls()
    tables = [lost.with_columns(mark=pl.lit(1))]
    if rollbacks is not None:
        back = rollbacks.filter(pl.col("trial").is_in(steps["trial"].unique().to_list()))
        tables.append(back.select("trial", "step", mark=pl.lit(2)).cast({n: lost.schema[n] for n in ("trial", "step")}))
    return pl.concat(tables)


def _marked(table: pl.DataFrame, marks: pl.DataFrame) -> pl.DataFrame:
    """`mark` is the kind of `EVENTS` at a run's last point up to it, and 0 elsewhere."""
    points = table.select("trial", "step", at="step").sort("step")
    found = marks.sort("step").join_asof(points, on="step", by="trial", check_sortedness=False)
    at = found.drop_nulls("at").group_by("trial", "at").agg(pl.col("mark").min())  # to be lost outweighs
    table = table.join(at, left_on=["trial", "step"], right_on=["trial", "at"], how="left", maintain_order="left")
    return table.with_columns(pl.col("mark").fill_null(0))


def thin(table: pl.DataFrame, points: int) -> pl.DataFrame:
    """At most `points` rows per trial: the smallest and the largest `value` of each bucket, so no spike is lost.

    Args:
        table: Columns `trial` and `value`, each trial's rows in order.
        points: Most rows to keep per trial; even.
    """
    bucket = pl.int_range(pl.len()).over("trial") * (points // 2) // pl.len().over("trial").clip(points // 2)
    place = pl.int_range(pl.len()).over("trial", "bucket")
    value = pl.col("value")
    is_extreme = (place == value.arg_min().over("trial", "bucket")) | (place == value.arg_max().over("trial", "bucket"))
    return table.with_columns(bucket=bucket).filter(is_extreme).drop("bucket")


def _columns(steps: pl.DataFrame) -> list[float]:
    """Learning rates to show: all, or those around the lowest at which a trial diverged."""
    rates: list[float] = steps["lr0"].unique().sort().to_list()
    if len(rates) <= MOST_COLUMNS:
        return rates
    lost: list[float] = steps.filter(pl.col("diverged_at").is_not_null())["lr0"].unique().to_list()
    edge = rates.index(min(lost)) if lost else len(rates) - 1
    first = min(max(0, edge - MOST_COLUMNS // 2), len(rates) - MOST_COLUMNS)
    return rates[first : first + MOST_COLUMNS]


def _clip_share(steps: pl.DataFrame) -> pl.DataFrame:
    """Share of clipped steps in a trailing window of a twentieth of the longest run, in per cent."""
    window = max(5, max(steps.group_by("trial").len()["len"].to_list(), default=0) // 20)
    clipped = (pl.col("clip_coef") < 1).cast(pl.Float64).fill_null(0.0) * 100
    share = clipped.rolling_mean(window, min_samples=1).over("trial")
    return steps.select("trial", "arm", "lr0", "step", value=share)


def _legend(arms: list[str]) -> alt.Legend:
    """Of arms by colour, in as many columns as their names allow."""
    longest = max(map(len, arms), default=1) * LABEL_PX
    # Vega measures text without a font: what it is short of, a fifth, is left between the columns.
    padding = 10 + longest // 5
    columns = max(1, min(3, COLUMNS_PX // (longest + padding + SYMBOL_PX)))
    return alt.Legend(
        title=None,
        orient="top",
        symbolStrokeWidth=3,
        symbolOpacity=1,
        labelLimit=0,
        labelFontSize=LABEL_SIZE,
        columns=columns,
        columnPadding=padding,
    )


def _panel(
    table: pl.DataFrame, y: alt.Y, arms: list[str], rates: list[float], *, is_first: bool, is_last: bool
) -> alt.FacetChart:
    legend = _legend(arms)
    scale = alt.Scale(domain=arms, range=_cycled(COLORS, len(arms)))
    color = alt.Color("arm:N", scale=scale, legend=legend if is_first and len(arms) > 1 else None)
    axis = alt.Axis(tickCount=4, format="~s", title="optimizer step" if is_last else None, labels=is_last)
    header = alt.Header(
        title=None,
        labels=is_first,
        labelExpr="'lr0 ' + (" + _PLAIN + ")",
        labelFontSize=LABEL_SIZE,
        labelFontWeight="bold",
    )
    width = (COLUMNS_PX - 14 * (len(rates) - 1)) / len(rates)
    base = alt.Chart().encode(x=alt.X("step:Q", axis=axis), y=y)
    layers = [base.mark_line(strokeWidth=1.1, opacity=0.65).encode(detail="trial:N", color=color)]
    for kind, event in EVENTS.items():
        mark = base.transform_filter(f"datum.mark == {kind}").mark_point(
            shape=event.path, filled=event.filled, size=40, strokeWidth=2, color=event.color, opacity=1
        )
        layers.append(mark)
    lines = alt.layer(*layers, data=_values(table))
    column = alt.Column("lr0:O", header=header, sort="ascending")
    panel: alt.FacetChart = lines.properties(width=width, height=150).facet(column=column, spacing=14)
    return panel


# Grids, survival, layers ----------------------------------------------------------------------------------------------


def metric_heatmap(trials: pl.DataFrame, metric: str = "mAP50-95", *, rows: str | None = None) -> alt.LayerChart:
    """Median final metric of every arm at every learning rate, with what was lost there.

    Args:
        trials: As for `metric_against_lr`; rows are in the order of the arms.
        metric: What the metric is called.
        rows: What the rows are, where that is not the name of an arm.
    """
    arms = trials["arm"].unique(maintain_order=True).to_list()
    is_lost = pl.col("verdict").is_in(list(MARKS))
    cells = (
        trials.with_columns(score=pl.when(is_lost).then(0.0).otherwise(pl.col("metric")))
        .group_by("arm", "lr0", maintain_order=True)
        .agg(
            pl.col("score").median(),
            lost=is_lost.sum(),
            runs=pl.len(),
            kinds=pl.col("verdict").filter(is_lost).unique().sort(),
        )
    )
    text = pl.format("{}", pl.col("score").round(3).cast(pl.String).str.pad_end(5, "0").str.slice(0, 5))
    sign_of = {kind: mark.sign for kind, mark in MARKS.items()}
    signs = pl.col("kinds").list.eval(pl.element().replace_strict(sign_of, return_dtype=pl.String)).list.join("")
    kind = pl.when(pl.col("kinds").list.len() == 1).then(pl.col("kinds").list.first()).otherwise(pl.lit("lost"))
    some = pl.format("{} {} {}/{}", text, signs, pl.col("lost"), pl.col("runs"))
    every = pl.format("{} {}", signs, kind)
    words = pl.when(pl.col("lost") == 0).then(text).when(pl.col("lost") == pl.col("runs")).then(every).otherwise(some)
    highest = max(cells["score"].drop_nulls().to_list(), default=0.0) or 1.0
    ink = pl.when(pl.col("lost") > 0).then(pl.lit(LOST)).otherwise(pl.lit(INK))
    ink = pl.when(pl.col("score") > 0.65 * highest).then(pl.lit("white")).otherwise(ink)
    signs_of = ", ".join(
        f"{mark.sign} {mark.words}" for name, mark in MARKS.items() if name in cells["kinds"].explode().to_list()
    )
    cells = cells.with_columns(words=words.fill_null("no metric"), ink=ink).drop("kinds")
    x = alt.X(
        "lr0:O",
        title="learning rate lr0",
        sort="ascending",
        axis=alt.Axis(labelExpr=_PLAIN, labelAngle=0, ticks=False, domain=False),
    )
    y = alt.Y("arm:N", title=rows, sort=arms, axis=alt.Axis(labelLimit=0, ticks=False, domain=False))
    color = alt.Color(
        "score:Q",
        scale=alt.Scale(scheme="blues", domain=[0, highest]),
        legend=alt.Legend(title=f"median {metric}", format=".2f"),
    )
    base = alt.Chart(_values(cells))
    tooltip = [alt.Tooltip(f"{name}:N") for name in ("arm", "lr0", "words", "lost", "runs")]
    chart = alt.layer(
        base.mark_rect(stroke="white", strokeWidth=2).encode(x=x, y=y, color=color, tooltip=tooltip),
        base.mark_text(fontSize=12).encode(x=x, y=y, text="words:N", color=alt.Color("ink:N", scale=None)),
    ).resolve_scale(color="independent")
    note = "Median over seeds, a run that diverged counting as 0."
    note += f" {signs_of}; k/n where only some did." if signs_of else " No run diverged."
    width = max(360, min(WIDTH_PX, 96 * cells["lr0"].n_unique()))
    title = alt.Title(f"Final {metric} by {'arm' if rows is None else 'cap'} and learning rate", subtitle=note)
    styled: alt.LayerChart = _styled(chart.properties(width=width, height=30 * len(arms), title=title))
    return styled


EFFECTS = {1: ("better", "#d3e6f5"), 0: ("no difference shown", "#eef0f2"), -1: ("worse", "#fbdcc9")}


def technique_matrix(effects: pl.DataFrame) -> alt.LayerChart:
    """What each technique came to, against the row that it is compared with.

    Args:
        effects: A row per cell, as `comparison.effects` gives them: `arm`, `measure`, `words`, and `effect`, which is 1
            where it is better than the reference, -1 where it is worse, 0 where these runs show no difference, and null
            where nothing is judged. Rows and columns are in the order in which they first come.
    """
    arms = effects["arm"].unique(maintain_order=True).to_list()
    measures = effects["measure"].unique(maintain_order=True).to_list()
    judged = effects["effect"].drop_nulls().unique().to_list()
    names = [EFFECTS[effect][0] for effect in EFFECTS if effect in judged]
    colors = [EFFECTS[effect][1] for effect in EFFECTS if effect in judged]
    signs = pl.col("effect").replace_strict({1: "▲ ", -1: "▼ "}, default="", return_dtype=pl.String)
    kinds = {effect: name for effect, (name, _) in EFFECTS.items()}
    cells = effects.with_columns(
        text=signs.fill_null("") + pl.col("words"),
        kind=pl.col("effect").replace_strict(kinds, default=None, return_dtype=pl.String),
    )
    x = alt.X(
        "measure:N",
        title=None,
        sort=measures,
        axis=alt.Axis(
            orient="top", labelAngle=0, labelLimit=0, labelPadding=20, ticks=False, domain=False, labelExpr=_TWO_LINES
        ),
    )
    y = alt.Y("arm:N", title=None, sort=arms, axis=alt.Axis(labelLimit=0, ticks=False, domain=False))
    color = alt.Color("kind:N", scale=alt.Scale(domain=names, range=colors), legend=alt.Legend(title=None))
    cell = alt.Chart(_values(cells.filter(pl.col("kind").is_not_null())))
    text = alt.Chart(_values(cells))
    tooltip = [alt.Tooltip(f"{name}:N") for name in ("arm", "measure", "text", "kind")]
    chart = alt.layer(
        cell.mark_rect(stroke="white", strokeWidth=2).encode(x=x, y=y, color=color, tooltip=tooltip),
        text.mark_text(fontSize=12, color=INK).encode(x=x, y=y, text="text:N"),
    )
    note = f"Against {arms[0]}; ▲ better and ▼ worse only where intervals or ranges over seeds do not overlap."
    styled: alt.LayerChart = _styled(
        chart.properties(
            width=160 * len(measures), height=30 * len(arms), title=alt.Title("What each technique does", subtitle=note)
        )
    )
    return styled


def survival(curves: pl.DataFrame) -> alt.LayerChart:
    """Share of runs that have not diverged, over optimizer steps.

    Args:
        curves: The corners of each arm's step function: `arm`, `step`, `share`.
    """
    arms = curves["arm"].unique(maintain_order=True).to_list()
    table, names = _merged(curves.with_columns(percent=pl.col("share") * 100))
    # An arm keeps the colour it has in the other figures; several on one line have none of theirs.
    colors = dict(zip(arms, _cycled(COLORS, len(arms)), strict=True))
    scale = alt.Scale(domain=names, range=[colors.get(name, QUIET) for name in names])
    color = alt.Color("arm:N", scale=scale, legend=None)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(nice=False), axis=alt.Axis(format="~s", tickCount=8))
    y = alt.Y(
        "percent:Q",
        title="runs not diverged (%)",
        scale=alt.Scale(domain=[0, 100], nice=False),
        axis=alt.Axis(values=[0, 25, 50, 75, 100]),
    )
    lines = alt.Chart(_values(table)).mark_line(interpolate="step-after", strokeWidth=2.2).encode(x=x, y=y, color=color)
    ends = table.group_by("arm", maintain_order=True).last().sort("percent")
    moved = _spread(ends["percent"].to_list(), 7.5 if len(names) == len(arms) else 14.0)  # of one line, or two
    over = max(0.0, moved[-1] - 100)  # the block ends where the axis does
    ends = ends.with_columns(pl.Series("percent", [value - over for value in moved]))
    text = alt.Chart(_values(ends)).mark_text(align="left", dx=8, fontSize=12.5, lineBreak="\n")
    text = text.encode(x=alt.value(WIDTH_PX), y=y, color=color, text="arm:N")
    note = "Over all learning rates of an arm; each step down is a run that diverged."
    title = alt.Title("Runs that live on", subtitle=note)
    styled: alt.LayerChart = _styled(alt.layer(lines, text).properties(width=WIDTH_PX, height=220, title=title))
    return styled


def _merged(curves: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Arms whose curves are the same share one line, named by both if they are two, or else by the first."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for arm in curves["arm"].unique(maintain_order=True).to_list():
        corners = tuple(curves.filter(pl.col("arm") == arm).select("step", "percent").iter_rows())
        groups.setdefault(corners, []).append(arm)
    tables, names = [], []
    for arms in groups.values():
        more = arms[1:] if len(arms) <= 2 else [f"{len(arms) - 1} others"]
        name = "\nand ".join([arms[0], *more])
        names.append(name)
        tables.append(curves.filter(pl.col("arm") == arms[0]).with_columns(arm=pl.lit(name)))
    return pl.concat(tables), names


def layer_norms(runs: list[tuple[str, pl.DataFrame]]) -> alt.VConcatChart:
    """Gradient norm of every stage over steps, as a heat map per run.

    Args:
        runs: A title, and layer records: `step`, `layer`, `grad_norm`. Steps are put into at most 120 columns, of which
            each shows its largest norm.
    """
    charts = []
    norms = pl.concat([layers["grad_norm"] for _, layers in runs])
    norms = norms.filter(norms.is_finite() & (norms > 0))
    powers = _powers(norms)
    for name, layers in runs:
        order = sorted(layers["layer"].unique().to_list(), key=_stage)
        last = layers["step"].max()
        width = max(1, math.ceil((float(last) + 1) / LAYER_COLUMNS)) if isinstance(last, int) else 1
        width = max(width, _spacing(layers["step"]))
        cells = (
            layers.filter(pl.col("grad_norm").is_finite() & (pl.col("grad_norm") > 0))
            .group_by(step=pl.col("step") // width * width, layer="layer")
            .agg(pl.col("grad_norm").max())
            .with_columns(end=pl.col("step") + width, log=pl.col("grad_norm").log10())
            .sort("step", "layer")
        )
        axis = alt.Axis(format="~s", tickCount=8, grid=False)
        chart = alt.Chart(_values(cells)).mark_rect()
        chart = chart.encode(
            x=alt.X("step:Q", title="optimizer step", axis=axis, scale=alt.Scale(nice=False, zero=False)),
            x2="end:Q",
            y=alt.Y("layer:N", title=None, sort=order, axis=alt.Axis(ticks=False, labelFontSize=10)),
            color=alt.Color(
                "log:Q",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(title="norm", values=powers, labelExpr="format(pow(10, datum.value), '.0e')"),
            ),
            tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("step:Q"), alt.Tooltip("grad_norm:Q", format=".3g")],
        )
        heading = alt.Title(name, fontSize=13, anchor="start", offset=6)
        charts.append(chart.properties(width=WIDTH_PX, height=11 * len(order), title=heading))
    note = "Before clipping; from the input (above) to the head. White: exactly 0, or not finite."
    title = alt.Title("Gradient norm of each stage", subtitle=note)
    stacked = alt.vconcat(*charts, spacing=18).resolve_scale(color="shared").properties(title=title)
    styled: alt.VConcatChart = _styled(stacked)
    return styled


def depth_profile(norms: pl.DataFrame, *, depth: str = "stage of the backbone") -> alt.FacetChart:
    """Gradient norm over the depth of the backbone: a panel per moment, a line per arm.

    Args:
        norms: Columns `arm`, `moment`, `stage` and `norm`; panels and colours in the order of their first rows. Of more
            than seven arms the first seven are shown. With a column `theory`, what is expected is dashed (null: none).
        depth: What `stage` counts, where that is something else.
    """
    arms = norms["arm"].unique(maintain_order=True).to_list()
    moments = norms["moment"].unique(maintain_order=True).to_list()
    of_arms = norms.filter(pl.col("arm").is_in(arms[:MOST_ARMS]))
    shown = of_arms.filter(pl.col("norm").is_finite() & (pl.col("norm") > 0))
    note = ["Before clipping; the input is to the left. A level line passes gradients on unchanged."]
    if missing := len(of_arms) - len(shown):
        note.append(f"Left out, being zero or not finite and so without a place on a log axis: {missing}.")
    if len(arms) > MOST_ARMS:
        note.append(f"{len(arms) - MOST_ARMS} further arms are not drawn here; the table has them.")
    if "theory" in shown.columns:
        note.append("Points: measured. Dashed: what theory expects.")
    arms = arms[:MOST_ARMS]
    legend = _legend(arms)
    width = (COLUMNS_PX - 14 * (len(moments) - 1)) / max(1, len(moments))
    y_axis = alt.Axis(labelExpr=_PLAIN, values=[10.0**power for power in _powers(shown["norm"])])
    base = alt.Chart().encode(
        x=alt.X("stage:O", title=depth, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("norm:Q", scale=alt.Scale(type="log", nice=False), title="gradient norm", axis=y_axis),
        color=alt.Color("arm:N", scale=alt.Scale(domain=arms, range=_cycled(COLORS, len(arms))), legend=legend),
        tooltip=[alt.Tooltip("arm:N"), alt.Tooltip("stage:O"), alt.Tooltip("norm:Q", format=".3g")],
    )
    if "theory" in shown.columns:
        expected = base.transform_filter("datum.theory > 0").encode(y="theory:Q")
        layers = [expected.mark_line(strokeWidth=1.4, strokeDash=[5, 4]), base.mark_point(filled=True, size=22)]
    else:
        layers = [base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=26))]
    lines = alt.layer(*layers, data=_values(shown)).properties(width=width, height=240)
    header = alt.Header(title=None, labelFontSize=LABEL_SIZE, labelFontWeight="bold")
    column = alt.Column("moment:N", header=header, sort=moments)
    heading = alt.Title("Gradient norm over depth", subtitle=note)
    styled: alt.FacetChart = _styled(lines.facet(column=column, spacing=14).properties(title=heading))
    return styled


def _powers(norms: pl.Series) -> list[int]:
    """Powers of ten among positive numbers, at most eight of them."""
    low, high = _extremes(norms) if len(norms) else (1.0, 1.0)
    whole = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return list(whole[:: max(1, math.ceil(len(whole) / 8))])


def _stage(name: str) -> tuple[int, str]:
    number = name.rpartition(".")[2]
    return (int(number), name) if number.isdigit() else (10**6, name)


def _spacing(steps: pl.Series) -> int:
    """Steps between records."""
    gaps = steps.unique().sort().diff().drop_nulls()
    return int(gaps.to_list()[0]) if len(gaps) else 1


# Learning-rate range test ---------------------------------------------------------------------------------------------


def lr_range(steps: pl.DataFrame, *, lr_div: float | None, grid: list[float]) -> alt.LayerChart:
    """Loss against a rising learning rate, with the rate at which training broke and the suggested grid.

    Args:
        steps: A row per optimizer step: `lr`, `loss` and `smoothed_loss`, null where not finite.
        lr_div: The rate at which training broke, or none.
        grid: Rates marked on the axis.
    """
    positive = steps.filter(pl.col("smoothed_loss") > 0)
    low, high = _extremes(pl.concat([steps["lr"], pl.Series(grid)]))
    x = alt.X(
        "lr:Q",
        scale=alt.Scale(type="log", domain=[low / 1.15, high * 1.15], nice=False),
        title="learning rate",
        axis=alt.Axis(labelExpr=_PLAIN, values=[10.0**i for i in range(-8, 2)]),
    )
    axis = alt.Axis(labelExpr=_PLAIN, tickCount=5)
    lowest, highest = _extremes(positive["smoothed_loss"]) if len(positive) else (0.1, 1.0)
    scale = alt.Scale(type="log", domain=[lowest / 1.6, highest * 1.6], nice=False, clamp=True)
    dots = alt.Chart(_values(steps.filter(pl.col("loss") > 0))).mark_point(
        filled=True, size=14, opacity=0.35, color=QUIET
    )
    line = alt.Chart(_values(positive)).mark_line(color=COLORS[0], strokeWidth=2.2)
    layers = [
        dots.encode(x=x, y=alt.Y("loss:Q", scale=scale, axis=axis, title="loss per image")),
        line.encode(x=x, y=alt.Y("smoothed_loss:Q", scale=scale, axis=axis, title="loss per image")),
        alt.Chart(_values(pl.DataFrame({"lr": grid})))
        .mark_point(shape="triangle-up", filled=True, size=70, color=COLORS[2], opacity=1)
        .encode(x=x, y=alt.value(294)),
    ]
    note = "Line: smoothed; dots: each step. Triangles: the suggested grid."
    if lr_div is not None:
        table = pl.DataFrame({"lr": [lr_div], "text": [f" broke at {lr_div:.2g}"]})
        layers.append(alt.Chart(_values(table)).mark_rule(color=COLORS[1], strokeWidth=1.8).encode(x=x))
        near_end = lr_div > low * (high / low) ** 0.75
        text = alt.Chart(_values(table)).mark_text(
            align="right" if near_end else "left", dx=-6 if near_end else 4, color=COLORS[1], fontSize=12.5
        )
        layers.append(text.encode(x=x, y=alt.value(10), text="text:N"))
    title = alt.Title("Learning-rate range test", subtitle=note)
    styled: alt.LayerChart = _styled(alt.layer(*layers).properties(width=WIDTH_PX, height=300, title=title))
    return styled


# Output --------------------------------------------------------------------------------------------------------------


def save(chart: alt.TopLevelMixin | dict[str, Any], path: str | Path) -> Path:
    """Write a chart, or its specification, as PNG or SVG, by the name's ending; without a browser or a network."""
    import vl_convert

    path = Path(path)
    if path.suffix == ".svg":
        path.write_text(vl_convert.vegalite_to_svg(_specification(chart)), encoding="utf-8")
    elif path.suffix == ".png":
        path.write_bytes(vl_convert.vegalite_to_png(_specification(chart), scale=2))
    else:
        raise ValueError(f"{path}: a figure is saved as .png or .svg, got {path.suffix or 'no ending'!r}")
    return path


def embedded(chart: alt.TopLevelMixin | dict[str, Any]) -> str:
    """A chart as JSON that can stand in a `<script>` element of a page, whatever text the data holds."""
    return json.dumps(_specification(chart), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _specification(chart: alt.TopLevelMixin | dict[str, Any]) -> dict[str, Any]:
    return chart if isinstance(chart, dict) else chart.to_dict()


@cache
def javascript_bundle() -> str:
    """Vega, Vega-Lite and `vegaEmbed` in one script, for a page that opens offline; include it once."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub omits the default
    return bundle.replace("</script", "<\\/script")


def _values(table: pl.DataFrame) -> alt.InlineData:
    """Rows in the chart itself, to four digits: a screen shows no more, and a page stays small.

    As CSV text, which is half of JSON's size, and which Altair does not check against its schema row by row.
    """
    kinds = table.schema.items()
    floats = [name for name, kind in kinds if kind.is_float()]
    parse: Any = {name: "string" if kind == pl.String else "number" for name, kind in kinds if kind != pl.Boolean}
    text = table.select(*parse).with_columns(pl.col(floats).round_sig_figs(4)).write_csv()
    return alt.InlineData(values=text, format=alt.CsvDataFormat(type="csv", parse=parse))


def _cycled(values: tuple[str, ...], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]


def _styled(chart: Any) -> Any:
    """One look for all figures; white ground, so that they can be read on a dark page too."""
    return (
        chart.configure(background="white", font=FONT, padding=12)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=QUIET,
            titleColor=INK,
            gridColor=GRID,
            domainColor=QUIET,
            tickColor=QUIET,
            labelFontSize=12,
            titleFontSize=12.5,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_title(
            anchor="start",
            fontSize=16,
            color=INK,
            subtitleColor=QUIET,
            subtitleFontSize=12.5,
            subtitlePadding=5,
            offset=14,
        )
    )
