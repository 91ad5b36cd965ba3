"""Crops and flips of one image, bytes [3, height, width], by torchvision's transforms.

What is random is drawn from a generator that starts from (seed, epoch, image): the same image
looks the same in every process, and a run can go on from any step.
"""

from __future__ import annotations

import hashlib

import torch
from torchvision.transforms import v2

_SHORT_SIDE = 256 / 224  # of a test image, before its centre is cut out
_LONGEST = 8  # times the shorter side; the rest shows in no centre, and may take gigabytes


class Augmented:
    """A random part of random aspect, at `side` pixels, and a coin's flip (Szegedy et al. 2015)."""

    def __init__(self, side: int, seed: int) -> None:
        self._seed = seed
        self._crop = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()])

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        """The image as its epoch sees it."""
        name = f"{self._seed}/{epoch}/{index}".encode()
        start = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(start)
            return self._crop(image)


class Centre:
    """The middle of an image at `side` pixels; one of that size is taken as it is.

    Args:
        side: in pixels.
        whole: cut off only what the square lacks, not the margin that ImageNet's tests leave out.
    """

    def __init__(self, side: int, *, whole: bool) -> None:
        self._side = side
        short = side if whole else round(side * _SHORT_SIDE)
        self._cut = v2.Compose([v2.Resize(short), v2.CenterCrop(side)])

    def __call__(self, image: torch.Tensor, _epoch: int, _index: int) -> torch.Tensor:
        """The same in every epoch."""
        if image.shape[-2:] == (self._side, self._side):
            return image
        sides = image.shape[-2:]
        most = _LONGEST * min(sides)
        if max(sides) > most:
            image = v2.functional.center_crop(image, [min(side, most) for side in sides])
        return self._cut(image)
