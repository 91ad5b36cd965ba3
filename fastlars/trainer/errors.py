"""Errors that users of the trainer are meant to see, and text that fits into one line."""

from __future__ import annotations


class TrainerError(Exception):
    """Something the user can put right; the text is one line that says what and where.

    Attributes:
        status: exit status of the process that ends with it.

    Args:
        text: the line. Names in it appear as they are on disk, with escapes for what a terminal
            would not show.
        everywhere: every process of the run raises it, so one of them is to print it.
    """

    status = 2

    def __init__(self, text: str, *, everywhere: bool = False) -> None:
        super().__init__(_shortened(printable(text)))
        self.everywhere = everywhere


class DivergedError(TrainerError):
    """The training has become NaN or infinite."""

    status = 3


_LONGEST = 600  # bytes of a line


def _shortened(text: str) -> str:
    """`text`, or its start and its end, which say what is wrong; what was typed is between."""
    line = text.encode()
    if len(line) <= _LONGEST:
        return text
    begin, end = line[: _LONGEST // 2 - 5], line[-_LONGEST // 2 :]
    return f"{begin.decode(errors='ignore')} ... {end.decode(errors='ignore')}"


def printable(text: str) -> str:
    """`text` with escapes for line ends, control characters and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def one_line(error: BaseException) -> str:
    """The first line of what another library's exception says; its class where it says nothing.

    What torch's loader says of an error in a worker is a trace, whose last line names the error.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    said = [line for line in lines if line]
    if "Original Traceback (most recent call last):" in said:
        said.reverse()
    return said[0] if said else type(error).__name__


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
