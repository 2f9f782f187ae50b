"""Markdown and HTML from run and sweep folders; they are only read, so a report can be made anywhere and made again.

Imports neither torch nor ultralytics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import polars as pl
from markupsafe import Markup

from yolo_gradstab import figures
from yolo_gradstab.comparison import DIVERGED, Comparison, NotShown, ReportError, Row, gather
from yolo_gradstab.runs import counted, make_out, replacing
from yolo_gradstab.telemetry import Run

__all__ = ["ReportError", "build_report"]

HEATMAP_ARMS = 4  # from which a grid of cells is read more easily than lines
FORMATS = {"trajectories": "png", "layers": "png"}  # of files; as SVG these are large, the others small and sharp
FOLDED_RUNS = 40  # more rows than these are folded away in the page

# The report ----------------------------------------------------------------------------------------------------------


def build_report(paths: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Write `report.html`, `report.md`, `summary.json` and `trials.csv`; returns the page's path.

    In `summary.json`, `trials` of an arm are those that count: run to their end, or diverged; what was stopped or
    failed for a reason that is not the training's, or goes on, is counted apart. `best` is at the learning rate with
    the highest median over seeds (a run that diverged counts as 0), with the smallest and the largest of its seeds;
    `clipped_share` and `lr_eff` are medians of the runs at that rate; `seconds` are all its runs together,
    `compute_saved` the seconds that ending diverged runs early has spared. What is null has a reason. `findings` are
    those of every run that has any, most important first.

    Args:
        paths: Run folders and sweep folders, mixed.
        out: Folder to write to; the first path by default.

    Raises:
        ReportError: A path is no folder, or none of them holds a run.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not given:
        raise ReportError("no folder given; give run folders or sweep folders")
    comparisons, not_shown = gather(list(dict.fromkeys(given)))
    if not comparisons and not not_shown:
        raise ReportError(f"{given[0]}: no run in it; give run folders or sweep folders")
    folder = Path(out) if out is not None else given[0]
    make_out(folder, ReportError, part="figures")
    _write_summary(folder, comparisons, not_shown)
    _write_trials(folder, comparisons)
    specs = _draw(folder, comparisons)
    script = Markup(figures.javascript_bundle()) if specs else ""
    context = _context(comparisons, not_shown) | {"specs": specs, "script": script}
    _write(folder / "report.md", _markdown().get_template("report.md.j2").render(context))
    _write(folder / "report.html", _html().get_template("report.html.j2").render(context))
    return folder / "report.html"


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_summary(folder: Path, comparisons: list[Comparison], not_shown: list[NotShown]) -> None:
    saved = [comparison.compute_saved_s for comparison in comparisons]
    known = [estimate.value for estimate in saved if estimate.value is not None]
    reasons = "; ".join(dict.fromkeys(estimate.reason for estimate in saved if estimate.reason))
    summary = {
        # Named where there are several; of one, it is that of its folder, whatever that is called.
        "arms": [
            arm | {"comparison": comparison.name if len(comparisons) > 1 else None}
            for comparison in comparisons
            for arm in comparison.arms
        ],
        "comparisons": [
            {"comparison": comparison.name, "sweep": str(comparison.sweep) if comparison.sweep else None, **pair}
            for comparison in comparisons
            for pair in comparison.pairs
        ],
        "compute_saved": sum(known) if known else None,
        "reasons": {"compute_saved": reasons} if reasons else {},
        "not_shown": not_shown,
        "findings": [
            {"path": entry.row.path, "arm": entry.row.arm, "lr0": entry.row.lr0, "findings": entry.findings}
            for comparison in comparisons
            for entry in comparison.entries
            if entry.findings
        ],
    }
    with replacing(folder / "summary.json") as temporary:  # msgspec writes null for what is not finite
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))


def _write_trials(folder: Path, comparisons: list[Comparison]) -> None:
    rows = [msgspec.to_builtins(entry.row) for comparison in comparisons for entry in comparison.entries]
    kinds: dict[Any, Any] = {float: pl.Float64, float | None: pl.Float64, int: pl.Int64, int | None: pl.Int64}
    schema = {field.name: kinds.get(field.type, pl.String) for field in msgspec.structs.fields(Row)}
    with replacing(folder / "trials.csv") as temporary:
        pl.DataFrame(rows, schema=schema).write_csv(temporary)


def _draw(folder: Path, comparisons: list[Comparison]) -> dict[str, Markup]:
    """Save every figure, and return each as JSON for the page, by its file's stem."""
    specs = {}
    for number, comparison in enumerate(comparisons, 1):
        name = comparison.entries[0].row.id if comparison.is_single else comparison.name
        name = name if len(comparisons) == 1 else f"{number}_{name}"
        comparison.stem = re.sub(r"\W+", "_", name).strip("_")[:40]
        for kind, chart in _charts(comparison, figures.FIGURE_POINTS // len(comparisons)).items():
            stem = f"{comparison.stem}_{kind}"
            spec = chart.to_dict()  # once, for the file and for the page: Altair checks it all against its schema
            figures.save(spec, folder / "figures" / f"{stem}.{FORMATS.get(kind, 'svg')}")
            specs[stem] = Markup(figures.embedded(spec))  # escaped there, for a script element
    return specs


def _charts(comparison: Comparison, most_points: int) -> dict[str, Any]:
    """Figures by name, in the order they are shown."""
    charts: dict[str, Any] = {}
    name = comparison.metric_name
    trials = comparison.trials_table()
    if not comparison.is_single and len(trials):
        charts["metric"] = figures.metric_against_lr(trials, name)
        if len(comparison.labels) >= HEATMAP_ARMS:
            cells, rows = comparison.grid_table()
            charts["grid"] = figures.metric_heatmap(cells, name, rows=rows)
        effective = _at_effective_rates(trials)
        if len(effective):
            charts["effective"] = figures.metric_against_lr(effective, name, rate="effective learning rate")
        curves = comparison.survival_table()
        if curves is not None:
            charts["survival"] = figures.survival(curves)
    steps = comparison.steps_table()
    if steps is not None:
        charts["trajectories"] = figures.trajectories(steps, comparison.rollbacks_table(), most_points=most_points)
    depth = comparison.depth_table()
    if depth is not None:
        charts["depth"] = figures.depth_profile(depth)
    if layers := comparison.layer_tables():
        charts["layers"] = figures.layer_norms(layers)
    return charts


def _at_effective_rates(trials: pl.DataFrame) -> pl.DataFrame:
    """Each trial at the median effective rate of its arm and learning rate, so that seeds stay above each other."""
    known = trials.filter(pl.col("lr_eff").is_not_null() & (pl.col("lr_eff") > 0))
    return known.with_columns(lr0=pl.col("lr_eff").median().over("arm", "lr0"))


def _context(comparisons: list[Comparison], not_shown: list[NotShown]) -> dict[str, Any]:
    runs = [entry.run for comparison in comparisons for entry in comparison.entries]
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run.status.versions.items():
            found.setdefault(name, set()).add(version)
    return {
        "comparisons": comparisons,
        "not_shown": not_shown,
        "runs": counted(len(runs), "run"),
        "diverged": DIVERGED,
        "folded_runs": FOLDED_RUNS,
        "has_stock": any(
            label.partition(" + ")[0] == "norm 10" for comparison in comparisons for label in comparison.labels
        ),
        "has_sweep": any(comparison.sweep for comparison in comparisons),
        "versions": {name: ", ".join(sorted(versions)) for name, versions in sorted(found.items())},
        "report_version": metadata.version("yolo-gradstab"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "trained": _dates(runs),
    }


def _dates(runs: list[Run]) -> str:
    """When the runs ended, by the time of their status files."""
    files = [run.folder.gradstab / "status.json" for run in runs]
    times = [file.stat().st_mtime for file in files if file.is_file()]  # one that is being set up has none yet
    days = sorted({datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d") for time in times})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""


# Templates -----------------------------------------------------------------------------------------------------------


def _html() -> jinja2.Environment:
    environment = jinja2.Environment(loader=_loader(), autoescape=True, undefined=jinja2.StrictUndefined, **_BLOCKS)
    environment.filters |= _FILTERS
    return environment


def _markdown() -> jinja2.Environment:
    """Every value is escaped where it is written, as HTML's are: nothing from data can become markup."""
    environment = jinja2.Environment(
        loader=_loader(),
        autoescape=False,
        finalize=_markdown_escaped,
        undefined=jinja2.StrictUndefined,
        **_BLOCKS,
    )
    environment.filters |= _FILTERS
    return environment


_BLOCKS: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}


def _loader() -> jinja2.BaseLoader:
    return jinja2.PackageLoader("yolo_gradstab", "templates")


def _markdown_escaped(value: Any) -> Any:
    """Text that Markdown and GitHub show as it is, on one line.

    Example:
        >>> _markdown_escaped("a|b <i>")
        'a\\\\|b &lt;i&gt;'
    """
    text = re.sub(r"([\\`*|\[\]$~#])", r"\\\1", re.sub(r"\s+", " ", str(value)))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _number(value: float | None, digits: int = 3) -> str:
    """Significant digits, without an exponent where that is short."""
    if value is None:
        return "–"
    if value and math.isfinite(value) and (abs(value) >= 1e5 or abs(value) < 1e-4):
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float | None, decimals: int = 3) -> str:
    return "–" if value is None else f"{value:+.{decimals}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _share(value: float | None) -> str:
    """In percent with two significant digits, for what is rare."""
    return "–" if value is None else f"{_number(100 * value, 2)}%"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_FILTERS: dict[str, Any] = {
    "number": _number,
    "fixed": _fixed,
    "percent": _percent,
    "share": _share,
    "signed": _signed,
    "time": _time,
}
