"""Files that are whole or not there, whatever ends the writing."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def write(path: Path, fill: Callable[[BinaryIO], object], partial: Path | None = None) -> None:
    """Replace the file at `path` by what `fill` writes.

    The new one is written beside it and is on the disk before it takes the name; the folder is
    synced too, or a power cut could undo the renaming. `partial` is its name until then.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_table(rows: Iterable[Iterable[Any]], path: Path) -> None:
    """Write rows of comma-separated values; None is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write(path, lambda file: file.write(text.getvalue().encode()))


def duplicate(source: Path, path: Path) -> None:
    """Have `path` hold what `source` does, also when `source` is replaced later.

    A second name of the same file; a copy on disks that have no such names.
    """
    # One name for all, and not one a step: what a kill leaves goes with the next one.
    partial = path.with_name(".duplicate.partial")
    partial.unlink(missing_ok=True)
    if path.exists() and path.samefile(source):
        return  # os.replace would leave both names of one file
    try:
        os.link(source, partial)
    except OSError:
        with open(source, "rb") as file:
            write(path, lambda copy: shutil.copyfileobj(file, copy), partial)
        return
    try:
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
