"""Checkpoints that a kill or a full disk cannot destroy, and that load without running code."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fastlars.trainer.errors import TrainerError, one_line
from fastlars.trainer.output import atomic

NAME = "checkpoint.pt"
NUMBERED = "checkpoint-*.pt"  # those that --keep-last keeps, by step
_KIND = "fastlars.trainer checkpoint"
_FORMAT, _BEFORE = f"{_KIND} 3", f"{_KIND} 2"  # which had no digest
_MARK = b"fastlars digest "  # after the archive, and before the digest of all that is before it
_DIGEST = 32  # bytes
# What is in the checkpoint of a run.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "data": dict,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
    "average": (dict, type(None)),
    "progress": dict,
    "window": torch.Tensor,
    "random": list,
    "log_lines": int,
}


class NotSavedError(Exception):
    """The checkpoint could not be written; the previous one is as it was."""


@contextmanager
def not_saved(path: Path) -> Iterator[None]:
    """What a disk refuses becomes a NotSavedError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise NotSavedError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The system's word; torch's writer raises a RuntimeError of its own on top of it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            return below.strerror
        below = below.__context__
    return one_line(error)


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state`, whole or not at all."""

    def fill(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        torch.save({"format": _FORMAT} | state, hashed)  # type: ignore[arg-type]
        file.write(_MARK + hashed.digest.digest())

    with not_saved(path):
        atomic.write(path, fill)


class _Hashed:
    """A file to write to, and the digest of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.blake2b(digest_size=_DIGEST)

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def load(path: Path) -> dict[str, Any]:
    """The state saved at `path`; TrainerError where there is none."""
    with readable(path) as file:
        sound = _is_sound(file)
        state = _read(file, checked=sound is True) if sound is not False else None
    found = state.get("format") if isinstance(state, dict) else None
    known = (_FORMAT,) if sound else (_BEFORE,)
    if isinstance(found, str) and found.startswith(_KIND) and found not in (_FORMAT, _BEFORE):
        raise TrainerError(f"--resume: {path} is of another version of fastlars: go on with that")
    if not isinstance(state, dict) or found not in known:
        raise TrainerError(f"--resume: {path} is damaged or not a checkpoint of this trainer")
    return state


def readable(path: Path) -> BinaryIO:
    """The file at `path`, open for reading; TrainerError where that is not possible."""
    try:
        # Without waiting for a writer of a FIFO; of a regular file the flag means nothing.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise TrainerError(f"--resume: {path} is no file")
        return open(descriptor, "rb")
    except OSError as error:
        raise TrainerError(f"--resume: cannot read {path}: {error.strerror}") from None


def _is_sound(file: BinaryIO) -> bool | None:
    """Whether a file is what `save` wrote, to the bit; None where it has no digest.

    The checksums in the archive would not do: they do not cover its directory.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST)
    left = max(os.fstat(file.fileno()).st_size - len(_MARK) - _DIGEST, 0)
    while left and (part := file.read(min(left, 2**20))):
        digest.update(part)
        left -= len(part)
    end = file.read()
    file.seek(0)
    return end == _MARK + digest.digest() if end.startswith(_MARK) else None


def _read(file: BinaryIO, *, checked: bool) -> Any:
    """What torch.save wrote into a file; None where that cannot be read.

    Without a digest that was `checked`, the archive's checksums are: torch.load does not do it.
    """
    try:
        if not checked:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return None
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # of a damaged file, zipfile, pickle and torch raise almost anything
        return None


def check(state: dict[str, Any]) -> None:
    """Raise ValueError unless `state` has all that a run goes on from."""
    for key, kind in _KINDS.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{key} is missing, or not what it should be")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """States of the checkpoint at `path` that do not fit each other become a TrainerError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TrainerError(
            f"--resume: {path} does not fit the model and the recipe that it names: "
            f"{one_line(error)}"
        ) from error


def random_state() -> dict[str, Any]:
    """The state of every generator that code of this process may draw from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, numbers, normal = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        # Asking for it would set up a GPU that a run on the CPU does not touch.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (kind, [int(key) for key in keys], *rest),
        "python": (version, list(numbers), normal),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every generator to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, normal = state["python"]
    random.setstate((version, tuple(numbers), normal))
