"""The settings of a run: group, default, unit, range and help of each.

A setting is one field of `Config`. Its flag, parser, help, check of its range and the rule for
--resume all follow from that field.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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

# Larger values are of no use to anybody, and products of two of these are exact or finite.
_MOST_COUNTED = 10**9
_MOST_EPOCHS = 1e6
_HIGHEST = 1e30  # the optimizers compute in float32, whose range is about 1e-38 to 3e38

_EXCLUDED = ("none", "norms", "norms+biases")


def _setting(
    default: Any,
    text: str,
    *,
    unit: str = "",
    check: Callable[[Any], bool] | None = None,
    within: str = "",
    bounds: str = "",
    choices: Sequence[str] | None = None,
    fixed_on_resume: bool = True,
) -> Any:
    """A field of `Config`.

    Args:
        default: the value if neither a flag nor the recipe sets it.
        text: the help, without unit, bounds and default; with its own default if `default` is "".
        unit: what the value counts or names, such as "images".
        check: whether a value is in range.
        within: the range in words, for errors.
        bounds: the range for --help, without limits that no sensible value meets.
        choices: the allowed values, of which there are a few.
        fixed_on_resume: whether a resumed run must have the same value.
    """
    metadata = {
        "help": text,
        "unit": unit,
        "check": check,
        "within": within,
        "bounds": bounds,
        "choices": choices,
        "fixed_on_resume": fixed_on_resume,
    }
    return field(default=default, metadata=metadata)


def _number(
    default: float, text: str, *, unit: str = "", positive: bool = False, most: float = _HIGHEST
) -> Any:
    least = 1 / _HIGHEST if positive else 0
    return _setting(
        default,
        text,
        unit=unit,
        check=lambda x: least <= x <= most,
        within=f"from {least:g} to {most:g}",
        bounds="above 0" if positive else "0 or more",
    )


def _fraction(default: float, text: str) -> Any:
    return _setting(
        default,
        text,
        unit="fraction",
        check=lambda x: 0 <= x < 1,
        within="from 0 to below 1",
        bounds="0 to below 1",
    )


def _count(
    default: int,
    text: str,
    *,
    unit: str = "",
    least: int = 0,
    most: int = _MOST_COUNTED,
    or_zero: bool = False,
    fixed_on_resume: bool = True,
) -> Any:
    zero = "0, or " if or_zero else ""
    upper = f"to {most:,}" if most < _MOST_EPOCHS else "or more"
    return _setting(
        default,
        text,
        unit=unit,
        check=lambda x: least <= x <= most or (or_zero and x == 0),
        within=f"{zero}from {least} to {most:,}",
        bounds=f"{zero}{least} {upper}",
        fixed_on_resume=fixed_on_resume,
    )


@dataclass(frozen=True)
class Config:
    """All settings of a run. Flags come first, then the recipe, then the defaults below."""

    recipe: str = _setting(
        "lars",
        "optimizer, with the settings that its paper has for the batch size",
        choices=recipes.NAMES,
    )

    data: str = _setting(
        "digits",
        "folder with train/ and val/ (or test/), each with one folder of images per class; "
        "'digits': the handwritten digits that come with scikit-learn",
        unit="folder",
        fixed_on_resume=False,
    )
    image_size: int = _count(
        0,
        "side to which the images of a folder are brought; 0: their own if at most 64, else 224",
        unit="pixels",
        least=8,
        most=2**15,
        or_zero=True,
    )
    cache: str = _setting(
        "auto",
        "keep a folder's decoded images, of up to 64 pixels, on the device; 'auto': if they take "
        "at most a quarter of a GPU's free memory, or 2 GiB on the CPU",
        choices=("auto", "on", "off"),
        fixed_on_resume=False,
    )
    workers: int = _count(
        2,
        "processes that decode the images of a folder, for each training process; 0: it decodes "
        "them itself",
        unit="processes",
        most=1024,
        fixed_on_resume=False,
    )
    max_bad_images: int = _count(
        0,
        "unreadable images that each process skips before the run ends with an error",
        unit="images",
        fixed_on_resume=False,
    )

    model: str = _setting(
        "resnet50",
        "torchvision's ResNet of that depth; resnet20: He et al.'s for small images",
        choices=("resnet18", "resnet20", "resnet34", "resnet50", "resnet101", "resnet152"),
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
    bn_batch: int = _count(
        0,
        "ghost batch, over which batch norm takes its statistics (the papers' n); a value given "
        "here must divide a forward pass of a process; 0: the whole forward pass",
        unit="images",
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
    lr: float = _number(1.0, "peak learning rate", unit="rate", positive=True)
    schedule: str = _setting(
        "poly",
        "learning rate after the warm-up: 'poly' decay; 'step', a tenth at 1/3, 2/3 and 8/9 of the "
        "run; or 'slow-start', 1/2, 0.075, 0.01 and 0.001 of --lr from 0, 40/90, 70/90 and 85/90 "
        "of the run on",
        choices=("poly", "step", "slow-start"),
    )
    power: float = _number(2.0, "exponent of the 'poly' decay", most=1e3, positive=True)
    end_lr: float = _number(0.0, "learning rate at the end of the 'poly' decay", unit="rate")
    warmup_epochs: float = _number(
        0.0,
        "length of the linear warm-up, in which the rate grows with every step",
        unit="epochs",
        most=_MOST_EPOCHS,
    )
    warmup_from: float = _number(0.0, "learning rate at the first step of the warm-up", unit="rate")
    momentum: float = _fraction(0.9, "momentum of all recipes but lamb")
    weight_decay: float = _number(
        0.0, "weight decay of the parameters that --no-decay does not exclude"
    )
    no_decay: str = _setting("norms+biases", "parameters without weight decay", choices=_EXCLUDED)
    no_ratio: str = _setting("norms+biases", "parameters without trust ratio", choices=_EXCLUDED)
    trust_coefficient: float = _number(0.001, "trust coefficient of lars and mlperf", positive=True)
    bias_correction: bool = _setting(True, "bias correction of lamb's moments")
    max_grad_norm: float = _number(
        0.0, "norm to which lamb clips all gradients together; 0: no clipping"
    )
    lr_rmsprop: float = _number(
        3e-4, "learning rate of akiba's RMSprop phase", unit="rate", positive=True
    )
    rmsprop_center: float = _number(
        10.0,
        "time at which RMSprop and SGD share akiba's step evenly",
        unit="epochs",
        most=_MOST_EPOCHS,
    )
    rmsprop_period: float = _number(
        5.0,
        "length of akiba's transition from RMSprop to SGD",
        unit="epochs",
        most=_MOST_EPOCHS,
        positive=True,
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

    epochs: int = _count(
        1, "passes over the training images", unit="epochs", least=1, most=int(_MOST_EPOCHS)
    )
    batch_size: int = _count(
        1, "images per optimizer step, over all processes", unit="images", least=1
    )
    micro_batch: int = _count(
        0,
        "images per forward pass of a process, with gradients accumulated to --batch-size; 0: the "
        "process's whole share at once",
        unit="images",
    )
    max_steps: int = _count(
        0,
        "stop with a checkpoint after this step of the run; 0: train to the end",
        unit="steps",
        fixed_on_resume=False,
    )
    seed: int = _count(
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
        fixed_on_resume=False,
    )
    timeout: float = _setting(
        1800.0,  # enough for saving to a slow disk, and for the slowest reader at the start
        "time that a process waits for another one before it gives up",
        unit="seconds",
        check=lambda x: 1e-3 <= x <= 1e9,  # gloo counts milliseconds
        within="from 0.001 to 1e+09",
        bounds="0.001 or more",
        fixed_on_resume=False,
    )

    output: str = _setting(
        "",
        "run directory for checkpoints, logs and pictures (default: a new one under runs/)",
        unit="folder",
        fixed_on_resume=False,
    )
    log_every: int = _count(
        0, "steps between lines of the log; 0: a tenth of an epoch, at most 50", unit="steps"
    )
    tensorboard: bool = _setting(
        False, "also write TensorBoard's event files", fixed_on_resume=False
    )
    mllog: bool = _setting(False, "print MLPerf's :::MLLOG lines", fixed_on_resume=False)
    checkpoint_every: int = _count(
        0,
        "steps between checkpoints, in addition to those after each epoch; 0: none",
        unit="steps",
        fixed_on_resume=False,
    )
    keep_last: int = _count(
        1,
        "latest checkpoints to keep, in addition to the best one",
        unit="checkpoints",
        least=1,
        fixed_on_resume=False,
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            check(setting, getattr(self, setting.name))
        if self.overlap and self.precision == "fp16":
            # A scaler knows only after all gradients whether the step is to be taken.
            text = "--overlap does not go with --precision fp16: take bf16, or --no-overlap"
            raise TrainerError(text, everywhere=True)
        if self.compression != "none" and not self.overlap:
            text = (
                f"--compression {self.compression} needs --overlap: add it, or --compression none"
            )
            raise TrainerError(text, everywhere=True)

    def shaping(self) -> dict[str, Any]:
        """The settings that a resumed run must share, and where its images are.

        The path is absolute: the run may be resumed from another folder.
        """
        shared = {
            f.name: getattr(self, f.name) for f in fields(self) if f.metadata["fixed_on_resume"]
        }
        return shared | {"data": absolute_data(self.data)}


def recipe_of(config: Config) -> recipes.Recipe:
    """The recipe that a configuration starts from."""
    return recipes.look_up(config.recipe, config.data, config.batch_size)


def check(setting: Field[Any], value: Any) -> None:
    """Raise TrainerError unless `value` is in the setting's range."""
    meta = setting.metadata
    if meta["choices"] is not None and value not in meta["choices"]:
        text = f"{flag(setting.name)} must be one of {', '.join(meta['choices'])}, got {value}"
        raise TrainerError(text, everywhere=True)
    if meta["check"] is not None and not meta["check"](value):
        text = f"{flag(setting.name)} must be {meta['within']}, got {value}"
        raise TrainerError(text, everywhere=True)


def absolute_data(data: str) -> str:
    """--data with an absolute path, which holds in any working directory."""
    return data if data == "digits" else os.path.abspath(data)


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")
