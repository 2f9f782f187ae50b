"""Two real processes over gloo: all ranks decide alike, and only rank 0 writes.

The host's own launcher starts them (`torch.distributed.run` on the file it generates), and its own loop trains. What it
cannot do on a CPU is patched in `OnTwoRanks`, and nothing else: it counts CUDA devices to know how many ranks there
are, puts each rank's model on one, averages with an operation that gloo lacks, and makes its final validation on one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import polars as pl
import pytest
import torch
from conftest import DrawnSet
from torch import distributed
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOCAL_RANK, RANK

from yolo_gradstab import read_run, trainer_for

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs a torch with gloo"),
]

RANKS = 2
TIMEOUT = timedelta(minutes=5)  # of one collective: a rank that waits for another fails instead of hanging


class OnTwoRanks(BaseTrainer):  # type: ignore[misc]
    """Mixed into a trainer: the host's DDP on a CPU."""

    # The host's constructor sets both from the number of CUDA devices.
    world_size = property(lambda self: RANKS, lambda self, value: None)
    ddp = property(lambda self: LOCAL_RANK == -1, lambda self, value: None)

    then: ClassVar[list[tuple[type, dict[str, Any]]]] = []  # other trainers and their arguments: a launch is slow

    def _setup_ddp(self) -> None:
        if distributed.is_initialized():
            return
        real_ddp, real_reduce = torch.nn.parallel.DistributedDataParallel, distributed.reduce

        def reduce(tensor: torch.Tensor, dst: int, op: Any) -> None:
            assert op == distributed.ReduceOp.AVG
            real_reduce(tensor, dst)
            tensor /= RANKS

        torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **more: real_ddp(model, **more)
        distributed.reduce = reduce
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", timeout=TIMEOUT, rank=RANK, world_size=RANKS)

    def final_eval(self) -> None:
        """Left out: it asks CUDA for the device of its rank."""

    def train(self) -> None:
        super().train()
        if self.ddp:
            return
        state = {"model": self.model.module.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}
        torch.save(state, self.save_dir / f"end{RANK}.pt")
        for cls, arguments in self.then:
            cls(overrides=dict(arguments)).train()
        if self.then:
            distributed.destroy_process_group()


class Told(BaseTrainer):  # type: ignore[misc]
    """Mixed into a trainer of ours: each rank tells what it saw and did at every step, and keeps some whole states."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.told: list[dict[str, Any]] = []
        self.states: dict[int, dict[str, torch.Tensor]] = {}  # after these steps
        super().__init__(*args, **kwargs)

    def _gather(self) -> None:
        super()._gather()
        done = self._accumulated
        self.own = {name: float(value) / done.images for name, value in {"loss": done.loss, **done.items}.items()}

    def _read(self, total_norm: torch.Tensor) -> tuple[float, float]:
        self.judged = super()._read(total_norm)
        return self.judged

    def _start_epoch(self) -> None:
        super()._start_epoch()
        if self._step == 0:
            self.states[-1] = self.state()

    def state(self) -> dict[str, torch.Tensor]:
        parts = {"model": self.model.module.state_dict(), "ema": self.ema.ema.state_dict()}
        parts |= {f"optimizer.{i}": kept for i, kept in self.optimizer.state_dict()["state"].items()}
        tensors = {f"{part}.{key}": t for part, kept in parts.items() for key, t in kept.items()}
        return {name: t.clone() for name, t in tensors.items() if t is not None}

    def optimizer_step(self) -> None:
        step, rollbacks = self._step, self._rollbacks
        grads = sha256_of([p.grad for p in self.model.parameters() if p.grad is not None])
        super().optimizer_step()
        told = {"step": step, "grads": grads, "own": self.own, "judged": self.judged}
        told |= {"weights": sha256_of(list(self.model.parameters())), "lr_factor": self._lr_factor, "stop": self.stop}
        self.told.append(told | {"rollbacks": self._rollbacks, "writes": self._run is not None})
        if self._rollbacks > rollbacks or self.stop:
            self.states[step] = self.state()

    def train(self) -> None:
        super().train()
        if not self.ddp:
            torch.save(self.states, self.save_dir / f"states{RANK}.pt")
            (self.save_dir / f"told{RANK}.json").write_text(json.dumps({
                "steps": self.told, "config": self._config.to_dict(), "stop_reason": self._stop_reason
            }))  # fmt: skip


class Troubled(Told):
    """Trouble on one rank after another; every one must be everybody's."""

    # Steps. Of the ten after each return to the start nothing but the model itself is judged.
    NAN, BLOWUP, VARIANCE, COLLAPSE = 5, 11, 15, 27

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        if RANK == 1 and self._step == self.NAN:
            batch["img"][0, 0, 0, 0] = torch.nan
        return batch

    def _gather(self) -> None:
        super()._gather()
        if RANK == 1 and self._step == self.BLOWUP:
            self._accumulated.loss *= 1e4
        if self._step >= self.COLLAPSE:  # the mean is below a thousandth of the start, rank 1's own loss is not
            share = 1.5e-3 if RANK == 1 else 0.0
            self._accumulated.loss = torch.tensor(share * median(self._watch.losses) * self._accumulated.images)

    def optimizer_step(self) -> None:
        if self._step >= self.COLLAPSE:
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], 1e-6)
        if RANK == 1 and self._step == self.VARIANCE:
            next(m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var.fill_(1e9)
        super().optimizer_step()


class Killed(BaseTrainer):  # type: ignore[misc]
    """Mixed into a trainer of ours: one rank dies as the kernel kills a process, without a word."""

    rank = 1
    AT = 6  # steps; the second epoch of four

    def optimizer_step(self) -> None:
        if self.rank == RANK and self._step == self.AT:
            os.kill(os.getpid(), signal.SIGKILL)
        super().optimizer_step()


def sha256_of(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def told_by(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(RANKS)]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_training(folder: Path, other: Path) -> None:
    for rank in range(RANKS):  # BatchNorm statistics are each rank's own
        mine, expected = (torch.load(path / f"end{rank}.pt") for path in (folder, other))
        assert_equal(mine["model"], expected["model"])
        assert mine["optimizer"].keys() == expected["optimizer"].keys()
        for index, kept in mine["optimizer"].items():
            assert_equal(kept, expected["optimizer"][index])


def assert_recorded_once(folder: Path) -> None:
    """By rank 0, for both."""
    steps = [told["steps"] for told in told_by(folder)]
    assert [told["step"] for told in steps[0]] == list(range(4))
    means = {name: [] for name in steps[0][0]["own"]}
    for a, b in zip(*steps, strict=True):
        assert a["own"]["loss"] != b["own"]["loss"]  # other images: gradients are equal because they are reduced
        assert [a[key] for key in ("grads", "weights", "judged")] == [b[key] for key in ("grads", "weights", "judged")]
        for name, mean in means.items():
            mean.append((a["own"][name] + b["own"][name]) / 2)
    assert [{told["writes"] for told in rank} for rank in steps] == [{True}, {False}]
    run = read_run(folder)
    assert (run.status.outcome, run.status.step, run.events) == ("completed", 4, [])
    assert run.steps["step"].to_list() == list(range(4))
    assert run.steps["images"].to_list() == [4] * 4  # of both ranks
    for name, mean in means.items():
        column = "loss" if name == "loss" else f"loss_{name.removesuffix('_loss')}"
        assert run.steps[column].to_list() == pytest.approx(mean, rel=1e-5)


def assert_trouble_was_everybodys(folder: Path, parameters: list[str]) -> None:
    told = told_by(folder)
    same = ("step", "grads", "judged", "weights", "lr_factor", "rollbacks", "stop")
    steps = [[{key: step[key] for key in same} for step in rank["steps"]] for rank in told]
    assert steps[0] == steps[1]
    weights = [step["weights"] for step in steps[0]]
    assert weights[3] != weights[4] == weights[5] != weights[6]  # the NaN was left out, other steps were not
    ups = [step["step"] for before, step in pairwise(steps[0]) if step["rollbacks"] > before["rollbacks"]]
    assert ups == [11, 16]  # of the loss at once; of the variance at the step after the look
    assert [steps[0][step]["lr_factor"] for step in ups] == [0.5, 0.25]
    assert [step["step"] for step in steps[0] if step["stop"]] == [36]  # the tenth step near zero
    assert told[0]["stop_reason"] == told[1]["stop_reason"] is not None
    states = [torch.load(folder / f"states{rank}.pt") for rank in range(RANKS)]
    for step in (*ups, 36):
        for rank in states:
            assert_equal(rank[step], rank[-1])
        assert_equal(*({name: rank[step][f"model.{name}"] for name in parameters} for rank in states))
    run = read_run(folder)
    assert run.steps["step"].to_list() == list(range(37))
    assert run.steps.filter(pl.col("skipped"))["step"].to_list() == [5, *ups, 36]
    back = [event for event in run.events if event["event"] == "rollback"]
    assert [(event["step"], event["to_step"]) for event in back] == [(step, 0) for step in ups]
    assert (run.status.outcome, run.status.divergence) == ("diverged", "collapse")
    assert "after 2 rollbacks; the weights are those of step 0" in str(run.status.reason)
    assert run.steps["loss"][11] > 1000 * run.steps["loss"][10]  # rank 0 records what it judged, not what it saw


def test_two_processes_train_decide_and_record_as_one(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    arguments = drawn["detect"].arguments(tmp_path, name="ours", epochs=1, val=False)
    stock = type("Stock", (OnTwoRanks, DetectionTrainer), {})
    config = {"clip.max_norm": 5.0, "update_clip": 0.5, "guard.max_rollbacks": 2}
    troubled = type("Troubled", (Troubled, OnTwoRanks, trainer_for("detect", config)), {})
    # A rate at which nothing moves, so that nothing but the injected trouble happens.
    still = {"name": "troubled", "epochs": 20, "lr0": 1e-5, "warmup_epochs": 0}
    then = [(stock, arguments | {"name": "stock", "data": str(drawn["detect"].yolo)}), (troubled, arguments | still)]
    ours = type("Ours", (Told, OnTwoRanks, trainer_for("detect")), {"then": then})
    trainer = ours(overrides=dict(arguments))
    trainer.train()
    assert_same_training(tmp_path / "ours", tmp_path / "stock")
    assert_recorded_once(tmp_path / "ours")
    for name, cls in (("ours", ours), ("troubled", troubled)):  # the configuration arrived
        expected = json.loads(json.dumps(cls.gradstab_config.to_dict()))  # type: ignore[attr-defined]
        assert [told["config"] for told in told_by(tmp_path / name)] == [expected] * RANKS
    network = YOLO(drawn["detect"].model).model
    assert_trouble_was_everybodys(tmp_path / "troubled", [name for name, _ in network.named_parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_leaves_a_true_status(drawn: dict[str, DrawnSet], tmp_path: Path, rank: int) -> None:
    """Whether it is the one that writes or another: the launcher ends the rest, and the run reads as what it is."""
    arguments = drawn["detect"].arguments(tmp_path, name="killed", epochs=3, val=False)
    killed = type("Killed", (Killed, OnTwoRanks, trainer_for("detect")), {"rank": rank})
    with pytest.raises(subprocess.CalledProcessError):
        killed(overrides=dict(arguments)).train()
    run = read_run(tmp_path / "killed")
    # The one that writes may miss the other before the launcher ends it, and fails of that.
    missed = rank == 1 and "gloo" in (run.status.reason or "")
    assert run.status.outcome == ("failed" if missed else "interrupted"), run.status
    steps = run.steps["step"].to_list()
    assert steps == list(range(len(steps)))
    assert 4 <= len(steps) <= Killed.AT  # the records of the first epoch at least
    assert run.status.step == len(steps)
    run.diagnose()
