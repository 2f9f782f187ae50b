"""`yolo_gradstab.snapshot`: a state restored is the state taken, as often as wanted; and which one is gone back to."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from yolo_gradstab.snapshot import LEAST_EVERY, MOST_EVERY, RESTLESS_STEPS, YOUNG_STEPS, Snapshot, Snapshots


def network(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    cls: Any = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[optimizer]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    return model, cls(model.parameters(), lr=0.1, **more)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def take(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **others: Any) -> Snapshot:
    return Snapshot.take(step, modules={"model": model}, optimizer=optimizer, others=others)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("before", [0, 3])
def test_training_from_a_restored_state_is_training_from_that_state(optimizer: str, before: int) -> None:
    model, optim = network(optimizer)
    steps(model, optim, before, seed=1)
    snapshot = take(before, model, optim, history=[1.0])
    steps(model, optim, 2, seed=2)
    expected = copy.deepcopy(model.state_dict())
    for _ in range(2):  # a second time: going back must not have used the snapshot up
        steps(model, optim, 5, seed=3)
        others = snapshot.restore_(modules={"model": model}, optimizer=optim)
        others["history"].append(2.0)
        steps(model, optim, 2, seed=2)
        assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())
    assert snapshot.others == {"history": [1.0]}


def test_its_size_is_that_of_its_tensors() -> None:
    model, optim = network("SGD")
    steps(model, optim, 1, seed=1)
    # 4 x 3 x 3 x 3 + 4, 4 + 4 and 2 x 4 + 2 weights, each with a momentum; running mean, variance and an int64 count
    assert take(1, model, optim).num_bytes == 4 * (2 * (112 + 8 + 10) + 8) + 8


def test_rates_stay_those_of_the_schedule() -> None:
    model, optim = network("SGD")
    snapshot = take(0, model, optim)
    optim.param_groups[0]["lr"] = 0.025
    snapshot.restore_(modules={"model": model}, optimizer=optim)
    assert optim.param_groups[0]["lr"] == 0.025


def shot(step: int) -> Snapshot:
    return Snapshot(step, {}, {}, {})


def run(snapshots: Snapshots, until: int, first: int = 0, restless: tuple[int, ...] = ()) -> list[int]:
    taken = []
    for step in range(first, until):
        if step in restless:
            snapshots.disturb(step)
        if snapshots.is_due(step):
            snapshots.add(shot(step))
            taken.append(step)
    return taken


def test_a_state_is_good_once_the_next_one_is_taken() -> None:
    snapshots = Snapshots()
    assert run(snapshots, 141) == [0, 100, 120, 140]
    assert snapshots.good is not None and snapshots.good.step == 120  # 140 has not been calm for long yet
    assert snapshots.go_back(145) is snapshots.good
    assert run(snapshots, 190, first=146) == [165, 185]
    assert snapshots.good.step == 165


def test_a_young_run_goes_back_to_its_start_and_is_young_again() -> None:
    snapshots = Snapshots()
    run(snapshots, 115)
    found = snapshots.go_back(115)  # its state of step 100 has been calm for 15 steps only
    assert found is not None and found.step == 0
    assert run(snapshots, 240, first=116) == [115 + YOUNG_STEPS, 115 + YOUNG_STEPS + 21]
    assert snapshots.good is not None and snapshots.good.step == 215


def test_snapshots_thin_out_as_a_run_grows_long() -> None:
    taken = run(Snapshots(), 10_000)
    gaps = [b - a for a, b in itertools.pairwise(taken)]
    assert (gaps[0], min(gaps), gaps[-1]) == (YOUNG_STEPS, LEAST_EVERY, MOST_EVERY)
    assert all(gap <= max(LEAST_EVERY, step // 10) for step, gap in zip(taken[1:], gaps[1:], strict=False))


def test_what_came_just_before_unrest_is_not_gone_back_to() -> None:
    snapshots = Snapshots()
    assert run(snapshots, 160, restless=(145,)) == [0, 100, 120, 140]
    assert snapshots.go_back(160) is not None and snapshots.good is not None and snapshots.good.step == 120
    calm = Snapshots()
    assert run(calm, 300, restless=(145, 150)) == [0, 100, 120, 140, 150 + RESTLESS_STEPS, 150 + RESTLESS_STEPS + 25]
