"""`yolo_gradstab.config`: what is accepted, and the words of every refusal."""

from pathlib import Path

import msgspec
import pytest

from yolo_gradstab.config import CLIP_POLICIES, Config, ConfigError, Init, NormClip, load_config, read_config_file


def test_the_default_is_stock() -> None:
    assert load_config().to_dict() == {
        "clip": {"policy": "norm", "max_norm": 10.0},
        "update_clip": None,
        "guard": {
            "nonfinite": "skip",
            "spike": "off",
            "divergence": "rollback",
            "backoff": 0.5,
            "max_rollbacks": 3,
        },
        "telemetry": {"every": 1, "layers_every": 10},
        "mitigations": {"normalization": None, "init": None, "residual": None, "activation": None},
    }


def test_defaults_of_every_policy() -> None:
    assert {name: load_config({"clip": name}).to_dict()["clip"] for name in CLIP_POLICIES} == {
        "none": {"policy": "none"},
        "norm": {"policy": "norm", "max_norm": 10.0},
        "value": {"policy": "value", "max_value": 1.0},
        "agc": {"policy": "agc", "factor": 0.01, "eps": 0.001, "exclude": ("bias", "norm", "head")},
        "autoclip": {"policy": "autoclip", "percentile": 90, "window": 1000},
        "zclip": {"policy": "zclip", "z": 2.5, "alpha": 0.97, "warmup": 25, "max_norm": None},
        "tensor_ema": {"policy": "tensor_ema", "ratio": 2.0, "beta": 0.98, "warmup": 100},
        "stabilizer": {"policy": "stabilizer", "target": 10.0, "gamma1": 0.7, "gamma2": 0.9},
    }


def test_shorthands_and_dotted_keys() -> None:
    config = load_config({"clip.factor": 0.02, "clip": "agc", "update_clip": 0.03, "guard.nonfinite": "stop"})
    assert config.clip.factor == 0.02  # type: ignore[union-attr]
    assert config.update_clip is not None
    assert (config.update_clip.max_ratio, config.update_clip.follow_lr) == (0.03, True)
    assert config.guard.nonfinite == "stop"


def test_later_layers_win() -> None:
    file = {"clip": {"policy": "agc", "factor": 0.5}, "update_clip": {"max_ratio": 0.1, "follow_lr": False}}
    assert load_config(file, {"clip.eps": 0.1}).to_dict()["clip"]["factor"] == 0.5
    assert load_config(file, {"clip": "agc"}).to_dict()["clip"]["factor"] == 0.01  # alone: with its defaults
    assert load_config(file, {"clip": {"policy": "norm"}}).clip == NormClip()
    assert load_config(file, {"update_clip": 0.03}).to_dict()["update_clip"] == {"max_ratio": 0.03, "follow_lr": True}
    assert load_config(file, {"update_clip": "none"}).update_clip is None
    assert load_config(load_config(file), None).to_dict() == load_config(file).to_dict()


def test_what_yaml_makes_of_off_and_of_1e_3(tmp_path: Path) -> None:
    path = tmp_path / "gradstab.yaml"
    path.write_text(
        "guard: {nonfinite: off}\nclip: {policy: agc, eps: 1e-3}\nupdate_clip: 3e-2\n"
        "mitigations: {residual: off, normalization: none, init: {method: orthogonal, gain: 5e-1}}\n"
    )
    config = load_config(read_config_file(path))
    assert config.guard.nonfinite == "off"
    assert config.to_dict()["clip"]["eps"] == 1e-3
    assert config.to_dict()["update_clip"]["max_ratio"] == 0.03
    assert (config.mitigations.residual, config.mitigations.normalization) == ("off", "none")
    assert config.mitigations.init == Init(method="orthogonal", gain=0.5)
    assert load_config({"mitigations.residual": True}).mitigations.residual == "on"


def test_an_initialisation_by_its_name_alone_has_the_default_gain() -> None:
    file = {"mitigations": {"init": {"method": "orthogonal", "gain": 2}, "residual": "off"}}
    orthogonal = Init(method="orthogonal")
    assert load_config({"mitigations": {"init": "orthogonal"}}).mitigations.init == orthogonal
    assert load_config(file, {"mitigations.init": "orthogonal"}).mitigations.init == orthogonal
    assert load_config(file, {"mitigations.init.gain": 3}).mitigations.init == Init(method="orthogonal", gain=3)
    assert load_config(file, {"mitigations.init": {"method": "xavier_normal"}}).mitigations.init == Init(
        method="xavier_normal"
    )
    assert load_config(file, {"mitigations.init": None}).mitigations.init is None
    assert load_config(file, {"mitigations.init": None}).mitigations.residual == "off"
    assert load_config({"mitigations.init.gain": 3, "mitigations.init": "orthogonal"}).mitigations.init == Init(
        method="orthogonal", gain=3
    )


def test_a_configuration_survives_being_saved() -> None:
    config = load_config({"clip": "agc", "update_clip": 0.1, "telemetry.every": 5})
    assert load_config(msgspec.json.decode(msgspec.json.encode(config.to_dict()))) == config


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"clipp": 3}, r"unknown key clipp=3; the nearest valid key is clip$"),
        ({"guard.spikes": "skip"}, r"unknown key guard\.spikes='skip'; the nearest valid key is guard\.spike$"),
        ({"guard.backoff": 1.5}, r"guard\.backoff must be above 0 and at most 1, got 1\.5$"),
        ({"guard.max_rollbacks": -1}, r"guard\.max_rollbacks must be at least 0; .*, got -1$"),
        ({"init": "orthogonal"}, r"unknown key init='orthogonal'; valid keys are clip, "),
        ({"mitigations": "group"}, r"mitigations must be a group of keys, got 'group'; give e\.g\. mitigations\.KEY="),
        ({"mitigations.activaton": "relu"}, r"the nearest valid key is mitigations\.activation$"),
        ({"mitigations.activation": "gelu"}, r"activation must be one of silu, .*, tanh, or null, got 'gelu'$"),
        ({"mitigations.residual": "none"}, r"^mitigations\.residual must be one of on, off, or null, got 'none'$"),
        ({"mitigations.init": "none"}, r"mitigations\.init\.method must be one of xavier_normal, .*, got 'none'$"),
        ({"mitigations.init": "zero_residual", "mitigations.init.gain": 2}, r"init\.gain must be left out with method"),
        ({"mitigations.init.gain": 2}, r"init\.method is required, e\.g\. mitigations\.init=orthogonal$"),
        ({"mitigations.init": {"method": "orthogonal", "gain": 0}}, r"gain must be positive and finite, got 0\.0$"),
        ({"mitigations.init.gian": 2}, r"unknown key mitigations\.init\.gian=2; .* key is mitigations\.init\.gain$"),
        ({"guard.nonfinit": "skip"}, r"nearest valid key is guard\.nonfinite$"),
        ({"clip": "agcc"}, r"clip\.policy must be one of none, norm, .*stabilizer, got 'agcc'$"),
        ({"clip": None}, r"^clip must name a policy, got nothing; give clip=none to turn clipping off$"),
        ({"clip": ""}, r"^clip must name a policy, got nothing"),
        ({"clip": [1]}, r"clip\.policy must be one of none, .*got \[1\]$"),
        ({"clip": 10}, r"clip\.policy must be one of none, .*, got 10; a largest norm is clip\.max_norm=10$"),
        ({"clip.factor": 0.1}, r"clip\.factor=0\.1 belongs to policy agc, not to norm \(which has max_norm\); give"),
        ({"clip": "agc", "clip.max_norm": 3}, r"clip\.max_norm=3 belongs to policy norm and zclip, not to agc"),
        ({"clip.foo": 1}, r"unknown key clip\.foo=1; policy norm has max_norm$"),
        (
            {"clip.polcy": "agc"},
            r"unknown key clip\.polcy='agc'; the nearest valid key is clip\.policy; policy norm has",
        ),
        (
            {"clip.facto": 1},
            r"unknown key clip\.facto=1; the nearest valid key is clip\.factor; policy norm has max_norm$",
        ),
        ({"guard.nonfinite": True}, r"^guard\.nonfinite must be one of skip, stop, off, got True$"),
        ({"mitigations.activation": 5}, r"^mitigations\.activation must be one of silu, .*, or null, got 5$"),
        ({"clip.max_norm": -1}, r"clip\.max_norm must be positive and finite; use clip=none to .*, got -1\.0$"),
        ({"clip.max_norm": float("inf")}, r"clip\.max_norm must be positive and finite; .*got inf$"),
        ({"clip.max_norm": "ten"}, r"^clip\.max_norm must be a number, got 'ten'$"),
        ({"clip.max_norm": True}, r"^clip\.max_norm must be a number, got True$"),
        ({"clip": "zclip", "clip.warmup": 1}, r"clip\.warmup must be at least 2, .* variance, got 1$"),
        ({"clip": "zclip", "clip.warmup": 2.5}, r"clip\.warmup must be a whole number, got 2\.5$"),
        ({"clip": "zclip", "clip.alpha": 1}, r"clip\.alpha must be between 0 and 1, got 1\.0$"),
        ({"clip": "autoclip", "clip.percentile": 101}, r"clip\.percentile must be from 0 to 100, got 101"),
        ({"clip": "autoclip", "clip.window": 0}, r"clip\.window must be at least 1, got 0$"),
        ({"clip": "tensor_ema", "clip.ratio": 1}, r"clip\.ratio must be finite and above 1, got 1\.0$"),
        ({"clip": "stabilizer", "clip.gamma2": 1}, r"clip\.gamma2 must be from 0 to below 1, got 1\.0$"),
        ({"clip": "agc", "clip.exclude": ["biases"]}, r"clip\.exclude\.0 must be one of bias, norm, head, got"),
        ({"clip": "agc", "clip.exclude": "bias"}, r"clip\.exclude must be a list, got 'bias'$"),
        ({"update_clip": -0.1}, r"update_clip\.max_ratio must be positive .*; use update_clip=null .*-0\.1$"),
        ({"update_clip": "x"}, r"update_clip\.max_ratio must be a number, got 'x'$"),
        ({"update_clip": {"follow_lr": True}}, r"update_clip\.max_ratio is required"),
        ({"update_clip.follow_lr": 3, "update_clip.max_ratio": 1}, r"follow_lr must be true or false, got 3$"),
        ({"guard.nonfinite": "halt"}, r"guard\.nonfinite must be one of skip, stop, off, got 'halt'$"),
        (
            {"guard": False},
            r"^guard must be a group of keys, got False; give e\.g\. guard\.nonfinite=off and guard\.div",
        ),
        ({"telemetry.every": 0}, r"telemetry\.every must be at least 1, got 0$"),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(keys)
    assert "\n" not in str(caught.value)


def test_what_is_no_configuration_at_all() -> None:
    with pytest.raises(ConfigError, match=r"must be a mapping of keys or a YAML file's path, got 5$"):
        load_config(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, words",
    [
        (None, r"cannot be read \(No such file or directory\)"),
        ("a: [", r"is not valid YAML"),
        ("- 1\n", r"must hold keys such as `clip: agc`, got list"),
        ("", r"must hold keys .* got NoneType"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config_file(path)


def test_frozen() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        Config().guard.nonfinite = "off"  # type: ignore[misc]


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("guard: {divergance: off}")
    with pytest.raises(
        ConfigError, match=r"^gradstab=.*mine\.yaml: unknown key guard\.divergance=.* guard\.divergence$"
    ):
        load_config(file)
    file.write_text("clip: agc")
    with pytest.raises(
        ConfigError, match=r"^clip\.max_norm=3 belongs to policy norm"
    ):  # the line's fault, not the file's
        load_config(str(file), {"clip.max_norm": 3})
    assert load_config(file, {"update_clip": False}) == load_config({"clip": "agc"})
