"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, part of the package.

They are the test set of "Optical Recognition of Handwritten Digits" at UCI (Alpaydin and Kaynak
1998).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

from fastlars.trainer.data.augment import ShiftAndFlip
from fastlars.trainer.data.dataset import TEST, Batch, DeviceDataset, PixelBatch

_SIDE = 32  # pixels; torchvision's ResNets halve it five times, to one pixel
_SHIFT = 2  # pixels of the enlarged image: half a pixel of the original


class Digits:
    """All digits, enlarged and normalised, kept on the device; 1,437 to train and 360 to test."""

    name = "digits"
    classes = tuple("0123456789")
    image_size = _SIDE
    prepared = True
    stem = "imagenet"  # reduces the enlarged images to their original 8x8

    def __init__(self, seed: int, device: torch.device) -> None:
        images, labels = load_digits(return_X_y=True)
        splits = train_test_split(
            images.reshape(-1, 1, 8, 8).astype(np.float32) / 16,
            labels.astype(np.int64),
            test_size=0.2,
            stratify=labels,
            random_state=0,  # not --seed: all runs are tested on the same images
        )
        train, test, train_labels, test_labels = (torch.from_numpy(part) for part in splits)
        mean, std = train.mean(), train.std()
        self._train = DeviceDataset(
            _enlarge((train - mean) / std).to(device), train_labels.to(device)
        )
        self._test = DeviceDataset(_enlarge((test - mean) / std).to(device), test_labels.to(device))
        self._background = (-mean / std).item()
        self.train_size, self.test_size = len(train_labels), len(test_labels)
        self.kept_bytes = 4 * _SIDE**2 * (self.train_size + self.test_size)
        self._shift = ShiftAndFlip(self.train_size, seed, _SHIFT, flip=False)

    def prepare(self) -> None:
        """Nothing to do: the constructor has read all images."""

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Each image shifted by up to half a pixel of the original in each direction."""
        for batch in self._train.read(batches):
            yield _as_colour(self._shift.apply(batch, self._background))

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """The images without a shift."""
        for batch in self._test.read((TEST, indices) for indices in batches):
            yield _as_colour(batch)


def _enlarge(images: torch.Tensor) -> torch.Tensor:
    """[n, 1, 8, 8] to [n, side, side, 1]."""
    enlarged = functional.interpolate(images, size=_SIDE, mode="bilinear")
    return enlarged.permute(0, 2, 3, 1).contiguous()


def _as_colour(batch: PixelBatch) -> Batch:
    """Three equal channels, so that the model is the one for photographs."""
    colour = batch.pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    return colour.contiguous(memory_format=torch.channels_last), batch.labels
