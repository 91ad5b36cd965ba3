"""torchvision's ResNets as the large-batch papers use them."""

from __future__ import annotations

import torch
from torch import nn
from torchvision import models


def build(name: str, classes: int, stem: str, seed: int) -> nn.Module:
    """A ResNet in channels_last, its weights drawn from `seed`.

    The last batch norm of each residual block starts at gamma = 0, so that blocks start as the
    identity (Goyal et al. 2017, section 5.1). The `small` stem is He et al.'s for CIFAR (2016): a
    3x3 convolution without stride or pooling.

    channels_last also on the CPU: the convolutions there run several times faster in it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = models.get_model(
            name, weights=None, num_classes=classes, zero_init_residual=True
        )
        if stem == "small":
            model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)
