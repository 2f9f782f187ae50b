"""Every step's norms in the trackers that Ultralytics logs to, where a tracker has an axis for them.

The epoch's columns (`grad/norm_p50` and the others) are among the host's metrics, which every tracker of its own gets
with no help from here. Steps are sent at the end of each epoch, as `step/total_norm` and so on:

| tracker          | each step's numbers                                                                       |
|------------------|-------------------------------------------------------------------------------------------|
| TensorBoard      | scalars at the optimizer step                                                             |
| MLflow           | metrics at the optimizer step, in batches                                                 |
| Weights & Biases | history rows, against `step/optimizer_step`                                               |
| Comet, ClearML   | metrics at the optimizer step                                                             |
| DVCLive, Ray     | none: their one axis is the epoch                                                         |

A tracker is used where the host's own callback is at work in this run, and through the object that the callback made;
none is imported or started here. One that fails is said once and left alone: it must not end a training run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from yolo_gradstab.runs import one_line

__all__ = ["COLUMNS", "Trackers"]

COLUMNS = ("total_norm", "clipped_norm", "clip_coef", "bounded_share", "loss", "lr")  # of a step, as `telemetry` has it
HOST = "ultralytics.utils.callbacks"  # where each tracker has a module
MLFLOW_BATCH = 1000  # metrics that a server takes at once

Rows = Sequence[Mapping[str, Any]]


class Trackers:
    """The trackers at work in one run.

    Args:
        callbacks: The host's, of a trainer: event -> functions.
    """

    def __init__(self, callbacks: Mapping[str, Sequence[Callable[..., Any]]]) -> None:
        at_work = {function.__module__ for function in callbacks.get("on_fit_epoch_end", ())}
        self._senders = {name: send for name, send in _SENDERS.items() if f"{HOST}.{name}" in at_work}

    def log_steps(self, rows: Rows) -> list[str]:
        """Send steps, each with `step` and the columns that it has; returns what failed, a line each."""
        rows = [
            {"step": row["step"]} | {f"step/{name}": float(row[name]) for name in COLUMNS if row.get(name) is not None}
            for row in rows
        ]
        failed = []
        for name, send in list(self._senders.items()) if rows else ():
            try:
                send(rows)
            except Exception as error:  # whatever a tracker raises, a full disk or a lost connection
                del self._senders[name]
                failed.append(f"{name}: steps are not logged to it any more ({one_line(error)})")
        return failed


def _tensorboard(rows: Rows) -> None:
    writer: Any = getattr(sys.modules[f"{HOST}.tensorboard"], "WRITER", None)
    for row in rows if writer else ():
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])


def _mlflow(rows: Rows) -> None:
    mlflow = sys.modules["mlflow"]
    run = mlflow.active_run()
    if run is None:
        return
    now_ms = int(1000 * time.time())
    metrics = [
        mlflow.entities.Metric(name, value, now_ms, row["step"])
        for row in rows
        for name, value in row.items()
        if name != "step"
    ]
    client = mlflow.MlflowClient()
    for start in range(0, len(metrics), MLFLOW_BATCH):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + MLFLOW_BATCH])


def _wandb(rows: Rows) -> None:
    run = sys.modules["wandb"].run
    if run is None:
        return
    run.define_metric("step/*", step_metric="step/optimizer_step")
    for row in rows:
        numbers = {name: value for name, value in row.items() if name != "step"}
        run.log({**numbers, "step/optimizer_step": row["step"]})


def _comet(rows: Rows) -> None:
    experiment = sys.modules["comet_ml"].get_running_experiment()
    for row in rows if experiment else ():
        experiment.log_metrics({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def _clearml(rows: Rows) -> None:
    task = sys.modules["clearml"].Task.current_task()
    for row in rows if task else ():
        for name, value in row.items():
            if name != "step":
                task.get_logger().report_scalar("step", name.removeprefix("step/"), value, iteration=row["step"])


# By the name of the host's callback module.
_SENDERS: dict[str, Callable[[Rows], None]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wb": _wandb,
    "comet": _comet,
    "clearml": _clearml,
}
