"""Loss and accuracy on the test images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fastlars.trainer import batchnorm
from fastlars.trainer.meter import Figures, Meter, figures
from fastlars.trainer.parts import Parts
from fastlars.trainer.plan import test_batches
from fastlars.trainer.precision import Precision


def evaluate(parts: Parts, model: nn.Module, precision: Precision) -> Figures:
    """Loss and accuracy of `model`, every image counted once over all processes."""
    world, data = parts.world, parts.data
    batchnorm.share(model, world, parts.config.bn_statistics)
    model.eval()
    meter = Meter(world.device)
    mine = test_batches(data.test_size, parts.plan.micro_batch, world.rank, world.size)
    with torch.inference_mode():
        for images, labels in data.test(mine):
            with precision.autocast():
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
            meter.add(loss, logits, labels)
    return figures(world.total(meter.sums))
