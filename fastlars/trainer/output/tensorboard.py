"""Writes the records of a run as TensorBoard event files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlars.trainer.errors import TrainerError, reason_of
from fastlars.trainer.process import packages

# (kind of record, key of the value) to the tag that TensorBoard shows it under.
_TAGS = {
    ("train", "loss"): "loss/training",
    ("train", "accuracy"): "accuracy/training",
    ("train", "lr"): "learning_rate",
    ("train", "images_per_second"): "images_per_second",
    ("test", "loss"): "loss/test",
    ("test", "accuracy"): "accuracy/test",
}


def check(folder: Path) -> None:
    """Raise TrainerError if event files cannot be written in `folder`."""
    packages.load("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise TrainerError(f"--tensorboard: {folder} is not a folder")


class TensorBoard:
    """Curves of loss, accuracy, learning rate, speed and trust ratios.

    TensorBoard discards what an earlier part of the run wrote about steps after `step`. `warn` is
    called with the reason if the event files cannot be written any more.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._warn = folder, warn
        self._writer: Any = None  # also after an error
        with self._optional():
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def record(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            return
        kind = record["kind"]
        with self._optional():
            if kind == "start":
                self._writer.add_text("run", record["title"])
            values = {tag: record[key] for (of, key), tag in _TAGS.items() if of == kind}
            if kind == "trust":
                values = {f"trust_ratio/{name}": ratio for name, ratio in record["ratios"].items()}
            for tag, value in values.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, record["step"])

    def sync(self) -> None:
        if self._writer is not None:
            with self._optional():
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._optional():
                self._writer.close()

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """Turn an error into a warning and write nothing more: the run must not end for it.

        SummaryWriter writes in a thread. An error there can have any class, ends the thread, and is
        raised by a later call.
        """
        try:
            yield
        except Exception as error:
            self._writer = None
            self._warn(f"no more TensorBoard in {self._folder}: {reason_of(error)}")
