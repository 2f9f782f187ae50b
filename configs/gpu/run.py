"""Run the sweeps of this folder inside a time limit and keep what is done: what `make gpu` starts.

    python configs/gpu/run.py out=gpu-out time_limit_s=540 [wheels=DIR] [seeds=3] [jobs=5]
                              [stages=detect,pose,...] [pose_images=768] [train.epochs=1 ...]

Self-contained: it needs the project's files and, offline, a folder of wheels. Any further word goes to every sweep: a
dry run on a CPU is `train.device=cpu train.amp=false train.epochs=1`. Every stage but the sweeps is done once: where
its file is there already, it is not repeated.
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

# Most valuable first; each a spec of this folder and what it changes of it. Two more are no sweeps: `bench`, and
# `throughput`, the same short sweep at several numbers of trials at once.
OPTIMIZERS, NO_BOUND = "grid.optimizer=[AdamW,MuSGD]", "grid.update_clip=[null]"
POLICIES = "grid.clip=[none,{policy: norm, max_norm: 1},agc,zclip]"
SWEEPS: dict[str, tuple[str, ...]] = {
    "detect": ("bccd_detect",),
    "pose": ("drawn_pose",),
    "detect_optimizers": ("bccd_detect", OPTIMIZERS),
    "pose_optimizers": ("drawn_pose", OPTIMIZERS),
    "detect_guard": ("bccd_detect", "grid.guard.divergence=['off', rollback]", NO_BOUND),
    "pose_guard": ("drawn_pose", "grid.guard.divergence=['off', rollback]", NO_BOUND),
    "detect_policies": ("bccd_detect", POLICIES, NO_BOUND),
    "detect_640": ("bccd_detect", "train.imgsz=640", "train.model=yolo26s.yaml"),
    "pose_coco": ("coco_pose",),
    "detect_yolo11": ("bccd_detect", "train.model=yolo11n.yaml"),
    "detect_fp16": ("bccd_detect", "train.amp=true"),
    "pose_policies": ("drawn_pose", POLICIES, NO_BOUND),
}
HEADLINE = ("detect", "pose")
STAGES = ("bench", *HEADLINE, "throughput", *list(SWEEPS)[2:])
DATA = {"bccd_detect": "bccd.yaml", "coco_pose": "coco_open_pose.yaml"}  # of a spec, where it is not drawn
TRIALS_PER_JOB = 2  # of `throughput`

BENCH = """
import json, sys
from yolo_gradstab.bench import run_bench
json.dump(run_bench([sys.argv[1]]), open(sys.argv[2], "w"), indent=1)
"""
# The sweep without the report at its end, which would need the packages that draw charts.
SWEEP = """
import sys
from yolo_gradstab.sweep import read_spec, run_sweep
run_sweep(read_spec(sys.argv[1], sys.argv[3:]), sys.argv[2], say=lambda line: print(line, flush=True), retry="failed")
"""


def main() -> int:
    """Run, gather, say where."""
    options = {"out": "gpu-out", "time_limit_s": "540", "wheels": "", "seeds": "3", "jobs": "5"}
    options |= {"stages": ",".join(STAGES), "pose_images": "768"}
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    passed = [f"{key}={value}" for key, value in given.items() if key not in options]
    options |= {key: value for key, value in given.items() if key in options}
    stages = options["stages"].split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        sys.exit(f"stages={unknown[0]} is none of {', '.join(STAGES)}")
    started_s = time.monotonic()
    deadline_s = started_s + float(options["time_limit_s"]) - CLOSING_S
    out = Path(options["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options["wheels"]:
        install(Path(options["wheels"]), out / "packages")
    sys.path[:0] = [str(ROOT), str(out / "packages")]
    before = [path] if (path := os.environ.get("PYTHONPATH")) else []  # where the machine's packages may be
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], *before])
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
    if "detect_fp16" in stages:
        stand_in(out / "settings")
    missing = {stage: folder for stage in stages if (folder := missing_data(stage))}
    for stage, folder in missing.items():
        named = f"set GRADSTAB_DATA to the folder that holds {folder.name}"
        print(f"{stage} is left out: {folder} does not exist; {named}")
    stages = [stage for stage in stages if stage not in missing]
    if not stages:
        sys.exit("no stage is left")
    # All seeds of what matters most, then the others; what says least of training last.
    stages.sort(key=lambda stage: stage == "throughput")
    groups = [[stage for stage in stages if (stage in HEADLINE) is first] for first in (True, False)]
    for seed, stage in [(seed, stage) for group in groups for seed in range(int(options["seeds"])) for stage in group]:
        if time.monotonic() < deadline_s:
            words = [f"seeds=[{seed}]", f"jobs={options['jobs']}", *passed]
            run(stage, out, words, options, deadline_s=deadline_s)
            gather(out, options, started_s)
    print(f"Results: {out / 'trials.json'}, steps.parquet, layers.parquet, machine.json; bench.json, throughput.json")
    return 0


def run(stage: str, out: Path, words: list[str], options: dict[str, str], *, deadline_s: float) -> None:
    """One stage, or what is left of it, until the time is up."""
    if stage == "bench":
        if not (out / "bench.json").exists():
            model = next((word.partition("=")[2] for word in words if word.startswith("train.model=")), "yolo26n.yaml")
            python(BENCH, [model, str(out / "bench.json")], deadline_s)
    elif stage == "throughput":
        measure_throughput(out, words, most=2 * int(options["jobs"]), deadline_s=deadline_s)
    else:
        spec, *changes = SWEEPS[stage]
        data = data_of(spec, out, int(options["pose_images"]))
        words = [f"train.data={data}", *changes, *words]  # the command line's come last
        python(SWEEP, [str(HERE / f"{spec}.yaml"), str(out / stage), *words], deadline_s)


def measure_throughput(out: Path, words: list[str], *, most: int, deadline_s: float) -> None:
    """Trials an hour at 1, 2, 4, ... up to `most` at once; as many for each, so that none is left alone."""
    path = out / "throughput.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    while (jobs := 2 ** len(rows)) <= most:
        trials = TRIALS_PER_JOB * jobs
        ours = [f"train.data={data_of('drawn_pose', out, 96)}", "train.epochs=2", *words, "grid.lr0=[0.01]"]
        ours += ["grid.update_clip=[null]", f"seeds={list(range(trials))}", f"jobs={jobs}"]
        began_s = time.monotonic()
        python(SWEEP, [str(HERE / "drawn_pose.yaml"), str(out / "throughput" / str(jobs)), *ours], deadline_s)
        seconds = time.monotonic() - began_s
        if time.monotonic() >= deadline_s:
            return
        rows.append({"jobs": jobs, "trials": trials, "seconds": seconds, "trials_per_hour": 3600 * trials / seconds})
        write(path, json.dumps(rows, indent=1).encode())


def stand_in(settings: Path) -> None:
    """Let fp16 train without a network: the host tries it on weights that it would download.

    An untrained model of the same name takes their place. It finds nothing in either precision, so the check passes:
    on a GPU that cannot do fp16 it would have failed.
    """
    settings.mkdir(parents=True, exist_ok=True)
    os.environ["YOLO_CONFIG_DIR"] = str(settings)
    code = """
from ultralytics import YOLO, settings
from pathlib import Path
import sys
settings.update({"weights_dir": sys.argv[1]})
path = Path(sys.argv[1]) / "yolo26n.pt"
if not path.exists():
    YOLO("yolo26n.yaml").save(path)
"""
    subprocess.run([sys.executable, "-c", code, str(settings)], check=True)


def install(wheels: Path, target: Path) -> None:
    """Unpack wheels beside the machine's own packages, without looking for their dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True)


def data_of(name: str, out: Path, pose_images: int) -> Path:
    """The data YAML of a sweep, with absolute paths, for trials run from anywhere."""
    if name == "drawn_pose":
        from yolo_gradstab.coco.sample import draw_sample

        folder = out / "data" / f"{name}_{pose_images}"
        done = folder / "data.yaml"
        if done.is_file() and "train:" in done.read_text(encoding="utf-8"):  # which is written last
            return done
        return draw_sample(folder, task="pose", images=pose_images, size=192)
    folder, lines = data_folder(DATA[name])
    path = out / "data" / DATA[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(f"path: {folder.resolve()}" if line.startswith("path:") else line for line in lines))
    return path


def missing_data(stage: str) -> Path | None:
    """The folder that a stage needs and that is not there."""
    name = SWEEPS[stage][0] if stage in SWEEPS else ""
    folder = data_folder(DATA[name])[0] if name in DATA else None
    return None if folder is None or folder.is_dir() else folder


def data_folder(known: str) -> tuple[Path, list[str]]:
    """Where the data of a YAML are on this machine, and its lines."""
    lines = (ROOT / "datasets" / known).read_text(encoding="utf-8").splitlines()
    (given,) = (line.partition(":")[2].strip() for line in lines if line.startswith("path:"))
    return Path(os.environ.get("GRADSTAB_DATA", ROOT.parent / "shared" / "data")) / Path(given).name, lines


def python(code: str, words: list[str], deadline_s: float) -> None:
    """Run some code, a sweep say, until it is done or the time is up."""
    process = subprocess.Popen([sys.executable, "-c", code, *words])
    try:
        process.wait(max(1.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(CLOSING_S * 0.8)
        except subprocess.TimeoutExpired:  # such as the bench, whose threads go on to their end
            process.kill()
            process.wait()


def gather(out: Path, options: dict[str, str], started_s: float) -> None:
    """Put every sweep's trials into a few compact files, replacing those of the last time."""
    import polars as pl

    from yolo_gradstab.runs import RunError, versions
    from yolo_gradstab.sweep import read_trial
    from yolo_gradstab.telemetry import read_run

    trials, steps, layers = [], [], []
    for folder in sorted(folder for stage in SWEEPS for folder in (out / stage).glob("trials/*/")):
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
