"""Standard output and error that cannot end a run."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from fastlars.trainer.errors import one_line

_PATIENCE = 5.0  # seconds for a slow reader to take what is left at the end


class Stream:
    """A text stream whose `write` and `flush` never raise; all else is the stream's own.

    The first failure drops the stream: a reader that went away does not come back, and a full disk
    would lose a line here and there.

    Args:
        stream: None: nothing is written, as when the process was started without one.
        on_drop: called once with the reason when the stream is dropped.
    """

    def __init__(
        self, stream: TextIO | None, on_drop: Callable[[OSError | ValueError], None]
    ) -> None:
        self._stream, self._on_drop = stream, on_drop

    def write(self, text: str) -> int:
        """Write text; what the encoding does not know is escaped."""
        self._try(lambda stream: stream.write(_encodable(text, stream.encoding)))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        found = False

        def ask(stream: TextIO) -> None:
            nonlocal found
            found = stream.isatty()

        self._try(ask)
        return found

    def finish(self) -> None:
        """Flush; a reader that takes its time gets some."""
        end = time.monotonic() + _PATIENCE
        while self._stream is not None and time.monotonic() < end:
            try:
                self._stream.flush()
                return
            except BlockingIOError:
                select.select([], [self._stream], [], 0.1)
            except (OSError, ValueError) as error:
                self._drop(error, report=not isinstance(error, BrokenPipeError))
        if self._stream is not None:
            self._drop(TimeoutError(errno.ETIMEDOUT, "its reader takes nothing"))

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except BlockingIOError:  # a full pipe that must not be waited for: what fits is kept
            pass
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError, *, report: bool = True) -> None:
        stream, self._stream = self._stream, None
        with suppress(OSError, ValueError, AttributeError):
            # Python flushes its own streams once more when it ends, and would complain.
            if stream in (sys.__stdout__, sys.__stderr__):
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), stream.fileno())  # type: ignore[union-attr]
        if report:
            self._on_drop(error)

    def __getattr__(self, name: str) -> Any:
        if self._stream is not None:
            return getattr(self._stream, name)
        return getattr(io.StringIO(), name)  # e.g. its encoding: None; it has no fileno


def _encodable(text: str, encoding: str | None) -> str:
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
    return text


@contextmanager
def guarded() -> Iterator[None]:
    """While the context lasts, nothing that is printed can fail, and no thread prints a trace."""
    _open_missing()
    before = sys.stdout, sys.stderr, threading.excepthook, sys.unraisablehook
    err = Stream(sys.stderr, lambda _: None)
    out = Stream(sys.stdout, lambda error: _tell(err, f"standard output ({_reason(error)})"))
    sys.stdout, sys.stderr = out, err
    # Python ignores these errors, e.g. of a loader that never came to start its workers.
    sys.unraisablehook = lambda _problem: None
    threading.excepthook = lambda problem: _thread(problem, err)
    try:
        yield
    finally:
        out.finish()
        err.finish()
        sys.stdout, sys.stderr, threading.excepthook, sys.unraisablehook = before


@contextmanager
def muted() -> Iterator[None]:
    """While the context lasts, what C and C++ libraries print to standard error is lost."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _open_missing() -> None:
    """Open /dev/null as 0, 1 and 2 where they are closed.

    Else the next file would get that number, and what is printed would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free


def _tell(err: Stream, reason: str) -> None:
    err.write(f"warning: cannot write to {reason}; the run goes on without it\n")
    err.flush()


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def _thread(problem: threading.ExceptHookArgs, err: Stream) -> None:
    # TensorBoard's hands its error on to who writes next.
    if problem.exc_value is None or type(problem.thread).__module__.startswith("tensorboard"):
        return
    kind, text = type(problem.exc_value).__name__, one_line(problem.exc_value)
    err.write(f"warning: a thread ended: {kind}: {text}\n")
