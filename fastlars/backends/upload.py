"""Uploads small tables to a device, and makes kernel launches wait for them.

An upload is an asynchronous copy on the current stream. The kernels that read the table may run on
another stream, or be captured into a CUDA graph, which reads the same memory again at each replay.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Buffers that captured CUDA graphs read at each replay, by the first weight that a graph steps.
# They live as long as this weight: a plan may be rebuilt while the graph is still replayed.
_read_at_replay: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context manager that makes a device the current one, to which kernels are launched."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


def is_capturing(device: torch.device) -> bool:
    """Whether launches are captured into a CUDA graph instead of run."""
    if device.type != "cuda":
        return False
    with device_guard(device):  # torch answers for the current device's stream
        return torch.cuda.is_current_stream_capturing()


def keep_for_replays(weight: Tensor, tensors: list[Tensor]) -> None:
    """During capture, keep tensors that the graph reads alive as long as ``weight``."""
    if is_capturing(weight.device):
        _read_at_replay.setdefault(weight, []).extend(tensors)


class Uploader:
    """Copies small tensors to the device of some weights, in stream order; the host does not wait.

    Attributes:
        device: the weights' device.
        read_at_replay: what captured graphs read; append to it to keep an object alive as long as
            the first weight.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.device = weights[0].device
        self.read_at_replay: list[Any] = _read_at_replay.setdefault(weights[0], [])

    def pinned_copy(self, values: Tensor) -> Tensor:
        """A copy in pinned host memory, from which the device can read without the host waiting."""
        # It may be dropped right after the upload: torch reuses pinned memory only when the copies
        # that read it have finished.
        return values.clone() if self.device.type == "cpu" else values.pin_memory()

    def upload(self, pinned: Tensor) -> Tensor:
        """A copy of a pinned tensor on the device."""
        uploaded = torch.empty_like(pinned, device=self.device, pin_memory=False)
        uploaded.copy_(pinned, non_blocking=True)
        if is_capturing(self.device):
            self.read_at_replay += [pinned, uploaded]
        return uploaded


class TableUploader:
    """Uploads a host table, as it is at each call.

    Pinned memory cannot be allocated during capture, so one pinned buffer is held in reserve. A
    second upload of the same values in a capture reads the same buffer.
    """

    def __init__(self, uploader: Uploader, table: Tensor) -> None:
        self._uploader = uploader
        self._table = table
        self._reserve = None if is_capturing(uploader.device) else uploader.pinned_copy(table)
        self._captured: Tensor | None = None  # the buffer that a graph reads

    def upload(self) -> Tensor:
        """A copy of the table on the device."""
        if not is_capturing(self._uploader.device):
            if self._reserve is None:
                self._reserve = self._uploader.pinned_copy(self._table)
            return self._uploader.upload(self._uploader.pinned_copy(self._table))
        if self._captured is None or not torch.equal(self._captured, self._table):
            if self._reserve is None:
                self._captured = self._uploader.pinned_copy(self._table)
            else:
                self._captured, self._reserve = self._reserve.copy_(self._table), None
        return self._uploader.upload(self._captured)


class UploadedTensors:
    """Device tensors that were filled on the current stream, to be read on any stream."""

    def __init__(self, uploader: Uploader, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._read_at_replay = uploader.read_at_replay
        self._ordered_streams: set[int] = set()  # which run after the upload
        self._filled: torch.cuda.Event | None = None
        if uploader.device.type == "cuda" and not is_capturing(uploader.device):
            stream = torch.cuda.current_stream(uploader.device)
            self._filled = stream.record_event()
            self._ordered_streams.add(stream.cuda_stream)

    def wait_for_upload(self, stream: torch.cuda.Stream) -> None:
        """Make later launches on ``stream``, the current one, wait for the upload; and keep torch
        from reusing the memory before these launches have finished."""
        if torch.cuda.is_current_stream_capturing():
            # A capture cannot wait for an event from outside. It need not: torch.cuda.graph waits
            # for the device before it starts.
            if self not in self._read_at_replay:
                self._read_at_replay.append(self)
        elif self._filled is not None and stream.cuda_stream not in self._ordered_streams:
            stream.wait_event(self._filled)
            for tensor in self.tensors:
                tensor.record_stream(stream)
            self._ordered_streams.add(stream.cuda_stream)
