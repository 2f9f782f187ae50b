"""The `yolo-gradstab` command: what it does, and one clear line with the right exit status for every mistake."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
import pytest
import ultralytics  # noqa: F401  # first imported within a test, its logger would keep that test's captured stream
import yaml
from conftest import ROOT, DrawnSet

from yolo_gradstab import read_run
from yolo_gradstab.cli import UsageError, main

pytestmark = pytest.mark.filterwarnings("default")  # the host's own warnings are not ours to fail on

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data not found at {SHARED}")


def words(arguments: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in arguments.items()]


# What it does --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["detect", "pose"])
def test_train_leaves_the_run_folder(
    drawn: dict[str, DrawnSet], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    arguments = drawn[task].arguments(tmp_path, name="run", epochs=1)
    file = tmp_path / "safe.yaml"
    file.write_text("clip: {policy: zclip, z: 3}\nguard: {nonfinite: off}\n")
    ours = [f"gradstab={file}", "clip.alpha=0.9", "update_clip=3e-2", "clip.max_norm=null"]
    assert main([task, "train", *words(arguments), *ours]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("4 optimizer steps: gradient norm ")
    assert out[-1] == (
        f"Run: {tmp_path / 'run'}   records: {tmp_path / 'run/gradstab'}   "
        f"report: yolo-gradstab report {tmp_path / 'run'}"
    )
    run = read_run(tmp_path / "run")
    assert run.status.outcome == "completed"
    assert run.steps["step"].to_list() == [0, 1, 2, 3]
    assert run.config["clip"] == {"policy": "zclip", "z": 3.0, "alpha": 0.9, "warmup": 25, "max_norm": None}
    assert run.config["update_clip"] == {"max_ratio": 0.03, "follow_lr": True}
    assert run.config["guard"]["nonfinite"] == "off"
    assert run.config["guard"]["divergence"] == "rollback"
    assert run.args["lr0"] == 0.01


def test_arguments_from_a_file_stand_beneath_those_of_the_line(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    """As `cfg=` of the host's command line; a copy of its defaults names a task and a mode, and much as null."""
    given = drawn["pose"].arguments(tmp_path, name="run", epochs=5, momentum=0.9)
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(given | {"task": "detect", "mode": "predict", "cfg": None, "freeze": None}))
    assert main(["pose", "train", "epochs=1", f"cfg={file}", "lr0=0.02"]) == 0
    args = read_run(tmp_path / "run").args
    assert [args[key] for key in ("epochs", "momentum", "lr0", "data")] == [1, 0.9, 0.02, given["data"]]


def test_several_sets_are_trained_on_each_in_a_folder_of_its_own(
    drawn: dict[str, DrawnSet], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = []
    for name in ("first", "second"):
        sets.append(str(shutil.copy(drawn["detect"].yolo, tmp_path / f"{name}.yaml")))
    arguments = drawn["detect"].arguments(tmp_path, name="both", epochs=1, val=False)
    del arguments["data"]
    assert main(["detect", "train", f"data={sets}", *words(arguments)]) == 0
    out = capsys.readouterr().out
    runs = re.findall(r"Run: (\S+) ", out)
    assert [Path(run).name for run in runs] == ["first", "second"]
    assert [len(read_run(run).steps) for run in runs] == [4, 4]


def test_a_folder_may_be_called_as_a_sweep_calls_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lr0=0.1", "exp #3"):
        assert main(["data", "sample", f"out={tmp_path / name}", "images=2", "size=32"]) == 0
        assert (tmp_path / name / "data.yaml").is_file()
    capsys.readouterr()
    for command in ("report", "diagnose", "replay", "sweep"):
        assert main([command, str(tmp_path / "lr0=0.1")]) in {1, 2}
        assert "unknown key" not in (said := capsys.readouterr().err) and "first, e.g." not in said


@pytest.mark.parametrize(
    "count, lines, last, said",
    [
        (1, 1, "problem: ", "1 problem\n"),
        (20, 20, "problem: ", "20 problems\n"),
        (21, 21, "... and 1 more problem; format=json names them all", "21 problems\n"),
    ],
)
def test_a_wrong_folder_of_images_is_no_wall_of_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, lines: int, last: str, said: str
) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8} for i in range(count)]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    arguments = [f"coco={file}", f"images={tmp_path}"]
    assert main(["data", "check", *arguments]) == 1
    out, err = capsys.readouterr()
    shown = [line for line in out.splitlines() if line.startswith(("problem: ", "... and"))]
    assert len(shown) == lines
    assert shown[-1].startswith(last)
    assert err.endswith(said)
    assert main(["data", "check", *arguments, "format=json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == count


def test_errors_do_not_reach_the_terminal_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "\x1b]0;title\x07")]) == 1
    assert not {"\x1b", "\x07"} & set(said := capsys.readouterr().err) and "?]0;title?" in said


def test_resume_from_the_command_line(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    arguments = drawn["detect"].arguments(tmp_path, name="run", epochs=3, val=False)
    cls_arguments = words(arguments)

    import yolo_gradstab.trainer as trainer_room

    original = trainer_room.GradstabMixin._end_epoch

    def end_epoch(self: Any) -> None:
        original(self)
        if self.epoch == 1 and not self.resume:
            raise KeyboardInterrupt

    trainer_room.GradstabMixin._end_epoch = end_epoch  # type: ignore[method-assign]
    try:
        assert main(["detect", "train", *cls_arguments]) == 1
        assert read_run(tmp_path / "run").status.outcome == "interrupted"
        assert main(["detect", "train", f"resume={tmp_path / 'run/weights/last.pt'}"]) == 0
    finally:
        trainer_room.GradstabMixin._end_epoch = original  # type: ignore[method-assign]
    assert read_run(tmp_path / "run").steps["step"].to_list() == list(range(12))


def test_sweep_then_report(drawn: dict[str, DrawnSet], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = drawn["detect"].arguments(tmp_path, epochs=1, val=False)
    for key in ("project", "exist_ok", "lr0"):
        train.pop(key)
    spec = tmp_path / "small.yaml"
    spec.write_text(yaml.safe_dump({"task": "detect", "train": train, "grid": {"lr0": [0.01]}}))
    words = [f"out={tmp_path / 'out'}", "grid.update_clip=[null, 0.03]", "seeds=[0, 1]"]
    assert main(["sweep", str(spec), "jobs=2", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'out/report.html'}"
    trials = pl.read_csv(tmp_path / "out" / "trials.csv")
    assert trials["lr0"].to_list() == [0.01] * 4
    # The same seed means the same weights and the same images, in every arm: equal before the first step is made.
    steps = [read_run(path).steps for path in trials["path"]]
    first = {seed: [s["loss"][0] for s, of in zip(steps, trials["seed"], strict=True) if of == seed] for seed in (0, 1)}
    assert first[0][0] == first[0][1] != first[1][0] == first[1][1]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [arm["trials"] for arm in summary["arms"]] == [2, 2]
    # again: nothing is left to do, and the report is the same
    assert main(["sweep", str(spec), *words]) == 0
    assert "4 of them already done" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out"), f"out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "report.md").is_file()


def test_data_commands_on_a_drawn_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "sample", f"out={tmp_path / 's'}", "task=pose", "images=6", "size=64", "seed=3"]) == 0
    assert capsys.readouterr().out.startswith(f"Drawn: {tmp_path / 's/data.yaml'}")
    where = [f"coco={tmp_path / 's/annotations/person_keypoints_train.json'}", f"images={tmp_path / 's/images/train'}"]
    assert main(["data", "check", *where, "task=pose", "format=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 4
    assert report["problems"] == []
    assert main(["data", "convert", *where, "task=pose", f"out={tmp_path / 'labels'}"]) == 0
    assert "kpt_shape: [17, 3]" in capsys.readouterr().out
    assert len(list((tmp_path / "labels").glob("*.txt"))) == 4


@needs_shared
def test_data_check_lists_what_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    coco = SHARED / "coco_open"
    where = [f"coco={coco / 'annotations/person_keypoints_val2017.json'}", f"images={coco / 'images/val2017'}"]
    assert main(["data", "check", *where, "task=pose"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("152 annotations, 72 used; not used: 3 crowd, 77 no_keypoints\n")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    assert "yolo-gradstab detect train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("yolo-gradstab ")


COMMANDS = (
    "detect train", "pose train", "demo", "sweep", "lr-range", "report", "diagnose", "replay", "bench", "checks",
    "data check", "data convert", "data sample",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_all_its_keys(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*command.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"yolo-gradstab {command} ")
    assert main([*command.split(), "x=1", "-h"]) == 0
    assert capsys.readouterr().out == said
    keys: list[str] = []

    def seen(name: str, given: dict[str, Any], *, required: Sequence[str], optional: dict[str, Any]) -> NoReturn:
        keys.extend([*required, *optional])
        raise UsageError(name)

    if command in {"detect train", "pose train", "sweep", "lr-range"}:  # which take the host's keys as well
        return
    monkeypatch.setattr("yolo_gradstab.cli._options", seen)
    positional = ["x"] if command in {"report", "diagnose", "replay"} else []
    assert main([*command.split(), *positional]) == 2
    assert keys
    for key in keys:
        assert re.search(rf"\b{key}=", said), key
    assert set(re.findall(r"^  (\w+)=", said, re.MULTILINE)) == set(keys)


def test_help_of_data_is_that_of_its_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    said = capsys.readouterr().out
    assert [word for word in ("check", "convert", "sample") if f"yolo-gradstab data {word} " in said] == [
        "check", "convert", "sample",
    ]  # fmt: skip
    assert main(["help", "report"]) == 0
    assert capsys.readouterr().out.startswith("yolo-gradstab report DIR")


def test_a_run_that_fails_in_setup_says_so_in_its_folder(
    drawn: dict[str, DrawnSet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"project={tmp_path}", "name=bad", f"model={drawn['detect'].model}", "clip=agc"]
    assert main(["detect", "train", *places, "data=missing.yaml"]) == 1
    run = read_run(tmp_path / "bad")
    assert (run.status.outcome, run.config["clip"]["policy"]) == ("failed", "agc")
    assert "missing.yaml" in (run.status.reason or "")
    assert main(["report", str(tmp_path / "bad")]) == 0
    assert pl.read_csv(tmp_path / "bad/trials.csv")["verdict"].to_list() == ["failed"]


def test_a_sweep_with_failed_trials_has_failed(
    drawn: dict[str, DrawnSet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {
        "model": str(drawn["detect"].model),
        "data": str(drawn["detect"].coco),
        "optimizer": "Foo",
        "device": "cpu",
    }
    spec = {"task": "detect", "train": train, "grid": {"lr0": [0.01]}, "seeds": [0]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert main(["sweep", str(tmp_path / "spec.yaml"), f"out={tmp_path / 'rates'}"]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    where = tmp_path / "rates" / "trials"
    assert err == f"yolo-gradstab: 1 of 1 trials failed; their logs are in {where}, retry=failed runs them again"
    assert (tmp_path / "rates" / "report.html").is_file()


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "yolo_gradstab", "help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# What users get wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, status, message",
    [
        ("detec train", 2, "unknown command 'detec'; the nearest valid command is detect"),
        ("detec --help", 2, "unknown command 'detec'; the nearest valid command is detect"),
        ("help detec", 2, "unknown command 'detec'; the nearest valid command is detect"),
        ("detect train task=pose data={data}", 2, "task=pose: the command is `detect train`; give `yolo-gradstab pose"),
        ("detect train resume=nope.pt model=yolo26n.yaml", 2, "resume=nope.pt: no such file; give the checkpoint"),
        (
            "detect train resume={images}",
            2,
            "images/train: is a folder; give the checkpoint to go on from, e.g. resume=",
        ),
        ("detect train resume model=yolo26n.yaml", 2, "resume=yolo26n.yaml: is no checkpoint; give the checkpoint"),
        ("detect train model={images} data={data}", 2, "images/train: is a folder; give a model's YAML or weights"),
        ("detect train model={data} data={data}", 2, "data.yaml: is no model, it has no backbone; give a model's YAML"),
        ("lr-range task=detect model=missing.yaml data={data}", 2, "model=missing.yaml: no such file; give a model's"),
        ("lr-range task=detect model={tiny} data={data} out={json}", 2, "cannot be made (File exists); name another"),
        ("lr-range task=detect guard.divergence=rollback", 2, "guard.divergence cannot be set in a range test; it"),
        ("lr-range foo=1 task=detect", 2, "unknown key foo=1; `yolo-gradstab help` lists ours"),
        ("demo out={json}", 2, "instances_train.json: cannot be made (File exists); name another folder"),
        (
            "data convert coco={json} images={images} out=/proc/x",
            1,
            "/proc/x cannot be made (No such file or directory)",
        ),
        ("data check coco={images} images={images}", 1, "images/train: is a folder; give the COCO annotation file"),
        ("data sample out={tmp} size=1000000", 2, "size must be a whole number of at most 4096, got 1000000"),
        ("diagnose {tmp}", 1, "new: no such folder; give a run's folder, which training prints at its end"),
        ("demo out=", 2, "demo: out must be given, or left out for demo"),
        ("lr-range task=detect out=", 2, "lr-range: out must be given, or left out for runs/lr_range"),
        ("detect train cfg=missing.yaml", 2, "cfg=missing.yaml: cannot be read ("),
        ("detect train cfg={list}", 2, "list.yaml: cannot be read ("),
        ("detect train cfg={wrong}", 2, "unknown key epoch=3; the nearest valid key is epochs"),
        ("bench model=[]", 2, "bench: model must be given, or left out for yolo26n.yaml"),
        ("bench batch=[]", 2, "bench: batch must be given, or left out for 16"),
        ("detect", 2, "the mode must be train, got nothing"),
        ("detect val", 2, "the mode must be train, got 'val'"),
        ("detect train clipp=agc", 2, "unknown key clipp='agc'; the nearest valid key is clip"),
        ("detect train epoch=3", 2, "unknown key epoch=3; the nearest valid key is epochs"),
        ("detect train epochs", 2, "'epochs' is not key=value; give it a value, epochs=..."),
        ("detect train clip", 2, "'clip' is not key=value; give it a value, clip=..."),
        ("detect train clipp", 2, "'clipp' is not key=value; the nearest valid key is clip"),
        ("detect train resume", 2, "resume=True: of which run? give its checkpoint, e.g. resume=RUN/weights/last.pt"),
        ("detect train epochs=few", 2, "'epochs' must be an int"),
        ("detect train lr0=3", 2, "Valid 'lr0' values are between 0.0 and 1.0"),
        ("detect train clip.max_norm=ten", 2, "clip.max_norm must be a number, got 'ten'"),
        ("detect train clip=agc clip.max_norm=1", 2, "clip.max_norm=1 belongs to policy norm and zclip"),
        ("detect train clip.exclude=[bias", 2, "unmatched '[' or ']' bracket"),
        ("detect train guard.spikes=skip", 2, "unknown key guard.spikes='skip'"),
        ("detect train mitigations.init=none", 2, "mitigations.init.method must be one of xavier_normal,"),
        ("detect train gradstab=missing.yaml", 2, "gradstab=missing.yaml: cannot be read"),
        ("detect train model={tiny} data=missing.yaml", 1, "'missing.yaml' does not exist"),
        ("detect train model=missing.yaml data={data}", 2, "model=missing.yaml: no such file; give a model's YAML"),
        ("detect train model=5 data={data}", 2, "model=5: no such file"),
        ("detect train model={tiny} data=2017", 1, "2017"),
        ("pose train model={tiny} data={data}", 2, "is a detect model, not a pose model; give the task detect"),
        ("pose train model={tiny_pose} data={data}", 1, "no category has `keypoints`"),
        ("data", 2, "data: must be followed by check, convert, sample, got nothing"),
        ("data check coco=x.json", 2, "data check: images must be given, as images=..."),
        ("data check coco=x.json images=. tsk=pose", 2, "unknown key tsk='pose'; the nearest valid key is task"),
        ("data check coco=x.json images=.", 1, "x.json: no such file"),
        ("data check coco={json} images={images} task=fly", 2, "task must be one of"),
        ("data check coco={json} images=2017", 1, "2017"),
        ("data convert coco={json} images={images} out={tmp} task=obb", 2, "task must be one of"),
        ("data check coco={json} images={images} format=xml", 2, "format must be one of text, json, got 'xml'"),
        ("data sample", 2, "data sample: out must be given"),
        ("data sample out={tmp} images=1", 2, "images must be a whole number of at least 2, got 1"),
        ("data sample out={tmp} task=segment", 2, "task must be one of detect, pose for a drawn set, got 'segment'"),
        ("sweep", 2, "give a spec first"),
        ("sweep missing.yaml retry=all", 2, "sweep: retry must be one of failed, got 'all'"),
        ("sweep missing.yaml", 2, "missing.yaml: cannot be read"),
        ("report", 2, "give at least one run or sweep folder"),
        ("report {tmp}/nothing", 1, "nothing"),
    ],
)
def test_one_clear_line(
    drawn: dict[str, DrawnSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # the host makes its folders here
    folder = drawn["detect"].coco.parent
    places = {
        "tiny": drawn["detect"].model,
        "tiny_pose": drawn["pose"].model,
        "data": drawn["detect"].coco,
        "json": folder / "annotations/instances_train.json",
        "images": folder / "images/train",
        "tmp": tmp_path / "new",
        "list": tmp_path / "list.yaml",
        "wrong": tmp_path / "wrong.yaml",
    }
    places["list"].write_text("- lr0\n")
    places["wrong"].write_text("epoch: 3\n")
    assert main(line.format(**places).split()) == status
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1].startswith("yolo-gradstab: ")
    assert message in lines[-1]
    assert "Traceback" not in captured.err + captured.out


def broken(content: dict[str, Any], how: str) -> str:
    """The text of a COCO file with one thing wrong."""
    box = content["annotations"][0]
    edits: dict[str, Any] = {
        "no images": lambda: content.pop("images"),
        "no image": lambda: box.update(image_id=999),
        "no category": lambda: box.update(category_id=99),
        "negative": lambda: box.update(bbox=[1, 1, -5, 5]),
        "nan": lambda: box.update(bbox=[1, float("nan"), 5, 5]),
        "three": lambda: box.update(keypoints=[1, 2]),
    }
    if how in edits:
        edits[how]()
    text = json.dumps(content)
    return text[: len(text) // 2] if how == "half" else text


@pytest.mark.parametrize(
    "how, message",
    [
        ("half", "is not JSON"),
        ("no images", "`images`"),
        ("no image", "999"),
        ("no category", "99"),
        ("negative", "bbox"),
        ("nan", "bbox"),
        ("three", "keypoints"),
        ("missing image", "not found"),
        ("truncated image", "truncated"),
    ],
)
def test_bad_coco_is_one_line_in_check_and_in_training(
    drawn: dict[str, DrawnSet], tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, message: str
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(drawn["detect"].coco.parent, folder)
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    image = folder / "images" / "train" / content["images"][2]["file_name"]
    if how == "missing image":
        image.unlink()
    elif how == "truncated image":
        image.write_bytes(image.read_bytes()[:-200])
    else:
        path.write_text(broken(content, how))

    def files(folder: Path) -> dict[Path, bytes]:
        """But for the label cache, which is ours; it holds the images that were in order."""
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".cache"}

    before = files(folder)
    for command in (
        ["data", "check", f"coco={path}", f"images={folder / 'images/train'}"],
        ["detect", "train", *words(drawn["detect"].arguments(tmp_path, data=folder / "data.yaml", name="run"))],
    ):
        assert main(command) == 1
        captured = capsys.readouterr()
        said = captured.err.splitlines()[-1] if command[0] == "detect" else captured.out + captured.err
        assert message in said, said
        assert str(path) in said
        assert "Traceback" not in captured.err
    assert files(folder) == before  # nothing of the user's is touched


def test_the_live_table_shows_what_runs_what_ended_and_the_time_left() -> None:
    from rich.console import Console

    from yolo_gradstab.cli import _states_table
    from yolo_gradstab.executors import TrialState
    from yolo_gradstab.trial import Trial

    def state(number: int, **known: Any) -> TrialState:
        place = {"lr0": 0.1 * number, "seed": number, "point": {"lr0": 0.1 * number}}
        return TrialState(trial=Trial(id=f"t{number}", arm={}, command=[], **place), **known)

    states = [
        state(1, outcome="completed", step=120, metric=0.21, seconds=60),
        state(2, outcome="diverged", divergence="collapse", step=33, metric=0.0, seconds=20),
        state(3, outcome="running", step=50, loss=4.2, total_norm=123.4, seconds=10),
        state(4, outcome="running", seconds=40),
        *(state(number) for number in range(5, 11)),
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_states_table(states, 7))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[1] == ["lr0=0.30000000000000004", "seed=3", "50", "4.2", "123.4", "running", "10", "s"]
    assert ["lr0=0.2", "seed=2", "33", "diverged", "(collapse)", "0.000", "20", "s"] in lines
    assert len(lines) == 6  # heading, what fits, counts: the first that ended is not shown any more
    # a mean of 40 s: 30 s left of the third trial, none of the fourth, six more; two at a time
    assert " ".join(lines[-1]) == "2 of 10 ended, 1 of them diverged; about 2 min left"
