"""The one line and the exit status for an exception that ended the trainer."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from fastlars.trainer.errors import TrainerError, one_line, printable
from fastlars.trainer.process.signals import Interrupted

# Errors of the system whose text is enough without a file's name.
_SURROUNDINGS = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EIO", "EROFS", "ENOMEM", "EFBIG", "EAGAIN",
        "ESTALE", "ENODEV", "ENOSYS", "EACCES", "EPERM", "ETIMEDOUT", "EHOSTUNREACH", "ENETDOWN",
    )
}  # fmt: skip
FILES = "raise the limit of open files (ulimit -n), or lower --workers"
_HINTS = {
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.EAGAIN: "is there a limit of processes (ulimit -u)?",
}
_MEMORY = "lower --micro-batch, --image-size or --workers"

# Where a trace is kept: a run's directory, once it has one.
folder = Path()


def message_and_status(error: BaseException) -> tuple[str, int]:
    """The line, and the exit status: 128 + n for signal n, 2 for what a user can put right, 1."""
    if isinstance(error, TrainerError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        text = f"stopped by {number.name}; the last checkpoint, if any, is unchanged"
        return text, 128 + number
    foreseen = _of_surroundings(error)
    if foreseen is not None:
        return printable(foreseen), 2
    text = f"internal error: {type(error).__name__}: {one_line(error)}"
    return printable(f"{text}; {_keep(error)}"), 1


def reason(error: Exception) -> str:
    """What an error says; one of the system with the file's name, if it has one, and a cure."""
    if not isinstance(error, OSError):
        return one_line(error)
    text = error.strerror or one_line(error)
    named = f"{os.fsdecode(error.filename)}: {text}" if error.filename else text
    hint = _HINTS.get(error.errno or 0)
    return printable(f"{named}: {hint}" if hint else named)


def short_of_files(text: str) -> bool:
    """Whether the text of an error says that no more files can be opened."""
    return "Too many open files" in text or "ancdata" in text  # which carries open files


def _of_surroundings(error: BaseException) -> str | None:
    """The line for an exception that the machine caused; None for all others."""
    text = one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory: {_MEMORY}"
    if isinstance(error, OSError):
        known = error.filename is not None or error.errno in _SURROUNDINGS
        return reason(error) if known else _by_text(text)
    # torch has one class for nearly all errors: those of its allocators are known by their text.
    return _by_text(text) if isinstance(error, RuntimeError) else None


def _by_text(text: str) -> str | None:
    if any(words in text for words in ("out of memory", "llocate memory", "failed to map")):
        return f"out of memory: {_MEMORY} ({text})"
    if short_of_files(text):
        return f"{text}: {FILES}"
    if "can't start new thread" in text:
        return f"{text}: {_HINTS[errno.EAGAIN]}"
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return text
    return None


def _keep(error: BaseException) -> str:
    """Write the trace to a file; where it is. It goes to standard error where no file can be."""
    trace = "".join(traceback.format_exception(error))
    name = f"fastlars-trainer-{os.getpid()}.log"
    for place in (folder, Path(), Path(tempfile.gettempdir())):
        path = place / name
        try:
            path.write_text(trace, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return f"the trace is in {path}; please report it"
    sys.stderr.write(trace)
    return "please report it with the trace above"
