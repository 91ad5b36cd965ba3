"""Loss and accuracy on the test images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fastlars.trainer.data.order import test_batches
from fastlars.trainer.model import batchnorm
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.model.precision import Precision
from fastlars.trainer.run.meter import Figures, Meter, figures


def evaluate(context: TrainingContext, model: nn.Module, precision: Precision) -> Figures:
    """Loss and accuracy of `model`, every image counted once over all processes."""
    world, data = context.world, context.data
    batchnorm.share(model, world, context.config.bn_statistics)
    model.eval()
    meter = Meter(world.device)
    mine = test_batches(data.test_size, context.order.micro_batch, world.rank, world.size)
    with torch.inference_mode():
        for images, labels in data.test(mine):
            with precision.autocast():
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
            meter.add(loss, logits, labels)
    return figures(world.total(meter.sums))
