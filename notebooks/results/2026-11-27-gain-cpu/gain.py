"""Which weights make the backbone's gradients larger under BatchNorm: those in front of one, or those of the outputs?

    python notebooks/results/2026-11-27-gain-cpu/gain.py detect yolo26n.yaml datasets/sample_detect/data.yaml gain.json

One optimizer step of He's first weights, with all of them, those before a BatchNorm, or those of the outputs doubled.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.conv import Conv

from yolo_gradstab import read_run, trainer_for

DOUBLED = ("none", "normalised", "outputs", "all")
SEEDS = range(6)
CONFIG = {"mitigations.init": "kaiming_normal", "guard.divergence": "off"}
# As configs/sweeps/mitigations_depth.yaml
ARGUMENTS = {"epochs": 1, "fraction": 0.25, "imgsz": 96, "batch": 16, "nbs": 16, "optimizer": "SGD", "close_mosaic": 0}
ARGUMENTS |= {"val": False, "save": False, "plots": False, "workers": 0, "exist_ok": True}


def double_(model: nn.Module, which: str) -> None:
    """Double the weights of some of the convolutions."""
    normalised = {id(m.conv) for m in model.modules() if isinstance(m, Conv) and isinstance(m.bn, nn.BatchNorm2d)}
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for module in convolutions:
        if which == "all" or which == ("normalised" if id(module) in normalised else "outputs"):
            with torch.no_grad():
                module.weight.mul_(2)


def main() -> None:
    """Every seed with each part doubled."""
    task, model, data, out = sys.argv[1:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for which in DOUBLED:
                trainer = trainer_for(task, CONFIG)

                class Doubled(trainer):  # type: ignore[misc,valid-type]
                    which_weights = which

                    def _setup_train(self) -> None:
                        super()._setup_train()
                        double_(self.model, self.which_weights)

                given: dict[str, Any] = {"model": model, "data": data, "seed": seed, "project": folder}
                Doubled(overrides=ARGUMENTS | given | {"name": f"{which}_{seed}"}).train()
                run = read_run(Path(folder) / f"{which}_{seed}")
                stages = zip(run.layers["layer"], run.layers["grad_norm"], strict=True)
                norms = [norm for stage, norm in stages if int(stage.split(".")[1]) <= 10]
                rows.append({"seed": seed, "doubled": which, "norm": median(norms), "loss": run.steps["loss"][0]})
    Path(out).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
