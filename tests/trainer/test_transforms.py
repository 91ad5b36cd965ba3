"""Crops and flips of one image."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from fastlars.trainer.data.augment import CentreCrop, CropAndFlip


@pytest.mark.parametrize("size", [(30, 40), (8, 500), (300, 9), (1, 1)])
def test_parts_lie_within_the_image(size: tuple[int, int]) -> None:
    """A constant image stays constant: no pixel comes from outside."""
    image = torch.tensor([7, 8, 9], dtype=torch.uint8)[:, None, None].expand(3, *size)
    for transform in (CropAndFlip(12, 0), CentreCrop(12, whole=True), CentreCrop(12, whole=False)):
        for index in range(20):
            pixels = transform(image, 0, index)
            assert (pixels.shape, pixels.dtype) == ((3, 12, 12), torch.uint8)
            assert pixels.flatten(1).unique(dim=1).tolist() == [[7], [8], [9]]


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    before = torch.get_rng_state()
    first = CropAndFlip(24, 5)(image, 3, 17)
    assert torch.equal(before, torch.get_rng_state())  # a run can be resumed by it
    torch.manual_seed(99)
    assert torch.equal(first, CropAndFlip(24, 5)(image, 3, 17))
    others = [CropAndFlip(24, s)(image, e, i) for s, e, i in ((6, 3, 17), (5, 4, 17), (5, 3, 18))]
    assert not any(torch.equal(first, other) for other in others)


def test_parts_and_flips_vary() -> None:
    """The left half is dark: about half of the crops are turned, and their sizes differ."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 32:] = 255
    crops = [CropAndFlip(16, 0)(image, 0, index).float() for index in range(400)]
    turned = [crop[..., :8].mean() > crop[..., 8:].mean() for crop in crops]
    straight = [crop[..., :8].mean() < crop[..., 8:].mean() for crop in crops]
    assert 0.4 < sum(turned) / (sum(turned) + sum(straight)) < 0.6
    assert len({round(crop.mean().item()) for crop in crops}) > 100


def test_centre() -> None:
    """ImageNet's tests: the short side to 256 of 224, then the middle; small images whole."""
    image = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    resized = functional.resize(image, [32, 57])
    assert torch.equal(CentreCrop(28, whole=False)(image, 0, 0), resized[:, 2:30, 14:42])
    assert torch.equal(
        CentreCrop(32, whole=True)(image, 0, 0), functional.center_crop(resized, [32, 32])
    )
    exact = image[:, :32, :32]
    for whole in (False, True):
        assert torch.equal(CentreCrop(32, whole=whole)(exact, 0, 0), exact)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_very_long_image_takes_little_memory(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """At its shorter side's scale the whole of it would take gigabytes."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image.flatten(1)[:, 29_900:30_100] = 200
    cut = CentreCrop(224, whole=False)
    resize = cut._crop.transforms[0].forward

    def watched(given: torch.Tensor) -> torch.Tensor:
        assert given.numel() == 3 * 8
        return resize(given)

    monkeypatch.setattr(cut._crop.transforms[0], "forward", watched)
    pixels = cut(image, 0, 0)
    assert pixels.shape == (3, 224, 224)
    assert pixels.unique().tolist() == [200]
