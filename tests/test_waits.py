"""How often a step waits for an accelerator, without one: tensors that only pretend to be on it (`FakeTensorMode`).

They have no values, so that whoever reads one, or wants to know how many elements are true, is caught. `test_gpu.py`
asks a real device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DrawnSet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from yolo_gradstab import clip_policy, clip_update_, trainer_for
from yolo_gradstab.clipping import _floors
from yolo_gradstab.config import CLIP_POLICIES
from yolo_gradstab.norms import device_index, gradient_norms, gradients
from yolo_gradstab.trainer import _median_where

pytestmark = pytest.mark.filterwarnings("default")

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_pretended_is_kept() -> Iterator[None]:
    for clear in (_floors.cache_clear, device_index.cache_clear):
        clear()
    yield
    for clear in (_floors.cache_clear, device_index.cache_clear):
        clear()


class Waits(TorchDispatchMode):
    """Keeps what the host would have waited for: reads, whose value is made up, and what moves between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            self.seen.append("read")
            return 0.0  # which an fp16 scaler takes for "no overflow"
        out = func(*args, **(kwargs or {}))
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[func is aten.copy_.default]
            if source.device.type != out.device.type:
                self.seen.append(f"{source.device.type} to {out.device.type}")
        return out


@contextmanager
def counted() -> Iterator[list[str]]:
    """The waits inside; a whole vector is one read, which the pretended ones would make one by one."""

    def tolist(vector: Tensor) -> list[float]:
        waits.seen.append("read")
        return [1.0] * vector.numel()

    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        patch.setattr(FakeTensor, "tolist", tolist)
        yield waits.seen


def pretended(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(8, 3, 3, 3), (8,), (16, 8)]]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def test_a_wait_is_seen() -> None:
    with FakeTensorMode(), counted() as waits:
        vector = torch.zeros(3, device="cuda")
        for wait in (
            vector.tolist,
            vector.sum().item,
            lambda: bool(vector.sum()),
            lambda: torch.tensor([1.0]).to("cuda"),
        ):
            wait()
        assert waits == ["read", "read", "read", "cpu to cuda"]
        with pytest.raises(Exception, match=r"aten\.nonzero"):
            vector[vector > 0]


@pytest.mark.parametrize("name", CLIP_POLICIES)
def test_no_policy_waits(name: str) -> None:
    with FakeTensorMode():
        policy, given = clip_policy(name), parameters()
        policy.clip_(given)  # state and indices are uploaded once
        with counted() as waits:
            policy.apply_(given, gradient_norms(gradients(given)))
    assert waits == []


@pytest.mark.parametrize("bound", [0.1, torch.tensor])
def test_the_update_bound_does_not_wait(bound: Any) -> None:
    with FakeTensorMode():
        given = parameters()
        before = [p.detach().clone() for p in given]
        max_ratio = bound if isinstance(bound, float) else bound([0.1] * 3, device="cuda")
        clip_update_(given, before, max_ratio)
        with counted() as waits:
            clip_update_(given, before, max_ratio)
    assert waits == []


class Over(BaseException):
    """Ends a training from inside."""


STEPS = 3


def waits_of_steps(drawn: DrawnSet, folder: Path, config: dict[str, Any], *, amp: bool, optimizer: str) -> list[Any]:
    """The waits of optimizer steps of a real run, from its third on, whose tensors then pretend to be on a GPU.

    The rate goes up at every step, as it does in a warm-up. The host's EMA, which is as stock's, is left out.
    """
    seen: list[list[str]] = []

    class Pretending(trainer_for("detect", {**config, "guard.divergence": "off"})):  # type: ignore[misc]
        def optimizer_step(self) -> None:
            if self._step < 2:
                super().optimizer_step()
                return
            with FakeTensorMode():
                self._pretend()
                loss, items, shown = (
                    pretended(self.loss),
                    *(
                        {name: pretended(value) for name, value in values.items()}
                        for values in (self.loss_items, self.tloss)
                    ),
                )
                batch = {k: pretended(v) if isinstance(v, Tensor) else v for k, v in self._micro_batches[0].items()}
                for _ in range(STEPS + 1):  # the first uploads what the later ones use again
                    self.loss, self.loss_items, self.tloss, self._micro_batches = loss, items, shown, [batch]
                    for p in self._trained:
                        p.grad = torch.randn_like(p)
                    for group in self.optimizer.param_groups:
                        group["lr"] *= 1.01
                    with counted() as waits:
                        super().optimizer_step()
                    assert {value.device.type for value in self.tloss.values()} == {"cpu"}  # the progress bar's
                    seen.append(list(waits))
            self._look, self._buffer = None, type(self._buffer)()  # which the run's end would read
            raise Over

        def _pretend(self) -> None:
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = nn.Parameter(pretended(p), requires_grad=p.requires_grad)
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else pretended(buffer)
            self.optimizer = self.build_optimizer(self.model, name=optimizer, lr=0.01)
            for group in self.optimizer.param_groups:
                group["initial_lr"] = 2 * group["lr"]
            if amp:
                self.scaler = torch.amp.GradScaler("cpu", enabled=True)
                self.scaler.scale(pretended(self.loss))
            self.ema = None
            self.__dict__.pop("_policy", None)
            self._look = self._zero_steps = None
            self._accumulated, self._buffer = type(self._accumulated)(), type(self._buffer)()
            self._buffer.AGE_S = 1e9  # read as a whole at every 64th step
            self._index_parameters()

    with pytest.raises(Over):
        Pretending(overrides=drawn.arguments(folder, name="run", nbs=4, optimizer=optimizer)).train()
    return seen[1:]


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [
        ({}, "SGD"),
        ({"telemetry.layers_every": 1}, "AdamW"),
        ({"update_clip": 0.03}, "SGD"),
        ({"update_clip": 0.03, "clip": "none"}, "AdamW"),
    ],
)
def test_a_step_waits_once(drawn: dict[str, DrawnSet], tmp_path: Path, config: dict[str, Any], optimizer: str) -> None:
    assert waits_of_steps(drawn["detect"], tmp_path, config, amp=False, optimizer=optimizer) == [["read"]] * STEPS


def test_in_fp16_the_host_looks_for_an_overflow_besides(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    seen = waits_of_steps(drawn["detect"], tmp_path, {"update_clip": 0.03}, amp=True, optimizer="SGD")
    assert seen == [["read", "read"]] * STEPS


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_the_median_of_those_that_are_chosen(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    for _ in range(50):
        values = torch.rand(length, generator=generator).round(decimals=1)
        chosen = torch.rand(length, generator=generator) < 0.7
        chosen[0] = True
        assert _median_where(chosen, values) == values[chosen].median()
        values[-1] = torch.nan
        assert torch.equal(_median_where(chosen, values).isnan(), values[chosen].median().isnan())
    assert _median_where(torch.zeros(length, dtype=torch.bool), values).isnan()  # as of weights that are all NaN
