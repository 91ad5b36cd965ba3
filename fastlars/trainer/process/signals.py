"""What signals do: they end the process in a line, or are a wish that the training loop grants."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # signals are handled before torch is imported
    from fastlars.trainer.process.world import World

Handler = Callable[[int, FrameType | None], None]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal came while there was nothing to save; libraries take it for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)


@contextmanager
def leaving() -> Iterator[None]:
    """While the context lasts, a signal ends the process at once, with one line.

    For imports: many swallow KeyboardInterrupt, or make another error of it.
    """
    with _handled(_leave):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """While the context lasts, a signal raises Interrupted."""
    with _handled(lambda number, _: _interrupt(number)):
        yield


class StopSignals:
    """While the context lasts, and once there is something to save, the first signal is noted.

    Until then a signal ends the process, and so does a second Ctrl-C later on. Under torchrun that
    does not: there one Ctrl-C arrives twice, from the terminal and from torchrun.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._noting = False
        self._handled = _handled(self._note)

    def note(self) -> None:
        """From now on there is something to save."""
        self._noting = True

    def of_all(self, world: World) -> signal.Signals | None:
        """The signal that the first process to get one got; every process must ask."""
        return next((number for number in world.gather(self.received) if number is not None), None)

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

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._noting:
            _interrupt(number)
        again = self.received is not None and number == signal.SIGINT
        self.received = self.received or signal.Signals(number)
        if again and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise Interrupted(number)


def _interrupt(number: int) -> None:
    # A process that is forked to read images has these handlers for a moment; the trainer decides.
    if multiprocessing.parent_process() is None:
        raise Interrupted(number)
    if number == signal.SIGTERM:
        os._exit(128 + number)


def _leave(number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # not sys.stderr, which may be half-way through a line
        os.write(2, f"fastlars.trainer: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
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
