"""The numbers of a step: learning rate, gradient scale, verdict of a GradScaler, global clip.

They are read on the host where a back end needs them there. Where all back ends read them on the
device, nothing waits for it, and a step can be recorded into a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import OnDevice, StepScalars
from fastlars.rules import real


class HostNumbers:
    """Python numbers; looking at a tensor waits for its device."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.skip = found_inf is not None and float(found_inf) != 0.0
        self.scaled = found_inf is not None
        self._unscale = 1.0 if grad_scale is None or self.skip else 1.0 / float(grad_scale)
        self._norm = 0.0

    def unclipped(self, sign: float, device: torch.device) -> StepScalars:
        """For measuring gradients: they are not stepped yet."""
        return StepScalars(lr=0.0, gradient_scale=sign * self._unscale)

    def square(self, sums: list[Tensor]) -> Tensor:
        """The square of the global norm, from every list's sums of squares."""
        return square(sums, on_device=False)

    def take_square(self, square: Tensor) -> None:
        """The global norm, from its square."""
        self._norm = math.sqrt(float(square))

    def skip_where(self, wanted: bool | Tensor) -> None:
        """Skip the step where this is true."""
        self.skip = bool(wanted)

    def verdict(self) -> Tensor | None:
        """None: nothing is left for the device to decide."""
        return None

    def unless_skipped(self, square: Tensor) -> Tensor:
        """The square, or NaN where a GradScaler skips the step."""
        return square.fill_(math.nan) if self.skip else square

    def scalars(
        self, lr: Any, sign: float, limit: float | None, seed: int | None, device: torch.device
    ) -> StepScalars:
        """For one list, clipped where its group asks for it."""
        scale = sign * self._unscale
        if limit is not None and self._norm > limit:
            scale *= real("max_grad_norm", limit) / self._norm
        return StepScalars(_rate(lr), scale, seed)


class DeviceNumbers:
    """Tensors stay where they are; what the host knows goes by value."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.skip = False  # as far as the host knows
        self.scaled = found_inf is not None
        self._grad_scale = grad_scale
        self._found_inf = found_inf
        self._verdict: Tensor | None = None
        self._square: Tensor | None = None

    def unclipped(self, sign: float, device: torch.device) -> StepScalars:
        """For measuring gradients: they are not stepped yet."""
        scale = _there(self._grad_scale, device)
        return StepScalars(0.0, sign, None, None if scale is None else OnDevice(grad_scale=scale))

    def square(self, sums: list[Tensor]) -> Tensor:
        """The square of the global norm, from every list's sums of squares."""
        return square(sums, on_device=True)

    def take_square(self, square: Tensor) -> None:
        """The global norm, from its square."""
        self._square = square

    def skip_where(self, wanted: bool | Tensor) -> None:
        """Skip the step where this is true, as where a GradScaler has found what is not finite."""
        if isinstance(wanted, bool):
            self.skip = wanted
            return
        assert self._square is not None
        wanted = moved(wanted, self._square.device)
        found = self.verdict()
        self._verdict = wanted if found is None else wanted | moved(found, wanted.device)
        self._found_inf = self._verdict.to(torch.float32)

    def verdict(self) -> Tensor | None:
        """Whether the device skips the step: a 0-dim bool tensor; None where it does not ask."""
        if self._verdict is None and self._found_inf is not None:
            self._verdict = self._found_inf.reshape(()).ne(0)
        return self._verdict

    def unless_skipped(self, square: Tensor) -> Tensor:
        """The square, or NaN where a GradScaler skips the step."""
        found = self.verdict()
        return (
            square if found is None else square.masked_fill(moved(found, square.device), math.nan)
        )

    def scalars(
        self, lr: Any, sign: float, limit: float | None, seed: int | None, device: torch.device
    ) -> StepScalars:
        """For one list, clipped where its group asks for it."""
        rate = lr if isinstance(lr, Tensor) and lr.device.type == device.type else None
        there = OnDevice(
            _there(rate, device),
            _there(self._grad_scale, device),
            _there(self._found_inf, device),
            None if limit is None else _there(self._square, device),
            math.inf if limit is None else real("max_grad_norm", limit),
        )
        known = _rate(lr) if rate is None else 0.0
        return StepScalars(known, sign, seed, there if there.given else None)


def square(sums: list[Tensor], on_device: bool) -> Tensor:
    """The square of the global norm, from every list's sums of squares."""
    first = sums[0].device
    if on_device:
        squares = [each[:, -1].sum().to(first, non_blocking=True) for each in sums]
        return torch.stack(squares).sum() if squares[1:] else squares[0]
    # Exact, and so the same on ranks whose lists are cut otherwise.
    try:
        total = math.fsum(x for each in sums for x in each[:, -1].tolist())
    except OverflowError:
        total = math.inf
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def _rate(lr: Any) -> float:
    return lr if type(lr) is float and lr >= 0.0 else real("lr", lr)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. Nothing waits, unless the host is to have it."""
    return value.to(device, non_blocking=device.type != "cpu")


def _there(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A number on a device, as floats that every kernel reads."""
    if value is None:
        return None
    dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float64
    value = value.to(device, dtype, non_blocking=True)
    return value.resolve_neg() if value.is_neg() else value


Numbers = HostNumbers | DeviceNumbers


def numbers(reads_device: bool, grad_scale: Tensor | None, found_inf: Tensor | None) -> Numbers:
    """The numbers of a step whose back ends all read them on the device, or do not."""
    if reads_device:
        return DeviceNumbers(grad_scale, found_inf)
    return HostNumbers(grad_scale, found_inf)
