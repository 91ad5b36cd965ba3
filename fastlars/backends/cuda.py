"""The CUDA back end: csrc/cuda through fastlars._C, on the current stream, without waiting."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends import cpu
from fastlars.backends.base import StepScalars, Tensors, checked_sums
from fastlars.backends.cpu import native
from fastlars.backends.upload import Resender, Sender, Sent, current, is_capturing
from fastlars.rules import GradientNorm, Rule

# Launch strategies of adaptive rules; the first is the default.
PATHS = ("one-launch", "two-launch")


def demanded_path() -> str:
    """The path that FASTLARS_CUDA_PATH demands, or the default."""
    path = os.environ.get("FASTLARS_CUDA_PATH", "") or PATHS[0]
    if path not in PATHS:
        raise ValueError(f"FASTLARS_CUDA_PATH must be one of {', '.join(PATHS)}, got {path!r}")
    return path


def serves() -> str:
    """The device type that this build's kernels run on."""
    served: str = _C.build_info().get("cuda_serves", "cuda")
    return served


@cache
def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on a device; empty where they can."""
    info = _C.build_info()
    if not info["cuda"]:
        return f"fastlars was built without CUDA kernels ({info['cuda_reason']})"
    if device.type != serves():
        return f"the cuda back end does not serve {device.type}"
    try:
        with current(device):
            return _C.cuda_why_not()
    except RuntimeError as error:  # torch's, where it finds no driver
        return str(error).strip().splitlines()[0]


class Tables:
    """A layout's tables on its device.

    Tensor entries are sent again when weights or states have moved, which is rare after the first
    step. Gradients do move, so their addresses are not in the tables but arguments of each launch.
    """

    def __init__(self, table: _C.CudaChunkTable, weights: list[Tensor]) -> None:
        self.device = weights[0].device
        self._table = table
        self._sender = Sender(weights)
        size = table.tensors * table.tensor_entry_bytes
        self._host = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self._entries = Resender(self._sender, self._host)
        self._fixed: Sent | None = None
        self._placed: tuple[Sent, Sent] | None = None

    def placed(self, tensors: _C.TensorList) -> tuple[Sent, Sent]:
        """What never changes, and the addresses of the bound tensors."""
        if self._table.write_tensor_entries(tensors, self._host.data_ptr()):
            self._placed = None
        if self._placed is not None:
            return self._placed
        fixed = self._fixed or self._send_fixed()
        placed = fixed, Sent(self._sender, self._entries.send())
        if not is_capturing(self.device):
            # What is sent while a graph is captured arrives only when the graph is replayed.
            self._fixed, self._placed = fixed, placed
        return placed

    def _send_fixed(self) -> Sent:
        size = self._table.chunks * self._table.chunk_entry_bytes
        entries = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._table.write_chunk_entries(entries.data_ptr())
        # Every launch needs zeros in some places; kernels restore them for the next launch.
        workspace = torch.zeros(self._table.workspace_bytes, dtype=torch.uint8, device=self.device)
        return Sent(self._sender, self._sender.send(self._sender.pinned(entries)), workspace)


@dataclass
class Layout:
    """What weights of given shapes need for every step. It outlives the tensors of one step."""

    checked: _C.Layout
    table: _C.CudaChunkTable
    tables: Tables
    placed: tuple[Sent, Sent] | None = None  # what `table` has the addresses of


@dataclass(frozen=True)
class Bound:
    """Addresses on the device, and the tensors that own them."""

    native: _C.TensorList
    layout: Layout
    placed: tuple[Sent, Sent]
    tensors: Tensors

    @property
    def device(self) -> torch.device:
        return self.layout.tables.device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def stream(self) -> int:
        """The current stream, ready for a launch over these tables."""
        layout, placed = self.layout, self.placed
        if layout.placed is not placed:
            (chunk_entries, workspace), (tensor_entries,) = (sent.tensors for sent in placed)
            addressed = (chunk_entries, tensor_entries, workspace)
            layout.table.place(*(tensor.data_ptr() for tensor in addressed))
            layout.placed = placed
        if self.device.type == "cpu":
            return 0
        stream = torch.cuda.current_stream(self.device)
        for sent in placed:
            sent.precede(stream)
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
        """Of one float or double. A bad address would poison the CUDA context."""
        if value is None:
            return 0, False
        address, is_double = value.data_ptr(), value.dtype == torch.float64
        fits = is_double or value.dtype == other
        if not (fits and address and value.device == self.device and value.numel() == 1):
            raise ValueError(
                f"a step on {self.device} needs its numbers there: one float32 or float64 each, "
                "and a norm's square as float64"
            )
        return address, is_double


class Cuda:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    ``measure`` and ``apply`` take one launch each, whatever the number of tensors up to 480.
    ``step`` takes one too, or those two on the two-launch path and where it rounds stochastically.
    Results have the same bits on either path, for any grid, and from run to run.

    Attributes:
        path: "one-launch" or "two-launch".
        grid: blocks of a launch; 0 for as many as the device holds at once.
        shared_slots: chunks that a block caches in shared memory on the one-launch path; 0 for what
            fits.
    """

    name = "cuda"
    reads_device = True

    def __init__(self) -> None:
        self.path = demanded_path()
        self.grid = 0
        self.shared_slots = 0
        self._checks = cpu.Cpu()

    def layout(self, weights: list[Tensor]) -> Layout:
        device = weights[0].device
        if device.type != serves() or any(weight.device != device for weight in weights):
            raise ValueError(f"the cuda back end needs weights on one {serves()} device")
        checked = self._checks.layout(weights)
        table = _C.CudaChunkTable(checked)
        return Layout(checked, table, Tables(table, weights))

    def bind(self, tensors: Tensors, layout: Layout) -> Bound:
        found = self._checks.bind(tensors, layout.checked).native
        return Bound(found, layout, layout.tables.placed(found), tensors)

    def _launch(
        self,
        call: Callable[..., None],
        rule: Rule | GradientNorm,
        bound: Bound,
        scalars: StepScalars,
        *arguments: int | None,
        last: tuple[int, ...] = (),
    ) -> None:
        """Call into the extension on the current stream; ``arguments`` are the call's own."""
        table, device_scalars = bound.layout.table, bound.scalars(scalars)
        with current(bound.device):
            where = (bound.stream(), self.grid)
            call(native(rule), bound.native, table, device_scalars, *arguments, *where, *last)

    def measure(self, rule: Rule | GradientNorm, bound: Bound, scalars: StepScalars) -> Tensor:
        sums = bound.empty(bound.layout.table.tensors, rule.sums, dtype=torch.float64)
        self._launch(_C.cuda_measure, rule, bound, scalars, sums.data_ptr())
        return sums

    def apply(self, rule: Rule, bound: Bound, scalars: StepScalars, sums: Tensor | None) -> Tensor:
        ratios = bound.empty(bound.layout.table.tensors, dtype=torch.float32)
        sums = checked_sums(rule, sums, len(ratios), ratios.device)
        address = 0 if sums is None else sums.data_ptr()
        self._launch(_C.cuda_apply, rule, bound, scalars, scalars.seed, address, ratios.data_ptr())
        return ratios

    def step(self, rule: Rule, bound: Bound, scalars: StepScalars) -> Tensor:
        if not rule.adapt:
            return self.apply(rule, bound, scalars, None)
        if self.path == "two-launch" or scalars.seed is not None:
            return self.apply(rule, bound, scalars, self.measure(rule, bound, scalars))
        ratios = bound.empty(bound.layout.table.tensors, dtype=torch.float32)
        self._launch(
            _C.cuda_step, rule, bound, scalars, ratios.data_ptr(), last=(self.shared_slots,)
        )
        return ratios
