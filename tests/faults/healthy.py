"""Healthy runs: none may have a finding that is an error. Rates are within what learns on the drawn set."""

from __future__ import annotations

import torch

from faults.mechanisms import in_precision, label_rows, no_rows, standardised, with_scaler
from faults.training import Case

__all__ = ["HEALTHY"]

LONG = {"mosaic": 0.0, "lr0": 0.02}

HEALTHY: list[Case] = [
    Case(name="defaults", steps=64),
    Case(name="defaults, pose", task="pose", steps=64),
    Case(name="another seed", steps=64, args={"seed": 1}),
    Case(name="another seed, pose", task="pose", steps=64, args={"seed": 2}),
    Case(name="a low rate", steps=64, args={"lr0": 0.001}),
    Case(name="no warm-up at a low rate", steps=64, args={"lr0": 0.001, "warmup_epochs": 0.0}),
    Case(name="no warm-up at a low rate, pose", task="pose", steps=64, args={"lr0": 0.001, "warmup_epochs": 0.0}),
    Case(name="the host's long warm-up", steps=64, args={"warmup_epochs": 3.0}),
    Case(name="AdamW", steps=64, args={"optimizer": "AdamW", "lr0": 0.002, "momentum": 0.9}),
    Case(name="AdamW, pose", task="pose", steps=64, args={"optimizer": "AdamW", "lr0": 0.001}),
    Case(name="MuSGD", steps=64, args={"optimizer": "MuSGD", "lr0": 0.01, "momentum": 0.9}),
    Case(name="MuSGD, pose", task="pose", steps=64, args={"optimizer": "MuSGD", "lr0": 0.005}),
    Case(name="accumulation", steps=96, args={"nbs": 16}),
    Case(name="accumulation, pose", task="pose", steps=96, args={"nbs": 12}),
    Case(name="the mosaic closes", steps=80, args={"close_mosaic": 4}),
    Case(name="no clipping", steps=64, config={"clip": "none"}, args={"lr0": 0.002}),
    Case(name="agc", steps=64, config={"clip": "agc"}),
    Case(name="autoclip", steps=64, config={"clip": "autoclip", "clip.window": 50}, args={"lr0": 0.002}),
    Case(name="zclip, pose", task="pose", steps=64, config={"clip": "zclip", "clip.max_norm": 10.0}),
    Case(name="tensor_ema", steps=64, config={"clip": "tensor_ema", "clip.warmup": 20}, args={"lr0": 0.002}),
    Case(name="stabilizer", steps=64, config={"clip": "stabilizer"}),
    Case(name="update_clip at a high rate", steps=96, config={"update_clip": 0.03}, args={"lr0": 0.1}),
    Case(name="update_clip, pose", task="pose", steps=96, config={"update_clip": 0.03}, args={"lr0": 0.03}),
    Case(name="update_clip without a clip", steps=96, config={"clip": "none", "update_clip": 0.03}),
    Case(name="spikes clipped", steps=64, config={"guard.spike": "clip"}),
    Case(name="spikes left out, pose", task="pose", steps=64, config={"guard.spike": "skip"}),
    Case(name="bf16", steps=64, callbacks={"on_train_start": in_precision(torch.bfloat16)}),
    Case(name="bf16, pose", task="pose", steps=64, callbacks={"on_train_start": in_precision(torch.bfloat16)}),
    Case(name="a gradient scaler", steps=64, callbacks={"on_train_start": with_scaler(1024.0)}),
    Case(name="a frozen backbone", steps=80, args={"freeze": 10}),
    Case(name="a frozen backbone, pose", task="pose", steps=80, args={"freeze": 10}),
    Case(name="resumed", steps=64, args={"val": True}, resume_after=4),
    Case(name="resumed, pose", task="pose", steps=64, resume_after=3),
    Case(name="fine-tuned", steps=64, args={"lr0": 0.005}, finetune=True),
    Case(name="class weights and a cosine", steps=64, args={"cls_pw": 0.5, "cos_lr": True}),
    Case(name="sparse records", steps=64, config={"telemetry": {"every": 3, "layers_every": 7}}),
    Case(name="standardised images", steps=64, batch=standardised),
    Case(name="objects in every fifth image", steps=96, labels="yolo", args={"mosaic": 0.0},
         files=label_rows(no_rows, which=lambda index: index % 5 > 0)),
    Case(name="objects in every tenth image, pose", task="pose", steps=96, labels="yolo", args={"mosaic": 0.0},
         files=label_rows(no_rows, which=lambda index: index % 10 > 0)),
    Case(name="long", steps=240, args=LONG),
    Case(name="long, pose", task="pose", steps=240, args=LONG),
    Case(name="long, larger images", steps=160, args={**LONG, "imgsz": 96, "seed": 3}),
]  # fmt: skip
