"""`yolo_gradstab.clipping` against torch, timm, the papers' numbers worked by hand, and invariants.

The reference series are those of the published definitions (numpy percentiles, the ZClip and AdaGC recurrences),
computed outside this package.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from yolo_gradstab.clipping import (
    MATRIX_FLOOR_RMS,
    AdaptiveGradientClip,
    AutoClip,
    ClipPolicy,
    NoClip,
    NormClip,
    Stabilizer,
    TensorEma,
    ValueClip,
    ZClip,
    clip_update_,
)
from yolo_gradstab.config import CLIP_POLICIES, clip_policy
from yolo_gradstab.norms import gradient_norms

INF, NAN = math.inf, math.nan


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(len(values), dtype=dtype))
    p.grad = torch.tensor(values, dtype=dtype)
    return p


def random_parameters(seed: int, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(8, 3, 3, 3), (8,), (16, 8), (4, 5)]
    ]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * scale
    return parameters


def flat(parameters: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def clipped_norms(policy: ClipPolicy, norms: list[float]) -> list[float]:
    """Feed a series of total norms, one tensor each; what comes out."""
    after = []
    for norm in norms:
        p = parameter(norm)
        policy.clip_([p])
        after.append(p.grad.item())
    return after


# Global norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grads, max_norm",
    [
        ([0.0, 0.0], 10),
        ([3.0, 4.0], 10),
        ([30.0, 40.0], 10),
        ([1.0, INF], 10),
        ([1.0, NAN], 10),
        ([1e-30, 1e-30], 10),
    ],
)
def test_norm_equals_torch_on_the_edge_cases(grads: list[float], max_norm: float) -> None:
    ours, theirs = parameter(*grads), parameter(*grads)
    total_norm = NormClip(max_norm=max_norm).clip_([ours])
    expected = nn.utils.clip_grad_norm_([theirs], max_norm)
    assert torch.equal(ours.grad.nan_to_num(-7), theirs.grad.nan_to_num(-7))
    assert torch.equal(total_norm.float().nan_to_num(-7), expected.nan_to_num(-7))


@pytest.mark.parametrize("seed", range(20))
def test_norm_equals_torch_bit_for_bit(seed: int) -> None:
    ours, theirs = (random_parameters(seed, scale=10.0 ** (seed % 5 - 1)) for _ in range(2))
    for parameters in (ours, theirs):
        parameters[1].grad = None  # an unused parameter
        parameters[2].requires_grad_(False)
    total_norm = NormClip(max_norm=1.0).clip_(p for p in ours)
    assert torch.equal(total_norm, nn.utils.clip_grad_norm_((p for p in theirs), 1.0))
    assert torch.equal(flat(ours), flat(theirs))


def test_norm_scales_what_overflows_in_torch() -> None:
    p = parameter(1e20, 1e20)
    assert NormClip(max_norm=10.0).clip_([p]).item() == pytest.approx(2**0.5 * 1e20)
    assert p.grad.norm().item() == pytest.approx(10)  # torch leaves zeros here


@pytest.mark.parametrize("threshold", [1 / i for i in range(1, 51)])
def test_norm_invariants(threshold: float) -> None:
    parameters = random_parameters(0)
    before = flat(parameters).clone()
    policy = NormClip(max_norm=threshold)
    policy.clip_(parameters)
    once = flat(parameters).clone()
    assert once.norm() <= before.norm()
    # 2e-5: torch divides by norm + 1e-6, which is 5e-5 of the smallest threshold here
    assert once.norm().item() == pytest.approx(threshold, rel=1e-4)
    assert torch.cosine_similarity(once, before, dim=0).item() == pytest.approx(1, abs=1e-6)
    policy.clip_(parameters)
    torch.testing.assert_close(flat(parameters), once, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", sorted(CLIP_POLICIES.keys() - {"stabilizer", "agc"}))
def test_below_the_threshold_nothing_changes(name: str) -> None:
    parameters = random_parameters(1, scale=1e-3)
    before = flat(parameters).clone()
    clip_policy(name).clip_(parameters)
    assert torch.equal(flat(parameters), before)


@pytest.mark.parametrize("name", sorted(CLIP_POLICIES.keys() - {"stabilizer"}))
@pytest.mark.parametrize("seed", range(5))
def test_no_policy_increases_a_norm(name: str, seed: int) -> None:
    policy = clip_policy(name)
    for step in range(130):
        parameters = random_parameters(seed * 1000 + step, scale=100.0 if step % 40 == 39 else 1.0)
        before = [p.grad.norm().item() for p in parameters]
        policy.clip_(parameters)
        for p, norm in zip(parameters, before, strict=True):
            assert p.grad.norm().item() <= norm * (1 + 1e-6)


def test_none_leaves_bits_and_returns_the_norm() -> None:
    p = parameter(3.0, 4.0)
    assert NoClip().clip_(p).item() == 5
    assert p.grad.tolist() == [3, 4]


@pytest.mark.parametrize("name", CLIP_POLICIES)
def test_empty_lists_generators_and_frozen_parameters(name: str) -> None:
    policy = clip_policy(name)
    assert policy.clip_([]).item() == 0
    frozen = nn.Parameter(torch.ones(2))
    assert clip_policy(name).clip_([frozen]).item() == 0
    p = parameter(3.0, 4.0)
    assert clip_policy(name).clip_(q for q in [frozen, p]).item() == 5
    assert frozen.grad is None


@pytest.mark.parametrize("name", CLIP_POLICIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_stay_what_they_are(name: str, dtype: torch.dtype) -> None:
    p, q = parameter(300.0, 400.0, dtype=dtype), parameter(1.0)
    total_norm = clip_policy(name).clip_([p, q])
    assert p.grad.dtype == dtype
    assert total_norm.item() == pytest.approx(500.001, rel=1e-3)
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("name", CLIP_POLICIES)
def test_what_is_reported_is_what_happened(name: str) -> None:
    policy = clip_policy(name)
    for step in range(130):
        parameters = random_parameters(step, scale=50.0)
        measured = gradient_norms([p.grad for p in parameters])
        clipped = policy.apply_(parameters, measured)
        after = flat(parameters).norm().item()
        # 1e-4: norms recomputed from rounded gradients
        assert clipped.clipped_norm.item() == pytest.approx(after, rel=1e-4)
        assert clipped.clip_coef.item() == pytest.approx(after / measured.total_norm.item(), rel=1e-4)


# Value ---------------------------------------------------------------------------------------------------------------


def test_value_equals_torch_and_changes_direction() -> None:
    ours, theirs = random_parameters(3, scale=3.0), random_parameters(3, scale=3.0)
    ValueClip(max_value=1.0).clip_(ours)
    nn.utils.clip_grad_value_(theirs, 1.0)
    assert torch.equal(flat(ours), flat(theirs))
    p = parameter(100.0, 1.0)
    ValueClip(max_value=1.0).clip_([p])
    assert p.grad.tolist() == [1, 1]


# AGC -----------------------------------------------------------------------------------------------------------------


def agc(**fields: object) -> AdaptiveGradientClip:
    return AdaptiveGradientClip(**({"factor": 0.01, "eps": 1e-3, "exclude": ()} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_agc_equals_timm(seed: int) -> None:
    timm_agc = pytest.importorskip("timm.utils.agc")
    ours, theirs = random_parameters(seed), random_parameters(seed)
    agc().clip_(ours)
    timm_agc.adaptive_clip_grad(theirs, clip_factor=0.01, eps=1e-3)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-6, atol=0)


def test_agc_worked_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]]))
    weight.grad = torch.tensor([[0.3, 0.4], [0.003, 0.004], [0.006, 0.008]])
    vector = nn.Parameter(torch.tensor([3.0, 4.0]))
    vector.grad = torch.tensor([0.3, 0.4])
    scalar = nn.Parameter(torch.tensor(0.0))
    scalar.grad = torch.tensor(5.0)
    agc().clip_([weight, vector, scalar])
    expected = torch.tensor([[0.03, 0.04], [6e-6, 8e-6], [0.006, 0.008]])
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(vector.grad, torch.tensor([0.03, 0.04]), rtol=1e-6, atol=0)
    assert scalar.grad.item() == pytest.approx(1e-5)  # not frozen for ever: eps * factor


def test_agc_keeps_a_nan_in_its_unit() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.tensor([[NAN, 1.0], [1.0, 1.0], [0.0, 0.0]])
    agc().clip_([weight])
    assert torch.isnan(weight.grad[0]).all()
    assert torch.isfinite(weight.grad[1:]).all()
    assert weight.grad[2].tolist() == [0, 0]


def test_agc_clips_a_unit_whose_norm_is_beyond_float32_to_its_limit() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    weight.grad = torch.tensor([[1e20, 1e20], [1e-3, 0.0]])
    clipped = agc().apply_([weight], gradient_norms([weight.grad]))
    assert weight.grad.tolist() == [[pytest.approx(0.05 / 2**0.5)] * 2, [pytest.approx(1e-3), 0.0]]
    assert clipped.clipped_norm.item() == pytest.approx(math.hypot(0.05, 1e-3))


@pytest.mark.parametrize("groups", [1, 2])
def test_agc_clips_output_channels_of_transposed_convolutions(groups: int) -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    conv.weight.grad = conv.weight.detach() * 1e-3  # far below the limit everywhere
    out_of_group = 1
    conv.weight.grad[: 4 // groups, out_of_group] *= 1e3  # one output channel: group 0, second of it
    before = conv.weight.grad.clone()
    agc().bind(conv).clip_(conv.parameters())
    changed = (conv.weight.grad != before).reshape(groups, 4 // groups, 6 // groups, -1).any(dim=-1)
    expected = torch.zeros_like(changed)
    expected[0, :, out_of_group] = True
    assert torch.equal(changed, expected)


def test_agc_leaves_biases_norms_and_the_head_alone() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
        nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
    )
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    AdaptiveGradientClip(factor=0.01, eps=1e-3, exclude=("bias", "norm", "head")).bind(model).clip_(model.parameters())
    clipped = {name for name, p in model.named_parameters() if not torch.equal(p.grad, torch.full_like(p, 100.0))}
    assert clipped == {"0.0.weight", "0.2.weight", "1.0.weight"}
    flat_model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))  # whose head is a layer, not a stage
    for p in flat_model.parameters():
        p.grad = torch.full_like(p, 100.0)
    AdaptiveGradientClip(factor=0.01, eps=1e-3, exclude=("bias", "norm", "head")).bind(flat_model).clip_(
        flat_model.parameters()
    )
    assert torch.equal(flat_model[2].weight.grad, torch.full((2, 4), 100.0))
    assert flat_model[0].weight.grad.max() < 1


def test_agc_unbound_leaves_vectors_alone() -> None:
    conv, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    conv.grad, bias.grad = torch.full((2, 2), 9.0), torch.full((2,), 9.0)
    clip_policy("agc").clip_([conv, bias])
    assert conv.grad.max() < 1
    assert bias.grad.tolist() == [9, 9]


# Adaptive policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_autoclip_follows_numpys_percentile_of_the_window(percentile: float) -> None:
    norms = [1.0, 2.0, 4.0, 8.0, 100.0, 3.0, 50.0, 0.5]
    for window in (3, 1000):
        after = clipped_norms(AutoClip(percentile=percentile, window=window), norms)
        for i, norm in enumerate(norms):
            threshold = np.percentile(norms[max(0, i + 1 - window) : i + 1], percentile)
            # 1e-5: torch's 1e-6 in the denominator, on norms from 0.5
            assert after[i] == pytest.approx(min(norm, threshold), rel=1e-5)


def test_autoclip_reference_thresholds() -> None:
    norms = [1.0, 2.0, 4.0, 8.0, 100.0, 3.0]
    assert clipped_norms(AutoClip(percentile=10, window=1000), norms) == pytest.approx(
        [1, 1.1, 1.2, 1.3, 1.4, 1.5], rel=1e-5
    )
    assert clipped_norms(AutoClip(percentile=90, window=1000), norms) == pytest.approx(
        [1, 1.9, 3.6, 6.8, 63.2, 3], rel=1e-5
    )


def test_zclip_reference_series() -> None:
    policy = ZClip(z=2.5, alpha=0.97, warmup=5, max_norm=None)
    after = clipped_norms(policy, [1, 1.1, 0.9, 1.05, 0.95])
    assert after == pytest.approx([1, 1.1, 0.9, 1.05, 0.95])
    assert policy.state_dict()["mean"].item() == pytest.approx(1.0)
    assert policy.state_dict()["var"].item() == pytest.approx(0.005)
    after = clipped_norms(policy, [1, 5, 1, 50, 1.2])
    assert after == pytest.approx([1, 1.007578, 1, 1.000803, 1.138779], abs=2e-6)
    assert policy.state_dict()["mean"].item() == pytest.approx(1.004394, abs=1e-6)
    assert policy.state_dict()["var"].item() == pytest.approx(0.00483695, abs=1e-8)


def test_zclip_with_a_fixed_norm_is_only_the_fixed_norm() -> None:
    after = clipped_norms(ZClip(z=2.5, alpha=0.97, warmup=5, max_norm=1.0), [30.0, 31, 29, 30, 30, 30, 31, 28])
    assert after == pytest.approx([1.0] * 8, rel=1e-5)


def test_tensor_ema_reference_series() -> None:
    policy = TensorEma(ratio=1.05, beta=0.98, warmup=3, max_norm=1.0)
    means = []
    for norm in [4.0, 2.0, 3.0, 0.5, 10.0, 1.0, 0.0]:
        policy.clip_([parameter(norm)])
        means.append(policy.state_dict()["mean"].item())
    assert means == pytest.approx([1, 1, 1.001, 0.990980, 0.991971, 0.992132, 0.972289], abs=2e-6)


def test_tensor_ema_starts_at_the_warmups_median() -> None:
    policy = TensorEma(ratio=2.0, beta=0.98, warmup=3)
    assert clipped_norms(policy, [1.0, 50.0, 3.0]) == [1, 50, 3]
    assert policy.state_dict()["mean"].item() == 3
    assert clipped_norms(policy, [100.0]) == pytest.approx([6])


def test_tensor_ema_clips_only_the_tensor_that_spikes() -> None:
    policy = TensorEma(ratio=2.0, beta=0.98, warmup=2)
    for _ in range(3):
        policy.clip_([parameter(1.0), parameter(10.0)])
    a, b = parameter(100.0), parameter(10.0)
    policy.clip_([a, b])
    assert a.grad.item() == pytest.approx(2)
    assert b.grad.item() == 10


def test_tensor_ema_lets_a_silent_tensor_speak_again() -> None:
    policy = TensorEma(ratio=2.0, beta=0.98, warmup=2)
    late = []
    for step in range(600):
        a, b = parameter(1.0), parameter(0.0 if step < 500 else 5.0)
        if step > 300:
            a.grad = torch.zeros(1)
        policy.clip_([a, b])
        late.append(b.grad.item())
    assert late[500] == 5  # its first gradient ever is not clipped to nothing
    a = parameter(1.0)
    policy.clip_([a, parameter(5.0)])
    assert a.grad.item() == pytest.approx(0.2)  # twice a tenth of what it was


def test_tensor_ema_with_a_parameter_that_only_sometimes_has_a_gradient() -> None:
    policy = TensorEma(ratio=2.0, beta=0.98, warmup=2)
    for step in range(6):
        a, b = parameter(1.0), parameter(8.0)
        if step % 2:
            a.grad = None
        policy.clip_([a, b])
        assert b.grad.item() == 8
    with pytest.raises(ValueError, match="follows 2 tensors, got 3"):
        policy.clip_([parameter(1.0)] * 3)


def test_stabilizer_leaves_a_gradient_of_zero_or_nearly_zero() -> None:
    policy = clip_policy("stabilizer")
    for values, expected in (((3.0, 4.0), None), ((0.0, 0.0), [0.0, 0.0]), ((1e-44, 0.0), None)):
        p = parameter(*values)
        policy.clip_([p])
        assert torch.isfinite(p.grad).all()
        assert expected is None or p.grad.tolist() == expected


def test_stabilizer_reference_series() -> None:
    policy = Stabilizer(target=1.0, gamma1=0.7, gamma2=0.9)
    after = clipped_norms(policy, [1.0, 1, 1, 1, 100, 1])
    assert after == pytest.approx([1, 1, 1, 1, 0.742562, 0.560318], abs=2e-6)
    assert clipped_norms(Stabilizer(target=10.0, gamma1=0.7, gamma2=0.9), [3.0, 3.0]) == pytest.approx([10, 10])
    assert clipped_norms(Stabilizer(target=10.0, gamma1=0.7, gamma2=0.9), [0.0, 3.0])[0] == 0


@pytest.mark.parametrize("name", ["autoclip", "zclip", "tensor_ema", "stabilizer"])
def test_accumulation_alone_is_no_spike(name: str) -> None:
    policy = clip_policy(name, **({"warmup": 5} if name in {"zclip", "tensor_ema"} else {}))
    norms = [1.0, 1.02, 0.98, 1.01, 0.99] * 4
    for norm in norms:
        p = parameter(norm)
        policy.apply_([p], gradient_norms([p.grad]), num_images=16)
    p = parameter(4 * 0.98)
    clipped = policy.apply_([p], gradient_norms([p.grad]), num_images=64)
    if name == "stabilizer":
        assert clipped.clipped_norm.item() == pytest.approx(10 * 1.0, rel=0.05)
    else:
        assert clipped.clip_coef.item() == 1


@pytest.mark.parametrize("name", CLIP_POLICIES)
def test_nonfinite_values_never_enter_the_state(name: str) -> None:
    clean, dirty = clip_policy(name), clip_policy(name)
    for step in range(50):
        for policy in (clean, dirty):
            policy.clip_(random_parameters(step))
    for bad in (NAN, INF):
        parameters = random_parameters(50)
        parameters[2].grad[0, 0] = bad
        dirty.clip_(parameters)
    for key, value in clean.state_dict().items():
        assert torch.equal(value.nan_to_num(-1), dirty.state_dict()[key].nan_to_num(-1)), key
    spike, other = random_parameters(60, scale=100.0), random_parameters(60, scale=100.0)
    clean.clip_(spike)
    dirty.clip_(other)
    assert torch.equal(flat(spike), flat(other))


@pytest.mark.parametrize("name", ["autoclip", "zclip", "tensor_ema", "stabilizer"])
@pytest.mark.parametrize("steps_before", [0, 30])
def test_finite_norms_whose_square_overflows_do_not_either(name: str, steps_before: int) -> None:
    policy = clip_policy(name, **({"warmup": 10} if name in {"zclip", "tensor_ema"} else {}))
    for step in range(steps_before):
        policy.clip_(random_parameters(step))
    before = policy.state_dict()
    for huge in (1e20, 3e38):
        parameters = random_parameters(50)
        parameters[2].grad[0, 0] = huge
        policy.clip_(parameters)
    for key, value in policy.state_dict().items():
        old = torch.zeros_like(value) if before[key].numel() == 0 else before[key]
        assert torch.equal(value.nan_to_num(0.0), old.nan_to_num(0.0)), key
        assert not flat(parameters).isnan().any()
    after = random_parameters(51)
    policy.clip_(after)
    assert torch.isfinite(flat(after)).all()
    assert flat(after).norm() > 0


@pytest.mark.parametrize("name", ["autoclip", "zclip", "tensor_ema"])
def test_a_spike_after_a_nan_is_still_clipped(name: str) -> None:
    policy = clip_policy(name, **({"warmup": 20} if name == "tensor_ema" else {}))
    rng = np.random.default_rng(0)
    clipped_norms(policy, [*np.exp(rng.normal(0, 0.1, 50)), NAN, INF, *np.exp(rng.normal(0, 0.1, 5))])
    assert clipped_norms(policy, [100.0])[0] < 3


@pytest.mark.parametrize("name", CLIP_POLICIES)
def test_a_resumed_policy_goes_on_as_if_uninterrupted(name: str) -> None:
    fields = {"warmup": 7} if name in {"zclip", "tensor_ema"} else {}
    whole, first, second = (clip_policy(name, **fields) for _ in range(3))
    for step in range(10):
        whole.clip_(random_parameters(step, scale=float(step + 1)))
        (first if step < 5 else second).clip_(random_parameters(step, scale=float(step + 1)))
        if step == 4:
            second.load_state_dict(first.state_dict())
    a, b = random_parameters(99, scale=50.0), random_parameters(99, scale=50.0)
    whole.clip_(a)
    second.clip_(b)
    assert torch.equal(flat(a), flat(b))


def test_state_of_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="saved by another policy"):
        clip_policy("zclip").load_state_dict(clip_policy("autoclip").state_dict())


# The update ----------------------------------------------------------------------------------------------------------


def ratio(after: torch.Tensor, before: torch.Tensor) -> float:
    return ((after.double() - before.double()).norm() / before.double().norm()).item()


@pytest.mark.parametrize("max_ratio", [10.0**-e for e in range(5)])
@pytest.mark.parametrize("step", [1e-6, 1e-3, 1.0, 1e6])
def test_no_tensor_moves_further_than_its_share(max_ratio: float, step: float) -> None:
    parameters = random_parameters(0)
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=step)
    unbounded = [p.detach().clone() for p in parameters]
    moved = clip_update_(parameters, before, max_ratio)
    for p, old, new, measured in zip(parameters, before, unbounded, moved.ratio, strict=True):
        assert measured.item() == pytest.approx(ratio(new, old), rel=1e-4 if step > 1e-5 else 0.05)
        if measured <= max_ratio:
            assert torch.equal(p.data, new)
        else:
            assert ratio(p.data, old) == pytest.approx(max_ratio, abs=1e-5)
            cosine = torch.cosine_similarity((p.data - old).flatten(), (new - old).flatten(), dim=0)
            assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_update_bound_per_tensor_and_before_is_left_alone() -> None:
    a, b = nn.Parameter(torch.full((4, 4), 1.0)), nn.Parameter(torch.full((4, 4), 1.0))
    before = [a.detach().clone(), b.detach().clone()]
    with torch.no_grad():
        a.mul_(2)
        b.mul_(2)
    moved = clip_update_([a, b], before, [0.5, 0.0])
    assert moved.scale.tolist() == [0.5, 0.0]
    assert torch.equal(a.data, torch.full((4, 4), 1.5))
    assert torch.equal(b.data, torch.ones(4, 4))
    assert all(torch.equal(t, torch.ones(4, 4)) for t in before)


@pytest.mark.parametrize("moved", [3e38, math.inf, math.nan])
def test_a_move_beyond_all_bounds_is_not_made_and_one_that_is_not_finite_is_not_hidden(moved: float) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    before = [weight.detach().clone()]
    with torch.no_grad():
        weight[0] = moved
    clip_update_([weight], before, 0.03)
    if math.isfinite(moved):
        assert torch.equal(weight.data, before[0])
    else:
        assert not torch.isfinite(weight.data).all()


def test_zero_initialised_biases_and_matrices_still_learn() -> None:
    bias, matrix = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(8, 8))
    lr = 0.1
    for _ in range(400):
        before = [bias.detach().clone(), matrix.detach().clone()]
        with torch.no_grad():
            bias.add_(torch.ones(16), alpha=lr)
            matrix.add_(torch.ones(8, 8), alpha=lr)
        clip_update_([bias, matrix], before, 0.03)
    # A bias may move by 0.03 * 0.1 a step until it weighs more than that; a matrix leaves its floor at 3 % a step.
    assert bias.data.mean().item() > 1
    assert matrix.data.mean().item() > 100 * MATRIX_FLOOR_RMS


def test_update_of_nothing_and_of_the_wrong_length() -> None:
    assert clip_update_([], [], 0.1).ratio.numel() == 0
    with pytest.raises(ValueError, match="one tensor per parameter, got 0 for 1"):
        clip_update_([nn.Parameter(torch.ones(1))], [], 0.1)


@pytest.mark.parametrize("make", ["SGD", "AdamW", "MuSGD"])
@pytest.mark.parametrize("max_ratio", [0.03, 1e9])
def test_bound_holds_for_any_optimizer(make: str, max_ratio: float) -> None:
    """Above the bound every ratio is at it; below it the weights keep the bits they have without it."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if make == "MuSGD":
            from ultralytics.optim import MuSGD

            groups = [
                {"params": [p for p in parameters if p.ndim == 2], "use_muon": True},
                {"params": [p for p in parameters if p.ndim < 2], "use_muon": False},
            ]
            return MuSGD(groups, lr=0.5, momentum=0.9, nesterov=True, muon=0.2, sgd=1.0)
        return {
            "SGD": lambda: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-3),
            "AdamW": lambda: torch.optim.AdamW(parameters, lr=0.5, weight_decay=0.1),
        }[make]()

    bounded, free = model(), model()
    optimizers = [optimizer(list(m.parameters())) for m in (bounded, free)]
    data = torch.randn(8, 32, 6, generator=torch.Generator().manual_seed(2))
    exceeded = 0
    for batch in data:
        for m, o in zip((bounded, free), optimizers, strict=True):
            o.zero_grad()
            m(batch).square().mean().backward()
            before = [p.detach().clone() for p in m.parameters()]
            o.step()
            if m is bounded:
                moved = clip_update_(m.parameters(), before, max_ratio)
                for p, old, r in zip(m.parameters(), before, moved.ratio, strict=True):
                    if r > max_ratio and p.ndim > 1:
                        exceeded += 1
                        assert ratio(p.data, old) == pytest.approx(max_ratio, abs=1e-5)
    same = all(torch.equal(p, q) for p, q in zip(bounded.parameters(), free.parameters(), strict=True))
    assert same if max_ratio > 1 else exceeded > 4 and not same


def test_a_constant_history_still_finds_a_spike() -> None:
    """128 equal norms have no variance at all; what is a thousand times as large is a spike all the same."""
    for name in ("zclip", "autoclip"):
        policy = clip_policy(name)
        assert clipped_norms(policy, [1.0] * 128) == pytest.approx([1.0] * 128, rel=1e-5)
        assert clipped_norms(policy, [1000.0])[0] < 1.01
