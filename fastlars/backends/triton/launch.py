"""What every launch needs: a current device, and options that fix the arithmetic."""

from __future__ import annotations

from typing import Any

from fastlars.backends.sending import current as current

# Fused multiply-adds round once where other back ends round twice.
OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
# For RMSprop warm-up: four arrays and a division would take 180 registers of each of 256 threads.
LARGE_OPTIONS: dict[str, Any] = {**OPTIONS, "num_warps": 16}
# For the kernels over tensors rather than elements.
SMALL_OPTIONS: dict[str, Any] = {**OPTIONS, "num_warps": 1}
