"""Tables on the device: the addresses of tensors, and the tensor of every chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.backends.triton.memory import BLOCK, COLUMNS
from fastlars.backends.upload import Resender, Sender, is_capturing


class Chunks:
    """How tensors of given sizes are cut, as int32 and int64 tables on their device.

    Attributes:
        numel: elements of every tensor.
        chunk: [chunks, 2], its tensor and its number therein; an empty tensor has one too, which
            reports the tensor's ratio.
        first: [tensors + 1], the first chunk of every tensor.
    """

    def __init__(self, weights: list[Tensor], sender: Sender) -> None:
        self.device = sender.device
        sizes = [weight.numel() for weight in weights]
        numel = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        count = ((numel + BLOCK.value - 1) // BLOCK.value).clamp_(min=1)
        tensor = torch.repeat_interleave(torch.arange(len(weights), device="cpu"), count)
        first = torch.zeros(len(weights) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(count, 0, out=first[1:])
        chunk = torch.stack(
            [tensor, torch.arange(len(tensor), device="cpu") - first[tensor]], dim=1
        )
        self.numel = sender.send(sender.pinned(numel))
        self.chunk = sender.send(sender.pinned(chunk.to(torch.int32)))
        self.first = sender.send(sender.pinned(first.to(torch.int32)))
        self.tensors = len(weights)
        self.count = len(tensor)


class Addresses:
    """The address table: sent when a tensor has moved, which after the first steps is rare."""

    def __init__(self, tensors: int, sender: Sender) -> None:
        self._sender = sender
        self._host = torch.zeros(tensors, COLUMNS.value, dtype=torch.int64, device="cpu")
        # A graph may be recorded with gradients that lie elsewhere than before.
        self._resender = Resender(sender, self._host)
        self._table: Tensor | None = None
        self._stream = 0

    def table(self, native: Any) -> Tensor:
        """Where the bound tensors lie, for launches on the current stream."""
        changed = native.write_table(self._host.data_ptr())
        stream = self._current_stream()
        if self._table is None or changed or stream != self._stream:
            self._table = None  # should sending fail, the next step sends again
            self._table = self._resender.send()
            self._stream = stream
        elif is_capturing(self._sender.device):
            self._sender.recorded.append(self._table)
        return self._table

    def _current_stream(self) -> int:
        device = self._sender.device
        return 0 if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
