"""Which rooms load what: each claim in a fresh interpreter, with a control that the check can fail."""

import json
import subprocess
import sys

import pytest

READS_RESULTS = [
    "yolo_gradstab", "yolo_gradstab.config", "yolo_gradstab.runs", "yolo_gradstab.telemetry",
    "yolo_gradstab.figures", "yolo_gradstab.report", "yolo_gradstab.sweep", "yolo_gradstab.cli",
    "yolo_gradstab.coco", "yolo_gradstab.guard", "yolo_gradstab.comparison",
    "yolo_gradstab.stats", "yolo_gradstab.executors", "yolo_gradstab.trial", "yolo_gradstab.diagnosis",
    "yolo_gradstab.incident", "yolo_gradstab.localisation", "yolo_gradstab.replay",
    "yolo_gradstab.audit", "yolo_gradstab.trackers", "yolo_gradstab.usage",
]  # fmt: skip
NUMERICS = ["yolo_gradstab.norms", "yolo_gradstab.clipping", "yolo_gradstab.snapshot"]


def loaded(modules: list[str]) -> dict[str, list[str]]:
    """What of torch and the host is there after each was imported in turn: the first that brings it shows."""
    code = (
        "import importlib, json, sys\nafter = {}\n"
        f"for module in {modules}:\n    importlib.import_module(module)\n"
        "    after[module] = [m for m in ('torch', 'ultralytics') if m in sys.modules]\n"
        "print(json.dumps(after))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_reading_results_loads_neither_torch_nor_the_host() -> None:
    assert loaded(READS_RESULTS) == {key: [] for key in READS_RESULTS}


def test_the_numerics_load_torch_alone() -> None:
    assert loaded(NUMERICS) == {key: ["torch"] for key in NUMERICS}


@pytest.mark.parametrize("module", ["yolo_gradstab.trainer", "yolo_gradstab.mitigations"])
def test_the_trainer_loads_both(module: str) -> None:
    """The control: it would be seen."""
    assert loaded([module]) == {module: ["torch", "ultralytics"]}


def test_public_names_resolve() -> None:
    import yolo_gradstab

    for name in yolo_gradstab.__all__:
        assert callable(getattr(yolo_gradstab, name))
    with pytest.raises(AttributeError, match="no attribute 'clip_polisy'"):
        yolo_gradstab.clip_polisy  # noqa: B018
