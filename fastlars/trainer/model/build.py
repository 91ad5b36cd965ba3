"""From settings and images to what is trained: model, optimizer, schedule, order of the images."""

from __future__ import annotations

import torch

from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.model import batchnorm, optimizer, resnet
from fastlars.trainer.model.context import Progress, TrainingContext
from fastlars.trainer.model.precision import Precision
from fastlars.trainer.process.world import World


def build(config: Config, data: Data, progress: Progress, world: World) -> TrainingContext:
    """Build what `config` names, in every process alike; nothing is written."""
    with world.raise_on_all_ranks():
        batches = BatchOrder(
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
        batchnorm.prepare(model, config.bn_batch, config.bn_statistics)
        model = model.to(world.device)
        stepper = optimizer.build_optimizer(config, model, batches.steps_per_epoch)
        schedule = optimizer.build_schedule(config, stepper, batches.steps_per_epoch)
        precision = Precision(config.precision, world.device)
    return TrainingContext(
        config, world, data, batches, model, precision, stepper, schedule, progress
    )
