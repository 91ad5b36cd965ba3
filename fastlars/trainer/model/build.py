"""What a configuration needs before its first step: model, optimizer, schedule, plan."""

from __future__ import annotations

import torch

from fastlars.trainer.config.settings import Config
from fastlars.trainer.data import order
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.model import batchnorm, memory, optimizer, resnet
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.records import Display
from fastlars.trainer.process.world import World


def build(
    settings: Config, images: Data, directory: RunDirectory, done: int, here: World
) -> TrainingContext:
    """The parts of a run of which `done` steps are taken; nothing is written."""
    with here.raise_on_all_ranks():
        steps = order.make(
            images.train_size,
            settings.batch_size,
            settings.micro_batch,
            here.rank,
            here.size,
            settings.seed,
        )
        torch.backends.cudnn.benchmark = here.device.type == "cuda"
        stem = images.stem if settings.stem == "auto" else settings.stem
        net = resnet.build(settings.model, len(images.classes), stem, settings.seed)
        resnet.draw_classifier(net, settings.classifier_std, settings.seed)
        batchnorm.prepare(net, settings.bn_batch, settings.bn_statistics)
        net = net.to(here.device)
        optim = optimizer.build_optimizer(settings, net, steps.steps_per_epoch)
        schedule = optimizer.build_schedule(settings, optim, steps.steps_per_epoch)
    display = Display(
        settings.epochs * steps.steps_per_epoch * settings.batch_size,
        done * settings.batch_size,
        shown=here.first,
    )
    context = TrainingContext(
        settings, here, images, steps, net, optim, schedule, directory, None, display
    )
    memory.check(context)
    return context
