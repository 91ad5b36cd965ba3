"""Which images a folder holds: train/ and val/ (or test/), one folder a class.

What is hidden, by a dot, is left out at every depth: what systems and editors keep next to images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from fastlars.trainer.errors import TrainerError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

Files = list[tuple[str, int]]  # path and label


class Listing(NamedTuple):
    """The image files below a folder."""

    classes: tuple[str, ...]
    train: Files
    test: Files


def find(root: str) -> Listing:
    """The images below `root`; TrainerError where the folder is not laid out as it must be."""
    train, test = _folders(Path(root))
    classes = _classes(train, test)
    return Listing(classes, _files(train, classes), _files(test, classes))


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
    return sorted(path for path in found if not _hidden(path.name))


def _hidden(name: str) -> bool:
    return name.startswith(".")


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


def _files(folder: Path, classes: Sequence[str]) -> Files:
    files: Files = []
    for label, name in enumerate(classes):
        before = len(files)
        for place, subfolders, names in os.walk(folder / name, onerror=_refuse, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
            for subfolder in subfolders:
                _check_link(Path(place, subfolder))
            files += [
                (os.path.join(place, file), label)
                for file in sorted(names)
                if file.lower().endswith(_SUFFIXES) and not _hidden(file)
            ]
        if len(files) == before:
            kinds = ", ".join(_SUFFIXES)
            raise TrainerError(f"--data: class folder {folder / name} has no images ({kinds})")
    return files


def _check_link(folder: Path) -> None:
    """Refuse a link to a folder that it is in: its images would be there many times over."""
    if folder.is_symlink() and os.path.realpath(folder) in map(os.path.realpath, folder.parents):
        raise TrainerError(f"--data: {folder} leads back to a folder that it is in")


def _refuse(error: OSError) -> NoReturn:
    raise TrainerError(f"--data: cannot read {error.filename}: {error.strerror}")
