"""SIGINT, SIGTERM and SIGHUP: end the process with one line, or request a stop of the training."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], None]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal arrived before there was anything to save; libraries treat this as Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)


@contextmanager
def ending_process() -> Iterator[None]:
    """While the context lasts, a signal ends the process at once, with one line.

    For imports: many packages swallow a KeyboardInterrupt, or turn it into another error.
    """
    with _handled(_end_process):
        yield


@contextmanager
def raising_interrupted() -> Iterator[None]:
    """While the context lasts, a signal raises Interrupted."""
    with _handled(lambda number, _: _interrupt(number)):
        yield


class StopSignals:
    """Turn signals into a stop request, which the training loop honours after the current step.

    Before `note` is called, a signal raises Interrupted. So does a second Ctrl-C later on, except
    under torchrun: there each Ctrl-C arrives twice, from the terminal and from torchrun.

    Attributes:
        received: the first signal since `note`, None if there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._noting = False
        self._handled = _handled(self._handle)

    def note(self) -> None:
        """From now on there is something to save: note the first signal instead of raising."""
        self._noting = True

    def __enter__(self) -> StopSignals:
        self._handled.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handled.__exit__(kind, error, trace)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._noting:
            _interrupt(number)
        again = self.received is not None and number == signal.SIGINT
        self.received = self.received or signal.Signals(number)
        if again and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise Interrupted(number)


def _interrupt(number: int) -> None:
    # A process forked to read images has these handlers until it installs its own. There, Ctrl-C
    # is left to the trainer, which gets it too and stops its workers.
    if multiprocessing.parent_process() is None:
        raise Interrupted(number)
    if number == signal.SIGTERM:
        os._exit(128 + number)


def _end_process(number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # not sys.stderr, which may be in the middle of a line
        os.write(2, f"fastlars.trainer: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """Handle the signals with `handler`, and put the previous handlers back at the end."""
    before = {number: signal.getsignal(number) for number in _STOPPING}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup: the run is to outlive its terminal
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
