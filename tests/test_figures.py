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
        "verdict": ["kept", "kept", "collapse", "blowup"] + ["kept"] * 4,
    }
    return pl.DataFrame(table | columns)


def steps(num_steps: int = 30, rates: tuple[float, ...] = (0.01, 0.1), lost: float | None = None) -> pl.DataFrame:
    rows = [
        {
            "trial": trial, "arm": f"arm {trial % 2}", "lr0": lr0, "step": i, "loss": 10.0 + i, "total_norm": 5.0,
            "clip_coef": 0.5 if i % 2 else 1.0, "diverged_at": 20 if lost is not None and lr0 >= lost else None,
        }
        for trial, lr0 in enumerate([rate for rate in rates for _ in range(2)])
        for i in range(num_steps)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"diverged_at": pl.Int64})


def tables(chart: Any) -> list[list[dict[str, str]]]:
    """The rows of every layer, as the page's script will read them."""
    return [list(csv.DictReader(io.StringIO(text))) for text in chart.to_dict()["datasets"].values()]


def test_a_lost_trial_counts_as_zero_in_its_arms_line() -> None:
    _, line, *_ = tables(figures.metric_against_lr(trials()))
    medians = {(row["arm"], float(row["lr0"])): float(row["metric"]) for row in line}
    expected = {("norm 10", 0.001): 0.25, ("norm 10", 0.1): 0.0, ("agc, 0.01", 0.001): 0.15, ("agc, 0.01", 0.1): 0.35}
    assert medians == pytest.approx(expected)


def test_every_lost_trial_is_a_mark_of_its_kind_below_the_axis_and_no_point() -> None:
    chart = figures.metric_against_lr(trials())
    _, _, points, _, _, collapsed, blown_up = tables(chart)
    assert len(points) == 6
    assert [[row["seed"] for row in rows] for rows in (collapsed, blown_up)] == [["0"], ["1"]]
    assert all(float(row["y"]) < 0 for row in (*collapsed, *blown_up))
    assert collapsed[0]["at"] != blown_up[0]["at"]
    shapes = [layer["mark"]["shape"] for layer in chart.to_dict()["layer"] if "shape" in layer["mark"]]
    assert shapes == ["triangle-down", "triangle-up"]
    assert "▼ silent collapse, ▲ blow-up" in json.dumps(chart.to_dict(), ensure_ascii=False)


def test_without_losses_there_is_no_row_of_marks_and_stalled_runs_are_hollow() -> None:
    chart = figures.metric_against_lr(trials(verdict=["kept"] * 8))
    assert len(tables(chart)) == 3
    assert "no run diverged" in json.dumps(chart.to_dict())
    assert "Hollow" not in json.dumps(chart.to_dict())
    stalled = figures.metric_against_lr(trials(verdict=["stalled"] + ["kept"] * 7)).to_dict()
    assert [layer["mark"]["filled"] for layer in stalled["layer"] if "filled" in layer["mark"]] == [True, False]
    assert "Hollow points" in json.dumps(stalled)


def test_at_most_seven_lines_are_drawn_and_the_first_is_one() -> None:
    rows = {"lr0": [0.1] * 10, "seed": [0] * 10, "metric": [i / 20 for i in range(10)], "verdict": ["kept"] * 10}
    chart = figures.metric_against_lr(pl.DataFrame({"arm": [f"arm {i}" for i in range(10)]} | rows))
    assert {row["arm"] for row in tables(chart)[1]} == {"arm 0", *(f"arm {i}" for i in range(4, 10))}
    assert "3 further arms are not drawn" in json.dumps(chart.to_dict())


def test_cells_of_a_grid_hold_medians_and_what_was_lost() -> None:
    table = trials(
        metric=[0.2, 0.3, 0.4, None, 0.1, 0.2, 0.3, 0.4],
        verdict=["kept", "kept", "kept", "blowup"] + ["kept"] * 2 + ["collapse", "blowup"],
    )
    cells = tables(figures.metric_heatmap(table))[0]
    words = {(row["arm"], row["lr0"]): (row["words"], float(row["score"])) for row in cells}
    assert words == {
        ("norm 10", "0.001"): ("0.250", 0.25),
        ("norm 10", "0.1"): ("0.200 ▲ 1/2", 0.2),
        ("agc, 0.01", "0.001"): ("0.150", 0.15),
        ("agc, 0.01", "0.1"): ("▲▼ lost", 0.0),
    }


def test_a_matrix_colours_what_was_judged_and_signs_what_differs(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "arm": ["as it is", "as it is", "group", "group", "none", "none"],
            "measure": ["lost", "best|of seeds"] * 3,
            "words": ["2 of 8", ".1", "0 of 8", ".2", "8 of 8", "none"],
            "effect": [None, None, 0, 1, -1, None],
        },
        schema_overrides={"effect": pl.Int8},
    )
    chart = figures.technique_matrix(table)
    cells, words = sorted(tables(chart), key=len)
    assert [(row["arm"], row["kind"]) for row in cells] == [
        ("group", "no difference shown"),
        ("group", "better"),
        ("none", "worse"),
    ]
    assert [row["text"] for row in words] == ["2 of 8", ".1", "0 of 8", "▲ .2", "▼ 8 of 8", "none"]
    figures.save(chart, tmp_path / "matrix.svg")
    drawn = (tmp_path / "matrix.svg").read_text()
    assert ">of seeds<" in drawn  # a heading of two lines
    assert "Against as it is;" in drawn


def test_survival_is_a_step_function_by_arm() -> None:
    curves = pl.DataFrame(
        {"arm": ["a", "a", "a", "b", "b"], "step": [0, 20, 100, 0, 100], "share": [1.0, 0.5, 0.5, 1.0, 1.0]}
    )
    chart = figures.survival(curves)
    assert [float(row["percent"]) for row in tables(chart)[0][:3]] == [100, 50, 50]
    assert chart.to_dict()["layer"][0]["mark"]["interpolate"] == "step-after"


def test_stages_are_in_network_order_and_columns_keep_the_largest_norm() -> None:
    names = ["model.10", "model.2", "model.0"]
    norms = [{"step": i, "layer": name, "grad_norm": 1.0} for i in range(0, 6000, 10) for name in names]
    norms[300]["grad_norm"] = 1e6
    norms[301]["grad_norm"] = math.nan
    chart = figures.layer_norms([("a run", pl.DataFrame(norms))])
    (cells,) = tables(chart)
    assert len(cells) <= 3 * figures.LAYER_COLUMNS
    assert max(float(row["grad_norm"]) for row in cells) == 1e6
    assert chart.to_dict()["vconcat"][0]["encoding"]["y"]["sort"] == ["model.0", "model.2", "model.10"]


def test_depth_has_a_panel_per_moment_and_a_line_per_arm_and_says_what_has_no_place(tmp_path: Path) -> None:
    rows = [
        {"arm": f"arm {a}", "moment": moment, "stage": stage, "norm": 10.0 ** (stage - a)}
        for moment in ("start", "end")
        for a in range(9)
        for stage in range(3)
    ]
    rows[0]["norm"], rows[1]["norm"] = 0.0, float("inf")
    chart = figures.depth_profile(pl.DataFrame(rows))
    (cells,) = tables(chart)
    assert len(cells) == 7 * 3 * 2 - 2
    assert {row["arm"] for row in cells} == {f"arm {a}" for a in range(7)}
    drawn = chart.to_dict()
    assert drawn["facet"]["column"]["sort"] == ["start", "end"]
    assert drawn["title"]["subtitle"][1:] == [
        "Left out, being zero or not finite and so without a place on a log axis: 2.",
        "2 further arms are not drawn here; the table has them.",
    ]
    assert figures.save(chart, tmp_path / "x.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(("label", "columns"), [("norm 10", 3), ("norm 10, residual off, seed 1", 2), ("x" * 60, 1)])
def test_a_legend_has_as_many_columns_as_its_names_allow(label: str, columns: int) -> None:
    """Of 760 px in all, at 7 px a letter; Vega itself would let long ones run into each other."""
    rows = [{"arm": f"{label}{a}", "moment": "start", "stage": 0, "norm": 1.0} for a in range(4)]
    legend = figures.depth_profile(pl.DataFrame(rows)).to_dict()["spec"]["layer"][0]["encoding"]["color"]["legend"]
    assert legend["columns"] == columns
    assert legend["columns"] * len(f"{label}0") * 7 < 760


def test_what_theory_expects_over_depth_is_dashed_and_what_is_measured_are_points() -> None:
    rows = [
        {"arm": arm, "moment": "start", "stage": stage, "norm": 1.1**stage, "theory": theory and theory**stage}
        for arm, theory in (("a", 1.2), ("b", None))
        for stage in range(3)
    ]
    drawn = figures.depth_profile(pl.DataFrame(rows), depth="layer").to_dict()
    dashed, points = drawn["spec"]["layer"]
    assert dashed["encoding"]["y"]["field"] == "theory" and dashed["mark"]["strokeDash"]
    assert dashed["transform"] == [{"filter": "datum.theory > 0"}]  # an arm without one has no dashed line
    assert points["encoding"]["y"]["field"] == "norm" and points["mark"]["type"] == "point"
    assert points["encoding"]["x"]["title"] == "layer"
    assert drawn["title"]["subtitle"][1:] == ["Points: measured. Dashed: what theory expects."]


def test_a_range_test_shows_where_it_broke(tmp_path: Path) -> None:
    table = pl.DataFrame({"lr": [1e-4, 1e-3, 1e-2], "loss": [9.0, 8.0, None], "smoothed_loss": [9.0, 8.5, 40.0]})
    chart = figures.lr_range(table, lr_div=0.01, grid=[0.001, 0.01])
    assert "broke at 0.01" in json.dumps(chart.to_dict())
    assert "broke" not in json.dumps(figures.lr_range(table, lr_div=None, grid=[0.001]).to_dict())
    assert figures.save(chart, tmp_path / "x.svg").read_text().startswith("<svg")


def test_a_run_that_diverged_has_a_mark_where_it_did() -> None:
    marked = [row for row in tables(figures.trajectories(steps(lost=0.1)))[0] if row["mark"] == "1"]
    assert [(row["trial"], row["step"]) for row in marked] == [("2", "20"), ("3", "20")]


def test_a_rollback_has_a_mark_of_its_own_at_the_last_point_before_it() -> None:
    shown = steps(lost=0.1).with_columns(loss=pl.when(pl.col("step") == 12).then(math.nan).otherwise(pl.col("loss")))
    rollbacks = pl.DataFrame({"trial": [0, 0, 2], "step": [5, 12, 20]})
    chart = figures.trajectories(shown, rollbacks)
    loss, norm = (
        [(row["trial"], row["step"], row["mark"]) for row in table if row["mark"] != "0"] for table in tables(chart)[:2]
    )
    lost = [("2", "20", "1"), ("3", "20", "1")]  # a run that is lost where it went back last has the mark of that
    assert loss == [("0", "5", "2"), ("0", "11", "2"), *lost]  # there is no point at 12
    assert norm == [("0", "5", "2"), ("0", "12", "2"), *lost]
    assert "where the guard went back" in json.dumps(chart.to_dict())
    assert "where the guard went back" not in json.dumps(figures.trajectories(shown).to_dict())


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
