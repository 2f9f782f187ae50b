"""`yolo_gradstab.host`: a host whose code differs is noticed, and one that only reads differently is not."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DrawnSet
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER

from yolo_gradstab import host, trainer_for
from yolo_gradstab.cli import main

pytestmark = pytest.mark.filterwarnings("default")

PLAIN = """
class Trainer:
    def optimizer_step(self):
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
"""
EXPLAINED = '''
import math


class Trainer:
    def optimizer_step(self):
        """Unscale,

        then step.
        """
        # before the step
        self.scaler.unscale_(self.optimizer)

        self.scaler.step(self.optimizer)
'''
CHANGED = PLAIN.replace("self.scaler.step(self.optimizer)", "self.optimizer.step()")


def method(folder: Path, name: str, source: str) -> Callable[..., Any]:
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., Any] = module.Trainer.optimizer_step
    return found


def test_a_digest_is_of_the_code_alone(tmp_path: Path) -> None:
    plain, explained, changed = (
        host.code_digest(method(tmp_path, name, source))
        for name, source in (("plain", PLAIN), ("explained", EXPLAINED), ("changed", CHANGED))
    )
    assert plain == explained
    assert plain != changed


def test_the_installed_host_is_known() -> None:
    assert host.changed_methods(BaseTrainer) == []
    assert host.warning(BaseTrainer, "8.4.190") is None


def test_what_differs_or_is_missing_is_named(tmp_path: Path) -> None:
    class Missing(BaseTrainer):  # type: ignore[misc]
        optimizer_step = method(tmp_path, "changed", CHANGED)
        _get_warmup_iterations = None

    assert host.changed_methods(Missing) == ["optimizer_step", "_get_warmup_iterations"]
    said = host.warning(Missing, "8.4.999")
    assert said is not None
    assert said.startswith("Ultralytics 8.4.999: optimizer_step, _get_warmup_iterations differ from the code")
    assert "install ultralytics>=8.4." in said


def test_a_run_begins_by_saying_it_and_checks_says_it_too(
    drawn: dict[str, DrawnSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(host.KNOWN, "save_model", {"another"})
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", said.append)
    trainer_for("detect")(overrides=drawn["detect"].arguments(tmp_path, name="run", epochs=1, val=False)).train()
    assert len([line for line in said if "save_model differs from the code" in line]) == 1

    capsys.readouterr()
    assert main(["checks", "format=json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["trainer"]["ok"] is False
    assert "save_model" in checks["trainer"]["found"]
    assert checks["ultralytics"]["ok"] is checks["torch"]["ok"] is checks["python"]["ok"] is True


def test_checks_is_content_with_what_was_tested_and_not_with_another_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("ok ultralytics")]
    assert not [line for line in lines if line.startswith("??")]
    monkeypatch.setitem(host.TESTED, "torch", ("99.0", "99.1"))
    assert main(["checks"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("?? torch")]
