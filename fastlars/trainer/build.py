"""What a configuration needs before its first step: model, optimizer, schedule, plan."""

from __future__ import annotations

import torch

from fastlars.trainer import batchnorm, memory, model, optimizer, plan
from fastlars.trainer.config import Config
from fastlars.trainer.data import Data
from fastlars.trainer.distributed import World
from fastlars.trainer.log import Display
from fastlars.trainer.parts import Parts
from fastlars.trainer.rundir import RunDirectory


def build(settings: Config, images: Data, directory: RunDirectory, done: int, here: World) -> Parts:
    """The parts of a run of which `done` steps are taken; nothing is written."""
    with here.together():
        steps = plan.make(
            images.train_size,
            settings.batch_size,
            settings.micro_batch,
            here.rank,
            here.size,
            settings.seed,
        )
        torch.backends.cudnn.benchmark = here.device.type == "cuda"
        stem = images.stem if settings.stem == "auto" else settings.stem
        net = model.build(settings.model, len(images.classes), stem, settings.seed)
        model.draw_classifier(net, settings.classifier_std, settings.seed)
        batchnorm.prepare(net, settings.bn_batch, settings.bn_statistics)
        net = net.to(here.device)
        optim = optimizer.build_optimizer(settings, net, steps.steps_per_epoch)
        schedule = optimizer.build_schedule(settings, optim, steps.steps_per_epoch)
    display = Display(
        settings.epochs * steps.steps_per_epoch * settings.batch_size,
        done * settings.batch_size,
        shown=here.first,
    )
    parts = Parts(settings, here, images, steps, net, optim, schedule, directory, None, display)
    memory.check(parts)
    return parts
