"""Files that are whole or not there, whatever ends the writing."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


def write(path: Path, fill: Callable[[BinaryIO], object], partial: Path | None = None) -> None:
    """Replace the file at `path` by what `fill` writes.

    The new one is written next to it and is on the disk before it takes the name. `partial` is its
    name until then.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            fill(file)
            file.flush()
            sync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """Have a file on the disk, where its file system knows what that means."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _sync_folder(folder: Path) -> None:
    """Have a renaming on the disk, or a power cut could undo it.

    Many network file systems do not know of it. The file is whole under its new name already, so
    that an error here would report a failure that did not happen.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
