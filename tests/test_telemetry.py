"""`yolo_gradstab.telemetry` and `.runs`: what is written is what is read, whatever interrupted it."""

import errno
import io
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
import yaml

from yolo_gradstab.runs import RunError, RunFolder, Status, replacing, terminable, uninterrupted
from yolo_gradstab.telemetry import (
    LAYER_SCHEMA,
    STEP_SCHEMA,
    LayerRecord,
    PartWriter,
    Run,
    StepRecord,
    read_parts,
    read_run,
)


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

    def late(path: Path, **options: bool) -> pl.DataFrame:
        monkeypatch.setattr(pl, "read_parquet", read)
        writer.close()
        return read(path, **options)

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
    run.drop_from(6)
    again.append([record(step).row() for step in range(6, 9)])
    again.flush()
    assert read_run(tmp_path).steps["step"].to_list() == list(range(9))
    assert [event["step"] for event in run.read_events()] == [2]
    assert again.drop_from(0) == 9
    assert len(read_parts(run.steps, STEP_SCHEMA)) == 0


def test_a_resumed_run_keeps_the_model_and_data_it_began_with(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.keep_args()  # of a folder without records there is nothing to keep
    assert read_args(run, model="a.yaml", data="my.yaml", batch=16) == ("a.yaml", "my.yaml", 16)
    run.create({})
    for batch in (8, 4):  # twice: the second must not keep what the first wrote
        run.keep_args()
        assert read_args(run, model="last.pt", data="gradstab/data.yaml", batch=batch) == ("a.yaml", "my.yaml", batch)
    run.tidy(new=True)
    assert read_args(run, model="b.yaml", data="other.yaml", batch=2) == ("b.yaml", "other.yaml", 2)


def read_args(folder: RunFolder, **written: Any) -> tuple[Any, ...]:
    (folder.path / "args.yaml").write_text(yaml.safe_dump(written))
    return tuple(Run(folder.path).args[key] for key in written)


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
    assert found(f"{names}\n1,.9,.8,.7,.6\n2,.5", **best) == (0.7, 0.6)  # a full disk took half a row
    assert found("", **best) == (0.99, 0.95)
    assert found("epoch\n", **best) == (0.99, 0.95)
    assert found("epoch\n") == (None, None)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no gradstab folder in it, so not a run of yolo-gradstab; give a run's folder"):
        read_run(tmp_path)
    run = folder(tmp_path)
    assert len(read_run(tmp_path).steps) == 0
    with pytest.raises(RunError, match=r"no gradstab/status\.json"):
        run.read_status()
    (run.gradstab / "status.json").write_text('{"outcome": "fine"}')
    with pytest.raises(RunError, match=r"status\.json: Invalid enum value 'fine'"):
        run.read_status()


HOLDER = """
import sys, time
from yolo_gradstab.runs import RunFolder, Status
run = RunFolder(sys.argv[1])
run.hold()
run.tidy(new=True)
run.create({})
print("held", flush=True)
run.write_status(Status(step=2))
time.sleep(60)
"""


def test_a_folder_has_one_writer_and_a_killed_one_was_interrupted(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        run = RunFolder(tmp_path)
        assert read_run(tmp_path).status.outcome == "running"
        with pytest.raises(RunError, match="another process is training into this folder; wait for it, or give anoth"):
            run.hold()
        holder.kill()
    PartWriter(run.steps, STEP_SCHEMA)._write(pl.DataFrame([record(step).row() for step in range(5)]))
    status = read_run(tmp_path).status
    assert (status.outcome, status.step, status.reason) == (
        "interrupted", 5, "its process is gone: killed, or lost",
    )  # fmt: skip
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/last.pt").touch()
    assert (read_run(tmp_path).status.reason or "").endswith(f"; continue with resume={tmp_path}/weights/last.pt")
    os.utime(tmp_path / "weights/last.pt", (1, 1))  # of a run that was here before
    assert (read_run(tmp_path).status.reason or "").endswith(": killed, or lost")
    run.hold()  # its lock has ended with it
    run.hold()
    try:
        assert read_run(tmp_path).status.outcome == "running"
    finally:
        run.release()
    run.release()
    (run.gradstab / "status.json").unlink()
    assert read_run(tmp_path).status.outcome == "interrupted"  # within set-up


FORKER = """
import multiprocessing, sys, time
from yolo_gradstab.runs import RunFolder, Status
run = RunFolder(sys.argv[1])
run.hold()
run.create({})
run.write_status(Status(step=2))
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
worker.start()
print(worker.pid, flush=True)
input()
run.release()
run.hold()
print("held", flush=True)
time.sleep(60)
"""


def test_forked_workers_do_not_hold_the_folder(tmp_path: Path) -> None:
    """A loader's workers outlive the training that failed, as its trainer does, and for seconds one that was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        worker = int(parent.stdout.readline())
        try:
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            assert parent.stdout.readline() == b"held\n"  # with the worker still there
            assert not RunFolder(tmp_path).is_left()
            parent.kill()
            parent.wait()
            os.kill(worker, 0)  # it is still there
            assert RunFolder(tmp_path).is_left()
            assert read_run(tmp_path).status.outcome == "interrupted"
        finally:
            os.kill(worker, signal.SIGKILL)


def test_what_is_made_again_is_dropped(tmp_path: Path) -> None:
    run = folder(tmp_path)
    for event, step in (("skip", 2), ("warning", 3), ("skip", 4)):
        run.append_event({"event": event, "step": step})
    num_events = run.num_events()
    run.append_event({"event": "warning", "step": 4})  # of the step before, shown by the next
    run.append_event({"event": "skip", "step": 5})
    for name in ("2", "5", "notes"):
        (run.gradstab / "incidents" / name).mkdir(parents=True)
    run.drop_from(5, num_events=num_events)
    assert [(event["event"], event["step"]) for event in run.read_events()] == [
        ("skip", 2),
        ("warning", 3),
        ("skip", 4),
    ]
    assert sorted(path.name for path in (run.gradstab / "incidents").iterdir()) == ["2", "notes"]
    run.drop_from(0)
    assert run.read_events() == []


def test_storage_without_locks_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    run = folder(tmp_path)
    run.write_status(Status())
    with monkeypatch.context() as patch:
        patch.setattr("yolo_gradstab.runs.fcntl.flock", none)
        run.hold()
        assert not run.is_left()
    assert not run.is_left()  # for a machine that can lock either
    assert read_run(tmp_path).status.outcome == "running"  # nobody can say


def test_a_run_begins_without_what_killed_ones_left(tmp_path: Path) -> None:
    run = folder(tmp_path)
    (tmp_path / "weights").mkdir()
    names = ("weights/.last.pt.0.tmp", "gradstab/steps/.0-1.parquet.0.tmp", "gradstab/.status.json.0.tmp")
    for name in names:
        (tmp_path / name).touch()
    for name in (".7.0.tmp", ".7.0.old"):
        (run.gradstab / "incidents" / name).mkdir(parents=True)
    run.append_event({"event": "skip", "step": 3})
    run.tidy(new=False)
    assert [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.old")] == []
    assert len(run.read_events()) == 1
    run.tidy(new=True)
    assert list(run.gradstab.iterdir()) == []
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "7").mkdir(parents=True)
    (run.gradstab / "incidents").symlink_to(elsewhere)
    run.tidy(new=True)
    assert list(run.gradstab.iterdir()) == []
    assert (elsewhere / "7").is_dir()


def test_a_resume_names_a_part_that_is_damaged(tmp_path: Path) -> None:
    run = folder(tmp_path)
    writer = PartWriter(run.steps, STEP_SCHEMA)
    writer.append([record(step).row() for step in range(10)])
    writer.close()
    (part,) = run.steps.glob("*.parquet")
    part.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(RunError, match=f"^{part}: "):
        PartWriter(run.steps, STEP_SCHEMA).drop_from(5)


def test_rows_that_are_kept_are_never_on_the_disk_less_than_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run is killed while it drops what it makes again: between the removal of a part and its new one."""
    run = folder(tmp_path)
    writer = PartWriter(run.steps, STEP_SCHEMA)
    writer.append([record(step).row() for step in range(10)])
    writer.close()

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for method in ("write_parquet", "unlink"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pl.DataFrame if method == "write_parquet" else Path, method, killed)
            PartWriter(run.steps, STEP_SCHEMA).drop_from(6)
        assert read_run(tmp_path).steps["step"].to_list()[:6] == list(range(6))
    assert PartWriter(run.steps, STEP_SCHEMA).drop_from(6) == 4
    assert read_run(tmp_path).steps["step"].to_list() == list(range(6))


def test_half_an_event_is_taken_back_and_one_left_by_a_kill_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path)
    run.append_event({"event": "skip", "step": 1})
    with monkeypatch.context() as patch:

        class Full(io.FileIO):
            def write(self, data: object) -> int:
                return super().write(bytes(memoryview(data)[:5]))  # type: ignore[arg-type]

        patch.setattr(Path, "open", lambda path, *args, **kwargs: Full(path, "a"))
        with pytest.raises(OSError, match=r"No space left on device: .*events\.jsonl"):
            run.append_event({"event": "skip", "step": 2})
    run.append_event({"event": "skip", "step": 3})
    assert [event["step"] for event in run.read_events()] == [1, 3]
    with run.events.open("a") as file:
        file.write('{"event": "sk')
    run.drop_from(2)
    run.append_event({"event": "skip", "step": 2})
    assert [event["step"] for event in run.read_events()] == [1, 2]


def test_rows_of_epochs_that_are_made_again_leave_the_hosts_table(tmp_path: Path) -> None:
    run = folder(tmp_path)
    path = tmp_path / "results.csv"
    run.drop_results_after(1)
    assert not path.exists()
    path.write_text("epoch,time\n1,0.5\n2,0.7\n1")
    run.drop_results_after(2)
    assert path.read_text() == "epoch,time\n1,0.5\n2,0.7\n"
    run.drop_results_after(1)
    assert path.read_text() == "epoch,time\n1,0.5\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_what_is_written_is_whole(number: signal.Signals) -> None:
    done = []
    before = signal.getsignal(number)
    with pytest.raises((KeyboardInterrupt, SystemExit)), terminable():
        with uninterrupted(), uninterrupted():
            signal.raise_signal(number)
            done.append("within")
        done.append("after")
    assert done == ["within"]
    assert signal.getsignal(number) is before


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: .*status\.json"), replacing(tmp_path / "status.json"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    run = folder(tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert (run.gradstab / "config.yaml").stat().st_mode == plain.stat().st_mode


def test_a_run_whose_name_is_a_pattern_is_read_and_resumed_as_itself(tmp_path: Path) -> None:
    for name, first in (("exp1", 100), ("exp2", 200), ("exp[12]", 300)):
        run = RunFolder(tmp_path / name)
        run.create({})
        writer = PartWriter(run.steps, STEP_SCHEMA)
        writer.append(record(first + i).row() for i in range(3))
        writer.flush()
    assert read_run(tmp_path / "exp[12]").steps["step"].to_list() == [300, 301, 302]
    assert PartWriter(RunFolder(tmp_path / "exp[12]").steps, STEP_SCHEMA).drop_from(301) == 2
    assert read_run(tmp_path / "exp[12]").steps["step"].to_list() == [300]


def test_damaged_text_names_its_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create({})
    (tmp_path / "results.csv").write_text("epoch,a\n1,2\n2,3,4\n")
    with pytest.raises(RunError, match=r"results\.csv: "):
        _ = read_run(tmp_path).results
    (tmp_path / "gradstab" / "status.json").write_bytes(b'{"outcome": "\xff"}')
    with pytest.raises(RunError, match=r"status\.json: "):
        _ = read_run(tmp_path).status
    (tmp_path / "args.yaml").write_text("name: 2024-30-12\n")
    with pytest.raises(RunError, match=r"args\.yaml: not valid YAML: month must be in 1\.\.12"):
        _ = read_run(tmp_path).args
