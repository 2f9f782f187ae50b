"""The Ultralytics adapter: the one room that knows the host's trainer.

Where our parts stand in the host's loop (`BaseTrainer._do_train`; ours in capitals)::

    build the model                              MITIGATE it, then load any weights; optimizer and EMA come after
    for epoch:                                   CONTINUE a resumed epoch exactly
        for batch:
            warm-up sets lr, momentum, accumulate
            forward, backward                    COUNT images, SUM losses
            every `accumulate` batches, optimizer_step():
                unscale -> MEASURE -> JUDGE -> CLIP -> step -> BOUND THE UPDATE -> scaler update -> zero_grad -> EMA
                where the run has diverged, in place of clip, step and EMA: GO BACK to a good state, at a lower rate
        FLUSH records; validate                  ADD the epoch's columns
        save_metrics, save_model                 ADD policy and exact training state to the checkpoint
"""

from __future__ import annotations

import csv
import logging
import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
import yaml
from torch import Tensor
from ultralytics import __version__ as host_version
from ultralytics.cfg import get_save_dir
from ultralytics.engine import trainer as host_trainer
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models import RTDETR, YOLO
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import ClassificationModel, RTDETRDetectionModel, load_checkpoint, yaml_model_load
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_gradstab.clipping import Clipped, ClipPolicy, NormClip, UpdateRatios, clip_update_, multiply_, update_ratios
from yolo_gradstab.coco import CocoError
from yolo_gradstab.coco.dataset import (
    CocoDataset,
    CocoRTDETRDataset,
    build_coco_dataset,
    read_data_yaml,
    resolved_yaml,
)
from yolo_gradstab.config import TASKS, Config, ConfigError, Mitigations, NoClip, build_policy, load_config
from yolo_gradstab.diagnosis import last_words, records_of
from yolo_gradstab.guard import (
    DEAD_STEPS,
    LARGEST_RATIO,
    LARGEST_UNCLIPPED_RATIO,
    LOOK_EVERY,
    NO_QUALITY,
    USUAL_SCALE,
    Divergence,
    DivergenceWatch,
    HealthWatch,
    Spike,
    SpikeWatch,
    Unrest,
    is_detector,
    is_look,
    matched_loss,
)
from yolo_gradstab.host import warning as host_warning
from yolo_gradstab.incident import capture, labels_are_sound
from yolo_gradstab.localisation import HUGE_PIXEL
from yolo_gradstab.mitigations import apply_mitigations_, structure_of
from yolo_gradstab.norms import (
    FLOAT32_NORM_LIMIT,
    GradientNorms,
    Layers,
    device_index,
    exact_gradient_norms,
    gradient_norms,
    tensor_norms,
)
from yolo_gradstab.runs import (
    RunFolder,
    Status,
    counted,
    gave_up_on_nan,
    one_line,
    replacing,
    terminable,
    uninterrupted,
    versions,
)
from yolo_gradstab.snapshot import Snapshot, Snapshots
from yolo_gradstab.telemetry import LAYER_SCHEMA, MAP50, STEP_SCHEMA, LayerRecord, PartWriter, StepRecord, read_run
from yolo_gradstab.trackers import Trackers

__all__ = ["GradstabMixin", "host_model", "trainer_for"]

# Their loss is the mean of a batch; that of the host's other models is summed over its images.
MEAN_LOSS = (ClassificationModel, RTDETRDetectionModel)

# By how the host's trainer builds its own.
COCO_DATASETS = {DetectionTrainer.build_dataset: CocoDataset, RTDETRTrainer.build_dataset: CocoRTDETRDataset}

STOCK_CLIP = NormClip(max_norm=10.0)  # what the host does at every step

MOST_INCIDENTS = 4  # of a run: each keeps a batch and the weights

USUAL_MEDIAN = (0.1, 10.0)  # of all weights: that of the host's models is 1, of other usual initialisations 0.4 to 3

STATE_KEY = "gradstab"  # of our state, inside the checkpoint's optimizer state
STATE_VERSION = 2  # of its fields; a checkpoint of another cannot be continued


def trainer_for(
    task: str | type[BaseTrainer], config: Config | dict[str, Any] | str | Path | None = None, /, **overrides: Any
) -> type:
    """A trainer class for `YOLO(...).train(trainer=...)`, with the configuration built in.

    The configuration is an attribute of a class made here, since that is what reaches the workers of a multi-GPU
    run: the host pickles the class and rebuilds the trainer from it.

    Args:
        task: One of the host's, for the trainer of its YOLO models; or a trainer class of the host or built on one:
            ``RTDETRTrainer``, ``WorldTrainer``, ``YOLOETrainer``, one of your own.
        config: A `Config`, a mapping of its keys, or the path of a YAML file of them.
        overrides: Keys that win over `config`: ``clip="agc"``, ``update_clip=0.03``, ``guard={"nonfinite": "stop"}``,
            or dotted ones as ``**{"clip.factor": 0.02}``.

    Raises:
        ConfigError: One line naming the key, the value, what is allowed and what to do.

    Example:
        >>> trainer_for("detect", clip="agc").gradstab_config.clip.factor
        0.01
    """
    host = _host_trainer(task)
    attributes = {"gradstab_config": load_config(config, overrides), "__module__": __name__}
    return type(f"Gradstab{host.__name__}", (GradstabMixin, host), attributes)


def _host_trainer(task: str | type[BaseTrainer]) -> type[BaseTrainer]:
    if isinstance(task, str) and task in TASKS:
        host: type[BaseTrainer] = YOLO.task_map.fget(None)[task]["trainer"]  # a property that reads nothing of a model
        return host
    if isinstance(task, type) and issubclass(task, BaseTrainer) and not issubclass(task, GradstabMixin):
        if task.optimizer_step is not BaseTrainer.optimizer_step:  # ours stands in its place, and never calls it
            raise ConfigError(
                f"{task.__name__} has an optimizer_step of its own, which would never run; "
                "put it into a subclass of what trainer_for returns, around super().optimizer_step()"
            )
        return task
    raise ConfigError(f"task must be one of {', '.join(TASKS)}, or a trainer class of Ultralytics, got {task!r}")


def host_model(task: str, model: str) -> tuple[Model, type[BaseTrainer]]:
    """The host's model and its trainer: those of RT-DETR, YOLO-World and YOLOE are others than their task's.

    Raises:
        ConfigError: It is none, or a model for another task.
    """
    advice = "give a model's YAML or weights, or a name as yolo26n.yaml"
    if Path(model).is_dir():
        raise ConfigError(f"model={model}: is a folder; {advice}")
    try:
        # By its name, as the host's own command; the others without the task, so that it is the model that tells.
        yolo = RTDETR(model) if "rtdetr" in Path(model).stem.lower() else YOLO(model)
    except FileNotFoundError:
        raise ConfigError(f"model={model}: no such file; {advice}") from None
    except KeyError as error:
        raise ConfigError(f"model={model}: is no model, it has no {error.args[0]}; {advice}") from None
    if yolo.task != task:
        raise ConfigError(
            f"model={model} is a {yolo.task} model, not a {task} model; give the task {yolo.task} or another model"
        )
    return yolo, yolo.task_map[task]["trainer"]


def _warn_in_epoch(text: str) -> None:
    """On a line of its own, beneath the progress bar that the host has left without an end."""
    LOGGER.info("")
    LOGGER.warning(text)


@contextmanager
def _without(words: str) -> Iterator[None]:
    """Leave these words out of what the host says meanwhile."""

    def leave_out(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).replace(words, "")
        return True

    LOGGER.addFilter(leave_out)
    try:
        yield
    finally:
        LOGGER.removeFilter(leave_out)


class _CheckpointPath(type(Path())):  # type: ignore[misc]  # Path itself cannot be subclassed before Python 3.12
    """A path whose `write_bytes`, with which the host saves checkpoints, replaces the file in one rename."""

    def write_bytes(self, data: bytes) -> int:
        with replacing(Path(self)) as temporary:
            return temporary.write_bytes(data)


class _Unwritten:
    """In place of a path, what the host would have written there."""

    data = b""

    def write_bytes(self, data: bytes) -> int:
        self.data = data
        return len(data)


class _Accumulated:
    """What the micro-batches since the last optimizer step add up to; sums stay on the device.

    Attributes:
        images: In them.
        terms: Whose sum the loss and the gradient are: images, or micro-batches where the loss of one is a mean.
    """

    def __init__(self) -> None:
        self.images = 0
        self.terms = 0
        self.loss: Tensor | float = 0.0
        self.items: dict[str, Tensor | float] = {}

    def add(self, loss: Tensor, items: dict[str, Tensor], images: int, *, is_mean: bool) -> None:
        self.images += images
        self.terms += 1 if is_mean else images
        self.loss = self.loss + loss.detach()
        for name, value in items.items():
            # Distillation's is a vector of one.
            self.items[name] = self.items.get(name, 0.0) + value.detach().reshape(()) * images

    def average_(self, num_ranks: int) -> None:
        """Make the losses those of all ranks, which then judge alike and record what they judged."""
        sums = torch.stack([torch.as_tensor(value).float() for value in (self.loss, *self.items.values())])
        torch.distributed.all_reduce(sums)
        self.loss, *items = sums / num_ranks
        self.items = dict(zip(self.items, items, strict=True))

    def state(self) -> dict[str, Any]:
        numbers = {"images": self.images, "terms": self.terms, "loss": float(self.loss)}
        return {**numbers, "items": {k: float(v) for k, v in self.items.items()}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> _Accumulated:
        new = cls()
        new.images, new.terms = state["images"], state["terms"]
        new.loss, new.items = state["loss"], state["items"]
        return new


class _StepBuffer:
    """Steps whose values are still on the device, read together: one transfer for many steps."""

    CAPACITY = 64
    AGE_S = 1.0

    def __init__(self) -> None:
        self._known: list[dict[str, Any]] = []
        self._shapes: list[dict[str, int]] = []  # of each step's values: name -> length, 0 for a single number
        self._values: list[Tensor] = []
        self._since_s = time.monotonic()

    def add(self, known: dict[str, Any], values: dict[str, Tensor | float], device: torch.device) -> None:
        """Add a step: what the host knows, and numbers or vectors to be read later."""
        # float64 holds every float32 norm and the exact ones; Apple's MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        tensors = [torch.as_tensor(value, dtype=dtype, device=device).detach() for value in values.values()]
        self._known.append(known)
        self._shapes.append({name: t.numel() if t.ndim else 0 for name, t in zip(values, tensors, strict=True)})
        self._values.append(torch.cat([t.reshape(-1) for t in tensors]))

    def is_due(self) -> bool:
        return len(self._known) >= self.CAPACITY or time.monotonic() - self._since_s > self.AGE_S

    def read(self) -> list[dict[str, Any]]:
        """Everything added since the last read, on the host, vectors as lists."""
        self._since_s = time.monotonic()
        if not self._known:
            return []
        numbers = iter(torch.cat(self._values).tolist())
        rows = [
            known | {name: [next(numbers) for _ in range(n)] if n else next(numbers) for name, n in shapes.items()}
            for known, shapes in zip(self._known, self._shapes, strict=True)
        ]
        self._known, self._shapes, self._values = [], [], []
        return rows


class GradstabMixin(BaseTrainer):  # type: ignore[misc]  # the host is not typed
    """Sight and clipping for any Ultralytics trainer; `trainer_for` puts it in front of the task's own class."""

    gradstab_config: ClassVar[Config] = Config()
    loss: Any  # the host's: of the last micro-batch, the epoch's mean losses, and the rates as loggers are shown them
    tloss: Any
    lr: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._config = self.gradstab_config
        self._run: RunFolder | None = None  # only where records are written: rank 0, not the launcher of DDP workers
        self._accumulated = _Accumulated()
        self._buffer = _StepBuffer()
        self._step = 0
        self._attempt = 0
        self._micro_batches: list[dict[str, Any]] = []  # micro-batches since the last optimizer step, as they went in
        self._trouble: str | None = None  # of this step, worth an incident
        self._was_troubled = False
        self._matched_loss: float | None = None  # of this step, as `guard.matched_loss` has it
        self._unsound: list[dict[str, Any]] = []  # micro-batches of this step whose images or labels cannot be right
        self._of_floats: list[dict[str, Any]] = []  # those whose images did not come as bytes
        self._input_kept = False
        self._bounds: list[float] = []  # of the parameter groups, as last used
        self._batch_in_epoch = 0
        self._batch_images = 0
        self._stepped = False  # whether the current micro-batch ended in an optimizer step
        self._last_step_batch = -1
        self._seconds_before = 0.0  # of the parts of the run before this one
        self._stop_reason: str | None = None
        self._watch = DivergenceWatch()
        self._health = HealthWatch()
        self._spikes = SpikeWatch()
        self._snapshots = Snapshots()
        self._look: Tensor | None = None  # what `_looked` saw, not yet judged
        self._zero_steps: Tensor | None = None  # per tensor, steps in a row without any gradient
        self._restless = False
        self._rollbacks = 0
        self._lr_factor = 1.0  # the backoffs of all rollbacks
        self._warmup_again: tuple[int, int] | None = None  # micro-batches: where the last rollback was, and went to
        self._divergence: Divergence | None = None  # the first that was not undone
        self._lost: Divergence | Unrest | None = None  # this step's, where the guard is to go back
        self._map50: float | None = None  # at the last validation
        self._resumed: dict[str, Any] | None = None  # the state to continue from, until the first epoch begins
        self._chosen = False  # whether the optimizer was left to the host
        self._aligning = False  # until the first optimizer step after a resume
        self._nominal_accumulate: int | None = None
        self._epoch_seen = -1
        self._epoch_rows: list[dict[str, Any]] = []
        self._epoch_columns: dict[str, float] = {}
        self._folder: RunFolder | None = None  # taken by this process
        self._training = False  # and no longer set up
        try:
            super().__init__(*args, **kwargs)
        except BaseException as error:  # a notebook keeps the traceback, and with it the trainer
            self._fail_in_setup(error)
            self._let_go()
            raise
        if self.ddp:  # its workers write
            self._let_go()
        self.wdir = _CheckpointPath(self.save_dir / "weights")
        self.last, self.best = self.wdir / "last.pt", self.wdir / "best.pt"

    # The folder ------------------------------------------------------------------------------------------------------

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """The host's, which knows the arguments by now; then the run folder is taken, before anything is written there.

        Raises:
            ConfigError: The training that is to be resumed is done.
            RunError: Another process is training into this folder.
        """
        super().check_resume(overrides)
        if self.resume:
            _, ckpt = load_checkpoint(self.args.model)
            if ckpt.get("optimizer") is None or ckpt.get("epoch", -1) + 1 >= self.args.epochs:
                raise ConfigError(
                    f"resume={self.args.model}: its training is done, nothing to resume; "
                    "validate it, or give it as model= to a new run"
                )
            state = _our_state(ckpt)
            if state is not None and state.get("version") != STATE_VERSION:
                raise ConfigError(
                    f"resume={self.args.model}: made by another release of yolo_gradstab, whose state this one cannot "
                    "continue; resume it with that one, or give it as model= to a new run"
                )
            if not overrides.get("save_dir"):  # which DDP workers are given
                self._follow_checkpoint()
        if RANK in {-1, 0}:
            self._take_folder()

    def _follow_checkpoint(self) -> None:
        """Go on where the checkpoint lies; the host goes on where the run was begun, also with a copy of it."""
        begun, weights = Path(self.args.save_dir), Path(self.args.model).resolve().parent
        here = RunFolder(weights.parent)
        if weights.name != "weights" or not here.gradstab.is_dir() or here.path == begun.resolve():
            return
        LOGGER.info(f"The run was begun in {begun}; it goes on in {here.path}, where its checkpoint is.")
        self.args.save_dir = str(here.path)
        if self.args.data and Path(self.args.data) == RunFolder(begun).gradstab / "data.yaml":
            self.args.data = str(here.gradstab / "data.yaml")

    def _take_folder(self) -> None:
        path = get_save_dir(self.args)
        if not (self.args.exist_ok or getattr(self.args, "save_dir", None)):
            for _ in range(100):  # several that start at once are told the same free number
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    path = get_save_dir(self.args)
        self.args.save_dir = str(path)
        folder = RunFolder(path)
        folder.hold()
        self._folder = folder
        folder.tidy(new=not self.resume)
        if self.resume:
            folder.keep_args()

    def _fail_in_setup(self, error: BaseException) -> None:
        """A new run whose data or model cannot be had leaves a status too; one that is resumed keeps its own."""
        if self._folder is None or not isinstance(error, Exception) or self._folder.has_status():
            return
        self._folder.create(self._config.to_dict())
        reason = f"{type(error).__name__}: {error}"
        self._folder.write_status(Status(outcome="failed", reason=reason, versions=versions()))

    def _let_go(self) -> None:
        if self._folder is not None:
            self._folder.release()

    # Data ------------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict[str, Any]:
        """The host's data dictionary; from COCO JSON where the data YAML names it."""
        data = read_data_yaml(self.args.data, self.args.task)
        if data is None:
            return dict(super().get_dataset())
        if self.args.single_cls:
            data["names"], data["nc"] = {0: "item"}, 1
        if not self.ddp:  # the launcher's folder is removed before its workers start; each of them comes here again
            path = Path(self.save_dir) / "gradstab" / "data.yaml"
            if RANK in {-1, 0}:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_text(yaml.safe_dump(resolved_yaml(data), sort_keys=False), encoding="utf-8")
            self.args.data = str(path)  # which the host's final validation reads again
        return data

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        """The host's dataset, or ours for a COCO JSON file."""
        if not str(img_path).lower().endswith(".json"):
            return super().build_dataset(img_path, mode, batch)
        kind = COCO_DATASETS.get(super().build_dataset.__func__)
        if kind is None:
            raise CocoError(
                f"{img_path}: {type(self).__name__} has a dataset of its own and cannot read COCO JSON; convert it: "
                f"`yolo-gradstab data convert coco=... images=... out=... task={self.args.task}`"
            )
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        return build_coco_dataset(
            self.args, img_path, batch, self.data, mode, rect=mode == "val", stride=stride, kind=kind
        )

    def plot_training_samples(self, batch: dict[str, Any], ni: int) -> None:
        """The host's, from a copy: it scales pixels and replaces labels in place, and an incident may keep them."""
        super().plot_training_samples({**batch, "img": batch["img"].clone()}, ni)

    # The model -------------------------------------------------------------------------------------------------------

    def get_model(self, cfg: Any = None, weights: torch.nn.Module | None = None, verbose: bool = True) -> Any:
        """The host's model with our mitigations, made before any weights are loaded into it.

        Raises:
            ConfigError: They do not fit the model, or the weights; or the model is not this trainer's.
        """
        try:
            return self._build_model(cfg, weights, verbose)
        except BaseException as error:
            if not self._training:  # the host comes here before it trains, where the model is a checkpoint
                self._fail_in_setup(error)
                self._let_go()
            raise

    def _build_model(self, cfg: Any, weights: torch.nn.Module | None, verbose: bool) -> Any:
        self._check_head(cfg)
        wanted = self._config.mitigations
        if weights is not None:
            before = structure_of(weights)
            wanted = before if self.resume else _fitting(wanted, before)
        if wanted == Mitigations():
            return super().get_model(cfg, weights, verbose)
        model = super().get_model(cfg, None, verbose)
        # Of the seed alone: every rank draws the same, and the order of the data is that of a run without.
        changes = apply_mitigations_(model, wanted, generator=torch.Generator().manual_seed(self.args.seed))
        if weights is not None:
            model.load(weights)
            if self.resume:
                model.mitigations = weights.mitigations
        if RANK in {-1, 0}:
            for change in changes:
                LOGGER.info(f"mitigations.{change.key}={change.value}: {_in_words(change.modules)}")
        return model

    def _check_head(self, cfg: Any) -> None:
        """Refuse a model with a trainer of its own, which another meets with an error far from the cause."""
        layers = cfg if isinstance(cfg, dict) else yaml_model_load(cfg)
        head = [*layers["backbone"], *layers["head"]][-1][2]
        for kind in ("RTDETR", "World", "YOLOE"):
            if head.startswith(kind) and not any(cls.__name__.startswith(kind) for cls in type(self).__mro__):
                raise ConfigError(
                    f"{type(self).__name__} cannot train {head}; give trainer_for the model's own trainer class, "
                    f'as in trainer_for(model.task_map["{self.args.task}"]["trainer"])'
                )

    # The loop --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train, and leave a true status whatever the end."""
        if self.ddp:  # only launches workers, which come here themselves
            super().train()
            return
        self._training = True
        with self._recorded():
            super().train()

    def run_callbacks(self, event: str) -> None:
        """Our part of an event, then everybody's callbacks."""
        ours = {
            "on_train_start": self._start_recording,
            "on_train_epoch_start": self._start_epoch,
            "on_train_batch_end": self._end_batch,
            "on_train_epoch_end": self._end_epoch,
        }.get(event)
        if ours is not None:
            ours()
        super().run_callbacks(event)
        if event == "on_train_epoch_start":  # where users unfreeze layers
            self._index_parameters()

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The host's, counting images: this runs once per micro-batch, after warm-up has set `accumulate`."""
        sound = labels_are_sound(batch, num_classes=self.data.get("nc"))  # on the host still
        is_bytes = batch["img"].dtype == torch.uint8
        batch = super().preprocess_batch(batch)
        self._unsound += [] if sound else [batch]
        self._of_floats += [] if is_bytes else [batch]
        self._batch_in_epoch += 1
        self._batch_images = len(batch["img"])
        self._micro_batches.append(batch)
        if self._aligning:
            # The host steps on the first batch after a resume, as if none had been accumulated. It compares
            # `ni + 1 >= accumulate` then; adding what had passed makes it step where the uninterrupted run did.
            self._nominal_accumulate = self.accumulate
            self.accumulate += self._last_step_batch + 1
        return batch

    @uninterrupted()
    @torch.no_grad()
    def optimizer_step(self) -> None:
        """Measure, judge, clip, step, bound: the host's step with sight. See the module's docstring for the order."""
        self._gather()
        self._stepped, self._last_step_batch = True, self._batch
        self.scaler.unscale_(self.optimizer)
        # Each read of `.grad` makes a Python object, so they are read once.
        held = [(i, grad) for i, p in enumerate(self._parameters) if (grad := p.grad) is not None]
        having, grads = [i for i, _ in held], [grad for _, grad in held]
        measured = gradient_norms(grads)
        total_norm, loss = self._read(measured.total_norm)
        sound = total_norm <= FLOAT32_NORM_LIMIT
        if not sound:
            measured = exact_gradient_norms(grads)
            total_norm = float(measured.total_norm)
        skipped = not sound and self._refuses(measured, having)
        spike = self._spike(total_norm) if sound else None
        skipped = skipped or (spike is not None and self._config.guard.spike == "skip")
        # An fp16 scaler leaves out a step that overflowed, whatever the guard was told.
        overflowed = not sound and self.scaler.is_enabled() and bool(measured.nonfinite().any())
        left_out = skipped or overflowed
        found = self._watch.add(
            self._step,
            loss=loss,
            total_norm=total_norm,
            skipped=left_out,
            matched_loss=self._matched_loss,
            is_detector=is_detector(self._accumulated.items),
        )
        self._judge(found)
        scale = self.scaler.scale(torch.ones_like(measured.total_norm))  # `get_scale` would wait for the device
        self._keep_incident(measured, having, total_norm=total_norm, loss=loss)
        # A step that shows the run to be lost is not made either: its weights will be taken back.
        applied = not skipped and self._lost is None
        if applied:
            clipped = self._clip(measured, spike)
            with self._lowered_rates():
                lr = self.optimizer.param_groups[self._main_group]["lr"]
                moved = self._step_and_bound()
        else:
            clipped, moved = Clipped(measured.total_norm, torch.ones_like(measured.total_norm)), None
            lr = self.optimizer.param_groups[self._main_group]["lr"] * self._rate_factor()
            self._mend_buffers()
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema and applied:
            self.ema.update(self.model)
        if self._lost is not None:
            self._go_back(self._lost)
            self._lost = None
        self._record(measured, having, clipped, moved, scale, known={"skipped": not applied or overflowed, "lr": lr})
        if applied:
            self._keep_state()

    def _clip(self, measured: GradientNorms, spike: Spike | None) -> Clipped:
        """The policy; before it, a spike is brought down to the largest norm that would have been none."""
        policy, terms = self._clipping, self._accumulated.terms
        if spike is None:
            return policy.apply_(self._parameters, measured, num_images=terms)
        coef = torch.clamp(spike.limit / measured.total_norm, max=1.0)
        multiply_([p.grad for p in self._parameters if p.grad is not None], coef)
        lowered = GradientNorms(measured.norms * coef, measured.total_norm * coef)
        clipped = policy.apply_(self._parameters, lowered, num_images=terms)
        return clipped._replace(clip_coef=clipped.clip_coef * coef)

    def _spike(self, total_norm: float) -> Spike | None:
        """A spike that something is done about, said; every rank sees the same norm, and so the same spike."""
        wanted = self._config.guard.spike
        if wanted == "off":
            return None
        spike = self._spikes.judge(total_norm, images=self._accumulated.terms)
        if spike is None:
            return None
        action = "accept" if spike.is_new_level else wanted
        if self._run:
            event = {"event": "spike", "step": self._step, "epoch": self.epoch, "batch": self._batch}
            event |= {"total_norm": total_norm, "median": spike.median, "z": spike.z, "action": action}
            self._run.append_event(event)
        self._trouble = None if spike.is_new_level else "spike"
        return None if spike.is_new_level else spike

    def _read(self, total_norm: Tensor) -> tuple[float, float]:
        """Gradient norm and loss per image on the host, in the one read of a step, and the look at the model before it.

        With them comes what the host's progress bar shows: it would read each number by itself, and wait each time.

        The norm decides whether the optimizer is called, the others whether the run has diverged. Gradients are reduced
        by now; losses and BatchNorm's variances are not, and ranks that judged apart would hang.
        """
        look = self._look
        if self.world_size > 1:
            self._accumulated.average_(self.world_size)
            if look is not None:
                torch.distributed.all_reduce(look, torch.distributed.ReduceOp.MAX)
        loss = torch.as_tensor(self._accumulated.loss, device=total_norm.device).detach()
        # Bytes that the host has scaled are in range; now and then they are looked through too, if a user scales them.
        scanned = self._micro_batches if is_look(self._step) else self._of_floats
        extremes = [torch.stack(torch.aminmax(batch["img"])) for batch in scanned]
        pixels = torch.cat(extremes).abs().amax() if extremes else torch.zeros_like(total_norm)
        matched = matched_loss(self._accumulated.items)
        empty = self.world_size <= 1 and not any(len(batch.get("bboxes", ())) for batch in self._micro_batches)
        if matched is None or empty:  # not known, or nothing was to be matched
            matched = torch.full_like(loss, -1.0)
        done = self._accumulated
        means = torch.stack([loss.to(total_norm.dtype) / done.terms, matched.to(total_norm) / done.images])
        shown = self.tloss or {}
        values = torch.cat([total_norm[None], means, *(v.reshape(1).to(total_norm) for v in (pixels, *shown.values()))])
        if look is not None:
            values = torch.cat([values, look.to(values)])
        norm, mean_loss, known_matched, largest, *others = values.tolist()
        read, looked = others[: len(shown)], others[len(shown) :]
        if shown:
            of_each = zip(shown.items(), read, strict=True)
            self.tloss = {name: torch.tensor(number, dtype=value.dtype) for (name, value), number in of_each}
        self._look, self._matched_loss = None, None if known_matched < 0 else known_matched
        if not largest <= HUGE_PIXEL:
            self._unsound += [batch for batch in scanned if not batch["img"].abs().amax() <= HUGE_PIXEL]
        if looked:
            self._judge_model(looked)
        return norm, mean_loss

    def _judge_model(self, looked: list[float], *, running: bool = True) -> None:
        """Has the model itself gone, or grown so abruptly that this is no state to go back to?"""
        update_ratio, unbounded_ratio, running_var, *others = looked
        norms, zero_steps = others[: len(self._layers.names)], others[len(self._layers.names) :]
        self._report_dead(zero_steps)
        named = zip(self._layers.names, norms, strict=True)
        weight_norms = {name: norm for name, norm in named if norm}  # stages without weights have none
        found = self._watch.add_state(self._step - 1, weight_norms=weight_norms, running_var=running_var)
        self._judge(found, running=running)
        unrest = self._health.look(
            self._step - 1,
            weight_norms=weight_norms,
            running_var=running_var,
            update_ratio=None if update_ratio < 0 else update_ratio,
            unbounded_ratio=None if unbounded_ratio < 0 else unbounded_ratio,
        )
        if unrest is not None:
            self._snapshots.disturb(self._step)
            if self._run and not self._restless:
                event = {"event": "warning", "step": self._step - 1, "epoch": self.epoch}
                self._run.append_event(event | msgspec.to_builtins(unrest))
            guard = self._config.guard
            if running and guard.divergence == "rollback" and self._rollbacks < guard.max_rollbacks:
                self._lost = self._lost or unrest  # which costs ten steps now, and the run later
        self._restless = unrest is not None

    def _report_dead(self, zero_steps: list[float]) -> None:
        """Say which trainable tensors have just been without any gradient for `DEAD_STEPS` steps, each once."""
        # Looks are `LOOK_EVERY` steps apart, so that exactly one of them sees a count within this range.
        counts = ((i, zero_steps[i]) for i in self._trained_index)
        dead = [self._names[i] for i, count in counts if DEAD_STEPS <= count < DEAD_STEPS + LOOK_EVERY]
        if dead and self._run:
            event = {"event": "dead", "step": self._step - 1, "epoch": self.epoch, "steps": DEAD_STEPS}
            self._run.append_event(event | {"num_tensors": len(dead), "tensors": dead})

    def _report_init(self) -> None:
        """Say which weights start on a scale that is off by orders of magnitude.

        A weight's scale is its RMS over that of PyTorch's own initialisation, 1 / sqrt(3 fan_in) (`kaiming_uniform_`
        with a = sqrt(5); He et al. 2015). Weights that are all zero are that on purpose.
        """
        named = [(self._names[i], self._parameters[i]) for i in self._trained_index]
        weights = [(name, weight) for name, weight in named if weight.ndim >= 2]
        if not weights:
            return
        norms = tensor_norms([weight for _, weight in weights]).tolist()
        scales = {
            name: norm / math.sqrt(weight.numel()) * math.sqrt(3 * weight[0].numel())
            for (name, weight), norm in zip(weights, norms, strict=True)
        }
        middle = float(np.median(list(scales.values())))
        least, most = USUAL_SCALE if USUAL_MEDIAN[0] <= middle <= USUAL_MEDIAN[1] else USUAL_MEDIAN
        off = [{"name": name, "scale": scale} for name, scale in scales.items() if scale and not least <= scale <= most]
        if off and self._run:
            event = {"event": "init", "step": 0, "num_tensors": len(off), "tensors": off, "usual": [least, most]}
            self._run.append_event(event)

    def _keep_incident(self, measured: GradientNorms, having: list[int], *, total_norm: float, loss: float) -> None:
        """At the first step of a trouble, keep the batch and find where it first goes bad; weights are untouched yet.

        In one process only: a rank that runs the model alone would wait for the others where they share BatchNorm.
        """
        reason, is_first = self._trouble, not self._was_troubled
        unsound, self._unsound = self._unsound, []
        self._trouble, self._was_troubled = None, reason is not None
        if unsound and not self._input_kept:  # once a run, before any trouble that they may make
            reason, is_first, self._input_kept = reason or "input", True, True
        if reason is None or not is_first or self._run is None or self.world_size > 1:
            return
        folder = self._run.gradstab / "incidents"
        folder.mkdir(exist_ok=True)
        if sum(1 for _ in folder.iterdir()) >= MOST_INCIDENTS:
            return
        names = (self._names[i] for i in having)
        capture(
            folder / str(self._step),
            model=self.model,
            batches=unsound if reason == "input" else self._micro_batches,
            losses={name: float(value) for name, value in self.loss_items.items()},
            step=self._step,
            epoch=self.epoch,
            batch=self._batch,
            reason=reason,
            task=self.args.task,
            total_norm=total_norm,
            grads=dict(zip(names, measured.norms.tolist(), strict=True)),
            loss=loss,
            autocast_dtype=torch.bfloat16 if self.args.amp == "bf16" else torch.float16 if self.amp else None,
            scale=self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
        )
        if not (folder / str(self._step)).is_dir():  # it could not be written, which has been said
            return
        event = {"event": "incident", "step": self._step, "epoch": self.epoch, "batch": self._batch, "reason": reason}
        self._run.append_event(event | {"path": f"incidents/{self._step}"})
        _warn_in_epoch(f"Batch kept: yolo-gradstab replay {folder / str(self._step)}")

    # Going back ------------------------------------------------------------------------------------------------------

    def _keep_state(self) -> None:
        """Take a snapshot where one is due; between steps, so that it holds nothing of a batch not yet judged.

        One bad image is in BatchNorm's statistics before its step is judged and left out.
        """
        if self._config.guard.divergence == "rollback" and self._snapshots.is_due(self._step):
            self._snapshots.add(self._snapshot())

    def _snapshot(self) -> Snapshot:
        others = {
            "policy": self._policy.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watch": msgspec.to_builtins(self._watch),
            "spikes": msgspec.to_builtins(self._spikes),
            "ema_updates": self.ema.updates,
            "batch": max(self._batch, 0),
        }
        return Snapshot.take(self._step, modules=self._modules(), optimizer=self.optimizer, others=others)

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {"model": unwrap_model(self.model), "ema": self.ema.ema}

    def _go_back(self, found: Divergence | Unrest) -> None:
        """Restore the last good state and lower the rate; after the last rollback, restore it and stop.

        The host's clock runs on, so that the schedule ends when it would have; a warm-up that the state had not
        finished is made again from where it was.
        """
        good = self._snapshots.go_back(self._step)
        if good is None:
            raise RuntimeError("no state to go back to: guard.divergence=rollback takes one before its first step")
        others = good.restore_(modules=self._modules(), optimizer=self.optimizer)
        self._policy.load_state_dict(others["policy"])
        self.scaler.load_state_dict(others["scaler"])
        self.ema.updates = others["ema_updates"]
        self._watch = msgspec.convert(others["watch"], DivergenceWatch)
        self._spikes = msgspec.convert(others["spikes"], SpikeWatch)
        starts_clipping = self._is_unclipped
        largest = LARGEST_UNCLIPPED_RATIO if starts_clipping else LARGEST_RATIO
        num_backoffs = self._health.num_backoffs(self._config.guard.backoff, largest=largest)
        if found.kind == "unbounded_ratio":  # the bound bears the rate; what the run lacks is the clip it has from here
            num_backoffs = 1
        self._health, self._restless, self._look, self._bounds = HealthWatch(), False, None, []
        self._zero_steps = None
        if isinstance(found, Divergence) and self._rollbacks >= self._config.guard.max_rollbacks:
            after = f"after {self._rollbacks} rollbacks; the weights are those of step {good.step}"
            self._divergence = Divergence(found.kind, found.step, f"{found.reason}, {after}")
            self._stop_reason = f"{found.kind} at step {found.step}: {self._divergence.reason}"
            self.stop = True
            return
        self._rollbacks += 1
        self._lr_factor *= self._config.guard.backoff**num_backoffs
        self._warmup_again = (self._batch, others["batch"])
        if self._run:
            event = {"event": "rollback", "step": self._step, "epoch": self.epoch, "kind": found.kind}
            event |= {"reason": found.reason, "to_step": good.step}
            event |= {"lr_factor": self._lr_factor, "rollbacks": self._rollbacks}
            self._run.append_event(event | ({"clip": "norm"} if self._clipping is STOCK_CLIP else {}))
            also = f", gradient clipped at {STOCK_CLIP.max_norm:g}" if starts_clipping else ""
            _warn_in_epoch(
                f"{found.reason}: back to the state of step {good.step}, learning rate times {self._lr_factor:g}{also} "
                f"from here on (rollback {self._rollbacks} of {self._config.guard.max_rollbacks})"
            )

    def _rate_factor(self) -> float:
        """What the host's rates are multiplied by: the backoffs, and the rest of a warm-up that is made again."""
        if self._warmup_again is None:
            return self._lr_factor
        length = self._get_warmup_iterations(len(self.train_loader))
        at, to = self._warmup_again
        at = min(at, self._batch)  # the host's clock goes back where it repeats an epoch or resumes with other batches
        self._warmup_again = at, to
        ours, hosts = min(1.0, (to + self._batch - at) / length) if length else 1.0, 1.0
        if length and self._batch < length:
            hosts = max(self._batch, 1) / length
        if ours >= 1:
            self._warmup_again = None
        return self._lr_factor * min(1.0, ours / hosts)

    @contextmanager
    def _lowered_rates(self) -> Iterator[None]:
        """The optimizer's rates as they are after rollbacks; the host's own are put back, which it goes on from."""
        factor = self._rate_factor()
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if factor != 1:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _refuses(self, measured: GradientNorms, having: list[int]) -> bool:
        """Whether this unsound step is not applied; every rank decides alike, since gradients are reduced by now."""
        bad = [self._names[i] for i, is_bad in zip(having, measured.nonfinite().tolist(), strict=True) if is_bad]
        if not bad:
            reason = "gradient_overflow"  # finite, but beyond what float32 can clip
        else:
            # Expected while an fp16 scaler finds its scale: it halves the scale, and training goes on.
            reason = "scaler_overflow" if self.scaler.is_enabled() else "nonfinite_gradient"
        wanted = self._config.guard.nonfinite
        total_norm = float(measured.total_norm)
        self._trouble = None if reason == "scaler_overflow" else reason
        if self._run:
            self._run.append_event(
                {
                    "event": "nonfinite" if wanted == "off" else "skip",
                    "step": self._step,
                    "epoch": self.epoch,
                    "batch": self._batch,
                    "reason": reason,
                    "total_norm": total_norm,
                    "num_tensors": len(bad),
                    "tensors": bad[-10:],  # the last in forward order is nearest the origin: it spreads upstream
                }
            )
        if wanted == "stop" and reason != "scaler_overflow":
            where = f"{len(bad)} tensors, the last {bad[-1]}" if bad else f"norm {total_norm:.3g}"
            self._stop_reason = f"{reason} at step {self._step} ({where}); guard.nonfinite=skip would go on without it"
            self.stop = True
        return wanted != "off"

    def _judge(self, found: Divergence | None, *, running: bool = True) -> None:
        """Say a divergence, and what is done about it; while the run goes on, go back or stop where that is wanted."""
        if found is None:
            return
        action = self._config.guard.divergence if running else "off"
        self._trouble = self._trouble or found.kind
        if self._run:
            event = {"event": "divergence", "kind": found.kind, "step": found.step, "reason": found.reason}
            self._run.append_event({**event, "epoch": self.epoch, "action": action})
            advice = "; guard.divergence=rollback would go back, =stop end the run here" if action == "off" else ""
            _warn_in_epoch(f"Diverged ({found.kind}) at step {found.step}: {found.reason}{advice}")
        if action == "rollback":
            self._lost = self._lost or found
            return
        self._divergence = self._divergence or found
        if action == "stop":
            self._stop_reason = f"{found.kind} at step {found.step}: {found.reason}"
            self.stop = True

    def _mend_buffers(self) -> None:
        """Take non-finite buffers from the EMA: a NaN that came through the forward pass is in BatchNorm's statistics.

        Without this one bad image would leave every later batch NaN, though no weight was touched.
        """
        averaged = dict(self.ema.ema.named_buffers())
        mended = []
        for name, buffer in unwrap_model(self.model).named_buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                buffer.copy_(averaged[name])
                mended.append(name)
        if mended and self._run:
            event = {
                "event": "buffers_restored",
                "step": self._step,
                "num_buffers": len(mended),
                "buffers": mended[:10],
            }
            self._run.append_event(event)

    def _step_and_bound(self) -> UpdateRatios | None:
        """The optimizer's step, its update bounded and measured where that is wanted."""
        bound = self._config.update_clip
        records = self._step % self._config.telemetry.layers_every == 0
        if bound is None and not records and not is_look(self._step):
            self.scaler.step(self.optimizer)
            return None
        torch._foreach_copy_(self._before, self._trained)
        self.scaler.step(self.optimizer)
        if bound is None:
            return update_ratios(self._trained, self._before)
        return clip_update_(self._trained, self._before, self._max_ratios(bound.max_ratio, follow_lr=bound.follow_lr))

    def _max_ratios(self, max_ratio: float, *, follow_lr: bool) -> float | Tensor:
        """The bound of each tensor now: `max_ratio` times how far the schedule has its group's rate up."""
        if not follow_lr:
            return max_ratio
        groups = self.optimizer.param_groups
        # lr0=0 is allowed by the host; such a group moves only in a bias warm-up, which is then held as well.
        bounds = [max_ratio * min(1.0, group["lr"] / (group["initial_lr"] or math.inf)) for group in groups]
        if bounds != self._bounds:  # in warm-up at every step, then once per epoch
            self._bounds = bounds
            # Numbers go along with a kernel; a tensor of them would be uploaded, which stalls an accelerator.
            filled = torch.empty(len(self._trained), device=self._trained[0].device)
            for bound, members in zip(bounds, self._members_of_groups, strict=True):
                filled.index_fill_(0, device_index(members, filled.device), bound)
            self._max_ratio_of_trained = filled
        return self._max_ratio_of_trained

    # Records ---------------------------------------------------------------------------------------------------------

    @property
    def _batch(self) -> int:
        """The host's index of the current micro-batch over the whole run."""
        return int(self.epoch) * len(self.train_loader) + self._batch_in_epoch - 1

    def _batches(self) -> list[int]:
        """Number and size of the epoch's batches, which must be the same for a resume to be exact."""
        return [len(self.train_loader), int(self.batch_size)]

    def _gather(self) -> None:
        """Add the current micro-batch's losses; under DDP the host has multiplied them by the number of ranks."""
        loss = self.loss / self.world_size if RANK != -1 else self.loss
        is_mean = isinstance(unwrap_model(self.model), MEAN_LOSS)
        self._accumulated.add(loss, self.loss_items, self._batch_images, is_mean=is_mean)

    def _end_batch(self) -> None:
        if not self._stepped:
            self._gather()
        if self._stop_reason:  # said again: with `time=` the host sets its own answer right after the step
            self.stop = True
        if self._nominal_accumulate is not None:
            self.accumulate, self._nominal_accumulate = self._nominal_accumulate, None
            self._aligning = not self._stepped
        self._stepped = False

    def _record(
        self,
        measured: GradientNorms,
        having: list[int],
        clipped: Clipped,
        moved: UpdateRatios | None,
        scale: Tensor,
        *,
        known: dict[str, Any],
    ) -> None:
        """Keep this step's values, still on the device; read them when it is time."""
        done, self._accumulated = self._accumulated, _Accumulated()
        self._micro_batches, self._of_floats = [], []
        step, self._step = self._step, self._step + 1
        self._count_zeros(measured, having)
        looks, records = is_look(step), step % self._config.telemetry.layers_every == 0
        stages = self._layer_weights(moved) if looks or records else None
        if looks and stages is not None:
            self._look = self._looked(*stages, moved)
        if self._run is None:
            return
        values: dict[str, Any] = {"loss": done.loss / done.terms}
        values |= {f"item/{name}": value / done.images for name, value in done.items.items()}
        values |= {"total_norm": measured.total_norm, **clipped._asdict(), "scale": scale}
        values["nonfinite"] = measured.nonfinite().sum()
        if moved is not None:
            values["update_ratio_max"] = moved.ratio.max()
            if self._config.update_clip is not None:
                values["bounded_share"] = (moved.scale < 1).double().mean()
        if records and stages is not None:
            values |= self._layer_values(measured, having, *stages)
        known |= {
            "step": step,
            "epoch": self.epoch,
            "attempt": self._attempt,
            "batch": self._batch,
            "images": done.images * max(self.world_size, 1),
            "time_s": self._seconds(),
        }
        self._buffer.add(known, values, measured.total_norm.device)
        if self._buffer.is_due():
            self._drain()

    def _layer_values(
        self, measured: GradientNorms, having: list[int], weights: Tensor, ratios: Tensor
    ) -> dict[str, Tensor]:
        """Vectors over the stages, named as `LayerRecord` names them."""
        norms = self._spread(measured.norms, having)
        return {
            "layer/grad_norm": self._layers.norms(norms),
            "layer/weight_norm": weights,
            "layer/update_ratio": ratios,
            "layer/nonfinite": self._layers.sums((~torch.isfinite(norms)).to(norms.dtype)),
        }

    def _layer_weights(self, moved: UpdateRatios | None) -> tuple[Tensor, Tensor]:
        """Norm of each stage's weights, and of its update over it, which is 0 where none was made or measured."""
        weight_norm = tensor_norms(self._trained) if moved is None else moved.weight_norm
        update_norm = torch.zeros_like(weight_norm) if moved is None else moved.update_norm * moved.scale
        weights = self._layers.norms(self._spread(weight_norm, self._trained_index))
        updates = self._layers.norms(self._spread(update_norm, self._trained_index))
        return weights, updates / weights.clamp_min(torch.finfo(weights.dtype).tiny)

    def _looked(self, weights: Tensor, ratios: Tensor, moved: UpdateRatios | None) -> Tensor:
        """A look at the model, still on the device: medians of `update_ratio` as it was and as it would have been
        without the bound (-1 if unknown, or not judged), variance, norms, zero steps."""
        variance = torch._foreach_norm(self._variances, math.inf) if self._variances else [weights.new_zeros(())]
        ratio = unbounded = weights.new_full((), -1.0)
        if moved is not None:
            ratio = _median_where(weights > 0, ratios)
            if self._config.update_clip is not None and self._is_unclipped:
                updates = self._layers.norms(self._spread(moved.update_norm, self._trained_index))
                unbounded = _median_where(weights > 0, updates / weights)
        first = torch.stack([ratio, unbounded, torch.stack(tuple(variance)).max().to(ratio)])
        zero_steps = [] if self._zero_steps is None else [self._zero_steps.to(ratio)]
        return torch.cat([first, weights, *zero_steps])

    def _count_zeros(self, measured: GradientNorms, having: list[int]) -> None:
        """Count on the device, for each tensor, the steps in a row at which its gradient was exactly zero."""
        is_zero = (self._spread(measured.norms, having) == 0).to(self._trained[0].device)
        before = torch.zeros_like(is_zero, dtype=torch.int32) if self._zero_steps is None else self._zero_steps
        self._zero_steps = (before + 1) * is_zero

    def _spread(self, values: Tensor, index: list[int]) -> Tensor:
        """Values of some parameters as a vector over all of them, zero elsewhere."""
        full = values.new_zeros(len(self._parameters))
        full[device_index(tuple(index), values.device)] = values
        return full

    def _drain(self) -> None:
        """Bring what has been recorded to the host and to the tables."""
        every = self._config.telemetry.every
        for values in self._buffer.read():
            self._epoch_rows.append(values)
            fields: dict[str, Any] = {"bounded_share": None, "update_ratio_max": None}
            fields |= {name: value for name, value in values.items() if "/" not in name}
            fields["nonfinite"] = int(fields["nonfinite"])
            fields["losses"] = {k[5:].removesuffix("_loss"): v for k, v in values.items() if k.startswith("item/")}
            record = StepRecord(**fields)
            if record.step % every == 0:
                self._step_parts.append([record.row()])
            columns = {k[6:]: v for k, v in values.items() if k.startswith("layer/")}
            if columns:
                rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
                self._layer_parts.append(
                    LayerRecord(step=record.step, layer=layer, **{**row, "nonfinite": int(row["nonfinite"])}).row()
                    for layer, row in zip(self._layers.names, rows, strict=True)
                )

    def _seconds(self) -> float:
        return self._seconds_before + time.time() - self._started_s

    # Begin and end ---------------------------------------------------------------------------------------------------

    def _index_parameters(self) -> None:
        """List parameters once per epoch: building the lists costs as much as a norm, and a user may unfreeze some."""
        model = unwrap_model(self.model)
        named = list(_without_teacher(model.named_parameters()))
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._variances = [v for name, v in _without_teacher(model.named_buffers()) if name.endswith("running_var")]
        groups = self.optimizer.param_groups
        group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self._trained_index = [i for i, p in enumerate(self._parameters) if p.requires_grad and id(p) in group_of]
        trained = [self._parameters[i] for i in self._trained_index]
        of_trained = [group_of[id(p)] for p in trained]
        self._members_of_groups = [
            tuple(i for i, own in enumerate(of_trained) if own == group) for group in range(len(groups))
        ]
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        self._main_group = sizes.index(max(sizes))
        self._layers = Layers.stages(self._names)
        if [id(p) for p in trained] != [id(p) for p in getattr(self, "_trained", [])]:
            self._trained = trained
            self._before = [torch.empty_like(p, requires_grad=False) for p in trained]
            self._bounds = []

    @cached_property
    def _policy(self) -> ClipPolicy:
        return build_policy(self._config.clip).bind(unwrap_model(self.model))

    @property
    def _is_unclipped(self) -> bool:
        """Whether gradients are not clipped; a run that was to have no clip has stock's once it has had to go back."""
        return self._rollbacks == 0 and isinstance(self._config.clip, NoClip)

    @property
    def _clipping(self) -> ClipPolicy:
        is_stocks = isinstance(self._config.clip, NoClip) and not self._is_unclipped
        return STOCK_CLIP if is_stocks else self._policy

    def _start_recording(self) -> None:
        """Open the run folder, once the model, the optimizer and any checkpoint are in place."""
        self._started_s = time.time()
        if RANK not in {-1, 0}:
            return
        if said := host_warning(BaseTrainer, host_version):
            LOGGER.warning(said)
        run = RunFolder(self.save_dir)
        run.create(self._config.to_dict())
        self._step_parts = PartWriter(run.steps, STEP_SCHEMA)
        self._layer_parts = PartWriter(run.layers, LAYER_SCHEMA)
        dropped = self._step_parts.drop_from(self._step)
        self._layer_parts.drop_from(self._step)
        run.drop_from(self._step, num_events=self._resumed["num_events"] if self._resumed else None)
        run.drop_results_after(self.start_epoch)
        if dropped and self._step:
            LOGGER.info(f"Records of {counted(dropped, 'step')} after the checkpoint are dropped, to be made again")
        self._run = run
        self._trackers = Trackers(self.callbacks)
        run.write_status(Status(step=self._step, versions=versions(), seconds=self._seconds_before))
        if self._step == 0:
            if self._chosen:
                choice = {"optimizer": self.args.optimizer, "lr0": self.args.lr0}
                run.append_event({"event": "optimizer", "step": 0, **choice})
            for record in getattr(unwrap_model(self.model), "mitigations", []):
                run.append_event({"event": "mitigation", "step": 0, **record})
            self._index_parameters()
            self._report_init()

    def _start_epoch(self) -> None:
        if self.epoch == self._epoch_seen:  # out of memory or NaN: the host starts this epoch again, gradients dropped
            self._attempt += 1
            self._accumulated, self._micro_batches, self._unsound, self._of_floats = _Accumulated(), [], [], []
            self._last_step_batch, self._aligning, self._nominal_accumulate = -1, False, None
        self._epoch_seen, self._batch_in_epoch = self.epoch, 0
        self._epoch_rows = []
        if self._resumed is not None:
            self._index_parameters()
            self._continue(self._resumed)
            self._resumed = None
        self._keep_state()

    @uninterrupted()
    def _end_epoch(self) -> None:
        """Write records before validation takes its time, and put the epoch's columns where loggers look."""
        factor = self._rate_factor()
        if factor != 1:  # what loggers are shown is what was used
            self.lr = {name: rate * factor for name, rate in self.lr.items()}
        if self._run is None:
            return
        self._drain()
        self._step_parts.flush()
        self._layer_parts.flush()
        self._epoch_columns = _epoch_columns(self._epoch_rows)
        self.metrics.update(self._epoch_columns)
        every = self._config.telemetry.every
        for failed in self._trackers.log_steps([row for row in self._epoch_rows if row["step"] % every == 0]):
            LOGGER.warning(failed)
        skipped = sum(row["skipped"] for row in self._epoch_rows)
        if skipped:
            LOGGER.warning(f"{skipped} of {len(self._epoch_rows)} optimizer steps not applied, see {self._run.events}")
        self._run.write_status(Status(step=self._step, versions=versions(), seconds=self._seconds()))

    def validate(self) -> tuple[dict[str, float] | None, float | None]:
        """The host's, with the epoch's gradient columns beside its metrics."""
        metrics, fitness = super().validate()
        if metrics is not None:
            # Of the last epoch: at the end the host validates its best epoch, which hides a collapse.
            self._map50 = next((metrics[name] for name in MAP50 if name in metrics), None)
            metrics.update(self._epoch_columns)
        return metrics, fitness

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """The host's row of `results.csv`; where its columns have changed, the rows before it under the new ones.

        Until a depth run is first validated, the host writes the columns of a detector, and of those it writes zeros.
        """
        names = ["epoch", "time", *metrics]
        if self.csv.exists():
            with self.csv.open(encoding="utf-8", newline="") as file:
                rows = csv.DictReader(file)
                changed = [] if rows.fieldnames == names else [[row.get(name, "0") for name in names] for row in rows]
            if changed:
                with replacing(self.csv) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows([names, *changed])
        super().save_metrics(metrics)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Whatever ends the run, write the remaining records and a status that says so."""
        status = Status(outcome="completed")
        try:
            with terminable():
                yield
            if self._stop_reason:
                status = Status(outcome="stopped", reason=self._stop_reason)
        except (KeyboardInterrupt, SystemExit) as error:
            terminated = isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM
            name = "SIGINT" if isinstance(error, KeyboardInterrupt) else "SIGTERM" if terminated else repr(error)
            last = RunFolder(self.save_dir).checkpoint()
            advice = f"; continue with resume={last}" if last else ""
            status = Status(outcome="interrupted", reason=name + advice)
            if advice and RANK in {-1, 0}:
                LOGGER.info(f"{self.save_dir}: {status.reason}")
            raise
        except Exception as error:
            status = Status(outcome="failed", reason=f"{type(error).__name__}: {error}")
            if self._stop_reason:
                status = Status(outcome="stopped", reason=f"{self._stop_reason}; then {status.reason}")
            raise
        finally:
            if RANK in {-1, 0}:
                self._finish(status)
                self._let_go()

    @uninterrupted()
    def _finish(self, status: Status) -> None:
        if self._run is None:  # it ended during set-up: nothing was recorded, and the folder says why
            run = RunFolder(self.save_dir)
            if run.has_status():  # it is resumed, and stands as it stood
                return
            self._started_s, self._run = time.time(), run
            run.create(self._config.to_dict())
        else:
            for write in (self._drain, self._step_parts.close, self._layer_parts.close):
                try:
                    write()
                except Exception as error:  # a broken device or a full disk must not hide how the run ended
                    LOGGER.warning(f"The last records of {self._run.path} could not be written: {error}")
        self._settle(status)
        status.step, status.versions, status.seconds = self._step, versions(), self._seconds()
        status.metrics = {k: float(v) if np.isfinite(v) else None for k, v in (self.metrics or {}).items()}
        self._run.write_status(status)
        self._last_words(self._run)

    def _last_words(self, run: RunFolder) -> None:
        """In the terminal, at the end: what went wrong, if anything did."""
        try:
            if words := last_words(records_of(read_run(run.path)), run.path):
                LOGGER.info(f"\n{words}")
        except Exception as error:  # a damaged record must not make a run fail that has come to its end
            LOGGER.warning(f"{run.path}: no diagnosis, its records cannot be read ({one_line(error)})")

    def _settle(self, status: Status) -> None:
        """Say in the status whether the run has diverged, now that its end is known."""
        if status.outcome == "completed":
            if self._look is not None:  # taken after the last step, which no other has followed
                self._judge_model(self._look.tolist(), running=False)
            self._judge(self._watch.end(self._step, map50=self._map50), running=False)
        found = self._divergence
        if found and status.outcome == "completed" and self._map50 is not None and self._map50 >= NO_QUALITY:
            found = None  # it was let go on, and has healed; the event stays
        if found is None:
            # The host's own words when it gives up, and ours when `guard.nonfinite` stopped it.
            lost = gave_up_on_nan(status)
            if lost or (status.outcome == "stopped" and self._stop_reason):
                status.divergence = "nonfinite"
            status.outcome = "diverged" if lost else status.outcome
            return
        status.divergence = found.kind
        if status.outcome in {"completed", "stopped"} or gave_up_on_nan(status):
            words = f"{found.kind} at step {found.step}: {found.reason}"
            then = f"; then {status.reason}" if status.outcome == "failed" else ""
            status.outcome, status.reason = "diverged", words + then

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @uninterrupted()
    def save_model(self) -> bool:
        """The host's checkpoint, with our state inside its optimizer state: one file, and stock opens it.

        The host keeps half-precision EMA weights and no others, so its own resume is a restart nearby. Ours keeps the
        weights, EMA, optimizer, random states and pending gradients exactly. When training is done the host strips
        the optimizer state, and ours goes with it.
        """
        handle = self.optimizer.register_state_dict_post_hook(self._add_state)
        # best.pt comes first: after a kill between them, the epoch is made again and both are written; the other way
        # round, the resumed run would keep an older best.
        last, self.last = self.last, _Unwritten()
        try:
            saved = bool(super().save_model())
            last.write_bytes(self.last.data)
            return saved
        finally:
            self.last = last
            handle.remove()

    def final_eval(self) -> None:
        """The host's, which strips its checkpoints; not in place, where a kill would leave half of the only weights."""

        def strip(path: Path, saved_as: str = "", updates: dict[str, Any] | None = None) -> dict[str, Any]:
            with replacing(Path(path)) as temporary:
                shutil.copyfile(path, temporary)  # which stays so where the host cannot read it
                with _without(f" saved as {temporary},"):
                    return dict(host_strip(path, temporary, updates))

        host_strip, host_trainer.strip_optimizer = host_trainer.strip_optimizer, strip
        try:
            super().final_eval()
        finally:
            host_trainer.strip_optimizer = host_strip

    def _add_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Optimizer hook: everything the next epoch depends on."""
        del optimizer
        dataset = self.train_loader.dataset
        closing = self.args.close_mosaic
        pending = self._accumulated.images > 0
        state_dict[STATE_KEY] = {
            "version": STATE_VERSION,
            "config": self._config.to_dict(),
            "policy": self._policy.state_dict(),
            "watch": msgspec.to_builtins(self._watch),
            "spikes": msgspec.to_builtins(self._spikes),
            "health": msgspec.to_builtins(self._health),
            "restless": self._restless,
            "look": self._look,
            "zero_steps": self._zero_steps,
            "divergence": msgspec.to_builtins(self._divergence),
            "rollbacks": self._rollbacks,
            "lr_factor": self._lr_factor,
            "warmup_again": self._warmup_again,
            "was_troubled": self._was_troubled,
            "input_kept": self._input_kept,
            "step": self._step,
            "num_events": self._run.num_events() if self._run else 0,
            "attempt": self._attempt,
            "seconds": self._seconds(),
            "last_step_batch": self._last_step_batch,
            "batches": self._batches(),
            "model": unwrap_model(self.model).state_dict(),
            "ema": self.ema.ema.state_dict(),
            # The host halves tensors in the inner dictionaries of its copy, so ours must be other dictionaries.
            "optimizer": {
                "state": {k: dict(v) for k, v in state_dict["state"].items()},
                "param_groups": [dict(group) for group in state_dict["param_groups"]],
            },
            "accumulated": self._accumulated.state(),
            "grads": {n: p.grad for n, p in zip(self._names, self._parameters, strict=True)} if pending else {},
            "random": {
                "python": random.getstate(),
                "numpy": np.random.get_state(),  # noqa: NPY002  # the host's augmentations draw from it
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
                "loader": self.train_loader.generator.get_state(),
            },
            "mosaic_closed": bool(closing) and self.epoch >= self.epochs - closing,
            "mosaic_buffer": list(getattr(dataset, "buffer", [])),
        }

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """The host's, and the policy's state with it: also when the host goes back to `last.pt` after a NaN."""
        super()._load_checkpoint_state(ckpt)
        state = _our_state(ckpt)
        if state is not None:
            self._policy.load_state_dict(state["policy"])

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """The host's going back to `last.pt` after a NaN epoch, where that is not the guard's.

        A loss that is not finite is the guard's, unless it is off: the step was left out, or taken back. The host would
        throw away the epoch for it. What validation came to stays the host's to judge.
        """
        if self._stop_reason:
            return False
        loss, guard = self.loss, self._config.guard
        if guard.nonfinite != "off" or guard.divergence == "rollback":
            self.loss = None
        try:
            recovered = bool(super()._handle_nan_recovery(epoch))
        finally:
            self.loss = loss
        if recovered:  # what came of the epoch it throws away is no state to go back to; the next is taken at its start
            self._snapshots = Snapshots()
            self._health, self._look = HealthWatch(), None
        return recovered

    def build_optimizer(self, model: Any, name: str = "auto", *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The host's; `optimizer=auto` is chosen there, and a rate with it."""
        self._chosen = name == "auto"
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, name, *args, **kwargs)
        return optimizer

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Continue exactly where the checkpoint was made, with the run's own configuration."""
        state = _our_state(ckpt) if self.resume else None
        if state is not None:
            saved = load_config(state["config"])
            if self._config not in (saved, Config()):
                LOGGER.warning("Resume uses the run's own gradstab/config.yaml; start a new run to change its keys")
            self._config = saved
        super().resume_training(ckpt)
        if state is not None:
            self._restore(state)
        elif self.resume:
            LOGGER.warning(f"{self.args.model} was not made by yolo_gradstab: records and policy state start afresh")

    def _restore(self, state: dict[str, Any]) -> None:
        """Exact weights and counters now; what the epoch's start would overwrite waits for `_continue`."""
        unwrap_model(self.model).load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            if "fused" in saved:  # as the host does: the device decides, not the checkpoint
                saved["fused"] = group.get("fused")
        self.optimizer.load_state_dict(state["optimizer"])
        self._watch = msgspec.convert(state["watch"], DivergenceWatch)
        self._spikes = msgspec.convert(state["spikes"], SpikeWatch)
        self._health, self._restless = msgspec.convert(state["health"], HealthWatch), state["restless"]
        seen = {name: None if state[name] is None else state[name].to(self.device) for name in ("look", "zero_steps")}
        self._look, self._zero_steps = seen["look"], seen["zero_steps"]
        self._divergence = msgspec.convert(state["divergence"], Divergence | None)
        self._rollbacks, self._lr_factor = state["rollbacks"], state["lr_factor"]
        self._warmup_again = state["warmup_again"]
        self._was_troubled, self._input_kept = state["was_troubled"], state["input_kept"]
        self._step, self._attempt = state["step"], state["attempt"]
        self._seconds_before, self._last_step_batch = state["seconds"], state["last_step_batch"]
        if state["mosaic_closed"]:  # the host would close it again and draw from the loader's generator in doing so
            self._close_dataloader_mosaic()
            state["close_mosaic"], self.args.close_mosaic = self.args.close_mosaic, 0
        self._resumed = state

    def _continue(self, state: dict[str, Any]) -> None:
        """Restore what set-up has consumed since: random states, the mosaic buffer, gradients of pending batches."""
        self.args.close_mosaic = state.get("close_mosaic", self.args.close_mosaic)
        if state["batches"] != self._batches():
            LOGGER.warning(
                f"Resumed with other batches than the checkpoint's (number, size: {self._batches()}, were "
                f"{state['batches']}): the run goes on, but not as the uninterrupted one would have"
            )
            self._last_step_batch = -1
            return
        self._aligning = True
        dataset = self.train_loader.dataset
        for index in state["mosaic_buffer"]:
            dataset.load_image(index)
        if state["mosaic_buffer"]:
            dataset.buffer[:] = state["mosaic_buffer"]
        for name, parameter in zip(self._names, self._parameters, strict=True):
            # A resume may freeze layers; the optimizer would step with what is pending for them.
            grad = state["grads"].get(name) if parameter.requires_grad else None
            parameter.grad = None if grad is None else grad.to(parameter.device)
        self._accumulated = _Accumulated.from_state(state["accumulated"])
        if self.world_size <= 1:  # only rank 0's were saved
            saved = state["random"]
            random.setstate(saved["python"])
            np.random.set_state(saved["numpy"])  # noqa: NPY002
            torch.set_rng_state(saved["torch"])
            if self.device.type == "cuda" and len(saved["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(saved["cuda"])
            loader = self.train_loader
            if loader.num_workers == 0:
                # A sampler draws once more when it is asked beyond its end, so it must stand where the epoch had left
                # it; the indices drawn here are thrown away. Workers prefetch, and cannot be brought back exactly.
                loader.iterator = loader._get_iterator()
                for _ in range(len(loader)):
                    loader.iterator._next_index()
            loader.generator.set_state(saved["loader"])


def _fitting(wanted: Mitigations, before: Mitigations) -> Mitigations:
    """The mitigations to be made for weights of a model that had others, if they go together."""
    if wanted.init is not None:
        raise ConfigError(
            f"mitigations.init={wanted.init.method} would throw away the weights that are to be loaded; "
            "give a model's YAML as model=, or leave mitigations.init out"
        )
    for key in ("residual", "normalization", "activation"):
        had, has = getattr(before, key), getattr(wanted, key)
        if had not in (None, has):
            raise ConfigError(
                f"mitigations.{key}={has or 'null'}, but the weights are of a model trained with "
                f"mitigations.{key}={had}; give it so, or train from a model's YAML"
            )
    return wanted


def _in_words(modules: list[str]) -> str:
    shown = ", ".join(modules[:3]) + (", ..." if modules[3:] else "")
    return f"{len(modules)} changed ({shown})" if modules else "nothing to change, the model is so already"


def _median_where(chosen: Tensor, values: Tensor) -> Tensor:
    """``values[chosen].median()`` of two vectors, without waiting to learn how many are chosen; NaN where none is."""
    ordered = values.masked_fill(~chosen, math.inf).sort().values  # the chosen first, but for any NaN
    median = ordered.gather(0, ((chosen.sum() - 1) // 2).clamp_min(0)[None]).squeeze(0)
    return torch.where((values.isnan() & chosen).any() | ~chosen.any(), torch.nan, median)


def _without_teacher(named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Without those of the model that a run is distilled from, which is part of the host's and not trained."""
    return ((name, tensor) for name, tensor in named if not name.startswith("teacher_model."))


def _our_state(ckpt: dict[str, Any] | None) -> dict[str, Any] | None:
    state: dict[str, Any] | None = ((ckpt or {}).get("optimizer") or {}).get(STATE_KEY)
    return state


def _epoch_columns(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The epoch's columns of `results.csv`; NaN where no step was made."""
    norms = [row["total_norm"] for row in rows if np.isfinite(row["total_norm"])] or [np.nan]
    coefs = [row["clip_coef"] for row in rows if not row["skipped"]]
    lrs = [row["lr"] for row in rows if not row["skipped"]]
    return {
        "grad/norm_p50": float(np.median(norms)),
        "grad/norm_max": float(np.max(norms)),
        "grad/clipped_share": float(np.mean(np.less(coefs, 1))) if coefs else np.nan,
        "grad/lr_eff": float(np.mean(np.multiply(lrs, coefs))) if coefs else np.nan,
        "grad/skipped": float(sum(row["skipped"] for row in rows)),
    }
