"""Ctrl-C and SIGTERM as a wish that the training loop grants after the step it is in."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While the context lasts, the first signal is noted instead of ending the process.

    A second Ctrl-C ends it at once. Under torchrun it does not: there one Ctrl-C arrives twice,
    from the terminal and from torchrun.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = signal.Signals(number)
        if again and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
