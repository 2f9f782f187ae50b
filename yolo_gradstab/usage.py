"""What `yolo-gradstab help` says, and `yolo-gradstab COMMAND --help`."""

from __future__ import annotations

from collections.abc import Sequence

from yolo_gradstab.config import TASKS

__all__ = ["HELP", "help_of"]

HELP = """\
yolo-gradstab: Ultralytics YOLO training with gradients measured, clipped and recorded

  yolo-gradstab detect train data=... model=yolo26n.yaml lr0=0.01 clip=agc      every Ultralytics argument works
  yolo-gradstab pose   train data=... model=yolo26n-pose.yaml
  yolo-gradstab TASK   train ...                 also segment, obb, classify, semantic, depth; RT-DETR by its model
  yolo-gradstab demo [out=demo]                  sample data, detect and pose runs over learning rates, a report
  yolo-gradstab sweep SPEC.yaml [out=DIR] [retry=failed] [key=value ...]    run or continue a sweep, then its report
  yolo-gradstab lr-range task=detect data=... model=... optimizer=SGD    bracket the stable learning rates
                         [lr_min=1e-5] [lr_max=1] [steps=150] [out=runs/lr_range]
  yolo-gradstab report DIR [DIR ...] [out=DIR]   report.html, report.md, summary.json, trials.csv
  yolo-gradstab diagnose RUN [format=json]       what went wrong in a run, or in a checkpoint (.pt), in words
  yolo-gradstab replay INCIDENT [weights=FILE.pt|scratch]    rerun a captured batch and say where it first goes bad
  yolo-gradstab bench [format=json]              what a step costs, against stock and against how others log
  yolo-gradstab checks [format=json]             versions, devices, what works here
  yolo-gradstab data check   coco=FILE.json images=DIR [task=detect|pose|segment] [format=json]
  yolo-gradstab data convert coco=FILE.json images=DIR out=DIR [task=...]              YOLO labels
  yolo-gradstab data sample  out=DIR [task=detect|pose] [images=96] [size=160] [seed=0]    a drawn set

Our keys, beside Ultralytics' own (also from a file: gradstab=FILE.yaml, which keys on the line override):
  clip=none|norm|value|agc|autoclip|zclip|tensor_ema|stabilizer   clip.FIELD=...   default: norm 10, as stock
  update_clip=0.03   update_clip.follow_lr=true                   largest relative step of a tensor; default: off
  guard.nonfinite=skip|stop|off                                   a step with a NaN or inf gradient; default: skip
  guard.spike=off|clip|skip                                       a norm far above the run's own; default: off
  guard.divergence=rollback|stop|off   guard.backoff=0.5   guard.max_rollbacks=3    a run that has diverged; default:
                                                                  back to a good state, rates times the backoff
  telemetry.every=1   telemetry.layers_every=10                   in optimizer steps
  mitigations.normalization=batch|group|none   mitigations.residual=on|off   changes to the model before training;
  mitigations.activation=silu|relu|leaky_relu|sigmoid|tanh                   default: none, the model as it is
  mitigations.init=xavier_normal|xavier_uniform|kaiming_normal|kaiming_uniform|orthogonal|zero_residual
  mitigations.init.gain=1.0

Exit status: 0 done; 1 the work failed (an error, a run that was stopped or has diverged, a sweep with failed trials);
2 wrong use. `yolo-gradstab COMMAND --help` says more of a command.
"""

_TRAIN = """\
yolo-gradstab {task} train data=DATA.yaml model=MODEL [key=value ...]

Trains as `yolo {task} train` does, with the gradient measured, clipped and recorded. Every argument of Ultralytics
works; `yolo-gradstab help` lists ours. data is a YAML in Ultralytics' form, or one whose train and val are COCO JSON
files (detect, pose and segment).

  model=yolo26n.yaml         or a .pt file to start from
  clip=norm                  what is done to the gradient; clip.max_norm=10 and so on
  update_clip=0.03           bound each tensor's step relative to its weight
  gradstab=configs/safe.yaml our keys from a file; those on the line override it
  resume=RUN/weights/last.pt go on with a run exactly where its checkpoint was made

The run folder is Ultralytics'; our records are in its gradstab/. Then: `yolo-gradstab report RUN`, `... diagnose RUN`.
"""

_COMMANDS = {
    "demo": """\
yolo-gradstab demo [out=demo]

Draws data, trains detection and pose at three learning rates, each with and without update_clip, and reports: a few
minutes on two cores, nothing is downloaded.

  out=demo                   where data, runs and the report go
""",
    "sweep": """\
yolo-gradstab sweep SPEC.yaml [out=DIR] [retry=failed] [key=value ...]

Runs every trial of a grid of learning rates and settings, each in a process of its own, and reports. Started again it
goes on, also after kill -9, and repeats no trial that ended. configs/sweeps/ holds examples.

  out=DIR                    where the trials go; default: runs/sweeps/NAME OF THE SPEC
  retry=failed               run the failed ones again
  grid.lr0=[0.01,0.1]        any key of the spec, by its path: train.epochs=10, seeds=[0,1,2], jobs=2, executor=ray,
                             time_limit_s=600
""",
    "lr-range": """\
yolo-gradstab lr-range task=detect data=DATA.yaml model=MODEL [optimizer=SGD] [key=value ...]

Raises the learning rate at every step until training breaks, and prints where, a chart, and a grid to sweep. It
brackets the rates that are stable for some steps; a sweep tells which are for a whole run.

  task=detect                or another that is trained
  lr_min=1e-5 lr_max=1       from which rate to which
  steps=150                  optimizer steps on the way
  out=runs/lr_range          where lr_range.png and lr_range.json go

Every other key is training's: `yolo-gradstab detect train --help`.
""",
    "report": """\
yolo-gradstab report DIR [DIR ...] [out=DIR]

Compares runs and sweeps: report.html, report.md, summary.json, trials.csv. One run alone is shown with its findings.

  out=DIR                    where they go; default: the first folder given
""",
    "diagnose": """\
yolo-gradstab diagnose RUN [format=json]
yolo-gradstab diagnose RUN/weights/last.pt [format=json]

Says what went wrong in a run, from its records and captured batches, the root cause first, each finding with its
evidence and an advice; or which weights of a checkpoint were not finite when it was saved.

  format=text                or json
""",
    "replay": """\
yolo-gradstab replay RUN/gradstab/incidents/STEP [weights=FILE.pt|scratch]

Runs a captured batch again and says where it first goes bad. Nothing in the folder can execute code.

  weights=FILE.pt            with a checkpoint's weights in place of those captured, or scratch: newly drawn ones
""",
    "bench": """\
yolo-gradstab bench [model=yolo26n.yaml] [format=json] [key=value ...]

Times what a step costs, as ratios against stock's same part in the same run, on the GPU if there is one: the clip, the
optimizer's step, how others log, the guard, and whole training steps. Minutes.

  model=yolo26n.yaml         or a list, as the next three: [yolo26n.yaml,yolo26s.yaml]
  batch=16                   images of a whole training step
  optimizer=SGD              or AdamW, MuSGD
  precision=fp32             or bf16; fp16 on a GPU
  imgsz=160                  pixels
  rounds=60                  pairs of timings of each part
  blocks=10                  pairs of blocks of twenty whole training steps; 0: none of these
  format=text                or json
""",
    "checks": """\
yolo-gradstab checks [format=json]

Says what is installed, what of it was tested, and what works here. Status 1 where something is not as tested.

  format=text                or json
""",
    "data check": """\
yolo-gradstab data check coco=FILE.json images=DIR [task=detect] [format=json]

Reads a COCO file as training would, and says how many annotations are used, which are not and why, and what is wrong.
Status 1 where there are problems.

  coco=FILE.json             annotations
  images=DIR                 the folder of its images, or a list of folders
  task=detect                or pose, segment
  format=text                or json
""",
    "data convert": """\
yolo-gradstab data convert coco=FILE.json images=DIR out=DIR [task=detect]

Writes YOLO labels, DIR/<image stem>.txt. Training does not need them: a data YAML may name the COCO files.

  coco=FILE.json             annotations
  images=DIR                 the folder of its images, or a list of folders
  out=DIR                    where the label files go; other labels there are not overwritten
  task=detect                or pose, segment
""",
    "data sample": """\
yolo-gradstab data sample out=DIR [task=detect] [images=96] [size=160] [seed=0]

Draws a small COCO set with exact labels, in seconds: shapes to detect, or figures with COCO's 17 key points.

  out=DIR                    a new folder
  task=detect                or pose
  images=96                  a third of them for validation
  size=160                   pixels
  seed=0                     the same seed draws the same bytes
""",
}


def help_of(words: Sequence[str]) -> str:
    """The help of the command that these words begin with; of all where they begin with none."""
    if words[1:2] == ["train"] or words[0] in TASKS:
        return _TRAIN.format(task=words[0])
    if words[0] == "data" and " ".join(words[:2]) not in _COMMANDS:
        return "\n".join(text for name, text in _COMMANDS.items() if name.startswith("data "))
    return _COMMANDS.get(" ".join(words[:2]), _COMMANDS.get(words[0], HELP))
