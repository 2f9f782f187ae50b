"""A long run: does memory grow, does it slow down, is a record lost, does its report open?

    cd tests && python -m trust.endurance steps=20000 [folder=DIR]

The drawn set at 64 px with the tiny model, four images a batch, so that much of a step is ours; with less
than that BatchNorm has no variance. Speed and memory are compared between the second tenth of the run and the last; in
the first, caches fill.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = 10


def endure(folder: Path, *, steps: int) -> dict[str, Any]:
    """Train that many optimizer steps, then read everything back.

    Returns:
        `steps` and `records` (optimizer steps made, and steps in the records, each once), `slowdown` (median seconds a
        step, last tenth over second), `rss_mib` at the end of the second and of the last tenth, `bytes_per_step` on
        disk, `rollbacks`, `outcome`, `report_bytes`.
    """
    from yolo_gradstab import build_report, read_run, trainer_for
    from yolo_gradstab.coco.sample import draw_sample

    data = draw_sample(folder / "data", images=24, size=64)
    seconds: list[float] = []
    rss_mib: list[float] = []

    class Timed(trainer_for("detect")):  # type: ignore[misc]
        last_s = time.perf_counter()

        def optimizer_step(self) -> None:
            super().optimizer_step()
            now_s = time.perf_counter()
            seconds.append(now_s - self.last_s)
            self.last_s = now_s
            if len(seconds) % max(1, steps // (10 * WINDOWS)) == 0:
                rss_mib.append(psutil.Process().memory_info().rss / 2**20)

    arguments = {"model": str(ROOT / "configs/models/yolo26-tiny.yaml"), "data": str(data), "imgsz": 64, "batch": 4}
    arguments |= {"nbs": 4, "epochs": steps // 4, "optimizer": "SGD", "lr0": 1e-4, "workers": 0, "device": "cpu"}
    arguments |= {"val": False, "save_period": -1, "plots": False, "close_mosaic": 0, "verbose": False}
    Timed(overrides={**arguments, "project": str(folder), "name": "run"}).train()
    run = read_run(folder / "run")
    on_disk = sum(path.stat().st_size for path in (folder / "run/gradstab").rglob("*") if path.is_file())
    report = build_report([folder / "run"], out=folder / "report")
    of_steps, of_memory = len(seconds) // WINDOWS, len(rss_mib) // WINDOWS
    events = [json.loads(line) for line in (folder / "run/gradstab/events.jsonl").read_text().splitlines()]
    return {
        "steps": len(seconds),
        "records": len(set(run.steps["step"].to_list())) if run.steps["step"].is_unique().all() else -1,
        "slowdown": round(median(seconds[-of_steps:]) / median(seconds[of_steps : 2 * of_steps]), 3),
        "ms_per_step": round(1e3 * median(seconds), 2),
        "rss_mib": [round(rss_mib[2 * of_memory - 1], 1), round(rss_mib[-1], 1)],
        "bytes_per_step": round(on_disk / len(seconds), 1),
        "rollbacks": sum(event["event"] == "rollback" for event in events),
        "outcome": run.status.outcome,
        "report_bytes": report.stat().st_size,
    }


def main() -> None:
    """Run and print."""
    options = {"steps": "2000", "folder": ""} | dict(word.partition("=")[::2] for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        result = endure(Path(options["folder"] or temporary), steps=int(options["steps"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
