"""What each recipe sets at a batch size, and where that is published.

Every value can be overridden by its flag. Tables are in `tables.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from fastlars.trainer.config.tables import LARS, MLPERF, MLPERF_DEFAULT, Row


@dataclass(frozen=True)
class Recipe:
    """Settings by flag name, and in a line the paper, table and rule they come from."""

    settings: dict[str, Any]
    source: str


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


def _goyal(batch: int) -> Recipe:
    lr = 0.1 * batch / 256
    source = "Goyal et al. 2017 (arXiv:1706.02677), sections 2 and 5.1: lr 0.1 x batch/256"
    return Recipe(_GOYAL | {"lr": lr, "batch_size": batch}, source)


def _akiba(batch: int) -> Recipe:
    lr = 0.1 * batch / 256
    source = "Akiba et al. 2017 (arXiv:1711.04325): RMSprop warm-up, slow start, lr 0.1 x batch/256"
    return Recipe(_AKIBA | {"lr": lr, "batch_size": batch}, source)


def _lamb(batch: int) -> Recipe:
    share = batch / 32768
    settings = {"lr": 0.04 * math.sqrt(share), "warmup_epochs": 20 * share, "batch_size": batch}
    where = "" if 512 <= batch <= 32768 else ", continued beyond its 512 to 32,768"
    source = (
        "You et al. 2019 (arXiv:1904.00962), table 5: lr by the square root of the batch, warm-up "
        f"in proportion to it{where}; decay and clip of the authors' code at 32,768"
    )
    return Recipe(_LAMB | settings, source)


def _lars(batch: int) -> Recipe:
    low, high = _between(LARS, batch)
    settings = _of_row(low)
    source = f"{low.source}: at {low.batch:,}"
    if batch < low.batch:
        settings["lr"] = low.lr * batch / low.batch
        source = f"{low.source}: the rate at {low.batch:,}, scaled linearly down to {batch:,}"
    elif batch > low.batch and low is high:
        source = f"{low.source}: the rate at {low.batch:,}, where it ends"
    elif batch > low.batch:
        growth = math.log(batch / low.batch) / math.log(high.batch / low.batch)
        settings["lr"] = low.lr * (high.lr / low.lr) ** growth
        source = f"{low.source}: between {low.batch:,} and {high.batch:,} as a power of the batch"
    return Recipe(_LARS | settings | {"batch_size": batch}, source)


def _mlperf(batch: int) -> Recipe:
    if batch == MLPERF_DEFAULT.batch:
        source = f"{MLPERF_DEFAULT.source} at {batch:,}"
        return Recipe(_MLPERF | _of_row(MLPERF_DEFAULT) | {"batch_size": batch}, source)
    low, high = _between(MLPERF, batch)
    settings = _of_row(low)
    source = f"{low.source} at {low.batch:,}"
    if batch < low.batch:
        settings["lr"] = low.lr * batch / low.batch
        source += f", its rate scaled linearly down to {batch:,}"
    elif batch > low.batch and low is high:
        source += ", where the table ends"
    elif batch > low.batch:
        share = (batch - low.batch) / (high.batch - low.batch)
        for name in ("lr", "warmup_epochs", "epochs"):
            start, end = getattr(low, name), getattr(high, name)
            settings[name] = start + (end - start) * share
        settings["epochs"] = round(settings["epochs"])
        source += f"; lr, warm-up and epochs on the way to the one at {high.batch:,}"
    return Recipe(_MLPERF | settings | {"batch_size": batch}, source)


def _between(rows: tuple[Row, ...], batch: int) -> tuple[Row, Row]:
    """The rows on both sides of a batch; where it has a row or lies outside, the nearest, twice."""
    for low, high in pairwise(rows):
        if low.batch < batch < high.batch:
            return low, high
    nearest = min(rows, key=lambda row: abs(row.batch - batch))
    return nearest, nearest


def _of_row(row: Row) -> dict[str, Any]:
    names = ("lr", "warmup_epochs", "epochs", "momentum", "weight_decay", "bn_batch")
    return {name: getattr(row, name) for name in names}


# The digits are 1,437 images: at batch 128 an epoch is 11 steps, so what the papers spread over
# thousands of steps happens in about 150. lars: layers move at 5 times the papers' 0.001, while
# biases and norms, which no ratio holds back, keep a rate of 1: at 5 they throw training off.
# goyal and akiba: four times the papers' rate, at which 154 steps are not enough.
_SHORT = {"epochs": 14, "warmup_epochs": 2.0, "end_lr": 0.0, "label_smoothing": 0.0}
_SOON = {"warmup_epochs": 0.0, "rmsprop_center": 2.0, "rmsprop_period": 1.0}
_DIGITS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "lars": (1.0, 0.5, _PLAIN | _SHORT | {"trust_coefficient": 0.005}),
    "lamb": (0.01, 0.5, _LAMB | _SHORT | {"weight_decay": 0.01}),
    "goyal": (0.2, 1.0, _GOYAL | _SHORT),
    "akiba": (0.2, 1.0, _AKIBA | _SHORT | _SOON),
    "mlperf": (1.0, 0.5, _MLPERF | _SHORT | {"trust_coefficient": 0.005}),
}
_FOLDERS: dict[str, Callable[[int], Recipe]] = {
    "lars": _lars,
    "lamb": _lamb,
    "goyal": _goyal,
    "akiba": _akiba,
    "mlperf": _mlperf,
}
NAMES = tuple(_FOLDERS)


def look_up(name: str, data: str, batch_size: int | None) -> Recipe:
    """The recipe of this name for this data, "digits" or a folder, at a global batch.

    Without a batch it is the recipe's own.
    """
    if data == "digits":
        found = _digits(name, batch_size or 128)
    else:
        found = _FOLDERS[name](batch_size or 256)
    # Small batches scale the peak below the rate that a warm-up starts from.
    start = min(found.settings["warmup_from"], found.settings["lr"])
    return replace(found, settings=found.settings | {"warmup_from": start})


def _digits(name: str, batch: int) -> Recipe:
    base_lr, exponent, settings = _DIGITS[name]
    lr = base_lr * float(batch / 128) ** exponent
    source = f"fastlars' own short variant of {name} for the digits"
    return Recipe(settings | {"lr": lr, "batch_size": batch}, source)
