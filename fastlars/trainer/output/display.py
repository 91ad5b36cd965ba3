"""What a run shows on the terminal: a progress bar, and lines that a file of output gets too."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from fastlars.trainer.errors import printable

# tqdm's thread would redraw a bar that stands still; where no thread can start, tqdm warns.
tqdm.monitor_interval = 0


# The columns of the epochs' table: 74 characters, 78 for 1,000 epochs.
_HEADINGS = ("", "lr", "train loss", "acc", "test loss", "acc", "best", "images/s")
_ROW = "{:<11} {:>8} {:>10} {:>7} {:>9} {:>7} {:>7} {:>8}"


class Display:
    """A bar while the context lasts, and lines at any time; both only if it is `shown`.

    The bar counts `total` images, of which some are `done`. Only the first process's is `shown`.
    """

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self._shown, self._total, self._done = shown, total, done
        self._bar: Any = None
        self._headed = False

    def advance(self, images: int) -> None:
        self._bar.update(images)

    def figures(self, loss: float, accuracy: float) -> None:
        """Show the latest loss and accuracy, next to the bar."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)

    def row(self, *cells: str) -> None:
        """Print a row of the epochs' table, its headings before the first one."""
        if not self._headed:
            self.say("", _ROW.format(*_HEADINGS))
            self._headed = True
        self.say(_ROW.format(*cells))

    def say(self, *lines: str) -> None:
        """Print lines above the bar."""
        if self._shown:
            for line in lines:
                tqdm.write(printable(line))
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a line about something that went wrong and does not end the run."""
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
