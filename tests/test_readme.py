"""The README's snippets run as they stand, in order, in a folder that holds nothing but `configs/` and `datasets/`.

A command that names data of the reader's own, or that takes long, gets words of ours after it, which win: `EXTRA` says
which. Every line of every block is run, or named in `NOT_RUN` with the reason.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, DrawnSet

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# Blocks that show what is printed or where files lie; by how they begin.
SHOWN = ("task    clip", "config.yaml  ", "error: ", "yolo_gradstab/\n", "                      ")
NOT_RUN = {
    "make": "CI runs `make lint` and `make test`, a fresh clone `make demo`; the others are named in the Makefile",
    "source": "this is the environment already",
    "git": "a clone of this",
    "pip": "nothing is installed in a test",
    ".venv/bin/pre-commit": "it writes a hook into the repository",
}
SMALL = "epochs=1 imgsz=64"
EXTRA = {
    "pose train": SMALL,
    "resume=": "",
    "lr-range": "data=datasets/sample_detect/data.yaml imgsz=64 batch=8 steps=20",
    "sweep": "grid.lr0=[0.01] seeds=[0] train.epochs=1 train.imgsz=64",
    "data check": "coco=datasets/sample_detect/annotations/instances_val.json images=datasets/sample_detect/images/val",
    "data convert": (
        "coco=datasets/sample_detect/annotations/instances_val.json images=datasets/sample_detect/images/val out=labels"
    ),
}


def commands() -> list[str]:
    lines = [
        line for kind, block in BLOCKS if kind == "" and not block.startswith(SHOWN) for line in block.splitlines()
    ]
    bare = [re.sub(r"\s#.*$", "", line).strip() for line in lines]
    return [re.sub(r"\s*\[[^\]]*\]$", "", re.sub(r"\s\[\w+=[^\]]*\]", "", line)) for line in bare if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "datasets", folder / "datasets", ignore=shutil.ignore_patterns("sample_*", "*.cache"))
    for file in (ROOT / "datasets").glob("*.yaml"):
        shutil.copy(file, folder / "datasets")
    here = f"from ultralytics import settings; settings.update({{'runs_dir': {str(folder / 'runs')!r}}})"
    assert run([sys.executable, "-c", here], folder).returncode == 0  # as where the environment lies in the clone
    pose = DrawnSet(folder / "pose", "pose")
    (folder / "my_pose.yaml").write_text(pose.coco.read_text() + f"\npath: {pose.coco.parent}\n")
    return folder


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_CURRENT_TEST", None)  # the host's own tests keep their runs elsewhere
    environment["YOLO_CONFIG_DIR"] = str(folder / "settings")  # where the host keeps the place of its runs
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_command_works(folder: Path) -> None:
    ran = []
    for line in commands():
        first, *rest = shlex.split(line)
        if first in NOT_RUN:
            continue
        assert first == "yolo-gradstab", f"{line!r} is neither run nor named in NOT_RUN"
        extra = next((more for part, more in EXTRA.items() if f" {part}" in f" {' '.join(rest)}"), "").split()
        given = {word.partition("=")[0] for word in extra}
        words = [word for word in rest if word.partition("=")[0] not in given or "=" not in word]
        if rest[0] == "replay":  # an incident is in none of the runs here, which are sound
            words = ["replay", str(an_incident(folder))]
        done = run([sys.executable, "-m", "yolo_gradstab", *words, *extra], folder)
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
        ran.append(rest[0])
    assert set(ran) >= {"detect", "pose", "report", "diagnose", "replay", "data", "lr-range", "sweep"}
    status = json.loads((folder / "runs/detect/train/gradstab/status.json").read_text())
    assert status["outcome"] == "completed"


def an_incident(folder: Path) -> Path:
    words = "detect train data=datasets/sample_detect/data.yaml model=configs/models/yolo26-tiny.yaml epochs=3 imgsz=64"
    words += (
        " lr0=1.0 momentum=0.98 batch=4 nbs=4 optimizer=SGD warmup_epochs=0 clip=none guard.divergence=off name=lost"
    )
    run([sys.executable, "-m", "yolo_gradstab", *words.split()], folder)
    return next((folder / "runs/detect/lost/gradstab/incidents").iterdir())


def test_every_python_block_works(folder: Path) -> None:
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert len(blocks) >= 2
    if not (folder / "datasets/sample_detect").exists():
        run([sys.executable, "-m", "yolo_gradstab", "data", "sample", "out=datasets/sample_detect"], folder)
    loop = """
import torch

class Model(torch.nn.Linear):
    def forward(self, batch):
        return super().forward(batch).square().mean()

model = Model(4, 1)
batches = torch.randn(5, 8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
    for block in blocks:
        done = run([sys.executable, "-c", block if "YOLO(" in block else loop + block], folder)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
        if "read_run" in block:
            steps = re.search(r"shape: \((\d+), \d+\)", done.stdout)
            assert steps and 3 <= int(steps[1]) <= 12  # of 12 batches, fewer where gradients are accumulated


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / path).exists(), path


def test_configs_that_are_named_exist() -> None:
    named = set(re.findall(r"configs/[\w/.-]+\.yaml", README))
    assert named
    for path in named:
        assert yaml.safe_load((ROOT / path).read_text()), path
