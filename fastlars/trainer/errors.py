"""The one exception that users of the trainer are meant to see."""

from __future__ import annotations


class TrainerError(Exception):
    """Something the user can put right; the text is one line that says what and where.

    Args:
        text: the line.
        everywhere: every process of the run raises it, so one of them is to print it.
    """

    def __init__(self, text: str, *, everywhere: bool = False) -> None:
        super().__init__(" ".join(text.split()))
        self.everywhere = everywhere
