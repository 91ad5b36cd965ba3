"""Which images a folder holds: train/ and val/ (or test/), with one folder a class.

Unlike torchvision's ImageFolder, this leaves out hidden files and folders (.ipynb_checkpoints,
._image.jpg), refuses links that lead round in a circle, and checks that both parts have the same
classes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from fastlars.trainer.errors import TrainerError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

Files = list[tuple[str, int]]  # path and label


def find(root: str) -> tuple[tuple[str, ...], Files, Files]:
    """Classes, training and test images of a folder; TrainerError if it is laid out otherwise."""
    names = _subfolders(Path(root))
    held_out = "val" if "val" in names else "test"
    for name, missing in (("train", "train/"), (held_out, "val/ or test/")):
        if name not in names:
            raise TrainerError(f"--data: {Path(root)} has no folder {missing}")
    train, test = Path(root, "train"), Path(root, held_out)
    classes, test_classes = _subfolders(train), _subfolders(test)
    if not classes:
        raise TrainerError(f"--data: {train} has no class folders")
    if classes != test_classes:
        name = min(set(classes) ^ set(test_classes))
        has, lacks = (train, test) if name in classes else (test, train)
        raise TrainerError(f"--data: class {name} is in {has} but not in {lacks}")
    return tuple(classes), _files(train, classes), _files(test, classes)


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        _refuse(error)


def _files(folder: Path, classes: list[str]) -> Files:
    files: Files = []
    for label, name in enumerate(classes):
        before = len(files)
        for place, subfolders, names in os.walk(folder / name, onerror=_refuse, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for subfolder in subfolders:
                _check_link(Path(place, subfolder))
            files += [
                (os.path.join(place, file), label)
                for file in sorted(names)
                if file.lower().endswith(_SUFFIXES) and not file.startswith(".")
            ]
        if len(files) == before:
            kinds = ", ".join(_SUFFIXES)
            raise TrainerError(f"--data: class folder {folder / name} has no images ({kinds})")
    return files


def _check_link(folder: Path) -> None:
    """Refuse a link to a folder that contains the link: its images would be listed many times."""
    if folder.is_symlink() and os.path.realpath(folder) in map(os.path.realpath, folder.parents):
        raise TrainerError(f"--data: {folder} leads back to a folder that it is in")


def _refuse(error: OSError) -> NoReturn:
    raise TrainerError(f"--data: cannot read {error.filename}: {error.strerror}")
