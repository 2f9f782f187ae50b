"""Typed configuration: one place for defaults, and errors that name the key.

Imports neither torch nor ultralytics; `clip_policy` and `build_policy` import torch when called.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import msgspec
import yaml

if TYPE_CHECKING:
    from yolo_gradstab.clipping import ClipPolicy

__all__ = [
    "CLIP_POLICIES",
    "TASKS",
    "Clip",
    "Config",
    "ConfigError",
    "Guard",
    "Init",
    "Mitigations",
    "Task",
    "Telemetry",
    "UpdateClip",
    "as_numbers",
    "build_policy",
    "clip_policy",
    "config_keys",
    "load_config",
    "nearest",
    "read_config_file",
]

Task = Literal["detect", "segment", "semantic", "depth", "classify", "pose", "obb"]  # the host's own, in its order
TASKS: tuple[Task, ...] = get_args(Task)


class ConfigError(ValueError):
    """A configuration the user must change; the message is one line and names the key."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of keys."""


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _require(section: _Section, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {getattr(section, name)!r}")


class _Clip(_Section, frozen=True, kw_only=True, tag_field="policy", forbid_unknown_fields=True):
    """A policy on the gradient; `policy` is its tag."""


class NoClip(_Clip, frozen=True, kw_only=True, tag="none"):
    """Measure only."""


class NormClip(_Clip, frozen=True, kw_only=True, tag="norm"):
    """Fixed global norm; 10.0 is Ultralytics' own hard-coded constant."""

    max_norm: float = 10.0

    def __post_init__(self) -> None:
        _require(self, "max_norm", _positive(self.max_norm), "positive and finite; use clip=none to turn clipping off")


class ValueClip(_Clip, frozen=True, kw_only=True, tag="value"):
    """Fixed bound on every element."""

    max_value: float = 1.0

    def __post_init__(self) -> None:
        _require(
            self, "max_value", _positive(self.max_value), "positive and finite; use clip=none to turn clipping off"
        )


class AdaptiveGradientClip(_Clip, frozen=True, kw_only=True, tag="agc"):
    """Each unit's gradient against its weight norm."""

    factor: float = 0.01
    eps: float = 1e-3
    exclude: tuple[Literal["bias", "norm", "head"], ...] = ("bias", "norm", "head")

    def __post_init__(self) -> None:
        _require(self, "factor", _positive(self.factor), "positive and finite")
        _require(self, "eps", _positive(self.eps), "positive and finite")


class AutoClip(_Clip, frozen=True, kw_only=True, tag="autoclip"):
    """A percentile of the run's own norms."""

    percentile: float = 90
    window: int = 1000

    def __post_init__(self) -> None:
        _require(self, "percentile", 0 <= self.percentile <= 100, "from 0 to 100")
        _require(self, "window", self.window >= 1, "at least 1")


class ZClip(_Clip, frozen=True, kw_only=True, tag="zclip"):
    """Spikes by z-score; `max_norm` is off unless given."""

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float | None = None

    def __post_init__(self) -> None:
        _require(self, "z", _positive(self.z), "positive and finite")
        _require(self, "alpha", 0 < self.alpha < 1, "between 0 and 1")
        _require(self, "warmup", self.warmup >= 2, "at least 2, since one norm has no variance")
        _require(self, "max_norm", self.max_norm is None or _positive(self.max_norm), "positive and finite, or null")


class TensorEma(_Clip, frozen=True, kw_only=True, tag="tensor_ema"):
    """Each tensor against the running mean of its own norms."""

    ratio: float = 2.0
    beta: float = 0.98
    warmup: int = 100

    def __post_init__(self) -> None:
        _require(self, "ratio", math.isfinite(self.ratio) and self.ratio > 1, "finite and above 1")
        _require(self, "beta", 0 < self.beta < 1, "between 0 and 1")
        _require(self, "warmup", self.warmup >= 1, "at least 1")


class Stabilizer(_Clip, frozen=True, kw_only=True, tag="stabilizer"):
    """A steady norm in place of the gradient's own."""

    target: float = 10.0
    gamma1: float = 0.7
    gamma2: float = 0.9

    def __post_init__(self) -> None:
        _require(self, "target", _positive(self.target), "positive and finite")
        _require(self, "gamma1", 0 <= self.gamma1 < 1, "from 0 to below 1")
        _require(self, "gamma2", 0 <= self.gamma2 < 1, "from 0 to below 1")


Clip = NoClip | NormClip | ValueClip | AdaptiveGradientClip | AutoClip | ZClip | TensorEma | Stabilizer
CLIP_POLICIES: dict[str, type[_Clip]] = {cls.__struct_config__.tag: cls for cls in get_args(Clip)}


class UpdateClip(_Section, frozen=True, kw_only=True):
    """Bound on the real step of each tensor, relative to its norm."""

    max_ratio: float
    follow_lr: bool = True

    def __post_init__(self) -> None:
        allowed = "positive and finite; use update_clip=null to turn it off"
        _require(self, "max_ratio", _positive(self.max_ratio), allowed)


class Guard(_Section, frozen=True, kw_only=True):
    """What happens to a step that must not be applied, and to a run that has diverged.

    A divergence is noticed and recorded whatever `divergence` says; ``stop`` ends the run there, ``rollback`` goes back
    to a good state with every learning rate times `backoff`, at most `max_rollbacks` times. It does so too where the
    weights or BatchNorm's variances grow so abruptly that the run will be lost; where updates are many times too large,
    the rate is multiplied by `backoff` more than once. A run without a clip is clipped as stock does it, at 10, from
    its first rollback on: what blew up was the gradient, and not the rate alone. It goes back too where `update_clip`
    alone holds its updates together, at ten looks in a row.
    """

    nonfinite: Literal["skip", "stop", "off"] = "skip"
    spike: Literal["off", "clip", "skip"] = "off"
    divergence: Literal["rollback", "stop", "off"] = "rollback"
    backoff: float = 0.5
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        _require(self, "backoff", 0 < self.backoff <= 1, "above 0 and at most 1")
        allowed = "at least 0; use guard.divergence=stop to end a run where it diverges"
        _require(self, "max_rollbacks", self.max_rollbacks >= 0, allowed)


class Telemetry(_Section, frozen=True, kw_only=True):
    """How often records are kept, in optimizer steps: of the step, and of each layer."""

    every: int = 1
    layers_every: int = 10

    def __post_init__(self) -> None:
        _require(self, "every", self.every >= 1, "at least 1")
        _require(self, "layers_every", self.layers_every >= 1, "at least 1")


class Init(_Section, frozen=True, kw_only=True):
    """How weights are drawn; `gain` multiplies them."""

    method: Literal[
        "xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform", "orthogonal", "zero_residual"
    ]
    gain: float = 1.0

    def __post_init__(self) -> None:
        _require(self, "gain", _positive(self.gain), "positive and finite")
        allowed = "left out with method zero_residual, which draws nothing"
        _require(self, "gain", self.gain == 1 or self.method != "zero_residual", allowed)

    @property
    def label(self) -> str:
        """Its method, and its gain where that is not 1."""
        return self.method + (f" {self.gain:g}" if self.gain != 1 else "")


class Mitigations(_Section, frozen=True, kw_only=True):
    """Changes to the model before it is trained; what is null stays as the host builds it."""

    normalization: Literal["batch", "group", "none"] | None = None
    init: Init | None = None
    residual: Literal["on", "off"] | None = None
    activation: Literal["silu", "relu", "leaky_relu", "sigmoid", "tanh"] | None = None


class Config(_Section, frozen=True, kw_only=True):
    """Everything that is ours in a training run. The default changes nothing about the training."""

    clip: Clip = NormClip()
    update_clip: UpdateClip | None = None
    guard: Guard = Guard()
    telemetry: Telemetry = Telemetry()
    mitigations: Mitigations = Mitigations()

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, as it is written to `gradstab/config.yaml`."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


_SHORTHANDS = {"clip", "update_clip"}  # keys that a single value may stand for
_SECTIONS: dict[str, type[_Section]] = {
    "update_clip": UpdateClip,
    "guard": Guard,
    "telemetry": Telemetry,
    "mitigations": Mitigations,
    "mitigations.init": Init,
}


def config_keys() -> list[str]:
    """Every valid dotted key, for suggestions."""
    keys = {"clip", "clip.policy", *_SECTIONS}
    for cls in CLIP_POLICIES.values():
        keys |= {f"clip.{name}" for name in cls.__struct_fields__}
    for section, fields in _SECTIONS.items():
        keys |= {f"{section}.{name}" for name in fields.__struct_fields__}
    return sorted(keys)


def load_config(*layers: dict[str, Any] | Config | str | Path | None) -> Config:
    """Build a configuration from layers of keys, later ones winning.

    Args:
        layers: Mappings with nested (``{"clip": {"policy": "agc"}}``) or dotted (``{"clip.factor": 0.02}``) keys, or
            paths of YAML files of such. ``clip="agc"`` alone is that policy with its defaults, ``update_clip=0.03``
            that ratio, and ``mitigations={"init": "orthogonal"}`` that method.

    Raises:
        ConfigError: One line naming the key, the value, what is allowed and what to do, and the file if it is a file's.
    """
    files = {i: layer for i, layer in enumerate(layers) if isinstance(layer, str | Path)}
    read = [read_config_file(layer) if isinstance(layer, str | Path) else layer for layer in layers]
    try:
        return _load(read)
    except ConfigError as error:
        for i, path in files.items():
            try:
                _load([read[i]])
            except ConfigError as alone:
                if str(alone) == str(error):
                    raise ConfigError(f"gradstab={path}: {error}") from None
        raise


def _load(layers: list[dict[str, Any] | Config | None]) -> Config:
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer is None:
            continue
        plain = layer.to_dict() if isinstance(layer, Config) else layer
        if not isinstance(plain, dict):
            raise ConfigError(f"a configuration must be a mapping of keys or a YAML file's path, got {plain!r}")
        for key in _SHORTHANDS & plain.keys():
            if not isinstance(plain[key], dict):
                merged.pop(key, None)  # `clip=agc` is that policy with its defaults, whatever an earlier layer said
        _merge(merged, _nested(plain))
    _check_keys(merged)
    for section in ("guard", "telemetry", "mitigations"):
        if not isinstance(value := merged.get(section, {}), dict):
            advice = "guard.nonfinite=off and guard.divergence=off" if section == "guard" else f"{section}.KEY=..."
            raise ConfigError(f"{section} must be a group of keys, got {value!r}; give e.g. {advice}")
    if isinstance(guard := merged.get("guard"), dict):  # an unquoted `off` is False to YAML 1.1
        merged["guard"] = {key: "off" if value is False else value for key, value in guard.items()}
    if isinstance(mitigations := merged.get("mitigations"), dict) and isinstance(mitigations.get("residual"), bool):
        merged["mitigations"] = {**mitigations, "residual": "on" if mitigations["residual"] else "off"}
    try:
        return msgspec.convert(merged, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(error, merged)) from None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Keys of a YAML file (`gradstab=FILE.yaml`), not yet checked.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not hold keys.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"gradstab={path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"gradstab={path}: is not valid YAML ({line})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"gradstab={path}: must hold keys such as `clip: agc`, got {type(content).__name__}")
    return content


def clip_policy(policy: str, /, **fields: Any) -> ClipPolicy:
    """A gradient policy for any PyTorch loop, where `torch.nn.utils.clip_grad_norm_` would stand.

    Args:
        policy: ``none norm value agc autoclip zclip tensor_ema`` or ``stabilizer``.
        fields: The policy's fields; defaults as in the configuration.

    Example:
        >>> import torch
        >>> policy = clip_policy("norm", max_norm=1.0)
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> policy.clip_([weight])
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    return build_policy(load_config({"clip": {"policy": policy, **fields}}).clip)


def build_policy(clip: Clip) -> ClipPolicy:
    """The policy that a configuration describes."""
    from yolo_gradstab import clipping

    policy: type[ClipPolicy] = getattr(clipping, type(clip).__name__)
    return policy(**{name: getattr(clip, name) for name in clip.__struct_fields__})


def _nested(layer: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys into nested ones; shorthands written out; YAML 1.1's `1e-3` strings into floats."""
    nested: dict[str, Any] = {}
    for key, value in sorted(layer.items(), key=lambda item: str(item[0]).count(".")):  # `clip` before `clip.factor`
        _merge(nested, _place(str(key), as_numbers(value)))
    return nested


def _place(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``."""
    head, _, rest = key.partition(".")
    if rest:
        value = _place(rest, value)
    if head == "clip" and not isinstance(value, dict):
        if value in (None, ""):  # an unset variable in `clip=$POLICY` must not turn clipping off
            raise ConfigError("clip must name a policy, got nothing; give clip=none to turn clipping off")
        value = {"policy": value}
    elif head == "update_clip" and (value is False or value in ("none", "None")):  # `off` is False to YAML 1.1
        value = None
    elif head == "update_clip" and value is not None and not isinstance(value, dict):
        value = {"max_ratio": value}
    elif head == "mitigations" and isinstance(value, dict) and not isinstance(value.get("init"), dict | None):
        value = {**value, "init": {"method": value["init"], "gain": Init(method="orthogonal").gain}}
    return {head: value}


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    """Overlay in place; a layer that names another policy or method starts it afresh."""
    for key, value in layer.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            changes_policy = "policy" in value and value["policy"] != old.get("policy", "norm")
            changes_method = "method" in value and value["method"] != old.get("method")
            into[key] = {} if changes_policy or changes_method else dict(old)
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def as_numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; make it a number, wherever it stands."""
    if isinstance(value, dict):
        return {key: as_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


MOST_LISTED = 40  # words in an error


def nearest(word: str, known: Iterable[str], noun: str = "key") -> str:
    """How an error names the nearest valid word, or all where they are few: ``; the nearest valid key is clip``."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; the nearest valid {noun} is {near[0]}"
    if len(known) > MOST_LISTED:
        return "; `yolo-gradstab help` lists ours, Ultralytics' documentation its own"
    return f"; valid {noun}s are {', '.join(known)}"


def _check_keys(merged: dict[str, Any]) -> None:
    """Unknown keys by name; msgspec would name only the level they are on."""
    for key, value in merged.items():
        if key != "clip" and key not in _SECTIONS:
            raise ConfigError(f"unknown key {key}={value!r}{nearest(key, config_keys())}")
    clip = merged.get("clip")
    if isinstance(clip, dict):
        policy = clip.setdefault("policy", "norm")
        if not isinstance(policy, str) or policy not in CLIP_POLICIES:
            number = (
                ""
                if isinstance(policy, bool) or not isinstance(policy, int | float)
                else f"; a largest norm is clip.max_norm={policy}"
            )
            raise ConfigError(f"clip.policy must be one of {', '.join(CLIP_POLICIES)}, got {policy!r}{number}")
        for field in clip.keys() - {"policy", *CLIP_POLICIES[policy].__struct_fields__}:
            raise ConfigError(_foreign_field(field, clip[field], policy))
    for section, cls in _SECTIONS.items():
        value = _at(section.split("."), merged)
        if isinstance(value, dict):
            for field in value.keys() - set(cls.__struct_fields__):
                key = f"{section}.{field}"
                raise ConfigError(f"unknown key {key}={value[field]!r}{nearest(key, config_keys())}")


def _foreign_field(field: str, value: Any, policy: str) -> str:
    owners = [name for name, cls in CLIP_POLICIES.items() if field in cls.__struct_fields__]
    own = ", ".join(CLIP_POLICIES[policy].__struct_fields__) or "no fields"
    if owners:
        return (
            f"clip.{field}={value!r} belongs to policy {' and '.join(owners)}, not to {policy} (which has {own}); "
            f"give clip={owners[0]} or drop the key"
        )
    fields = {"policy", *(name for cls in CLIP_POLICIES.values() for name in cls.__struct_fields__)}
    near = difflib.get_close_matches(field, sorted(fields), n=1)
    hint = f"; the nearest valid key is clip.{near[0]}" if near else ""
    return f"unknown key clip.{field}={value!r}{hint}; policy {policy} has {own}"


# msgspec's names of types in the words of a configuration file.
_KINDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "array": "a list",
    "object": "a group of keys",
}


def _explain(error: msgspec.ValidationError, merged: dict[str, Any]) -> str:
    """msgspec's words with our dotted key and the value."""
    text, _, path = str(error).partition(" - at `$")
    keys = re.findall(r"[^.\[\]`]+", path)
    dotted = ".".join(keys)
    if match := re.match(r"(\w+) must be (.*), got (.*)$", text):  # from a section's own check: the path ends at it
        return f"{dotted}.{match[1]} must be {match[2]}, got {match[3]}"
    value = _at(keys, merged)
    if match := re.match(r"Object missing required field `(\w+)`", text):
        example = "orthogonal" if match[1] == "method" else "0.03"
        return f"{dotted}.{match[1]} is required, e.g. {dotted}={example}"
    if match := re.match(r"Expected `(.+?)`, got `.+`", text):
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in match[1].split(" | "))
        if match[1] in {"str", "str | null"} and (choices := _choices(keys, merged)):
            wanted = f"one of {choices}"
        return f"{dotted} must be {wanted}, got {value!r}"
    if text.startswith("Invalid enum value"):
        return f"{dotted} must be one of {_choices(keys, merged)}, got {value!r}"
    return f"{dotted}: {text}, got {value!r}"


def _at(keys: list[str], merged: dict[str, Any]) -> Any:
    """What stands under nested keys; at a key that is not there, or has no keys, what stands above it."""
    value: Any = merged
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else value
    return value


def _choices(keys: list[str], merged: dict[str, Any]) -> str:
    """The words that a key takes; empty where it takes any text."""
    is_clip = keys[0] == "clip"  # whose fields depend on the policy, and may be lists
    section: type[_Section] = CLIP_POLICIES[merged["clip"]["policy"]] if is_clip else _SECTIONS[".".join(keys[:-1])]
    name = keys[1] if is_clip else keys[-1]
    kind = {field.name: field.type for field in msgspec.structs.fields(section)}[name]
    may_be_null = type(None) in get_args(kind)
    while get_origin(kind) is not Literal:
        if not get_args(kind):
            return ""
        kind = get_args(kind)[0]
    choices = ", ".join(str(choice) for choice in get_args(kind))
    return f"{choices}, or null" if may_be_null else choices
