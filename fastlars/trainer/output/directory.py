"""The directory of a run: its files, its owner, and which directory a run writes in.

This module calls os.path.exists, not Path.exists, which before Python 3.14 raises if the path may
not be looked up. Reading or writing such a path later raises an error with the reason.
"""

from __future__ import annotations

import glob
import itertools
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output import checkpoint
from fastlars.trainer.output.lock import Lock, LockedError

NUMBERED = "checkpoint-*.pt"  # the checkpoints that --keep-last keeps; * is the step
_LONGEST_NAME = 100  # characters from the name of --data; file systems allow 255 bytes in all


class RunDirectory:
    """Paths of a run's files. Only `make` and `claim` create any.

    `came_from` is the checkpoint that the run resumes from.
    """

    def __init__(self, path: Path, came_from: Path | None = None) -> None:
        self.path, self.came_from = path, came_from
        self.checkpoint = path / "checkpoint.pt"
        self.best = path / "best.pt"
        self.settings = path / "run.json"
        self.log = path / "metrics.jsonl"
        self.picture = path / "curves.png"
        self.tensorboard = path / "tensorboard"
        self._lock = Lock(path / ".lock")
        self._made: list[Path] = []  # the innermost folder first

    @property
    def holds_a_run(self) -> bool:
        """Whether the directory contains a checkpoint, under any name."""
        numbered = glob.glob(NUMBERED, root_dir=self.path)
        return bool(numbered) or any(map(os.path.exists, (self.checkpoint, self.best)))

    def make(self) -> bool:
        """Create the directory and its parents; return whether this call created the directory."""
        missing = [p for p in (self.path, *self.path.parents) if not os.path.exists(p)]
        for folder in reversed(missing):
            with suppress(FileExistsError):  # another run created it in the meantime
                folder.mkdir()
                self._made.insert(0, folder)
        return self.path in self._made

    def claim(self) -> str:
        """Create and lock the directory; return a warning if the lock may be unreliable, or "".

        Raises TrainerError if another run holds the lock or no file can be written.
        """
        try:
            self.make()
            problem = self._lock.acquire()
            with tempfile.TemporaryFile(dir=self.path):  # a .lock may lie in a read-only directory
                pass
        except LockedError as error:
            raise TrainerError(f"--output: {self.path} is in use by {error}") from None
        except OSError as error:
            self.release()
            raise _cannot_write(self.path, error) from None
        return problem and f"{problem}: let no other run write in {self.path}"

    @property
    def is_owned(self) -> bool:
        """Whether the directory still exists and is locked by this process."""
        return self._lock.is_held()

    def release(self) -> None:
        """Unlock the directory, and remove the folders that `make` created if they are empty."""
        self._lock.release()
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()
        self._made = []

    def remove_old_pictures(self) -> None:
        """Remove pictures and tables of an earlier run: a new run may not draw all of them."""
        for name in (self.picture.name, "trust.csv", "trust.png", "norms.csv", "norms.png"):
            (self.path / name).unlink(missing_ok=True)


def for_new_run(output: str, data: str, recipe: str) -> RunDirectory:
    """Return `output_or_unused`; raise TrainerError if that directory holds a run already."""
    run = output_or_unused(output, data, recipe)
    if run.holds_a_run:
        raise TrainerError(f"--output: {output} holds a run already: add --resume, or name another")
    return run


def output_or_unused(output: str, data: str, name: str) -> RunDirectory:
    """Return `output`, or if it is "", the next unused runs/DATA-NAME-1, -2, ..., and create that.

    It is created at once, so that no other run takes its name. Raises TrainerError if `output` is
    inside the images of `data`.
    """
    for part in ("train", "val", "test") if output and data != "digits" else ():
        images = os.path.realpath(os.path.join(data, part))
        if Path(os.path.realpath(output)).is_relative_to(images):
            raise TrainerError(f"--output: {output} is inside the images of --data, in {images}")
    if output:
        return RunDirectory(Path(output))
    stem = f"runs/{os.path.basename(os.path.realpath(data))[:_LONGEST_NAME]}-{name}"
    runs = (RunDirectory(Path(f"{stem}-{number}")) for number in itertools.count(1))
    try:
        return next(run for run in runs if run.make())
    except OSError as error:
        raise _cannot_write(stem, error) from None


def checkpoint_path(resume: str | None, output: str, restarted: bool) -> Path | None:
    """Return the checkpoint to resume from; None for a new run.

    `resume` is --resume: a file, a run directory, "" for the checkpoint in `output`, "auto" for
    that one if it exists, or None if the flag is not given. `output` is --output, or "".
    """
    if resume and resume != "auto":
        path = Path(resume)
        return RunDirectory(path).checkpoint if os.path.isdir(path) else path
    if resume is not None and not output:
        what = "auto needs" if resume else "needs the PATH of a checkpoint, or"
        raise TrainerError(f"--resume {what} --output with one in it")
    latest = RunDirectory(Path(output)).checkpoint
    if resume == "":
        return latest
    # torchrun repeats the command line unchanged, so a restart without --resume continues the run.
    continues = resume == "auto" or (restarted and output)
    return latest if continues and os.path.exists(latest) else None


def continuation_dir(source: Path, output: str) -> RunDirectory:
    """Return the directory of a run resumed from `source`: `output`, or if "", that of `source`.

    Raises TrainerError if `source` cannot be read, or the directory holds another run.
    """
    checkpoint.open_for_reading(source).close()
    run = RunDirectory(Path(output) if output else source.parent, came_from=source)
    elsewhere = run.holds_a_run and not run.path.samefile(source.parent)
    if elsewhere or (os.path.exists(run.checkpoint) and not run.checkpoint.samefile(source)):
        raise TrainerError(f"--output: {run.path} holds a different run than {source}")
    return run


def _cannot_write(folder: Path | str, error: OSError) -> TrainerError:
    return TrainerError(f"--output: cannot write in {folder}: {error.strerror}")
