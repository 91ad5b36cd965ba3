"""What every launch needs: a current device, and options that fix the arithmetic."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

# Fused multiply-adds round once where other back ends round twice.
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
# For the kernels over tensors rather than elements.
SMALL_OPTIONS: dict[str, Any] = {**OPTIONS, "num_warps": 1}


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, to which launches go."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
