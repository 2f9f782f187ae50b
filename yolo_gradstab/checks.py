"""What is installed, what of it was tested, and what works on this machine: `yolo-gradstab checks`."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import msgspec
import torch
import ultralytics
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import SETTINGS
from ultralytics.utils.checks import parse_version
from ultralytics.utils.torch_utils import get_cpu_info

from yolo_gradstab.host import TESTED, changed_methods
from yolo_gradstab.runs import versions

__all__ = ["Check", "run_checks"]

# The host's setting, and the module that has to be there.
TRACKERS = {
    "tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "comet": "comet_ml", "clearml": "clearml",
    "dvc": "dvclive",
}  # fmt: skip


class Check(msgspec.Struct):
    """One thing looked at: what it is, what was found, and whether that is as it should be.

    Attributes:
        ok: None where neither is wrong.
    """

    name: str
    found: str
    ok: bool | None = None


def run_checks() -> list[Check]:
    """Look at versions, the host's code, devices and what is optional; nothing is trained or downloaded."""
    return [*_versions(), _host(), *_devices(), *_optional()]


def _versions() -> list[Check]:
    checks = []
    for name, version in versions().items():
        if name not in TESTED:
            checks.append(Check(name, version))
            continue
        oldest, newest = TESTED[name]
        parts = newest.count(".") + 1  # of Python 3.11.7 the first two numbers are compared
        ok = parse_version(oldest)[:parts] <= parse_version(version)[:parts] <= parse_version(newest)[:parts]
        checks.append(Check(name, f"{version} (tested {oldest} to {newest})", ok))
    return checks


def _host() -> Check:
    changed = changed_methods(BaseTrainer)
    if not changed:
        return Check("trainer", f"the code of Ultralytics {ultralytics.__version__} is known", ok=True)
    return Check("trainer", f"not as tested: {', '.join(changed)} of Ultralytics {ultralytics.__version__}", ok=False)


def _devices() -> list[Check]:
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    # MuSGD's orthogonalisation computes in bf16, which a CPU without it has to emulate.
    flags: Any = torch.cpu
    has_bf16 = any(getattr(flags, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    slow = "" if has_bf16 else "; no bf16 units, so MuSGD is slow"
    checks = [Check("cpu", f"{get_cpu_info()}, {threads}{slow}")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = "fp16 and bf16" if torch.cuda.is_bf16_supported() else "fp16, no bf16"
        checks.append(Check(f"cuda:{index}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}", ok=True))
    if not torch.cuda.device_count():
        mps = torch.backends.mps.is_available()
        checks.append(Check("gpu", "mps, untested" if mps else "none; everything runs on the CPU"))
    return checks


def _optional() -> list[Check]:
    has_ray = importlib.util.find_spec("ray") is not None
    ray = " and on a Ray cluster" if has_ray else '; on a cluster with pip install "yolo-gradstab[ray]"'
    on = [name for name, module in TRACKERS.items() if SETTINGS.get(name) and importlib.util.find_spec(module)]
    return [
        Check("sweeps", f"on this machine{ray}"),
        Check("trackers", f"{', '.join(on)} will log every run" if on else "none is both installed and switched on"),
    ]
