"""Crops and flips of PIL images, to tensors of bytes [side, side, 3].

What is random is drawn from a name ("seed/epoch/image") and not from a generator's state: the
same image looks the same in every process, and a run can go on from any step.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image, ImageOps

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_MARGIN = 1 / 8  # 4 of 32 pixels, as in He et al. (2016) for CIFAR
_SHORT_SIDE = 256 / 224  # of a test image, before its centre is cut out


def crop_and_flip(image: Image.Image, side: int, name: str) -> torch.Tensor:
    """A random part of random aspect, and a coin's flip (Szegedy et al. 2015)."""
    draw = random.Random(name)
    box = _random_box(image.width, image.height, draw)
    cut = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return _bytes(ImageOps.mirror(cut) if draw.random() < 0.5 else cut)


def shift_and_flip(image: Image.Image, side: int, name: str) -> torch.Tensor:
    """The whole image moved by up to an eighth of its side over black, and a coin's flip."""
    draw = random.Random(name)
    margin = round(side * _MARGIN)
    frame = Image.new("RGB", (side, side))
    frame.paste(
        _resized(image, side), (draw.randint(-margin, margin), draw.randint(-margin, margin))
    )
    return _bytes(ImageOps.mirror(frame) if draw.random() < 0.5 else frame)


def centre(image: Image.Image, side: int) -> torch.Tensor:
    """The image if it has that size already, else its centre."""
    if image.size == (side, side):
        return _bytes(image)
    cut = min(image.size) / _SHORT_SIDE
    left, top = (image.width - cut) / 2, (image.height - cut) / 2
    box = (left, top, left + cut, top + cut)
    return _bytes(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def _random_box(width: int, height: int, draw: random.Random) -> tuple[float, float, float, float]:
    for _ in range(10):
        area = width * height * draw.uniform(*_AREA)
        aspect = math.exp(draw.uniform(*(math.log(bound) for bound in _ASPECT)))
        wide, high = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if wide <= width and high <= height:
            left, top = draw.uniform(0, width - wide), draw.uniform(0, height - high)
            return left, top, left + wide, top + high
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _resized(image: Image.Image, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return image.resize((side, side), Image.Resampling.BILINEAR)


def _bytes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8))
