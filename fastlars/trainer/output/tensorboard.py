"""A run's records as TensorBoard's event files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlars.trainer.errors import TrainerError, reason
from fastlars.trainer.output.records import Record
from fastlars.trainer.process import packages

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
    packages.load("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise TrainerError(f"--tensorboard: {folder} is no folder")


class TensorBoard:
    """Curves of loss, accuracy, learning rate, speed and trust ratios.

    Args:
        folder: where the event files go.
        step: the step that the run goes on from; what an earlier part of it wrote about later steps
            is not shown any more.
        warn: what to do with a line that says why nothing more is shown.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._warn = folder, warn
        self._writer: Any = _Nothing()
        with self._optional():
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def record(self, record: Record) -> None:
        """Show one record."""
        kind, step = record["kind"], record.get("step", 0)
        shown = {tag: record[key] for (k, key), tag in _SCALARS.items() if k == kind}
        if kind == "trust":
            shown = {f"trust_ratio/{name}": ratio for name, ratio in record["ratios"].items()}
        with self._optional() as writer:
            if kind == "start":
                writer.add_text("run", record["title"])
            for tag, value in shown.items():
                if value is not None:
                    writer.add_scalar(tag, value, step)

    def sync(self) -> None:
        """Have all on the disk that a checkpoint counts on."""
        with self._optional() as writer:
            writer.flush()

    def close(self) -> None:
        """No more records."""
        with self._optional() as writer:
            writer.close()
            self._writer = _Nothing()

    @contextmanager
    def _optional(self) -> Iterator[Any]:
        """Gives the board up where it cannot be written: the run is worth more.

        SummaryWriter writes in a thread; its error, of any class, is raised by the next call.
        """
        try:
            yield self._writer
        except Exception as error:
            self._writer = _Nothing()
            why = reason(error)
            self._warn(f"no more TensorBoard in {self._folder}: {why}")


class _Nothing:
    """A writer that was given up."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_arguments: None
