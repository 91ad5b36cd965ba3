"""Tables on the device: how tensors are cut into chunks, and the addresses of the tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlars.backends.triton.memory import BLOCK, COLUMNS
from fastlars.backends.triton.tensor import COEFFICIENTS
from fastlars.backends.upload import TableUploader, Uploader, is_capturing

MOST_SUMS = 2  # of any rule


class Workspace(NamedTuple):
    """The tables that kernels read and write, as tensors on the device.

    Attributes:
        table: int64 [tensors, COLUMNS], addresses.
        numel: int64 [tensors], the elements of each tensor.
        chunks: int32 [chunks, 2], each chunk's tensor and its index within the tensor.
        first_chunk: int32 [tensors + 1], the first chunk of each tensor; last, the chunk count.
        slots: float64 [chunks, MOST_SUMS], the sums of squares of each chunk.
        sizes: int64 [tensors], how many elements a step writes: ``numel``, or 0 in skipped steps.
        coefficients: float32 [tensors, COEFFICIENTS].
    """

    table: Tensor
    numel: Tensor
    chunks: Tensor
    first_chunk: Tensor
    slots: Tensor
    sizes: Tensor
    coefficients: Tensor


class DeviceTables:
    """The workspace of tensors of given sizes. An empty tensor has one chunk too.

    Tables are uploaded again when a tensor has moved, which is rare after the first steps, and for
    each stream, so that launches on this stream follow the upload.
    """

    def __init__(self, weights: list[Tensor], uploader: Uploader) -> None:
        self.device = uploader.device
        self._uploader = uploader
        sizes = [weight.numel() for weight in weights]
        numel = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        count = ((numel + BLOCK.value - 1) // BLOCK.value).clamp_(min=1)
        tensor = torch.repeat_interleave(torch.arange(len(weights), device="cpu"), count)
        first = torch.zeros(len(weights) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(count, 0, out=first[1:])
        chunks = torch.stack(
            [tensor, torch.arange(len(tensor), device="cpu") - first[tensor]], dim=1
        )
        self.tensor_count = len(weights)
        self.chunk_count = len(tensor)
        self._addresses = torch.zeros(
            self.tensor_count, COLUMNS.value, dtype=torch.int64, device="cpu"
        )
        # During capture gradients may have other addresses than before: TableUploader has pinned
        # memory for this case.
        self._address_uploader = TableUploader(uploader, self._addresses)
        self._cut = [
            TableUploader(uploader, table)
            for table in (numel, chunks.to(torch.int32), first.to(torch.int32))
        ]
        self._latest: Workspace | None = None
        self._stream = 0
        self._filled_at_replay = False  # some table of `_latest` is uploaded by a CUDA graph

    def get(self, tensor_list: Any) -> Workspace:
        """The workspace with the addresses of these tensors, for launches on the current stream."""
        moved = tensor_list.write_table(self._addresses.data_ptr())
        capturing = is_capturing(self.device)
        stream = 0
        if self.device.type != "cpu":
            stream = torch.accelerator.current_stream(self.device).stream_id
        workspace, self._latest = (
            self._latest,
            None,
        )  # if an upload fails, the next step tries again
        if self._filled_at_replay:
            usable = capturing and stream == self._stream
        else:  # torch.cuda.graph waits for the device, and so for the uploads, before it captures
            usable = capturing or stream == self._stream
        if workspace is None or not usable:
            workspace, self._filled_at_replay = self._new_workspace(), capturing
        elif moved:
            workspace = workspace._replace(table=self._address_uploader.upload())
            self._filled_at_replay = capturing
        if capturing:
            self._uploader.read_at_replay.append(workspace)
        self._latest = workspace
        if self._filled_at_replay or not capturing:
            self._stream = stream
        return workspace

    def _new_workspace(self) -> Workspace:
        tensors, chunks = self.tensor_count, self.chunk_count

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        numel, entries, first_chunk = (each.upload() for each in self._cut)
        return Workspace(
            table=self._address_uploader.upload(),
            numel=numel,
            chunks=entries,
            first_chunk=first_chunk,
            slots=empty(chunks, MOST_SUMS, dtype=torch.float64),
            sizes=empty(tensors, dtype=torch.int64),
            coefficients=empty(tensors, COEFFICIENTS.value, dtype=torch.float32),
        )
