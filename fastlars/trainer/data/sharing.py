"""How a worker hands a batch to the trainer: in shared memory if there is room, else in a pipe.

The pipe alone would be simpler, but 256 images of 224 pixels then cost the trainer 70 ms of CPU
time instead of 3 ms (on a VM with two cores). torch's queue alone could hang the run: it pickles in
a thread, and where /dev/shm is full or no file can be opened, that thread drops the batch for which
the trainer waits. So a batch is pickled here, before it is sent.
"""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch


class _Pickler(ForkingPickler):
    """Pickles a reference to tensors in shared memory, and a copy of all others."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.is_shared():
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class Packed:
    """A pickled object; a tensor that `stack` made is handed over without a copy."""

    def __init__(self, item: Any) -> None:
        try:
            self._pickled = bytes(_Pickler.dumps(item))
        except (OSError, RuntimeError):  # e.g. too many open files: copy all tensors
            self._pickled = pickle.dumps(item)

    def open(self) -> Any:
        """The object; can be called once."""
        return pickle.loads(self._pickled)

    def pin_memory(self) -> Any:
        """The object with its tensors pinned; torch's DataLoader calls this in a thread."""
        from torch.utils.data._utils.pin_memory import pin_memory

        return pin_memory(self.open())


def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """torch.stack, into shared memory if there is room."""
    first = tensors[0]
    with suppress(OSError, RuntimeError):
        size = len(tensors) * first.nbytes
        storage = torch.UntypedStorage._new_shared(size)
        # tmpfs promises more memory than it has; writing to a page that it lacks would kill the
        # worker.
        os.posix_fallocate(storage._share_fd_cpu_()[0], 0, size)
        out = torch.empty(0, dtype=first.dtype).set_(storage)
        return torch.stack(tensors, out=out.view(len(tensors), *first.shape))
    return torch.stack(tensors)
