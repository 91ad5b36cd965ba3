"""Tables on the device: how tensors are cut into chunks, and the addresses of the tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlars.backends.triton.memory import BLOCK, COLUMNS
from fastlars.backends.triton.tensor import COEFFICIENTS
from fastlars.backends.upload import TableUploader, Uploader, is_capturing
from fastlars.rules import RULES

MOST_SUMS = max(rule.sums for rule in RULES)


class Workspace(NamedTuple):
    """The tables that kernels read and write, as tensors on the device.

    Attributes:
        table: int64 [tensors, COLUMNS], addresses.
        numel: int64 [tensors], the elements of each tensor.
        chunks: int32 [chunks, 2], each chunk's tensor and its index within the tensor.
        first_chunk: int32 [tensors + 1], the first chunk of each tensor; last, the chunk count.
        gradient_slots: float64 [chunks], the sum of squares of each chunk of the gradients, for
            rules that normalize them: a step reads it again after ``slots`` were written.
        slots: float64 [chunks, MOST_SUMS], the sums of squares of each chunk.
        sizes: int64 [tensors], how many elements a step writes: ``numel``, or 0 in skipped steps.
        coefficients: float32 [tensors, COEFFICIENTS].
    """

    table: Tensor
    numel: Tensor
    chunks: Tensor
    first_chunk: Tensor
    gradient_slots: Tensor
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
        self._cut = numel, chunks.to(torch.int32), first.to(torch.int32)
        self._latest: Workspace | None = None  # filled on `_stream`
        self._stream = 0
        self._stale = False  # a tensor has moved since `_latest` was filled

    def get(self, tensor_list: Any) -> Workspace:
        """The workspace with the addresses of these tensors, for launches on the current stream."""
        self._stale |= tensor_list.write_table(self._addresses.data_ptr())
        capturing = is_capturing(self.device)
        stream = 0
        if self.device.type != "cpu":
            stream = torch.accelerator.current_stream(self.device).stream_id
        workspace = self._latest
        # A capture may use what another stream has uploaded: torch.cuda.graph waits for the device
        # before it starts.
        if workspace is None or not (capturing or stream == self._stream):
            workspace = self._new_workspace()
        elif self._stale:
            workspace = workspace._replace(table=self._address_uploader.upload())
        if capturing:
            # What a graph uploads is filled when it is replayed. Neither an eager step nor another
            # graph may use it.
            self._uploader.read_at_replay.append(workspace)
        else:
            self._latest, self._stream, self._stale = workspace, stream, False
        return workspace

    def _new_workspace(self) -> Workspace:
        tensors, chunks = self.tensor_count, self.chunk_count

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        uploader = self._uploader
        numel, entries, first_chunk = (
            uploader.upload(uploader.pinned_copy(each)) for each in self._cut
        )
        return Workspace(
            table=self._address_uploader.upload(),
            numel=numel,
            chunks=entries,
            first_chunk=first_chunk,
            gradient_slots=empty(chunks, dtype=torch.float64),
            slots=empty(chunks, MOST_SUMS, dtype=torch.float64),
            sizes=empty(tensors, dtype=torch.int64),
            coefficients=empty(tensors, COEFFICIENTS.value, dtype=torch.float32),
        )
