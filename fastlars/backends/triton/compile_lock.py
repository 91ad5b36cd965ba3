"""One process of a machine compiles at a time: the others find the kernel in Triton's cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator

import triton

try:
    import fcntl
except ImportError:  # Windows: each process compiles
    fcntl = None  # type: ignore[assignment]

FOLDER = "fastlars-locks"
# One kernel takes a few seconds on a busy machine: what takes longer is a stopped process.
LIMIT_S = 60.0
# A process that has waited in vain does not wait again: each kernel would cost it the limit.
_gave_up = False


@contextlib.contextmanager
def alone(kernel: str, limit_s: float = LIMIT_S) -> Iterator[None]:
    """Context manager around the first compilation of a kernel, for processes that start together.

    The first one compiles. The others wait for it, and then load the kernel from Triton's cache,
    all at the same time. ``kernel`` names what is compiled, with everything that makes Triton
    compile it anew, such as types. Locks are files in the folder of the cache, so processes with
    other folders do not wait. A lock ends with its process, however that ends. Without it, kernels
    are compiled several times, but not wrongly. So this goes on without it after ``limit_s``, and
    where there is none: in a read-only folder, or on a file system without locks.
    """
    lock = _acquire(kernel, limit_s)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                # A forked child may share the open file, and closing it here would not unlock it.
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _acquire(kernel: str, limit_s: float) -> int | None:
    """The descriptor of the locked file; None without a lock."""
    global _gave_up
    if fcntl is None or _gave_up:
        return None
    try:
        folder = os.path.join(triton.knobs.cache.dir, FOLDER)
        os.makedirs(folder, exist_ok=True)
        name = hashlib.sha256(kernel.encode()).hexdigest()[:16]
        lock = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None
    locked = False
    try:
        end = time.monotonic() + limit_s
        locked = _try(lock, fcntl.LOCK_EX)
        while not locked:
            if time.monotonic() >= end:
                _gave_up = True
                break
            # Not a call that waits for the lock, which no signal to Python and no limit would end.
            time.sleep(0.02)
            # Shared: the one that had it alone has compiled, and loading takes others no turns.
            locked = _try(lock, fcntl.LOCK_SH)
    except OSError:  # the file system has no locks
        pass
    finally:
        if not locked:
            os.close(lock)
    return lock if locked else None


def _try(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
