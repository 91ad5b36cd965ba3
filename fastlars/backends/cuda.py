"""The CUDA back end: the kernels of csrc/cuda, on the current stream. The host never waits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends import cpu
from fastlars.backends.base import (
    StepScalars,
    Tensors,
    checked_gradient_sums,
    checked_streams,
    checked_sums,
    with_gradient_sums,
)
from fastlars.backends.cpu import address, native_rule
from fastlars.backends.upload import (
    TableUploader,
    UploadedTensors,
    Uploader,
    device_guard,
    is_capturing,
)
from fastlars.rules import GradientNorm, Rule

# Launch strategies of adaptive rules; the first is the default.
PATHS = ("one-launch", "two-launch")

# Two uploads: chunk entries with the workspace, which never change; and tensor entries.
DeviceTables: TypeAlias = tuple[UploadedTensors, UploadedTensors]


def demanded_path() -> str:
    """The path that FASTLARS_CUDA_PATH demands, or the default."""
    path = os.environ.get("FASTLARS_CUDA_PATH", "") or PATHS[0]
    if path not in PATHS:
        raise ValueError(f"FASTLARS_CUDA_PATH must be one of {', '.join(PATHS)}, got {path!r}")
    return path


def kernel_device_type() -> str:
    """The type of device that this build's kernels run on: "cuda", except in tests."""
    device_type: str = _C.build_info().get("cuda_serves", "cuda")
    return device_type


@cache
def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on a device; empty if they can."""
    info = _C.build_info()
    if not info["cuda"]:
        return f"fastlars was built without CUDA kernels ({info['cuda_reason']})"
    if device.type != kernel_device_type():
        return f"the cuda back end does not serve {device.type}"
    try:
        with device_guard(device):
            return _C.cuda_why_not()
    except RuntimeError as error:  # raised by torch if it finds no driver
        return str(error).strip().splitlines()[0]


class TableCache:
    """A layout's tables on its device, uploaded when they change.

    Tensor entries change when weights or states have moved, which is rare after the first step.
    Gradients move at every step, so their addresses are launch arguments and not in the tables.
    """

    def __init__(self, table: _C.CudaChunkTable, weights: list[Tensor]) -> None:
        self.device = weights[0].device
        self._table = table
        self._uploader = Uploader(weights)
        size = table.tensors * table.tensor_entry_bytes
        self._host = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self._tensor_entries = TableUploader(self._uploader, self._host)
        self._constant: UploadedTensors | None = None
        self._latest: DeviceTables | None = None

    def get(self, tensor_list: _C.TensorList) -> DeviceTables:
        """The tables with the addresses of the listed tensors."""
        if self._table.write_tensor_entries(tensor_list, self._host.data_ptr()):
            self._latest = None
        if self._latest is not None:
            return self._latest
        constant = self._constant or self._upload_constant()
        tensor_entries = UploadedTensors(self._uploader, self._tensor_entries.upload())
        tables = constant, tensor_entries
        if not is_capturing(self.device):
            # An upload during capture is filled only when the graph is replayed: the next eager
            # step must not use it.
            self._constant, self._latest = constant, tables
        return tables

    def _upload_constant(self) -> UploadedTensors:
        size = self._table.chunks * self._table.chunk_entry_bytes
        entries = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._table.write_chunk_entries(entries.data_ptr())
        # Kernels expect zeros in parts of the workspace, and reset them for the next launch.
        workspace = torch.zeros(self._table.workspace_bytes, dtype=torch.uint8, device=self.device)
        uploaded = self._uploader.upload(self._uploader.pinned_copy(entries))
        return UploadedTensors(self._uploader, uploaded, workspace)


@dataclass
class CudaLayout:
    """What weights of given shapes need at every step; it outlives the tensors of one step."""

    expected: _C.Layout  # the shapes, strides and devices that `bind` compares tensors with
    table: _C.CudaChunkTable
    cache: TableCache
    placed: DeviceTables | None = None  # the tables whose addresses `table` has


@dataclass(frozen=True)
class CudaBoundTensors:
    """Checked tensors, their addresses, and the tables of these addresses on the device."""

    tensor_list: _C.TensorList
    layout: CudaLayout
    tables: DeviceTables
    tensors: Tensors

    @property
    def device(self) -> torch.device:
        return self.layout.cache.device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def new_report(self, rule: Rule) -> Tensor:
        return self.empty(self.layout.table.tensors, 1 + rule.sums, dtype=torch.float32)

    def stream(self) -> int:
        """The current stream, ordered after the upload of these tables."""
        layout, tables = self.layout, self.tables
        if layout.placed is not tables:
            (chunk_entries, workspace), (tensor_entries,) = (each.tensors for each in tables)
            in_order = (chunk_entries, tensor_entries, workspace)
            layout.table.place(*(tensor.data_ptr() for tensor in in_order))
            layout.placed = tables
        if self.device.type == "cpu":
            return 0
        stream = torch.cuda.current_stream(self.device)
        for uploaded in tables:
            uploaded.wait_for_upload(stream)
        return stream.cuda_stream

    def scalars(self, scalars: StepScalars) -> _C.CudaScalars:
        """A step's scalars, by value or as device addresses."""
        device = scalars.device
        if device is None:
            return _C.CudaScalars(scalars.lr, scalars.gradient_scale, [(0, False)] * 4, math.inf)
        addresses = [self._address(x) for x in (device.lr, device.grad_scale, device.found_inf)]
        addresses.append(self._address(device.square_norm, torch.float64))
        return _C.CudaScalars(scalars.lr, scalars.gradient_scale, addresses, device.limit)

    def _address(
        self, value: Tensor | None, other: torch.dtype = torch.float32
    ) -> tuple[int, bool]:
        """The address of a scalar, and whether it is a double. Types but float64 and ``other`` are
        refused, and so are other devices: a bad address would poison the CUDA context."""
        if value is None:
            return 0, False
        address, is_double = value.data_ptr(), value.dtype == torch.float64
        fits = is_double or value.dtype == other
        if not (fits and address and value.device == self.device and value.numel() == 1):
            raise ValueError(
                f"a step on {self.device} reads its scalars there: each must be one float32 or "
                "float64 element, and the squared norm a float64"
            )
        return address, is_double


class Cuda:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    ``measure`` and ``apply`` take one launch each for up to 464 tensors. ``step`` takes one launch
    on the one-launch path; it calls ``measure`` and ``apply`` on the two-launch path, and whenever
    it rounds stochastically. Where gradients are normalized and their sums not given, one launch
    comes before these. Results have the same bits on either path, for any grid, in every run.

    Attributes:
        path: "one-launch" or "two-launch".
        grid: blocks of a launch; 0: as many as the device runs at once.
        shared_slots: chunks that a block caches in shared memory on the one-launch path; 0: as many
            as fit.
    """

    name = "cuda"
    reads_device = True

    def __init__(self) -> None:
        self.path = demanded_path()
        self.grid = 0
        self.shared_slots = 0
        self._checker = cpu.Cpu()

    def layout(self, weights: list[Tensor]) -> CudaLayout:
        device = weights[0].device
        served = kernel_device_type()
        if device.type != served or any(weight.device != device for weight in weights):
            raise ValueError(f"the cuda back end needs weights on one {served} device")
        expected = self._checker.layout(weights)
        table = _C.CudaChunkTable(expected)
        return CudaLayout(expected, table, TableCache(table, weights))

    def bind(self, tensors: Tensors, layout: CudaLayout) -> CudaBoundTensors:
        tensor_list = self._checker.bind(tensors, layout.expected).tensor_list
        return CudaBoundTensors(tensor_list, layout, layout.cache.get(tensor_list), tensors)

    def _launch(
        self,
        call: Callable[..., None],
        rule: Rule | GradientNorm,
        bound: CudaBoundTensors,
        scalars: StepScalars,
        *arguments: int,
        after_grid: tuple[int, ...] = (),
    ) -> None:
        """Launch on the current stream. ``arguments``: those that differ between the extension's
        functions; ``after_grid``: those that follow the stream and the grid."""
        table, cuda_scalars = bound.layout.table, bound.scalars(scalars)
        given = checked_gradient_sums(rule, scalars, table.tensors, bound.device)
        streams = checked_streams(scalars, table.tensors, bound.device)
        bound.tensor_list.set_step(scalars.seed, address(given), address(streams))
        with device_guard(bound.device):
            call(
                native_rule(rule),
                bound.tensor_list,
                table,
                cuda_scalars,
                *arguments,
                bound.stream(),
                self.grid,
                *after_grid,
            )

    def measure(
        self, rule: Rule | GradientNorm, bound: CudaBoundTensors, scalars: StepScalars
    ) -> Tensor:
        scalars = with_gradient_sums(self, rule, bound, scalars)
        sums = bound.empty(bound.layout.table.tensors, rule.sums, dtype=torch.float64)
        self._launch(_C.cuda_measure, rule, bound, scalars, sums.data_ptr())
        return sums

    def apply(
        self, rule: Rule, bound: CudaBoundTensors, scalars: StepScalars, sums: Tensor | None
    ) -> Tensor:
        scalars = with_gradient_sums(self, rule, bound, scalars)
        report = bound.new_report(rule)
        sums = checked_sums(rule, sums, len(report), report.device)
        self._launch(_C.cuda_apply, rule, bound, scalars, address(sums), report.data_ptr())
        return report

    def step(self, rule: Rule, bound: CudaBoundTensors, scalars: StepScalars) -> Tensor:
        if not rule.adapt:
            return self.apply(rule, bound, scalars, None)
        scalars = with_gradient_sums(self, rule, bound, scalars)
        if self.path == "two-launch" or scalars.seed is not None:
            return self.apply(rule, bound, scalars, self.measure(rule, bound, scalars))
        report = bound.new_report(rule)
        self._launch(
            _C.cuda_step, rule, bound, scalars, report.data_ptr(), after_grid=(self.shared_slots,)
        )
        return report
