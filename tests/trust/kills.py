"""Runs ended at the worst moments: what is left must be readable and true, and go on as if nothing had been.

    cd tests && python -m trust.kills [kills=50] [terms=10] [sweeps=3] [seed=0] [format=text|json] [folder=DIR]
                                      [only=training,terms,sweeps,disks,neighbours]

Small real trainings are killed at random moments, and at aimed ones: when a part of the records or a checkpoint is
being written (its temporary file has just appeared), right before and after it is renamed, while a resumed run tidies
up, and when the host strips its checkpoints at the end. The killer is another process, which watches the run folder.

Each is held against a diary, in which the trained process notes every optimizer step the moment it was made, and
against a run of the same arguments that nothing interrupted, bit for bit.

Every training is a fork of a process that has imported everything and run nothing, so that it starts within a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("YOLO_VERBOSE", "true")

MODEL = Path(__file__).resolve().parents[2] / "configs" / "models" / "yolo26-tiny.yaml"
MOST_LOST_S = 5.0  # of records, by a kill at any moment
LIMIT_S = 600.0  # of any one process here, on a busy machine
STEPS, LAYERS, WEIGHTS = "gradstab/steps", "gradstab/layers", "weights"

# inotify(7)
IN_CLOSE_WRITE, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x8, 0x80, 0x100, 0x200


class Shape(NamedTuple):
    """One kind of run: many short epochs, or few long ones, in which records are lost for longer."""

    name: str
    task: str
    epochs: int
    config: dict[str, Any]
    host: dict[str, Any]


SHAPES = (
    Shape("epochs", "detect", 3, {"clip": "zclip", "clip.warmup": 5, "update_clip": 0.03}, {"batch": 4, "nbs": 12}),
    Shape(
        "long",
        "detect",
        2,
        {"clip": "autoclip", "guard.spike": "clip"},
        {"batch": 1, "nbs": 1, "imgsz": 64, "optimizer": "AdamW"},
    ),
)


class Aim(NamedTuple):
    """A moment to end a process at: so many seconds after the n-th such change in these folders, or after it said this.

    With neither, after its start.
    """

    after_s: float = 0.0
    said: str = ""
    folders: tuple[str, ...] = ()
    events: int = 0
    temporary: bool = True
    number: int = 1


# Processes -----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None], log: Path) -> int:
    """Do it in a fork of this process, its output in a file; exit status 1 and the traceback there if it raises."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(pid: int, *, wait: bool = True) -> int | None:
    """The exit status of a fork, negative for a signal; None while it runs and is not waited for."""
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if not wait:
            return None
        if time.monotonic() > deadline_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"process {pid} hung")
        time.sleep(0.01)


def asked(question: Callable[[], Any], log: Path) -> Any:
    """The answer of a fork, as JSON; so this process never starts a thread that a later fork would miss."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    status = ended(fork(lambda: print(json.dumps(question()), file=answer.open("w"), flush=True), log))
    assert status == 0, f"{log}: {log.read_text(errors='replace').strip().splitlines()[-1]}"
    return json.loads(answer.read_text())


class Watcher:
    """Changes in the folders of a run, as the kernel reports them; folders are taken up as they come into being."""

    def __init__(self, run: Path, aim: Aim) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._missing = [run / name for name in aim.folders]
        self._aim, self._left = aim, aim.number

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def has_come(self) -> bool:
        """Whether the moment has come."""
        for folder in [folder for folder in self._missing if folder.is_dir()]:
            self._libc.inotify_add_watch(self._file, os.fsencode(folder), self._aim.events)
            self._missing.remove(folder)
        try:
            data = os.read(self._file, 65536)
        except BlockingIOError:
            return False
        at = 0
        while at < len(data):
            _, _, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            at += 16 + length
            if name.endswith(".tmp") or not self._aim.temporary:
                self._left -= 1
                if self._left == 0:
                    return True
        return False


def end_at(pid: int, training: Training, aim: Aim, number: int) -> float | None:
    """Send a signal to a process at that moment; returns when, or None if it had ended before."""
    begun_s = time.monotonic()
    come = not aim.folders and not aim.said
    with Watcher(training.run, aim) as watcher:
        while not ended_early(pid):
            if not come and (watcher.has_come() if aim.folders else aim.said in training.log()):
                come, begun_s = True, time.monotonic()
            if come and time.monotonic() >= begun_s + aim.after_s:
                os.kill(pid, number)
                return time.time()
            assert time.monotonic() < begun_s + LIMIT_S, f"{training.folder}: the moment never came"
            time.sleep(0.0002 if aim.folders else 0.002)
    return None


def ended_early(pid: int) -> bool:
    """Whether it has ended, leaving its status to be asked for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# A training ----------------------------------------------------------------------------------------------------------


class Training:
    """A run folder, and the diary of what its processes did."""

    def __init__(self, folder: Path, shape: Shape, data: Path) -> None:
        self.folder, self.shape, self.data = folder, shape, data
        folder.mkdir(parents=True, exist_ok=True)
        self.run = folder / "run"
        self.diary = folder / "diary"
        self.state = folder / "state.pt"
        self.last = self.run / "weights" / "last.pt"
        self.parts = 0

    def arguments(self) -> dict[str, Any]:
        fixed: dict[str, Any] = {
            "data": str(self.data), "epochs": self.shape.epochs, "imgsz": 32, "optimizer": "SGD", "lr0": 0.002,
            "warmup_bias_lr": 0.002, "warmup_epochs": 0.5, "device": "cpu", "workers": 0, "plots": False,
            "close_mosaic": 1, "project": str(self.folder), "name": "run", "exist_ok": True, "verbose": False,
        }  # fmt: skip
        return fixed | self.shape.host

    def start(self, *, resume: bool = False) -> int:
        """In a fork; every part of the run has a log of its own, and they share the diary."""
        self.parts += 1
        self.state.unlink(missing_ok=True)
        return fork(lambda: self._train(resume=resume), self.folder / f"part{self.parts}.log")

    def log(self) -> str:
        path = self.folder / f"part{self.parts}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _train(self, *, resume: bool) -> None:
        import torch
        from ultralytics import YOLO

        from yolo_gradstab.trainer import STATE_KEY, trainer_for

        diary = os.open(self.diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        part = self.parts

        class Diarist(trainer_for(self.shape.task, self.shape.config)):  # type: ignore[misc]
            def optimizer_step(self) -> None:
                step = self._step
                try:
                    super().optimizer_step()
                finally:  # a signal that came within takes effect at its end
                    if self._step > step:
                        os.write(diary, f"{part} {step} {time.time()}\n".encode())

        model = self.last if resume else MODEL
        yolo = YOLO(model)
        yolo.train(trainer=Diarist, **({"resume": str(self.last)} if resume else self.arguments()))
        trainer, state = yolo.trainer, {}
        with contextlib.suppress(KeyError):
            state = trainer.optimizer.state_dict()
            trainer._add_state(trainer.optimizer, state)
        kept = state[STATE_KEY] | {"updates": trainer.ema.updates, "modules": sorted(sys.modules)}
        torch.save(kept, self.state)

    def steps_made(self) -> dict[int, tuple[int, float]]:
        """Of the diary: the part and the time of each step, when it was made last."""
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        return {int(s): (int(p), float(t)) for p, s, t in (line.split() for line in lines)}


def readable(training: Training, killed_s: float, *, terminated: bool = False) -> dict[str, Any]:
    """What the folder of a run that was ended says, and what is wrong with it."""
    import polars as pl
    import torch

    from yolo_gradstab import read_run
    from yolo_gradstab.trainer import STATE_KEY

    run, wrong = training.run, []
    made = training.steps_made()
    found: dict[str, Any] = {"wrong": wrong, "lost_steps": 0, "lost_s": 0.0, "made": len(made)}
    found["leftover"] = sorted({p.name.split(".")[-3] for p in run.rglob(".*.tmp")})
    if not (run / "gradstab").is_dir():
        found["outcome"] = None
        if made:
            wrong.append("no gradstab folder after steps were made")
        return found
    read = read_run(run)
    for path in [*(run / STEPS).glob("*.parquet"), *(run / LAYERS).glob("*.parquet")]:
        pl.read_parquet(path)
    steps = read.steps["step"].to_list()
    layers = read.layers.select("step", "layer").rows()
    if len(set(steps)) < len(steps) or len(set(layers)) < len(layers):
        wrong.append("a record is there twice")
    if steps != list(range(len(steps))):
        wrong.append(f"steps are missing before the last one: {sorted(set(range(max(steps))) - set(steps))[:5]}")
    if terminated and set(steps) != set(made):
        wrong.append(f"terminated, but {len(made)} steps were made and {len(steps)} recorded")
    # A resumed run drops what the one before had made after the checkpoint, and makes it again.
    lost = [when for step, (part, when) in made.items() if step not in set(steps) and part == training.parts]
    found["lost_steps"], found["lost_s"] = len(lost), killed_s - min(lost, default=killed_s)
    if found["lost_s"] > MOST_LOST_S:
        wrong.append(f"{found['lost_s']:.1f} s of records lost")
    status = read.status
    found["outcome"], found["reason"], found["step"] = status.outcome, status.reason, status.step
    whole = "Optimizer stripped" in training.log()
    if status.outcome != "interrupted" and not (whole and status.outcome == "completed"):
        wrong.append(f"the status says {status.outcome}")
    if status.outcome == "interrupted" and status.step != len(steps):
        wrong.append(f"the status says step {status.step}, there are {len(steps)}")
    read.diagnose()
    if read.results.height and read.results["epoch"].is_duplicated().any():
        wrong.append("an epoch is twice in results.csv")
    if training.last.exists():
        state = torch.load(training.last, weights_only=False)["optimizer"]
        if state and state[STATE_KEY]["step"] > len(steps):
            wrong.append(f"the checkpoint is of step {state[STATE_KEY]['step']}, and only {len(steps)} are recorded")
    return found


def differences(training: Training, whole: Training) -> list[str]:
    """Where a run that went on differs from one that was never interrupted."""
    import torch

    from yolo_gradstab import read_run

    a, b = read_run(training.run), read_run(whole.run)
    wrong = []
    if a.status.outcome != b.status.outcome or a.status.step != b.status.step:
        wrong.append(f"status {a.status.outcome} at {a.status.step}, not {b.status.outcome} at {b.status.step}")
    for name in ("steps", "layers", "results"):
        mine, other = (getattr(run, name).drop("time_s", "time", strict=False) for run in (a, b))
        if not mine.equals(other):
            wrong.append(f"{name}: {mine.shape} rows and columns, not {other.shape}, or other values")
    if a.events != b.events:
        wrong.append(f"events: {len(a.events)}, not {len(b.events)}, or other ones")
    if a.config != b.config:
        wrong.append("config")
    if left := [path.name for path in training.run.rglob(".*.tmp")]:
        wrong.append(f"temporary files are left: {left}")
    for name in ("last.pt", "best.pt"):
        mine, other = (torch.load(t.run / "weights" / name, weights_only=False) for t in (training, whole))
        wrong += unequal(mine["model"].state_dict(), other["model"].state_dict(), name)
    mine, other = (torch.load(t.state, weights_only=False) for t in (training, whole))
    for each in (mine, other):
        for name in ("seconds", "modules"):
            del each[name]
    return wrong + unequal(mine, other, "state")


def unequal(mine: Any, other: Any, at: str) -> list[str]:
    """Places in nested values that are not the same, bit for bit."""
    import numpy as np
    import torch

    if isinstance(mine, torch.Tensor) or isinstance(other, torch.Tensor):
        same = isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor) and mine.dtype == other.dtype
        mine, other = (
            (np.atleast_1d(value.detach().contiguous().numpy()) for value in (mine, other)) if same else ([0], [1])
        )
    if isinstance(mine, np.ndarray) and isinstance(other, np.ndarray):
        same = mine.shape == other.shape and mine.tobytes() == other.tobytes()
        return [] if same else [at]
    if isinstance(mine, dict) and isinstance(other, dict) and mine.keys() == other.keys():
        return [place for key in mine for place in unequal(mine[key], other[key], f"{at}.{key}")]
    if isinstance(mine, list | tuple) and isinstance(other, list | tuple) and len(mine) == len(other):
        return [place for i in range(len(mine)) for place in unequal(mine[i], other[i], f"{at}[{i}]")]
    return [] if mine == other or (mine != mine and other != other) else [at]  # a NaN is as another


# Kinds of kills ------------------------------------------------------------------------------------------------------


def an_aim(kind: str, whole_s: float, draw: random.Random) -> Aim:
    """A moment of this kind, in a run that takes so long."""
    parts = (STEPS, LAYERS)
    if kind == "part":
        return Aim(folders=parts, events=IN_CREATE, number=draw.randint(1, 6))
    if kind == "checkpoint":
        return Aim(folders=(WEIGHTS,), events=IN_CREATE, number=draw.randint(1, 4))
    if kind == "rename":
        event = draw.choice((IN_CLOSE_WRITE, IN_MOVED_TO))
        folders = draw.choice((parts, (WEIGHTS,)))
        return Aim(folders=folders, events=event, temporary=event == IN_CLOSE_WRITE, number=draw.randint(1, 4))
    if kind == "end":  # the host strips its checkpoints and validates the best one
        return Aim(said="epochs completed in", after_s=draw.choice((draw.uniform(0, 0.1), draw.uniform(0, 1.0))))
    if kind == "resume":  # into the second epoch, whose records a resumed run drops
        return Aim(draw.uniform(0, 0.08 * whole_s), folders=(WEIGHTS,), events=IN_MOVED_TO, temporary=False, number=2)
    return Aim(draw.uniform(0.3, 0.7 * whole_s))


def tidying(draw: random.Random) -> Aim:
    """A moment early in a resumed run: while it drops the records that it will make again, or any other."""
    event = draw.choice((IN_CREATE, IN_DELETE, IN_MOVED_TO, 0))
    if not event:
        return Aim(after_s=draw.uniform(0.1, 2.5))
    return Aim(folders=(STEPS, LAYERS), events=event, temporary=False)


class Tally(NamedTuple):
    """What became of one kill."""

    kind: str
    killed: bool
    outcome: str | None
    lost_s: float
    lost_steps: int
    leftover: list[str]
    went_on: str  # resumed, anew, done (training was over), or not
    wrong: list[str]


KINDS = ("random", "part", "checkpoint", "rename", "end", "resume")


class Bench:
    """A folder with the drawn set and the uninterrupted runs, everything imported."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        from yolo_gradstab.coco.sample import draw_sample

        self.folder = folder
        self.draw = random.Random(seed)
        self.data = draw_sample(folder / "data", task="detect", images=48, size=64)
        self.whole: dict[str, Training] = {}
        self.whole_s: dict[str, float] = {}
        for shape in SHAPES:
            training = Training(folder / f"whole-{shape.name}", shape, self.data)
            begun_s = time.monotonic()
            assert ended(training.start()) == 0, training.log()
            self.whole[shape.name], self.whole_s[shape.name] = training, time.monotonic() - begun_s
            self.preload(training)

    def preload(self, first: Training) -> None:
        """Import here what a training has imported, so that no later fork has to."""

        def names() -> list[str]:
            import torch

            return list(torch.load(first.state, weights_only=False)["modules"])

        for name in asked(names, self.folder / "names.log"):
            if name not in sys.modules and not name.startswith("__"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)

    def kill(self, kind: str, index: int, number: int = signal.SIGKILL) -> Tally:
        """End a run at a moment of this kind, read what is left, go on to its end, and compare."""
        draw = self.draw
        shape = draw.choice(SHAPES)
        training = Training(self.folder / f"{kind}-{signal.Signals(number).name}-{index}", shape, self.data)
        whole, whole_s = self.whole[shape.name], self.whole_s[shape.name]
        wrong: list[str] = []
        pid = training.start()
        when = end_at(pid, training, an_aim(kind, whole_s, draw), number)
        status = ended(pid)
        log = self.folder / "asked.log"
        found = asked(lambda: readable(training, when or time.time(), terminated=number == signal.SIGTERM), log)
        wrong += found["wrong"]
        if (
            kind == "resume"
            and when is not None
            and training.last.exists()
            and "epochs completed in" not in training.log()
        ):
            pid = training.start(resume=True)
            again_s = end_at(pid, training, tidying(draw), number)
            status = ended(pid)
            again = asked(lambda: readable(training, again_s or time.time()), log)
            wrong += [f"after a kill of the resumed run: {words}" for words in again["wrong"]]
            found["leftover"] += again["leftover"]
        went_on = "not"
        if when is not None and status == 0:  # the second moment did not come
            wrong += asked(lambda: differences(training, whole), log)
            went_on = "resumed"
        elif when is not None:
            went_on = self.go_on(training, whole, wrong)
        elif status:
            wrong.append(f"ended by itself with {status}")
        tally = Tally(
            kind,
            when is not None,
            found["outcome"],
            found["lost_s"],
            found["lost_steps"],
            found["leftover"],
            went_on,
            wrong,
        )
        if not wrong:
            shutil.rmtree(training.folder)
        return tally

    def go_on(self, training: Training, whole: Training, wrong: list[str]) -> str:
        """Resume it, or start it again where no checkpoint had been written; then it must be the uninterrupted one."""
        log = self.folder / "asked.log"
        resume = training.last.exists()
        status = ended(training.start(resume=resume))
        if status and "nothing to resume;" in training.log():
            wrong += asked(lambda: done(training, whole), log)
            return "done"
        if status:
            wrong.append(f"does not go on: {training.log().strip().splitlines()[-1]}")
            return "not"
        wrong += asked(lambda: differences(training, whole), log)
        return "resumed" if resume else "anew"


def done(training: Training, whole: Training) -> list[str]:
    """Of a run killed after its last epoch: all records are there, and its last weights."""
    import torch

    from yolo_gradstab import read_run

    a, b = read_run(training.run), read_run(whole.run)
    wrong = [] if a.steps.drop("time_s").equals(b.steps.drop("time_s")) else ["steps differ"]
    mine, other = (torch.load(t.last, weights_only=False) for t in (training, whole))
    weights = (mine["model"] or mine["ema"]).state_dict()
    return wrong + unequal(weights, other["model"].state_dict(), "last.pt")


def trainings(bench: Bench, *, kills: int, number: int = signal.SIGKILL) -> list[Tally]:
    """So many kills, the kinds in turn; one that came too late is tried again."""
    kinds = KINDS if number == signal.SIGKILL else KINDS[:4]
    tallies: list[Tally] = []
    tries = 0
    while sum(tally.killed for tally in tallies) < kills and tries < 3 * kills:
        tallies.append(bench.kill(kinds[tries % len(kinds)], tries, number))
        tries += 1
        print(tries, tallies[-1], file=sys.stderr, flush=True)
    return tallies


# Sweeps --------------------------------------------------------------------------------------------------------------


def sweep_spec(bench: Bench) -> dict[str, Any]:
    """Four trials of a few seconds."""
    train = {"data": str(bench.data), "model": str(MODEL), "epochs": 2, "imgsz": 32, "batch": 8, "nbs": 8}
    train |= {"optimizer": "SGD", "workers": 0, "device": "cpu", "plots": False, "warmup_epochs": 0.5}
    return {"task": "detect", "train": train, "grid": {"lr0": [0.001, 0.002]}, "seeds": [0, 1], "jobs": 2}


def sweep(bench: Bench, out: Path, log: Path, *, retry: str | None = None) -> int:
    """Start or continue it, in a fork."""

    def run() -> None:
        from yolo_gradstab.sweep import run_sweep

        run_sweep(sweep_spec(bench), out, say=lambda line: print(line, flush=True), retry=retry)

    return fork(run, log)


def kill_a_sweep(bench: Bench, what: str, index: int) -> list[str]:
    """Kill the sweep, or one of its trials, or both; started again, every trial ends and none is run twice."""
    out = bench.folder / f"sweep-{what}-{index}"
    log = bench.folder / f"sweep-{what}-{index}.log"
    pid = sweep(bench, out, log)
    after_s, begun_s = bench.draw.uniform(0, 30), None
    while not ended_early(pid) and (begun_s is None or time.monotonic() < begun_s + after_s):
        if begun_s is None and trial_processes(out):
            begun_s = time.monotonic()
        time.sleep(0.05)
    if what in {"sweep", "both"}:
        os.kill(pid, signal.SIGKILL)
    if what in {"trial", "both"}:
        running = trial_processes(out)
        for each in running[:1]:
            os.kill(each, signal.SIGKILL)
    assert (what == "trial") == (ended(pid) == 0)
    before = asked(lambda: endings(out), log)
    assert ended(sweep(bench, out, log, retry="failed")) == 0
    after = asked(lambda: endings(out), log)
    wrong = [f"{trial} is {outcome}" for trial, (outcome, _) in after.items() if outcome != "completed"]
    wrong += [
        f"{trial} was run again" for trial, end in before.items() if end[0] == "completed" and after[trial] != end
    ]
    wrong += [] if len(after) == 4 else [f"{len(after)} trials of 4"]
    return wrong


def trial_processes(out: Path) -> list[int]:
    """Processes whose command names a trial's folder in this sweep; forks of this one do not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{out}/trials".encode() in path.read_bytes() or f"project={out}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def endings(out: Path) -> dict[str, Any]:
    """Of each trial how it stands, and when that was written."""
    from yolo_gradstab import read_run
    from yolo_gradstab.runs import RunError

    found = {}
    for path in sorted(out.glob("trials/*/")):
        with contextlib.suppress(RunError, OSError):
            found[path.name] = [read_run(path).status.outcome, (path / "gradstab" / "status.json").stat().st_mtime_ns]
    return found


# Disks and neighbours ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(place: Path, megabytes: int) -> Iterator[bool]:
    """A small disk of its own at this place, if this process may mount one."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def command(training: Training, log: Path, **more: Any) -> int:
    """Its command, in a fork, as a user would give it."""
    arguments = training.arguments() | {"model": str(MODEL)} | training.shape.config | more
    words = [f"{key}={value}" for key, value in arguments.items()]

    def run() -> None:
        from yolo_gradstab.cli import main

        sys.exit(main([training.shape.task, "train", *words]))

    return fork(run, log)


def said(log: Path) -> list[str]:
    """The lines of a command that a user would see as ours; a traceback is one too many."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if line.startswith(("yolo-gradstab:", "Traceback"))]


def full_disk(bench: Bench, megabytes: int, *, others: bool) -> list[str]:
    """A disk that a run fills up, or others do after its first records: one line, and what was recorded is read."""
    place = bench.folder / f"disk{megabytes}"
    with disk(place, megabytes) as mounted:
        if not mounted:
            return ["skipped: this process may not mount a disk"]
        training = Training(place / "full", SHAPES[0], bench.data)
        log = bench.folder / f"disk{megabytes}.log"
        pid = command(training, log)
        if others:
            while not ended_early(pid) and not list((training.run / STEPS).glob("*.parquet")):
                time.sleep(0.005)
            with contextlib.suppress(OSError), (place / "others").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(4096))
        status, lines = ended(pid), said(log)
        named = len(lines) == 1 and "No space left on device: '" in lines[0]
        wrong = [] if status == 1 and named else [f"exit {status}, said {lines}"]
        if (training.run / "gradstab" / "status.json").exists():
            read = asked(lambda: in_order(training.run), bench.folder / "asked.log")
            wrong += read
        return wrong


def in_order(run: Path) -> list[str]:
    """Whether what is in a folder reads."""
    from yolo_gradstab import read_run

    read = read_run(run)
    read.diagnose()
    assert read.events is not None
    steps = read.steps["step"].to_list()
    print(read.status, len(steps))
    wrong = [] if steps == list(range(len(steps))) else [f"steps {steps}"]
    return wrong + (
        [] if read.status.outcome in {"failed", "interrupted"} else [f"the status says {read.status.outcome}"]
    )


def read_only(bench: Bench) -> list[str]:
    """A folder that nothing can be written into: one line; a run that lies in it reads."""
    place = bench.folder / "readonly"
    with disk(place, 64) as mounted:
        if not mounted:
            return ["skipped: this process may not mount a disk"]
        shutil.copytree(bench.whole["long"].run, place / "old")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        training = Training(bench.folder / "unwritten", SHAPES[0], bench.data)
        log = bench.folder / "unwritten.log"
        status, lines = ended(command(training, log, project=place)), said(log)
        wrong = [] if status == 1 and len(lines) == 1 and "ead-only" in lines[0] else [f"exit {status}, said {lines}"]

        def reads() -> list[str]:
            from yolo_gradstab import read_run

            run = read_run(place / "old")
            run.diagnose()
            return [] if run.status.outcome == "completed" and len(run.steps) else ["the old run does not read"]

        return wrong + asked(reads, bench.folder / "asked.log")


def neighbours(bench: Bench) -> list[str]:
    """Two processes and one folder: refused in one line, or given the next; the first one's run is as it would be."""
    training = Training(bench.folder / "shared", SHAPES[0], bench.data)
    first = training.start()
    end = time.monotonic() + LIMIT_S
    while not (training.run / "gradstab" / "status.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    log = bench.folder / "second.log"
    status, lines = ended(command(training, log)), said(log)
    refused = status == 1 and len(lines) == 1 and "another process is training into this folder" in lines[0]
    wrong = [] if refused else [f"exit {status}, said {lines}"]
    assert ended(first) == 0, training.log()
    wrong += asked(lambda: differences(training, bench.whole[training.shape.name]), bench.folder / "asked.log")
    # Three at once, each with a free name of its own.
    other = Training(bench.folder / "free", SHAPES[0]._replace(epochs=1), bench.data)
    logs = [bench.folder / f"free{i}.log" for i in range(3)]
    codes = [ended(pid) for pid in [command(other, each, exist_ok=False) for each in logs]]
    if codes != [0, 0, 0]:
        wrong.append(f"of three at once, exit {codes}: {[said(each) for each in logs]}")
    found = asked(
        lambda: [path.name for path in sorted((bench.folder / "free").glob("run*"))], bench.folder / "asked.log"
    )
    return wrong + ([] if found == ["run", "run-2", "run-3"] else [f"folders {found}"])


# The table -----------------------------------------------------------------------------------------------------------


def row(kind: str, tallies: list[Tally]) -> dict[str, Any]:
    """What so many kills came to."""
    killed = [tally for tally in tallies if tally.killed]
    counts = {name: sum(tally.went_on == name for tally in killed) for name in ("resumed", "anew", "done")}
    return {
        "kind": kind,
        "kills": len(killed),
        "too_late": len(tallies) - len(killed),
        "left_temporary_files": sum(bool(tally.leftover) for tally in killed),
        "most_lost_s": round(max((tally.lost_s for tally in killed), default=0.0), 2),
        "most_lost_steps": max((tally.lost_steps for tally in killed), default=0),
        **counts,
        "wrong": [words for tally in tallies for words in tally.wrong],
    }


def main() -> int:
    """Everything, or what is named by only=; exit status 1 if anything did not hold."""
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    only = given.get("only", "training,terms,sweeps,disks,neighbours").split(",")
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        bench = Bench(Path(given.get("folder", temporary)), seed=int(given.get("seed", 0)))
        rows: list[dict[str, Any]] = []
        if "training" in only:
            tallies = trainings(bench, kills=int(given.get("kills", 50)))
            rows += [row(f"kill -9, {kind}", [t for t in tallies if t.kind == kind]) for kind in KINDS]
        if "terms" in only:
            rows.append(row("SIGTERM", trainings(bench, kills=int(given.get("terms", 10)), number=signal.SIGTERM)))
        others: dict[str, Callable[[], list[str]]] = {}
        if "sweeps" in only:
            for i in range(int(given.get("sweeps", 3))):
                what = ("sweep", "trial", "both")[i % 3]
                others[f"sweep, kill -9 of {what}, {i}"] = lambda what=what, i=i: kill_a_sweep(bench, what, i)
        if "disks" in only:
            for size in (1, 20):
                others[f"disk of {size} MB"] = lambda size=size: full_disk(bench, size, others=False)
            others["disk of 40 MB, filled by others"] = lambda: full_disk(bench, 40, others=True)
            others["read-only folder"] = lambda: read_only(bench)
        if "neighbours" in only:
            others["several processes, one folder"] = lambda: neighbours(bench)
        for kind, holds in others.items():
            rows.append({"kind": kind, "wrong": holds()})
            print(rows[-1], file=sys.stderr, flush=True)
    say(rows, given.get("format", "text"))
    return 1 if any(words for each in rows for words in each["wrong"] if not words.startswith("skipped")) else 0


def say(rows: list[dict[str, Any]], style: str) -> None:
    """A line per kind, or JSON."""
    if style == "json":
        print(json.dumps(rows, indent=1))
        return
    print(f"{'kind':32} kills  lost at most     resumed equal, anew, done")
    for each in rows:
        wrong = f"  WRONG: {'; '.join(each['wrong'])}" if each["wrong"] else ""
        if "kills" in each:
            lost = f"{each['most_lost_s']:.2f} s, {each['most_lost_steps']} steps"
            went_on = f"{each['resumed']}, {each['anew']}, {each['done']}"
            print(f"{each['kind']:32} {each['kills']:5}  {lost:15}  {went_on}{wrong}")
        else:
            print(f"{each['kind']:32} {wrong.strip() or 'holds'}")


if __name__ == "__main__":
    sys.exit(main())
