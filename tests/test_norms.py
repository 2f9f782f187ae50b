"""`yolo_gradstab.norms` against hand calculations, torch's own norms, and float64."""

import pytest
import torch

from yolo_gradstab.norms import Layers, exact_gradient_norms, gradient_norms, gradients, tensor_norms


def parameter(*values: float, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    p.grad = torch.tensor(values, dtype=dtype) if grad else None
    return p


def test_norms_of_3_and_4_make_5() -> None:
    measured = gradient_norms([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])
    assert measured.norms.tolist() == [3, 4]
    assert measured.total_norm.item() == 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float64]])
def test_total_norm_has_the_bits_of_torchs(seed: int, dtypes: list[torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5, 3, 3), (7,), (), (64, 33), (1, 1)] * 20
    grads = [
        torch.randn(s, generator=generator, dtype=dtypes[i % len(dtypes)]) * 10.0 ** (i % 7 - 3)
        for i, s in enumerate(shapes)
    ]
    measured = gradient_norms(grads)
    assert torch.equal(measured.total_norm, torch.nn.utils.get_total_norm(grads))
    for norm, grad in zip(measured.norms, grads, strict=True):
        assert norm.item() == pytest.approx(grad.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    grads = [torch.full((4, 4), 4e4, dtype=dtype), torch.linspace(-1, 1, 1000).to(dtype)]
    expected = torch.cat([g.double().flatten() for g in grads]).norm()
    # 1e-3: float32 sums of exactly these half-precision values; torch's own fp16 norm is inf here
    torch.testing.assert_close(gradient_norms(grads).total_norm.double(), expected, rtol=1e-3, atol=0)


def test_finite_gradients_do_not_overflow() -> None:
    grads = [torch.full((2,), 1e20), torch.tensor([1.0])]
    assert torch.isinf(torch.nn.utils.get_total_norm(grads))
    measured = gradient_norms(grads)
    assert measured.total_norm.item() == pytest.approx(2**0.5 * 1e20)
    assert not measured.nonfinite().any()


def test_nonfinite_tensors_are_named_one_by_one() -> None:
    nan, inf = torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf])
    grads = [torch.ones(3), nan, inf, torch.full((2,), 3e38)]  # the last is finite, its float32 norm is not
    assert gradient_norms(grads).nonfinite().tolist() == [False, True, True, False]
    assert exact_gradient_norms(grads).nonfinite().tolist() == [False, True, True, False]


def test_mixed_dtypes_keep_the_order_of_the_tensors() -> None:
    grads = [torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.float64), torch.tensor([3.0]).bfloat16()]
    assert gradient_norms(grads).norms.tolist() == [1, 2, 3]
    assert tensor_norms(grads).tolist() == [1, 2, 3]


def test_no_gradients_are_a_zero_norm() -> None:
    measured = gradient_norms([])
    assert measured.total_norm.item() == 0
    assert len(measured.norms) == 0


def test_gradients_skips_frozen_and_reads_a_generator_once() -> None:
    parameters = [parameter(1.0), parameter(2.0, grad=False), parameter(3.0)]
    assert [g.item() for g in gradients(p for p in parameters)] == [1, 3]
    assert [g.item() for g in gradients(parameters[0])] == [1]


def test_stages_are_found_past_wrappers() -> None:
    names = ["module.model.0.conv.weight", "model.0.bn.bias", "student_model.model.12.m.0.weight", "head.fc.weight"]
    layers = Layers.stages(names)
    assert layers.names == ["model.0", "model.12", "head"]
    assert layers.index == [0, 0, 1, 2]
    assert Layers.parameters(names).names == names


def test_layer_norms_neither_overflow_nor_spread_nan() -> None:
    layers = Layers.stages(["model.0.a", "model.0.b", "model.1.a", "model.2.a", "model.3.a"])
    norms = torch.tensor([3e20, 4e20, torch.nan, 1.0, 0.0])
    result = layers.norms(norms)
    assert result[0].item() == pytest.approx(5e20)
    assert torch.isnan(result[1])
    assert result[3].item() == 0
    assert layers.norms(torch.tensor([3.0, 4.0, 2.0, 1.0, 0.0])).tolist() == pytest.approx([5, 2, 1, 0])
    assert layers.sums(torch.ones(5)).tolist() == [2, 1, 1, 1]


def test_all_zero_gradients_have_zero_layer_norms() -> None:
    assert Layers.stages(["model.0.a"]).norms(torch.zeros(1)).tolist() == [0]
