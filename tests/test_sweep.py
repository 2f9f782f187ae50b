"""Specs, plans and the folder of a sweep; how trials are run is in `test_executors.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from test_executors import TRIAL

from yolo_gradstab import sweep as sweep_module
from yolo_gradstab.cli import _training_arguments
from yolo_gradstab.config import ConfigError, load_config
from yolo_gradstab.runs import RunError, RunFolder, Status, locked
from yolo_gradstab.sweep import Spec, SweepError, check_files, plan, read_spec, read_trial, run_sweep

SPEC: dict[str, Any] = {
    "task": "detect",
    "train": {"model": "tiny.yaml", "data": "drawn.yaml", "optimizer": "SGD", "epochs": 3},
    "grid": {"lr0": [0.01, 0.1], "clip": ["none", {"policy": "norm", "max_norm": 10}]},
    "seeds": [0, 1],
}


def small(**changes: Any) -> Spec:
    return read_spec(SPEC | {"grid": {"lr0": [0.01, 0.1]}, "seeds": [0]} | changes)


# Reading


def test_spec_is_read_from_yaml_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(
        "task: pose\ntrain: {model: m.yaml, data: d.yaml, optimizer: SGD, weight_decay: 5e-4}\n"
        "grid: {lr0: [1e-3, 1E-2], update_clip: [null, 3e-2]}\n"
    )
    spec = read_spec(path, ["train.epochs=2", "seeds=[0,1]", "jobs=2", "grid.clip.max_norm=[1,10]"])
    assert spec.train == {"model": "m.yaml", "data": "d.yaml", "optimizer": "SGD", "weight_decay": 5e-4, "epochs": 2}
    assert spec.grid == {"lr0": [0.001, 0.01], "update_clip": [None, 0.03], "clip.max_norm": [1, 10]}
    assert (spec.seeds, spec.jobs, spec.executor) == ([0, 1], 2, "local")
    assert read_spec(path, {"seeds": [3], "train.lrf": "1e-2"}).seeds == [3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tusk": 1}, r"unknown key tusk=1; the nearest valid key is task"),
        ({"task": "mow"}, r"task must be one of detect, segment, semantic, depth, classify, pose, obb, got 'mow'"),
        ({"jobs": "two"}, r"jobs must be a whole number from 1, got 'two'"),
        ({"jobs": 0}, r"jobs must be a whole number from 1, got 0"),
        ({"seeds": []}, r"seeds must be a list of whole numbers, e\.g\. \[0, 1, 2\], none of them negative, got \[\]"),
        ({"seeds": [0, 0]}, r"seeds has 0 twice"),
        ({"seeds": [2**32]}, r"seeds must be below 2\^32, which is numpy's own limit, got 4294967296"),
        ({"train": {5: 1}}, r"train has the key 5, which is no word"),
        ({"executor": "slurm"}, r"executor must be local or ray, got 'slurm'"),
        ({"time_limit_s": 0}, r"time_limit_s must be a number of seconds above 0, or null, got 0"),
        (
            {"grid": {"clip": ["norm", {"policy": "norm", "max_norm": 10}]}},
            r"\{clip: norm\} and \{clip: \{max_norm: 10(\.0)?, policy: norm\}\} are the same run; give each once",
        ),
        ({"grid": {"update_clip": [0.03, {"max_ratio": 0.03}]}}, r"are the same run; give each once"),
        ({"grid": {"lr0": []}}, r"grid\.lr0 must be a list of at least one value, got \[\]"),
        ({"grid": {"lr0": 0.1}}, r"grid\.lr0 must be a list of at least one value, got 0\.1"),
        ({"grid": {"lr0": [0.1, 1e-1]}}, r"grid\.lr0 has 0\.1 twice; give each value once"),
        ({"grid": {"lr0": [2.0]}}, r"grid\.lr0 must be a number above 0 and at most 1.*, got 2\.0"),
        ({"grid": {"lr0": [0]}}, r"grid\.lr0 must be a number above 0 .*, got 0"),
        ({"train.lr0": 10}, r"train\.lr0 must be a number above 0 .*, got 10"),
        ({"train.lr0": 0.1}, r"lr0 is both in train and in grid; give it once"),
        (
            {"train.clip.max_norm": 5, "grid": {"clip": [{"max_norm": 9}]}},
            r"clip\.max_norm is both in train and in grid; give it once",
        ),
        ({"train.optimizer": "auto"}, r"optimizer=auto, .*, ignores lr0.*give train\.optimizer, e\.g\. SGD"),
        ({"grid": {"optimizer": ["SGD", "auto"]}}, r"optimizer=auto"),
        ({"train": {"model": "m", "data": "d"}}, r"optimizer=auto, Ultralytics' default, ignores lr0"),
        ({"train": {"optimizer": "SGD", "data": "d"}}, r"train\.model is missing; give what to train"),
        ({"train.seed": 3}, r"train\.seed cannot be set in a sweep; use the sweep's own `seeds"),
        ({"grid": {"seed": [1, 2]}}, r"grid\.seed cannot be set in a sweep; use the sweep's own `seeds"),
        ({"train.name": "x"}, r"train\.name cannot be set in a sweep"),
        ({"train.epocs": 3}, r"unknown key epocs=3; the nearest valid key is epochs"),
        ({"grid.clipp": ["agc"]}, r"unknown key clipp=\['agc'\]; the nearest valid key is clip$"),
        ({"train.gaurd.divergence": "off"}, r"the nearest valid key is guard\.divergence$"),
        ({"train.box": float("inf")}, r"box must be finite, got inf"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SweepError, match=words) as refused:
        read_spec(SPEC, changes)
    assert "\n" not in str(refused.value)


def test_our_keys_are_checked_for_every_combination() -> None:
    with pytest.raises(ConfigError, match=r"clip\.factor=0\.1 belongs to policy agc, not to norm"):
        read_spec(SPEC | {"grid": {"clip": ["agc", "norm"], "clip.factor": [0.1]}})
    with pytest.raises(ConfigError, match=r"update_clip\.max_ratio must be positive"):
        read_spec(SPEC | {"grid": {"update_clip": [None, -1]}})


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not valid YAML"), ("- 1", "must hold the keys task, train"), ("task: pose", "train is missing")],
)
def test_a_file_that_is_no_spec_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(SweepError, match=rf"rates\.yaml.* {words}"):
        read_spec(path)
    with pytest.raises(SweepError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        read_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(SweepError, match="'jobs' is not key=value"):
        read_spec(SPEC, ["jobs"])


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_specs_in_the_project_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = read_spec(path)
    assert len(plan(spec, "out")) >= 30
    if "sample" in spec.train["data"]:  # drawn by a command
        spec = msgspec.structs.replace(spec, train=spec.train | {"data": "coco8.yaml"})
    check_files(spec)


# Planning


def test_ids_do_not_depend_on_how_a_number_or_a_mapping_is_written() -> None:
    one = SPEC | {"grid": {"lr0": [0.1, 1], "update_clip": [{"max_ratio": 0.03, "follow_lr": True}]}}
    two = SPEC | {"grid": {"update_clip": [{"follow_lr": True, "max_ratio": "3e-2"}], "lr0": ["1e-1", 1.0]}}
    first, second = plan(read_spec(one), "a"), plan(read_spec(two), "b")
    assert [trial.id for trial in first] == [trial.id for trial in second]
    assert len({trial.id for trial in first}) == 4
    assert all(len(trial.id) == 12 for trial in first)
    # Read back from a command line, a name of digits alone (or 1e5...) would be a number and make another folder.
    assert all(trial.id[0] == "t" for trial in first)


def test_any_difference_in_the_configuration_is_another_trial() -> None:
    base = {trial.id for trial in plan(small(), "out")}
    for change in ({"seeds": [1]}, {"task": "pose"}, {"train": SPEC["train"] | {"epochs": 4}}):
        assert base.isdisjoint(trial.id for trial in plan(small(**change), "out"))


def test_what_the_file_of_our_keys_says_is_part_of_the_trial(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"

    def ids(text: str) -> set[str]:
        file.write_text(text)
        return {trial.id for trial in plan(small(train=SPEC["train"] | {"gradstab": str(file)}), "out")}

    first = ids("clip: agc")
    assert first == ids("clip: {policy: agc}  # in other words")
    assert first.isdisjoint(ids("{clip: none, update_clip: 0.03}"))


def test_a_longer_grid_keeps_the_trials_there_are() -> None:
    base = {trial.id for trial in plan(small(), "out")}
    assert base < {trial.id for trial in plan(small(seeds=[0, 1], grid={"lr0": [0.01, 0.1, 1.0]}), "out")}


@pytest.mark.parametrize(
    "longer",
    [
        {"grid": {"lr0": [0.01, 0.1], "update_clip": [None, 0.03]}},
        {"grid": {"lr0": [0.01, 0.1], "clip": ["none", "norm"]}},
        {"grid": {"lr0": [0.01, 0.1], "clip": [{"policy": "norm", "max_norm": 10}, "agc"]}},
        {"grid": {"lr0": [0.01, 0.1], "guard.divergence": ["off", "stop"]}},
        {"grid": {"lr0": [0.01, 0.1], "optimizer": ["SGD", "AdamW"]}, "train": {"model": "tiny.yaml",
         "data": "drawn.yaml", "epochs": 3.0}},
        {"train": SPEC["train"] | {"guard": {"nonfinite": "skip"}, "telemetry.every": 1}},
    ],
)  # fmt: skip
def test_the_same_training_is_the_same_trial_however_it_is_written(longer: dict[str, Any]) -> None:
    base = {trial.id for trial in plan(small(), "out")}
    assert base <= {trial.id for trial in plan(small(**longer), "out")}


@pytest.mark.parametrize("file", [None, "clip: agc"])
def test_a_trial_keeps_the_id_that_an_earlier_release_gave_it(tmp_path: Path, file: str | None) -> None:
    """Also in a longer grid; the file of our keys may have changed since, and the run says what it used."""
    train = dict(SPEC["train"])
    if file:
        (tmp_path / "mine.yaml").write_text(file)
        train["gradstab"] = str(tmp_path / "mine.yaml")
    trials = plan(small(train=train), tmp_path)
    for number, trial in enumerate(trials):
        old = msgspec.structs.replace(trial, id=f"t{number:011d}")
        run = RunFolder(tmp_path / "trials" / old.id)
        run.create(load_config(train.get("gradstab"), {"guard.divergence": "stop"}).to_dict())
        run.write_status(Status(outcome="completed"))
        (run.path / "trial.json").write_bytes(msgspec.json.encode(old))
    grid = {"lr0": [0.01, 0.1], "update_clip": [None, 0.03]}
    longer = plan(small(train=train, grid=grid), tmp_path)
    assert [trial.id for trial in longer[::2]] == ["t00000000000", "t00000000001"]
    assert all(f"name={trial.id}" in trial.command for trial in longer)
    assert {trial.id for trial in longer[1::2]}.isdisjoint(path.name for path in (tmp_path / "trials").iterdir())
    if file:
        (tmp_path / "mine.yaml").write_text("clip: none")
        assert not {"t00000000000", "t00000000001"} & {trial.id for trial in plan(small(train=train), tmp_path)}


def test_command_is_what_a_user_would_type() -> None:
    trial = plan(read_spec(SPEC), "out")[2]
    assert trial.point == {"lr0": 0.01, "clip": {"policy": "norm", "max_norm": 10}}
    assert trial.arm == {"clip": {"policy": "norm", "max_norm": 10}}
    assert trial.command[:5] == [sys.executable, "-m", "yolo_gradstab", "detect", "train"]
    assert trial.command[5:] == [
        "model=tiny.yaml", "data=drawn.yaml", "optimizer=SGD", "epochs=3", "lr0=0.01", "clip.policy=norm",
        "clip.max_norm=10", "warmup_bias_lr=0.1", "guard.divergence=stop", "seed=0",
        f"project={Path('out/trials').absolute()}",
        f"name={trial.id}", "exist_ok=true",
    ]  # fmt: skip


def test_values_reach_the_command_as_they_are() -> None:
    train = SPEC["train"] | {"val": False, "lrf": 1e-5, "classes": [0, 2]}
    grid = {"update_clip": [None], "guard.nonfinite": ["off"], "clip": [{"policy": "agc", "exclude": ["bias", "norm"]}]}
    given = dict(
        text.split("=", 1) for text in plan(read_spec(SPEC | {"train": train, "grid": grid}), "o")[0].command[5:]
    )
    values = {key: yaml.safe_load(text) for key, text in given.items()}
    assert (values["val"], values["lrf"], values["classes"]) == (False, 1e-5, [0, 2])
    assert values["update_clip"] is None
    assert values["guard.nonfinite"] == "off"
    assert values["clip.exclude"] == ["bias", "norm"]


def test_bias_warm_up_is_scaled_with_the_rate_unless_given() -> None:
    def rates(spec: Spec) -> list[str]:
        return [text for trial in plan(spec, "out") for text in trial.command if text.startswith("warmup_bias_lr")]

    assert rates(small(grid={"lr0": [0.001, 0.007, 0.3]})) == [f"warmup_bias_lr={x}" for x in (0.01, 0.07, 0.1)]
    assert rates(small(train=SPEC["train"] | {"warmup_bias_lr": 0.0})) == ["warmup_bias_lr=0.0"] * 2


def test_a_sweep_ends_what_has_diverged_unless_told_otherwise() -> None:
    def given(spec: Spec) -> set[str]:
        return {text for trial in plan(spec, "out") for text in trial.command if text.startswith("guard")}

    assert given(small()) == {"guard.divergence=stop"}
    # quoted, as `off` is false to YAML
    assert given(small(train=SPEC["train"] | {"guard": {"divergence": "off"}})) == {"guard.divergence='off'"}
    assert given(small(grid={"guard.divergence": ["stop", "off"]})) == {
        "guard.divergence=stop",
        "guard.divergence='off'",
    }


def test_mitigations_make_arms_and_reach_the_command_line_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    grid = (
        "{lr0: [0.1], mitigations.normalization: [null, none], mitigations.residual: [off], "
        "mitigations.init: [{method: orthogonal, gain: 5e-1}]}"
    )
    path.write_text(yaml.safe_dump(SPEC | {"seeds": [0], "grid": "GRID"}).replace("GRID", grid))
    trials = plan(read_spec(path), "out")
    wanted = [{"residual": "off", "init": {"method": "orthogonal", "gain": 0.5}, "activation": None}] * 2
    for trial, expected, normalization in zip(trials, wanted, (None, "none"), strict=True):
        config, host = _training_arguments(trial.command[trial.command.index("train") + 1 :])
        assert config.to_dict()["mitigations"] == expected | {"normalization": normalization}
        assert not any(key.startswith("mitigations") for key in host)
        assert trial.arm["mitigations.normalization"] == normalization


def test_the_rate_is_the_hosts_where_none_is_given() -> None:
    assert plan(small(grid={"clip": ["agc"]}), "out")[0].lr0 == 0.01


# Running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that `SPEC` names."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").touch()
    Path("drawn.yaml").touch()
    Path("images").mkdir()
    return tmp_path


def test_run_sweep_starts_planned_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(task: str, arguments: dict[str, Any], folder: Path) -> list[str]:
        assert (task, arguments["optimizer"]) == ("detect", "SGD")
        return [sys.executable, "-c", TRIAL, str(folder), "completed"]

    monkeypatch.setattr(sweep_module, "trial_command", command)
    Path("rates.yaml").write_text(yaml.safe_dump(SPEC | {"grid": {"lr0": [0.1]}, "seeds": [0]}))
    assert run_sweep("rates.yaml", say=lambda line: None) == Path("runs", "sweeps", "rates")
    assert run_sweep(read_spec("rates.yaml"), say=lambda line: None) == Path("runs", "sweeps", "rates")
    assert len(list(Path("runs/sweeps/rates/trials").glob("*/gradstab/status.json"))) == 1
    assert read_spec("runs/sweeps/rates/sweep.yaml") == read_spec("rates.yaml")


def test_another_training_into_the_same_folder_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sweep_module,
        "trial_command",
        lambda task, arguments, folder: [sys.executable, "-c", TRIAL, str(folder), "completed"],
    )
    said: list[str] = []
    one = SPEC | {"grid": {"lr0": [0.1]}, "seeds": [0]}
    train = {key: value for key, value in SPEC["train"].items() if key != "optimizer"}
    for spec, expected in (
        (one, 0),
        (one | {"train": train, "grid": {"lr0": [0.1], "optimizer": ["SGD"]}}, 0),  # the same, a key moved
        (one | {"grid": {"lr0": [0.3]}, "jobs": 2}, 0),  # more of the same
        (one | {"train": SPEC["train"] | {"epochs": 7}}, 1),
    ):
        said.clear()
        run_sweep(spec, "out", say=said.append)
        assert sum("out: trials of another training are there; its report will name them" in line for line in said) == (
            expected
        )


def test_a_sweep_that_is_refused_leaves_what_another_runs(folder: Path) -> None:
    Path("out/trials").mkdir(parents=True)
    before = Path("out/sweep.yaml")
    before.write_text("as it was")
    with locked(Path("out/sweep.lock")), pytest.raises(SweepError, match="another sweep is running in this folder"):
        run_sweep(SPEC, "out")
    assert before.read_text() == "as it was"


def test_a_specification_in_the_sweeps_own_folder_is_not_written_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sweep_module,
        "trial_command",
        lambda task, arguments, folder: [sys.executable, "-c", TRIAL, str(folder), "completed"],
    )
    Path("out").mkdir()
    own = Path("out/sweep.yaml")
    text = "# what I want to know\n" + yaml.safe_dump(SPEC | {"grid": {"lr0": [0.1]}, "seeds": [0]})
    own.write_text(text)
    run_sweep(own, "out", say=lambda line: None)
    assert own.read_text() == text
    with pytest.raises(SweepError, match=r"^out/sweep\.yaml: says otherwise, and is not as a sweep writes it; change"):
        run_sweep(read_spec(own, ["grid.lr0=[0.3]"]), "out", say=lambda line: None)
    assert own.read_text() == text


def test_a_bracket_that_would_swallow_a_trials_arguments_is_refused(folder: Path) -> None:
    with pytest.raises(SweepError, match=r"^out=a\[b: Ultralytics takes a single bracket for half a list"):
        run_sweep(SPEC, "a[b")
    assert not Path("a[b").exists()


def test_an_error_of_ours_names_the_specification(folder: Path) -> None:
    Path("rates.yaml").write_text(yaml.safe_dump(SPEC | {"grid": {"clip": ["nrm"]}}))
    with pytest.raises(ConfigError, match=r"^rates\.yaml: clip\.policy must be one of none, .*, got 'nrm'$"):
        read_spec("rates.yaml")


def test_nothing_is_started_or_written_if_a_sweep_is_refused(folder: Path) -> None:
    with pytest.raises(SweepError, match="ignores lr0"):
        run_sweep(SPEC | {"train": {"model": "m", "data": "d"}}, "out")
    with pytest.raises(SweepError, match="retry must be failed, got 'all'"):
        run_sweep(SPEC, "out", retry="all")
    Path("drawn.yaml").unlink()
    with pytest.raises(SweepError, match=r"^train\.data=drawn\.yaml does not exist; give the path of a file$"):
        run_sweep(SPEC, "out")
    assert not Path("out").exists()
    Path("drawn.yaml").touch()
    Path("file").touch()
    with pytest.raises(SweepError, match=r"out=file: cannot be made \(.*\); name another folder"):
        run_sweep(SPEC, "file")


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("model", "tiny.yaml", True),
        ("model", "yolo26n.yaml", True),  # the host's yolo26.yaml at scale n
        ("model", "yolo26n-pose.yaml", True),
        ("model", "yolo11.yaml", True),
        ("model", "yolo26n.pt", True),
        ("model", "weights/best.pt", False),
        ("model", "yolo99n.yaml", False),
        ("model", "elsewhere/yolo26n.yaml", False),
        ("data", "coco8.yaml", True),
        ("data", "coco9.yaml", False),
        ("data", "images", True),  # a folder, as of a set for classification
        ("model", "images", False),
        ("model", "**", False),
    ],
)
def test_models_and_data_must_be_there(folder: Path, key: str, value: str, found: bool) -> None:
    for changes in ({"train": SPEC["train"] | {key: value}}, {"grid": {key: [value]}}):
        train = {name: item for name, item in SPEC["train"].items() if "train" in changes or name != key}
        spec = read_spec(SPEC | {"train": train} | changes)
        if found:
            check_files(spec)
        else:
            with pytest.raises(SweepError, match=rf"(train|grid)\.{key}={re.escape(value)} does not exist"):
                check_files(spec)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"epochs": "many"}}, r"\{lr0: 0\.01\}: 'epochs=many' is of invalid type str"),
        ({"train": {"cos_lr": "maybe"}}, "'cos_lr=maybe' is of invalid type str"),
        ({"grid": {"lr0": [0.01], "momentum": [0.9, 1.7]}}, r"momentum: 1\.7\}: 'momentum=1\.7' is an invalid value"),
    ],
)
def test_values_that_the_host_refuses_are_refused_before_any_trial(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    given = SPEC | {"grid": {"lr0": [0.01]}} | changes
    with pytest.raises(SweepError, match=words) as caught:
        run_sweep(given | {"train": SPEC["train"] | changes.get("train", {})}, folder / "out")
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_a_trial_gets_its_arguments_as_they_were_given(folder: Path) -> None:
    """Through the command line, which reads the host's values as Python, ours as YAML, and paths as they are."""
    host = {"data": "O'Brien #2: a/d.yaml", "classes": None, "freeze": [0, 1], "cos_lr": True, "cache": False}
    train = {"model": "tiny.yaml", "optimizer": "SGD", "epochs": 3, **host}
    train |= {"gradstab": None, "update_clip": None, "clip.policy": "agc"}
    spec = read_spec(SPEC | {"train": train, "grid": {}})
    command = plan(spec, folder / "out #1")[0].command
    config, arguments = _training_arguments(command[5:])
    assert {key: arguments[key] for key in host if key != "data"} == {k: v for k, v in host.items() if k != "data"}
    assert arguments["data"].endswith("O'Brien #2: a/d.yaml")
    assert arguments["project"] == str(folder / "out #1" / "trials")
    assert (config.update_clip, type(config.clip).__name__) == (None, "AdaptiveGradientClip")


@pytest.mark.parametrize("content", ["guard: {divergence: rollback}", "guard.divergence: rollback", "clip: agc"])
def test_a_file_may_say_what_a_trial_does_when_it_diverges(folder: Path, content: str) -> None:
    (folder / "ours.yaml").write_text(content)
    spec = read_spec(SPEC | {"train": SPEC["train"] | {"gradstab": str(folder / "ours.yaml")}, "grid": {"lr0": [0.1]}})
    config, _ = _training_arguments(plan(spec, folder)[0].command[5:])
    assert config.guard.divergence == ("stop" if content == "clip: agc" else "rollback")


def test_a_sample_set_that_is_not_drawn_yet_says_how(folder: Path) -> None:
    spec = read_spec(SPEC | {"train": SPEC["train"] | {"data": "datasets/sample_detect/data.yaml"}})
    with pytest.raises(
        SweepError, match="draw it first: yolo-gradstab data sample out=datasets/sample_detect task=detect"
    ):
        check_files(spec)


def test_a_damaged_trial_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "trial.json").write_text("{")
    with pytest.raises(RunError, match=r"trial\.json: "):
        read_trial(tmp_path)
