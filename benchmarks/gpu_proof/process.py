"""A command with a limit, which a hang cannot outlast and which says where it hung."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 5.0  # to print tracebacks before the kill
MOST_BYTES = 2**30  # of one file
SKIPPED = 77  # exit status of a stage that cannot run here; its last line says why


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: passed, failed, skipped, or hung: it was ended at its limit.
        seconds: how long it took.
        words: the status in words, for people.
    """

    status: str
    seconds: float
    words: str


def run(command: list[str], log: Path, limit_s: float, environment: dict[str, str]) -> Outcome:
    """Run a command in a process group of its own; its output goes to ``log``.

    At the limit the whole group gets SIGABRT, at which Python prints where every thread is, also
    one that waits for a GPU inside of C code. In the end SIGKILL goes to all that is left of it.
    """
    start = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        hung = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            hung = True
            _signal(process, signal.SIGABRT)
            # A process that waits inside of a driver may survive even SIGKILL for a while; the
            # next stages do not wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            _signal(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    seconds = time.monotonic() - start
    code = process.returncode
    if hung:
        return Outcome("hung", seconds, f"did not end within {limit_s:.0f} s")
    if code == 0:
        return Outcome("passed", seconds, "passed")
    if code == SKIPPED:
        return Outcome("skipped", seconds, f"skipped: {last_line(log)}")
    if code is not None and code < 0:
        return Outcome("failed", seconds, f"was ended by {signal.Signals(-code).name}")
    return Outcome("failed", seconds, f"failed with status {code}")


def adopt_orphans() -> None:
    """From here on what a stage leaves behind becomes a child of this process, to be ended."""
    PR_SET_CHILD_SUBREAPER = 36  # noqa: N806 - its name in Linux
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # What is ended by SIGABRT would leave gigabytes, and so would a stage that prints without end.
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, MOST_BYTES)):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard < 0 else min(most, hard), hard))


def end_descendants() -> None:
    """SIGKILL to all children of this process, and theirs: a command may have started some in
    sessions of their own. Gives up on those that a driver holds."""
    for _ in range(100):
        parents = dict(_parents())
        ended = {os.getpid()}
        while more := {child for child, parent in parents.items() if parent in ended} - ended:
            ended |= more
        ended.discard(os.getpid())
        if not ended:
            return
        for number in ended:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(number, signal.SIGKILL)
                os.waitpid(number, os.WNOHANG)
        time.sleep(0.02)


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # After the name, which may hold anything, in parentheses: state, parent.
            yield int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])


def tail(log: Path, most: int = 2**16) -> str:
    """The end of an output, which may be huge."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        return file.read().decode(errors="replace")


def last_line(log: Path) -> str:
    """The last line of an output that is not empty."""
    lines = tail(log).strip().splitlines()
    return lines[-1] if lines else ""


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
