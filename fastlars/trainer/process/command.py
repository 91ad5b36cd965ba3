"""What every command of the trainer does around its work: it ends with a line and a status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.process import console, failures, signals


def run(program: str, load: Callable[[], Callable[[], int]]) -> int:
    """Import what the work needs, then do it; the exit status.

    Args:
        program: the name that lines of errors begin with.
        load: imports, and returns the work.
    """
    # Without this, torch's C++ prints its own stack trace next to our one line.
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
    """End the process. Everything is written by now, so Ctrl-C may kill it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _tell(program: str, error: BaseException) -> int:
    text, status = failures.message_and_status(error)
    # Of processes that all fail alike only the first one says so.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    alone = alone or not (isinstance(error, TrainerError) and error.everywhere)
    if alone or os.environ.get("RANK", "0") == "0":
        said = text if isinstance(error, KeyboardInterrupt) else f"error: {text}"
        print(f"{program}: {said}", file=sys.stderr, flush=True)
    return status
