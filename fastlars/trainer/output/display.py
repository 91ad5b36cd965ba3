"""What a run shows on the terminal: a progress bar and lines of text."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from fastlars.trainer.errors import printable

# tqdm's monitor thread would redraw a bar that makes no progress, and where no thread can be
# started, tqdm prints a long warning.
tqdm.monitor_interval = 0


class Display:
    """A progress bar, if stderr is a terminal, and lines of text, which also go to a log file.

    The bar exists while the context lasts; lines can be printed at any time.
    """

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self._shown, self._total, self._done = shown, total, done
        self._bar: Any = None

    def advance(self, images: int) -> None:
        """Move the bar by a number of trained images."""
        self._bar.update(images)

    def figures(self, loss: float, accuracy: float) -> None:
        """Show the latest loss and accuracy next to the bar."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._shown:
            tqdm.write(printable(text))
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a line about a failure that does not end the run."""
        if self._shown:
            tqdm.write(printable(f"warning: {text}"), file=sys.stderr)

    def __enter__(self) -> Display:
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None if self._shown else True,  # None: disabled if stderr is no terminal
        )
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.close()
