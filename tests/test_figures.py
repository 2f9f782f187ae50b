"""Figures from small tables: what is in them, and that they come out as files."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from yolo_gradstab import figures


def trials(**columns: Any) -> pl.DataFrame:
    table = {
        "arm": ["norm 10"] * 4 + ["agc, 0.01"] * 4,
        "lr0": [0.001, 0.001, 0.1, 0.1] * 2,
        "seed": [0, 1] * 4,
        "metric": [0.2, 0.3, 0.0, None, 0.1, 0.2, 0.3, 0.4],
        "lost": [False, False, True, True] + [False] * 4,
    }
    return pl.DataFrame(table | columns)


def steps(num_steps: int = 30, rates: tuple[float, ...] = (0.01, 0.1), lost: float | None = None) -> pl.DataFrame:
    rows = [
        {
            "trial": trial, "arm": f"arm {trial % 2}", "lr0": lr0, "lost": lost is not None and lr0 >= lost, "step": i,
            "loss": 10.0 + i, "total_norm": 5.0, "clip_coef": 0.5 if i % 2 else 1.0,
        }
        for trial, lr0 in enumerate([rate for rate in rates for _ in range(2)])
        for i in range(num_steps)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def tables(chart: Any) -> list[list[dict[str, str]]]:
    """The rows of every layer, as the page's script will read them."""
    return [list(csv.DictReader(io.StringIO(text))) for text in chart.to_dict()["datasets"].values()]


def test_a_lost_trial_counts_as_zero_in_its_arms_line() -> None:
    _, line, *_ = tables(figures.metric_against_lr(trials()))
    medians = {(row["arm"], float(row["lr0"])): float(row["metric"]) for row in line}
    expected = {("norm 10", 0.001): 0.25, ("norm 10", 0.1): 0.0, ("agc, 0.01", 0.001): 0.15, ("agc, 0.01", 0.1): 0.35}
    assert medians == pytest.approx(expected)


def test_every_lost_trial_is_a_cross_below_the_axis_and_no_point() -> None:
    _, _, points, _, crosses, _ = tables(figures.metric_against_lr(trials()))
    assert len(points) == 6
    assert [row["seed"] for row in crosses] == ["0", "1"]
    assert all(float(row["y"]) < 0 for row in crosses)
    assert crosses[0]["at"] != crosses[1]["at"]


def test_without_losses_there_is_no_row_of_crosses() -> None:
    chart = figures.metric_against_lr(trials(lost=[False] * 8))
    assert len(tables(chart)) == 3
    assert "no run was lost" in json.dumps(chart.to_dict())


@pytest.mark.parametrize("metric", [[None] * 8, [0.0] * 8, [1.0] * 8])
def test_extreme_metrics_still_make_a_figure(metric: list[float | None], tmp_path: Path) -> None:
    table = trials(metric=pl.Series(metric, dtype=pl.Float64), lr0=[0.01] * 8)
    assert figures.save(figures.metric_against_lr(table), tmp_path / "x.svg").read_text().startswith("<svg")


def test_thinning_keeps_every_spike() -> None:
    values = [1.0] * 10_000
    values[4321], values[4322], values[9999] = 1e9, 1e-9, 7.0
    table = pl.DataFrame({"trial": [0] * 10_000, "step": range(10_000), "value": values})
    thinned = figures.thin(table, 400)
    assert len(thinned) <= 400
    assert {1e9, 1e-9, 7.0} <= set(thinned["value"])
    assert thinned["step"].is_sorted()


def test_thinning_leaves_short_lines_alone() -> None:
    table = pl.DataFrame({"trial": [0] * 3 + [1] * 150, "step": [*range(3), *range(150)]})
    table = table.with_columns(value=pl.int_range(pl.len()).cast(pl.Float64))
    assert figures.thin(table, 400).equals(table)


def test_values_without_a_place_on_a_log_axis_are_counted() -> None:
    loss = pl.when(pl.col("step") == 3).then(0.0).when(pl.col("step") == 4).then(math.nan).otherwise(pl.col("loss"))
    norm = pl.when(pl.col("step") == 5).then(math.inf).otherwise(pl.col("total_norm"))
    chart = figures.trajectories(steps().with_columns(loss=loss, total_norm=norm))
    assert "8 of the loss, 4 of the gradient norm" in json.dumps(chart.to_dict())
    assert "Left out" not in json.dumps(figures.trajectories(steps()).to_dict())


def test_clip_share_is_a_share_of_steps() -> None:
    share = [float(row["value"]) for row in tables(figures.trajectories(steps()))[2]]
    assert min(share) >= 0
    assert max(share) <= 100
    assert 40 <= share[-1] <= 60  # every second step is clipped


def test_columns_are_the_rates_around_the_edge() -> None:
    rates = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    shown = {float(row["lr0"]) for row in tables(figures.trajectories(steps(rates=rates, lost=0.03)))[0]}
    assert shown == {0.003, 0.01, 0.03, 0.1, 0.3}
    shown = {float(row["lr0"]) for row in tables(figures.trajectories(steps(rates=rates)))[0]}
    assert shown == {0.01, 0.03, 0.1, 0.3, 1.0}


def test_figures_become_png_and_svg_and_nothing_else(tmp_path: Path) -> None:
    chart = figures.trajectories(steps())
    assert figures.save(chart, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert figures.save(chart, tmp_path / "x.svg").read_text().startswith("<svg")
    with pytest.raises(ValueError, match=r"saved as \.png or \.svg, got '\.pdf'"):
        figures.save(chart, tmp_path / "x.pdf")


def test_embedded_text_cannot_end_its_script() -> None:
    table = trials(arm=["</script><b>"] * 8)
    text = figures.embedded(figures.metric_against_lr(table))
    assert "<" not in text
    assert json.loads(text)["layer"]
