"""Run the sweeps of this folder inside a time limit and keep what is done: what `make gpu` starts.

    python configs/gpu/run.py out=gpu-out time_limit_s=540 [wheels=DIR] [seeds=3] [jobs=4]
                              [specs=bccd_detect,drawn_pose] [pose_images=768] [train.epochs=1 ...]

Self-contained: it needs the project's files and, offline, a folder of wheels. Any further word goes to every sweep: a
dry run on a CPU is `train.device=cpu train.amp=false train.epochs=1`.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CLOSING_S = 30.0  # of the limit, for interrupted trials to write their records and for the results to be gathered

# The sweep without the report at its end, which would need the packages that draw charts.
SWEEP = """
import sys
from yolo_gradstab.sweep import read_spec, run_sweep
run_sweep(read_spec(sys.argv[1], sys.argv[3:]), sys.argv[2], say=lambda line: print(line, flush=True))
"""


def main() -> int:
    """Run, gather, say where."""
    options = {"out": "gpu-out", "time_limit_s": "540", "wheels": "", "seeds": "3", "jobs": "4"}
    options |= {"specs": "bccd_detect,drawn_pose", "pose_images": "768"}
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    passed = [f"{key}={value}" for key, value in given.items() if key not in options]
    options |= {key: value for key, value in given.items() if key in options}
    started_s = time.monotonic()
    deadline_s = started_s + float(options["time_limit_s"]) - CLOSING_S
    out = Path(options["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options["wheels"]:
        install(Path(options["wheels"]), out / "packages")
    sys.path[:0] = [str(ROOT), str(out / "packages")]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
    for seed in range(int(options["seeds"])):
        for name in options["specs"].split(","):
            if time.monotonic() < deadline_s:
                words = [
                    f"train.data={data_of(name, out, int(options['pose_images']))}",
                    f"seeds=[{seed}]",
                    f"jobs={options['jobs']}",
                    *passed,
                ]
                sweep(name, out / name, words, deadline_s)
                gather(out, options, started_s)
    print(f"Results: {out / 'trials.json'}, steps.parquet, layers.parquet, machine.json")
    return 0


def install(wheels: Path, target: Path) -> None:
    """Unpack wheels beside the machine's own packages, without looking for their dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True)


def data_of(name: str, out: Path, pose_images: int) -> Path:
    """The data YAML of a sweep, with absolute paths, for trials run from anywhere."""
    if name == "drawn_pose":
        from yolo_gradstab.coco.sample import draw_sample

        return draw_sample(out / "data" / name, task="pose", images=pose_images, size=192)
    folder = Path(os.environ.get("GRADSTAB_DATA", ROOT.parent / "shared" / "data")) / "bccd"
    if not folder.is_dir():
        sys.exit(f"{folder} does not exist; set GRADSTAB_DATA to the folder that holds bccd")
    path = out / "data" / "bccd.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = "".join(f"{split}: annotations/instances_{split}.json\n" for split in ("train", "val"))
    path.write_text(f"path: {folder.resolve()}\n{splits}images: images\n", encoding="utf-8")
    return path


def sweep(name: str, folder: Path, words: list[str], deadline_s: float) -> None:
    """Run or continue one sweep until it is done or the time is up."""
    process = subprocess.Popen([sys.executable, "-c", SWEEP, str(HERE / f"{name}.yaml"), str(folder), *words])
    try:
        process.wait(max(1.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()


def gather(out: Path, options: dict[str, str], started_s: float) -> None:
    """Put every sweep's trials into a few compact files, replacing those of the last time."""
    import polars as pl

    from yolo_gradstab.runs import RunError, versions
    from yolo_gradstab.sweep import read_trial
    from yolo_gradstab.telemetry import read_run

    trials, steps, layers = [], [], []
    for folder in sorted(out.glob("*/trials/*/")):
        trial = read_trial(folder)
        try:
            run = read_run(folder)
            status = run.status
        except RunError:
            continue
        if trial is None:
            continue
        place = {"sweep": folder.parent.parent.name, "id": trial.id, "seed": trial.seed, "point": trial.point}
        ending = {
            "outcome": status.outcome,
            "divergence": status.divergence,
            "reason": status.reason,
            "seconds": status.seconds,
            "steps": len(run.steps),
        }
        trials.append(place | ending | {"final_metric": run.metric, "command": trial.command[3:]})
        steps.append(run.steps.with_columns(pl.lit(trial.id).alias("id")))
        layers.append(run.layers.with_columns(pl.lit(trial.id).alias("id")))
    write(out / "trials.json", json.dumps(trials, indent=1, allow_nan=False).encode())
    for name, tables in (("steps", steps), ("layers", layers)):
        if tables:
            table = pl.concat(tables, how="diagonal_relaxed")
            table.cast({pl.Float64: pl.Float32}).write_parquet(out / f"{name}.tmp", compression="zstd")
            (out / f"{name}.tmp").replace(out / f"{name}.parquet")
    machine = {
        "device": device(),
        "platform": platform.platform(),
        "versions": versions(),
        "options": options,
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started_s, 1),
    }
    write(out / "machine.json", json.dumps(machine, indent=1).encode())


def device() -> str:
    """Name of the device that trains."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def write(path: Path, content: bytes) -> None:
    """In one rename, since the time limit may strike at any moment."""
    path.with_suffix(".tmp").write_bytes(content)
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    sys.exit(main())
