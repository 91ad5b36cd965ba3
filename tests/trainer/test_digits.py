"""The digits: their split, their enlargement, their augmentation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from fastlars.trainer.data.digits import Digits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(0, CPU)


def test_split(digits: Digits) -> None:
    """Every image is in one half, each class in the same share, whatever the seed of the run."""
    assert (digits.train_size, digits.test_size) == (1437, 360)
    _, train_labels = next(digits.train([(0, torch.arange(1437))]))
    test_images, test_labels = next(digits.test([torch.arange(360)]))
    of_all = Counter(load_digits().target.tolist())
    of_test = Counter(test_labels.tolist())
    assert Counter(train_labels.tolist()) + of_test == of_all
    for digit, count in of_all.items():
        assert abs(of_test[digit] - count / 5) < 1

    other_images, other_labels = next(Digits(7, CPU).test([torch.arange(360)]))
    assert torch.equal(test_images, other_images)
    assert torch.equal(test_labels, other_labels)


def test_images(digits: Digits) -> None:
    images, labels = next(digits.train([(0, torch.arange(1437))]))
    assert images.shape == (1437, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert torch.equal(images[:, 0], images[:, 2])
    assert abs(images.mean().item()) < 0.2
    assert 0.7 < images.std().item() < 1.1  # enlarging smooths


def test_augmentation_depends_on_seed_epoch_and_image_alone(digits: Digits) -> None:
    some, more = torch.tensor([5, 900, 17]), torch.tensor([17, 3, 5, 1200])
    (first, _), (other_epoch, _), (again, _) = digits.train([(3, some), (4, some), (3, more)])
    assert torch.equal(first[0], again[2])
    assert torch.equal(first[2], again[0])
    assert not torch.equal(first, other_epoch)
    other_seed, _ = next(Digits(1, CPU).train([(3, some)]))
    assert not torch.equal(first, other_seed)
