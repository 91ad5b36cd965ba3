"""Errors that the trainer reports to its users, each as one line of text."""

from __future__ import annotations

import errno
import os

FILE_LIMIT_HINT = "raise the limit of open files (ulimit -n), or lower --workers"
PROCESS_LIMIT_HINT = "is there a limit of processes (ulimit -u)?"
_HINTS = {
    errno.EMFILE: FILE_LIMIT_HINT,
    errno.ENFILE: FILE_LIMIT_HINT,
    errno.EAGAIN: PROCESS_LIMIT_HINT,
}
_LONGEST = 600  # bytes of a line


class TrainerError(Exception):
    """An error that the user can put right; its text is one line that says what and where.

    Names in it appear as they are on disk, with escapes for characters that a terminal would not
    show. `everywhere`: every process of the run raises this error, so only the first one prints it.
    """

    status = 2  # of a process that ends with it

    def __init__(self, text: str, *, everywhere: bool = False) -> None:
        super().__init__(_shortened(printable(text)))
        self.everywhere = everywhere


class DivergedError(TrainerError):
    """The training has become NaN or infinite."""

    status = 3


def printable(text: str) -> str:
    """`text` with escapes for line ends, control characters and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its class if the text is empty.

    For an error in a worker, torch's loader gives a trace: its last line names the error.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if "Original Traceback (most recent call last):" in lines:
        return lines[-1]
    return lines[0] if lines else type(error).__name__


def reason_of(error: Exception) -> str:
    """The text of an error in one line; an OSError's with the file's name and a hint, if any."""
    if not isinstance(error, OSError):
        return one_line(error)
    name = os.fsdecode(error.filename) if error.filename else ""
    parts = (name, error.strerror or one_line(error), _HINTS.get(error.errno or 0, ""))
    return printable(": ".join(part for part in parts if part))


def hits_file_limit(text: str) -> bool:
    """Whether the text of an error says that no more files can be opened."""
    # "ancdata" is Python's word for the message in which processes pass open files to each other.
    return "Too many open files" in text or "ancdata" in text


def _shortened(text: str) -> str:
    """The start and the end of a long text: the middle is what the user typed."""
    line = text.encode()
    if len(line) <= _LONGEST:
        return text
    begin, end = line[: _LONGEST // 2 - 5], line[-_LONGEST // 2 :]
    return f"{begin.decode(errors='ignore')} ... {end.decode(errors='ignore')}"


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's stand-in for a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
