"""The directory of a run: which one, whether it can be written, and what to take back.

A path that cannot even be looked at is one that is not there, which os.path says of it and pathlib
only from Python 3.14 on; writing or reading it then says what is wrong.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fastlars.trainer import checkpoint
from fastlars.trainer.distributed import may_restart
from fastlars.trainer.errors import TrainerError

_DEFAULT = Path("runs")


class RunDirectory:
    """Paths of a run's files. Nothing is created before `claim`.

    Args:
        path: the directory.
        came_from: the checkpoint that the run goes on from.
    """

    def __init__(self, path: Path, came_from: Path | None = None) -> None:
        self.path, self.came_from = path, came_from
        self.checkpoint = path / checkpoint.NAME
        self.best = path / "best.pt"
        self.settings = path / "run.json"
        self.log = path / "metrics.jsonl"
        self.picture = path / "curves.png"
        self._made: list[Path] = []

    def claim(self) -> None:
        """Create the directory; TrainerError where no file can be written in it."""
        missing = [p for p in (self.path, *self.path.parents) if not os.path.exists(p)]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                self._made.insert(0, folder)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            self.discard()
            raise TrainerError(f"--output: cannot write in {self.path}: {error.strerror}") from None

    def discard(self) -> None:
        """Without a checkpoint a run is worth nothing: take back what it wrote."""
        if os.path.exists(self.checkpoint):
            return
        if os.path.isdir(self.path):
            for file in (self.settings, self.log, self.picture):
                file.unlink(missing_ok=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # somebody else's files are in it
                return
        self._made = []


def new(output: str, data: str, recipe: str) -> RunDirectory:
    """Where a new run writes: `output`, or the next free name under runs/."""
    if output:
        run = RunDirectory(Path(output))
        if os.path.exists(run.checkpoint) or os.path.exists(run.best):
            raise TrainerError(
                f"--output: {output} holds a run already: add --resume to go on with it, "
                "or name another directory"
            )
        return run
    if may_restart():
        raise TrainerError("--max-restarts needs --output, for a restarted run to find itself")
    name = f"{Path(data).resolve().name if data != 'digits' else data}-{recipe}"
    number = 1
    while (_DEFAULT / f"{name}-{number}").exists():
        number += 1
    return RunDirectory(_DEFAULT / f"{name}-{number}")


def going_on(source: Path, output: str) -> RunDirectory:
    """Where a run writes that goes on from a checkpoint: `output`, or beside it."""
    return RunDirectory(Path(output) if output else source.parent, came_from=source)


def to_resume(resume: str | None, output: str, restarted: bool) -> Path | None:
    """The checkpoint to go on from, if any.

    Args:
        resume: what --resume names: a file, a run directory, "" for the one in `output`, "auto" for
            that one if it is there, or None.
        output: what --output names, "" for nothing.
        restarted: whether torchrun started the run again.
    """
    if resume and resume != "auto":
        path = Path(resume)
        return path / checkpoint.NAME if os.path.isdir(path) else path
    in_output = Path(output) / checkpoint.NAME if output else None
    if resume is not None and in_output is None:
        what = "auto needs" if resume else "needs the PATH of a checkpoint, or"
        raise TrainerError(f"--resume {what} --output with one in it")
    # torchrun repeats the command line as it was: a restart means going on.
    if resume == "auto" or (resume is None and restarted):
        return in_output if in_output is not None and os.path.exists(in_output) else None
    return in_output if resume is not None else None
