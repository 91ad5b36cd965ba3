"""One process of a machine compiles at a time: the others find the kernel in Triton's cache."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import triton

try:
    import fcntl
except ImportError:  # Windows: each process compiles
    fcntl = None  # type: ignore[assignment]

NAME = "fastlars.lock"
# One kernel takes a few seconds on a busy machine: what takes longer is a stopped process.
LIMIT_S = 60.0
# A process that has waited in vain does not wait again: each kernel would cost it the limit.
_gave_up = False


@contextlib.contextmanager
def alone(limit_s: float = LIMIT_S) -> Iterator[None]:
    """Context manager around the first compilation of a kernel, for processes that start together.

    The first one compiles; those that waited for it get the kernel from Triton's cache. The lock is
    a file in the folder of that cache, so processes with other folders do not wait. It ends with
    its process, however that ends. Without the lock, kernels are compiled several times, but not
    wrongly. So this goes on without it after ``limit_s``, and where there is none: in a read-only
    folder, or on a file system without locks. Not to be nested.
    """
    lock = _acquire(limit_s)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                # A forked child may share the open file, and closing it here would not unlock it.
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _acquire(limit_s: float) -> int | None:
    """The descriptor of the locked file; None without a lock."""
    global _gave_up
    if fcntl is None or _gave_up:
        return None
    try:
        folder = triton.knobs.cache.dir
        os.makedirs(folder, exist_ok=True)
        lock = os.open(os.path.join(folder, NAME), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None
    locked = False
    try:
        end = time.monotonic() + limit_s
        while not (locked := _try(lock)):
            if time.monotonic() >= end:
                _gave_up = True
                break
            # Not a call that waits for the lock, which no signal to Python and no limit would end.
            time.sleep(0.02)
    except OSError:  # the file system has no locks
        pass
    finally:
        if not locked:
            os.close(lock)
    return lock if locked else None


def _try(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
