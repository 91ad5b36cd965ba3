"""What is trained, and how far the training is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastlars.trainer.config import recipes
from fastlars.trainer.config.recipes import Recipe
from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.model import batchnorm, resnet
from fastlars.trainer.model.optimizer import build_optimizer, build_schedule
from fastlars.trainer.model.precision import Precision
from fastlars.trainer.process.world import World


@dataclass
class Progress:
    """How far the run is; saved in every checkpoint."""

    step: int = 0
    evaluated: int = 0  # epochs
    last_accuracy: float = 0.0
    best_accuracy: float = 0.0
    best_epoch: int = 0

    @classmethod
    def saved(cls, values: dict[str, Any]) -> Progress:
        """The progress in a checkpoint; ValueError if its names or types are wrong."""
        types = {field.name: type(field.default) for field in fields(cls)}
        if {name: type(value) for name, value in values.items()} != types:
            raise ValueError(f"its progress is {values}")
        return cls(**values)


@dataclass
class TrainingContext:
    """What is trained, with what, by which settings; the same in every process."""

    config: Config
    world: World
    data: Data
    order: BatchOrder
    model: nn.Module
    precision: Precision
    optimizer: Optimizer
    schedule: LambdaLR
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        """What the settings were before flags changed them."""
        config, small = self.config, self.data.stem == "small"
        return recipes.look_up(config.recipe, config.data, config.batch_size, small_images=small)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.order.steps_per_epoch


def build(config: Config, data: Data, progress: Progress, world: World) -> TrainingContext:
    """Build what `config` names, the same in every process."""
    with world.raise_on_all_ranks():
        order = BatchOrder(
            data.train_size,
            config.batch_size,
            config.micro_batch,
            world.rank,
            world.size,
            config.seed,
        )
        torch.backends.cudnn.benchmark = world.device.type == "cuda"
        stem = data.stem if config.stem == "auto" else config.stem
        model = resnet.build(config.model, len(data.classes), stem, config.seed)
        resnet.draw_classifier(model, config.classifier_std, config.seed)
        batchnorm.replace_norms(model, config.bn_batch, config.bn_statistics)
        model = model.to(world.device)
        optimizer = build_optimizer(config, model, order.steps_per_epoch)
        schedule = build_schedule(config, optimizer, order.steps_per_epoch)
        precision = Precision(config.precision, world.device)
    return TrainingContext(
        config, world, data, order, model, precision, optimizer, schedule, progress
    )


def fingerprint(data: Data) -> dict[str, Any]:
    """The properties of the images that must not change when a run is resumed."""
    return {
        "classes": list(data.classes),
        "train_size": data.train_size,
        "test_size": data.test_size,
        "image_size": data.image_size,
    }
