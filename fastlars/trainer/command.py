"""What every command of the trainer does around its work: it ends with a line and a status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from fastlars.trainer import console, failures, signals
from fastlars.trainer.errors import TrainerError


def run(program: str, load: Callable[[], Callable[[], int]]) -> int:
    """Import what the work needs, then do it; the exit status.

    Args:
        program: the name that lines of errors begin with.
        load: imports, and returns the work.
    """
    # torch's sockets would add stacks of their C++ to what we say of a lost process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    failures.folder = Path()
    with console.guarded():
        try:
            with signals.leaving():
                work = load()
            with signals.raising():
                return work()
        except SystemExit:  # --help
            raise
        except BaseException as error:
            return _tell(program, error)


def end(status: int) -> None:
    """End the process: all is done and told, and a Ctrl-C from here on only hurries Python."""
    signals.default()
    sys.exit(status)


def _tell(program: str, error: BaseException) -> int:
    text, status = failures.told(error)
    # Of processes that all fail alike only the first one says so.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    alone = alone or not (isinstance(error, TrainerError) and error.everywhere)
    if alone or os.environ.get("RANK", "0") == "0":
        said = text if isinstance(error, KeyboardInterrupt) else f"error: {text}"
        print(f"{program}: {said}", file=sys.stderr, flush=True)
    return status
