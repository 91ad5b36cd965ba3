"""All augmentation: crops of one image in a worker, shifts of a whole batch on the device.

Random numbers depend on seed, epoch and image alone. So an image looks the same in every process
and every batch, and a run can be resumed at any step.
"""

from __future__ import annotations

import hashlib

import torch
from torch.nn import functional
from torchvision.transforms import v2

from fastlars.trainer.data.dataset import TEST, PixelBatch
from fastlars.trainer.data.order import generator

_SHORT_SIDE = 256 / 224  # a test image's shorter side is this times the crop's
# An image is at most this many times longer than wide before it is resized: the rest would not be
# in the crop, and could take gigabytes.
_MAX_ASPECT = 8


class CropAndFlip:
    """A random crop of random aspect, resized to `side` pixels, mirrored with probability 1/2.

    Szegedy et al. 2015. For single images, bytes [3, height, width].
    """

    def __init__(self, side: int, seed: int) -> None:
        self._seed = seed
        self._crop = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()])

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        """The crop of image number `index` in this epoch."""
        key = f"{self._seed}/{epoch}/{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        # torchvision draws from the global generator, on which no run may depend: its state is not
        # part of a checkpoint.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._crop(image)


class CentreCrop:
    """The centre of an image, resized to `side` pixels; an image of that size stays as it is.

    For single images, bytes [3, height, width]. `whole` crops only to a square, without the margin
    that tests on ImageNet leave out.
    """

    def __init__(self, side: int, *, whole: bool) -> None:
        self._side = side
        short = side if whole else round(side * _SHORT_SIDE)
        self._crop = v2.Compose([v2.Resize(short), v2.CenterCrop(side)])

    def __call__(self, image: torch.Tensor, _epoch: int, _index: int) -> torch.Tensor:
        """The same crop in every epoch."""
        sides = image.shape[-2:]
        if sides == (self._side, self._side):
            return image
        longest = _MAX_ASPECT * min(sides)
        if max(sides) > longest:
            image = v2.functional.center_crop(image, [min(side, longest) for side in sides])
        return self._crop(image)


class ShiftAndFlip:
    """Shifts each image of a batch, and mirrors half of them: on the device, for all at once.

    `images` is their number in the data set, `margin` the largest shift in each direction.
    """

    def __init__(self, images: int, seed: int, margin: int, *, flip: bool) -> None:
        self._images, self._seed, self._margin, self._flip = images, seed, margin, flip
        self._epoch = TEST  # of the two tables below
        self._offsets, self._flipped = torch.empty(0), torch.empty(0)

    def apply(self, batch: PixelBatch, background: float) -> PixelBatch:
        """The batch with its images shifted over a background of that value."""
        if batch.epoch != self._epoch:
            self._draw(batch.epoch, batch.pixels.device)
        offsets, flipped = self._offsets[batch.indices], self._flipped[batch.indices]
        pixels = shifted(batch.pixels, self._margin, offsets, flipped, background)
        return batch._replace(pixels=pixels)

    def _draw(self, epoch: int, device: torch.device) -> None:
        """Draw one table for all images: what an image gets does not depend on its batch.

        Drawn on the host, so that all devices get the same numbers, and sent once an epoch.
        """
        random, positions = generator(self._seed, epoch), 2 * self._margin + 1
        offsets = torch.randint(0, positions, (self._images, 2), generator=random)
        flipped = torch.randint(0, 2 if self._flip else 1, (self._images,), generator=random)
        self._offsets, self._flipped = offsets.to(device), flipped.bool().to(device)
        self._epoch = epoch


def shifted(
    images: torch.Tensor,
    margin: int,
    offsets: torch.Tensor,
    flipped: torch.Tensor,
    background: float,
) -> torch.Tensor:
    """Windows of [n, side, side, channels] images that are padded by `margin` pixels.

    `offsets`, [n, 2], are the top and left corner of each window, from 0 to 2 * margin; `flipped`,
    [n], says which windows are mirrored left to right.
    """
    padded = functional.pad(images, (0, 0) + (margin,) * 4, value=background)
    line = torch.arange(images.shape[1], device=images.device)
    rows, columns = offsets[:, :1] + line, offsets[:, 1:] + line
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    numbers = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[numbers, rows[:, :, None], columns[:, None, :]]
