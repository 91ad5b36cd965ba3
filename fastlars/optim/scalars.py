"""The scalars of a step: learning rate, gradient scale, a GradScaler's verdict, global clip.

They are read on the host where a back end needs them there. Where all back ends read them on the
device, the host does not wait for the device, and a step can be recorded into a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import Backend, OnDevice, StepScalars
from fastlars.ranges import real


class HostScalars:
    """Scalars as Python numbers. To read a tensor, the host waits for its device."""

    on_device = False

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.skip = found_inf is not None and float(found_inf) != 0.0
        self.has_scaler = found_inf is not None
        self._unscale = 1.0 if grad_scale is None or self.skip else 1.0 / float(grad_scale)
        self._norm = 0.0

    def unclipped(self, sign: float, device: torch.device) -> StepScalars:
        """The scalars to measure gradients with for the global norm: neither lr nor clip."""
        return StepScalars(lr=0.0, gradient_scale=sign * self._unscale)

    def set_square(self, square: Tensor) -> None:
        """Take the global norm, given its square."""
        self._norm = math.sqrt(float(square))

    def _clip(self, limit: float | None) -> float:
        """The factor of the clip; 1 for a norm that is NaN, which no factor would mend."""
        if limit is None or not self._norm > limit:
            return 1.0
        return real("max_grad_norm", limit) / self._norm

    def clipped_sums(self, sums: Tensor, limit: float | None) -> Tensor:
        """Sums of squares of gradients before the clip, as they are after it."""
        return sums * self._clip(limit) ** 2

    def skip_where(self, condition: bool | Tensor) -> None:
        """Skip the step where this is true."""
        self.skip = bool(condition)

    def verdict(self) -> Tensor | None:
        """None: the host has decided already."""
        return None

    def unless_skipped(self, square: Tensor) -> Tensor:
        """The square, or NaN where a GradScaler skips the step."""
        return square.fill_(math.nan) if self.skip else square

    def of_batch(
        self, lr: Any, sign: float, limit: float | None, seed: int | None, device: torch.device
    ) -> StepScalars:
        """The scalars of one batch; clipped to ``limit``, its group's ``max_grad_norm``."""
        return StepScalars(_rate(lr), sign * self._unscale * self._clip(limit), seed)


class DeviceScalars:
    """Scalars that are tensors stay on their device; those that the host knows go by value."""

    on_device = True

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.skip = False  # as far as the host knows
        self.has_scaler = found_inf is not None
        self._grad_scale = grad_scale
        self._found_inf = found_inf
        self._verdict: Tensor | None = None
        self._square: Tensor | None = None

    def unclipped(self, sign: float, device: torch.device) -> StepScalars:
        """The scalars to measure gradients with for the global norm: neither lr nor clip."""
        scale = _on_device(self._grad_scale, device)
        return StepScalars(0.0, sign, None, None if scale is None else OnDevice(grad_scale=scale))

    def set_square(self, square: Tensor) -> None:
        """Take the global norm, given its square."""
        self._square = square

    def clipped_sums(self, sums: Tensor, limit: float | None) -> Tensor:
        """Sums of squares of gradients before the clip, as they are after it."""
        square = None if limit is None else _on_device(self._square, sums.device)
        if square is None:
            return sums
        most = real("max_grad_norm", limit) ** 2
        return sums * torch.where(square > most, most / square, 1.0)

    def skip_where(self, condition: bool | Tensor) -> None:
        """Skip the step where this is true, or where a GradScaler has found an inf or NaN."""
        if isinstance(condition, bool):
            self.skip = condition
            return
        assert self._square is not None
        condition = to_device(condition, self._square.device)
        found = self.verdict()
        self._verdict = (
            condition if found is None else condition | to_device(found, condition.device)
        )
        self._found_inf = self._verdict.to(torch.float32)

    def verdict(self) -> Tensor | None:
        """Whether to skip the step, as a 0-dim bool tensor; None where no step can be skipped."""
        if self._verdict is None and self._found_inf is not None:
            self._verdict = self._found_inf.reshape(()).ne(0)
        return self._verdict

    def unless_skipped(self, square: Tensor) -> Tensor:
        """The square, or NaN where a GradScaler skips the step."""
        found = self.verdict()
        if found is None:
            return square
        return square.masked_fill(to_device(found, square.device), math.nan)

    def of_batch(
        self, lr: Any, sign: float, limit: float | None, seed: int | None, device: torch.device
    ) -> StepScalars:
        """The scalars of one batch; clipped to ``limit``, its group's ``max_grad_norm``."""
        rate = lr if isinstance(lr, Tensor) and lr.device.type == device.type else None
        there = OnDevice(
            _on_device(rate, device),
            _on_device(self._grad_scale, device),
            _on_device(self._found_inf, device),
            None if limit is None else _on_device(self._square, device),
            math.inf if limit is None else real("max_grad_norm", limit),
        )
        known = _rate(lr) if rate is None else 0.0
        return StepScalars(known, sign, seed, there if there.given else None)


def square_of_norm(sums: list[Tensor], on_device: bool) -> Tensor:
    """The square of the global norm, from every batch's sums of squares."""
    first = sums[0].device
    if on_device:
        squares = [each[:, -1].sum().to(first, non_blocking=True) for each in sums]
        return torch.stack(squares).sum() if squares[1:] else squares[0]
    # fsum is exact, so that ranks that cut their parameters into other batches get the same bits.
    try:
        total = math.fsum(x for each in sums for x in each[:, -1].tolist())
    except OverflowError:
        total = math.inf
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def _rate(lr: Any) -> float:
    return lr if type(lr) is float and lr >= 0.0 else real("lr", lr)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device. The host waits only for copies to the host."""
    return value.to(device, non_blocking=device.type != "cpu")


def _on_device(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A scalar tensor on a device, in a type that every kernel reads."""
    if value is None:
        return None
    dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float64
    value = value.to(device, dtype, non_blocking=True)
    return value.resolve_neg() if value.is_neg() else value


# Of a whole step; ``of_batch`` gives a back end its StepScalars for one batch.
Scalars = HostScalars | DeviceScalars


def scalars_for(
    backends: Iterable[Backend], grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> Scalars:
    """The scalars of a step: on the device where all of these back ends read them there."""
    on_device = all(backend.reads_device for backend in backends)
    return (DeviceScalars if on_device else HostScalars)(grad_scale, found_inf)
