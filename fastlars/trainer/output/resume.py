"""--resume: which checkpoint a run resumes from, and which directory it then writes in."""

from __future__ import annotations

import os
from pathlib import Path

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.output import checkpoint
from fastlars.trainer.output.directory import RunDirectory


def checkpoint_path(resume: str | None, output: str, restarted: bool) -> Path | None:
    """The checkpoint to resume from; None for a new run.

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
    """The directory of a run that resumes from the checkpoint `source`: `output`, or that of it.

    Raises TrainerError if `source` cannot be read, or the directory holds another run.
    """
    checkpoint.open_for_reading(source).close()
    run = RunDirectory(Path(output) if output else source.parent, came_from=source)
    elsewhere = run.holds_a_run and not run.path.samefile(source.parent)
    if elsewhere or (os.path.exists(run.checkpoint) and not run.checkpoint.samefile(source)):
        raise TrainerError(f"--output: {run.path} holds another run than {source}")
    return run
