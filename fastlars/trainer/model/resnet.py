"""ResNets as the large-batch papers use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from torchvision.models.resnet import BasicBlock

_BLOCKS_PER_STAGE = {"resnet8": 1, "resnet20": 3}  # of a SmallResNet, by --model


def build(name: str, classes: int, stem: str, seed: int) -> nn.Module:
    """A ResNet in channels_last, its weights drawn from `seed`.

    The last batch norm of each residual block starts at gamma = 0, so that blocks start as the
    identity (Goyal et al. 2017, section 5.1). The `small` stem is He et al.'s for CIFAR (2016): a
    3x3 convolution without stride or pooling.

    channels_last is used on the CPU too: convolutions run several times faster in it there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = (
            SmallResNet(_BLOCKS_PER_STAGE[name], classes)
            if name in _BLOCKS_PER_STAGE
            else models.get_model(name, num_classes=classes, zero_init_residual=True)
        )
        if stem == "small":
            width = model.bn1.num_features
            model.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def draw_classifier(model: nn.Module, std: float, seed: int) -> None:
    """Draw the last linear layer's weights from N(0, std^2), its bias 0; nothing at std = 0."""
    if not std:
        return
    classifier = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    # A seed of its own: the other layers were drawn from `seed`.
    generator = torch.Generator().manual_seed(seed ^ 2**62)
    nn.init.normal_(classifier.weight, std=std, generator=generator)
    nn.init.zeros_(classifier.bias)


class SmallResNet(nn.Module):
    """He et al. 2016, section 4.2: stages of 16, 32 and 64 channels, for images of 32 pixels.

    With n blocks a stage it has 6 n + 2 layers; the paper's smallest has n = 3. Shortcuts have no
    parameters (the paper's option A): where a stage halves the image, they take every second pixel
    and fill up with channels of zeros. With the small stem and 10 classes, resnet20 has 269,722
    parameters, resnet8 75,290.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(blocks, 16, 16)
        self.layer2 = _stage(blocks, 16, 32)
        self.layer3 = _stage(blocks, 32, 64)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, H, W]."""
        first = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer3(self.layer2(self.layer1(first)))
        return self.fc(features.mean((2, 3)))


class _Shortcut(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        small = images[:, :, ::2, ::2]
        return functional.pad(small, (0, 0, 0, 0, 0, small.shape[1]))


def _stage(blocks: int, before: int, channels: int) -> nn.Sequential:
    halves = channels != before
    first = BasicBlock(before, channels, 2 if halves else 1, _Shortcut() if halves else None)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))
