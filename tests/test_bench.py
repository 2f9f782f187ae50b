"""`yolo_gradstab.bench`: it prints what the contract says, and the guard's figures are of what was timed."""

import itertools
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from conftest import MODELS
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from yolo_gradstab import bench, cli
from yolo_gradstab.bench import _figures, run_bench
from yolo_gradstab.cli import main
from yolo_gradstab.snapshot import Snapshot
from yolo_gradstab.trainer import GradstabMixin

pytestmark = pytest.mark.filterwarnings("default")

TINY = str(MODELS / "yolo26-tiny.yaml")


@pytest.mark.parametrize(
    ("rounds", "place"),  # of the lower end among the sorted, from 1: the exact table of the sign test
    [(3, 1), (5, 1), (6, 1), (9, 2), (10, 2), (12, 3), (20, 6), (60, 22)],
)
def test_an_interval_of_the_median_has_its_coverage(rounds: int, place: int) -> None:
    figures = _figures([float(i) for i in range(rounds, 0, -1)], [1.0] * rounds)
    assert (figures["low"], figures["high"]) == (place, rounds + 1 - place)
    outside = sum(math.comb(rounds, k) for k in range(place)) / 2**rounds  # the median lies below the lower end
    assert 1 - 2 * outside >= 0.95 or place == 1


@pytest.mark.slow
def test_without_blocks_only_parts_of_a_step_are_timed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "format=json", f"model={TINY}", "rounds=10", "blocks=0"]) == 0
    cases = {case["case"]: case for case in json.loads(capfd.readouterr().out)["cases"]}
    assert cases.keys() >= {"clip_part", "optimizer_step", "update_clip", "per_parameter_item", "histograms"}
    assert not cases.keys() & {"guard", "train_step", "train_step_bounded"}
    sizes = [p.numel() for p in YOLO(TINY).model.parameters() if p.requires_grad]
    assert (cases["clip_part"]["tensors"], cases["clip_part"]["parameters"]) == (len(sizes), sum(sizes))


@pytest.mark.slow
def test_every_case_has_its_figures_and_nothing_else_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["rounds=10", "blocks=3", "batch=[2,4]", "optimizer=AdamW", "imgsz=32"]
    assert main(["bench", "format=json", f"model={TINY}", *words]) == 0
    rows = json.loads(capfd.readouterr().out)["cases"]
    cases = {case["case"]: case for case in rows}
    others = {"per_parameter_item", "lightning_grad_norm", "composer_monitor", "histograms"}
    assert cases.keys() >= {"clip_part", "optimizer_step", "update_clip", "guard", "train_step"} | others
    steps = [(row["batch"], row["optimizer"], row["precision"]) for row in rows if row["case"] == "train_step"]
    assert steps == [(2, "AdamW", "fp32"), (4, "AdamW", "fp32")]
    assert {cases[name].get("source", "")[:10] for name in others - {"per_parameter_item"}} == {"arithmetic"}
    sizes = [p.numel() for p in YOLO(TINY).model.parameters() if p.requires_grad]
    assert (cases["clip_part"]["tensors"], cases["clip_part"]["parameters"]) == (len(sizes), sum(sizes))
    assert 0 < cases["clip_part"]["read_ms"] < cases["clip_part"]["median_ms"]
    for case in rows:
        assert 0 < case["low"] <= case["ratio"] <= case["high"]
        assert case["median_ms"] > 0
        if case["case"] == "train_step":
            assert case["added_low_ms"] <= case["added_ms"] <= case["added_high_ms"]
    # Weights and buffers of the model and its EMA, and SGD's momentum. The drawn set has three classes.
    model = DetectionModel(TINY, nc=3, verbose=False)
    state, momentum = (sum(t.nbytes for t in tensors) for tensors in (model.state_dict().values(), model.parameters()))
    assert cases["guard"]["snapshot_mib"] == pytest.approx((2 * state + momentum) / 2**20, abs=0.1)


@pytest.mark.slow
def test_the_guards_ratio_is_that_of_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is made to take two seconds: a step is a twentieth of that longer, late in a run a two-hundredth."""
    take = Snapshot.take

    def slow(*args: Any, **kwargs: Any) -> Snapshot:
        time.sleep(2)
        return take(*args, **kwargs)

    monkeypatch.setattr(Snapshot, "take", slow)
    guard = next(
        case
        for case in run_bench([TINY], rounds=3, blocks=1, batches=[2], imgsz=32)["cases"]
        if case["case"] == "guard"
    )
    assert guard["snapshot_ms"] == pytest.approx(2000, rel=0.05)
    off_ms = guard["median_ms"] - 2000 / 20
    assert guard["ratio"] == pytest.approx(guard["median_ms"] / off_ms, rel=0.05)
    assert guard["late_ratio"] == pytest.approx((off_ms + 2000 / 200) / off_ms, rel=0.05)


@pytest.mark.slow
def test_what_a_step_adds_is_what_lies_outside_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 ms more in our optimizer step, and 500 ms in everybody's forward pass."""

    def slower(cls: type, name: str, more_s: float) -> None:
        plain = getattr(cls, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(more_s)
            return plain(*args, **kwargs)

        monkeypatch.setattr(cls, name, slow)

    monkeypatch.setattr(bench, "BLOCK_STEPS", 2)
    slower(GradstabMixin, "optimizer_step", 0.05)
    slower(DetectionModel, "loss", 0.5)
    setting = {"batch": 2, "imgsz": 32, "optimizer": "SGD", "amp": False, "blocks": 3}
    rows = bench._compare_runs(TINY, "detect", **setting)
    assert rows["train_step"]["median_ms"] > 550
    assert rows["train_step"]["added_ms"] == pytest.approx(50, abs=15)


def test_waits_of_a_step_are_the_mean_of_a_block_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs: one that waits three times in each batch, one that waits but in every fourth."""
    waits: list[str] = []
    monkeypatch.setattr(bench, "_counted_syncs", lambda: nullcontext(waits))

    class Waiting:
        def __init__(self, per_batch: Callable[[int], int]) -> None:
            self.per_batch = per_batch
            self.callbacks: dict[str, Callable[[Any], None]] = {}

        def add_callback(self, event: str, callback: Callable[[Any], None]) -> None:
            self.callbacks[event] = callback

        def train(self) -> None:
            for batch in itertools.count():
                waits.append("between two batches, which is no part of a step")
                self.callbacks["on_train_batch_start"](self)
                waits.extend(["wait"] * self.per_batch(batch))
                self.callbacks["on_train_batch_end"](self)

    makers = {
        "ours": lambda: Waiting(lambda batch: 100 if batch < bench.BLOCK_STEPS else int(batch % 4 == 0)),
        "stock": lambda: Waiting(lambda _: 3),
    }
    assert bench._syncs_of_steps(makers) == {"ours": 0.25, "stock": 3}


def test_on_a_gpu_the_waits_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    figures = {"model": "yolo26n.yaml", "ratio": 1.0, "low": 0.9, "high": 1.1, "median_ms": 2.0}
    cases: list[dict[str, Any]] = [{"case": "update_clip", "syncs": 0, "stock_syncs": 0}, {"case": "none of them"}]
    cases.append({"case": "train_step", "batch": 16, "optimizer": "SGD", "precision": "bf16"})
    cases[-1] |= {"syncs": 7.5, "stock_syncs": 9}
    cli._print_bench({"machine": {"device": "a GPU", "threads": 1}, "cases": [case | figures for case in cases]})
    assert capfd.readouterr().out.splitlines()[-2:] == [
        "update_clip: waits for the GPU 0 times, stock 0",
        "train_step 16 SGD bf16: waits for the GPU 7.5 times, stock 9",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("rounds=3", "bench: rounds must be a whole number of at least 10, got 3"),
        ("blocks=1", "bench: blocks must be a whole number of at least 3 (or 0: no whole steps), got 1"),
        ("rounds=0", "bench: rounds must be a whole number of at least 10, got 0"),
        ("batch=[16,none]", "bench: batch must be a whole number of at least 1, or a list of them, got 'none'"),
        ("optimizer=Adam", "bench: optimizer must be one of SGD, AdamW, MuSGD, got 'Adam'"),
        ("precision=fp8", "bench: precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ("model=no-such.yaml", "bench: "),
    ],
)
def test_what_cannot_be_timed_is_one_line(capfd: pytest.CaptureFixture[str], words: str, line: str) -> None:
    assert main(["bench", words]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert line in said
