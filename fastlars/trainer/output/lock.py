"""A lock on a run directory, which the system releases however the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

_MOUNTS = "/proc/self/mountinfo"
# Network file systems whose locks hold on all machines, and the options that end that.
_SHARED = {
    "nfs": ("nolock", "local_lock=all", "local_lock=posix"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=posix"),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
    "lustre": ("localflock", "noflock"),
    "ceph": (),
    "gpfs": (),
}
# Network and user-space file systems begin so; what is not named here is a disk of this machine.
_NETWORK = (*_SHARED, "fuse", "beegfs", "9p", "afs", "virtiofs", "panfs", "pvfs2", "orangefs")


class LockedError(Exception):
    """Another process holds the lock; the text says which."""


class Lock:
    """An exclusive lock, taken by locking a file that is removed when the lock is given back.

    A POSIX lock: worker processes do not inherit it, network file systems know it, and nothing
    has to be cleaned up after kill -9. A mere file would outlive the process that made it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, -1

    def take(self) -> str:
        """Take the lock, without waiting; why it may not hold, "" where it does.

        Raises LockedError where another process has it, OSError where the file cannot be made.
        """
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.read(file, 200).decode(errors="replace")
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise LockedError(owner or "which has just started") from None
                self._path.unlink(missing_ok=True)
                return f"this file system has no locks ({error.strerror})"
            if _is_at(file, self._path):
                break
            os.close(file)  # its owner removed it between our opening and locking it
        self._file = file
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        kind = unshared(self._path.parent)
        return kind and f"locks of this file system ({kind}) may not hold on other machines"

    def is_held(self) -> bool:
        """Whether the lock still holds: somebody may have removed its file, or the folder."""
        return self._file < 0 or _is_at(self._file, self._path)

    def give_back(self) -> None:
        """Release the lock, if it was taken."""
        if self._file < 0:
            return
        if self.is_held():  # else the file is another run's
            self._path.unlink(missing_ok=True)  # before closing, while this process holds the lock
        os.close(self._file)
        self._file = -1


def unshared(folder: Path, mounts: str = _MOUNTS) -> str:
    """The network file system that `folder` is on, unless its locks hold on all machines; or ""."""
    device, found = os.stat(folder).st_dev, ""
    try:
        with open(mounts, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                mount, _, system = line.partition(" - ")
                numbers, (kind, _, options) = mount.split()[2], system.split(maxsplit=2)
                if numbers == f"{os.major(device)}:{os.minor(device)}":
                    found = "" if _holds(kind, options.strip().split(",")) else kind
    except (OSError, ValueError):  # another system than Linux
        return ""
    return found


def _holds(kind: str, options: list[str]) -> bool:
    if kind in _SHARED:
        return not set(options) & set(_SHARED[kind])
    return not kind.startswith(_NETWORK)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
