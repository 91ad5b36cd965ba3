"""The directory of a run: which one, who has it, and whether it can be written.

os.path.exists, not Path.exists: of a path that may not be looked at, pathlib raises before Python
3.14. Reading or writing it later gives the reason.
"""

from __future__ import annotations

import glob
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output import checkpoint
from fastlars.trainer.output.lock import Lock, LockedError
from fastlars.trainer.process.world import may_restart

_DEFAULT = Path("runs")
_LONGEST_NAME = 100  # characters of the folder of images; file systems take 255 bytes in all


class RunDirectory:
    """Paths of a run's files. Nothing is created before `make` or `claim`.

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
        self.tensorboard = path / "tensorboard"
        self._lock = Lock(path / ".lock")
        self._made: list[Path] = []

    @property
    def holds_a_run(self) -> bool:
        """Whether there is a checkpoint of any kind."""
        numbered = glob.glob(checkpoint.NUMBERED, root_dir=self.path)
        return bool(numbered) or any(map(os.path.exists, (self.checkpoint, self.best)))

    def claim(self) -> str:
        """Create the directory and lock it; a warning where the lock may not hold, else "".

        Raises TrainerError where another run has it, or no file can be written in it.
        """
        try:
            self.make()
            problem = self._lock.take()
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except LockedError as error:
            raise TrainerError(f"--output: another run, {error}, writes in {self.path}") from None
        except OSError as error:
            self.release()
            raise _cannot_write(self.path, error) from None
        return problem and f"{problem}: let no other run write in {self.path}"

    @property
    def is_owned(self) -> bool:
        """Whether the directory is still there and locked by this process."""
        return self._lock.is_held()

    def make(self) -> bool:
        """Create the directory; whether it was not there, nor made by another run meanwhile."""
        made = False
        missing = [p for p in (self.path, *self.path.parents) if not os.path.exists(p)]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                folder.mkdir()
                self._made.insert(0, folder)
                made = folder == self.path
        return made

    def release(self) -> None:
        """Unlock the directory, and remove the folders that `claim` made if nothing is in them."""
        self._lock.give_back()
        with suppress(OSError):  # there are files in it
            for folder in self._made:
                folder.rmdir()
        self._made = []

    def forget(self) -> None:
        """Remove what an earlier run drew, of which a new run may draw only a part."""
        for name in ("trust", "norms"):
            for suffix in (".csv", ".png"):
                (self.path / name).with_suffix(suffix).unlink(missing_ok=True)
        self.picture.unlink(missing_ok=True)


def new(output: str, data: str, recipe: str) -> RunDirectory:
    """Where a new run writes, as `where` says."""
    run = where(output, data, recipe)
    if run.holds_a_run:
        raise TrainerError(
            f"--output: {output} holds a run already: add --resume to go on with it, "
            "or name another directory"
        )
    return run


def where(output: str, data: str, name: str) -> RunDirectory:
    """`output`, or the next free name under runs/, which is created before another run takes it."""
    for part in ("train", "val", "test") if output and data != "digits" else ():
        images = os.path.realpath(os.path.join(data, part))
        if Path(images) in (inside := Path(os.path.realpath(output)), *inside.parents):
            raise TrainerError(f"--output: {output} is inside the images of --data, in {images}")
    if output:
        return RunDirectory(Path(output))
    if may_restart():
        raise TrainerError("--max-restarts needs --output, for a restarted run to find itself")
    stem = f"{os.path.basename(os.path.realpath(data))[:_LONGEST_NAME]}-{name}"
    run, number = RunDirectory(_DEFAULT / f"{stem}-1"), 1
    try:
        while not run.make():
            number += 1
            run = RunDirectory(_DEFAULT / f"{stem}-{number}")
    except OSError as error:
        raise _cannot_write(run.path, error) from None
    return run


def _cannot_write(folder: Path, error: OSError) -> TrainerError:
    return TrainerError(f"--output: cannot write in {folder}: {error.strerror}")


def continuation_dir(source: Path, output: str) -> RunDirectory:
    """Where a run writes that goes on from a checkpoint: `output`, or where the checkpoint is."""
    checkpoint.readable(source).close()
    run = RunDirectory(Path(output) if output else source.parent, came_from=source)
    elsewhere = not os.path.exists(run.path) or not os.path.samefile(run.path, source.parent)
    if (elsewhere and run.holds_a_run) or (
        os.path.exists(run.checkpoint) and not run.checkpoint.samefile(source)
    ):
        raise TrainerError(f"--output: {run.path} holds another run than {source}")
    return run


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
