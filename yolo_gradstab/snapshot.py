"""Training states kept in memory, and which of them is good enough to go back to. Imports nothing but torch.

A state is not good because it is finite: weights that have just grown, or BatchNorm variances that have, train on
without ever learning, although the loss does not show it yet. So a state counts as good only once the steps after it
were calm too, and none is taken while a run is restless.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Snapshot", "Snapshots"]

LEAST_EVERY, MOST_EVERY = 20, 200  # steps between snapshots: a tenth of those made so far, within these bounds
RESTLESS_STEPS = 100  # after weights or variances have grown abruptly
# From the start of a run, of which no state is kept but the start: what harms young weights shows late, and little is
# lost. Three runs on blood cells that went back to states of steps 20, 25 and 60 came to .114, .008 and .061, where
# lower rates came to .3.
YOUNG_STEPS = 100


class Snapshot(NamedTuple):
    """One state of a training run.

    Attributes:
        step: Optimizer steps made by then.
        modules: Tensors of each module, by its name.
        optimizer: The optimizer's state by the index of its parameter; not its groups, whose rates are the schedule's.
        others: Plain values that belong to the state.
    """

    step: int
    modules: dict[str, dict[str, Tensor]]
    optimizer: dict[int, dict[str, Any]]
    others: dict[str, Any]

    @classmethod
    def take(
        cls, step: int, *, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, others: dict[str, Any]
    ) -> Snapshot:
        """Copy a state; from an accelerator to the host's memory, without waiting for the copy."""
        state = optimizer.state_dict()["state"]
        return cls(
            step,
            {name: {key: _kept(t) for key, t in module.state_dict().items()} for name, module in modules.items()},
            {index: {key: _kept(value) for key, value in values.items()} for index, values in state.items()},
            copy.deepcopy(others),
        )

    @property
    def num_bytes(self) -> int:
        """What its tensors hold."""
        kept = [*self.modules.values(), *self.optimizer.values()]
        return sum(value.nbytes for values in kept for value in values.values() if isinstance(value, Tensor))

    def restore_(self, *, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Bring the modules and the optimizer back to this state; returns a copy of its other values.

        Args:
            modules: Those it was taken of, by the same names.
            optimizer: As when it was taken; its groups, with their rates, stay as they are now.
        """
        for name, tensors in self.modules.items():
            modules[name].load_state_dict(tensors)  # copies, so that the snapshot can serve again
        # The optimizer takes tensors as they are where dtype and device fit, and would train them away.
        state = {
            index: {key: _kept(value) for key, value in values.items()} for index, values in self.optimizer.items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return copy.deepcopy(self.others)


def _kept(value: Any) -> Any:
    """A copy on the host. Copies run in the order of the stream, so one that is restored from has arrived by then."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    value = value.detach()
    if not value.is_cuda:
        return value.clone()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)


class Snapshots:
    """The last good state, and the one that may become it."""

    def __init__(self) -> None:
        self.good: Snapshot | None = None
        self._candidate: Snapshot | None = None
        self._is_start = True  # the good one
        self._next_step = 0
        self._calm_from = 0

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is to be taken before this step."""
        return step >= self._next_step and step >= self._calm_from

    def add(self, snapshot: Snapshot) -> None:
        """Take in a new state: the one before it has stayed calm until now, and is good.

        The first of all is good at once: a run starts from it in any case.
        """
        if self.good is None:
            self.good, self._next_step = snapshot, snapshot.step + YOUNG_STEPS
            return
        if self._candidate is not None:
            self.good, self._is_start = self._candidate, False
        self._candidate = snapshot
        self._next_step = snapshot.step + min(MOST_EVERY, max(LEAST_EVERY, snapshot.step // 10))

    def disturb(self, step: int) -> None:
        """The run is restless at this step: nothing recent is good, and nothing is taken for a while."""
        self._candidate = None
        self._calm_from = step + RESTLESS_STEPS

    def go_back(self, step: int) -> Snapshot | None:
        """The state to restore at this step; what came after it is forgotten."""
        self._candidate = None
        self._next_step, self._calm_from = step + (YOUNG_STEPS if self._is_start else LEAST_EVERY), 0
        return self.good
