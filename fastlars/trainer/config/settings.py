"""The settings of a run, field by field: their defaults, their ranges and their help."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from fastlars.trainer.config import recipes
from fastlars.trainer.errors import TrainerError

_EXCLUDED = ("none", "norms", "norms+biases")


def _setting(
    default: Any,
    text: str,
    check: Callable[[Any], bool] | None = None,
    within: str = "",
    *,
    choices: Sequence[str] | None = None,
    fixed_on_resume: bool = True,
) -> Any:
    """A field with its help, its range in code (`check`) and in words (`within`).

    `fixed_on_resume=False` marks what may differ when a run is resumed.
    """
    return field(
        default=default,
        metadata={
            "help": f"{text} ({within})" if within else text,
            "check": check,
            "within": within,
            "choices": choices,
            "fixed_on_resume": fixed_on_resume,
        },
    )


# Nobody needs larger values, and products of two of these are exact or finite.
_MOST_COUNTED = 10**9
_MOST_EPOCHS = 1e6
_HIGHEST = 1e30  # float32, which the optimizers compute in, ends at 3e38 and 1e-38


def _number(default: float, text: str, most: float = _HIGHEST) -> Any:
    return _setting(default, text, lambda x: 0 <= x <= most, f"from 0 to {most:g}")


def _positive(default: float, text: str, most: float = _HIGHEST) -> Any:
    least = 1 / _HIGHEST
    return _setting(default, text, lambda x: least <= x <= most, f"from {least:g} to {most:g}")


def _fraction(default: float, text: str) -> Any:
    return _setting(default, text, lambda x: 0 <= x < 1, "from 0 to below 1")


def _count(
    default: int,
    text: str,
    least: int = 0,
    most: int = _MOST_COUNTED,
    *,
    or_zero: bool = False,
    fixed_on_resume: bool = True,
) -> Any:
    return _setting(
        default,
        text,
        lambda x: least <= x <= most or (or_zero and x == 0),
        f"{'0, or ' if or_zero else ''}from {least} to {most:,}",
        fixed_on_resume=fixed_on_resume,
    )


def _one_of(
    default: str, text: str, choices: Sequence[str], *, fixed_on_resume: bool = True
) -> Any:
    return _setting(default, text, choices=choices, fixed_on_resume=fixed_on_resume)


def _switch(text: str, *, default: bool = False, fixed_on_resume: bool = True) -> Any:
    return _setting(default, text, fixed_on_resume=fixed_on_resume)


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run. Settings left out of the command line are the recipe's."""

    recipe: str = _one_of("lars", "optimizer and its settings", recipes.NAMES)

    data: str = _setting(
        "digits",
        "'digits' (handwritten digits inside scikit-learn) or a folder with train/ and val/ or "
        "test/, each with one folder of images a class",
        fixed_on_resume=False,
    )
    image_size: int = _count(
        0,
        "side in pixels that images of a folder are brought to; 0: their own if at most 64, "
        "else 224",
        8,
        2**15,
        or_zero=True,
    )
    cache: str = _one_of(
        "auto",
        "keep a folder's decoded images, of up to 64 pixels, on the device: 'auto' where they take "
        "at most a quarter of a GPU's free memory, or 2 GiB on the CPU",
        ("auto", "on", "off"),
        fixed_on_resume=False,
    )
    max_bad_images: int = _count(
        0,
        "images a process skips because they cannot be read, before it gives up",
        fixed_on_resume=False,
    )
    workers: int = _count(
        2,
        "processes that decode images of a folder; 0: in the training process",
        most=1024,
        fixed_on_resume=False,
    )

    model: str = _one_of(
        "resnet50",
        "torchvision's ResNet of that depth; resnet20: He et al.'s for small images",
        ("resnet18", "resnet20", "resnet34", "resnet50", "resnet101", "resnet152"),
    )
    stem: str = _one_of(
        "auto",
        "first layers: 'imagenet' (7x7, stride 2, pooling) or 'small' (3x3, stride 1, for images "
        "of up to 64 pixels); 'auto': what suits the data",
        ("auto", "imagenet", "small"),
    )
    classifier_std: float = _number(
        0.0, "deviation of the classifier's initial weights, its bias 0; 0: torchvision's", 1e3
    )
    bn_batch: int = _count(
        0,
        "images over which batch norm takes its statistics (the papers' n): a forward pass is cut "
        "into such ghost batches, which must fill it if the flag is given; 0: the whole forward "
        "pass of a process",
        2,
        or_zero=True,
    )
    bn_statistics: str = _one_of(
        "running",
        "of batch norm in evaluation: 'running' averages, or those of the 'last' step alone, "
        "averaged over processes and ghost batches",
        ("running", "last"),
    )

    epochs: int = _count(1, "passes over the training images", 1, int(_MOST_EPOCHS))
    batch_size: int = _count(1, "images per optimizer step, over all processes", 1)
    micro_batch: int = _count(
        0,
        "images per process and forward pass; gradients are accumulated to --batch-size; 0: a "
        "process's whole share at once",
    )
    lr: float = _positive(1.0, "peak learning rate")
    schedule: str = _one_of(
        "poly",
        "after the warm-up: 'poly' decay, a tenth at 1/3, 2/3 and 8/9 of the run ('step'), or "
        "'slow-start': 1/2, 0.075, 0.01 and 0.001 of --lr from 0, 40/90, 70/90 and 85/90 on",
        ("poly", "step", "slow-start"),
    )
    power: float = _positive(2.0, "power of 'poly'", 1e3)
    end_lr: float = _number(0.0, "where 'poly' ends")
    warmup_epochs: float = _number(0.0, "epochs of linear warm-up, counted in steps", _MOST_EPOCHS)
    warmup_from: float = _number(0.0, "learning rate at the first step of the warm-up")
    momentum: float = _fraction(0.9, "of all recipes but lamb")
    weight_decay: float = _number(0.0, "of the parameters that --no-decay leaves")
    no_decay: str = _one_of("norms+biases", "parameters without weight decay", _EXCLUDED)
    no_ratio: str = _one_of("norms+biases", "parameters without trust ratio", _EXCLUDED)
    trust_coefficient: float = _positive(0.001, "of lars and mlperf")
    bias_correction: bool = _switch("of lamb's moments", default=True)
    max_grad_norm: float = _number(0.0, "global clip of lamb's gradients; 0: none")
    lr_rmsprop: float = _positive(3e-4, "learning rate of akiba's RMSprop phase")
    rmsprop_center: float = _number(
        10.0, "epochs until RMSprop and SGD share the step evenly", _MOST_EPOCHS
    )
    rmsprop_period: float = _positive(
        5.0, "epochs in which akiba's transition takes place", _MOST_EPOCHS
    )
    rmsprop_transition: str = _one_of(
        "smooth", "akiba's transition: continuous, or as 'printed'", ("smooth", "printed")
    )
    label_smoothing: float = _fraction(0.0, "of the training loss")
    ema: float = _fraction(
        0.0, "decay of an exponential moving average of the weights, which is evaluated; 0: none"
    )
    seed: int = _count(0, "of weights, order of images and augmentation", most=2**63 - 1)

    precision: str = _one_of(
        "auto",
        "'bf16' or 'fp16' autocast (fp16 with a gradient scaler) or 'fp32'; 'auto': bf16 on a GPU "
        "that has it, fp32 on the CPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = _switch("run the model through torch.compile")
    overlap: bool = _switch(
        "step each bucket of gradients while backward goes on; acts with more than one process"
    )
    compression: str = _one_of(
        "none",
        "precision in which gradients travel between processes, if there are several; needs "
        "--overlap",
        ("none", "fp16", "bf16"),
    )
    device: str = _one_of("auto", "where to train", ("auto", "cpu", "cuda"), fixed_on_resume=False)

    output: str = _setting(
        "",
        "run directory for checkpoints, logs and pictures; default: a new one under runs/",
        fixed_on_resume=False,
    )
    log_every: int = _count(0, "steps between lines of the log; 0: a tenth of an epoch, at most 50")
    tensorboard: bool = _switch("write TensorBoard's event files too", fixed_on_resume=False)
    mllog: bool = _switch("print MLPerf's log lines (:::MLLOG)", fixed_on_resume=False)
    checkpoint_every: int = _count(
        0, "steps between checkpoints beside those after each epoch; 0: none", fixed_on_resume=False
    )
    keep_last: int = _count(
        1,
        "checkpoints to keep, the latest; the best one is kept beside them",
        1,
        fixed_on_resume=False,
    )
    timeout: float = _setting(
        1800.0,  # saving to a slow disk, or the slowest reader at the start
        "seconds that a process waits for another one before it gives up",
        lambda x: 1e-3 <= x <= 1e9,  # gloo counts milliseconds
        "from 0.001 to 1e+09",
        fixed_on_resume=False,
    )
    max_steps: int = _count(
        0,
        "stop with a checkpoint after so many steps of the run; 0: at its end",
        fixed_on_resume=False,
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            check(setting, getattr(self, setting.name))
        if self.overlap and self.precision == "fp16":
            # Whether a scaler lets a step happen is known only after all gradients.
            text = "--overlap does not go with --precision fp16: take bf16, or --no-overlap"
            raise TrainerError(text, everywhere=True)
        if self.compression != "none" and not self.overlap:
            text = (
                f"--compression {self.compression} needs --overlap: add it, or --compression none"
            )
            raise TrainerError(text, everywhere=True)

    def shaping(self) -> dict[str, Any]:
        """The settings that a resumed run must share, and where its images are.

        As an absolute path: the run may be resumed from another folder.
        """
        shared = {
            f.name: getattr(self, f.name) for f in fields(self) if f.metadata["fixed_on_resume"]
        }
        return shared | {"data": place(self.data)}


def check(setting: Field[Any], value: Any) -> None:
    """Raise TrainerError unless `value` lies in the setting's range."""
    meta = setting.metadata
    if meta["choices"] is not None and value not in meta["choices"]:
        text = f"{flag(setting.name)} must be one of {', '.join(meta['choices'])}, got {value}"
        raise TrainerError(text, everywhere=True)
    if meta["check"] is not None and not meta["check"](value):
        text = f"{flag(setting.name)} must be {meta['within']}, got {value}"
        raise TrainerError(text, everywhere=True)


def place(data: str) -> str:
    """--data for a process in any folder."""
    return data if data == "digits" else os.path.abspath(data)


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")
