"""`yolo_gradstab.bench`: it prints what the contract says, and the guard's figures are of what was timed."""

import json
import time
from typing import Any

import pytest
from conftest import MODELS
from ultralytics.nn.tasks import DetectionModel

from yolo_gradstab.bench import run_bench
from yolo_gradstab.cli import main
from yolo_gradstab.snapshot import Snapshot

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]

TINY = str(MODELS / "yolo26-tiny.yaml")


def test_every_case_has_its_figures_and_nothing_else_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "format=json", f"model={TINY}", "rounds=10"]) == 0
    cases = {case["case"]: case for case in json.loads(capfd.readouterr().out)["cases"]}
    assert cases.keys() >= {"clip_part", "optimizer_step", "update_clip", "per_parameter_item", "guard"}
    for case in cases.values():
        assert 0 < case["low"] <= case["ratio"] <= case["high"]
        assert case["median_ms"] > 0
    # Weights and buffers of the model and its EMA, and SGD's momentum. The drawn set has three classes.
    model = DetectionModel(TINY, nc=3, verbose=False)
    state, momentum = (sum(t.nbytes for t in tensors) for tensors in (model.state_dict().values(), model.parameters()))
    assert cases["guard"]["snapshot_mib"] == pytest.approx((2 * state + momentum) / 2**20, abs=0.1)


def test_the_guards_ratio_is_that_of_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is made to take two seconds: a step is a twentieth of that longer, late in a run a two-hundredth."""
    take = Snapshot.take

    def slow(*args: Any, **kwargs: Any) -> Snapshot:
        time.sleep(2)
        return take(*args, **kwargs)

    monkeypatch.setattr(Snapshot, "take", slow)
    guard = next(case for case in run_bench(TINY, rounds=3)["cases"] if case["case"] == "guard")
    assert guard["snapshot_ms"] == pytest.approx(2000, rel=0.05)
    off_ms = guard["median_ms"] - 2000 / 20
    assert guard["ratio"] == pytest.approx(guard["median_ms"] / off_ms, rel=0.05)
    assert guard["late_ratio"] == pytest.approx((off_ms + 2000 / 200) / off_ms, rel=0.05)
