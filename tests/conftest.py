"""Small real data and models for the tests that train; nothing here downloads."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before the host is imported: it reads these once. The settings are nobody's own, here and in the processes of a test.
SETTINGS = tempfile.mkdtemp(prefix="gradstab-settings-")
atexit.register(shutil.rmtree, SETTINGS, ignore_errors=True)
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": SETTINGS}
# Tiny tensors are slower on many threads, in the processes of a test too, and test machines are shared.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# A shell starts what runs in its background with SIGINT ignored, and every process of a test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "configs" / "models"
TINY = {"detect": MODELS / "yolo26-tiny.yaml", "pose": MODELS / "yolo26-tiny-pose.yaml"}


class DrawnSet:
    """A drawn set in COCO form, and the same labels in YOLO form for the stock trainer."""

    def __init__(self, folder: Path, task: str, *, images: int = 24, size: int = 64, model: Path | None = None) -> None:
        from yolo_gradstab.coco.sample import draw_sample, label_sample

        self.task = task
        drawn_as = "pose" if task == "pose" else "detect"  # whose objects have outlines too
        self.coco = draw_sample(folder, task=drawn_as, images=images, size=size)
        self.yolo = label_sample(self.coco, task=task)
        self.model = model or TINY["pose" if task == "pose" else "detect"]

    def arguments(self, folder: Path, **more: Any) -> dict[str, Any]:
        """Arguments of a run of seconds: 16 images, 4 batches an epoch."""
        return {
            "model": str(self.model),
            "data": str(self.coco),
            "epochs": 2,
            "imgsz": 32,
            "batch": 4,
            "nbs": 4,
            "optimizer": "SGD",
            "lr0": 0.01,
            "device": "cpu",
            "workers": 0,
            "plots": False,
            "verbose": False,
            "close_mosaic": 0,
            "project": str(folder),
            "exist_ok": True,
            **more,
        }


class InterruptionError(Exception):
    """Stands for any end of the process between two epochs."""


def train(cls: type, arguments: dict[str, Any], **callbacks: Callable[[Any], None]) -> Any:
    """Train with a trainer class, and callbacks by their events."""
    trainer = cls(overrides=dict(arguments))
    for event, callback in callbacks.items():
        trainer.add_callback(event, callback)
    trainer.train()
    return trainer


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DrawnSet]:
    """The drawn sets by task, with models whose checkpoints are soon written."""
    models = {task: ROOT / "tests" / "models" / f"toy-{task}.yaml" for task in ("detect", "pose")}
    return {task: DrawnSet(tmp_path_factory.mktemp(task), task, model=model) for task, model in models.items()}


@pytest.fixture(scope="session", autouse=True)
def no_tuner() -> None:
    """Where Ray is installed the host imports it before it trains, which takes seconds of each process."""
    from ultralytics import settings

    settings.update(raytune=False)


def pytest_sessionfinish() -> None:
    """What is frozen would never be freed, which extensions take for a leak."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """Every training collects garbage five times: half a second each, but for what the imports left being put aside."""
    yield
    if len(gc.get_objects()) > 100_000:
        gc.collect()
        gc.freeze()
