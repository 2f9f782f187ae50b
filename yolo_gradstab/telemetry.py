"""Records of training: a row per optimizer step, a row per recorded layer, as Parquet parts.

| table  | column             | meaning                                                                             |
|--------|--------------------|-------------------------------------------------------------------------------------|
| steps  | step               | optimizer steps before this one, over all resumed parts of the run                  |
|        | epoch, batch       | the host's, counted from 0: `batch` is the last micro-batch that went into the step |
|        | attempt            | how often the host had restarted an epoch by then                                   |
|        | images             | images whose gradients were summed into the step                                    |
|        | lr                 | learning rate of the largest parameter group                                        |
|        | loss               | what was differentiated, per image, or the batch's mean where the host takes that   |
|        |                    | (classify, RT-DETR); `loss_<component>` its parts as the host logs them             |
|        | total_norm         | L2 norm of the unscaled gradient before clipping, `clipped_norm` after              |
|        | clip_coef          | clipped_norm / total_norm; 1 where nothing was clipped                              |
|        | bounded_share      | share of tensors whose update `update_clip` cut; null where it is off               |
|        | update_ratio_max   | largest ||dW||/||W|| of a tensor before that bound; null where it was not measured  |
|        | nonfinite          | gradient tensors holding NaN or inf                                                 |
|        | skipped            | the step was not applied                                                            |
|        | scale              | of the fp16 gradient scaler; 1 without one                                          |
|        | time_s             | seconds since training began, resumed parts continuing                              |
| layers | step, layer        | the stage `model.<index>`                                                           |
|        | grad_norm          | of the stage, before clipping                                                       |
|        | weight_norm        | of the stage, before the step                                                       |
|        | update_ratio       | norm of the stage's update, as applied, over weight_norm                            |
|        | nonfinite          | gradient tensors of the stage holding NaN or inf                                    |

Imports neither torch nor ultralytics: a report is built from these files anywhere.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import polars as pl

from yolo_gradstab.runs import RunError, RunFolder, Status, one_line, replacing

if TYPE_CHECKING:
    from yolo_gradstab.diagnosis import Finding

__all__ = [
    "LAYER_SCHEMA", "MAP50", "QUALITY", "STEP_SCHEMA", "LayerRecord", "PartWriter", "Run", "StepRecord", "lasting",
    "read_parts", "read_run",
]  # fmt: skip

# What a run is judged by, as the host names it and as a reader calls it; the first that there is: a pose run also has
# the boxes', a segmentation too. What has no mAP has no value of its own at which nothing has been learned.
QUALITY = {
    "metrics/mAP50-95(P)": "pose mAP50-95",
    "metrics/mAP50-95(M)": "mask mAP50-95",
    "metrics/mAP50-95(B)": "mAP50-95",
    "metrics/accuracy_top1": "top-1 accuracy",
    "metrics/mIoU": "mIoU",
    "metrics/delta1": "delta1",
}
MAP50 = ("metrics/mAP50(P)", "metrics/mAP50(M)", "metrics/mAP50(B)")


class StepRecord(msgspec.Struct, kw_only=True):
    """One optimizer step; `losses` becomes one column per component."""

    step: int
    epoch: int
    attempt: int
    batch: int
    images: int
    lr: float
    loss: float
    losses: dict[str, float]
    total_norm: float
    clipped_norm: float
    clip_coef: float
    bounded_share: float | None
    update_ratio_max: float | None
    nonfinite: int
    skipped: bool
    scale: float
    time_s: float

    def row(self) -> dict[str, Any]:
        """Flat, in the order of the columns."""
        row: dict[str, Any] = {}
        for name in self.__struct_fields__:
            row |= {f"loss_{k}": v for k, v in self.losses.items()} if name == "losses" else {name: getattr(self, name)}
        return row


class LayerRecord(msgspec.Struct, kw_only=True):
    """One layer at one recorded step."""

    step: int
    layer: str
    grad_norm: float
    weight_norm: float
    update_ratio: float
    nonfinite: int

    def row(self) -> dict[str, Any]:
        """Flat."""
        return msgspec.structs.asdict(self)


_TYPES = {"int": pl.Int64, "float": pl.Float64, "float | None": pl.Float64, "bool": pl.Boolean, "str": pl.String}


def _schema(record: type[msgspec.Struct]) -> dict[str, type[pl.DataType]]:
    return {name: _TYPES[kind] for name, kind in record.__annotations__.items() if kind in _TYPES}


STEP_SCHEMA = _schema(StepRecord)
LAYER_SCHEMA = _schema(LayerRecord)


_PART = re.compile(r"(\d+)-(\d+)")  # first and last step, of a part's name


class PartWriter:
    """Append rows to a folder of Parquet parts, each written under a temporary name and renamed.

    A part is written every `FLUSH_S` seconds at the latest in which rows arrive, so a kill loses less than that;
    the caller flushes before it stops adding rows for a while (validation). Parts are named by the first and last
    step they hold.

    A part of a few rows is mostly Parquet's own footer, so small parts are replaced by one of `MERGE_ROWS` rows when
    they hold that many. A kill between its rename and their removal leaves both; `read_parts` reads such rows once.

    Args:
        folder: Where the parts go; must exist.
        schema: Column types; further columns (loss components) are float64.
    """

    FLUSH_S = 2.0
    MERGE_ROWS = 2000

    def __init__(self, folder: Path, schema: dict[str, type[pl.DataType]]) -> None:
        self._folder = folder
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._small: dict[Path, pl.DataFrame] = {}  # parts that are still to be merged
        self._flushed_s = time.monotonic()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; may write a part."""
        self._rows.extend(rows)
        if time.monotonic() - self._flushed_s > self.FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what has arrived since the last part."""
        self._flushed_s = time.monotonic()
        if not self._rows:
            return
        new = pl.DataFrame(self._rows, schema=_row_schema(self._rows, self._schema))
        if len(new) + sum(len(part) for part in self._small.values()) >= self.MERGE_ROWS:
            self._merge([*self._small.values(), new])
        else:
            self._small[self._write(new)] = new
        self._rows = []

    def close(self) -> None:
        """Write the last rows, and merge what is left of small parts."""
        self.flush()
        if len(self._small) > 1:
            self._merge(list(self._small.values()))

    def drop_from(self, step: int) -> int:
        """Remove the rows of this step and later ones (a resumed run repeats them); returns how many there were.

        Raises:
            RunError: A part is damaged.
        """
        self._small = {}  # which are others now
        paths = _part_paths(self._folder)
        for path in set(self._folder.glob("*.parquet")) - set(paths):
            path.unlink()
        dropped = 0
        for path in reversed(paths):
            part = _read_part(path)
            keep = part.filter(pl.col("step") < step)
            dropped += len(part) - len(keep)
            if len(keep) < len(part):
                if len(keep):  # first: a kill in between leaves both, and the longer one is read
                    self._write(keep)
                path.unlink()
        return dropped

    def _merge(self, parts: list[pl.DataFrame]) -> None:
        merged = self._write(pl.concat(parts, how="diagonal_relaxed"))
        for path in self._small:
            if path != merged:
                path.unlink(missing_ok=True)
        self._small = {}

    def _write(self, part: pl.DataFrame) -> Path:
        steps = part["step"].to_list()
        path = self._folder / f"{min(steps):09d}-{max(steps):09d}.parquet"
        with replacing(path) as temporary:
            part.write_parquet(temporary, compression="zstd")
        return path


def _row_schema(rows: list[dict[str, Any]], schema: dict[str, type[pl.DataType]]) -> dict[str, type[pl.DataType]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: schema.get(name, pl.Float64) for name in names}


def read_parts(folder: Path, schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    """All rows of a folder of parts, by step; an empty table with the schema's columns when there is none.

    Raises:
        RunError: A part is damaged; the message names it.
    """
    try:
        parts = [_read_part(path) for path in _part_paths(folder)]
    except FileNotFoundError:  # merged since they were listed, which does not happen again within a moment
        parts = [_read_part(path) for path in _part_paths(folder)]
    if not parts:
        return pl.DataFrame(schema=schema)
    return pl.concat(parts, how="diagonal_relaxed").sort("step", maintain_order=True)


def _read_part(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)  # its name may hold [ or *
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # a panic is no `Exception`
        raise RunError(f"{path}: {one_line(error)}") from None


def _part_paths(folder: Path) -> list[Path]:
    """Parts in order of their first step, without small ones whose steps a merged one holds."""
    spans = {path: _PART.fullmatch(path.stem) for path in folder.glob("*.parquet")}
    paths = sorted(path for path, span in spans.items() if span is None)  # by another hand
    reached = -1
    for path, _, last in sorted(
        ((path, int(span[1]), int(span[2])) for path, span in spans.items() if span),
        key=lambda part: (part[1], -part[2]),
    ):
        if last > reached:
            paths.append(path)
            reached = last
    return paths


def _next_step(folder: Path) -> int:
    """After the last step in a folder of parts, by their names."""
    spans = [_PART.fullmatch(path.stem) for path in folder.glob("*.parquet")]
    return max((int(span[2]) + 1 for span in spans if span), default=0)


class Run:
    """A run folder, read when asked for; works while the run goes on and after any kind of end."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(path)

    @cached_property
    def status(self) -> Status:
        """How it stands or ended.

        A run that says it is running, but whose process is gone, was interrupted: killed, or with its machine.
        """
        status = self.folder.read_status()
        if status.outcome == "running" and self.folder.is_left():
            status = self.folder.read_status()  # it may have come to its end just now
            if status.outcome == "running":
                last = self.folder.checkpoint()
                advice = f"; continue with resume={last}" if last else ""
                status.outcome, status.reason = "interrupted", f"its process is gone: killed, or lost{advice}"
                status.step = max(status.step, _next_step(self.folder.steps))
        return status

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as used."""
        return self.folder.read_config()

    @cached_property
    def steps(self) -> pl.DataFrame:
        """A row per optimizer step."""
        return read_parts(self.folder.steps, STEP_SCHEMA)

    @cached_property
    def made(self) -> pl.DataFrame:
        """The steps that moved the weights to where they are: neither skipped nor taken back."""
        return made(self.steps, self.events)

    @cached_property
    def layers(self) -> pl.DataFrame:
        """A row per recorded step and layer."""
        return read_parts(self.folder.layers, LAYER_SCHEMA)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What happened beside the ordinary: skips, stops."""
        return self.folder.read_events()

    def diagnose(self) -> list[Finding]:
        """What went wrong, in words, the root cause first (`yolo_gradstab.diagnosis`)."""
        from yolo_gradstab import diagnosis  # which reads these tables, so it cannot be imported above

        return diagnosis.diagnose(diagnosis.records_of(self))

    @cached_property
    def args(self) -> dict[str, Any]:
        """The host's arguments as the run was started, with what `optimizer=auto` came to; empty without them."""
        args = self.folder.read_args()
        if args.get("optimizer") == "auto":
            for event in self.events:
                if event.get("event") == "optimizer":
                    args |= {key: event[key] for key in ("optimizer", "lr0") if key in event}
        return args

    @cached_property
    def results(self) -> pl.DataFrame:
        """The host's `results.csv`, a row per epoch; empty when there is none yet."""
        path = self.folder.path / "results.csv"
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a full disk leaves half a row, or an empty file
        if not whole:
            return pl.DataFrame()
        try:
            table = pl.read_csv(whole, infer_schema_length=None)
        except pl.exceptions.PolarsError as error:
            raise RunError(f"{path}: {one_line(error)}") from None
        return table.rename({name: name.strip() for name in table.columns})

    @cached_property
    def metric(self) -> float | None:
        """The first of `QUALITY` after the last epoch, see `final`."""
        return self.final(list(QUALITY))

    @property
    def metric_name(self) -> str | None:
        """What `metric` is, as a reader calls it; null where the run was never validated."""
        known = {*self.results.columns, *self.status.metrics}
        return next((label for name, label in QUALITY.items() if name in known), None)

    @cached_property
    def map50(self) -> float | None:
        """mAP50 after the last epoch, see `final`; mAP50-95, which is smaller, where only that was recorded.

        Null for what has neither: classify, semantic and depth.
        """
        return self.final([*MAP50, *(name for name in QUALITY if "mAP50-95" in name)])

    def final(self, names: Sequence[str]) -> float | None:
        """After the last epoch, the first of these metrics that there is; null where it is not finite.

        Not of the best epoch, which the host validates at the end: that would hide a collapse. Taken from
        `results.csv`, or from the status where there is none.
        """
        for name in names:
            if name in self.results.columns and self.results.height:
                value = self.results[name].cast(pl.Float64, strict=False)[-1]
                return value if value is not None and math.isfinite(value) else None
        return next((self.status.metrics[name] for name in names if name in self.status.metrics), None)


def lasting(table: pl.DataFrame, events: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Steps or layers without those that a rollback took back, by these events: the run did not come from them."""
    for event in events:
        step, to_step = event.get("step"), event.get("to_step")
        if event.get("event") == "rollback" and isinstance(step, int) and isinstance(to_step, int):
            table = table.filter(~pl.col("step").is_between(to_step, step))
    return table


def made(steps: pl.DataFrame, events: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Of the steps that last, those that moved the weights."""
    return lasting(steps, events).filter(~pl.col("skipped").fill_null(False))


def read_run(path: str | Path) -> Run:
    """Open a run folder.

    Raises:
        RunError: There is no run at this path.
    """
    run = Run(path)
    if not run.folder.gradstab.is_dir():
        what = (
            "no gradstab folder in it, so not a run of yolo-gradstab" if run.folder.path.is_dir() else "no such folder"
        )
        raise RunError(f"{path}: {what}; give a run's folder, which training prints at its end")
    return run
