"""What the trainer asks of images, and the choice between the two kinds it knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from fastlars.trainer.config.settings import Config
from fastlars.trainer.process import packages

Batch = tuple[torch.Tensor, torch.Tensor]  # normalised images in channels_last, class indices


class Data(Protocol):
    """Training and test images of known classes."""

    name: str
    classes: tuple[str, ...]
    train_size: int
    test_size: int
    image_size: int
    stem: str  # the model's first layers that suit the images

    @property
    def kept_bytes(self) -> int:
        """Bytes that images kept on the device take there; 0 where none are kept."""

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has run."""

    @property
    def skipped(self) -> int:
        """Images that this process could not read so far."""

    def prepare(self) -> None:
        """Read what is kept on the device; the first batch would do so too."""

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Augmented training images, for each (epoch, indices)."""

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """Test images as they are, for each tensor of indices."""


def load(config: Config, device: torch.device) -> Data:
    """The images that --data names, listed and not yet read; TrainerError where they do not do."""
    if config.data == "digits":
        packages.load("sklearn.datasets")
        from fastlars.trainer.data.digits import Digits

        return Digits(config.seed, device)
    from fastlars.trainer.data.image_folder import Folder

    return Folder(
        config.data,
        config.image_size,
        config.seed,
        config.workers,
        device,
        keep=config.cache,
        max_bad_images=config.max_bad_images,
    )
