"""How a command of the trainer ends: one line for the user, one exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlars.trainer.errors import (
    FILE_LIMIT_HINT,
    PROCESS_LIMIT_HINT,
    TrainerError,
    hits_file_limit,
    one_line,
    printable,
    reason_of,
)
from fastlars.trainer.process import console, signals

# System errors that the machine causes even where no file is named.
_MACHINE_ERRORS = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EIO", "EROFS", "ENOMEM", "EFBIG", "EAGAIN",
        "ESTALE", "ENODEV", "ENOSYS", "EACCES", "EPERM", "ETIMEDOUT", "EHOSTUNREACH", "ENETDOWN",
    )
}  # fmt: skip
_TRACE_FOLDER = "_fastlars_trace_folder"  # an attribute of the exception
_OUT_OF_MEMORY = "out of memory: lower --micro-batch, --image-size or --workers"


def run_command(program: str, load: Callable[[], Callable[[], int]]) -> int:
    """Call `load`, then what it returns; return the exit status. Errors begin with `program`."""
    # Otherwise torch's C++ prints a stack trace of its own next to our line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with console.unfailing():
        try:
            with signals.handled(signals.end_at_once):
                work = load()
            with signals.handled(signals.interrupt):
                return work()
        except SystemExit:  # --help
            raise
        except BaseException as error:
            return _report(program, error)


def end_process(status: int) -> None:
    """End the process. All output is written by now, so Ctrl-C may kill it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


@contextmanager
def traces_in(folder: Path) -> Iterator[None]:
    """While the context lasts, the trace of an internal error goes to `folder`, if that exists.

    The file is written only when the command ends: by then an unused run directory is removed.
    """
    try:
        yield
    except Exception as error:
        setattr(error, _TRACE_FOLDER, folder)
        raise


def _report(program: str, error: BaseException) -> int:
    text, status = _message_and_status(error)
    # If all processes fail alike, only the first one says so.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone or not getattr(error, "everywhere", False) or os.environ.get("RANK", "0") == "0":
        label = "" if isinstance(error, KeyboardInterrupt) else "error: "
        print(f"{program}: {label}{text}", file=sys.stderr, flush=True)
    return status


def _message_and_status(error: BaseException) -> tuple[str, int]:
    """The line, and the status: 128 + n for signal n, 2 if the user can put it right, else 1."""
    if isinstance(error, TrainerError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        received = error.args[0] if isinstance(error, signals.Interrupted) else signal.SIGINT
        number = signal.Signals(received)
        text = f"stopped by {number.name}; the last checkpoint, if any, is unchanged"
        return text, 128 + number
    by_machine = _machine_error(error)
    if by_machine is not None:
        return printable(by_machine), 2
    text = f"internal error: {type(error).__name__}: {one_line(error)}"
    return printable(f"{text}; {_keep_trace(error)}"), 1


def _machine_error(error: BaseException) -> str | None:
    """The line for an exception that the machine caused; None for all others."""
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    if isinstance(error, OSError):
        if error.filename is not None or error.errno in _MACHINE_ERRORS:
            return reason_of(error)
    elif not isinstance(error, RuntimeError):
        return None
    # torch has one class for nearly all errors: only the text tells those of the machine.
    text = one_line(error)
    if any(words in text for words in ("out of memory", "llocate memory", "failed to map")):
        return f"{_OUT_OF_MEMORY} ({text})"
    if hits_file_limit(text):
        return f"{text}: {FILE_LIMIT_HINT}"
    if "can't start new thread" in text:
        return f"{text}: {PROCESS_LIMIT_HINT}"
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return text
    return None


def _keep_trace(error: BaseException) -> str:
    """Write the trace to a file, and say where; to standard error if no file can be written."""
    trace = "".join(traceback.format_exception(error))
    name = f"fastlars-trainer-{os.getpid()}.log"
    for folder in (getattr(error, _TRACE_FOLDER, Path()), Path(), Path(tempfile.gettempdir())):
        path = folder / name
        try:
            path.write_text(trace, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return f"the trace is in {path}; please report it"
    sys.stderr.write(trace)
    return "please report it with the trace above"
