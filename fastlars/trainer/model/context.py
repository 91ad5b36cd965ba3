"""What a run consists of, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.records import Display, Records
from fastlars.trainer.process.world import World


@dataclass
class Progress:
    """How far the run is; all that a checkpoint needs besides tensors."""

    step: int = 0
    evaluated: int = 0  # epochs
    last_accuracy: float = 0.0
    best_accuracy: float = 0.0
    best_epoch: int = 0


@dataclass
class TrainingContext:
    """What the loop works with."""

    config: Config
    world: World
    data: Data
    order: BatchOrder
    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    run: RunDirectory
    log: Records | None  # of the first process
    display: Display


def progress_of(saved: dict[str, Any]) -> Progress:
    """The progress in a checkpoint; ValueError where it cannot be one."""
    kinds = {field.name: type(field.default) for field in fields(Progress)}
    if {name: type(value) for name, value in saved.items()} != kinds:
        raise ValueError(f"its progress is {saved}")
    return Progress(**saved)


def fingerprint(data: Data) -> dict[str, Any]:
    """What must be the same about the images when a run is resumed."""
    return {
        "classes": list(data.classes),
        "train_size": data.train_size,
        "test_size": data.test_size,
        "image_size": data.image_size,
    }
