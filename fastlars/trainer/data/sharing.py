"""How a worker hands a batch to the trainer: in shared memory, or through the pipe.

torch's queue pickles in a thread. Where /dev/shm is full or no file can be opened, that thread
drops the batch, and the trainer waits for it for ever. So a batch is pickled before it is sent.
"""

from __future__ import annotations

import io
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch
from torch import multiprocessing

Item = TypeVar("Item")


class _Pickler(ForkingPickler):
    """Names tensors that are in shared memory, and copies those that are not."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.is_shared():
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class Packed(Generic[Item]):
    """Something pickled; what `stack` made is handed on without a copy."""

    def __init__(self, item: Item) -> None:
        pickled = io.BytesIO()
        try:
            _Pickler(pickled, pickle.DEFAULT_PROTOCOL).dump(item)
            self._pickled = pickled.getvalue()
        except (OSError, RuntimeError):  # e.g. too many open files: copy everything
            self._pickled = pickle.dumps(item)

    def open(self) -> Item:
        """What was packed; once."""
        found: Item = pickle.loads(self._pickled)
        return found

    def pin_memory(self) -> Item:
        """torch's loader calls this in a thread of its own."""
        from torch.utils.data._utils.pin_memory import pin_memory

        return pin_memory(self.open())


def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Like torch.stack, in shared memory where there is room."""
    first = tensors[0]
    shape = (len(tensors), *first.shape)
    if multiprocessing.get_sharing_strategy() == "file_descriptor":
        try:
            size = len(tensors) * first.nbytes
            storage = torch.UntypedStorage._new_shared(size)
            # tmpfs promises more than it has: a page that is not there when it is written to
            # would kill the worker.
            os.posix_fallocate(storage._share_fd_cpu_()[0], 0, size)
        except (OSError, RuntimeError):
            pass
        else:
            out = torch.empty(0, dtype=first.dtype).set_(storage)
            return torch.stack(tensors, out=out.view(shape))
    return torch.stack(tensors)
