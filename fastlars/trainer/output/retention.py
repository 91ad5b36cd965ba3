"""Which checkpoints of a run are kept: the latest ones and the best one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output import atomic, checkpoint
from fastlars.trainer.output.directory import RunDirectory

_STEP = re.compile(r"checkpoint-(\d{6,})\.pt")


class Retention:
    """The checkpoints in one run's directory.

    checkpoint.pt is always the latest. Of more than one to keep, the latest ones are there by
    number too: checkpoint-000123.pt of step 123. best.pt is that of the highest test accuracy.
    These are further names of what checkpoint.pt was, and take no room beyond the files' own.

    Args:
        run: the run's directory.
        last: how many of the latest to keep, at least 1.
    """

    def __init__(self, run: RunDirectory, last: int) -> None:
        self._run, self._last = run, last
        self._before = run.came_from

    def save(self, state: dict[str, Any], step: int, *, best: bool) -> None:
        """Save a state; only when it has all its names is an older one given up.

        Raises NotSavedError where the disk is full or fails; the others are as they were.
        """
        checkpoint.save(self._run.checkpoint, state)
        self.name(step, best=best)

    def name(self, step: int, *, best: bool) -> None:
        """Give checkpoint.pt its other names, unless it has them, and prune.

        Where a kill came between a checkpoint and its names, a resumed run makes up for it.
        """
        names = [self._run.path / f"checkpoint-{step:06}.pt"] if self._last > 1 else []
        for path in (*names, self._run.best) if best else names:
            with checkpoint.not_saved(path):
                atomic.duplicate(self._run.checkpoint, path)
        # With 1, the default, a resumed run must not give up what it was once asked to keep.
        for path in self._numbered()[: -self._last] if self._last > 1 else []:
            with checkpoint.not_saved(path):
                path.unlink(missing_ok=True)

    def bring(self, progress: dict[str, Any]) -> None:
        """Take over the best checkpoint of the directory that the run comes from, if it has one.

        Args:
            progress: the run's. A better checkpoint made after the one it goes on from is not its.
        """
        source, self._before = self._before, None
        best = source.with_name(self._run.best.name) if source else None
        if best is None or self._run.best.exists() or not best.exists():
            return
        try:
            its = checkpoint.load(best).get("progress", {})
        except TrainerError:  # damaged
            return
        if all(its.get(key) == progress[key] for key in ("best_epoch", "best_accuracy")):
            with checkpoint.not_saved(self._run.best):
                atomic.duplicate(best, self._run.best)

    def _numbered(self) -> list[Path]:
        """In the order of steps."""
        numbered = self._run.path.glob(checkpoint.NUMBERED)
        found = [(_STEP.fullmatch(path.name), path) for path in numbered]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]
