"""The faults, as data: what is wrong, how it comes about, and what the first finding may call it.

Where a fault has two right names, a comment says why. Steps count from 0; an epoch has 8.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from faults.mechanisms import (
    ALWAYS,
    Amplifying,
    Detached,
    LengthOfMasked,
    LogOfNegative,
    LogOfProgress,
    OverDeviation,
    OverMaximum,
    OwnBackward,
    OwnHalf,
    OwnSoftplus,
    Poisoned,
    RootOfMasked,
    TimesLoss,
    Unused,
    ZeroGate,
    all_of,
    constant_image,
    dead_relu,
    deep_yaml,
    float_arrays,
    frozen_norm,
    giant_boxes,
    grown_weights,
    hooked_before,
    hooked_weight,
    hot_scores,
    in_precision,
    initialised,
    label_rows,
    log_after_erasing,
    nan_boxes,
    nan_keypoints,
    nan_pixels,
    no_rows,
    overexposed,
    own_loss,
    own_transform,
    pixel_keypoints,
    replaced,
    reset_bias,
    scaled,
    small_object_loss,
    spoilt_gradient,
    spoilt_weight,
    standardised,
    times,
    unscaled,
    with_a_hole,
    with_scaler,
    without_norm,
    without_visibility,
)
from faults.training import Case

__all__ = ["FAULTS"]

NAN, INF = math.nan, math.inf
OFF = {"guard.divergence": "off"}
STOP = {"guard.divergence": "stop"}
UNGUARDED = {"guard.divergence": "off", "guard.nonfinite": "off"}
NO_AUGMENTATION = {"mosaic": 0.0, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "translate": 0.0, "scale": 0.0}
LEARNING = {"lr0": 0.02, "mosaic": 0.0}  # quality after 200 steps
ONE = (4).__eq__  # of the images: the fifth
NO_WARMUP = {"warmup_epochs": 0.0}

IMAGES = [
    Case(name="a float array with a NaN hole", kinds=("bad_images",), trouble="nonfinite", args=NO_AUGMENTATION,
         files=float_arrays(with_a_hole(NAN), only=4)),
    Case(name="a float array with the no-data value -3.4e38", kinds=("bad_images",), trouble="nonfinite",
         args=NO_AUGMENTATION, files=float_arrays(with_a_hole(-3.4e38), only=4)),
    Case(name="all arrays in 16-bit counts", kinds=("bad_images",), args=NO_AUGMENTATION,
         files=float_arrays(lambda pixels: pixels * 257)),
    Case(name="an image of one colour, standardised", kinds=("bad_images",), task="pose", trouble="nonfinite",
         files=constant_image(4), augment=False, batch=standardised),
    Case(name="a logarithm after erasing to black", kinds=("bad_images",), trouble="nonfinite",
         batch=log_after_erasing(12)),
    Case(name="bytes not divided by 255", kinds=("bad_images",), batch=unscaled),
    Case(name="bytes not divided by 255, pose", kinds=("bad_images",), task="pose", batch=unscaled),
    Case(name="one image brightened a billion times", kinds=("bad_images",), config=OFF, batch=overexposed(20, 1e9)),
    Case(name="an own transform makes NaN pixels", kinds=("bad_images",), task="pose", trouble="nonfinite",
         dataset=own_transform(nan_pixels)),
    Case(name="NaN pixels without the guard", kinds=("bad_images",), trouble="nonfinite", config=UNGUARDED,
         dataset=own_transform(nan_pixels)),
]  # fmt: skip

LABELS = [
    Case(name="a box 3000 images wide in a pose label", kinds=("bad_labels",), task="pose", labels="yolo",
         augment=False, files=label_rows(times(1e4, 3, 4), which=ONE)),
    Case(name="an infinite box in a pose label", kinds=("bad_labels",), task="pose", labels="yolo", augment=False,
         files=label_rows(times(INF, 3), which=ONE)),
    # Boxes far outside match nothing: that is first seen by the components that stay 0.
    Case(name="all boxes of a pose set in pixels", kinds=("bad_labels", "dead_loss_component"), task="pose",
         labels="yolo", augment=False, files=label_rows(times(64, 1, 2, 3, 4))),
    Case(name="a box without width, and a loss that divides by sizes", kinds=("bad_labels",), trouble="nonfinite",
         labels="yolo", augment=False, model=small_object_loss, files=label_rows(times(0, 3), which=ONE)),
    # The host's assigner takes no notice of boxes that are this far off, so that nothing but the labels shows them.
    Case(name="boxes of a size in squared pixels", kinds=("bad_labels",), config=OFF,
         dataset=own_transform(giant_boxes)),
    Case(name="the same with the default guard", kinds=("bad_labels",),
         dataset=own_transform(giant_boxes, file=7, since=16)),
    Case(name="NaN sizes of boxes from an own transform", kinds=("bad_labels",), dataset=own_transform(nan_boxes)),
    Case(name="NaN key points from an own transform", kinds=("bad_labels",), task="pose", trouble="nonfinite",
         dataset=own_transform(nan_keypoints)),
    Case(name="NaN key points without the guard", kinds=("bad_labels",), task="pose", trouble="nonfinite",
         config=UNGUARDED, dataset=own_transform(nan_keypoints, file=9)),
    Case(name="key points in pixels from an own transform", kinds=("bad_labels",), task="pose",
         dataset=own_transform(pixel_keypoints)),
]  # fmt: skip

MODULES = [
    Case(name="NaN from an activation of the backbone, once", kinds=("module_fault",), trouble="nonfinite",
         model=replaced("model.4.cv2.act", lambda old, clock: Poisoned(old, clock, NAN, [20]))),
    Case(name="inf from an activation of the neck, from step 24 on", kinds=("module_fault",), trouble="nonfinite",
         model=replaced("model.16.cv1.act", lambda old, clock: Poisoned(old, clock, INF, range(24, 60)))),
    Case(name="NaN from the pose branch, without the guard", kinds=("module_fault",), task="pose",
         trouble="nonfinite", config=UNGUARDED,
         model=replaced("model.23.cv4.0.1.act", lambda old, clock: Poisoned(old, clock, NAN, [12]))),
    Case(name="a division by a maximum of 0", kinds=("module_fault",), trouble="nonfinite", config=STOP,
         model=replaced("model.9.cv2.act", OverMaximum)),
    Case(name="a deviation of a single pixel", kinds=("module_fault",), trouble="nonfinite", args={"imgsz": 32},
         model=replaced("model.10.cv2.act", OverDeviation)),
    Case(name="a logarithm of a negative value", kinds=("module_fault",), task="pose", trouble="nonfinite",
         config=STOP, model=replaced("model.6.cv1.act", LogOfNegative)),
    Case(name="a softplus that overflows", kinds=("module_fault",), trouble="nonfinite",
         model=replaced("model.2.cv2.act", OwnSoftplus)),
    Case(name="half precision by hand", kinds=("module_fault",), task="pose", trouble="nonfinite",
         model=replaced("model.13.cv2.act", OwnHalf)),
    Case(name="the root of masked values, backward", kinds=("module_fault",), trouble="nonfinite",
         model=replaced("model.5.act", RootOfMasked)),
    Case(name="the length of a zero vector, backward", kinds=("module_fault",), task="pose", trouble="nonfinite",
         config=STOP, model=replaced("model.7.act", LengthOfMasked)),
    Case(name="an own backward that divides by 0", kinds=("module_fault",), trouble="nonfinite",
         model=replaced("model.3.act", lambda old, clock: OwnBackward(old, clock, [17]))),
    Case(name="a division by 0 between modules", kinds=("module_fault",), trouble="nonfinite",
         model=hooked_before("model.5", range(18, 60))),
    # Boxes that far off match nothing any more: the loss falls rather than leaves, and the run has collapsed.
    Case(name="a gate in the box branch that runs away", kinds=("module_fault", "silent_collapse"),
         trouble="collapse", config=OFF,
         model=all_of(*(replaced(f"model.23.{branch}.{level}.2",
                                 lambda old, clock: Amplifying(old, clock, 1e4, range(20, 60)))
                        for branch in ("cv2", "one2one_cv2") for level in range(3)))),
]  # fmt: skip

INITS = [
    Case(name="one layer times 1e4", kinds=("bad_init",), model=scaled(1e4, "model.3.conv")),
    Case(name="one layer times 1e-4", kinds=("bad_init",), model=scaled(1e-4, "model.5.conv")),
    Case(name="one layer times 1e-4, guard off", kinds=("bad_init",), config=OFF, model=scaled(1e-4, "model.1.conv")),
    Case(name="several layers times 1e3", kinds=("bad_init",),
         model=scaled(1e3, "model.0.conv", "model.2.cv1", "model.4.cv2")),
    Case(name="class layers of the head times 1e4", kinds=("bad_init",), config=OFF,
         model=scaled(1e4, "model.23.cv3.0.2", "model.23.cv3.1.2", "model.23.cv3.2.2")),
    Case(name="box layers of the head times 1e4, pose", kinds=("bad_init",), task="pose",
         model=scaled(1e4, "model.23.cv2.0.2", "model.23.cv2.1.2")),
    Case(name="the backbone of a pose model times 1e-4", kinds=("bad_init",), task="pose",
         model=scaled(1e-4, *(f"model.{stage}." for stage in range(11)))),
    Case(name="normal weights of deviation 1 everywhere", kinds=("bad_init",), config=OFF,
         model=initialised(nn.init.normal_, "model.")),
    # All weights 0: nothing behind the first layer has a gradient, which is how it is seen if not at the start.
    Case(name="all weights 0", kinds=("bad_init", "dead_layer", "vanishing"), steps=72,
         model=initialised(nn.init.zeros_, "model.")),
]  # fmt: skip

COMPONENTS = [
    Case(name="box gain 0", kinds=("dead_loss_component",), args={"box": 0.0}),
    Case(name="class gain 0", kinds=("dead_loss_component",), args={"cls": 0.0}),
    Case(name="distance gain 0", kinds=("dead_loss_component",), args={"dfl": 0.0}),
    Case(name="key point gain 0", kinds=("dead_loss_component",), task="pose", args={"pose": 0.0}),
    Case(name="visibility gain 0", kinds=("dead_loss_component",), task="pose", args={"kobj": 0.0}),
    Case(name="flow gain 0", kinds=("dead_loss_component",), task="pose", args={"rle": 0.0}),
    Case(name="key points without visibility", kinds=("dead_loss_component",), task="pose", labels="yolo",
         files=without_visibility),
    Case(name="class gain times 1000", kinds=("loss_imbalance",), args={"cls": 500.0}),
    Case(name="box gain times 1000", kinds=("loss_imbalance",), args={"box": 7500.0}),
    Case(name="distance gain times 1000", kinds=("loss_imbalance",), args={"dfl": 1500.0}),
    Case(name="key point gain times 1000", kinds=("loss_imbalance",), task="pose", args={"pose": 12000.0}),
    Case(name="visibility gain times 1000", kinds=("loss_imbalance",), task="pose", args={"kobj": 1000.0}),
]  # fmt: skip

DEPTHS = [
    Case(name="a deep chain without normalisation, gain 8", kinds=("exploding",), steps=24, config=OFF,
         network=lambda folder: deep_yaml(folder, depth=4), model=without_norm(8.0)),
    Case(name="no normalisation, gain 8", kinds=("exploding",), steps=24, model=without_norm(8.0)),
    Case(name="no normalisation, gain 8, pose", kinds=("exploding",), task="pose", steps=24, config=STOP,
         model=without_norm(8.0)),
    Case(name="a deep chain of sigmoids", kinds=("vanishing",), steps=24,
         network=lambda folder: deep_yaml(folder, depth=3), model=without_norm(1.0, nn.Sigmoid)),
    Case(name="no normalisation, the usual weights", kinds=("vanishing",), steps=24, model=without_norm()),
    Case(name="no normalisation, the usual weights, pose", kinds=("vanishing",), task="pose", steps=24,
         model=without_norm()),
    Case(name="BatchNorm in evaluation from scratch", kinds=("vanishing",), steps=24,
         callbacks={"on_train_batch_start": frozen_norm}),
]  # fmt: skip

RATES = [
    Case(name="SGD 1.0", kinds=("lr_too_high",), steps=64, args={"lr0": 1.0}),
    Case(name="SGD 1.0 without a warm-up", kinds=("lr_too_high",), steps=64, args={"lr0": 1.0, **NO_WARMUP}),
    Case(name="SGD 1.0, guard off", kinds=("lr_too_high",), steps=80, config=OFF, args={"lr0": 1.0}),
    Case(name="SGD 1.0, pose", kinds=("lr_too_high",), task="pose", steps=64, args={"lr0": 1.0}),
    Case(name="SGD 1.0, pose, stopped", kinds=("lr_too_high",), task="pose", steps=64, config=STOP,
         args={"lr0": 1.0}),
    Case(name="SGD 0.3 without clipping", kinds=("lr_too_high",), steps=64, config={"clip": "none"} | STOP,
         args={"lr0": 0.3}),
    Case(name="SGD 0.1 without clipping, pose", kinds=("lr_too_high",), task="pose", steps=64,
         config={"clip": "none"} | OFF, args={"lr0": 0.1}),
    Case(name="AdamW 0.1", kinds=("lr_too_high",), steps=64, args={"optimizer": "AdamW", "lr0": 0.1}),
    Case(name="AdamW 1.0 without a warm-up", kinds=("lr_too_high",), steps=64, config=OFF,
         args={"optimizer": "AdamW", "lr0": 1.0, **NO_WARMUP}),
    Case(name="Adam 0.3, pose", kinds=("lr_too_high",), task="pose", steps=64, config=STOP,
         args={"optimizer": "Adam", "lr0": 0.3}),
    Case(name="MuSGD 1.0", kinds=("lr_too_high",), steps=64, args={"optimizer": "MuSGD", "lr0": 1.0}),
    Case(name="RMSprop 0.1", kinds=("lr_too_high",), steps=64, args={"optimizer": "RMSprop", "lr0": 0.1}),
    # Standardised images are not 0 to 1, and not at fault.
    Case(name="SGD 1.0 on standardised images", kinds=("lr_too_high",), steps=64, config=STOP, args={"lr0": 1.0},
         batch=standardised),
    Case(name="momentum 0.999", kinds=("lr_too_high",), steps=120, config=OFF,
         args={"lr0": 0.1, "momentum": 0.999}),
    Case(name="momentum 0.999 without a warm-up, pose", kinds=("lr_too_high",), task="pose", steps=80,
         args={"lr0": 0.1, "momentum": 0.999, **NO_WARMUP}),
    Case(name="SGD 0.5 on batches of 2, guard off", kinds=("lr_too_high",), steps=64, config=OFF,
         args={"lr0": 0.5, "batch": 2, "nbs": 2}),
    Case(name="SGD 1.0 with accumulation", kinds=("lr_too_high",), steps=128, config=STOP,
         args={"lr0": 1.0, "nbs": 16}),
]  # fmt: skip

GRADIENTS = [
    # A hook on a weight is a fault of its module as much as of the gradient.
    Case(name="a hook that gives NaN", kinds=("nonfinite_gradient", "module_fault"), trouble="nonfinite",
         model=hooked_weight("model.5.conv.weight", NAN, [20])),
    Case(name="a hook that gives inf, pose", kinds=("nonfinite_gradient", "module_fault"), task="pose",
         trouble="nonfinite", model=hooked_weight("model.13.cv1.conv.weight", INF, range(15, 18))),
    Case(name="a hook that gives 1e20", kinds=("nonfinite_gradient", "module_fault"), trouble="nonfinite",
         model=hooked_weight("model.8.cv1.conv.weight", 1e20, [13])),
    Case(name="NaN from gradient surgery", kinds=("nonfinite_gradient",), trouble="nonfinite",
         gradient=spoilt_gradient(NAN, [20])),
    Case(name="inf from gradient surgery, pose", kinds=("nonfinite_gradient",), task="pose", trouble="nonfinite",
         gradient=spoilt_gradient(INF, range(12, 16))),
    Case(name="1e20 from gradient surgery", kinds=("nonfinite_gradient",), trouble="nonfinite",
         gradient=spoilt_gradient(1e20, [9, 25])),
    Case(name="NaN from gradient surgery, the run stopped", kinds=("nonfinite_gradient",), trouble="nonfinite",
         config={"guard.nonfinite": "stop"}, gradient=spoilt_gradient(NAN, [20])),
    # With the guard off the gradient is applied, and both are there from then on.
    Case(name="NaN from gradient surgery without the guard", kinds=("nonfinite_gradient", "nonfinite_weights"),
         trouble="nonfinite", config=UNGUARDED, gradient=spoilt_gradient(NAN, [20])),
    Case(name="NaN written into a weight", kinds=("nonfinite_weights",), trouble="nonfinite",
         callbacks={"on_train_batch_start": spoilt_weight(NAN, 20)}),
    Case(name="inf written into a weight without the guard, pose", kinds=("nonfinite_weights",), task="pose",
         trouble="nonfinite", config=UNGUARDED, callbacks={"on_train_batch_start": spoilt_weight(INF, 20)}),
    Case(name="NaN written into the stem, the run stopped", kinds=("nonfinite_weights",), trouble="nonfinite",
         config=STOP, callbacks={"on_train_batch_start": spoilt_weight(NAN, 13, tensor=0)}),
]  # fmt: skip

LOSSES = [
    Case(name="a schedule in the loss that ends in log(0)", kinds=("nonfinite_loss",), trouble="nonfinite",
         model=own_loss(LogOfProgress(24))),
    Case(name="the same, pose, without the guard", kinds=("nonfinite_loss",), task="pose", trouble="nonfinite",
         config=UNGUARDED, model=own_loss(LogOfProgress(24))),
    Case(name="a loss weight that becomes inf", kinds=("nonfinite_loss",), trouble="nonfinite", config=STOP,
         model=own_loss(TimesLoss(INF, [16]))),
    Case(name="a loss weight that leaps to 1e4", kinds=("loss_blowup",), trouble="blowup",
         model=own_loss(TimesLoss(1e4, range(20, 60)))),
    Case(name="a loss weight that leaps to 1e3, pose", kinds=("loss_blowup",), task="pose", trouble="blowup",
         config=OFF, model=own_loss(TimesLoss(1e3, range(20, 60)))),
    Case(name="class scores times -1e4", kinds=("loss_blowup",), trouble="blowup", config=STOP,
         model=hot_scores(-1e4, range(20, 60))),
    # Scores start below 0: so far down, nothing is matched.
    Case(name="class scores times 1e4", kinds=("silent_collapse",), trouble="collapse", config=STOP,
         model=hot_scores(1e4, range(20, 60))),
    # Weights that leap are seen as a module that amplifies, as a loss that leaves, and as weights that have grown.
    Case(name="box weights of the head times 1e4", kinds=("loss_blowup", "module_fault", "silent_collapse"),
         trouble="blowup", config=OFF,
         callbacks={"on_train_batch_start": grown_weights(1e4, 20, "model.23.cv2.", "model.23.one2one_cv2.")}),
    Case(name="a loss weight that falls to 0", kinds=("silent_collapse",), steps=64, trouble="collapse",
         model=own_loss(TimesLoss(0.0, range(20, 100)))),
    Case(name="a loss weight that falls to 1e-5, pose", kinds=("silent_collapse",), task="pose", steps=64,
         trouble="collapse", config=OFF, model=own_loss(TimesLoss(1e-5, range(20, 100)))),
    Case(name="class biases set to -1e4", kinds=("silent_collapse",), steps=64, trouble="collapse", config=OFF,
         callbacks={"on_train_batch_start": reset_bias(-1e4, 20)}),
    Case(name="class biases set to -1e4, default guard", kinds=("silent_collapse",), task="pose", steps=64,
         trouble="collapse", callbacks={"on_train_batch_start": reset_bias(-1e4, 28)}),
]  # fmt: skip

LAYERS = [
    Case(name="no_grad left in a backbone block", kinds=("dead_layer",), steps=80,
         model=replaced("model.4.cv2.act", Detached)),
    Case(name="no_grad left in a neck block, pose", kinds=("dead_layer",), task="pose", steps=80,
         model=replaced("model.13.cv2.act", Detached)),
    Case(name="a branch behind a gate of 0", kinds=("dead_layer",), steps=80,
         model=replaced("model.6.cv2.act", lambda old, clock: ZeroGate(old, clock, 64))),
    Case(name="a branch that is never called", kinds=("dead_layer",), task="pose", steps=80,
         model=replaced("model.6.cv2.act", lambda old, clock: Unused(old, clock, 64))),
    Case(name="a dead ReLU", kinds=("dead_layer",), steps=80, model=dead_relu("model.17")),
    Case(name="lr0 1e-8", kinds=("stalled",), steps=120, args={"lr0": 1e-8, **NO_WARMUP}),
    Case(name="AdamW 1e-8, pose", kinds=("stalled",), task="pose", steps=120,
         args={"lr0": 1e-8, "optimizer": "AdamW", **NO_WARMUP}),
    Case(name="gradients clipped to 1e-6", kinds=("stalled",), steps=120, config={"clip.max_norm": 1e-6}),
    Case(name="updates bounded to 1e-7", kinds=("stalled",), steps=120, config={"update_clip": 1e-7}),
    # No boxes at all: the components that need them are 0, and nothing can be learned.
    Case(name="empty label files but one", kinds=("dead_loss_component", "stalled"), steps=120, labels="yolo",
         args=NO_AUGMENTATION, files=label_rows(no_rows)),
]  # fmt: skip

PRECISION = [
    # The module whose values half precision cannot hold is as right a name as the precision.
    Case(name="fp16 that overflows at every scale", kinds=("amp_overflow", "module_fault"), steps=48,
         model=replaced("model.3.act", lambda old, clock: Amplifying(old, clock, 1e6, ALWAYS)),
         callbacks={"on_train_start": in_precision(torch.float16, init_scale=65536.0)}),
    Case(name="fp16 that overflows at every other step", kinds=("amp_overflow",), steps=144,
         callbacks={"on_train_start": with_scaler(1024.0)}, gradient=spoilt_gradient(INF, range(1, 144, 2))),
    Case(name="fp16 whose scale falls below 1", kinds=("amp_overflow",), task="pose", steps=40,
         callbacks={"on_train_start": with_scaler(8.0)}, gradient=spoilt_gradient(INF, range(4, 30, 3))),
    Case(name="a scaler that looks for its scale", kinds=("amp_calibration",), steps=40,
         callbacks={"on_train_start": with_scaler(2.0**127)}),
    Case(name="a scaler that looks for its scale, pose", kinds=("amp_calibration",), task="pose", steps=40,
         callbacks={"on_train_start": with_scaler(2.0**127)}),
]  # fmt: skip

NORMAL = [
    Case(name="a hard batch, 6 times the loss", kinds=("loss_spike",), steps=64,
         model=own_loss(TimesLoss(6.0, [40]))),
    # A loss that passes ten times its start in a run that learns nothing is a collapse by definition; these learn.
    Case(name="a hard batch, 25 times the loss, pose", kinds=("loss_spike",), task="pose", steps=240, args=LEARNING,
         model=own_loss(TimesLoss(25.0, [44]))),
    Case(name="a hard batch, clipped", kinds=("loss_spike",), steps=240, args=LEARNING,
         config={"guard.spike": "clip"}, model=own_loss(TimesLoss(40.0, [40]))),
    Case(name="accumulation that sets in", kinds=("benign_jump",), steps=96, args={"nbs": 16, "warmup_epochs": 4.0}),
    Case(name="mosaic and mixup close", kinds=("benign_jump",), steps=240,
         args={"close_mosaic": 12, "lr0": 0.02, "mixup": 1.0}),
    Case(name="clipped at every step", kinds=("always_clipped",), steps=40, config={"clip.max_norm": 0.5}),
]  # fmt: skip

FAULTS: list[Case] = [
    *IMAGES, *LABELS, *MODULES, *INITS, *COMPONENTS, *DEPTHS, *RATES, *GRADIENTS, *LOSSES, *LAYERS, *PRECISION, *NORMAL
]  # fmt: skip
