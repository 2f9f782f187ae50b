"""Gradient sight and clipping for Ultralytics YOLO.

Public names are resolved when first used, so that reading results needs neither torch nor ultralytics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolo_gradstab.clipping import clip_update_
    from yolo_gradstab.config import Config, ConfigError, clip_policy, load_config
    from yolo_gradstab.report import build_report
    from yolo_gradstab.sweep import run_sweep
    from yolo_gradstab.telemetry import read_run
    from yolo_gradstab.trainer import trainer_for

__all__ = [
    "Config",
    "ConfigError",
    "build_report",
    "clip_policy",
    "clip_update_",
    "load_config",
    "read_run",
    "run_sweep",
    "trainer_for",
]

_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "build_report": "report",
    "clip_policy": "config",
    "clip_update_": "clipping",
    "load_config": "config",
    "read_run": "telemetry",
    "run_sweep": "sweep",
    "trainer_for": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
