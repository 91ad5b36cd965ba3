"""Images kept on the device: looked up, moved and mirrored a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

from fastlars.trainer.data.order import generator

TEST = -1  # in place of an epoch: images to test on, which are not augmented


class Part(NamedTuple):
    """Images of one forward pass: [n, side, side, channels], their labels, and which they are."""

    pixels: torch.Tensor
    labels: torch.Tensor
    epoch: int
    indices: torch.Tensor  # all three on the device


class DeviceDataset:
    """All images of one kind, on the device.

    Args:
        pixels: [images, side, side, channels], on the device.
        labels: [images], there too.
        missing: indices of images that could not be read; they are left out of every batch.
    """

    def __init__(
        self, pixels: torch.Tensor, labels: torch.Tensor, missing: Iterable[int] = ()
    ) -> None:
        self._pixels, self._labels = pixels, labels
        self._there = torch.ones(len(labels), dtype=torch.bool)
        self._there[list(missing)] = False
        self._whole = bool(self._there.all())

    def read(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Part]:
        """The images at each (epoch, indices)."""
        for epoch, indices in batches:
            left = indices if self._whole else indices[self._there[indices]]
            at = _sent(left, self._labels.device)
            yield Part(self._pixels[at], self._labels[at], epoch, at)


def _sent(indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The indices on a device, without waiting for it.

    From memory that is not pinned, a copy begins when a GPU has done all else, and the host waits.
    """
    if device.type == "cuda":
        return indices.pin_memory().to(device, non_blocking=True)
    return indices.to(device)


class Moves:
    """Where each image lies in its frame, and whether it is mirrored: by seed, epoch and image.

    Args:
        images: how many there are.
        seed: of the run.
        margin: the largest move, in pixels, in each direction.
        mirror: mirror every second image, by chance.
    """

    def __init__(self, images: int, seed: int, margin: int, *, mirror: bool) -> None:
        self._images, self._seed, self._margin, self._mirror = images, seed, margin, mirror
        self._epoch = TEST
        self._offsets = torch.empty(0, 2, dtype=torch.int64)
        self._mirrored = torch.empty(0, dtype=torch.bool)

    def apply(self, part: Part, background: float) -> Part:
        """The part with its images in their places, `background` around them."""
        if part.epoch != self._epoch:
            self._draw(part.epoch, part.pixels.device)
        offsets, mirrored = self._offsets[part.indices], self._mirrored[part.indices]
        pixels = moved(part.pixels, self._margin, offsets, mirrored, background)
        return part._replace(pixels=pixels)

    def _draw(self, epoch: int, device: torch.device) -> None:
        """One table for all images: what one of them gets does not depend on its batch.

        Drawn on the host, so that it is the same for all devices, and sent once an epoch.
        """
        random, highest = generator(self._seed, epoch), 2 * self._margin + 1
        offsets = torch.randint(0, highest, (self._images, 2), generator=random)
        if self._mirror:
            mirrored = torch.randint(0, 2, (self._images,), generator=random).bool()
        else:
            mirrored = torch.zeros(self._images, dtype=torch.bool)
        self._offsets, self._mirrored = offsets.to(device), mirrored.to(device)
        self._epoch = epoch


def moved(
    images: torch.Tensor,
    margin: int,
    offsets: torch.Tensor,
    mirrored: torch.Tensor,
    background: float,
) -> torch.Tensor:
    """Windows of [n, side, side, channels] images in a frame of `margin` pixels of background.

    Args:
        images: any type, on any device.
        margin: the frame's width in pixels.
        offsets: [n, 2], top and left corner of each window, from 0 to 2 * margin.
        mirrored: [n], whether the window is turned left to right.
        background: the value of the frame.
    """
    framed = functional.pad(images, (0, 0) + (margin,) * 4, value=background)
    line = torch.arange(images.shape[1], device=images.device)
    rows, columns = offsets[:, :1] + line, offsets[:, 1:] + line
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    picks = torch.arange(len(images), device=images.device)[:, None, None]
    return framed[picks, rows[:, :, None], columns[:, None, :]]
