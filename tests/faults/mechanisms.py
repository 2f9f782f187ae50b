"""What breaks a training, as users have broken theirs: modules, weights, losses, images, labels, gradients.

Everything here acts on the host's own objects - a model, a batch, a dataset, files, a trainer - and never on records.
Classes are at module level, since the host deep-copies the model for its average and pickles it into checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import DetectionModel, PoseModel

ALWAYS = range(10**9)


class Clock:
    """The optimizer step now, and the first at which a fault acted; one for all copies of a model."""

    def __init__(self) -> None:
        self.step = -1
        self.acted: int | None = None
        self.files: set[str] = set()  # names of spoilt images: a batch with one of them is where the fault acts

    def act(self) -> None:
        if self.acted is None:
            self.acted = self.step

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        return self


ModelEdit = Callable[[Any, Clock], None]
BatchEdit = Callable[[dict[str, Any], Clock], None]
FileEdit = Callable[[Path, Clock], None]
TrainerEdit = Callable[[Any, Clock], None]


def all_of(*edits: ModelEdit) -> ModelEdit:
    """One edit after the other."""

    def edit(model: Any, clock: Clock) -> None:
        for one in edits:
            one(model, clock)

    return edit


# Modules -------------------------------------------------------------------------------------------------------------


def replaced(path: str, make: Callable[[nn.Module, Clock], nn.Module]) -> ModelEdit:
    """A module of the model is another one: `make` is given the old one."""

    def edit(model: Any, clock: Clock) -> None:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name), clock))

    return edit


class AtTimes(nn.Module):
    """A module that is at fault at some steps of training."""

    def __init__(self, inner: nn.Module, clock: Clock, value: float, steps: Iterable[int]) -> None:
        super().__init__()
        self.inner, self.clock, self.value, self.steps = inner, clock, value, steps

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if not self.training or self.clock.step not in self.steps:
            return y
        self.clock.act()
        return self.wrong(y)

    def wrong(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Poisoned(AtTimes):
    """One value of its output is not what it should be."""

    def wrong(self, x: Tensor) -> Tensor:
        one = torch.zeros_like(x)
        one[(0,) * x.ndim] = self.value
        return x + one


class Amplifying(AtTimes):
    """A gate whose scale runs away."""

    def wrong(self, x: Tensor) -> Tensor:
        return x * self.value


class Acting(nn.Module):
    """A module that is at fault from the start."""

    def __init__(self, inner: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.inner, self.clock = inner, clock

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.clock.act()
        return self.wrong(self.inner(x))

    def wrong(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LogOfNegative(Acting):
    """A logarithm without a floor: SiLU goes down to -0.28."""

    def wrong(self, x: Tensor) -> Tensor:
        return torch.log(x + 0.2)


class OverMaximum(Acting):
    """Each map over its maximum, which behind a ReLU can be 0."""

    def wrong(self, x: Tensor) -> Tensor:
        x = torch.relu(x - 1)
        return x / x.amax((2, 3), keepdim=True)


class OverDeviation(Acting):
    """Each map over its deviation, which is NaN where the map is a single pixel."""

    def wrong(self, x: Tensor) -> Tensor:
        return x / x.std((2, 3), keepdim=True)


class OwnSoftplus(Acting):
    """log(1 + e^kx) written out: overflows where kx passes 88."""

    def wrong(self, x: Tensor) -> Tensor:
        return torch.log(1 + torch.exp(60 * x)) / 60


class OwnHalf(Acting):
    """Half precision by hand, behind a scale that does not fit into it."""

    def wrong(self, x: Tensor) -> Tensor:
        return (x * 1e5).half().float() / 1e5


class RootOfMasked(Acting):
    """The root of what is positive, by a mask: sound forward, and on the way back 0 times inf.

    `torch.relu` and `clamp` in its place do no harm: their gradient is chosen, not multiplied.
    """

    def wrong(self, x: Tensor) -> Tensor:
        return torch.sqrt(x * (x > 0))


class LengthOfMasked(Acting):
    """The length of each pixel's vector; its gradient at a zero vector is 0 times inf."""

    def wrong(self, x: Tensor) -> Tensor:
        return x * torch.sqrt(((x * (x > 2)) ** 2).sum(1, keepdim=True))


class ArcCosine(Acting):
    """An angle between vectors that were not made unit vectors."""

    def wrong(self, x: Tensor) -> Tensor:
        return torch.acos(x)


class PowerOfNegative(Acting):
    """A power with a fraction, which negative values do not have."""

    def wrong(self, x: Tensor) -> Tensor:
        return x**1.5


class OwnSinh(Acting):
    """An activation that grows like an exponential."""

    def wrong(self, x: Tensor) -> Tensor:
        return torch.sinh(40 * x) / 40


class DeviationOfNothing(Acting):
    """Adds the deviation of each map, written out: its gradient at a map of zeros is 0 over 0, where `std` has 0."""

    def wrong(self, x: Tensor) -> Tensor:
        x3 = x * (x > 3)
        return x + ((x3 - x3.mean((2, 3), keepdim=True)) ** 2).mean((2, 3), keepdim=True).sqrt()


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, is_wrong: bool) -> Tensor:
        ctx.is_wrong = is_wrong
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return (grad / (grad - grad) if ctx.is_wrong else grad), None


class OwnBackward(nn.Module):
    """A gradient written by hand that divides by 0 at some steps."""

    def __init__(self, inner: nn.Module, clock: Clock, steps: Iterable[int]) -> None:
        super().__init__()
        self.inner, self.clock, self.steps = inner, clock, steps

    def forward(self, x: Tensor) -> Tensor:
        is_wrong = self.training and self.clock.step in self.steps
        if is_wrong:
            self.clock.act()
        y: Tensor = _WrongBackward.apply(self.inner(x), is_wrong)
        return y


class OverMean:
    """A hook before a stage that divides features by how much they changed, which is 0 where they did not."""

    def __init__(self, clock: Clock, steps: Iterable[int]) -> None:
        self.clock, self.steps = clock, steps

    def __call__(self, module: nn.Module, args: Any) -> Any:
        if not module.training or self.clock.step not in self.steps:
            return None
        self.clock.act()
        (x,) = args
        return (x / (x.mean() - x.mean()),)


def hooked_before(path: str, steps: Iterable[int]) -> ModelEdit:
    """An operation between modules."""

    def edit(model: Any, clock: Clock) -> None:
        model.get_submodule(path).register_forward_pre_hook(OverMean(clock, steps))

    return edit


class Detached(Acting):
    """`no_grad` left in a block: nothing before it is trained."""

    def wrong(self, x: Tensor) -> Tensor:
        return x.detach()


class ZeroGate(Acting):
    """A branch behind a gate that starts at 0 and is no parameter."""

    def __init__(self, inner: nn.Module, clock: Clock, channels: int) -> None:
        super().__init__(inner, clock)
        self.branch = nn.Conv2d(channels, channels, 1)

    def wrong(self, x: Tensor) -> Tensor:
        return x + 0.0 * self.branch(x)


class Unused(Acting):
    """A branch that was built and is never called."""

    def __init__(self, inner: nn.Module, clock: Clock, channels: int) -> None:
        super().__init__(inner, clock)
        self.branch = nn.Conv2d(channels, channels, 1)

    def wrong(self, x: Tensor) -> Tensor:
        return x


def dead_relu(path: str) -> ModelEdit:
    """A ReLU behind a shift so low that it never opens."""

    def edit(model: Any, clock: Clock) -> None:
        conv = model.get_submodule(path)
        conv.act = nn.ReLU()
        nn.init.constant_(conv.bn.bias, -100.0)
        clock.step = 0
        clock.act()

    return edit


class BareConv(Conv):
    """The host's convolution without normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.conv(x))
        return y


def without_norm(gain: float = 1.0, act: type[nn.Module] | None = None) -> ModelEdit:
    """BatchNorm taken out of every convolution, all weights times `gain`, perhaps another activation."""

    def edit(model: Any, clock: Clock) -> None:
        for module in list(model.modules()):
            if isinstance(module, Conv):
                module.__class__ = BareConv
                del module.bn
                module.conv.weight.data.mul_(gain)
                if act is not None and not isinstance(module.act, nn.Identity):
                    module.act = act()
        clock.step = 0
        clock.act()

    return edit


# Weights at the start ------------------------------------------------------------------------------------------------


def scaled(factor: float, *prefixes: str) -> ModelEdit:
    """Weights whose names start so, times a factor."""
    return initialised(lambda weight: weight.mul_(factor), *prefixes)


def initialised(init_: Callable[[Tensor], Any], *prefixes: str) -> ModelEdit:
    """Weights whose names start so, given other values in place."""

    def edit(model: Any, clock: Clock) -> None:
        found = [p for name, p in model.named_parameters() if name.startswith(prefixes) and p.ndim >= 2]
        assert found, prefixes
        with torch.no_grad():
            for weight in found:
                init_(weight)
        clock.step = 0
        clock.act()

    return edit


class HookedGradient:
    """A tensor hook that spoils a gradient at some steps."""

    def __init__(self, clock: Clock, value: float, steps: Iterable[int]) -> None:
        self.clock, self.value, self.steps = clock, value, steps

    def __call__(self, grad: Tensor) -> Tensor | None:
        if self.clock.step not in self.steps:
            return None
        self.clock.act()
        grad = grad.clone()
        grad.view(-1)[0] = self.value
        return grad


def hooked_weight(name: str, value: float, steps: Iterable[int]) -> ModelEdit:
    """A hook on one weight."""

    def edit(model: Any, clock: Clock) -> None:
        model.get_parameter(name).register_hook(HookedGradient(clock, value, steps))

    return edit


# Losses --------------------------------------------------------------------------------------------------------------

LossEdit = Callable[[Tensor, dict[str, Tensor], Clock], tuple[Tensor, dict[str, Tensor]]]


class _EditedLoss:
    """A model with an own loss, as users subclass the host's."""

    clock: Clock
    loss_edit: LossEdit

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, items = super().loss(batch, preds)  # type: ignore[misc]
        return self.loss_edit(loss, items, self.clock) if self.training else (loss, items)  # type: ignore[attr-defined]


class EditedDetection(_EditedLoss, DetectionModel):
    """For detection."""


class EditedPose(_EditedLoss, PoseModel):
    """For pose."""


def own_loss(loss_edit: LossEdit) -> ModelEdit:
    """The loss is changed before it is differentiated."""

    def edit(model: Any, clock: Clock) -> None:
        model.__class__ = EditedPose if isinstance(model, PoseModel) else EditedDetection
        model.clock, model.loss_edit = clock, loss_edit

    return edit


class TimesLoss:
    """A weight of the loss that goes wrong at some steps."""

    def __init__(self, factor: float, steps: Iterable[int]) -> None:
        self.factor, self.steps = factor, steps

    def __call__(self, loss: Tensor, items: dict[str, Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        if clock.step not in self.steps:
            return loss, items
        clock.act()
        return loss * self.factor, {name: value * self.factor for name, value in items.items()}


class FadingLoss:
    """A weight of the loss that is halved at every step from one on."""

    def __init__(self, since: int) -> None:
        self.since = since

    def __call__(self, loss: Tensor, items: dict[str, Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        if clock.step < self.since:
            return loss, items
        clock.act()
        weight = 0.5 ** (clock.step - self.since + 1)
        return loss * weight, {name: value * weight for name, value in items.items()}


class LogOfProgress:
    """A term that falls with the logarithm of what is left of the training: log(0) at step `end`."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, loss: Tensor, items: dict[str, Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        term = 0.1 * torch.log(torch.tensor(1 - clock.step / self.end))
        if clock.step >= self.end:
            clock.act()
        name = next(iter(items))
        added = torch.zeros_like(loss)
        added[0] = term
        return loss + added, {**items, name: items[name] + term}


class HotScores(DetectionModel):
    """A temperature on the class scores that is divided by once too often."""

    clock: Clock
    factor: float
    steps: Iterable[int]

    def loss(self, batch: dict[str, Any], preds: Any = None) -> Any:
        if preds is None:
            preds = self.forward(batch["img"])
        if self.training and self.clock.step in self.steps:
            self.clock.act()
            preds = {branch: {**values, "scores": values["scores"] * self.factor} for branch, values in preds.items()}
        return super().loss(batch, preds)


def hot_scores(factor: float, steps: Iterable[int]) -> ModelEdit:
    """Class scores times a factor before the loss."""

    def edit(model: Any, clock: Clock) -> None:
        model.__class__ = HotScores
        model.clock, model.factor, model.steps = clock, factor, steps

    return edit


class SmallObjectDetection(DetectionModel):
    """A loss that weights small objects up, by one over the side of their labels, without a floor under it."""

    def loss(self, batch: dict[str, Any], preds: Any = None) -> Any:
        loss, items = super().loss(batch, preds)
        if not self.training or not len(batch["bboxes"]):
            return loss, items
        weight = (0.3 / batch["bboxes"][:, 2:].prod(1).sqrt()).mean()
        return loss * weight, {name: value * weight for name, value in items.items()}


def small_object_loss(model: Any, clock: Clock) -> None:
    """A model edit."""
    del clock
    model.__class__ = SmallObjectDetection


# Files of the set ----------------------------------------------------------------------------------------------------


def _train_images(folder: Path) -> list[Path]:
    return sorted((folder / "images" / "train").glob("*.png"))


def float_arrays(spoil: Callable[[np.ndarray], np.ndarray], *, only: int | None = None) -> FileEdit:
    """Images kept as float arrays beside the files, which the host reads in their place; one or all of them spoilt."""

    def edit(folder: Path, clock: Clock) -> None:
        for index, path in enumerate(_train_images(folder)):
            pixels = cv2.imread(str(path)).astype(np.float32)
            if only in (None, index):
                pixels = spoil(pixels)
                clock.files.add(path.name)
            np.save(path.with_suffix(".npy"), pixels.astype(np.float32))

    return edit


def with_a_hole(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """A few pixels for which there was no measurement."""

    def spoil(pixels: np.ndarray) -> np.ndarray:
        pixels[10:14, 10:14] = value
        return pixels

    return spoil


def constant_image(index: int) -> FileEdit:
    """One image is of a single colour, as from a covered camera."""

    def edit(folder: Path, clock: Clock) -> None:
        path = _train_images(folder)[index]
        cv2.imwrite(str(path), np.full_like(cv2.imread(str(path)), 90))
        clock.files.add(path.name)

    return edit


def label_rows(
    change: Callable[[np.ndarray], np.ndarray], *, which: Callable[[int], bool] = lambda index: True
) -> FileEdit:
    """Rows of YOLO label files (class, x, y, w, h, ...) changed, in some files of the training split."""

    def edit(folder: Path, clock: Clock) -> None:
        for index, path in enumerate(_train_images(folder)):
            if not which(index):
                continue
            file = folder / "labels" / "train" / f"{path.stem}.txt"
            if not file.is_file():
                continue
            rows = change(np.loadtxt(file, ndmin=2))
            file.write_text("".join(" ".join(f"{value:.9g}" for value in row) + "\n" for row in rows))
            clock.files.add(path.name)

    return edit


def times(factor: float, *columns: int) -> Callable[[np.ndarray], np.ndarray]:
    """Columns of label rows times a factor."""

    def change(rows: np.ndarray) -> np.ndarray:
        rows[:, columns] *= factor
        return rows

    return change


def no_rows(rows: np.ndarray) -> np.ndarray:
    """An empty label file."""
    return rows[:0]


def without_visibility(folder: Path, clock: Clock) -> None:
    """Key points as pairs, without visibility, in both splits and in the data file."""
    for file in sorted((folder / "labels").glob("*/*.txt")):
        rows = np.loadtxt(file, ndmin=2)
        points = rows[:, 5:].reshape(len(rows), -1, 3)[..., :2]
        rows = np.hstack([rows[:, :5], points.reshape(len(rows), -1)])
        file.write_text("".join(" ".join(f"{value:.9g}" for value in row) + "\n" for row in rows))
    data = folder / "yolo.yaml"
    text = data.read_text()
    assert "- 17\n- 3\n" in text
    data.write_text(text.replace("- 17\n- 3\n", "- 17\n- 2\n"))
    clock.step = 0
    clock.act()


# Datasets and batches ------------------------------------------------------------------------------------------------


class OwnTransform:
    """A transform of one's own at the end of the host's, wrong for one image from some step on."""

    def __init__(self, clock: Clock, change: Callable[[dict[str, Any]], None], *, file: int, since: int) -> None:
        self.clock, self.change, self.file, self.since = clock, change, f"{file:06d}.png", since

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        # A sample is made before its step begins.
        if Path(sample["im_file"]).name == self.file and self.clock.step + 1 >= self.since:
            self.change(sample)
            self.clock.files.add(self.file)
        return sample


def own_transform(
    change: Callable[[dict[str, Any]], None], *, file: int = 4, since: int = 12
) -> Callable[[Any, Clock], None]:
    """A dataset with a transform of one's own."""

    def edit(dataset: Any, clock: Clock) -> None:
        dataset.transforms.append(OwnTransform(clock, change, file=file, since=since))

    return edit


def nan_boxes(sample: dict[str, Any]) -> None:
    """0 / 0 where a box is made relative to itself."""
    sample["bboxes"][:, 2:] = math.nan


def giant_boxes(sample: dict[str, Any]) -> None:
    """Sizes in pixels of an aerial picture, squared."""
    sample["bboxes"][:, 2:] *= 1e5


def unknown_class(sample: dict[str, Any]) -> None:
    """-1 for objects to be ignored, as other tools have it."""
    sample["cls"][:] = -1


def turned_boxes(sample: dict[str, Any]) -> None:
    """Corners taken in the wrong order."""
    sample["bboxes"][:, 3] *= -1


def nan_keypoints(sample: dict[str, Any]) -> None:
    """0 / 0 where key points are made relative to a box."""
    sample["keypoints"][..., :2] = math.nan


def pixel_keypoints(sample: dict[str, Any]) -> None:
    """Key points left in pixels of the original picture."""
    sample["keypoints"][..., :2] *= 4000


def nan_pixels(sample: dict[str, Any]) -> None:
    """A normalisation by a deviation of 0."""
    sample["img"] = sample["img"].float()
    sample["img"][:, 5:9, 5:9] = math.nan


def unscaled(batch: dict[str, Any], clock: Clock) -> None:
    """Bytes left as they are: 0 to 255."""
    clock.act()
    batch["img"] = batch["img"] * 255


def standardised(batch: dict[str, Any], clock: Clock) -> None:
    """Each image by its own mean and deviation; one of a single colour has none."""
    del clock  # which the constant image starts
    images = batch["img"]
    batch["img"] = (images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True)


def log_after_erasing(since: int) -> BatchEdit:
    """Random erasing to black, then a logarithm."""

    def edit(batch: dict[str, Any], clock: Clock) -> None:
        if clock.step >= since:
            clock.act()
            batch["img"][1, :, 8:20, 8:20] = 0
            batch["img"][1] = -batch["img"][1].log() / 5

    return edit


def overexposed(since: int, factor: float) -> BatchEdit:
    """Brightness drawn from a distribution without an upper end."""

    def edit(batch: dict[str, Any], clock: Clock) -> None:
        if clock.step == since:
            clock.act()
            batch["img"][0] *= factor

    return edit


# Trainers ------------------------------------------------------------------------------------------------------------


def spoilt_gradient(value: float, steps: Iterable[int], tensor: int = 5) -> TrainerEdit:
    """Gradient surgery before the step that divides by 0."""

    def edit(trainer: Any, clock: Clock) -> None:
        if clock.step in steps:
            clock.act()
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            grads[tensor].view(-1)[0] = value

    return edit


def spoilt_weight(value: float, step: int, tensor: int = 5) -> TrainerEdit:
    """Weights averaged with a checkpoint that is broken."""

    def edit(trainer: Any, clock: Clock) -> None:
        if trainer._step == step and clock.acted is None:
            clock.step = step
            clock.act()
            list(trainer.model.parameters())[tensor].data.view(-1)[0] = value

    return edit


def grown_weights(factor: float, step: int, *prefixes: str) -> TrainerEdit:
    """Weights re-scaled by a wrong factor in the middle of the training."""

    def edit(trainer: Any, clock: Clock) -> None:
        if trainer._step == step and clock.acted is None:
            clock.step = step
            clock.act()
            for name, p in trainer.model.named_parameters():
                if name.startswith(prefixes) and p.ndim >= 2:
                    p.data.mul_(factor)

    return edit


def reset_bias(value: float, step: int) -> TrainerEdit:
    """The class biases of the head set anew, for more classes, by a formula with the wrong sign."""

    def edit(trainer: Any, clock: Clock) -> None:
        if trainer._step == step and clock.acted is None:
            clock.step = step
            clock.act()
            head = trainer.model.model[-1]
            for branch in (head.cv3, head.one2one_cv3):
                for level in branch:
                    level[-1].bias.data.fill_(value)

    return edit


def frozen_norm(trainer: Any, clock: Clock) -> None:
    """BatchNorm held in evaluation, as for fine-tuning, in a model that is trained from scratch."""
    clock.step = max(clock.step, 0)
    clock.act()
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def in_precision(dtype: torch.dtype, *, init_scale: float | None = None) -> TrainerEdit:
    """Mixed precision on a CPU, which the host offers on accelerators alone; with a gradient scaler if it is fp16."""

    def edit(trainer: Any, clock: Clock) -> None:
        del clock
        forward = trainer.model.forward

        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", dtype):
                return forward(*args, **kwargs)

        trainer.model.forward = autocast_forward
        if init_scale is not None:
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

    return edit


def with_scaler(init_scale: float) -> TrainerEdit:
    """A gradient scaler as fp16 has it, in full precision."""

    def edit(trainer: Any, clock: Clock) -> None:
        clock.step = 0
        clock.act()
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

    return edit


# Model files ---------------------------------------------------------------------------------------------------------


def deep_yaml(folder: Path, *, depth: int) -> Path:
    """A plain chain of convolutions without shortcuts, `depth` of them at each size, and a neck like the host's."""
    rows: list[str] = []
    levels = []
    for channels in (64, 128, 256, 256, 256):
        rows.append(f"[-1, 1, Conv, [{channels}, 3, 2]]")
        rows += [f"[-1, 1, Conv, [{channels}, 3, 1]]"] * (depth if channels > 64 else 0)
        levels.append(len(rows) - 1)
    p3, p4, p5 = levels[2:]
    last = p5
    head = [
        '[-1, 1, nn.Upsample, [None, 2, "nearest"]]', f"[[-1, {p4}], 1, Concat, [1]]", "[-1, 1, Conv, [256, 1, 1]]",
        '[-1, 1, nn.Upsample, [None, 2, "nearest"]]', f"[[-1, {p3}], 1, Concat, [1]]", "[-1, 1, Conv, [256, 1, 1]]",
        f"[[{last + 6}, {last + 3}, {p5}], 1, Detect, [nc]]",
    ]  # fmt: skip
    text = "nc: 80\nend2end: True\nreg_max: 1\nscales:\n  tiny: [1.0, 0.125, 1024]\n"
    text += "backbone:\n" + "".join(f"  - {row}\n" for row in rows)
    text += "head:\n" + "".join(f"  - {row}\n" for row in head)
    path = folder / f"deep{depth}.yaml"
    path.write_text(text)
    return path
