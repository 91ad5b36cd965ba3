"""A lock on a run directory that the system releases however the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

# Network file systems on which a lock excludes the processes of all machines, and the mount options
# of NFS, CIFS and Lustre that restrict a lock to one machine.
_CLUSTER_WIDE = ("nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "gpfs")
_RESTRICTING = {"nolock", "local_lock=all", "local_lock=posix", "nobrl", "localflock", "noflock"}
# How the types of network and user-space file systems begin; any other is a disk of this machine.
_NETWORK = (*_CLUSTER_WIDE, "fuse", "beegfs", "9p", "afs", "virtiofs", "panfs", "pvfs2", "orangefs")


class LockedError(Exception):
    """Another process holds the lock; the text names that process."""


class Lock:
    """An exclusive POSIX lock on a file, which is removed when the lock is released.

    Worker processes do not inherit a POSIX lock, network file systems support it, and kill -9
    releases it; a file that merely exists would stay.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, -1

    def acquire(self) -> str:
        """Acquire the lock without waiting; return why it may not be reliable, or "".

        Raises LockedError if another process holds it, OSError if the file cannot be created.
        """
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.read(file, 200).decode(errors="replace")
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise LockedError(owner or "a process that has just started") from None
                self._path.unlink(missing_ok=True)
                return f"this file system has no locks ({error.strerror})"
            if _is_at(file, self._path):
                break
            os.close(file)  # its owner removed the file after we opened and before we locked it
        self._file = file
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        kind = unreliable_file_system(self._path.parent)
        return kind and f"locks of this file system ({kind}) may not hold on other machines"

    def is_held(self) -> bool:
        """Whether the lock, if acquired, still holds: its file or folder may have been removed."""
        return self._file < 0 or _is_at(self._file, self._path)

    def release(self) -> None:
        if self._file < 0:
            return
        if self.is_held():  # otherwise the file at this path belongs to another run
            with suppress(OSError):  # of a read-only directory
                self._path.unlink(missing_ok=True)  # before closing, while the lock is still held
        os.close(self._file)
        self._file = -1


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def unreliable_file_system(folder: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the type of a folder's file system if its locks may be local to one machine, or ""."""
    device = os.stat(folder).st_dev
    with suppress(OSError, ValueError), open(mounts, errors="replace") as lines:  # only on Linux
        for line in lines:
            mount, _, system = line.partition(" - ")
            kind, _, options = system.split(maxsplit=2)
            if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                restricted = not _RESTRICTING.isdisjoint(options.strip().split(","))
                reliable = kind in _CLUSTER_WIDE and not restricted
                return "" if reliable or not kind.startswith(_NETWORK) else kind
    return ""
