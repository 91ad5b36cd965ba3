"""Atomic replacement of files: an interrupted write never leaves part of a file under its name."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Replace the file at `path` by one that `fill` writes; on any error, `path` is unchanged."""
    partial = path.with_name(f".{path.name}.partial")
    with _renamed(partial, path):
        _write_to_disk(partial, fill)


def write_table(rows: Iterable[Iterable[Any]], path: Path) -> None:
    """Write rows of comma-separated values; None becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write(path, lambda file: file.write(text.getvalue().encode()))


def duplicate(source: Path, path: Path) -> None:
    """Make `path` a hard link to `source`, or a copy where the file system has no hard links.

    Either way, `path` keeps its content when `source` is replaced later.
    """
    # A fixed temporary name: a leftover from a killed run is removed by the next.
    partial = path.with_name(".duplicate.partial")
    partial.unlink(missing_ok=True)
    with _renamed(partial, path):
        try:
            os.link(source, partial)
        except OSError:
            with open(source, "rb") as file:
                _write_to_disk(partial, lambda copy: shutil.copyfileobj(file, copy))


def sync(descriptor: int) -> None:
    """Flush a file to disk, on file systems that support fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _write_to_disk(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    with open(path, "wb") as file:
        fill(file)
        file.flush()
        sync(file.fileno())


@contextmanager
def _renamed(partial: Path, path: Path) -> Iterator[None]:
    """Rename `partial`, which the context creates, to `path`; leave no `partial` in any case."""
    try:
        yield
        os.replace(partial, path)
    finally:  # also without an error: os.replace does nothing if both are links to one file
        partial.unlink(missing_ok=True)
    # Flush the directory entry: without it, a power cut could undo the rename. Many network file
    # systems do not support that. Errors are ignored, because the file is complete under its name.
    with suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
