"""A command with a limit, which a hang cannot outlast and which says where it hung."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 5.0  # to print tracebacks before the kill
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
    one that waits for a GPU inside of C code; after that SIGKILL, which also ends what the command
    has left running.
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


def last_line(log: Path) -> str:
    """The last line of an output that is not empty."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
