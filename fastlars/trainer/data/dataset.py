"""What the trainer needs of its images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

Batch = tuple[torch.Tensor, torch.Tensor]  # normalised images in channels_last, class indices


class Data(Protocol):
    """Training and test images of known classes."""

    name: str
    classes: tuple[str, ...]
    train_size: int
    test_size: int
    image_size: int
    stem: str  # the first layers of the model that suit the images

    @property
    def kept_bytes(self) -> int:
        """Bytes that images kept on the device take there; 0 where none are kept."""

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has run."""

    @property
    def skipped(self) -> int:
        """Number of images that this process could not read so far."""

    def prepare(self) -> None:
        """Read the images that are kept on the device; otherwise the first batch does so."""

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Augmented training images, for each (epoch, indices)."""

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """Test images without augmentation, for each tensor of indices."""
