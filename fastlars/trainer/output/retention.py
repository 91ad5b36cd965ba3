"""Which checkpoints of a run are kept: the latest ones and the best one."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output import atomic, checkpoint
from fastlars.trainer.output.directory import NUMBERED, RunDirectory


class Retention:
    """The checkpoints in a run's directory.

    checkpoint.pt is always the latest one. If more than one is to be kept, the `last` ones also
    have numbered names, such as checkpoint-000123.pt of step 123. best.pt is the one with the
    highest test accuracy. A checkpoint with several names takes the space of one, on file systems
    with hard links.
    """

    def __init__(self, run: RunDirectory, last: int) -> None:
        self._run, self._last = run, last
        self._adopt_from = run.came_from

    def save(self, state: dict[str, Any], step: int, *, best: bool) -> None:
        """Save a state; remove older checkpoints only when the new one has all its names.

        Raises NotSavedError if the disk is full or fails; the other checkpoints are unchanged.
        """
        checkpoint.save(self._run.checkpoint, state)
        self.add_names(step, best=best)

    def add_names(self, step: int, *, best: bool) -> None:
        """Give checkpoint.pt its other names and remove old numbered checkpoints.

        A resumed run calls this too, in case a kill came between the saving and the naming.
        """
        names = [self._run.path / f"checkpoint-{step:06}.pt"] if self._last > 1 else []
        for path in (*names, self._run.best) if best else names:
            with checkpoint.not_saved(path):
                atomic.duplicate(self._run.checkpoint, path)
        # With --keep-last 1, the default, older ones stay: the run may have been resumed without
        # the --keep-last that it was started with. A user's checkpoint-mine.pt stays in any case.
        paths = self._run.path.glob(NUMBERED) if self._last > 1 else []
        numbered = (path for path in paths if re.fullmatch(r"checkpoint-\d{6,}", path.stem))
        for path in sorted(numbered, key=lambda path: int(path.stem.split("-")[1]))[: -self._last]:
            with checkpoint.not_saved(path):
                path.unlink(missing_ok=True)

    def adopt_best(self, progress: dict[str, Any]) -> None:
        """On the first call, copy best.pt from the directory that the run resumed from, if any.

        A best.pt that does not match the run's `progress` was saved after the checkpoint that the
        run resumed from, and is not part of this run.
        """
        source, self._adopt_from = self._adopt_from, None
        if source is None or self._run.best.exists():
            return
        best = source.with_name(self._run.best.name)
        with suppress(TrainerError), checkpoint.not_saved(self._run.best):  # missing or damaged
            found = checkpoint.load(best).get("progress", {})
            if all(found.get(key) == progress[key] for key in ("best_epoch", "best_accuracy")):
                atomic.duplicate(best, self._run.best)
