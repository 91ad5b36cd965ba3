"""Standard output and error whose failures cannot end a run."""

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

from fastlars.trainer.errors import one_line, reason_of

_PATIENCE = 5.0  # seconds that a slow reader gets at the end to take the rest of the output


class Stream:
    """A text stream whose `write` and `flush` never raise; all other attributes are the stream's.

    After its first failure the stream is given up, and `on_drop` called with the error: a reader
    that went away does not come back, and on a full disk single lines would be missing. If the
    process was started without the stream, it is None.
    """

    def __init__(self, stream: TextIO | None, on_drop: Callable[[Exception], None]) -> None:
        self._stream, self._on_drop = stream, on_drop

    def write(self, text: str) -> int:
        """Write text, with escapes for characters that the encoding does not have."""
        self._try(lambda stream: stream.write(_encodable(text, stream.encoding or "utf-8")))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def finish(self) -> None:
        """Flush; wait for a slow reader, but not for long."""
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
        try:
            if self._stream is not None:
                action(self._stream)
        except BlockingIOError:  # a full non-blocking pipe: what does not fit stays in the buffer
            pass
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception, *, report: bool = True) -> None:
        stream, self._stream = self._stream, None
        with suppress(OSError, ValueError, AttributeError):
            # Python flushes its own streams again at exit, and would report the error there.
            if stream in (sys.__stdout__, sys.__stderr__):
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), stream.fileno())  # type: ignore[union-attr]
        if report:
            self._on_drop(error)

    def __getattr__(self, name: str) -> Any:
        # A StringIO has encoding None and no descriptor.
        return getattr(io.StringIO() if self._stream is None else self._stream, name)


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


@contextmanager
def unfailing() -> Iterator[None]:
    """While the context lasts, no print can fail, and no thread prints a stack trace."""
    _open_missing()
    before = sys.stdout, sys.stderr, threading.excepthook, sys.unraisablehook
    err = Stream(sys.stderr, lambda _: None)
    out = Stream(sys.stdout, lambda error: _report_lost_output(error, err))
    sys.stdout, sys.stderr = out, err
    # Errors that Python only prints, such as in the destructor of a loader without its workers.
    sys.unraisablehook = lambda _problem: None
    threading.excepthook = lambda problem: _report_thread(problem, err)
    try:
        yield
    finally:
        out.finish()
        err.finish()
        sys.stdout, sys.stderr, threading.excepthook, sys.unraisablehook = before


@contextmanager
def muted() -> Iterator[None]:
    """While the context lasts, discard what C and C++ libraries print to standard error."""
    try:
        kept = os.dup(2)
    except OSError:  # closed, or too few descriptors are left
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
    """Open /dev/null in place of those of the descriptors 0, 1 and 2 that are closed.

    Otherwise the next file to be opened would get that number, and receive all printed text.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets this descriptor


def _report_lost_output(error: Exception, err: Stream) -> None:
    why = reason_of(error)
    err.write(f"warning: cannot write to standard output ({why}); the run goes on without it\n")
    err.flush()


def _report_thread(problem: threading.ExceptHookArgs, err: Stream) -> None:
    # TensorBoard's thread hands its error on to the next call of its writer.
    if problem.exc_value is None or type(problem.thread).__module__.startswith("tensorboard"):
        return
    kind, text = type(problem.exc_value).__name__, one_line(problem.exc_value)
    err.write(f"warning: a thread ended: {kind}: {text}\n")
