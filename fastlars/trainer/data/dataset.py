"""The images of a run: what the trainer needs of them, and those that are kept on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

TEST = -1  # the epoch of test images, which are not augmented
Batch = tuple[torch.Tensor, torch.Tensor]  # normalised images in channels_last, class indices


class Data(Protocol):
    """Training and test images of known classes."""

    name: str
    classes: tuple[str, ...]
    train_size: int
    test_size: int
    image_size: int
    stem: str  # the first layers of the model that suit the images
    kept_bytes: int  # what images kept on the device take there; 0 where none are kept
    prepared: bool  # whether `prepare` has run

    def prepare(self) -> None:
        """Call once, before the first batch: read the images that are kept on the device."""

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Augmented training images, for each (epoch, indices)."""

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """Test images without augmentation, for each tensor of indices."""


class PixelBatch(NamedTuple):
    """Images of one forward pass before they are normalised; the tensors are on one device."""

    pixels: torch.Tensor  # [n, side, side, channels]
    labels: torch.Tensor
    epoch: int
    indices: torch.Tensor  # of the images in the data set


class DeviceDataset:
    """All training or all test images, [images, side, side, channels], and labels, on the device.

    `missing` are indices of images that could not be read; they are left out of every batch.
    """

    def __init__(
        self, pixels: torch.Tensor, labels: torch.Tensor, missing: Iterable[int] = ()
    ) -> None:
        self._pixels, self._labels = pixels, labels
        self._readable = torch.ones(len(labels), dtype=torch.bool)
        self._readable[list(missing)] = False

    def read(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[PixelBatch]:
        """The images at each (epoch, indices)."""
        device = self._labels.device
        for epoch, indices in batches:
            readable = indices[self._readable[indices]]
            # A GPU copies from memory that is not pinned only after all its other work, and the
            # host would wait for that.
            if device.type == "cuda":
                readable = readable.pin_memory()
            at = readable.to(device, non_blocking=True)
            yield PixelBatch(self._pixels[at], self._labels[at], epoch, at)
