"""A case - a fault, or a healthy run - and the small real training run it is: 8 batches of 4 drawn images an epoch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml
from conftest import DrawnSet

from faults.mechanisms import BatchEdit, Clock, FileEdit, ModelEdit, TrainerEdit
from yolo_gradstab import trainer_for

__all__ = ["BATCHES", "Case", "Outcome", "Trouble", "train_case"]

IMAGES, SIZE = 48, 64  # of a drawn set, a third of them for validation
BATCHES = 8  # an epoch

Trouble = Literal["nonfinite", "blowup", "collapse"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and what is done to it.

    Attributes:
        name: For people; no run, record or rule sees it.
        kinds: Of the first finding, any of which names the fault rightly; empty for a healthy run.
        task: The host's.
        steps: Batches, a multiple of `BATCHES`.
        config: Ours.
        args: The host's, beside those of every case.
        trouble: What the fault leads to, where it has a moment of its own; None where it only makes a run worse, and
            for a rate, which has no such moment.
        labels: Which form of the set is trained on; of its files a copy is taken where they are edited.
        augment: False trains without augmentation.
        files, network, model, dataset, batch, gradient: What is done to a copy of the set (the folder), to the model
            file (a new one in the folder), to the model as built, to the training dataset, to each batch as it goes in,
            and to the gradients before the step.
        callbacks: The host's events.
        resume_after: Epoch after which the run is interrupted and resumed.
        finetune: Start from the checkpoint of another short run.
    """

    name: str
    kinds: tuple[str, ...] = ()
    task: Literal["detect", "pose"] = "detect"
    steps: int = 40
    config: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    trouble: Trouble | None = None
    labels: Literal["coco", "yolo"] = "coco"
    augment: bool = True
    files: FileEdit | None = None
    network: Callable[[Path], Path] | None = None
    model: ModelEdit | None = None
    dataset: Callable[[Any, Clock], None] | None = None
    batch: BatchEdit | None = None
    gradient: TrainerEdit | None = None
    callbacks: dict[str, TrainerEdit] = field(default_factory=dict)
    resume_after: int | None = None
    finetune: bool = False


class Outcome(msgspec.Struct, kw_only=True):
    """What is known of a run beside its folder.

    Attributes:
        acted: Optimizer step at which the fault first acted.
        error: With which the training ended, as a user would see it.
    """

    acted: int | None
    error: str | None


class _InterruptionError(Exception):
    """Stands for any end of the process between two epochs."""


def train_case(case: Case, drawn: DrawnSet, folder: Path) -> Outcome:
    """Train in `folder/run`; an error that ends the training is part of the outcome, as it is for a user."""
    clock = Clock()
    arguments = drawn.arguments(folder) | {
        "name": "run",
        "epochs": case.steps // BATCHES,
        "imgsz": SIZE,
        "warmup_epochs": 1.0,
        "val": False,  # the last epoch is validated all the same
        "save": case.resume_after is not None,
        **case.args,
    }
    if case.files is not None or case.labels == "yolo":
        arguments["data"] = str(_copied_set(case, drawn, folder / "data", clock))
    if case.network is not None:
        arguments["model"] = str(case.network(folder))
    if case.finetune:
        arguments["model"] = str(_pretrained(case, arguments))
    error = None
    try:
        _train(case, arguments, clock)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Outcome(acted=clock.acted, error=error)


def _train(case: Case, arguments: dict[str, Any], clock: Clock) -> None:
    trainer = _trainer_class(case, clock)(overrides=dict(arguments))
    for event, edit in case.callbacks.items():
        trainer.add_callback(event, partial(edit, clock=clock))
    if case.resume_after is None:
        trainer.train()
        return

    def interrupt(trainer: Any) -> None:
        if trainer.epoch == case.resume_after:
            raise _InterruptionError

    trainer.add_callback("on_train_epoch_end", interrupt)
    with contextlib.suppress(_InterruptionError):
        trainer.train()
    from ultralytics import YOLO

    YOLO(trainer.last).train(resume=True, trainer=trainer_for(case.task))


def _trainer_class(case: Case, clock: Clock) -> type:
    base = trainer_for(case.task, case.config)

    class Injected(base):  # type: ignore[misc, valid-type]
        def get_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().get_model(*args, **kwargs)
            if case.model is not None:
                case.model(model, clock)
            return model

        def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
            dataset = super().build_dataset(img_path, mode, batch)
            if mode == "train" and not case.augment:
                dataset.augment = False
                dataset.transforms = dataset.build_transforms(hyp=self.args)
            if mode == "train" and case.dataset is not None:
                case.dataset(dataset, clock)
            return dataset

        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch = super().preprocess_batch(batch)
            clock.step = self._step
            if clock.files & {Path(file).name for file in batch["im_file"]}:
                clock.act()
            if case.batch is not None:
                case.batch(batch, clock)
            return batch

        def optimizer_step(self) -> None:
            if case.gradient is not None:
                case.gradient(self, clock)
            super().optimizer_step()

    return Injected


def _copied_set(case: Case, drawn: DrawnSet, folder: Path, clock: Clock) -> Path:
    """A copy of the set with its edits; returns the data file of the form that the case trains on."""
    shutil.copytree(drawn.coco.parent, folder, ignore=shutil.ignore_patterns("*.cache"))
    keys = yaml.safe_load(drawn.yolo.read_text())
    (folder / "yolo.yaml").write_text(yaml.safe_dump(keys | {"path": str(folder)}))
    if case.files is not None:
        case.files(folder, clock)
    return folder / ("yolo.yaml" if case.labels == "yolo" else drawn.coco.name)


def _pretrained(case: Case, arguments: dict[str, Any]) -> Path:
    trainer = trainer_for(case.task)(overrides=arguments | {"name": "pretrained", "epochs": 3})
    trainer.train()
    return Path(trainer.last)
