"""Run the sweeps of this folder inside a time limit and keep what is done: what `make gpu` starts.

    python configs/gpu/run.py out=gpu-out time_limit_s=540 [wheels=DIR] [seeds=[0,1,2]] [jobs=5]
                              [stages=detect,pose,...] [pose_images=768] [train.epochs=1 ...]

Self-contained: it needs the project's files and, offline, a folder of wheels. Any further word goes to every sweep: a
dry run on a CPU is `train.device=cpu train.amp=false train.epochs=1`. What is done is not repeated by the next call.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CLOSING_S = 30.0  # of the limit, for interrupted trials to write their records and for the results to be gathered

# Most valuable first; each a spec of this folder and what it changes of it. Three more are no sweeps: `bench` and
# `bench_more`, and `throughput`, the same short sweep at several numbers of trials at once.
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
# What `run_bench` is given; each in a process of its own, whose rows are written when it is done.
HALF = {"precisions": ["bf16", "fp16"], "blocks": 5}
BENCHES: dict[str, list[dict[str, Any]]] = {
    "bench": [{"models": ["yolo26n.yaml"], **HALF}],
    "bench_more": [
        {"models": ["yolo26n.yaml"], **HALF, "batches": [64], "optimizers": ["SGD", "AdamW", "MuSGD"], "rounds": 10},
        *({"models": [f"{name}.yaml"], **HALF, "batches": [16, 64]} for name in ("yolo26s", "yolo26m", "yolo11n")),
        {"models": ["yolo26x.yaml"], **HALF},
        {"models": ["yolo26n.yaml"], "blocks": 5},  # fp32
    ],
}
STAGES = ("bench", *HEADLINE, "throughput", *list(SWEEPS)[2:], "bench_more")
DATA = {"bccd_detect": "bccd.yaml", "coco_pose": "coco_open_pose.yaml"}  # of a spec, where it is not drawn
TRIALS_PER_JOB = 2  # of `throughput`

BENCH = """
import json, sys
from pathlib import Path
from yolo_gradstab.bench import run_bench
Path(sys.argv[2]).write_text(json.dumps(run_bench(**json.loads(sys.argv[1]))))
"""
# The sweep without the report at its end, which would need the packages that draw charts.
SWEEP = """
import sys
from yolo_gradstab.sweep import read_spec, run_sweep
run_sweep(read_spec(sys.argv[1], sys.argv[3:]), sys.argv[2], say=lambda line: print(line, flush=True), retry="failed")
"""


def main() -> int:
    """Run, gather, say where."""
    options = {"out": "gpu-out", "time_limit_s": "540", "wheels": "", "seeds": "[0,1,2]", "jobs": "5"}
    options |= {"stages": ",".join(STAGES), "pose_images": "768"}
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    passed = [f"{key}={value}" for key, value in given.items() if key not in options]
    options |= {key: value for key, value in given.items() if key in options}
    stages = options["stages"].split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        sys.exit(f"stages={unknown[0]} is none of {', '.join(STAGES)}")
    if not re.fullmatch(r"\[\d+(,\d+)*\]", options["seeds"]):
        sys.exit(f"seeds={options['seeds']} must be a list of whole numbers, such as [0,1,2]")
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
    missing = {stage: folder for stage in stages if (folder := missing_data(stage))}
    for stage, folder in missing.items():
        named = f"set GRADSTAB_DATA to the folder that holds {folder.name}"
        print(f"{stage} is left out: {folder} does not exist; {named}")
    stages = [stage for stage in stages if stage not in missing]
    if not stages:
        sys.exit("no stage is left")
    # What a step costs, then all seeds of what matters most, then of the others; what says least of training last.
    seeds = json.loads(options["seeds"])
    order = [("bench", 0)] if "bench" in stages else []
    for group in (HEADLINE, SWEEPS.keys() - set(HEADLINE)):
        order += [(stage, seed) for seed in seeds for stage in stages if stage in group]
    order += [(stage, 0) for stage in ("bench_more", "throughput") if stage in stages]
    failed = []
    for stage, seed in order:
        if time.monotonic() < deadline_s:
            words = [f"seeds=[{seed}]", f"jobs={options['jobs']}", *passed]
            if not run(stage, out, words, options, deadline_s=deadline_s):
                failed.append(stage)
            gather(out, options, started_s)
    print(f"Results: {out / 'trials.json'}, steps.parquet, layers.parquet, machine.json; bench.json, throughput.json")
    if failed:
        print(f"Not to their end, for the reasons above: {', '.join(dict.fromkeys(failed))}")
    return int(bool(failed))


def run(stage: str, out: Path, words: list[str], options: dict[str, str], *, deadline_s: float) -> bool:
    """One stage, or what is left of it, until the time is up; false where it broke."""
    if stage in BENCHES:
        return bench(stage, out / "bench.json", words, deadline_s)
    if stage == "throughput":
        return measure_throughput(out, words, most=2 * int(options["jobs"]), deadline_s=deadline_s)
    spec, *changes = SWEEPS[stage]
    data = data_of(spec, out, int(options["pose_images"]))
    words = [f"train.data={data}", *changes, *words]  # the command line's come last
    return python(SWEEP, [str(HERE / f"{spec}.yaml"), str(out / stage), *words], deadline_s)


def bench(stage: str, path: Path, words: list[str], deadline_s: float) -> bool:
    """What is not in the file yet of a stage's settings; a given `train.model` takes the place of theirs."""
    result = json.loads(path.read_text()) if path.exists() else {"settings": [], "cases": []}
    model = next((word.partition("=")[2] for word in words if word.startswith("train.model=")), None)
    for given in BENCHES[stage]:
        setting = given | ({"models": [model]} if model else {}) | cpu_setting()
        if setting in result["settings"] or time.monotonic() >= deadline_s:
            continue
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        if not python(BENCH, [json.dumps(setting), str(part)], deadline_s, grace_s=0):
            return False
        if part.exists():  # it is written at the end
            new = json.loads(part.read_text())
            result |= {"machine": new["machine"], "settings": [*result["settings"], setting]}
            result["cases"] += new["cases"]
            write(path, json.dumps(result, indent=1).encode())
            part.unlink()
    return True


def cpu_setting() -> dict[str, Any]:
    """What a dry run on a CPU changes: there is no fp16."""
    import torch

    return {} if torch.cuda.is_available() else {"precisions": ["fp32"], "batches": [4]}


def measure_throughput(out: Path, words: list[str], *, most: int, deadline_s: float) -> bool:
    """Trials an hour, their start included, at 1, 2, 4, ... up to `most` at once; as many for each."""
    path = out / "throughput.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    while (jobs := 2 ** len(rows)) <= most:
        folder, trials = out / "throughput" / str(jobs), TRIALS_PER_JOB * jobs
        shutil.rmtree(folder, ignore_errors=True)  # with a part of it done it would seem fast
        ours = [f"train.data={data_of('drawn_pose', out, 96)}", "train.epochs=2", *words, "grid.lr0=[0.01]"]
        ours += ["grid.update_clip=[null]", f"seeds={list(range(trials))}", f"jobs={jobs}"]
        began_s = time.monotonic()
        ran = python(SWEEP, [str(HERE / "drawn_pose.yaml"), str(folder), *ours], deadline_s)
        seconds = time.monotonic() - began_s
        if not ran or time.monotonic() >= deadline_s:
            return ran
        completed = sum(status_of(trial) == "completed" for trial in folder.glob("trials/*/"))
        if completed < trials:
            print(f"throughput with jobs={jobs}: {completed} of {trials} trials completed, so it is not counted")
            return False
        rows.append({"jobs": jobs, "trials": trials, "seconds": seconds, "trials_per_hour": 3600 * trials / seconds})
        write(path, json.dumps(rows, indent=1).encode())
    return True


def status_of(folder: Path) -> str:
    """How a run ended; empty where there is none."""
    from yolo_gradstab.runs import RunError
    from yolo_gradstab.telemetry import read_run

    try:
        return read_run(folder).status.outcome
    except RunError:
        return ""


def install(wheels: Path, target: Path) -> None:
    """Unpack wheels beside the machine's own packages, without looking for their dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True)


def data_of(name: str, out: Path, pose_images: int) -> Path:
    """The data YAML of a sweep, with absolute paths, for trials run from anywhere."""
    if name == "drawn_pose":
        from yolo_gradstab.coco.sample import draw_sample

        folder = out / "data" / f"{name}_{pose_images}"
        if not folder.is_dir():  # a part of it would pass for the whole
            part = folder.with_suffix(".part")
            draw_sample(part, task="pose", images=pose_images, size=192)
            part.rename(folder)
        return folder / "data.yaml"
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


def python(code: str, words: list[str], deadline_s: float, *, grace_s: float = CLOSING_S * 0.8) -> bool:
    """Run some code, a sweep say, until it is done or the time is up; false, and said, where it broke."""
    process = subprocess.Popen([sys.executable, "-c", code, *words])
    try:
        process.wait(max(1.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:  # such as a bench, whose threads go on to their end
            process.kill()
            process.wait()
        return True
    if process.returncode:
        print(f"ended with status {process.returncode}: {' '.join(words)}")
    return process.returncode == 0


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
