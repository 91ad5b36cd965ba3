"""Tables on the device: how tensors are cut into chunks, and the addresses of the tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.backends.triton.memory import BLOCK, COLUMNS
from fastlars.backends.upload import TableUploader, Uploader, is_capturing


class ChunkTables:
    """How tensors of given sizes are cut into chunks, as tables on their device.

    An empty tensor has one chunk too, which writes the tensor's trust ratio.

    Attributes:
        numel: int64 [tensors], the elements of each tensor.
        entries: int32 [chunks, 2], each chunk's tensor and its index within the tensor.
        first_chunk: int32 [tensors + 1], the first chunk of each tensor; last, the chunk count.
    """

    def __init__(self, weights: list[Tensor], uploader: Uploader) -> None:
        self.device = uploader.device
        sizes = [weight.numel() for weight in weights]
        numel = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        count = ((numel + BLOCK.value - 1) // BLOCK.value).clamp_(min=1)
        tensor = torch.repeat_interleave(torch.arange(len(weights), device="cpu"), count)
        first = torch.zeros(len(weights) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(count, 0, out=first[1:])
        entries = torch.stack(
            [tensor, torch.arange(len(tensor), device="cpu") - first[tensor]], dim=1
        )
        self.numel = uploader.upload(uploader.pinned_copy(numel))
        self.entries = uploader.upload(uploader.pinned_copy(entries.to(torch.int32)))
        self.first_chunk = uploader.upload(uploader.pinned_copy(first.to(torch.int32)))
        self.tensor_count = len(weights)
        self.chunk_count = len(tensor)


class AddressTable:
    """The addresses of all tensors, on the device; uploaded again when a tensor has moved, which is
    rare after the first steps."""

    def __init__(self, tensor_count: int, uploader: Uploader) -> None:
        self._uploader = uploader
        self._host = torch.zeros(tensor_count, COLUMNS.value, dtype=torch.int64, device="cpu")
        # During capture gradients may have other addresses than before: TableUploader has pinned
        # memory for this case.
        self._table_uploader = TableUploader(uploader, self._host)
        self._latest: Tensor | None = None
        self._stream = 0

    def get(self, tensor_list: Any) -> Tensor:
        """The table with the addresses of these tensors, for launches on the current stream."""
        changed = tensor_list.write_table(self._host.data_ptr())
        stream = self._current_stream()
        if self._latest is None or changed or stream != self._stream:
            self._latest = None  # if the upload fails, the next step tries again
            self._latest = self._table_uploader.upload()
            self._stream = stream
        elif is_capturing(self._uploader.device):
            self._uploader.read_at_replay.append(self._latest)
        return self._latest

    def _current_stream(self) -> int:
        device = self._uploader.device
        return 0 if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
