"""Folders of images in ImageNet's layout: train/ and val/ (or test/), one folder a class."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from fastlars.trainer import transforms
from fastlars.trainer.data import Batch
from fastlars.trainer.errors import TrainerError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_SMALL = 64
_LARGE = 224
# Mean and deviation of ImageNet's channels, on the scale of bytes.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)

Key = tuple[int | None, int]  # epoch, None for a test image; index


@dataclass(frozen=True)
class _BadImage:
    """Sent instead of a batch: an exception would lose its type on the way from a worker."""

    text: str


class Folder:
    """Images that worker processes read from files."""

    def __init__(
        self, root: str, image_size: int, seed: int, workers: int, device: torch.device
    ) -> None:
        self.name = root
        train, test = _folders(Path(root))
        self.classes = _classes(train, test)
        train_files = _files(train, self.classes)
        test_files = _files(test, self.classes)
        self.train_size, self.test_size = len(train_files), len(test_files)
        self.image_size = image_size or _native_size(train_files[0][0])
        self.stem = "small" if self.image_size <= _SMALL else "imagenet"
        self._train = _Images(train_files, self.image_size, seed)
        self._test = _Images(test_files, self.image_size, seed)
        self._workers, self._device = workers, device

    def train(self, batches: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        """Augmented by epoch and image, whatever worker or process reads it."""
        return self._load(self._train, (
            [(epoch, index) for index in indices.tolist()] for epoch, indices in batches
        ))  # fmt: skip

    def test(self, batches: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """The images' centres."""
        return self._load(
            self._test, ([(None, index) for index in indices.tolist()] for indices in batches)
        )

    def _load(self, images: _Images, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        loader = DataLoader(
            images,
            batch_sampler=keys,
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_worker_signals,
            # Without one of its own the loader draws from the global generator, and a resumed run
            # would no longer be where the undisturbed one is.
            generator=torch.Generator(),
        )
        mean = torch.tensor(_MEAN, device=self._device).view(1, 3, 1, 1)
        std = torch.tensor(_STD, device=self._device).view(1, 3, 1, 1)
        for batch in loader:
            if isinstance(batch, _BadImage):
                raise TrainerError(batch.text)
            pixels, labels = (part.to(self._device, non_blocking=True) for part in batch)
            # Rows of pixels of three bytes, read as channels first, are channels_last.
            yield (pixels.permute(0, 3, 1, 2).float() - mean) / std, labels


class _Images(Dataset[tuple[torch.Tensor, int] | _BadImage]):
    """Reads one image; picklable, for workers that are not forked."""

    def __init__(self, files: Sequence[tuple[str, int]], size: int, seed: int) -> None:
        self._files, self._size, self._seed = files, size, seed

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int] | _BadImage:
        epoch, index = key
        path, label = self._files[index]
        try:
            with Image.open(path) as image:
                colour = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return _BadImage(f"cannot read image {path}: {_reason(error)}")
        if epoch is None:
            return transforms.centre(colour, self._size), label
        name = f"{self._seed}/{epoch}/{index}"
        if self._size <= _SMALL:
            return transforms.shift_and_flip(colour, self._size, name), label
        return transforms.crop_and_flip(colour, self._size, name), label


def _collate(
    items: list[tuple[torch.Tensor, int] | _BadImage],
) -> tuple[torch.Tensor, torch.Tensor] | _BadImage:
    pixels, labels = [], []
    for item in items:
        if isinstance(item, _BadImage):
            return item
        pixels.append(item[0])
        labels.append(item[1])
    return torch.stack(pixels), torch.tensor(labels)


def _worker_signals(_worker: int) -> None:
    # Ctrl-C reaches workers too, but the training process decides; it ends them with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged"
    return str(error)


def _refuse(error: OSError) -> NoReturn:
    raise TrainerError(f"--data: cannot read {error.filename}: {error.strerror}")


def _folders(root: Path) -> tuple[Path, Path]:
    names = {path.name for path in _subfolders(root)}
    held_out = next((name for name in ("val", "test") if name in names), None)
    if "train" not in names or held_out is None:
        missing = "train/" if "train" not in names else "val/ or test/"
        raise TrainerError(f"--data: {root} has no folder {missing}")
    return root / "train", root / held_out


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError as error:
        _refuse(error)
    return sorted(path for path in found if not path.name.startswith("."))


def _classes(train: Path, test: Path) -> tuple[str, ...]:
    names, test_names = ({path.name for path in _subfolders(part)} for part in (train, test))
    for folder, there in ((train, names), (test, test_names)):
        if not there:
            raise TrainerError(f"--data: {folder} has no class folders")
    if names != test_names:
        name = min(names ^ test_names)
        has, lacks = (train, test) if name in names else (test, train)
        raise TrainerError(f"--data: class {name} is in {has} but not in {lacks}")
    return tuple(sorted(names))


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        before = len(files)
        for place, subfolders, names in os.walk(folder / name, onerror=_refuse, followlinks=True):
            subfolders.sort()
            files += [
                (os.path.join(place, file), label)
                for file in sorted(names)
                if file.lower().endswith(_SUFFIXES)
            ]
        if len(files) == before:
            raise TrainerError(f"--data: class folder {folder / name} has no images")
    return files


def _native_size(path: str) -> int:
    """The side of small images, which are used as they are; 224 for others."""
    try:
        with Image.open(path) as image:
            longest = max(image.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainerError(f"cannot read image {path}: {_reason(error)}") from None
    return max(longest, 8) if longest <= _SMALL else _LARGE
