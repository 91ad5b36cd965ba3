"""Devices without float64, such as Intel's Arc A and Apple's GPUs: only plain torch serves them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@cache
def has_float64(device: torch.device) -> bool:
    """Whether torch computes in float64 on a device: tried once, because no attribute says so for
    every kind of device, and some hold float64 tensors but refuse to compute with them."""
    # torch.compile may trace the caller, and nothing fails on the fake tensors of its modes.
    with _disable_current_modes():
        value = torch.ones(1, dtype=torch.float32, device=device)  # fails for any other reason
        try:
            value.to(torch.float64).square().sum()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):
            return False
        return True


def widest(device: torch.device) -> torch.dtype:
    """The type of sums of squares on a device: float64, or float32 without it."""
    return torch.float64 if has_float64(device) else torch.float32


def to_widest(sums: Tensor, device: torch.device) -> Tensor:
    """Sums of squares on another device, in its ``widest`` type."""
    # torch converts on the device that a copy starts from, which may have no float64 either.
    if has_float64(device):
        return sums.to(device).to(torch.float64)
    return sums.to(torch.float32).to(device)
