"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, part of the package.

They are test data of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

from fastlars.trainer.data import Batch
from fastlars.trainer.plan import generator

_SPLIT_SEED = 0  # not --seed: every run is tested on the same images
_SIDE = 32  # ResNet's five halvings bring it to one pixel
_SHIFT = 2  # augmentation, in pixels of the enlarged image: half a pixel of the original


class Digits:
    """All digits, enlarged and normalised, kept on the device; 1,437 to train and 360 to test."""

    name = "digits"
    classes = tuple("0123456789")
    image_size = _SIDE
    stem = "imagenet"  # it brings the enlarged images back to their real 8x8

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        images, labels = load_digits(return_X_y=True)
        splits = train_test_split(
            images.reshape(-1, 1, 8, 8).astype(np.float32) / 16,
            labels.astype(np.int64),
            test_size=0.2,
            stratify=labels,
            random_state=_SPLIT_SEED,
        )
        train, test, train_labels, test_labels = (torch.from_numpy(part) for part in splits)
        mean, std = train.mean(), train.std()
        self._train = _enlarge((train - mean) / std).to(device)
        self._test = _enlarge((test - mean) / std).to(device)
        self._train_labels, self._test_labels = train_labels.to(device), test_labels.to(device)
        self._background = (-mean / std).item()
        self.train_size, self.test_size = len(train_labels), len(test_labels)

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Each image moved by up to half a pixel of the original in each direction."""
        of_epoch, shifts = -1, torch.empty(0)
        for epoch, indices in batches:
            if epoch != of_epoch:
                shape, random = (self.train_size, 2), generator(self._seed, epoch)
                shifts = torch.randint(0, 2 * _SHIFT + 1, shape, generator=random)
                of_epoch = epoch
            at = indices.to(self._train.device)
            images = _shifted(self._train[at], shifts[indices].to(at.device), self._background)
            yield _as_colour(images), self._train_labels[at]

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """The images in their place."""
        for indices in batches:
            at = indices.to(self._test.device)
            yield _as_colour(self._test[at]), self._test_labels[at]


def _enlarge(images: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)


def _shifted(images: torch.Tensor, shifts: torch.Tensor, background: float) -> torch.Tensor:
    """Windows of [n, 1, side, side] images in a frame of background, at [n, 2] offsets."""
    framed = functional.pad(images, (_SHIFT,) * 4, value=background)[:, 0]
    line = torch.arange(_SIDE, device=images.device)
    rows = (shifts[:, 0, None] + line)[:, :, None]
    columns = (shifts[:, 1, None] + line)[:, None, :]
    picks = torch.arange(len(images), device=images.device)[:, None, None]
    return framed[picks, rows, columns][:, None]


def _as_colour(images: torch.Tensor) -> torch.Tensor:
    """Three equal channels, for the same model that photographs train."""
    return images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
