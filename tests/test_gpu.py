"""What only a CUDA device can show. Skipped without one; `make test-gpu` runs it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, DrawnSet

from yolo_gradstab import clip_policy, clip_update_, read_run, trainer_for
from yolo_gradstab.bench import _compare_runs
from yolo_gradstab.config import CLIP_POLICIES
from yolo_gradstab.norms import gradient_norms, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; run `make test-gpu` where there is one"
    ),
    pytest.mark.filterwarnings("default"),
]


def parameters() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in [(8, 3, 3, 3), (8,), (16, 8)] * 20]
    for p in made:
        p.grad = torch.randn_like(p) * 100
    return made


@pytest.mark.parametrize("name", CLIP_POLICIES)
def test_no_policy_waits_for_the_device(name: str) -> None:
    policy, given = clip_policy(name), parameters()
    policy.clip_(given)  # state and indices are uploaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.apply_(given, gradient_norms(gradients(given)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_update_bound_does_not_wait_either() -> None:
    given = parameters()
    before = [p.detach().clone() for p in given]
    clip_update_(given, before, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_update_(given, before, torch.tensor(0.1, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", [True, "bf16", False])
def test_a_training_step_does_not_wait_more_often_than_stocks(amp: bool | str) -> None:
    model = str(MODELS / "yolo26-tiny.yaml")
    figures = _compare_runs(model, "detect", batch=4, imgsz=64, optimizer="SGD", amp=amp, blocks=3)
    for case in figures.values():
        assert 0 < case["syncs"] <= case["stock_syncs"]


@pytest.mark.parametrize("amp", [True, "bf16", False])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "MuSGD"])
def test_a_bad_step_is_left_out(drawn: dict[str, DrawnSet], tmp_path: Path, amp: bool | str, optimizer: str) -> None:
    class Faulty(trainer_for("detect", update_clip=0.03)):  # type: ignore[misc]
        def optimizer_step(self) -> None:
            if self._step == 3:
                next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[0] = torch.inf
            super().optimizer_step()

    arguments: dict[str, Any] = drawn["detect"].arguments(tmp_path, name="run", device=0, amp=amp, optimizer=optimizer)
    trainer = Faulty(overrides=arguments)
    trainer.train()
    run = read_run(tmp_path / "run")
    assert run.steps["skipped"][3]
    assert all(torch.isfinite(v).all() for v in trainer.model.state_dict().values())
    if amp is True and run.steps["scale"][0] > 1:  # where the host's own check has not turned fp16 off
        assert run.steps["scale"][4] == run.steps["scale"][3] / 2
