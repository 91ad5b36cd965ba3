"""What is trained, and how far the training is."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.model.precision import Precision
from fastlars.trainer.process.world import World


@dataclass
class Progress:
    """How far the run is: all that a checkpoint needs in addition to tensors."""

    step: int = 0
    evaluated: int = 0  # epochs
    last_accuracy: float = 0.0
    best_accuracy: float = 0.0
    best_epoch: int = 0

    @classmethod
    def saved(cls, values: dict[str, Any]) -> Progress:
        """The progress in a checkpoint; ValueError where names or types are not a progress's."""
        types = {field.name: type(field.default) for field in fields(cls)}
        if {name: type(value) for name, value in values.items()} != types:
            raise ValueError(f"its progress is {values}")
        return cls(**values)


@dataclass
class TrainingContext:
    """Everything that one optimizer step works with."""

    config: Config
    world: World
    data: Data
    order: BatchOrder
    model: nn.Module
    precision: Precision
    optimizer: Optimizer
    schedule: LambdaLR
    progress: Progress = field(default_factory=Progress)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.order.steps_per_epoch


def fingerprint(data: Data) -> dict[str, Any]:
    """The properties of the images that must not change when a run is resumed."""
    return {
        "classes": list(data.classes),
        "train_size": data.train_size,
        "test_size": data.test_size,
        "image_size": data.image_size,
    }
