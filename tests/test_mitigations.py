"""`yolo_gradstab.mitigations`, on the host's own models.

Counts are checked against a walk of the host's model by class, or against how often an activation is called; what a
block or a weight becomes against arithmetic by hand; what stock makes of a checkpoint in a process that cannot import
this package.
"""

import math
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, DrawnSet, InterruptionError, train
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn.modules.block import PSA, A2C2f, ABlock, Bottleneck, C3Ghost, GhostBottleneck, PSABlock, ResNetBlock
from ultralytics.nn.modules.conv import ChannelAttention, Conv, Conv2, ConvTranspose, DWConv
from ultralytics.nn.tasks import DetectionModel, PoseModel, RTDETRDetectionModel
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.checks import check_yaml

from yolo_gradstab import ConfigError, incident, load_config, read_run, replay, trainer_for
from yolo_gradstab.mitigations import MARK, Change, apply_mitigations_, num_groups, structure_of

pytestmark = pytest.mark.filterwarnings("default")  # the host's own warnings are not ours to fail on

YOLOS = ["yolov8n.yaml", "yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml", "yolo26n-pose.yaml"]
BUILT: dict[str, nn.Module] = {}


def build(name: str) -> Any:
    """A model as the host builds it: a fresh copy, the same each time."""
    if name not in BUILT:
        torch.manual_seed(0)
        kind = RTDETRDetectionModel if "rtdetr" in name else PoseModel if "pose" in name else DetectionModel
        BUILT[name] = kind(name, verbose=False)
    return deepcopy(BUILT[name])


def mitigate(model: nn.Module, seed: int = 0, **wanted: Any) -> list[Change]:
    mitigations = load_config({"mitigations": wanted}).mitigations
    return apply_mitigations_(model, mitigations, generator=torch.Generator().manual_seed(seed))


def holder(module: nn.Module) -> nn.Module:
    """A block on its own, as a model that can be changed."""
    return nn.Sequential(module)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    flat: list[Tensor] = []

    def gather(value: Any) -> None:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, dict):
            for inner in value.values():
                gather(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                gather(inner)

    gather(out)
    return flat


def count(model: nn.Module, *names: str) -> Counter[str]:
    return Counter(type(m).__name__ for m in model.modules() if type(m).__name__ in names)


# The whole model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", YOLOS)
def test_null_changes_nothing(name: str) -> None:
    model, before = build(name), build(name)
    state = torch.get_rng_state()
    assert mitigate(model) == []
    assert repr(model) == repr(before)
    assert model.yaml == before.yaml
    assert not hasattr(model, "mitigations")
    expected = before.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", YOLOS)
def test_without_residual_connections(name: str) -> None:
    model = build(name)
    blocks = [m for m in model.modules() if type(m).__name__ in {"Bottleneck", "PSABlock", "SPPF"} and m.add]
    scaled = [m for m in model.modules() if isinstance(m, A2C2f) and m.gamma is not None]
    attention = count(model, "ABlock")["ABlock"]
    (change,) = mitigate(model, residual="off")
    assert len(change.modules) == len(blocks) + attention + len(scaled) > 0
    assert change == ("residual", "off", change.modules)
    assert not any(getattr(m, "add", False) for m in model.modules())
    assert count(model, "ABlock") == {}
    assert all(torch.isfinite(out).all() for out in outputs(model.train(), torch.rand(2, 3, 64, 64)))
    # nothing is left to be turned off, nor lost where it is turned on again but for the blocks that had to go
    assert mitigate(model, residual="off")[0].modules == []
    assert len(mitigate(model, residual="on")[0].modules) >= len(blocks)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo12n.yaml"])
def test_residual_connections_everywhere_they_fit(name: str) -> None:
    model = build(name)
    wanted = {
        path
        for path, m in model.named_modules()
        if (isinstance(m, Bottleneck) and not m.add and m.cv1.conv.in_channels == m.cv2.conv.out_channels)
        or (type(m).__name__ == "SPPF" and not m.add and m.cv1.conv.in_channels == m.cv2.conv.out_channels)
        or (isinstance(m, A2C2f) and m.gamma is None and m.cv1.conv.in_channels == m.cv2.conv.out_channels
            and count(m, "ABlock"))
    }  # fmt: skip
    (change,) = mitigate(model, residual="on")
    assert set(change.modules) == wanted != set()
    x = torch.rand(2, 3, 64, 64)
    assert not torch.equal(outputs(model.train(), x)[0], outputs(build(name).train(), x)[0])


@pytest.mark.parametrize("name", YOLOS)
@pytest.mark.parametrize("value", ["group", "none"])
def test_another_normalisation(name: str, value: str) -> None:
    model, before = build(name), build(name)
    norms = {path for path, m in before.named_modules() if isinstance(m, nn.BatchNorm2d)}
    (change,) = mitigate(model, normalization=value)
    assert set(change.modules) == norms
    assert count(model, "BatchNorm2d") == {}
    assert count(model, "GroupNorm")["GroupNorm"] == (len(norms) if value == "group" else 0)
    convolutions = dict(before.named_modules())
    for path in norms:  # each has its scale and shift, or its convolution has the shift
        conv = model.get_submodule(path.removesuffix("bn") + "conv")
        assert (conv.bias is not None) == (value == "none")
        assert torch.equal(conv.weight, convolutions[path.removesuffix("bn") + "conv"].weight)
        if value == "group":
            assert torch.equal(model.get_submodule(path).weight, torch.ones(conv.out_channels))
    x = torch.rand(2, 3, 64, 64)
    model.train()
    predicted = outputs(model, x)
    assert not torch.equal(predicted[0], outputs(before.train(), x)[0])
    sum(out.square().sum() for out in predicted).backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None and "flow" not in n and "dfl" not in n}
    assert {n for n in frozen if "one2one" not in n} == set()
    # what the host does before it validates, predicts or exports
    model.eval()
    fused = deepcopy(model).fuse(verbose=False).eval()
    assert torch.equal(model(x)[0], fused(x)[0])


@pytest.mark.parametrize("name", [*YOLOS, "rtdetr-l.yaml"])
def test_another_activation_is_called_as_often(name: str) -> None:
    """A count that knows nothing of names: calls of the hidden activations in a forward pass."""
    kinds = (nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh)

    def calls(model: nn.Module) -> Counter[str]:
        found: Counter[str] = Counter()
        handles = [
            m.register_forward_hook(lambda m, *_: found.update([type(m).__name__]))
            for m in {id(m): m for m in model.modules() if isinstance(m, kinds)}.values()
        ]
        model.eval()(torch.rand(1, 3, 64, 64))
        for handle in handles:
            handle.remove()
        return found

    model = build(name)
    before = calls(model)
    default, yaml = (type(Conv.default_act), id(Conv.default_act)), model.yaml
    (change,) = mitigate(model, activation="tanh")
    assert calls(model) == {"Tanh": sum(before.values())}
    assert len({id(model.get_submodule(path).act) for path in change.modules}) == len(change.modules) > 50
    assert default == (type(Conv.default_act), id(Conv.default_act))
    # the host's YAML says the same, where it can
    assert hasattr(model, MARK) == ("rtdetr" in name)
    if "rtdetr" not in name:
        assert "activation" not in yaml  # it may be another model's too
        again = type(model)(model.yaml, verbose=False)
        assert repr(again.model) == repr(model.model)


@pytest.mark.parametrize("name", [*YOLOS, "rtdetr-l.yaml"])
def test_orthogonal_weights(name: str) -> None:
    model, before = build(name), build(name).state_dict()
    state = torch.get_rng_state()
    (change,) = mitigate(model, init={"method": "orthogonal", "gain": 0.5})
    assert torch.equal(state, torch.get_rng_state())
    assert change.value == "orthogonal 0.5"
    modules = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    expected = {n for n in modules if "dfl" not in n and "flow" not in n and before[n].any()}
    expected |= {n for n in before if n.endswith("in_proj_weight")}
    assert set(change.modules) == expected
    after = model.state_dict()
    assert [n for n in before if n not in expected and not torch.equal(before[n], after[n])] == []  # priors among them
    for weight_name in expected:
        weight = after[weight_name]
        blocks = 3 if weight_name.endswith("in_proj_weight") else getattr(modules[weight_name], "groups", 1)
        for block in weight.flatten(1).double().chunk(blocks):
            short = block if len(block) <= block.shape[1] else block.T
            torch.testing.assert_close(  # QR in float32
                short @ short.T, 0.25 * torch.eye(len(short), dtype=torch.float64), atol=1e-4, rtol=0
            )
    twins = [n for n in expected if "one2one_" in n and n.replace("one2one_", "") in expected]
    assert all(torch.equal(after[n], after[n.replace("one2one_", "")]) for n in twins)


@pytest.mark.parametrize(
    "method, variance",
    [
        ("xavier_normal", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        ("xavier_uniform", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        ("kaiming_normal", lambda fan_in, fan_out: 2 / fan_in),
        ("kaiming_uniform", lambda fan_in, fan_out: 2 / fan_in),
    ],
)
def test_drawn_weights_have_the_papers_variance(method: str, variance: Callable[[int, int], float]) -> None:
    model, again, other = build("yolo11n.yaml"), build("yolo11n.yaml"), build("yolo11n.yaml")
    mitigate(model, init={"method": method, "gain": 3})
    mitigate(again, init={"method": method, "gain": 3})
    mitigate(other, 1, init={"method": method, "gain": 3})
    large = [
        m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 500 and m.weight.requires_grad
    ]
    for module in large:
        area = math.prod(module.kernel_size)
        fan_in, fan_out = (channels // module.groups * area for channels in (module.in_channels, module.out_channels))
        expected = 9 * variance(fan_in, fan_out)
        # a variance of n normal numbers has a relative error of sqrt(2 / n); five of them
        assert module.weight.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / module.weight.numel()))
        if method.endswith("uniform"):
            assert module.weight.abs().max().item() <= math.sqrt(3 * expected) * (1 + 1e-6)
    assert len(large) > 50
    assert any(module.groups > 1 for module in large)
    states = [m.state_dict() for m in (model, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["model.0.conv.weight"], states[2]["model.0.conv.weight"])


@pytest.mark.parametrize("name", ["yolo12n.yaml", "yolo26n.yaml"])
@pytest.mark.parametrize("normalization", ["batch", "group", "none"])
def test_blocks_begin_as_the_identity_and_learn(name: str, normalization: str) -> None:
    model = build(name)
    _, change = mitigate(model, normalization=normalization, init="zero_residual")
    parameters = dict(model.named_parameters())
    assert all(not parameters[path].any() for path in change.modules)
    seen = Counter()
    for block in model.modules():
        if isinstance(block, ABlock) or (isinstance(block, (Bottleneck, PSABlock)) and block.add):
            inner = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
            x = torch.rand(2, inner.in_channels, 8, 8)
            assert torch.equal(block.train()(x), x)
            seen[type(block).__name__] += 1
    attention = seen["ABlock"] + seen["PSABlock"]  # which have two branches each
    others = sum(1 for m in model.modules() if type(m).__name__ == "SPPF" and m.add)
    assert len(change.modules) == seen["Bottleneck"] + 2 * attention + others
    sum(out.square().sum() for out in outputs(model.train(), torch.rand(2, 3, 64, 64))).backward()
    stuck = [path for path in change.modules if not parameters[path].grad.any()]
    # a block behind another whose branch is zero still gets its gradient through the sum
    assert stuck == []


# Single blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [Bottleneck(8, 8), PSABlock(32, num_heads=1), ABlock(32, 1), GhostBottleneck(8, 8), ResNetBlock(32, 8)]
)
def test_a_block_without_its_connection_is_its_branch(block: nn.Module) -> None:
    block.eval()
    x = torch.rand(1, next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels, 8, 8)
    match block:
        case Bottleneck():
            branch = block.cv2(block.cv1(x))
        case PSABlock():
            branch = block.ffn(block.attn(x))
        case ABlock():
            branch = block.mlp(block.attn(x))
        case GhostBottleneck():
            branch = block.conv(x)
        case ResNetBlock():
            branch = block.cv3(block.cv2(block.cv1(x))).relu()
    model = holder(block)
    names = set(model.state_dict())
    (change,) = mitigate(model, residual="off")
    assert change.modules == ["0"]
    assert torch.equal(model(x), branch)
    assert set(model.state_dict()) - {MARK} == names


def test_an_a2c2fs_own_connection_is_its_scale() -> None:
    block = A2C2f(64, 64, residual=True).eval()
    x = torch.rand(1, 64, 4, 4)
    model = holder(block)
    assert mitigate(model, residual="off")[0].modules == ["0", "0.m.0.0", "0.m.0.1"]
    first = block.cv1(x)
    attended = block.m[0](first)
    assert torch.equal(model(x), block.cv2(torch.cat([first, attended], 1)))
    assert mitigate(model, residual="on")[0].modules == []  # its blocks with attention are gone
    model = holder(A2C2f(64, 64))
    before = model.eval()(x)
    assert mitigate(model, residual="on")[0].modules == ["0"]
    torch.testing.assert_close(model(x), x + 0.01 * before)


def test_groups_by_hand() -> None:
    expected = {1: 1, 2: 1, 3: 1, 4: 2, 8: 4, 16: 8, 17: 1, 32: 16, 64: 32, 80: 20, 96: 32, 128: 32, 1024: 32}
    assert {channels: num_groups(channels) for channels in expected} == expected


def test_group_normalisation_by_hand() -> None:
    model = holder(DWConv(8, 8, 3))
    convolution = model[0].conv
    mitigate(model, normalization="group")
    x = torch.randn(2, 8, 5, 5)
    groups = convolution(x).unflatten(1, (4, 2))  # pairs of channels
    mean = groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = (groups - mean).square().mean(dim=(2, 3, 4), keepdim=True)
    normalised = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)  # BatchNorm's eps, outside a whole model
    torch.testing.assert_close(model(x), nn.functional.silu(normalised))


def test_a_transposed_convolution_is_normalised_too() -> None:
    model = holder(ConvTranspose(4, 8))
    assert mitigate(model, normalization="none")[0].modules == ["0.bn"]
    assert model[0].conv_transpose.bias is not None
    assert model(torch.rand(1, 4, 4, 4)).shape == (1, 8, 8, 8)


def test_a_gate_keeps_its_sigmoid() -> None:
    model = holder(nn.Sequential(ChannelAttention(4), Conv(4, 4)))
    assert mitigate(model, activation="relu")[0].modules == ["0.1"]
    assert isinstance(model[0][0].act, nn.Sigmoid)


# Refusals ------------------------------------------------------------------------------------------------------------


def rtdetr() -> nn.Module:
    return build("rtdetr-l.yaml")


ALL_OF_IT = (
    "mitigations.residual=off cannot be applied to this model: AIFI (model.11), DeformableTransformerDecoderLayer "
    "(model.28.decoder.layers.0 and 5 more) add their input in code, and have no switch for it; leave "
    "mitigations.residual out, or train another model"
)
STUCK = r"ReLU \(0\.cv2\) at the end of a branch would not let it begin at zero, or never leave it"


@pytest.mark.parametrize(
    "make, wanted, words",
    [
        (rtdetr, {"residual": "off"}, f"^{re.escape(ALL_OF_IT)}$"),
        (rtdetr, {"normalization": "group"}, r"RepConv \(model\.16\.m\.0 and 11 more\) are merged"),
        (rtdetr, {"init": "zero_residual"}, r"init=zero_residual cannot .* AIFI \(model\.11\), "),
        (lambda: holder(Conv2(4, 4)), {"normalization": "none"}, r"Conv2 \(0\) are merged"),
        (lambda: holder(nn.LayerNorm(4)), {"normalization": "none"}, r"LayerNorm \(0\) have no setting without it"),
        (lambda: holder(nn.BatchNorm2d(4)), {"normalization": "none"}, r"hold a BatchNorm of unknown use"),
        (lambda: holder(PSA(64, 64)), {"residual": "off"}, r"PSA \(0\) add their input in code"),
        (lambda: holder(ResNetBlock(32, 8)), {"activation": "silu"}, r"ResNetBlock \(0\) have theirs in code"),
        (lambda: holder(Conv(4, 4)), {"init": "zero_residual"}, r"needs residual connections, and this model has none"),
        (lambda: holder(Bottleneck(4, 4)), {"activation": "relu", "init": "zero_residual"}, STUCK),
        (lambda: holder(Bottleneck(4, 4)), {"activation": "sigmoid", "init": "zero_residual"}, r"Sigmoid \(0\.cv2\)"),
    ],
)
def test_what_cannot_be_changed_is_named(make: Callable[[], nn.Module], wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        mitigate(make(), **wanted)
    assert "\n" not in str(caught.value)


def test_blocks_with_connections_that_are_no_flags_may_stay() -> None:
    assert mitigate(holder(PSA(64, 64)), residual="on")[0].modules == []
    assert (
        len(mitigate(holder(C3Ghost(8, 8)), init="zero_residual")[0].modules) == 2
    )  # two convolutions make one branch


# In the trainer ------------------------------------------------------------------------------------------------------


def interrupt(trainer: Any) -> None:
    if trainer.epoch == 1:
        raise InterruptionError


STOCK = """\
import sys
sys.modules["yolo_gradstab"] = None  # importing ours would fail
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import torch_safe_load
path, data, images = sys.argv[1:4]
"""


def in_stock(code: str, *arguments: object) -> list[str]:
    """Run code in a process that cannot import this package; its last lines."""
    command = [sys.executable, "-c", STOCK + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "mitigations, key",
    [
        ({"normalization": "none", "residual": "off", "init": "kaiming_normal"}, "normalization"),
        pytest.param({"normalization": "group", "activation": "leaky_relu"}, "activation", marks=pytest.mark.slow),
    ],
)
def test_resume_equals_the_uninterrupted_run_and_stock_reads_its_checkpoint(
    drawn: dict[str, DrawnSet], tmp_path: Path, mitigations: dict[str, str], key: str
) -> None:
    arguments = drawn["detect"].arguments(tmp_path, epochs=3, val=False, data=str(drawn["detect"].yolo))
    ours = trainer_for("detect", mitigations=mitigations)
    whole = train(ours, arguments | {"name": "whole"})
    with pytest.raises(InterruptionError):
        train(ours, arguments | {"name": "parts"}, on_train_epoch_end=interrupt)
    last = tmp_path / "parts/weights/last.pt"

    records = [e for e in read_run(tmp_path / "parts").events if e["event"] == "mitigation"]
    assert [(e["key"], e["value"]) for e in records if e["key"] == key] == [(key, mitigations[key])]
    assert all(e["num_modules"] >= len(e["modules"]) > 0 for e in records)

    # stock validates, predicts and exports the same function, and does not train another on unnoticed
    checkpoint = torch.load(last, weights_only=False)["ema"].float().eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.save({"x": x, "y": checkpoint(x)[0]}, tmp_path / "expected.pt")
    said = in_stock(
        "torch_safe_load(sys.argv[5], safe_only=True)\n"
        "model = YOLO(path)\n"
        "model.val(data=data, imgsz=64, device='cpu', plots=False, verbose=False)\n"
        "model.predict(images, imgsz=64, device='cpu', verbose=False)\n"
        "expected = torch.load(sys.argv[4])\n"
        "model = YOLO(path)\n"
        "model.fuse()\n"
        "print('equal', torch.equal(model.model(expected['x'])[0], expected['y']))\n"
        "try:\n"
        "    YOLO(path).train(resume=True)\n"
        "except (RuntimeError, ValueError) as error:\n"
        "    print('refused', ' '.join(str(error).split()))\n",
        last, drawn["detect"].yolo, drawn["detect"].yolo.parent / "images/val", tmp_path / "expected.pt",
        tmp_path / "whole/weights/last.pt",
    )  # fmt: skip
    assert "equal True" in said
    (refused,) = (line for line in said if line.startswith("refused"))
    # without scales of norms the optimizer's groups differ, which the host loads first
    assert ("parameter group that doesn't match" if mitigations["normalization"] == "none" else MARK) in refused

    resumed = YOLO(last)
    resumed.train(resume=True, trainer=trainer_for("detect"))  # with the run's own configuration
    for mine, other in ((resumed.trainer.model, whole.model), (resumed.trainer.ema.ema, whole.ema.ema)):
        state, expected = mine.state_dict(), other.state_dict()
        assert state.keys() == expected.keys()
        assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    assert structure_of(resumed.trainer.model) == structure_of(whole.model)
    assert count(whole.model, "BatchNorm2d") == {}
    a, b = (read_run(tmp_path / name).steps.drop("time_s") for name in ("whole", "parts"))
    assert a.equals(b)
    assert read_run(tmp_path / "parts").config["mitigations"]["normalization"] == mitigations["normalization"]


@pytest.mark.slow
def test_stock_resumes_what_its_yaml_can_say(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    arguments = drawn["detect"].arguments(tmp_path, name="run", epochs=3, val=False, data=str(drawn["detect"].yolo))
    ours = trainer_for("detect", mitigations={"activation": "relu", "init": "orthogonal"})
    with pytest.raises(InterruptionError):
        train(ours, arguments, on_train_epoch_end=interrupt)
    said = in_stock(
        "model = YOLO(path)\n"
        "model.train(resume=True)\n"
        "kinds = [type(m.act).__name__ for m in model.trainer.model.modules() if hasattr(m, 'act')]\n"
        "print(model.trainer.epoch, sorted(set(kinds)))\n",
        tmp_path / "run/weights/last.pt", drawn["detect"].yolo, "",
    )  # fmt: skip
    assert said[-1] == "2 ['Identity', 'ReLU']"


@pytest.mark.parametrize(
    "wanted",
    # without a normalisation, weights as the host draws them let no signal through
    [
        {"normalization": "group"},
        pytest.param({"normalization": "none", "residual": "off", "init": "kaiming_normal"}, marks=pytest.mark.slow),
    ],
)
def test_stock_exports_to_onnx_what_was_trained(tmp_path: Path, wanted: dict[str, str]) -> None:
    import onnxruntime

    model = build(str(MODELS / "yolo26-tiny.yaml"))
    mitigate(model, **wanted)
    model.args = {"task": "detect", "imgsz": 64}
    torch.save({"model": deepcopy(model).half(), "train_args": {"task": "detect"}}, tmp_path / "last.pt")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = model.half().float().eval()(x)[0]
    in_stock("YOLO(path).export(format='onnx', imgsz=64, device='cpu', simplify=False)\n", tmp_path / "last.pt", "", "")
    session = onnxruntime.InferenceSession(tmp_path / "last.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # boxes in pixels of 64, scores and classes: of another runtime, with other sums
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), atol=1e-2, rtol=1e-3)


def test_a_model_built_afresh_by_stock_does_not_take_the_state_unnoticed() -> None:
    model = build("yolo26n.yaml")
    mitigate(model, residual="off")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "resume_with_yolo_gradstab"'):
        build("yolo26n.yaml").load_state_dict(model.state_dict())  # as the host's resume loads the EMA
    model = build("yolo26n.yaml")
    mitigate(model, residual="on", normalization="batch", init="orthogonal", activation="relu")
    type(model)(model.yaml, verbose=False).load_state_dict(model.state_dict())


def test_a_pickle_holds_no_class_of_ours() -> None:
    for wanted in ({"normalization": "group"}, {"normalization": "none"}, {"activation": "tanh"}):
        model = build("yolo12n.yaml")
        mitigate(model, residual="off", init="orthogonal", **wanted)
        assert b"yolo_gradstab." not in pickle.dumps(model)
        assert {type(m).__module__.partition(".")[0] for m in model.modules()} == {"torch", "ultralytics"}
        # nor anything bound to a module that was replaced
        plain = (bool, int, float, str, tuple, list, dict, set, type(None), torch.Tensor, torch.dtype, nn.Module)
        assert {type(v) for m in model.model.modules() for v in vars(m).values() if not isinstance(v, plain)} == set()


def test_every_process_builds_the_same_and_leaves_the_random_state_alone(
    drawn: dict[str, DrawnSet], tmp_path: Path
) -> None:
    arguments = drawn["detect"].arguments(tmp_path, seed=3)
    config = {"mitigations": {"init": "xavier_normal", "normalization": "group"}}
    states = []
    for cls in (trainer_for("detect", config), trainer_for("detect", config), trainer_for("detect")):
        trainer = cls(overrides=dict(arguments))
        torch.manual_seed(len(states))  # as the host's seed differs from rank to rank
        states.append(trainer.get_model(str(drawn["detect"].model), verbose=False).state_dict())
        after = torch.rand(1)
        torch.manual_seed(len(states) - 1)
        DetectionModel(str(drawn["detect"].model), nc=3, verbose=False)
        assert torch.equal(after, torch.rand(1))
    drawn_names = [name for name in states[0] if "conv.weight" in name and "dfl" not in name]
    assert all(torch.equal(states[0][name], states[1][name]) for name in drawn_names)
    assert not torch.equal(states[0][drawn_names[0]], states[2][drawn_names[0]])


def test_weights_that_do_not_go_with_the_mitigations(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    arguments = drawn["detect"].arguments(tmp_path)
    cfg = str(drawn["detect"].model)

    def model(weights: nn.Module, **wanted: Any) -> Any:
        trainer = trainer_for("detect", mitigations=wanted)(overrides=dict(arguments))
        return trainer.get_model(cfg, weights, verbose=False)

    plain = model(None)  # type: ignore[arg-type]
    with torch.no_grad():
        plain.model[0].conv.weight.add_(1)
    with pytest.raises(
        ConfigError, match=r"init=orthogonal would throw away the weights .*; give a model's YAML as model="
    ):
        model(plain, init="orthogonal")
    changed = model(plain, residual="off", normalization="group")
    assert torch.equal(changed.state_dict()["model.0.conv.weight"], plain.state_dict()["model.0.conv.weight"])
    with pytest.raises(ConfigError, match=r"residual=null, but the weights are of a model .*residual=off; give it so"):
        model(changed, normalization="group")
    assert repr(model(changed, residual="off", normalization="group")) == repr(changed)


def test_the_log_says_what_was_changed(drawn: dict[str, DrawnSet], tmp_path: Path, caplog: Any) -> None:
    trainer = trainer_for("detect", mitigations={"normalization": "batch", "activation": "relu"})(
        overrides=drawn["detect"].arguments(tmp_path)
    )
    LOGGER.addHandler(caplog.handler)
    try:
        trainer.get_model(str(drawn["detect"].model), verbose=False)
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert "mitigations.normalization=batch: nothing to change, the model is so already" in caplog.text
    assert "changed (model.0, model.1, model.2, ...)" in caplog.text


def test_an_incidents_model_is_rebuilt_with_its_mitigations() -> None:
    model = build("yolo26n.yaml")
    mitigate(model, residual="off", normalization="group")
    model.args = {}
    spec = incident._spec(model, task="detect", autocast_dtype=None, scale=1.0)
    rebuilt = replay._build(spec, Path("model.json"), images=(1, 3, 64, 64), labels=1)
    rebuilt.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(outputs(model.eval(), x)[0], outputs(rebuilt.eval(), x)[0])


def test_rtdetr_builds_at_any_size_with_what_applies() -> None:
    content = YAML.load(check_yaml("rtdetr-l.yaml"))
    assert {"RepC3", "AIFI", "HGBlock"} <= {row[2] for row in content["backbone"] + content["head"]}
    model = build("rtdetr-l.yaml")
    for wanted in ({"activation": "silu"}, {"init": "xavier_uniform"}, {"residual": "on"}, {"normalization": "batch"}):
        mitigate(model, **wanted)
    assert all(torch.isfinite(out).all() for out in outputs(model.eval(), torch.rand(1, 3, 64, 64)))
