"""Folders of images in ImageNet's layout: train/ and val/ (or test/), with one folder a class."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from fastlars.trainer.config.settings import Config
from fastlars.trainer.data import decode, listing
from fastlars.trainer.data.augment import CentreCrop, CropAndFlip, ShiftAndFlip
from fastlars.trainer.data.dataset import TEST, Batch, DeviceDataset, PixelBatch
from fastlars.trainer.data.listing import Files
from fastlars.trainer.data.reader import BadImages, Reader
from fastlars.trainer.errors import TrainerError

# Pixels. Small images are used whole, and may be kept on the device. Larger ones are not kept,
# because the workers cut another crop from them in every epoch.
_SMALL = 64

_SAMPLED = 256  # images that decide the size by their headers, spread over the classes
_SAMPLED_CLASSES = 1024  # of more classes than this, only so many are sampled, one image each

# What --cache auto may take.
_BYTES_ON_CPU = 2 * 2**30
_SHARE_OF_GPU = 1 / 4  # of the free memory
_READ_AT_ONCE = 256  # images of one request while the kept ones are read

Read = Callable[[Iterable[tuple[int, torch.Tensor]]], Iterator[PixelBatch]]
T = TypeVar("T")


class Folder:
    """Images that worker processes read from files, once or whenever they are needed.

    Small ones are shifted and mirrored on the device, so training is the same whether they are kept
    there or not; of large ones the workers cut random crops.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.name = config.data
        self.classes, train, test = listing.find(config.data)
        self.train_size, self.test_size = len(train), len(test)
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.bad_images = BadImages(config.max_bad_images, shown=first)
        self.image_size = config.image_size or _native_size(train, self.bad_images)
        nbytes = 3 * self.image_size**2 * (len(train) + len(test))
        kept = _is_kept(config.cache, self.image_size, nbytes, device)
        self.kept_bytes = nbytes if kept else 0
        # All processes read the images that are kept, so the first one reports for all. Of images
        # that are not kept, each process reads others.
        self.bad_images.shown = first or not kept
        small = self.image_size <= _SMALL
        self.stem = "small" if small else "imagenet"
        centre = CentreCrop(self.image_size, whole=small)
        margin = round(self.image_size / 8)  # 4 of 32 pixels, as in He et al. (2016) for CIFAR
        self._shift = ShiftAndFlip(len(train), config.seed, margin, flip=True) if small else None
        self._splits = (
            (train, centre if small else CropAndFlip(self.image_size, config.seed)),
            (test, centre),
        )
        self._workers, self._device = config.workers, device
        self._sources: list[Read] = []  # of training and test images, once they are prepared
        self.prepared = False
        # Mean and standard deviation of ImageNet's channels, on the scale of bytes.
        statistics = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        self._mean, self._std = torch.tensor(statistics, device=device).view(2, 1, 3, 1, 1)

    def prepare(self) -> None:
        """Start the reading of images; those that are kept on the device are read now."""
        reader = Reader(self._splits, self._workers, self._device, self.bad_images)
        sources: list[Read] = [partial(reader.read, split) for split in range(2)]
        if self.kept_bytes:
            sources = [self._read_all(read, split).read for split, read in enumerate(sources)]
        self._sources, self.prepared = sources, True

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Augmented by epoch and image, whichever worker or process reads them."""
        for batch in self._sources[0](batches):
            if len(batch.labels) < 2:
                raise TrainerError(
                    f"only {len(batch.labels)} images of a forward pass could be read, and batch "
                    "norm needs 2: raise --batch-size or --micro-batch, or repair the images"
                )
            yield self._normalised(batch if self._shift is None else self._shift.apply(batch, 0))

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """The images' centres; a batch of which no image can be read is left out."""
        for batch in self._sources[1]((TEST, indices) for indices in batches):
            if len(batch.labels):
                yield self._normalised(batch)

    def _normalised(self, batch: PixelBatch) -> Batch:
        # Pixels of three bytes next to each other, seen as channels first, are channels_last.
        return (batch.pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std, batch.labels

    def _read_all(self, read: Read, split: int) -> DeviceDataset:
        """All images of a split, on the device, with a progress bar meanwhile."""
        files, what = self._splits[split][0], ("training", "test")[split]
        count, side, started = len(files), self.image_size, time.perf_counter()
        try:
            pixels = torch.empty(count, side, side, 3, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            text = f"--cache: {count} images of {side} pixels are more than {self._device} can keep"
            raise TrainerError(f"{text}: add --cache off") from error
        missing = set(range(count))
        requests = torch.arange(count).split(_READ_AT_ONCE)
        shown = self.bad_images.shown
        hidden = None if shown else True  # None: hidden if standard error is no terminal
        with tqdm(total=count, desc=f"reading {what} images", unit="img", disable=hidden) as bar:
            found = read((TEST, indices) for indices in requests)
            for indices, batch in zip(requests, found, strict=True):
                pixels[batch.indices] = batch.pixels
                missing.difference_update(batch.indices.tolist())
                bar.update(len(indices))
        if shown:
            seconds = time.perf_counter() - started
            tqdm.write(
                f"read {count - len(missing)} {what} images in {seconds:.1f} s: "
                f"{pixels.nbytes / 1e6:.1f} MB, kept on {self._device.type}"
            )
        labels = torch.tensor([label for _, label in files], device=self._device)
        return DeviceDataset(pixels, labels, missing)


def _is_kept(cache: str, side: int, nbytes: int, device: torch.device) -> bool:
    """Whether images of `side` pixels are kept on the device, by the value of --cache."""
    if side > _SMALL and cache == "on":
        raise TrainerError(
            f"--cache on keeps images of up to {_SMALL} pixels, not {side}: lower --image-size"
        )
    if side > _SMALL or cache != "auto":
        return cache == "on"
    on_gpu = device.type == "cuda"
    limit = torch.cuda.mem_get_info(device)[0] * _SHARE_OF_GPU if on_gpu else _BYTES_ON_CPU
    return nbytes <= limit


def _native_size(files: Files, bad_images: BadImages) -> int:
    """The largest side of small images, which are used as they are; 224 for others."""
    sample, found = _sample(files), set()
    for path, _ in sample:
        try:
            found.add(max(decode.sides(path)))
        except decode.BadImageError as error:
            bad_images.add(path, str(error))
    if not found:
        raise TrainerError(
            f"--data: none of {len(sample)} training images can be read, so their size is not "
            "known: set --image-size"
        )
    smallest, largest = min(found), max(found)
    side = max(largest, 8) if largest <= _SMALL else 224
    if smallest < largest and smallest <= _SMALL and bad_images.shown:
        tqdm.write(
            f"warning: the longer sides of {len(sample)} training images are from {smallest} to "
            f"{largest} pixels: all are resized to {side} (--image-size sets another)",
            file=sys.stderr,
        )
    return side


def _sample(files: Files) -> Files:
    """Some images of every class, the same in every run."""
    classes = [list(group) for _, group in groupby(files, key=itemgetter(1))]
    each = max(_SAMPLED // len(classes), 1)
    return [file for group in _spread(classes, _SAMPLED_CLASSES) for file in _spread(group, each)]


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most that many of the items, evenly spaced from the first on."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]
