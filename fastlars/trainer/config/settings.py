"""The settings of a run: group, default, unit, range and help of each.

A setting is one field of `Config`: its flag, parser, help and check of its range follow from that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from fastlars.trainer.config import recipes
from fastlars.trainer.errors import TrainerError

# The groups of --help: the first setting of each in the table below, and the title.
GROUPS = {
    "recipe": "config (recipe, kind of run)",
    "data": "data (images, and how they are read)",
    "model": "model (network, precision, optimizer, schedule)",
    "epochs": "run (length, batch, processes, device)",
    "output": "output (run directory, log, checkpoints)",
}

# All others are fixed when a run is started, and a flag of a resumed run may only repeat them.
_MAY_CHANGE_ON_RESUME = {
    "data", "cache", "workers", "max_bad_images", "max_steps", "device", "timeout", "output",
    "tensorboard", "mllog", "checkpoint_every", "keep_last",
}  # fmt: skip

# No sensible value is larger. Products of two such values stay exact (int) or finite (float).
_MOST_COUNTED = 10**9
_MOST_EPOCHS = 10**6
_HIGHEST = 1e30  # the optimizers compute in float32, whose range is about 1e-38 to 3e38
_ABOVE_ZERO = 1 / _HIGHEST

_EXCLUDED = ("none", "norms", "norms+biases")


def _setting(
    default: Any, text: str, unit: str = "", *, choices: Sequence[str] = (), **limits: Any
) -> Any:
    """A field of `Config`; a flag or the recipe may set another value than `default`.

    Args:
        text: the help, without unit, bounds and default; with its own default if `default` is "".
        unit: what the value counts or names, such as "images".
        limits: `bounds`, the range for --help, without limits that no sensible value meets;
            `violated`, the limit that a value violates, for errors, or "" if it is in range.
    """
    if choices:
        limits = {"violated": lambda x: "" if x in choices else f"one of {', '.join(choices)}"}
    about = {"help": text, "unit": unit, "choices": choices}
    anything = {"bounds": "", "violated": lambda _: ""}
    return field(default=default, metadata=about | anything | limits)


def _number(
    default: float,
    text: str,
    unit: str = "",
    *,
    least: float = 0,
    most: float = 0,
    or_zero: bool = False,
) -> Any:
    """A whole number if its default is one; `most` is by default the most that makes sense."""
    whole = isinstance(default, int)
    most = most or (_MOST_EPOCHS if unit == "epochs" else _MOST_COUNTED if whole else _HIGHEST)
    bounds = f"from {least} to {most:,}" if whole and most < _MOST_EPOCHS else f"{least:g} or more"
    if or_zero:
        bounds = f"0, or {bounds}"
    elif least == _ABOVE_ZERO:
        bounds = "above 0"

    def violated(x: float) -> str:
        if x > most:
            return f"at most {most:,}" if whole else f"at most {most:g}"
        if 0 < x < least and not or_zero:
            return f"at least {least:g}"
        return "" if x >= least or (or_zero and x == 0) else bounds

    return _setting(default, text, unit, bounds=bounds, violated=violated)


def _fraction(default: float, text: str) -> Any:
    bounds = "from 0 to below 1"
    return _setting(
        default, text, "fraction", bounds=bounds, violated=lambda x: "" if 0 <= x < 1 else bounds
    )


@dataclass(frozen=True)
class Config:
    """All settings of a run. Flags come first, then the recipe, then the defaults below."""

    recipe: str = _setting(
        "lars",
        "optimizer, with the settings that its paper has for the batch size, or with rates for "
        "small images",
        choices=recipes.NAMES,
    )

    data: str = _setting(
        "digits",
        "folder with train/ and val/ (or test/), each with one folder of images per class; "
        "'digits': the handwritten digits that come with scikit-learn",
        "folder",
    )
    image_size: int = _number(
        0,
        "side to which the images of a folder are resized; 0: their own if at most 64, else 224",
        "pixels",
        least=8,
        most=2**15,
        or_zero=True,
    )
    cache: str = _setting(
        "auto",
        "keep a folder's decoded images, of up to 64 pixels, on the device; 'auto': if they take "
        "at most a quarter of a GPU's free memory, or 2 GiB on the CPU",
        choices=("auto", "on", "off"),
    )
    workers: int = _number(
        2,
        "processes that decode the images of a folder, for each training process; 0: it decodes "
        "them itself",
        "processes",
        most=1024,
    )
    max_bad_images: int = _number(
        0, "unreadable images that each process skips before the run ends with an error", "images"
    )

    model: str = _setting(
        "resnet50",
        "torchvision's ResNet of that depth; resnet20: He et al.'s for small images; resnet8: "
        "the same with one block a stage",
        choices=(
            "resnet8",
            "resnet18",
            "resnet20",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
        ),
    )
    stem: str = _setting(
        "auto",
        "first layers: 'imagenet' (7x7, stride 2, pooling) or 'small' (3x3, stride 1, for images "
        "of up to 64 pixels); 'auto': what suits the data",
        choices=("auto", "imagenet", "small"),
    )
    classifier_std: float = _number(
        0.0,
        "standard deviation of the classifier's initial weights, with biases of 0; 0: "
        "torchvision's initialisation",
        most=1e3,
    )
    bn_batch: int = _number(
        0,
        "ghost batch, over which batch norm takes its statistics (the papers' n); a value given "
        "here must divide a forward pass of a process; 0: the whole forward pass",
        "images",
        least=2,
        or_zero=True,
    )
    bn_statistics: str = _setting(
        "running",
        "statistics of batch norm in evaluation: 'running' averages, or those of the 'last' step, "
        "averaged over processes and ghost batches",
        choices=("running", "last"),
    )
    precision: str = _setting(
        "auto",
        "autocast to 'bf16' or 'fp16' (with a gradient scaler), or 'fp32'; 'auto': bf16 on a GPU "
        "that has it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = _setting(False, "run the model through torch.compile")
    lr: float = _number(1.0, "peak learning rate", "rate", least=_ABOVE_ZERO)
    schedule: str = _setting(
        "poly",
        "learning rate after the warm-up: 'poly' decay; 'step', a tenth at 1/3, 2/3 and 8/9 of the "
        "run; or 'slow-start', 1/2, 0.075, 0.01 and 0.001 of --lr from 0, 40/90, 70/90 and 85/90 "
        "of the run on",
        choices=("poly", "step", "slow-start"),
    )
    power: float = _number(2.0, "exponent of the 'poly' decay", most=1e3, least=_ABOVE_ZERO)
    end_lr: float = _number(0.0, "learning rate at the end of the 'poly' decay", "rate")
    warmup_epochs: float = _number(
        0.0, "length of the linear warm-up, in which the rate grows with every step", "epochs"
    )
    warmup_from: float = _number(0.0, "learning rate at the first step of the warm-up", "rate")
    momentum: float = _fraction(0.9, "momentum of all recipes but lamb")
    weight_decay: float = _number(
        0.0, "weight decay of the parameters that --no-decay does not exclude"
    )
    no_decay: str = _setting("norms+biases", "parameters without weight decay", choices=_EXCLUDED)
    no_ratio: str = _setting("norms+biases", "parameters without trust ratio", choices=_EXCLUDED)
    trust_coefficient: float = _number(
        0.001, "trust coefficient of lars and mlperf", least=_ABOVE_ZERO
    )
    bias_correction: bool = _setting(True, "bias correction of lamb's moments")
    max_grad_norm: float = _number(
        0.0, "norm to which lamb clips all gradients together; 0: no clipping"
    )
    lr_rmsprop: float = _number(
        3e-4, "learning rate of akiba's RMSprop phase", "rate", least=_ABOVE_ZERO
    )
    rmsprop_center: float = _number(
        10.0, "time at which RMSprop and SGD share akiba's step evenly", "epochs"
    )
    rmsprop_period: float = _number(
        5.0, "length of akiba's transition from RMSprop to SGD", "epochs", least=_ABOVE_ZERO
    )
    rmsprop_transition: str = _setting(
        "smooth",
        "shape of akiba's transition: continuous, or as 'printed' in the paper",
        choices=("smooth", "printed"),
    )
    label_smoothing: float = _fraction(0.0, "label smoothing of the training loss")
    ema: float = _fraction(
        0.0,
        "decay of an exponential moving average of the weights, which is evaluated in their "
        "place; 0: none",
    )

    epochs: int = _number(1, "passes over the training images", "epochs", least=1)
    batch_size: int = _number(1, "images per optimizer step, over all processes", "images", least=1)
    micro_batch: int = _number(
        0,
        "images per forward pass of a process, with gradients accumulated to --batch-size; 0: the "
        "process's whole share at once",
        "images",
    )
    max_steps: int = _number(
        0, "stop with a checkpoint after this step of the run; 0: train to the end", "steps"
    )
    seed: int = _number(
        0, "random seed of weights, order of images and augmentation", most=2**63 - 1
    )
    overlap: bool = _setting(
        False,
        "with several processes, step each bucket of gradients while backward computes the next",
    )
    compression: str = _setting(
        "none",
        "precision in which gradients travel between several processes; needs --overlap",
        choices=("none", "fp16", "bf16"),
    )
    device: str = _setting(
        "auto",
        "where to train; 'auto': on a GPU if PyTorch sees one, else on the CPU",
        choices=("auto", "cpu", "cuda"),
    )
    timeout: float = _number(
        1800.0,  # enough for saving to a slow disk, and for the slowest reader at the start
        "time that a process waits for another one before it gives up",
        "seconds",
        least=1e-3,  # gloo counts milliseconds
        most=1e9,
    )

    output: str = _setting(
        "",
        "run directory for checkpoints, logs and pictures (default: a new one under runs/)",
        "folder",
    )
    log_every: int = _number(
        0, "steps between lines of the log; 0: a tenth of an epoch, at most 50", "steps"
    )
    tensorboard: bool = _setting(False, "also write TensorBoard's event files")
    mllog: bool = _setting(False, "print MLPerf's :::MLLOG lines")
    checkpoint_every: int = _number(
        0, "steps between checkpoints, in addition to those after each epoch; 0: none", "steps"
    )
    keep_last: int = _number(
        1, "latest checkpoints to keep, in addition to the best one", "checkpoints", least=1
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            check(setting, getattr(self, setting.name))
        wrong = ""
        if self.overlap and self.precision == "fp16":
            # A scaler knows only after all gradients whether the step is to be taken.
            wrong = "--overlap does not go with --precision fp16: take bf16, or --no-overlap"
        elif self.compression != "none" and not self.overlap:
            wrong = f"--compression {self.compression} needs --overlap: give both or neither"
        if wrong:
            raise TrainerError(wrong, everywhere=True)

    def shaping(self) -> dict[str, Any]:
        """The settings that a resumed run must share, and where its images are.

        The path is absolute: the run may be resumed from another folder.
        """
        names = [f.name for f in fields(self) if fixed_on_resume(f.name)]
        return {name: getattr(self, name) for name in names} | {"data": absolute_data(self.data)}


def fixed_on_resume(name: str) -> bool:
    """Whether a resumed run must have the value that the run was started with."""
    return name not in _MAY_CHANGE_ON_RESUME


def check(setting: Field[Any], value: Any) -> None:
    """Raise TrainerError unless `value` is in the setting's range."""
    limit = setting.metadata["violated"](value)
    if limit:
        raise TrainerError(f"{flag(setting.name)} must be {limit}, got {value}", everywhere=True)


def absolute_data(data: str) -> str:
    """--data with an absolute path, which holds in any working directory."""
    return data if data == "digits" else os.path.abspath(data)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
