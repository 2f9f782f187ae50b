"""`yolo_gradstab.peers` against numpy in float64, whether a library's own code runs or its arithmetic.

`make bench` puts Lightning and Weights & Biases beside the environment; `PYTHONPATH=.peers` runs these tests on them.
"""

import numpy as np
import pytest
import torch
from torch import nn

from yolo_gradstab import peers


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 2))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 7
    next(model.parameters()).grad = None  # as of an unused or frozen weight
    return model


def expected(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.double().numpy().ravel() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("log", [peers.per_parameter_item, peers.lightning_grad_norm, peers.composer_monitor])
def test_norms_by_name_and_in_total(model: nn.Module, log: object) -> None:
    logged = {name.rpartition("/")[2]: float(norm) for name, norm in log(model).items()}  # Lightning groups its names
    grads = expected(model)
    assert len(grads) == 5
    for name, grad in grads.items():
        assert logged.pop(name) == pytest.approx(np.sqrt((grad**2).sum()), rel=1e-6)
    total = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
    assert list(logged.values()) == ([] if log is peers.per_parameter_item else [pytest.approx(total, rel=1e-6)])


def test_histograms_are_numpys(model: nn.Module) -> None:
    model[2].weight.grad[0, 0] = torch.inf  # left out
    model[2].bias.grad.fill_(3.0)  # a single bin
    model[1].bias.grad.fill_(torch.nan)  # no histogram at all
    logged, grads = peers.histograms(model), expected(model)
    assert logged.keys() == grads.keys() - {"1.bias"}
    for name, (counts, edges) in logged.items():
        finite = grads[name][np.isfinite(grads[name])]
        if name == "2.bias":
            assert (counts, edges) == ([2.0], [3.0, 3.0])
            continue
        by_numpy, edges_of_numpy = np.histogram(finite, bins=64)
        assert edges == pytest.approx(edges_of_numpy.tolist(), rel=1e-5, abs=1e-5)
        assert sum(counts) == len(finite)
        # An element on an edge may fall to either side of it in float32.
        assert np.abs(np.cumsum(counts) - np.cumsum(by_numpy)).max() <= 1


def test_whose_code_ran_is_said() -> None:
    assert peers.source("numpy") == f"numpy {np.__version__}"
    assert peers.source("no-such-library") == "arithmetic of no-such-library"
    assert peers.source("mosaicml") == "arithmetic of mosaicml"
