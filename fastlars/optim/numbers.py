"""The numbers of a step: learning rate, gradient scale, verdict of a GradScaler, global clip.

They are read on the host where a back end needs them there. Where all back ends read them on the
device, nothing waits for it, and a step can be recorded into a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.base import Scalars


class HostNumbers:
    """Python numbers; looking at a tensor waits for its device."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.skip = found_inf is not None and float(found_inf) != 0.0
        self._unscale = 1.0 if grad_scale is None or self.skip else 1.0 / float(grad_scale)
        self._norm = 0.0

    def unclipped(self, sign: float, device: torch.device) -> Scalars:
        """For measuring gradients: they are not stepped yet."""
        return Scalars(lr=0.0, gradient_scale=sign * self._unscale)

    def take_norm(self, sums: list[Tensor]) -> None:
        """The global norm, from every list's sums of squares."""
        self.take_square(square(sums, on_device=False))

    def take_square(self, square: Tensor) -> None:
        """The global norm, from its square."""
        self._norm = math.sqrt(float(square))

    def scalars(
        self, lr: Any, sign: float, limit: float | None, seed: int | None, device: torch.device
    ) -> Scalars:
        """For one list, clipped where its group asks for it."""
        scale = sign * self._unscale
        if limit is not None and self._norm > limit:
            scale *= limit / self._norm
        return Scalars(float(lr), scale, seed)


class DeviceNumbers:
    """Tensors stay where they are; what the host knows goes by value."""

    skip = False  # known to the device alone

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._grad_scale = grad_scale
        self._found_inf = found_inf
        self._norm: Tensor | None = None

    def unclipped(self, sign: float, device: torch.device) -> Scalars:
        """For measuring gradients: they are not stepped yet."""
        return _scalars(0.0, self._unscaled(sign, device), 0.0, None, device)

    def take_norm(self, sums: list[Tensor]) -> None:
        """The global norm, from every list's sums of squares."""
        self.take_square(square(sums, on_device=True))

    def take_square(self, square: Tensor) -> None:
        """The global norm, from its square."""
        self._norm = square.sqrt()

    def scalars(
        self, lr: Any, sign: float, limit: float | None, seed: int | None, device: torch.device
    ) -> Scalars:
        """For one list, clipped where its group asks for it."""
        scale = self._unscaled(sign, device)
        if limit is not None and self._norm is not None:
            norm = _double(self._norm, device)
            scale = scale * torch.where(norm > limit, limit / norm, 1.0)
        if isinstance(lr, Tensor) and lr.device.type == "cpu" and device.type != "cpu":
            lr = float(lr)
        return _scalars(lr, scale, self._found_inf, seed, device)

    def _unscaled(self, sign: float, device: torch.device) -> float | Tensor:
        return sign if self._grad_scale is None else sign / _double(self._grad_scale, device)


def square(sums: list[Tensor], on_device: bool) -> Tensor:
    """The square of the global norm, from every list's sums of squares."""
    first = sums[0].device
    if on_device:
        squares = [each[:, 1].sum().to(first, non_blocking=True) for each in sums]
        return torch.stack(squares).sum()
    total = sum(x for each in sums for x in each[:, 1].tolist())
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def _double(value: Tensor, device: torch.device) -> Tensor:
    return value.detach().reshape(()).to(device, torch.float64, non_blocking=True)


def _scalars(
    lr: float | Tensor,
    scale: float | Tensor,
    skip: float | Tensor | None,
    seed: int | None,
    device: torch.device,
) -> Scalars:
    values = [lr, scale, 0.0 if skip is None else skip]
    by_value = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    tensor = None
    if any(isinstance(value, Tensor) for value in values):
        # full fills in a launch: no host memory that a graph would read again at its replay.
        tensor = torch.stack(
            [
                _double(value, device)
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=torch.float64, device=device)
                for value in values
            ]
        )
    return Scalars(by_value[0], by_value[1], seed, tensor)


Numbers = HostNumbers | DeviceNumbers


def numbers(reads_device: bool, grad_scale: Tensor | None, found_inf: Tensor | None) -> Numbers:
    """The numbers of a step whose back ends all read them on the device, or do not."""
    if reads_device:
        return DeviceNumbers(grad_scale, found_inf)
    return HostNumbers(grad_scale, found_inf)
