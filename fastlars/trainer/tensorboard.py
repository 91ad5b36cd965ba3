"""A run's records as TensorBoard's event files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlars.trainer.checkpoint import NotSavedError
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.log import Record

# Kind of record and name of value: where TensorBoard shows it.
_SCALARS = {
    ("train", "loss"): "loss/training",
    ("train", "accuracy"): "accuracy/training",
    ("train", "lr"): "learning_rate",
    ("train", "images_per_second"): "images_per_second",
    ("test", "loss"): "loss/test",
    ("test", "accuracy"): "accuracy/test",
}


def check(folder: Path) -> None:
    """Raise TrainerError where event files cannot be written in `folder`."""
    try:
        import torch.utils.tensorboard  # noqa: F401 - whether it can be had
    except ImportError:
        text = "--tensorboard: tensorboard is not installed: pip install 'fastlars[trainer]'"
        raise TrainerError(text) from None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise TrainerError(f"--tensorboard: {folder} is no folder")


class TensorBoard:
    """Curves of loss, accuracy, learning rate, speed and trust ratios.

    Args:
        folder: where the event files go.
        step: the step that the run goes on from; what an earlier part of it wrote about later steps
            is not shown any more.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with self._telling():
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def record(self, record: Record) -> None:
        """Show one record."""
        kind, step = record["kind"], record.get("step", 0)
        shown = {tag: record[key] for (k, key), tag in _SCALARS.items() if k == kind}
        if kind == "trust":
            shown = {f"trust_ratio/{name}": ratio for name, ratio in record["ratios"].items()}
        with self._telling():
            if kind == "start":
                self._writer.add_text("run", record["title"])
            for tag, value in shown.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)

    def sync(self) -> None:
        """Have all on the disk that a checkpoint counts on."""
        try:
            self._writer.flush()
        except OSError as error:
            raise NotSavedError(f"cannot write in {self._folder}: {error.strerror}") from error

    def close(self) -> None:
        """No more records."""
        with self._telling():
            self._writer.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainerError(f"cannot write in {self._folder}: {error.strerror}") from error
