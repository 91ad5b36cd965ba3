"""The ResNets for small images, and the classifier's first weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlars.trainer.model import resnet
from trainer.helpers import tiny_net


def test_resnet20_is_he_et_als() -> None:
    """Its table 6: 0.27 million weights, three stages of 32, 16 and 8 pixels."""
    net = resnet.build("resnet20", 10, "small", 3)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    # 3 x 16 x 9 + 6 x 16 x 16 x 9 + (16 + 5 x 32) x 32 x 9 + (32 + 5 x 64) x 64 x 9, two of each
    # of 688 channels normalised, and the classifier
    assert sum(p.numel() for p in net.parameters()) == 432 + 13824 + 50688 + 202752 + 1376 + 650
    images = torch.zeros(2, 3, 32, 32)
    shapes = []
    for stage in (net.conv1, net.layer1, net.layer2, net.layer3):
        images = stage(images)
        shapes.append(tuple(images.shape))
    assert shapes == [(2, 16, 32, 32), (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters()
               if p.ndim == 4)  # fmt: skip


def test_resnet8_has_one_block_a_stage() -> None:
    net = resnet.build("resnet8", 10, "small", 3)
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3)] == [1, 1, 1]
    # 3 x 16 x 9 + 2 x 16 x 16 x 9 + (16 + 32) x 32 x 9 + (32 + 64) x 64 x 9, two of each of 240
    # channels normalised, and the classifier
    assert sum(p.numel() for p in net.parameters()) == 432 + 4608 + 13824 + 55296 + 480 + 650


def test_its_shortcuts_take_every_second_pixel() -> None:
    """At gamma 0 a block is its shortcut, and a ReLU."""
    net = resnet.build("resnet20", 10, "small", 3).train()
    images = torch.randn(4, 16, 8, 8)
    found = net.layer2[0](images)
    assert torch.equal(found[:, :16], images[:, :, ::2, ::2].relu())
    assert not found[:, 16:].any()
    assert all(not block.bn2.weight.any() for stage in (net.layer1, net.layer3) for block in stage)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_its_weights_are_the_seeds(stem: str) -> None:
    one, same, other = (resnet.build("resnet20", 10, stem, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not torch.equal(one.layer1[0].conv1.weight, other.layer1[0].conv1.weight)
    assert one(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    # He et al. 2015: variance 2 / fan-out, here of 32 x 9
    assert one.layer2[0].conv1.weight.std().item() == pytest.approx((2 / 288) ** 0.5, rel=0.05)


def test_the_classifier_is_drawn_anew() -> None:
    before = torch.get_rng_state()
    nets = [tiny_net("", 50, "", 0) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        resnet.draw_classifier(net, 0.01, seed)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [net[5].weight for net in nets]
    assert weights[0].std().item() == pytest.approx(0.01, rel=0.05)
    assert abs(weights[0].mean().item()) < 0.001
    assert not nets[0][5].bias.any()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    plain = tiny_net("", 50, "", 0)
    assert torch.equal(nets[0][0].weight, plain[0].weight)
    resnet.draw_classifier(plain, 0.0, 0)
    assert torch.equal(plain[5].bias, tiny_net("", 50, "", 0)[5].bias)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet20", "resnet50"])
def test_every_model_takes_the_smallest_image(name: str, stem: str) -> None:
    """8 pixels and 2 images, with which batch norm would refuse a single pixel of one image."""
    net = resnet.build(name, 3, stem, 0)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
