"""The recipes: what each sets at a global batch size, and where that is published.

The papers' settings are for ImageNet; the digits, and folders of small images, have other rates.

A flag overrides any of these settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Settings by name, and one line that names the paper, table and rule they come from."""

    settings: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Row:
    """One row of a published table: the settings for ResNet-50 on ImageNet at one batch size.

    `epochs` is the length of the schedule, warm-up included. `bn_batch` is the number of images
    per batch norm statistic, 0 if the source does not say. `source` is followed by " at 8,192".
    """

    batch: int
    lr: float
    warmup_epochs: float
    epochs: int
    momentum: float
    weight_decay: float
    bn_batch: int
    source: str


# The rates in table 4 of the paper itself belong to another trust coefficient. These are for
# 0.001, and reproduce the paper's accuracies.
LARS = tuple(
    Row(batch, lr, 5.0, 90, 0.9, 1e-4, 0, "torchlars' reproduction of table 4 of You et al. 2017")
    for batch, lr in ((8192, 12.8), (16384, 25.0), (32768, 29.0))
)

_POINT = "MLPerf's reference convergence point"

# mlcommons/logging, rcps_resnet.json: release 4.0.0, and 1.0.0 for the point at 2,048. Its
# decay_steps covers the whole schedule in some rows, and only the part after the warm-up in others
# (1,632, 2,048, 8,192, 65,536, 67,840). `epochs` here is the reading under which the run is long
# enough for the epochs to convergence that the same file lists. The file's weight decay of 2e-3 at
# 2,048 is 2e-4 in the README of the same submission.
MLPERF = (
    Row(1632, 7.4, 2.0, 37, 0.9, 5e-5, 204, f"{_POINT} by NVIDIA"),
    Row(2048, 8.5, 5.0, 41, 0.9, 2e-4, 64, f"{_POINT} by Google"),
    Row(3264, 10.5, 2.0, 37, 0.9, 5e-5, 204, f"{_POINT} by NVIDIA"),
    Row(4096, 10.0, 5.0, 42, 0.9, 2e-4, 64, f"{_POINT} by Google"),
    Row(8192, 17.0, 5.0, 44, 0.9, 2e-4, 64, f"{_POINT} by Google"),
    Row(13056, 12.8, 9.0, 48, 0.9, 2.5e-5, 204, f"{_POINT} by NVIDIA"),
    Row(32768, 21.2, 16.0, 58, 0.94, 2.5e-5, 128, f"{_POINT} by Google"),
    Row(49152, 19.405, 24.0, 71, 0.951807, 1e-4, 256, f"{_POINT} by NVIDIA"),
    Row(58880, 23.246, 29.0, 82, 0.951807, 1e-4, 230, f"{_POINT} by NVIDIA"),
    Row(65536, 24.699, 31.0, 89, 0.951807, 1e-4, 128, f"{_POINT} by Google"),
    Row(67840, 24.699, 31.0, 91, 0.951807, 1e-4, 424, f"{_POINT} by NVIDIA"),
)

# The default of the reference code. It is not a convergence point (none was recorded for it, and
# its schedule is longer), so no interpolation starts or ends here.
MLPERF_DEFAULT = Row(16384, 25.0, 5.0, 90, 0.9, 2e-4, 0, "default of MLPerf's reference code")

_PLAIN = {
    "epochs": 90,
    "schedule": "poly",
    "power": 2.0,
    "end_lr": 0.0,
    "warmup_epochs": 5.0,
    "warmup_from": 0.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "no_decay": "norms+biases",
    "no_ratio": "norms+biases",
    "trust_coefficient": 0.001,
    "label_smoothing": 0.0,
    "bn_batch": 0,
    "bn_statistics": "running",
    "classifier_std": 0.0,
    "overlap": False,
    "compression": "none",
}
_GOYAL = _PLAIN | {
    "schedule": "step",
    "warmup_from": 0.1,
    "no_decay": "norms",
    "no_ratio": "none",
    "bn_batch": 32,
    "classifier_std": 0.01,
}
_AKIBA = _GOYAL | {
    "schedule": "slow-start",
    "warmup_epochs": 0.0,
    "warmup_from": 0.0,
    "lr_rmsprop": 3e-4,
    "rmsprop_center": 10.0,
    "rmsprop_period": 5.0,
    "rmsprop_transition": "smooth",
    "bn_statistics": "last",
    "overlap": True,
    "compression": "fp16",
}
_LARS = _PLAIN | {"no_decay": "none", "no_ratio": "none"}
_LAMB = _PLAIN | {
    "power": 1.0,
    "weight_decay": 1.5,
    "no_decay": "norms",
    "no_ratio": "norms",
    "bias_correction": False,
    "max_grad_norm": 1.0,
    "label_smoothing": 0.1,
}
_MLPERF = _PLAIN | {"end_lr": 1e-4, "label_smoothing": 0.1}


def _linear(common: dict[str, Any], source: str, batch: int) -> Recipe:
    return Recipe(common | {"lr": 0.1 * batch / 256}, f"{source} lr 0.1 x batch/256")


def _lamb(batch: int) -> Recipe:
    share = batch / 32768
    settings = {"lr": 0.04 * math.sqrt(share), "warmup_epochs": 20 * share}
    where = "" if 512 <= batch <= 32768 else ", continued beyond its 512 to 32,768"
    source = (
        "You et al. 2019 (arXiv:1904.00962), table 5: lr by the square root of the batch, warm-up "
        f"in proportion to it{where}; decay and clip of the authors' code at 32,768"
    )
    return Recipe(_LAMB | settings, source)


def _from_table(
    rows: tuple[Row, ...], common: dict[str, Any], batch: int, *, power: bool = False
) -> Recipe:
    """The settings of a row; between two rows, or beyond the table, those that follow from it.

    Between two rows, lr follows a straight line in the batch, or with `power` a power of it.
    """
    below = [row for row in rows if row.batch <= batch]
    row, above = below[-1] if below else rows[0], rows[len(below) :]
    names = ("lr", "warmup_epochs", "epochs", "momentum", "weight_decay", "bn_batch")
    settings = common | {name: getattr(row, name) for name in names}
    source = f"{row.source} at {row.batch:,}"
    if not below:
        settings["lr"] = row.lr * batch / row.batch
        source += f", its rate scaled linearly down to {batch:,}"
    elif batch > row.batch and not above:
        source += ", the last row of the table"
    elif batch > row.batch:
        end = above[0]
        share = (batch - row.batch) / (end.batch - row.batch)
        for name in ("lr", "warmup_epochs", "epochs"):
            settings[name] += (getattr(end, name) - settings[name]) * share
        settings["epochs"] = round(settings["epochs"])
        what = "lr, warm-up and epochs"
        if power:
            growth = math.log(batch / row.batch) / math.log(end.batch / row.batch)
            settings["lr"] = row.lr * (end.lr / row.lr) ** growth
            what = "lr, as a power of the batch,"
        source += f"; {what} interpolated towards the point at {end.batch:,}"
    return Recipe(settings, source)


def _mlperf(batch: int) -> Recipe:
    rows = (MLPERF_DEFAULT,) if batch == MLPERF_DEFAULT.batch else MLPERF
    return _from_table(rows, _MLPERF, batch)


# The digits are 1,437 images: at batch 128 an epoch has 11 steps, so about 150 steps have to do
# what takes thousands in the papers. lars and mlperf: a trust coefficient of 5 times the papers'
# 0.001, so that layers move far enough. lr stays 1, because biases and norms, which have no trust
# ratio, spoil the training at 5. goyal and akiba: 4 times the papers' rate, at which 154 steps
# would be too few.
_SHORT = {"epochs": 14, "warmup_epochs": 2.0, "end_lr": 0.0, "label_smoothing": 0.0}
_SOON = {"warmup_epochs": 0.0, "rmsprop_center": 2.0, "rmsprop_period": 1.0}
# The rate at batch 128, the power of the batch that it grows with, and all other settings.
_DIGITS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "lars": (1.0, 0.5, _PLAIN | _SHORT | {"trust_coefficient": 0.005}),
    "lamb": (0.01, 0.5, _LAMB | _SHORT | {"weight_decay": 0.01}),
    "goyal": (0.2, 1.0, _GOYAL | _SHORT),
    "akiba": (0.2, 1.0, _AKIBA | _SHORT | _SOON),
    "mlperf": (1.0, 0.5, _MLPERF | _SHORT | {"trust_coefficient": 0.005}),
}


# Images of up to 64 pixels: the rate at batch 512, the power of the batch that it grows with, and
# other settings. docs/large-batches.md searched for these rates, with the settings named here; the
# papers' rates, for ImageNet, hardly train such images. mlperf has the rates of lars, whose step it
# shares. akiba was not searched.
_EXCLUDED = {"no_decay": "norms+biases", "no_ratio": "norms+biases"}
_SMALL_LARS = _EXCLUDED | {"trust_coefficient": 0.02}
_SMALL_LAMB = _EXCLUDED | {
    "weight_decay": 0.01,
    "bias_correction": True,
    "max_grad_norm": 0.0,
    "label_smoothing": 0.0,
    "warmup_epochs": 5.0,
}
_SMALL_IMAGES: dict[str, tuple[float, float, dict[str, Any]]] = {
    "lars": (1.0, 0.5, _SMALL_LARS),
    "lamb": (0.03, 0.4, _SMALL_LAMB),
    "goyal": (1.6, 0.2, {}),
    "mlperf": (1.0, 0.5, _SMALL_LARS),
}

_FOLDERS: dict[str, Callable[[int], Recipe]] = {
    "lars": partial(_from_table, LARS, _LARS, power=True),
    "lamb": _lamb,
    "goyal": partial(_linear, _GOYAL, "Goyal et al. 2017 (arXiv:1706.02677), sections 2 and 5.1:"),
    "akiba": partial(
        _linear, _AKIBA, "Akiba et al. 2017 (arXiv:1711.04325): RMSprop warm-up, slow start,"
    ),
    "mlperf": _mlperf,
}
NAMES = tuple(_FOLDERS)


def look_up(name: str, data: str, batch_size: int | None, *, small_images: bool = False) -> Recipe:
    """The recipe at a global batch size, by default 128 for the digits and 256 for a folder.

    `small_images`: the folder's images have up to 64 pixels.
    """
    if data == "digits":
        batch = batch_size or 128
        base_lr, power, settings = _DIGITS[name]
        source = f"fastlars' own short variant of {name} for the digits"
        found = Recipe(settings | {"lr": base_lr * (batch / 128) ** power}, source)
    else:
        batch = batch_size or 256
        found = _FOLDERS[name](batch)
        if small_images and name in _SMALL_IMAGES:
            lr, power, settings = _SMALL_IMAGES[name]
            found = Recipe(
                found.settings | settings | {"lr": lr * (batch / 512) ** power},
                f"{found.source}; with rates for images of up to 64 pixels (docs/recipes.md)",
            )
    # At small batches the peak rate is below the fixed rate that goyal's warm-up starts from.
    start = min(found.settings["warmup_from"], found.settings["lr"])
    return Recipe(found.settings | {"batch_size": batch, "warmup_from": start}, found.source)
