"""Incidents: a batch is kept as it went in, the place where it goes bad is the one that was spoilt, the training does
not notice, and a stranger's folder is refused."""

import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from conftest import MODELS, DrawnSet
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, PoseModel, parse_model

from yolo_gradstab import cli, incident, replay
from yolo_gradstab.incident import (
    Incident,
    IncidentError,
    capture,
    image_notes,
    images_of,
    labels_are_sound,
    read_incident,
)
from yolo_gradstab.localisation import FirstBad, first_bad_words, localise, same_place

NAN, INF = math.nan, math.inf
MODEL: dict[str, Any] = {
    "nc": 3,
    "end2end": True,
    "reg_max": 1,
    "kpt_shape": [4, 3],
    "channels": 3,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C3k2", [16, False, 0.5]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
}
HEADS = {"detect": [[2, 3], 1, "Detect", ["nc"]], "pose": [[2, 3], 1, "Pose26", ["nc", "kpt_shape"]]}
CLASSES = {"detect": DetectionModel, "pose": PoseModel}


def build(task: str = "detect", **more: Any) -> Any:
    """A host model of four small stages and a head on two levels, in training mode."""
    torch.manual_seed(0)
    model = CLASSES[task]({**deepcopy(MODEL), "head": [deepcopy(HEADS[task])], **more}, verbose=False)
    model.args = get_cfg()
    return model.train()


def make_batch(task: str = "detect", seed: int = 0) -> dict[str, Any]:
    """Four images as `preprocess_batch` leaves them: the first with two objects, the last with none."""
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Any] = {
        "img": torch.randint(0, 256, (4, 3, 32, 32), generator=generator).float() / 255,
        "batch_idx": torch.tensor([0.0, 0.0, 1.0, 2.0]),
        "cls": torch.tensor([[0.0], [1.0], [2.0], [0.0]]),
        "bboxes": torch.tensor(
            [[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.3], [0.6, 0.4, 0.5, 0.5], [0.5, 0.5, 0.3, 0.6]]
        ),
        "im_file": [f"images/{seed}_{i}.jpg" for i in range(4)],
    }
    if task == "pose":
        batch["keypoints"] = torch.rand(4, 4, 3, generator=generator)
        batch["keypoints"][..., 2] = 2.0
    return batch


def kept(folder: Path, model: Any, *batches: dict[str, Any], **more: Any) -> Incident:
    known: dict[str, Any] = {
        "losses": {"box_loss": 1.0}, "loss": 2.0, "step": 12, "epoch": 3, "batch": 40, "reason": "nonfinite_gradient",
        "task": "pose" if isinstance(model, PoseModel) else "detect", "total_norm": NAN,
        "grads": {"model.0.conv.weight": NAN},
    }  # fmt: skip
    return capture(folder, model=model, batches=batches, **known | more)


# Localising


class Divides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x)


class RootOfZero(nn.Module):
    """Finite forward; the way back is 0 times inf."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x * 0).sqrt()


@pytest.mark.parametrize("task", ["detect", "pose"])
def test_nothing_is_found_in_a_sound_batch(task: str) -> None:
    assert localise(build(task), make_batch(task)) is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_images_that_are_not_finite_are_named_before_what_they_spoil(value: float) -> None:
    batch = make_batch()
    batch["img"][2, 1, 5, 7] = value
    found = localise(build(), batch)
    assert found == FirstBad(where="input", input_max=1.0, note="image 2 of 4")


def test_huge_images_are_named_although_all_stays_finite() -> None:
    batch = make_batch()
    batch["img"][1, 0, 0, 0] = -1e6
    assert localise(build(), batch) == FirstBad(where="input", what="amplified", input_max=1e6, note="image 1 of 4")


@pytest.mark.parametrize("name", ["model.1.conv", "model.2.m.0.cv2.bn", "model.4.one2one_cv3.1.2"])
def test_the_module_with_bad_weights_is_named(name: str) -> None:
    model = build()
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[0] = NAN
    found = localise(model, make_batch())
    assert found is not None
    assert (found.where, found.what, found.module) == ("forward", "nonfinite", name)
    assert found.type == type(model.get_submodule(name)).__name__
    assert found.note == "its weight is not finite"
    assert found.input_max is not None
    assert found.input_max < 100  # its input was sound


def test_a_module_of_modules_is_named_for_its_own_arithmetic() -> None:
    model = build()
    stage = model.model[2]
    sound = stage.forward
    stage.forward = lambda x: sound(x) / 0
    found = localise(model, make_batch())
    assert found is not None
    assert (found.where, found.module, found.type) == ("forward", "model.2", "C3k2")
    assert found.note == ""


def test_a_module_that_is_fed_nan_by_its_parent_is_not_blamed() -> None:
    model = build()
    block = model.model[2].m[0]
    block.forward = lambda x: block.cv2(block.cv1(x) / 0)
    found = localise(model, make_batch())
    assert found is not None
    assert (found.where, found.module, found.type) == ("forward", "model.2.m.0", "Bottleneck")


def test_a_shared_activation_is_named_by_the_place_where_it_failed() -> None:
    model = build()
    act = model.model[0].act
    assert act is model.model[2].cv1.act  # the host makes one for all
    calls = []

    class Third(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            return x * NAN if len(calls) == 3 else x

    act.forward = Third().forward  # the third activation that runs is that of model.2.cv1
    found = localise(model, make_batch())
    del act.forward  # the host's own, of every model of this process
    assert found is not None
    assert (found.where, found.module) == ("forward", "model.2.cv1.act")


def test_the_loss_component_is_named() -> None:
    model, batch = build("pose"), make_batch("pose")
    batch["keypoints"][1, 0, 0] = NAN
    found = localise(model, batch)
    _, items = model.loss(batch)
    bad = [name for name, value in items.items() if not value.isfinite()]
    assert found is not None
    assert (found.where, found.module) == ("loss", None)
    assert [found.component, *found.note.removeprefix("also ").split(", ")] == bad


def test_a_component_of_the_branch_that_is_not_logged_is_named() -> None:
    model, batch = build(), make_batch()
    model.criterion = model.init_criterion()
    model.criterion.one2many.hyp = get_cfg(overrides={"cls": 1e39})
    found = localise(model, batch)
    assert found is not None
    assert (found.where, found.component) == ("loss", "cls_loss")
    assert "one-to-many" in found.note
    assert all(value.isfinite() for value in model.loss(batch)[1].values())


@pytest.mark.parametrize("name", ["model.1.act", "model.3.act"])
def test_the_module_that_spoils_the_gradient_is_named(name: str) -> None:
    # The output of model.2 goes to model.3 and to the head: the head, whose gradient is sound, must not be blamed.
    model = build()
    model.set_submodule(name, RootOfZero())
    found = localise(model, make_batch())
    assert found is not None
    assert (found.where, found.what, found.module, found.type) == ("backward", "nonfinite", name, "RootOfZero")
    assert found.note == "at SqrtBackward0"
    assert found.input_max is not None


def test_a_loss_that_spoils_the_gradient_is_told_from_a_module() -> None:
    model = build()
    sound = model.init_criterion()

    def criterion(preds: Any, batch: Any) -> Any:
        loss, items = sound(preds, batch)
        return loss + (preds["one2many"]["boxes"] * 0).sqrt().sum(), items

    model.criterion = criterion
    found = localise(model, make_batch())
    assert found is not None
    assert (found.where, found.module, found.type) == ("backward", None, "SqrtBackward0")
    assert found.note == "at SqrtBackward0, in the loss"


def test_a_module_that_amplifies_abruptly_is_named() -> None:
    model, batch = build(), make_batch()
    with torch.no_grad():
        model.model[2].cv1.conv.weight *= 1e5
    found = localise(model, batch)
    assert found is not None
    assert (found.where, found.what, found.module) == ("forward", "amplified", "model.2.cv1.conv")
    assert found.component in model.loss(batch)[1]
    conv = model.model[2].cv1.conv
    came = model.model[1](model.model[0](batch["img"]))
    assert found.input_max == pytest.approx(float(came.detach().abs().max()))
    assert found.output_max == pytest.approx(float(conv(came).detach().abs().max()))
    with torch.no_grad():  # all of them together are no exception
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module is not conv:
                module.weight *= 1e5
    assert localise(model, batch) is None


def test_a_lifted_output_counts_from_a_thousand_on() -> None:
    model, batch = build(), make_batch()
    conv = model.model[2].cv1.conv
    came = model.model[1](model.model[0](batch["img"]))
    went = float(conv(came).detach().abs().max())
    for output, name in ((900, None), (1100, "model.2.cv1.conv")):
        sound = conv.weight.detach().clone()
        with torch.no_grad():
            conv.weight *= output / went
            found = localise(model, batch)
            conv.weight.copy_(sound)
        assert (found.module if found else None) == name


def test_half_precision_overflow_is_found_where_it_happens() -> None:
    model, batch = build(), make_batch()
    with torch.no_grad():
        model.model[1].conv.weight *= 1e5
    half = localise(model, batch, autocast_dtype=torch.float16)
    whole = localise(model, batch)
    assert half is not None
    assert (half.where, half.what, half.module, half.note) == ("forward", "nonfinite", "model.1.conv", "")
    assert whole is not None
    assert whole.what == "amplified"  # 1e5 is nothing to float32


def test_an_overflow_through_the_scale_is_on_the_way_back() -> None:
    found = localise(build(), make_batch(), scale=3e38)
    assert found is not None
    assert (found.where, found.what) == ("backward", "nonfinite")


def test_places_are_compared_without_their_values() -> None:
    one = FirstBad(where="forward", module="model.0", input_max=1.0)
    assert same_place(one, FirstBad(where="forward", module="model.0", input_max=2.0, note="other"))
    assert not same_place(one, FirstBad(where="forward", module="model.1"))
    assert not same_place(one, None)
    assert same_place(None, None)
    assert first_bad_words(None) == "nowhere: everything is finite and nothing stands out"


# The training does not notice


def seed() -> None:
    """States that no rerun leaves behind; what an earlier test left could be the very one."""
    random.seed(101)
    np.random.seed(102)  # noqa: NPY002
    torch.manual_seed(103)


def random_states() -> list[Any]:
    _, words, *rest = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), np.asarray(words).tolist(), rest, torch.get_rng_state().tolist()]


def everything(model: Any) -> dict[str, Any]:
    """What a training goes on from, copied."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "criterion": id(getattr(model, "criterion", None)),
        "random": random_states(),
    }


def same(one: Any, other: Any) -> bool:
    """Bit for bit, NaN included."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def spoil_nothing(model: Any, batch: dict[str, Any]) -> None:
    pass


def spoil_pixel(model: Any, batch: dict[str, Any]) -> None:
    batch["img"][1, 0, 0, 0] = NAN


def spoil_weight(model: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        model.model[3].conv.weight[0, 0, 0, 0] = NAN


def spoil_forward(model: Any, batch: dict[str, Any]) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        random.random()
        raise torch.OutOfMemoryError("no memory for 9 GB")

    model.model[3].forward = fail


@pytest.mark.parametrize("spoil", [spoil_nothing, spoil_pixel, spoil_weight, spoil_forward])
def test_a_capture_leaves_everything_as_it_was(tmp_path: Path, spoil: Callable[..., None]) -> None:
    model, batches = build(), [make_batch(seed=1), make_batch(seed=2)]
    model.model[1].bn.eval()  # as a frozen layer's is
    model.loss(batches[0])[0].sum().backward()
    spoil(model, batches[1])
    seed()
    before, batches_before = everything(model), deepcopy(batches)
    with torch.no_grad():  # as in the host's optimizer step
        found = kept(tmp_path / "12", model, *batches)
    assert same(everything(model), before)
    assert all(same(one, other) for one, other in zip(batches, batches_before, strict=True))
    assert ("no memory for 9 GB" in found.note) == (spoil is spoil_forward)
    vars(model.model[3]).pop("forward", None)  # the control: a forward pass alone does disturb
    with torch.no_grad():
        model.loss(make_batch())
    assert not same(everything(model), before)


def test_a_loss_that_was_not_made_yet_is_not_left_behind() -> None:
    model = build()
    before = set(vars(model))
    assert localise(model, make_batch()) is None
    assert set(vars(model)) == before
    model.loss(make_batch())
    assert set(vars(model)) - before == {"criterion"}  # the control


class Plain(DetectionTrainer):
    """Stock, but saves nothing, which is a third of so short a run."""

    def save_model(self) -> None:
        pass

    def final_eval(self) -> None:
        pass


class Capturing(Plain):
    """The same with a capture at every step."""

    found: list[Incident]

    def preprocess_batch(self, batch: dict[str, Any]) -> Any:
        self.fed = super().preprocess_batch(batch)
        return self.fed

    def optimizer_step(self) -> None:
        folder = Path(self.save_dir) / "incidents" / str(len(self.found))
        self.found.append(kept(folder, self.model, self.fed, total_norm=1.0, grads={}))
        super().optimizer_step()


def test_a_training_with_captures_equals_one_without(drawn: dict[str, DrawnSet], tmp_path: Path) -> None:
    weights, found = [], []
    for trainer in (Plain, Capturing):
        arguments = drawn["detect"].arguments(
            tmp_path / trainer.__name__, epochs=1, val=False, save=False, data=str(drawn["detect"].yolo)
        )
        run: Any = trainer(overrides=arguments)
        run.found = found
        run.train()
        weights.append(run.model.state_dict())
    assert len(found) == 4
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # Sound batches of the host's own loader, mosaics and all, are not complained of.
    assert [(one.first_bad, one.note) for one in found] == [(None, "")] * 4
    assert [image.problems for one in found for image in one.images] == [[]] * 16
    assert any(image.labels for one in found for image in one.images)  # a crop may have lost all of its objects


# What is kept


def test_the_folder_holds_what_went_in(tmp_path: Path) -> None:
    model, batch = build("pose"), make_batch("pose")
    returned = kept(
        tmp_path / "12", model, batch, total_norm=INF, grads={"a": 1.0, "b": NAN, "c": 3.0, "d": INF}, loss=NAN
    )
    assert read_incident(tmp_path / "12") == returned
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12"]
    assert (returned.step, returned.epoch, returned.batch, returned.reason) == (12, 3, 40, "nonfinite_gradient")
    assert (returned.loss, returned.total_norm, returned.losses) == (None, None, {"box_loss": 1.0})
    assert [(t.name, t.norm) for t in returned.tensors] == [("b", None), ("d", None), ("c", 3.0), ("a", 1.0)]
    assert [image.path for image in returned.images] == batch["im_file"]
    assert [image.labels for image in returned.images] == [2, 1, 1, 0]
    arrays = np.load(tmp_path / "12" / "batch.npz", allow_pickle=False)
    assert arrays["img"].dtype == np.uint8
    assert (arrays["img"].astype(np.float32) / 255).tobytes() == batch["img"].numpy().tobytes()
    for name in ("cls", "bboxes", "batch_idx", "keypoints"):
        assert arrays[name].tobytes() == batch[name].numpy().tobytes()
    weights = np.load(tmp_path / "12" / "weights.npz", allow_pickle=False)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        assert weights[name].tobytes() == tensor.numpy().tobytes()
        digest.update(name.encode() + b"\0" + tensor.numpy().tobytes())
    assert returned.weights_sha256 == digest.hexdigest()
    json.loads((tmp_path / "12" / "incident.json").read_bytes(), parse_constant=pytest.fail)  # strict: no NaN


def test_tensors_are_bounded_and_bad_weights_listed(tmp_path: Path) -> None:
    model = build()
    spoil_weight(model, {})
    found = kept(tmp_path / "1", model, make_batch(), grads={f"w{i}": float(i) for i in range(30)})
    assert [t.name for t in found.tensors] == [f"w{i}" for i in range(29, 9, -1)]
    assert found.nonfinite_weights == ["model.3.conv.weight"]


def test_a_name_that_is_no_utf8_is_written_and_drawn(tmp_path: Path) -> None:
    """Linux has such names, and Python surrogates in their place, of which OpenCV would end the process."""
    batch = make_batch()
    batch["im_file"][0] = os.fsdecode(b"images/caf\xe9.jpg")
    batch["img"][0, :, 0, 0] = NAN  # so that its picture is drawn first, with its name
    kept(tmp_path / "12", build(), batch)
    found = read_incident(tmp_path / "12")
    assert found.images[0].path == "images/caf\\xe9.jpg"
    assert cv2.imread(str(tmp_path / "12" / "batch.jpg")) is not None


def test_an_older_capture_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    kept(tmp_path / "1", build(), make_batch(seed=1))
    (tmp_path / "1" / "more").touch()
    kept(tmp_path / "1", build(), make_batch(seed=2))
    assert read_incident(tmp_path / "1").images[0].path == "images/2_0.jpg"
    assert not (tmp_path / "1" / "more").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_the_micro_batch_that_shows_the_trouble_is_kept(tmp_path: Path) -> None:
    def first_image(**more: Any) -> str:
        return kept(tmp_path / "1", model, *batches, **more).images[0].path

    model = build()
    batches = [make_batch(seed=seed) for seed in range(4)]
    batches.sort(key=lambda batch: float(deepcopy(model).loss(batch)[0].detach().sum()))
    batches.insert(1, batches.pop())  # the largest loss is neither first nor last
    sound = {"total_norm": 1.0, "grads": {}}
    assert first_image(**sound) == batches[1]["im_file"][0]
    batches[2]["img"][0, 0, 0, 0] = NAN  # a loss that is not finite goes first
    batches[3]["img"][0, 0, 0, 0] = NAN
    assert first_image(**sound) == first_image() == batches[2]["im_file"][0]


def test_of_finite_losses_the_micro_batch_with_the_bad_gradient_is_kept(tmp_path: Path) -> None:
    class Marked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (x * 0).sqrt() if self.bad else x

    model, batches = build(), [make_batch(seed=seed) for seed in range(3)]
    losses = [float(deepcopy(model).loss(batch)[0].detach().sum()) for batch in batches]
    smallest = int(np.argmin(losses))
    act = Marked()
    model.model[1].act = act
    images = batches[smallest]["img"]
    model.model[0].register_forward_pre_hook(lambda _, args: setattr(act, "bad", args[0] is images))
    found = kept(tmp_path / "1", model, *batches)
    assert found.images[0].path == f"images/{smallest}_0.jpg"
    assert found.first_bad is not None
    assert (found.first_bad.where, found.first_bad.module) == ("backward", "model.1.act")


@pytest.mark.parametrize(
    ("way", "images"),
    [
        ("divided", torch.arange(256).float() / 255),
        ("multiplied", torch.arange(256).float() * torch.tensor(1 / 255)),  # as CUDA divides by a number
        ("float32", torch.linspace(0, 1, 256)),  # resized by multi_scale
        ("float32", torch.tensor([0.0, 1.0, NAN] + 253 * [0.0])),
        ("float32", torch.tensor([0.0, 1.0, 1.1] + 253 * [0.0])),
    ],
)
def test_images_are_bytes_only_where_that_gives_the_same_bits(tmp_path: Path, way: str, images: torch.Tensor) -> None:
    batch = make_batch()
    batch["img"] = images.reshape(1, 1, 16, 16).repeat(4, 3, 2, 2)
    kept(tmp_path / "1", build(), batch)
    stored = np.load(tmp_path / "1" / "batch.npz", allow_pickle=False)["img"]
    assert json.loads((tmp_path / "1" / "model.json").read_bytes())["pixels"] == way
    assert stored.dtype == (np.float32 if way == "float32" else np.uint8)
    assert images_of(stored, way).tobytes() == batch["img"].numpy().tobytes()  # type: ignore[arg-type]


def test_beyond_its_bound_it_leaves_out_weights_then_images(tmp_path: Path) -> None:
    model, batch = build(), make_batch()
    images = batch["img"].numel()
    found = kept(tmp_path / "1", model, batch, max_bytes=images + 1000)
    assert found.note.startswith("weights left out")
    assert not (tmp_path / "1" / "weights.npz").exists()
    with pytest.raises(IncidentError, match=r"holds no weights \(note: weights left out.*give weights=last\.pt"):
        replay.replay(tmp_path / "1")
    assert replay.replay(tmp_path / "1", weights="scratch") is None
    found = kept(tmp_path / "1", model, batch, max_bytes=1000)
    assert "images left out" in found.note
    assert set(np.load(tmp_path / "1" / "batch.npz")) == {"cls", "bboxes", "batch_idx"}
    assert sum(path.stat().st_size for path in (tmp_path / "1").glob("*.npz")) < 3000
    with pytest.raises(IncidentError, match=r"holds no images \(note: .*images left out"):
        replay.replay(tmp_path / "1", weights="scratch")


def test_a_disk_that_refuses_does_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    found = kept(tmp_path / "file" / "1", build(), make_batch())
    assert "not written" in found.note
    assert len(found.images) == 4
    (warning,) = caplog.messages
    assert warning == f"{tmp_path}/file/1: an incident was not kept in full ({found.note})"


def test_without_a_batch_the_rest_is_kept(tmp_path: Path) -> None:
    found = kept(tmp_path / "1", build())
    assert "not localised" in found.note
    assert read_incident(tmp_path / "1") == found
    assert (tmp_path / "1" / "weights.npz").exists()


# Images and labels


def one_label(**changes: Any) -> dict[str, Any]:
    """One image of 4 pixels with a sound label, and what is wrong with it."""
    arrays: dict[str, Any] = {
        "img": np.full((1, 3, 2, 2), 0.5, np.float32),
        "cls": np.array([[1.0]], np.float32),
        "bboxes": np.array([[0.5, 0.5, 0.4, 0.4]], np.float32),
        "batch_idx": np.array([0.0], np.float32),
        "keypoints": np.array([[[0.5, 0.5, 2.0], [0.9, 0.1, 1.0]]], np.float32),  # outside of the box is no fault
    }
    return arrays | {name: np.array(value, np.float32) for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bboxes": [[NAN, 0.5, 0.4, 0.4]]}, "box 0 is not finite"),
        ({"bboxes": [[0.5, 0.5, INF, 0.4]]}, "box 0 is not finite"),
        ({"bboxes": [[0.5, 0.5, 0.0, 0.4]]}, "box 0 has zero size"),
        ({"bboxes": [[0.5, 0.5, 0.4, -0.1]]}, "box 0 has negative size (0.4 x -0.1)"),
        ({"bboxes": [[0.5, 0.5, 30.0, 0.4]]}, "box 0 is larger than the image (30 x 0.4 of it)"),
        ({"bboxes": [[1.3, 0.5, 0.4, 0.4]]}, "box 0 lies outside the image"),
        ({"bboxes": [[0.5, -0.2, 0.4, 0.4]]}, "box 0 lies outside the image"),
        ({"cls": [[3.0]]}, "class 3 of 3"),
        ({"cls": [[-1.0]]}, "class -1 of 3"),
        ({"cls": [[0.5]]}, "class 0.5 of 3"),
        ({"cls": [[NAN]]}, "class nan of 3"),
        ({"keypoints": [[[0.5, NAN, 2.0]]]}, "key points of box 0 are not finite"),
        ({"keypoints": [[[1.5, 0.5, 2.0]]]}, "key point of box 0 off the map"),
    ],
)
def test_a_bad_label_is_named(changes: dict[str, Any], problem: str) -> None:
    (note,) = image_notes(one_label(**changes), paths=["a.jpg"], num_classes=3)
    assert (note.problems, note.bad_labels, note.bad_pixels) == ([problem], True, False)
    assert not labels_are_sound(one_label(**changes), num_classes=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bboxes": [[0.5, 0.5, 1.0005, 1.0]]},  # rounding of the converter
        {"bboxes": [[0.0, 0.5, 0.4, 0.4]]},  # cut by the border, which the host's own boxes are not, but may be
        {"bboxes": [[0.5, 0.5, 1.4, 0.2, 0.7]]},  # rotated, as long as the diagonal
        {"keypoints": [[[7.0, -3.0, 0.0]]]},  # not labelled
        {
            "cls": np.zeros((0, 1)),
            "bboxes": np.zeros((0, 4)),
            "batch_idx": np.zeros(0),
            "keypoints": np.zeros((0, 2, 3)),
        },
    ],
)
def test_a_sound_label_is_not_named(changes: dict[str, Any]) -> None:
    (note,) = image_notes(one_label(**changes), num_classes=3)
    assert (note.path, note.problems, note.bad_labels, note.bad_pixels) == ("?", [], False, False)
    assert labels_are_sound({name: torch.as_tensor(value) for name, value in one_label(**changes).items()})


@pytest.mark.parametrize("seed", range(50))
def test_the_quick_look_at_labels_says_what_the_long_one_says(seed: int) -> None:
    """Labels near every border, of three images, a few spoilt."""
    rng = np.random.default_rng(seed)
    number = 6
    arrays = {
        "img": np.zeros((3, 3, 2, 2), np.float32),
        "batch_idx": rng.integers(0, 3, number).astype(float),
        "cls": rng.integers(0, 3, (number, 1)).astype(float),
        "bboxes": np.hstack([rng.uniform(-0.2, 1.2, (number, 2)), rng.uniform(0.2, 1.0, (number, 2))]),
        "keypoints": np.dstack([rng.uniform(0, 1, (number, 2, 2)), rng.integers(0, 3, (number, 2, 1))]),
    }
    spoilt = ["bboxes", "keypoints", "cls"][seed % 3]
    where = tuple(rng.integers(0, size) for size in arrays[spoilt].shape)
    arrays[spoilt][where] = rng.choice([NAN, INF, -1.0, 0.0, 0.5, 1.0005, 1.002, 1.02, 3.0])
    notes = image_notes(arrays, num_classes=3)
    assert labels_are_sound(arrays, num_classes=3) == (not any(note.bad_labels for note in notes))


def test_bad_pixels_are_counted_and_their_range_given() -> None:
    image = np.full((1, 3, 2, 2), 0.5, np.float32)
    image[0, 0, 0, 0] = image[0, 1, 0, 0] = NAN  # one pixel, two channels
    image[0, 2, 1, 1] = -4.0
    (note,) = image_notes({"img": image})
    assert (note.nonfinite, note.min, note.max, note.bad_pixels) == (1, -4.0, 0.5, True)
    assert note.problems == ["1 pixel is not finite", "pixels from -4 to 0.5, normal is 0 to 1"]
    (empty,) = image_notes({"img": np.full((1, 3, 2, 2), np.inf, np.float32)})
    assert (empty.nonfinite, empty.min, empty.max) == (4, None, None)


def test_problems_are_bounded() -> None:
    number = 20
    arrays = one_label(bboxes=[[NAN] * 4] * number, cls=[[0.0]] * number, batch_idx=[0.0] * number)
    del arrays["keypoints"]
    (note,) = image_notes(arrays, num_classes=3)
    assert (len(note.problems), note.problems[-1]) == (9, "and 12 more")


def test_the_picture_shows_labels_and_bad_pixels(tmp_path: Path) -> None:
    batch = make_batch("pose")
    batch["img"][:] = 0
    batch["img"][3, :, 8:24, 8:24] = NAN
    batch["bboxes"][0] = torch.tensor([0.5, 0.5, 1e30, NAN])  # which is not drawn
    batch["bboxes"][1] = torch.tensor([0.5, 0.5, 1e30, 0.2])  # which is, as far as the tile goes
    kept(tmp_path / "1", build("pose"), batch)
    picture = cv2.imread(str(tmp_path / "1" / "batch.jpg"))
    assert picture is not None
    side = picture.shape[0] // 2
    assert picture.shape == (2 * side, 2 * side, 3)
    assert side == 320
    blue, green, red = picture[side * 3 // 2, side * 3 // 2].tolist()  # the middle of the last image
    assert (blue > 230, green < 25, red > 230) == (True, True, True)
    boxed = picture[side // 4 : side * 3 // 4, side + side // 4 : side * 2 - 4]  # the second image: its box and points
    assert (boxed.max(axis=2) > 150).any()


# Replaying


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("incidents") / "12"
    kept(folder, build(), make_batch(), total_norm=1.0, grads={})
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "12")


def spoil_keypoint(model: Any, batch: dict[str, Any]) -> None:
    batch["keypoints"][1, 0, 0] = NAN


@pytest.mark.parametrize(
    ("task", "spoil", "where"),
    [
        ("detect", spoil_pixel, "input"),
        ("detect", spoil_weight, "forward"),
        ("pose", spoil_keypoint, "loss"),
        ("pose", spoil_nothing, None),
    ],
)
def test_a_replay_finds_what_the_capture_found(tmp_path: Path, task: str, spoil: Any, where: str | None) -> None:
    model, batch = build(task), make_batch(task)
    for parameter in model.model[0].parameters():
        parameter.requires_grad_(False)
    spoil(model, batch)
    then = kept(tmp_path / "1", model, batch).first_bad
    seed()
    state, act = random_states(), model.model[0].act
    now = replay.replay(tmp_path / "1")
    assert now == then
    assert (then.where if then else None) == where
    assert random_states() == state
    assert model.model[0].default_act is act  # shared by every model of the process


def test_a_bad_box_that_the_loss_ignores_is_noted_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = DetectionModel(str(MODELS / "yolo26-tiny.yaml"), verbose=False)  # from a file, and with a scale
    model.args = get_cfg()
    batch = make_batch()
    batch["bboxes"][2, 2] = NAN
    then = kept(tmp_path / "1", model.train(), batch)
    assert then.first_bad is None
    assert model.loss(batch)[0].isfinite().all()
    assert [(image.problems, image.bad_labels) for image in then.images] == [
        ([], False), (["box 0 is not finite"], True), ([], False), ([], False)
    ]  # fmt: skip
    assert replay.replay(tmp_path / "1") is None


def test_what_the_losses_read_is_rebuilt(tmp_path: Path) -> None:
    model, batch = build(), make_batch()
    model.args = get_cfg(overrides={"cls": 20.0, "epochs": 7})
    model.class_weights = torch.tensor([1.0, 2.0, 3.0])
    model.model[1].bn.eval()
    model.model[0].conv.weight.requires_grad_(False)
    model.criterion = model.init_criterion()
    model.criterion.update()
    kept(tmp_path / "1", model, batch, autocast_dtype=torch.bfloat16, scale=8.0)
    spec = incident.read_json(tmp_path / "1" / "model.json", incident.ModelSpec)
    assert (spec.autocast, spec.scale) == ("bfloat16", 8.0)
    again = replay._build(spec, tmp_path, images=batch["img"].shape, labels=2)
    again.load_state_dict(model.state_dict())
    assert [m.training for m in again.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(again.loss(batch)[0], model.loss(batch)[0])


def test_fresh_weights_tell_the_batch_from_the_weights(tmp_path: Path) -> None:
    model = build()
    spoil_weight(model, {})
    kept(tmp_path / "1", model, make_batch())
    assert replay.replay(tmp_path / "1") is not None
    assert replay.replay(tmp_path / "1", weights="scratch") is None


def test_a_named_checkpoint_is_loaded(good: Path, tmp_path: Path) -> None:
    model = build()
    spoil_weight(model, {})
    torch.save({"model": model, "train_args": {}}, tmp_path / "last.pt")
    found = replay.replay(good, weights=tmp_path / "last.pt")
    assert found is not None
    assert found.module == "model.3.conv"
    torch.save({"model": build(nc=5), "train_args": {}}, tmp_path / "other.pt")
    with pytest.raises(IncidentError, match=r"other\.pt: not weights of the captured model \(.*size mismatch"):
        replay.replay(good, weights=tmp_path / "other.pt")
    with pytest.raises(IncidentError, match=r"none\.pt: no such file"):
        replay.replay(good, weights=tmp_path / "none.pt")


def test_the_command_asks_for_the_checkpoint_before_it_says_anything(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(good), "weights=none.pt"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "weights=none.pt: no such file; give a checkpoint (.pt), or scratch for fresh weights" in said.err


class Touch:
    """What a pickle would do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_bytes())
    (folder / name).write_text(json.dumps(content | changes))


def edit_yaml(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "model.json").read_bytes())
    edit_json(folder, "model.json", yaml=content["yaml"] | changes)


def edit_layer(folder: Path, *layer: Any) -> None:
    edit_yaml(folder, backbone=[list(layer)])


def edit_batch(folder: Path, **changes: Any) -> None:
    arrays = dict(np.load(folder / "batch.npz")) | changes
    np.savez(folder / "batch.npz", **arrays)


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def write_members(folder: Path, *members: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "batch.npz", "w") as archive:
        for name, data in members:
            archive.writestr(name, data)


def bomb(folder: Path) -> None:
    """Half a gigabyte of zeros, and a little more, in half a megabyte."""
    archive = zipfile.ZipFile(folder / "batch.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("img.npy", "w", force_zip64=True) as file:
        file.write(header((33 * 2**22,)))
        zeros = bytes(2**24)
        for _ in range(33):
            file.write(zeros)


def truncate(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def flip(folder: Path) -> None:
    """One bit of the weights."""
    weights = dict(np.load(folder / "weights.npz"))
    weights["model.0.conv.weight"].view(np.uint32).reshape(-1)[0] ^= 1
    np.savez(folder / "weights.npz", **weights)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda f: (f / "incident.json").unlink(), "no such file, so not an incident"),
    "not json": (lambda f: (f / "incident.json").write_text("hello"), "JSON is malformed"),
    "wrong type": (lambda f: edit_json(f, "incident.json", step="x"), r"Expected `int`, got `str` - at `\$.step`"),
    "wrong where": (lambda f: edit_json(f, "incident.json", first_bad={"where": "x"}), r"Invalid enum value 'x'"),
    "format": (lambda f: edit_json(f, "incident.json", format=7), "format 7, this version reads format 1"),
    "no format": (lambda f: (f / "incident.json").write_text("{}"), "missing required field `format`"),
    "deep": (lambda f: (f / "incident.json").write_text('{"format": 1, "x": ' + "[" * 10**5), "recursion"),
    "long": (lambda f: (f / "incident.json").write_bytes(b" " * (2**24 + 1)), "larger than 16 MB"),
    "no model": (lambda f: (f / "model.json").unlink(), r"holds no model\.json"),
    "model format": (lambda f: edit_json(f, "model.json", format=2), "format 2"),
    "unknown key": (lambda f: edit_json(f, "model.json", run="x"), "unknown field `run`"),
    "task": (lambda f: edit_json(f, "model.json", task="__init__"), "task must be one of detect"),
    "argument": (lambda f: edit_json(f, "model.json", args={"model": 1.0}), "args must be of box, cls"),
    "autocast": (lambda f: edit_json(f, "model.json", autocast="load"), "Invalid enum value 'load'"),
    "evaluating": (lambda f: edit_json(f, "model.json", evaluating=["x.y"]), "cannot build this model"),
    "class weights": (lambda f: edit_json(f, "model.json", class_weights=[1.0] * 5), "the batch cannot be run"),
    "yaml key": (lambda f: edit_yaml(f, text_model="x"), "yaml must be of nc, scales"),
    "classes": (lambda f: edit_yaml(f, nc=10**9), "yaml.nc must be a number up to 10000, got 1000000000"),
    "classes word": (lambda f: edit_yaml(f, nc="3"), "yaml.nc must be a number up to 10000, got '3'"),
    "activation": (
        lambda f: edit_yaml(f, activation=f"__import__('os').system('touch {f}/touched')"),
        "yaml.activation must be one of torch's",
    ),
    "activation tail": (
        lambda f: edit_yaml(f, activation=f"nn.ReLU(), __import__('os').system('touch {f}/touched')"),
        "yaml.activation must be one of torch's",
    ),
    "activation line": (lambda f: edit_yaml(f, activation="nn.ReLU()\n"), "yaml.activation must be one of torch's"),
    "scales": (lambda f: edit_yaml(f, scales={"n": [1e9, 1, 1]}), "yaml.scales.n must be depth, width"),
    "scale": (lambda f: edit_yaml(f, scales={"n": [1, 1, 1024]}, scale="x"), "yaml.scale must be one of the scales"),
    "key points": (lambda f: edit_yaml(f, kpt_shape=[10**9, 3]), "yaml.kpt_shape must be"),
    "end2end": (lambda f: edit_yaml(f, end2end="x"), "yaml.end2end must be true or false"),
    "backbone": (lambda f: edit_yaml(f, backbone="x"), "yaml.backbone must be a list of layers"),
    "layers": (lambda f: edit_yaml(f, backbone=[[-1, 1, "Conv", [8, 3, 1]]] * 1000), "must be 1 to 200 layers"),
    "layer": (lambda f: edit_yaml(f, backbone=[[-1, 1]]), "yaml layer 0 must be from, repeats, module, arguments"),
    "module": (lambda f: edit_layer(f, -1, 1, "torch_safe_load", ["x"]), "yaml layer 0 module must be of the host's"),
    "torch module": (lambda f: edit_layer(f, -1, 1, "nn.modules.os.system", ["x"]), "module must be of the host's"),
    "downloads": (lambda f: edit_layer(f, -1, 1, "TorchVision", [8, "x"]), "module must be of the host's"),
    "module list": (lambda f: edit_layer(f, -1, 1, ["Conv"], [8]), "module must be of the host's"),
    "word": (lambda f: edit_layer(f, -1, 1, "Conv", ["__import__('os')"]), "argument must be a number or a known word"),
    "huge": (lambda f: edit_layer(f, -1, 1, "Conv", [10**8, 3]), "argument must be a number or a known word"),
    "nested": (lambda f: edit_layer(f, -1, 1, "Conv", [[[8]]]), "argument must be a number or a known word"),
    "from": (lambda f: edit_layer(f, 5, 1, "Conv", [8]), "yaml layer 0 from must be layers before it"),
    "repeats": (lambda f: edit_layer(f, -1, 10**6, "Conv", [8]), "repeats must be 1 to 500"),
    "parameters": (
        lambda f: edit_yaml(f, backbone=[[-1, 1, "Conv", [8192, 3, 2]]] * 4),
        r"cannot build this model \([\d,]+ parameters, at most 134,217,728 can be replayed",
    ),
    "from none": (lambda f: edit_layer(f, -1, 1, "Conv", [8]), "yaml layer 1 from must be layers before it"),
    "padding": (
        lambda f: edit_yaml(f, backbone=[[-1, 1, "Conv", [64, 3, 1, 10_000]]] * 4),
        r"cannot build this model \(a rerun takes about [\d,]+ GB, this machine has [\d,]+ GB",
    ),
    "nonsense": (lambda f: edit_yaml(f, backbone=[[-1, 1, "Conv", []]] * 4), "the host cannot build this model"),
    "other model": (lambda f: edit_yaml(f, nc=7), r"weights.npz: .* of shape .*, the model's is float32 of shape"),
    "no weights": (lambda f: (f / "weights.npz").unlink(), "holds no weights"),
    "changed weights": (flip, r"these are not the weights that incident.json was written for \(sha256\)"),
    "missing weight": (lambda f: np.savez(f / "weights.npz", x=np.zeros(1)), "'x' is not one of the model's"),
    "no weight": (lambda f: np.savez(f / "weights.npz"), "lacks model.0.conv.weight"),
    "no batch": (lambda f: (f / "batch.npz").unlink(), "no such file"),
    "pipe": (lambda f: ((f / "batch.npz").unlink(), __import__("os").mkfifo(f / "batch.npz")), "no such file"),
    "pickle": (lambda f: (f / "batch.npz").write_bytes(pickle.dumps(Touch(f / "touched"))), "not a sound .npz file"),
    "objects": (
        lambda f: np.savez(f / "batch.npz", img=np.array([Touch(f / "touched")], dtype=object)),
        "'img' is of type 'object', which is not plain numbers",
    ),
    "structured": (lambda f: np.savez(f / "batch.npz", img=np.zeros(1, [("a", "O")])), "which is not plain numbers"),
    "big endian": (lambda f: edit_batch(f, cls=np.zeros((4, 1), ">f4")), "which is not plain numbers"),
    "truncated": (lambda f: truncate(f, "batch.npz"), "not a sound .npz file"),
    "elements": (
        lambda f: write_members(f, ("img.npy", header((10**6, 10**6, 1, 1), "|u1"))),
        r"'img' of shape \(1000000, 1000000, 1, 1\) takes 1,000,000,000,000 bytes, not what the file holds",
    ),
    "endless": (lambda f: write_members(f, ("img.npy", header((0, 10**30, 1, 1)))), "'img' has shape"),
    "negative": (lambda f: write_members(f, ("img.npy", header((-4, -1, 1, 1)) + bytes(16))), "'img' has shape"),
    "no header": (lambda f: write_members(f, ("img.npy", b"x" * 100)), "'img' has no sound array header"),
    "code header": (
        lambda f: write_members(f, ("img.npy", header((1,)).replace(b"False", b"f()  "))),
        "'img' has no sound array header",
    ),
    "bomb": (bomb, r"declares 553,648,\d+ bytes, at most 536,870,912 are kept"),
    "path": (
        lambda f: write_members(f, ("../../img.npy", header((1,)) + bytes(4))),
        r"'\.\./\.\./img' is not one of img",
    ),
    "member": (lambda f: write_members(f, ("run.py", b"x")), r"'run\.py' is not an array"),
    "bits": (lambda f: edit_batch(f, img=np.zeros((4, 3, 32, 32), np.float32)), "model.json says divided"),
    "dimensions": (lambda f: edit_batch(f, img=np.zeros((3, 32, 32), np.uint8)), "'img' has 3 dimensions"),
    "channels": (lambda f: edit_batch(f, img=np.zeros((4, 1, 32, 32), np.uint8)), "the model takes 3 channels"),
    "no images": (lambda f: edit_batch(f, img=np.zeros((0, 3, 32, 32), np.uint8)), "the model takes 3 channels"),
    "lengths": (lambda f: edit_batch(f, cls=np.zeros((2, 1), np.float32)), "labels of different number"),
    "owners": (lambda f: edit_batch(f, batch_idx=np.array([0.0, 0, 1, 9], np.float32)), "batch_idx must be from 0 to"),
    "class": (lambda f: edit_batch(f, cls=np.full((4, 1), 77, np.float32)), "the batch cannot be run"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_line(copy: Path, case: str) -> None:
    spoil, message = HOSTILE[case]
    spoil(copy)
    with pytest.raises(IncidentError, match=message) as caught:
        replay.replay(copy)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (copy / "touched").exists()


def test_the_traps_of_these_tests_would_spring(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()
    build(activation=f"__import__('os').system('touch {tmp_path}/run') or nn.ReLU()")
    assert (tmp_path / "run").exists()


def test_every_stock_architecture_can_be_replayed() -> None:
    from ultralytics.utils import ROOT, YAML

    for name in (
        "26/yolo26",
        "26/yolo26-pose",
        "11/yolo11",
        "v8/yolov8-pose",
        "v9/yolov9c",
        "v10/yolov10n",
        "v5/yolov5",
    ):
        architecture = YAML.load(ROOT / "cfg" / "models" / f"{name}.yaml")
        wanted = {key: value for key, value in architecture.items() if key in incident.YAML_KEYS}
        assert wanted.keys() == architecture.keys()
        replay._check_spec(incident.ModelSpec(task="detect", yaml=wanted), Path(name))


def test_the_memory_of_a_rerun_is_known_beforehand() -> None:
    def needed(model: dict[str, Any], images: tuple[int, ...], labels: int) -> int:
        with torch.device("meta"):
            layers, _ = parse_model(deepcopy(model), ch=3, verbose=False)
            hooks = [len(module._forward_hooks) for module in layers.modules()]
            found = replay._bytes(layers, images, labels)
        assert [len(module._forward_hooks) for module in layers.modules()] == hooks
        return found

    one = {"nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": []}
    # Two images of 32 x 32 to 8 channels of 16 x 16: kept after the convolution, after BatchNorm, after the activation.
    assert needed(one, (2, 3, 32, 32), 0) == 4 * 3 * 2 * 8 * 16 * 16
    whole = {**MODEL, "head": [HEADS["detect"]]}
    anchors = 8 * 8 + 4 * 4
    assert needed(whole, (2, 3, 32, 32), 7) - needed(whole, (2, 3, 32, 32), 0) == 4 * 8 * 2 * 7 * anchors


# The command


def test_the_command_says_then_and_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = build(), make_batch()
    spoil_weight(model, batch)
    batch["bboxes"][2] = torch.tensor([0.5, 0.5, 0.0, 0.4])
    batch["im_file"][1] = "a\x1b[2J.jpg"
    kept(tmp_path / "1", model, batch)
    assert cli.main(["replay", str(tmp_path / "1")]) == 0
    place = "forward, model.3.conv (Conv2d): not finite; largest value in"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Captured at step 12 (epoch 3, batch 40) of a detect run, nonfinite_gradient: loss 2, gradient norm not finite"
    )
    assert lines[1:3] == ["1 of 4 images with problems:", "  a?[2J.jpg: box 0 has zero size"]
    assert lines[3].startswith(f"Then: {place}")
    assert lines[4].startswith(f"Now: {place}")
    assert lines[5:] == ["That is the same place."]
    assert cli.main(["replay", str(tmp_path / "1"), "weights=scratch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:] == [
        "Now (weights=scratch): nowhere: everything is finite and nothing stands out", "That is another place."
    ]  # fmt: skip


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay"]) == 2
    assert "give an incident first" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"yolo-gradstab: {tmp_path}/incident.json: no such file, so not an incident; "
        "give a folder such as RUN/gradstab/incidents/12\n"
    )
    assert cli.main(["replay", str(tmp_path), "weight=x"]) == 2
    assert "the nearest valid key is weights" in capsys.readouterr().err


def test_structs_are_plain_json() -> None:
    found = FirstBad(where="loss", component="box_loss")
    assert msgspec.json.decode(msgspec.json.encode(found), type=FirstBad) == found
