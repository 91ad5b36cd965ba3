"""Folders of images in ImageNet's layout: train/ and val/ (or test/), one folder a class."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from fastlars.trainer.data import cache, decode, listing
from fastlars.trainer.data.augment import Augmented, Centre
from fastlars.trainer.data.dataset import Batch
from fastlars.trainer.data.device_dataset import TEST, DeviceDataset, Moves, Part
from fastlars.trainer.data.listing import Files
from fastlars.trainer.data.reader import Prepare, Reader, Skipped, readers
from fastlars.trainer.errors import TrainerError

_SMALL = cache.LARGEST
_LARGE = 224
_LOOKED_AT = 256  # images whose headers tell the size, spread over the classes
_MOST_CLASSES = 1024  # of which one is looked at, where there are more than that
_MARGIN = 1 / 8  # 4 of 32 pixels, as in He et al. (2016) for CIFAR
# Mean and deviation of ImageNet's channels, on the scale of bytes.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


class Folder:
    """Images that worker processes read from files, once or whenever they are needed.

    Small ones are moved and mirrored on the device, so it does not show whether they are kept
    there; of large ones the workers cut random context.

    Args:
        root: the folder.
        image_size: side in pixels that images are brought to; 0: their own if they are small.
        seed: of the augmentation.
        workers: processes that read; 0: this one.
        device: where the batches are put.
        keep: 'on', 'off' or 'auto': whether small images stay on the device.
        max_bad_images: how many may be skipped because they cannot be read.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        seed: int,
        workers: int,
        device: torch.device,
        *,
        keep: str = "auto",
        max_bad_images: int = 0,
    ) -> None:
        self.name = root
        self.classes, train, test = listing.find(root)
        self.train_size, self.test_size = len(train), len(test)
        count = len(train) + len(test)
        first = not dist.is_initialized() or dist.get_rank() == 0
        self._skipped = Skipped(max_bad_images, shown=first)
        self.image_size = image_size or _native_size(train, self._skipped)
        kept = cache.wanted(keep, self.image_size, count, device)
        # What is kept every process reads alike, and the first tells of it.
        self._skipped.shown = self._shown = first or not kept
        small = self.image_size <= _SMALL
        self.stem = "small" if small else "imagenet"
        centre = Centre(self.image_size, whole=small)
        margin = round(self.image_size * _MARGIN)
        self._moves = Moves(len(train), seed, margin, mirror=True) if small else None

        self._files = train, test
        self._workers, self._device, self._kept = workers, device, kept
        self._prepares: tuple[Prepare, Prepare] = (
            centre if small else Augmented(self.image_size, seed),
            centre,
        )
        self._sources: list[Reader | DeviceDataset] = []
        self._mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(_STD, device=device).view(1, 3, 1, 1)

    def prepare(self) -> None:
        """Read what is kept on the device; the first batch would do so too."""
        if not self._sources:
            kinds = list(zip(self._files, self._prepares, strict=True))
            made = readers(kinds, self._workers, self._device, self._skipped)
            if self._kept:
                self._sources = [*map(self._read, made, ("training", "test"))]
            else:
                self._sources = [*made]

    def _read(self, reader: Reader, what: str) -> DeviceDataset:
        return cache.keep(reader, self.image_size, self._device, what=what, shown=self._shown)

    @property
    def kept_bytes(self) -> int:
        """What is kept on the device takes so much there, once it is read."""
        count = self.train_size + self.test_size if self._kept else 0
        return 3 * count * self.image_size**2

    @property
    def prepared(self) -> bool:
        """Whether it is read."""
        return bool(self._sources)

    @property
    def skipped(self) -> int:
        """Images that this process could not read so far."""
        return len(self._skipped)

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Augmented by epoch and image, whatever worker or process reads it."""
        self.prepare()
        for part in self._sources[0].read(batches):
            if len(part.labels) < 2:
                raise TrainerError(
                    f"{len(part.labels)} images of a forward pass could be read, and batch norm "
                    "needs 2: set a larger --batch-size or --micro-batch, or mend the images"
                )
            yield self._normal(part if self._moves is None else self._moves.apply(part, 0))

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """The images' centres; a batch of which no image can be read is left out."""
        self.prepare()
        for part in self._sources[1].read((TEST, indices) for indices in batches):
            if len(part.labels):
                yield self._normal(part)

    def _normal(self, part: Part) -> Batch:
        # Rows of pixels of three bytes, read as channels first, are channels_last.
        return (part.pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std, part.labels


_T = TypeVar("_T")


def _native_size(files: Files, skipped: Skipped) -> int:
    """The side of small images, which are used as they are; 224 for others."""
    looked_at, found = _sample(files), set()
    for path, _ in looked_at:
        try:
            found.add(max(decode.sides(path)))
        except decode.BAD as error:
            skipped.add(path, decode.reason(error))
    if not found:
        raise TrainerError(
            f"--data: none of {len(looked_at)} training images can be read, so their size is not "
            "known: set --image-size"
        )
    smallest, largest = min(found), max(found)
    side = max(largest, 8) if largest <= _SMALL else _LARGE
    if smallest < largest and smallest <= _SMALL and skipped.shown:
        tqdm.write(
            f"warning: the longer sides of {len(looked_at)} training images are from {smallest} to "
            f"{largest} pixels: all are brought to {side} (--image-size sets another)",
            file=sys.stderr,
        )
    return side


def _sample(files: Files) -> Files:
    """Some images of every class, always the same."""
    classes = [list(group) for _, group in groupby(files, key=itemgetter(1))]
    each = max(_LOOKED_AT // len(classes), 1)
    return [file for group in _spread(classes, _MOST_CLASSES) for file in _spread(group, each)]


def _spread(items: Sequence[_T], most: int) -> list[_T]:
    """At most that many of the items, from the first on, evenly."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]
