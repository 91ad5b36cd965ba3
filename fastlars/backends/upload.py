"""How small tables reach a device, and what launches need to know of it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# What graphs copy from, or read, at every replay. It lives as long as the first of the weights they
# step, without which a graph could not be replayed either; a plan that is made anew is no reason.
_recorded: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, to which launches go."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


def is_capturing(device: torch.device) -> bool:
    """Whether launches are recorded into a CUDA graph instead of run."""
    if device.type != "cuda":
        return False
    with current(device):  # torch answers for the stream of the current device
        return torch.cuda.is_current_stream_capturing()


def keep(weight: Tensor, tensors: list[Tensor]) -> None:
    """Have what a recording reads live as long as its weights."""
    if is_capturing(weight.device):
        _recorded.setdefault(weight, []).extend(tensors)


class Sender:
    """Copies small tensors to the device of some weights, in stream order, without a wait."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.device = weights[0].device
        self.recorded: list[Any] = _recorded.setdefault(weights[0], [])

    def pinned(self, values: Tensor) -> Tensor:
        """A copy of ``values`` that a device can take while the host goes on."""
        # torch hands pinned memory out again only after the copies from it were made.
        return values.clone() if self.device.type == "cpu" else values.pin_memory()

    def send(self, source: Tensor) -> Tensor:
        """``source``, which is pinned, on the device."""
        sent = torch.empty_like(source, device=self.device, pin_memory=False)
        sent.copy_(source, non_blocking=True)
        if is_capturing(self.device):
            self.recorded += [source, sent]
        return sent


class Resender:
    """Sends a table whenever it has changed, also within a recording, where no pinned memory is to
    be allocated: some lies ready for one."""

    def __init__(self, sender: Sender, table: Tensor) -> None:
        self._sender = sender
        self._table = table
        self._spare = None if is_capturing(sender.device) else sender.pinned(table)

    def send(self) -> Tensor:
        """The table as it is now, on the device."""
        capturing = is_capturing(self._sender.device)
        if capturing and self._spare is not None:
            source, self._spare = self._spare.copy_(self._table), None
        else:
            source = self._sender.pinned(self._table)
        if self._spare is None and not capturing:
            self._spare = self._sender.pinned(self._table)
        return self._sender.send(source)


class Sent:
    """Tensors that were filled on the current stream, for launches on any other."""

    def __init__(self, sender: Sender, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._recorded = sender.recorded
        self._streams: set[int] = set()
        self._filled: torch.cuda.Event | None = None
        if sender.device.type == "cuda" and not is_capturing(sender.device):
            stream = torch.cuda.current_stream(sender.device)
            self._filled = stream.record_event()
            self._streams.add(stream.cuda_stream)

    def precede(self, stream: torch.cuda.Stream) -> None:
        """Have the filling come before launches on the current stream, and them before the memory
        is used for something else."""
        if torch.cuda.is_current_stream_capturing():
            # A recording cannot wait for what runs outside of it; torch.cuda.graph has waited for
            # the device before it began.
            if self not in self._recorded:
                self._recorded.append(self)
        elif self._filled is not None and stream.cuda_stream not in self._streams:
            stream.wait_event(self._filled)
            for tensor in self.tensors:
                tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)
