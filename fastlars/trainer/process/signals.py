"""SIGINT, SIGTERM and SIGHUP: end the process with one line, or request a stop of the training."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal, its argument, that came before there was anything to save.

    A KeyboardInterrupt, so that libraries treat it as Ctrl-C.
    """


class StopSignals(ExitStack):
    """Turn signals into a stop request, which the training loop honours after the current step.

    Before `note` is called, a signal raises Interrupted. So does a second Ctrl-C later on, except
    under torchrun: there each Ctrl-C arrives twice, from the terminal and from torchrun.

    Attributes:
        received: the first signal since `note`, None if there was none.
    """

    received: signal.Signals | None = None
    _noting = False

    def note(self) -> None:
        """From now on there is something to save: note the first signal instead of raising."""
        self._noting = True

    def __enter__(self) -> StopSignals:
        self.enter_context(handled(self._handle))
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._noting:
            interrupt(number)
        again = self.received is not None and number == signal.SIGINT
        self.received = self.received or signal.Signals(number)
        if again and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise Interrupted(number)


def interrupt(number: int, _frame: FrameType | None = None) -> None:
    """Raise Interrupted."""
    # A process forked to read images has these handlers until it installs its own. There, Ctrl-C
    # is left to the trainer, which gets it too and stops its workers.
    if multiprocessing.parent_process() is None:
        raise Interrupted(number)
    if number == signal.SIGTERM:
        os._exit(128 + number)


def end_at_once(number: int, _frame: FrameType | None) -> None:
    """Print one line and end the process.

    For imports: many packages swallow a KeyboardInterrupt, or turn it into another error.
    """
    with suppress(OSError):  # not sys.stderr, which may be in the middle of a line
        os.write(2, f"fastlars.trainer: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
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
