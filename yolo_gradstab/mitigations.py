"""Changes to a built Ultralytics model before it is trained: shortcuts, normalisation, activations, first weights.

Where gradients explode or vanish, the usual remedies are in the model and not in the step: residual connections (He et
al. 2016), normalisation (Ioffe & Szegedy 2015, Wu & He 2018), initialisation (Glorot & Bengio 2010, Saxe et al. 2013,
He et al. 2015). Each can be set here, or taken away to see what it was good for.

A changed model consists of modules of torch and the host alone, since the host pickles whole models: stock Ultralytics
validates, predicts and exports it without this package. For that the host folds each `Conv`'s BatchNorm into its
convolution, and takes whatever stands in `Conv.bn` for one. So where the BatchNorm is gone, or is another thing, the
`Conv` becomes a `torch.nn.Sequential` of the same parts under the same names, which the host leaves as it is.

What was changed stays with the model as its attribute `mitigations`, plain data. To train on from a checkpoint the host
builds the model afresh from its YAML, without them, and loads whatever weights fit. Our trainer applies them again
before that. Stock's own resume would go on with another model and say nothing: a mark in the model makes it fail.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from ultralytics.nn.modules.activation import AGLU
from ultralytics.nn.modules.block import (
    C1,
    CIB,
    DFL,
    PSA,
    SPPF,
    A2C2f,
    ABlock,
    BNContrastiveHead,
    Bottleneck,
    BottleneckCSP,
    GhostBottleneck,
    HGBlock,
    ImagePoolingAttn,
    PSABlock,
    RealNVP,
    RepVGGDW,
    Residual,
    ResNetBlock,
    TorchVision,
)
from ultralytics.nn.modules.conv import ChannelAttention, Conv, Conv2, ConvTranspose, DWConv, RepConv, SpatialAttention
from ultralytics.nn.modules.transformer import (
    DeformableTransformerDecoderLayer,
    TransformerEncoderLayer,
    TransformerLayer,
)

from yolo_gradstab.config import ConfigError, Init, Mitigations

__all__ = ["Change", "apply_mitigations_", "num_groups", "structure_of"]

MOST_GROUPS = 32  # of a GroupNorm, and
LEAST_CHANNELS = 2  # in each: Wu & He 2018, whose ResNets have 32 groups of at least 2 channels
GAMMA = 0.01  # at first, of a residual connection that is turned on in an A2C2f: the host's own constant

FIRST_NAMES = 10  # of the modules that were changed, kept with the model

# A buffer of this name is in no model that stock builds, so that its resume ends in an error that says this.
MARK = "resume_with_yolo_gradstab"


class Change(NamedTuple):
    """What one mitigation did to a model.

    Attributes:
        key: ``residual``, ``normalization``, ``activation`` or ``init``.
        value: What it was set to.
        modules: Names of the modules that were changed, or of the weights that were drawn.
    """

    key: str
    value: str
    modules: list[str]


def apply_mitigations_(model: Any, wanted: Mitigations, *, generator: torch.Generator) -> list[Change]:
    """Change a built model in place: residual connections first, then normalisation, activations, weights.

    After an error the model is of no use.

    Args:
        model: As the host builds it, not yet fused, on the CPU.
        wanted: The mitigations; those that are null leave the model untouched, bit for bit.
        generator: Draws the weights; the global random state is left as found.

    Raises:
        ConfigError: One line naming the key and the modules that cannot be changed so.
    """
    changes = []
    if wanted.residual is not None:
        changes.append(_set_residual_(model, on=wanted.residual == "on"))
    if wanted.normalization is not None:
        changes.append(_set_normalization_(model, wanted.normalization))
    if wanted.activation is not None:
        changes.append(_set_activation_(model, wanted.activation))
    if wanted.init is not None:
        changes.append(_set_init_(model, wanted.init, generator))
    if changes:
        model.mitigations = [
            {**change._asdict(), "num_modules": len(change.modules), "modules": change.modules[:FIRST_NAMES]}
            for change in changes
        ]
    return changes


def structure_of(model: nn.Module) -> Mitigations:
    """The mitigations that a model, as read from a checkpoint, was changed by, but for its weights."""
    made = {record["key"]: record["value"] for record in getattr(model, "mitigations", [])}
    made.pop("init", None)
    return Mitigations(**made)


# Residual connections ------------------------------------------------------------------------------------------------

# Which have a flag `add`; turned on only where what comes out has as many channels as what goes in.
_FLAGGED = (Bottleneck, CIB, HGBlock, PSABlock, SPPF)

# Which always add what went in: without it they are their parts in sequence.
_IN_SEQUENCE: dict[type[nn.Module], tuple[str, ...]] = {
    ABlock: ("attn", "mlp"),
    C1: ("cv1", "m"),
    GhostBottleneck: ("conv",),
    ResNetBlock: ("cv1", "cv2", "cv3", "act"),
}

# Which add it in the middle of other arithmetic.
_FIXED = (
    PSA,
    TransformerEncoderLayer,
    TransformerLayer,
    DeformableTransformerDecoderLayer,
    ImagePoolingAttn,
    Residual,
    TorchVision,
)


def _set_residual_(model: nn.Module, *, on: bool) -> Change:
    """Turn every residual connection on or off: those by which a block adds its input to its output.

    Concatenations, such as C2f's, and sums of parallel convolutions, such as RepC3's, are none.

    References:
        He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition".
    """
    changed = []
    if not on:
        _refuse("residual", "off", _named(model, _FIXED), "add their input in code, and have no switch for it")
    for name, module in list(model.named_modules()):
        if isinstance(module, A2C2f):
            if _set_gamma_(module, on=on):
                changed.append(name)
        elif isinstance(getattr(module, "add", None), int):
            if bool(module.add) != on and (not on or (isinstance(module, _FLAGGED) and _keeps_channels(module))):
                module.add = on
                changed.append(name)
        elif getattr(module, "residual", None) is (not on) and not on:  # of an MLP
            module.residual = False
            changed.append(name)
        elif type(module) in _IN_SEQUENCE and not on:
            if isinstance(module, ResNetBlock):
                module.act = nn.ReLU()  # which it has in code, after the sum
            _replace_(model, name, _sequence(module, _IN_SEQUENCE[type(module)]))
            changed.append(name)
    if changed:
        _mark_(model)
    return Change("residual", "on" if on else "off", changed)


def _set_gamma_(module: A2C2f, *, on: bool) -> bool:
    """An A2C2f's own connection is there if its scale is; the host gives one only to blocks with attention."""
    if not on and module.gamma is not None:
        module.gamma = None
        return True
    if on and module.gamma is None and _keeps_channels(module) and any(isinstance(m, ABlock) for m in module.modules()):
        module.gamma = nn.Parameter(torch.full((module.cv2.conv.out_channels,), GAMMA))
        return True
    return False


def _keeps_channels(module: nn.Module) -> bool:
    """Whether as many channels come out as go in; a block's first convolution is on its input, its last its output."""
    if isinstance(module, A2C2f):
        return bool(module.cv1.conv.in_channels == module.cv2.conv.out_channels)
    convolutions = _convolutions(module)
    return bool(convolutions[0].in_channels == convolutions[-1].out_channels)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


# Normalisation -------------------------------------------------------------------------------------------------------

# The host merges their branches through their BatchNorms at validation and export, and knows no other way.
_MERGED = (Conv2, RepConv, RepVGGDW, BNContrastiveHead, TorchVision)


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm: the most, up to 32, that divide the channels and leave at least two in each.

    References:
        Wu & He 2018, "Group normalization": 32 groups; in its ResNets the smallest have two channels. With one channel
        each it would be instance normalisation, which makes every 1 x 1 map zero.
    """
    fitting = [n for n in range(1, MOST_GROUPS + 1) if channels % n == 0 and channels // n >= LEAST_CHANNELS]
    return max(fitting, default=1)


def _set_normalization_(model: nn.Module, value: str) -> Change:
    """Put another normalisation in the place of every BatchNorm.

    ``batch``: what the host builds, so that nothing is changed. ``group``: GroupNorm of `num_groups` groups, with the
    BatchNorm's `eps`. ``none``: nothing, and the convolution before it gets the bias that BatchNorm made superfluous
    (Ioffe & Szegedy 2015, section 3.2), zero at first as BatchNorm's own shift is: without any shift the network would
    have lost more than its normalisation.

    LayerNorms need no batch: they stay, and make ``none`` impossible.
    """
    if value == "batch":
        return Change("normalization", value, [])
    _refuse("normalization", value, _named(model, _MERGED), "are merged by the host through their BatchNorms")
    if value == "none":
        _refuse("normalization", value, _named(model, (nn.LayerNorm,)), "have no setting without it")
    modules = dict(model.named_modules())
    changed = []
    for name, norm in modules.items():
        if not isinstance(norm, _BatchNorm):
            continue
        parent_name, _, place = name.rpartition(".")
        parent = modules[parent_name]
        before = _convolutions_before(parent, place)
        if not before:
            _refuse("normalization", value, {type(parent).__name__: [parent_name]}, "hold a BatchNorm of unknown use")
        new: nn.Module = nn.Identity()
        if value == "group":
            new = nn.GroupNorm(num_groups(norm.num_features), norm.num_features, eps=norm.eps)
        else:
            for convolution in before:
                if convolution.bias is None:
                    convolution.bias = nn.Parameter(torch.zeros(convolution.out_channels))
        if isinstance(parent, (Conv, ConvTranspose)):
            first = "conv" if isinstance(parent, Conv) else "conv_transpose"
            parent.bn = new
            _replace_(
                model, parent_name, _sequence(parent, (first, "bn", "act") if value == "group" else (first, "act"))
            )
        else:
            parent.add_module(place, new)
        changed.append(name)
    if changed:
        _mark_(model)
    return Change("normalization", value, changed)


def _convolutions_before(parent: Any, place: str) -> list[_ConvNd]:
    """Whose output a module's BatchNorm normalises, where that is known."""
    if type(parent) in {Conv, DWConv}:
        return [parent.conv]
    if isinstance(parent, ConvTranspose):
        return [parent.conv_transpose]
    if isinstance(parent, BottleneckCSP):
        return [parent.cv2, parent.cv3]
    if isinstance(parent, nn.Sequential) and place.isdigit() and isinstance(before := parent[int(place) - 1], _ConvNd):
        return [before]
    return []


# Activations ---------------------------------------------------------------------------------------------------------

# PyTorch's defaults: a negative slope of 0.01.
_ACTIVATIONS = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}

_GATES = (AGLU, ChannelAttention, SpatialAttention)  # whose `act` is part of what they compute


def _set_activation_(model: Any, value: str) -> Change:
    """Put one activation in the place of every hidden one: `Conv`'s and that of the transformers' feed-forward parts.

    Gates and the sigmoids of the outputs stay. Each place gets a module of its own: the host's share one, by a class
    attribute that other models in the process use too. Where the host's YAML can say the same, it is made to, so that
    stock resumes and fine-tunes the model as it is.
    """
    wanted = _ACTIVATIONS[value]
    # `F.relu` after its sum.
    _refuse("activation", value, {} if wanted is nn.ReLU else _named(model, (ResNetBlock,)), "have theirs in code")
    _refuse("activation", value, _named(model, (TorchVision,)), "hold a model of another library")
    hidden = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "act", None), nn.Module)
        and not isinstance(module, _GATES)
        and not isinstance(module.act, nn.Identity)
    }
    changed = {name: module for name, module in hidden.items() if type(module.act) is not wanted}
    kinds = {type(module.act) for module in hidden.values()}
    has_yaml = isinstance(getattr(model, "yaml", None), dict)
    is_in_yaml = has_yaml and len(kinds) == 1 and all(isinstance(m, (Conv, nn.Sequential)) for m in hidden.values())
    for module in changed.values():
        module.act = wanted()
    if changed and is_in_yaml:
        model.yaml = {**model.yaml, "activation": f"torch.nn.{wanted.__name__}()"}
    elif changed:
        _mark_(model)
    return Change("activation", value, list(changed))


# Weights -------------------------------------------------------------------------------------------------------------

_METHODS: dict[str, Callable[[Tensor, float, torch.Generator], Any]] = {
    "xavier_normal": lambda weight, gain, random: nn.init.xavier_normal_(weight, gain, generator=random),
    "xavier_uniform": lambda weight, gain, random: nn.init.xavier_uniform_(weight, gain, generator=random),
    "kaiming_normal": lambda weight, gain, random: nn.init.kaiming_normal_(
        weight, nonlinearity="relu", generator=random
    ).mul_(gain),
    "kaiming_uniform": lambda weight, gain, random: nn.init.kaiming_uniform_(
        weight, nonlinearity="relu", generator=random
    ).mul_(gain),
    "orthogonal": lambda weight, gain, random: nn.init.orthogonal_(weight, gain, generator=random),
}


def _set_init_(model: nn.Module, init: Init, generator: torch.Generator) -> Change:
    """Draw every weight of convolutions, linear layers and attention anew, or make residual branches begin at zero.

    ``xavier_*``: variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010). ``kaiming_*``: variance
    gain^2 * 2 / fan_in, so that a gain of 1 is He's for ReLU (He et al. 2015). ``orthogonal``: rows or columns,
    whichever are fewer, orthogonal and of length `gain` (Saxe et al. 2013). Each group of a grouped convolution, and
    each of attention's three projections, is a matrix of its own: as one matrix, a depthwise convolution would be
    orthogonal between channels that it never mixes, and its fan_out too large by the number of channels.

    Biases keep the host's values, and with them the priors of the head. So do weights that the host has at zero on
    purpose, the fixed bins of the DFL, and the flow of the pose loss, which is no layer of the network.
    """
    if init.method == "zero_residual":
        return Change("init", init.method, _zero_residual_(model))
    drawn: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight, blocks in _weights(model):
            twin = drawn.get(name.replace("one2one_", ""))
            if twin is not None and twin.shape == weight.shape:  # the host begins with two heads that are equal
                weight.copy_(twin)
            else:
                for block in weight.chunk(blocks):
                    _METHODS[init.method](block, init.gain, generator)
            drawn[name] = weight
    return Change("init", init.label, list(drawn))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, weight, and into how many matrices it falls."""
    apart = {id(m) for kept in model.modules() if isinstance(kept, (DFL, RealNVP)) for m in kept.modules()}
    for name, module in model.named_modules():
        if id(module) in apart:
            continue
        if isinstance(module, (_ConvNd, nn.Linear)) and module.weight.any():
            yield f"{name}.weight", module.weight, getattr(module, "groups", 1)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{name}.in_proj_weight", module.in_proj_weight, 3


def _zero_residual_(model: nn.Module) -> list[str]:
    """Set the last scale of every residual branch to zero, so that each block begins as the identity.

    It is the scale of the branch's last normalisation, or its last convolution where it has none.

    References:
        Goyal et al. 2017, "Accurate, large minibatch SGD", section 5.1; Zhang, Dauphin & Ma 2019, "Fixup
        initialization", for networks without normalisation.
    """
    value = "zero_residual"
    _refuse("init", value, _named(model, _FIXED), "have no last scale that could be zero")
    names = {id(module): name for name, module in model.named_modules()}
    ends = [(names[id(end)], end) for module in model.modules() for end in _branch_ends(module)]
    if not ends:
        raise ConfigError("mitigations.init=zero_residual needs residual connections, and this model has none")
    stuck: dict[str, list[str]] = {}
    for name, end in ends:
        if not _passes_gradient_at_zero(end.act):
            stuck.setdefault(type(end.act).__name__, []).append(name)
    _refuse("init", value, stuck, "at the end of a branch would not let it begin at zero, or never leave it")
    changed = []
    with torch.no_grad():
        for name, end in ends:
            norm = getattr(end, "bn", None)
            if isinstance(norm, (_BatchNorm, nn.GroupNorm)):
                norm.weight.zero_()
                changed.append(f"{name}.bn.weight")
            else:
                end.conv.weight.zero_()
                changed.append(f"{name}.conv.weight")
    return changed


def _branch_ends(module: Any) -> list[Any]:
    """The last convolution of each of a block's residual branches, with its normalisation and activation."""
    if isinstance(module, ABlock):
        return [module.attn.proj, module.mlp[-1]]
    if isinstance(module, A2C2f):
        return [] if module.gamma is None else [module.cv2]
    if isinstance(module, C1):
        return [module.m[-1]]
    if isinstance(module, ResNetBlock):
        return [module.cv3]
    if isinstance(module, GhostBottleneck):
        return [module.conv[-1].cv1, module.conv[-1].cv2]
    if not (isinstance(module, _FLAGGED) and getattr(module, "add", False)):
        return []
    if isinstance(module, PSABlock):
        return [module.attn.proj, module.ffn[-1]]
    return [module.cv1[-1] if isinstance(module, CIB) else module.ec if isinstance(module, HGBlock) else module.cv2]


def _passes_gradient_at_zero(activation: nn.Module) -> bool:
    """Whether zero stays zero and can be left again: ReLU's gradient is zero there, and the sigmoid's value is 0.5."""
    zero = torch.zeros(1, requires_grad=True)
    out = activation(zero)
    (slope,) = torch.autograd.grad(out, zero)
    return bool(out == 0) and bool(slope != 0)


# Parts of a model ----------------------------------------------------------------------------------------------------


def _named(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, list[str]]:
    """Names of the modules of some kinds, by class."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            found.setdefault(type(module).__name__, []).append(name)
    return found


def _refuse(key: str, value: str, found: dict[str, list[str]], why: str) -> None:
    if not found:
        return
    words = [
        f"{kind} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})" for kind, names in found.items()
    ]
    raise ConfigError(
        f"mitigations.{key}={value} cannot be applied to this model: {', '.join(words)} {why}; "
        f"leave mitigations.{key} out, or train another model"
    )


def _sequence(module: nn.Module, names: Iterable[str]) -> nn.Sequential:
    """Some parts of a module one after the other, under their names."""
    return nn.Sequential(OrderedDict((name, getattr(module, name)) for name in names))


def _replace_(model: nn.Module, name: str, new: nn.Module) -> None:
    old = model.get_submodule(name)
    for attribute in ("i", "f", "type", "np"):  # by which the host finds the way through a model's stages
        if attribute in vars(old):  # every module has a method `type`
            setattr(new, attribute, vars(old)[attribute])
    new.train(old.training)
    model.set_submodule(name, new)


def _mark_(model: nn.Module) -> None:
    if not hasattr(model, MARK):
        model.register_buffer(MARK, torch.zeros(1, dtype=torch.uint8))
