"""Going back in real runs, in the conditions that training meets: fp16 and bf16, accumulation, a mosaic that was
closed, a time limit, the first warm-up, a resume, and beside the host's own recovery from NaN.

Restored states are compared bit for bit with those that the run had then.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import TINY, DrawnSet
from test_trainer import (
    BadImage,
    InterruptionError,
    assert_same_state,
    assert_same_training,
    blowing_up,
    faulty,
    in_bfloat16,
    train,
)
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_gradstab import read_run, trainer_for

pytestmark = pytest.mark.filterwarnings("default")  # the host's own warnings are not ours to fail on


def scaling(init_scale: float) -> Callable[[Any], None]:
    """The scaler of fp16 training, which torch also has for the CPU."""

    def use(trainer: Any) -> None:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

    return use


def rollbacks(folder: Path) -> list[tuple[int, int]]:
    """At which step, and to which."""
    return [(event["step"], event["to_step"]) for event in read_run(folder).events if event["event"] == "rollback"]


def test_under_fp16_the_scale_goes_back_too_and_the_mosaic_stays_closed(
    drawn: dict[str, DrawnSet], tmp_path: Path
) -> None:
    mosaics: list[int] = []  # of each batch

    def count(trainer: Any) -> None:
        mosaics.append(trainer.train_loader.dataset.transforms.transforms[0].transforms[0].p)

    cls = blowing_up(faulty(trainer_for("detect"), float("inf"), at=5), 15)
    arguments = drawn["detect"].arguments(tmp_path, name="run", epochs=5, close_mosaic=3, val=False)
    train(cls, arguments, on_train_start=scaling(1024.0), on_train_batch_end=count)
    assert_same_state(cls.after[15], cls.after[-1])  # type: ignore[attr-defined]
    run = read_run(tmp_path / "run")
    assert run.status.outcome == "completed"
    assert rollbacks(tmp_path / "run") == [(15, 0)]
    assert run.steps.filter(pl.col("skipped"))["step"].to_list() == [5, 15]
    assert run.steps["scale"].to_list() == [1024] * 6 + [512] * 10 + [1024] * 4
    assert mosaics == [1] * 8 + [0] * 12


def test_under_bf16_with_accumulation_and_adamw(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    cls = blowing_up(trainer_for("detect"), 12)
    arguments = drawn["detect"].arguments(tmp_path, name="run", epochs=7, nbs=8, warmup_epochs=0, val=False)
    train(cls, arguments | {"optimizer": "AdamW", "lr0": 0.001}, on_train_start=in_bfloat16)
    assert_same_state(cls.after[12], cls.after[-1])  # type: ignore[attr-defined]
    run = read_run(tmp_path / "run")
    assert (run.status.outcome, rollbacks(tmp_path / "run")) == ("completed", [(12, 0)])
    assert run.steps["images"].to_list() == [8] * 14
    assert run.steps["batch"].to_list() == list(range(1, 28, 2))
    a, b = (cls.after[step]["tensors"] for step in (12, 13))  # type: ignore[attr-defined]
    assert any(not torch.equal(a[name], b[name]) for name in a)  # it trains on


@pytest.mark.parametrize("max_rollbacks", [1, 0])
def test_in_a_run_of_limited_time(
    drawn: dict[str, DrawnSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_rollbacks: int
) -> None:
    """The host estimates its epochs anew after each, and says after each step whether to stop, by this clock."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("ultralytics.engine.trainer.time", SimpleNamespace(time=lambda: float(next(ticks))))
    rates: dict[int, float] = {}

    def keep(trainer: Any) -> None:
        rates[trainer._step - 1] = trainer.optimizer.param_groups[trainer._main_group]["lr"]

    cls = blowing_up(trainer_for("detect", {"guard.max_rollbacks": max_rollbacks}), 13)
    arguments = drawn["detect"].arguments(tmp_path, name="run", time=40 / 3600, warmup_epochs=1, val=False)
    trainer = train(cls, arguments, on_train_batch_end=keep)
    assert_same_state(cls.after[13], cls.after[-1])  # type: ignore[attr-defined]
    run = read_run(tmp_path / "run")
    if max_rollbacks == 0:
        assert (run.status.outcome, run.status.divergence, len(run.steps)) == ("diverged", "blowup", 14)
        return
    assert (run.status.outcome, rollbacks(tmp_path / "run")) == ("completed", [(13, 0)])
    assert next(ticks) > 40 and len(run.steps) > 18
    assert trainer.epochs > 2  # as estimated, not as given
    used = {step: lr for step, lr in run.steps.select("step", "lr").iter_rows() if step > 13 and step in rates}
    warmup = {14 + i: (1 + i) / 4 for i in range(4)}  # made again
    assert used == pytest.approx({step: 0.5 * rates[step] * warmup.get(step, 1) for step in used}, rel=1e-6)


def test_in_the_first_warm_up_and_not_against_the_hosts_own_recovery(
    drawn: dict[str, DrawnSet], tmp_path: Path
) -> None:
    """With `guard.nonfinite=off` a NaN is applied by nobody: it is a divergence, and gone back from at once.

    Each is in the last batch of its epoch: stock would load last.pt and make the whole second epoch again.
    """

    class Bad(BadImage, trainer_for("detect", {"guard.nonfinite": "off"})):  # type: ignore[misc]
        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            self.from_step = self.to_step = self._step if self._step in {3, 7} else -1
            return super().preprocess_batch(batch)

    cls = blowing_up(Bad)
    train(cls, drawn["detect"].arguments(tmp_path, name="run", epochs=4))
    for step in (3, 7):
        assert_same_state(cls.after[step], cls.after[-1])  # type: ignore[attr-defined]
    run = read_run(tmp_path / "run")
    assert (run.status.outcome, rollbacks(tmp_path / "run")) == ("completed", [(3, 0), (7, 0)])
    assert set(run.steps["attempt"]) == {0}
    assert len(run.steps) == 16
    # The host's warm-up is twelve steps; ours begins again at each rollback.
    schedule = [0.01 * ((1 - epoch / 4) * 0.99 + 0.01) for epoch in run.steps["epoch"]]
    factors = [i / 12 for i in range(4)] + [0.5 * i / 12 for i in range(1, 5)] + [0.25 * i / 12 for i in range(1, 9)]
    factors[7] = 0.5 * 4 / 12  # of the step that was not made
    assert run.steps["lr"].to_list() == pytest.approx(list(np.multiply(schedule, factors)), rel=1e-6)
    for name, value in cls.after[15]["tensors"].items():  # type: ignore[attr-defined]
        assert value.isfinite().all() or name.startswith("policy."), name


def test_an_fp16_scaler_that_looks_for_its_scale_is_no_divergence(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    """Nor where `guard.nonfinite` is off: the scaler itself leaves those steps out, as in stock."""
    # The loss of the set's own model overflows one step less at this scale.
    arguments = drawn["detect"].arguments(tmp_path, val=False, epochs=4, model=str(TINY["detect"]))
    start = scaling(2.0**125)  # at which the loss itself overflows
    ours = train(trainer_for("detect", {"guard.nonfinite": "off"}), arguments | {"name": "ours"}, on_train_start=start)
    yolo = {"name": "stock", "data": str(drawn["detect"].yolo)}
    stock = train(DetectionTrainer, arguments | yolo, on_train_start=start)
    assert_same_training(ours, stock)
    assert ours.scaler.state_dict() == stock.scaler.state_dict()
    run = read_run(tmp_path / "ours")
    overflowed = [event["step"] for event in run.events]
    assert overflowed[:3] == [0, 1, 2] and len(overflowed) < 16
    assert {(event["event"], event["reason"]) for event in run.events} == {("nonfinite", "scaler_overflow")}
    assert run.steps.filter(pl.col("skipped"))["step"].to_list() == overflowed
    assert run.status.outcome == "completed"


def test_a_bad_image_is_not_in_the_state_that_is_kept(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    """It is in BatchNorm's statistics as soon as the model has seen it, before its step is judged and left out."""
    bad = type("Bad", (BadImage, trainer_for("detect")), {"from_step": 0, "to_step": 0})
    cls = blowing_up(bad, 11)
    train(cls, drawn["detect"].arguments(tmp_path, name="run", epochs=3, val=False))
    assert rollbacks(tmp_path / "run") == [(11, 0)]
    assert_same_state(cls.after[11], cls.after[-1])  # type: ignore[attr-defined]
    model = {name: t for name, t in cls.after[11]["tensors"].items() if name.startswith("model.")}  # type: ignore[attr-defined]
    assert [name for name, tensor in model.items() if not tensor.isfinite().all()] == []


def test_what_the_host_recovers_to_is_trained_on_at_the_lowered_rates(
    drawn: dict[str, DrawnSet], tmp_path: Path
) -> None:
    """A fitness of NaN is the host's to judge: it loads last.pt and makes the epoch, in which we went back, again."""

    class Unfit(trainer_for("detect")):  # type: ignore[misc]
        recovered: dict[str, torch.Tensor] | None = None

        def validate(self) -> Any:
            metrics, fitness = super().validate()
            return metrics, float("nan") if self._step == 16 else fitness

        def _handle_nan_recovery(self, epoch: int) -> bool:
            if self._step == 16:
                self._snapshots.add(self._snapshot())  # in the epoch that is thrown away, and the next makes it good
                self._snapshots.add(self._snapshot())
            done = bool(super()._handle_nan_recovery(epoch))
            if done:
                assert self._snapshots.good is None and self._snapshots._candidate is None
                self.recovered = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            return done

    cls = blowing_up(Unfit, 15)
    trainer = train(cls, drawn["detect"].arguments(tmp_path, name="run", epochs=5))
    run = read_run(tmp_path / "run")
    assert (run.status.outcome, rollbacks(tmp_path / "run")) == ("completed", [(15, 0)])
    assert run.steps["epoch"].to_list() == [e for e in (0, 1, 2, 3, 3, 4) for _ in range(4)]
    assert run.steps["attempt"].to_list() == [0] * 16 + [1] * 8
    averaged = cls.after[11]["tensors"]  # type: ignore[attr-defined]  # what last.pt held, in half precision
    assert trainer.recovered is not None
    good = trainer._snapshots.good  # of the start of the epoch that was made again
    assert (good.step, good.others["batch"]) == (16, 11)
    for name, tensor in trainer.recovered.items():
        assert torch.equal(tensor, averaged[f"ema.{name}"].half().to(tensor.dtype)), name
    # The clock went back to the epoch's start, and with it the warm-up of twelve steps that is made again.
    schedule = [0.01 * ((1 - epoch / 5) * 0.99 + 0.01) for epoch in (3, 4) for _ in range(4)]
    expected = [0.5 * lr * i / 12 for i, lr in enumerate(schedule)]
    assert run.steps["lr"][16:].to_list() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_resume_after_going_back_equals_the_uninterrupted_run_and_can_go_back(
    drawn: dict[str, DrawnSet], tmp_path: Path
) -> None:
    def interrupt(trainer: Any) -> None:
        if trainer.epoch == 5:
            raise InterruptionError

    arguments = drawn["detect"].arguments(tmp_path, epochs=7, val=False)
    whole = train(blowing_up(trainer_for("detect"), 15), arguments | {"name": "whole"})
    with pytest.raises(InterruptionError):
        interrupted = blowing_up(trainer_for("detect"), 15)
        train(interrupted, arguments | {"name": "parts"}, on_train_epoch_end=interrupt)
    shutil.copytree(tmp_path / "parts", tmp_path / "again")
    # The checkpoint is that of step 20, in the midst of the warm-up that is made again.
    resumed = YOLO(tmp_path / "parts/weights/last.pt")
    resumed.train(resume=True, trainer=trainer_for("detect"))
    assert_same_training(resumed.trainer, whole)
    assert (resumed.trainer._watch, resumed.trainer._health) == (whole._watch, whole._health)
    assert torch.equal(resumed.trainer._zero_steps, whole._zero_steps)
    a, b = (read_run(tmp_path / name) for name in ("whole", "parts"))
    assert a.steps.drop("time_s").equals(b.steps.drop("time_s"))
    assert a.steps["lr"][20] == pytest.approx(0.5 * 5 / 12 * 0.01 * ((1 - 5 / 7) * 0.99 + 0.01), rel=1e-6)
    assert rollbacks(tmp_path / "whole") == rollbacks(tmp_path / "parts") == [(15, 0)]
    assert b.status.outcome == "completed"

    # No snapshot of the run before is in memory: it goes back to the checkpoint, in its first steps if need be.
    class Swelling(trainer_for("detect")):  # type: ignore[misc]
        def optimizer_step(self) -> None:
            if self._step == 20:
                next(b for n, b in self.model.named_buffers() if n.endswith("running_var")).fill_(1e9)
            super().optimizer_step()

    again = blowing_up(Swelling)
    YOLO(tmp_path / "again/weights/last.pt").train(resume=True, save_dir=str(tmp_path / "again"), trainer=again)
    assert_same_state(again.after[19], interrupted.after[19])  # type: ignore[attr-defined]
    assert_same_state(again.after[21], again.after[19])  # type: ignore[attr-defined]
    run = read_run(tmp_path / "again")
    assert (run.status.outcome, rollbacks(tmp_path / "again")) == ("completed", [(15, 0), (21, 20)])
    assert [event["lr_factor"] for event in run.events if event["event"] == "rollback"] == [0.5, 0.25]
    assert len(run.steps) == 28


def test_a_run_without_a_clip_that_went_back_has_stocks_from_there_on_also_when_resumed(
    drawn: dict[str, DrawnSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(trainer: Any) -> None:
        if trainer.epoch == 5:
            raise InterruptionError

    monkeypatch.setattr("yolo_gradstab.trainer.LARGEST_UNCLIPPED_RATIO", 0.012)
    config = {"clip": "none", "guard.backoff": 0.8, "telemetry.layers_every": 1}
    with pytest.raises(InterruptionError):
        arguments = drawn["detect"].arguments(tmp_path, name="run", epochs=7, lr0=0.05, val=False)
        train(blowing_up(trainer_for("detect", config), 15), arguments, on_train_epoch_end=interrupt)
    YOLO(tmp_path / "run/weights/last.pt").train(resume=True, trainer=trainer_for("detect", config))
    run = read_run(tmp_path / "run")
    (back,) = [event for event in run.events if event["event"] == "rollback"]
    # Its updates, several times the 0.01 aimed at, would be four backoffs and more, and what is believed of them one.
    moved = run.layers.filter(pl.col("step") < 15, pl.col("weight_norm") > 0).group_by("step")
    assert moved.agg(pl.col("update_ratio").median())["update_ratio"].max() > 0.02
    assert (back["step"], back["lr_factor"], back["clip"]) == (15, 0.8, "norm")
    norms, coefs = run.steps["total_norm"].to_list(), run.steps["clip_coef"].to_list()
    assert (coefs[:16], max(norms[:15]) > 10) == ([1.0] * 16, True)
    assert coefs[16:] == pytest.approx([min(1, 10 / norm) for norm in norms[16:]], rel=1e-4)
    assert (len(coefs), min(coefs[16:20]) < 1, min(coefs[20:]) < 1) == (28, True, True)  # the resume begins at step 20
    assert run.config["clip"] == {"policy": "none"}  # as it was asked for


def test_a_bound_that_alone_holds_the_updates_back_is_given_stocks_clip_beside_it(
    drawn: dict[str, DrawnSet], tmp_path: Path
) -> None:
    found: dict[str, Any] = {}
    for name, keys in {
        "alone": {"clip": "none"},
        "watched": {"clip": "none", "guard.divergence": "off"},
        "clipped": {"clip": "norm"},
    }.items():
        arguments = drawn["detect"].arguments(tmp_path, name=name, epochs=5, lr0=1.0, val=False)
        train(trainer_for("detect", {"update_clip": 0.03, **keys}), arguments)
        found[name] = read_run(tmp_path / name)
    kinds = {
        name: [(event["event"], event["kind"]) for event in run.events if "kind" in event]
        for name, run in found.items()
    }
    assert kinds["alone"][:2] == [("warning", "unbounded_ratio"), ("rollback", "unbounded_ratio")]
    assert kinds["watched"] == [("warning", "unbounded_ratio")]
    assert not any(kind == "unbounded_ratio" for _, kind in kinds["clipped"])
    (back,) = [event for event in found["alone"].events if event["event"] == "rollback"]
    step = back["step"]
    assert (back["to_step"], back["lr_factor"], back["clip"]) == (0, 0.5, "norm")
    assert step == found["watched"].events[0]["step"] + 1  # a look is read with the next step's norm
    coefs, norms, shares = (
        found["alone"].steps[name].to_list() for name in ("clip_coef", "total_norm", "bounded_share")
    )
    assert coefs[: step + 1] == [1.0] * (step + 1)
    assert coefs[step + 1 :] == pytest.approx([min(1, 10 / norm) for norm in norms[step + 1 :]], rel=1e-4)
    assert min(shares[step - 10 : step]) > 0.5  # what the warning is about: most tensors were bounded
    assert found["alone"].steps["loss"].to_list()[:step] == found["watched"].steps["loss"].to_list()[:step]


def test_batches_that_the_host_has_drawn_are_kept_as_they_went_in(
    drawn: dict[str, DrawnSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `plots` its drawing scales pixels to 0..255 in place, in the midst of an accumulation too."""
    monkeypatch.setattr("ultralytics.utils.plotting.check_font", lambda font: None)  # which asks the network
    kept: list[list[tuple[float, bool]]] = []

    class Watching(trainer_for("detect")):  # type: ignore[misc]
        def optimizer_step(self) -> None:
            for thread in threading.enumerate():
                if "plot_images" in thread.name:  # the host draws in threads of its own
                    thread.join(timeout=60)
            kept.append([(float(b["img"].max()), torch.is_tensor(b["bboxes"])) for b in self._micro_batches])
            super().optimizer_step()

    def plotting(on: bool) -> Callable[[Any], None]:
        return lambda trainer: setattr(trainer.args, "plots", on)

    arguments = drawn["detect"].arguments(tmp_path, name="run", epochs=1, nbs=8, warmup_epochs=0, val=False)
    train(Watching, arguments, on_train_start=plotting(True), on_train_epoch_end=plotting(False))
    assert len(list((tmp_path / "run").glob("train_batch*.jpg"))) == 3
    assert [len(batches) for batches in kept] == [2, 2]
    assert all(largest <= 1 and tensors for batches in kept for largest, tensors in batches)
