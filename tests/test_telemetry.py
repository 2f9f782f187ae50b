"""`yolo_gradstab.telemetry` and `.runs`: what is written is what is read, whatever interrupted it."""

import math
import random
import time
from pathlib import Path

import msgspec
import polars as pl
import pytest

from yolo_gradstab.runs import RunError, RunFolder, Status, replacing
from yolo_gradstab.telemetry import LAYER_SCHEMA, STEP_SCHEMA, LayerRecord, PartWriter, StepRecord, read_parts, read_run


def record(step: int, **more: object) -> StepRecord:
    fields = {
        "step": step, "epoch": step // 4, "attempt": 0, "batch": step, "images": 16, "lr": 0.01, "loss": 2.0,
        "losses": {"box": 1.5, "cls": 0.5}, "total_norm": 20.0, "clipped_norm": 10.0, "clip_coef": 0.5,
        "bounded_share": None, "update_ratio_max": None, "nonfinite": 0, "skipped": False, "scale": 1.0, "time_s": 0.1,
    }  # fmt: skip
    return StepRecord(**{**fields, **more})  # type: ignore[arg-type]


def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.create({"clip": {"policy": "norm"}})
    return run


def test_columns_are_the_contracts(tmp_path: Path) -> None:
    run = folder(tmp_path)
    writer = PartWriter(run.steps, STEP_SCHEMA)
    writer.append([record(0).row()])
    writer.flush()
    layers = PartWriter(run.layers, LAYER_SCHEMA)
    layer = LayerRecord(step=0, layer="model.0", grad_norm=1, weight_norm=2, update_ratio=0.1, nonfinite=0)
    layers.append([layer.row()])
    layers.flush()
    run.write_status(Status())
    read = read_run(tmp_path)
    assert " ".join(read.steps.columns) == (
        "step epoch attempt batch images lr loss loss_box loss_cls total_norm clipped_norm clip_coef bounded_share "
        "update_ratio_max nonfinite skipped scale time_s"
    )
    assert read.layers.columns == ["step", "layer", "grad_norm", "weight_norm", "update_ratio", "nonfinite"]
    assert read.steps.row(0, named=True)["bounded_share"] is None
    assert read.config == {"clip": {"policy": "norm"}}
    assert read.status.outcome == "running"


def test_parts_join_into_one_table_without_gap_or_repeat(tmp_path: Path) -> None:
    writer = PartWriter(folder(tmp_path).steps, STEP_SCHEMA)
    for step in range(25):
        extra = {"losses": {"box": 1.0, "cls": 0.5, "late": 0.1}} if step > 20 else {}
        writer.append([record(step, **extra).row()])
        if step % 7 == 6:
            writer.flush()
    writer.flush()
    steps = read_parts(RunFolder(tmp_path).steps, STEP_SCHEMA)
    assert steps["step"].to_list() == list(range(25))
    assert steps["loss_late"].null_count() == 21
    assert steps.schema["bounded_share"] == pl.Float64  # a column of nulls keeps its type


def test_rows_reach_the_disk_within_the_flush_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    writer = PartWriter(folder(tmp_path).steps, STEP_SCHEMA)
    for step in range(10):
        monkeypatch.setattr(time, "monotonic", lambda step=step: now + step)
        writer.append([record(step).row()])
        assert len(read_parts(RunFolder(tmp_path).steps, STEP_SCHEMA)) >= step - PartWriter.FLUSH_S


@pytest.mark.parametrize("killed", [False, True])
def test_small_parts_become_one_and_a_kill_meanwhile_repeats_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """The kill comes after the merged part was renamed into place and before the small ones were removed."""
    run = folder(tmp_path)
    monkeypatch.setattr(PartWriter, "MERGE_ROWS", 20)
    if killed:
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    writer = PartWriter(run.steps, STEP_SCHEMA)
    for step in range(53):
        extra = {"losses": {"box": 1.0, "late": 0.1}} if step > 30 else {}
        writer.append([record(step, **extra).row()])
        if step % 7 == 6:
            writer.flush()
    writer.close()
    if not killed:
        assert sorted(path.stem for path in run.steps.iterdir()) == [
            "000000000-000000020", "000000021-000000041", "000000042-000000052",
        ]  # fmt: skip
    steps = read_run(tmp_path).steps
    assert steps["step"].to_list() == list(range(53))
    assert steps["loss_late"].null_count() == 31
    monkeypatch.undo()
    again = PartWriter(run.steps, STEP_SCHEMA)
    assert again.drop_from(30) == 23
    again.append([record(step).row() for step in range(30, 33)])
    again.close()
    assert read_parts(run.steps, STEP_SCHEMA)["step"].to_list() == list(range(33))


def test_parts_that_are_merged_while_they_are_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path)
    writer = PartWriter(run.steps, STEP_SCHEMA)
    for step in range(3):
        writer.append([record(step).row()])
        writer.flush()
    read = pl.read_parquet

    def late(path: Path) -> pl.DataFrame:
        monkeypatch.setattr(pl, "read_parquet", read)
        writer.close()
        return read(path)

    monkeypatch.setattr(pl, "read_parquet", late)
    assert read_parts(run.steps, STEP_SCHEMA)["step"].to_list() == [0, 1, 2]


def test_half_a_million_steps_fit_into_64_mb(tmp_path: Path) -> None:
    """24 layers, the default cadence, values that do not compress, flushed every ten steps: bytes a step are all."""
    run, draw = folder(tmp_path), random.Random(0).random
    steps, layers = PartWriter(run.steps, STEP_SCHEMA), PartWriter(run.layers, LAYER_SCHEMA)
    names = ("loss", "total_norm", "clip_coef", "time_s")
    for step in range(4000):
        losses = {name: draw() for name in ("box", "cls", "dfl")}
        steps.append([record(step, losses=losses, **{name: draw() for name in names}).row()])
        if step % 10 == 0:
            numbers = ("grad_norm", "weight_norm", "update_ratio")
            layers.append(
                LayerRecord(step=step, layer=f"model.{i}", nonfinite=0, **{name: draw() for name in numbers}).row()
                for i in range(24)
            )
            steps.flush()
            layers.flush()
    steps.close()
    layers.close()
    size = sum(path.stat().st_size for path in run.gradstab.rglob("*.parquet"))
    assert 500_000 * size / 4000 < 64e6


def test_a_resumed_run_drops_what_it_will_repeat(tmp_path: Path) -> None:
    run = folder(tmp_path)
    writer = PartWriter(run.steps, STEP_SCHEMA)
    for step in range(10):
        writer.append([record(step).row()])
        if step in {3, 7}:
            writer.flush()
    writer.flush()
    for step in (2, 8):
        run.append_event({"event": "skip", "step": step})
    again = PartWriter(run.steps, STEP_SCHEMA)
    assert again.drop_from(6) == 4
    run.drop_events_from(6)
    again.append([record(step).row() for step in range(6, 9)])
    again.flush()
    assert read_run(tmp_path).steps["step"].to_list() == list(range(9))
    assert [event["step"] for event in run.read_events()] == [2]
    assert again.drop_from(0) == 9
    assert len(read_parts(run.steps, STEP_SCHEMA)) == 0


def test_half_written_parts_and_lines_are_not_read(tmp_path: Path) -> None:
    run = folder(tmp_path)
    writer = PartWriter(run.steps, STEP_SCHEMA)
    writer.append([record(0).row()])
    writer.flush()
    (run.steps / ".000000001.parquet.xyz.tmp").write_bytes(b"PAR1 half")
    run.append_event({"event": "skip", "step": 0, "total_norm": math.nan})
    with run.events.open("ab") as file:
        file.write(b'{"event": "ski')
    assert len(read_run(tmp_path).steps) == 1
    assert run.read_events() == [{"event": "skip", "step": 0, "total_norm": None}]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half-way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_status_is_strict_json(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.write_status(Status(outcome="failed", reason="x", metrics={"a": math.nan}))
    text = (run.gradstab / "status.json").read_text()
    assert "NaN" not in text
    assert msgspec.json.decode(text)["metrics"] == {"a": None}
    assert run.read_status().outcome == "failed"


def test_final_metrics_are_the_last_epochs_and_the_key_points_before_the_boxes(tmp_path: Path) -> None:
    def found(csv: str, **metrics: float) -> tuple[float | None, float | None]:
        run = folder(tmp_path)
        run.write_status(Status(metrics=metrics))
        (tmp_path / "results.csv").write_text(csv)
        return read_run(tmp_path).map50, read_run(tmp_path).metric

    names = "epoch, metrics/mAP50(B),metrics/mAP50-95(B),metrics/mAP50(P),metrics/mAP50-95(P)"
    best = {"metrics/mAP50(B)": 0.99, "metrics/mAP50-95(B)": 0.95}  # the host's last metrics are the best epoch's
    assert found(f"{names}\n1,.9,.8,.7,.6\n2,.5,.4,.3,.2\n", **best) == (0.3, 0.2)
    assert found("metrics/mAP50(B),metrics/mAP50-95(B)\n.9,.8\nnan,inf\n", **best) == (None, None)
    assert found("metrics/mAP50-95(B)\n.8\n", **best) == (0.8, 0.8)  # smaller than the one that was not recorded
    assert found("epoch\n", **best) == (0.99, 0.95)
    assert found("epoch\n") == (None, None)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no gradstab folder in it, so not a run of yolo-gradstab"):
        read_run(tmp_path)
    run = folder(tmp_path)
    assert len(read_run(tmp_path).steps) == 0
    with pytest.raises(RunError, match=r"no gradstab/status\.json"):
        run.read_status()
    (run.gradstab / "status.json").write_text('{"outcome": "fine"}')
    with pytest.raises(RunError, match=r"status\.json: Invalid enum value 'fine'"):
        run.read_status()


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    run = folder(tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert (run.gradstab / "config.yaml").stat().st_mode == plain.stat().st_mode
