"""A checkpoint file: written atomically, verified by a digest, loaded without executing code.

A file is a torch.save archive followed by the archive's digest. A run's state has a value for each
key of `_CONTENTS`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastlars.trainer.errors import TrainerError, one_line
from fastlars.trainer.output import atomic

_KIND = "fastlars.trainer checkpoint"
_FORMAT = f"{_KIND} 4"
# The previous format also had the states of random number generators, which no step draws from.
_LOADABLE = (_FORMAT, f"{_KIND} 3")
_DIGEST_MARK = b"fastlars digest "  # between the archive and its digest
_DIGEST_SIZE = 32  # bytes
_CONTENTS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "data": dict,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
    "average": (dict, type(None)),
    "progress": dict,
    "window": torch.Tensor,
    "log_lines": int,
}


class NotSavedError(Exception):
    """A checkpoint could not be written; the previous one is unchanged."""


@contextmanager
def not_saved(path: Path) -> Iterator[None]:
    """Turn an error while writing `path` into a NotSavedError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise NotSavedError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the system's message, which torch.save hides in the context of its RuntimeError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return one_line(error)


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state`; raise NotSavedError if that fails."""

    def fill(file: BinaryIO) -> None:
        hashed = _HashedFile(file)
        torch.save({"format": _FORMAT} | state, hashed)  # type: ignore[arg-type]
        file.write(_DIGEST_MARK + hashed.digest.digest())

    with not_saved(path):
        atomic.write(path, fill)


class _HashedFile:
    """Passes data on to a file and computes the digest of the data."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.blake2b(digest_size=_DIGEST_SIZE)

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def load(path: Path) -> dict[str, Any]:
    """Return the state saved at `path`; raise TrainerError if it is not an intact checkpoint."""
    with open_for_reading(path) as file:
        intact = _matches_digest(file)
        state = {} if intact is False else _read_archive(file)
    found = str(state.get("format"))
    if intact and found in _LOADABLE:
        return state
    if found.startswith(_KIND) and found not in _LOADABLE:
        raise TrainerError(f"--resume: {path} needs another version of fastlars: it is a {found}")
    raise TrainerError(f"--resume: {path} is damaged or not a checkpoint of this trainer")


def open_for_reading(path: Path) -> BinaryIO:
    """Open a regular file; raise TrainerError if `path` cannot be read or is something else."""
    try:
        # O_NONBLOCK: do not wait for the writer of a FIFO. It has no effect on a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise TrainerError(f"--resume: {path} is not a file")
        return open(descriptor, "rb")
    except OSError as error:
        raise TrainerError(f"--resume: cannot read {path}: {error.strerror}") from None


def _matches_digest(file: BinaryIO) -> bool | None:
    """Return whether every bit of a file is as `save` wrote it; None if the file has no digest.

    The archive's own checksums are not enough: they do not cover the archive's directory.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    left = max(os.fstat(file.fileno()).st_size - len(_DIGEST_MARK) - _DIGEST_SIZE, 0)
    while left and (part := file.read(min(left, 2**20))):
        digest.update(part)
        left -= len(part)
    end = file.read()
    file.seek(0)
    return end == _DIGEST_MARK + digest.digest() if end.startswith(_DIGEST_MARK) else None


def _read_archive(file: BinaryIO) -> dict[str, Any]:
    """Return the dict that torch.save wrote into a file; {} if there is none."""
    try:
        if not zipfile.is_zipfile(file):  # torch.load would try its older formats, and warn
            return {}
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        return state if isinstance(state, dict) else {}
    except MemoryError:
        raise
    except Exception:  # a damaged file makes pickle and torch raise almost any exception
        return {}


def check(state: dict[str, Any]) -> None:
    """Raise ValueError if `state` lacks something that a resumed run needs."""
    for key, kind in _CONTENTS.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{key} is missing or of the wrong type")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn an error about the contents of the checkpoint at `path` into a TrainerError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = one_line(error)
        raise TrainerError(f"--resume: {path} does not fit its model and recipe: {why}") from error
