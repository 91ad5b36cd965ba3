"""Shared by the equations of all rules: keeps coefficients in the range of float32."""

from __future__ import annotations

import math

import torch

LARGEST_FLOAT = torch.finfo(torch.float32).max


def guarded_ratio(w: float, u: float, numerator: float, denominator: float) -> float:
    """numerator / denominator; 1 if a norm is 0: a ratio of 0 would freeze a tensor of zeros."""
    q = numerator / denominator if w > 0.0 and u > 0.0 else 1.0
    return LARGEST_FLOAT if q > LARGEST_FLOAT and math.isfinite(numerator) else q


def coefficient(value: float) -> float:
    """``value``, clamped to the largest float32: lr * ratio can overflow even where the ratio does
    not."""
    return LARGEST_FLOAT if LARGEST_FLOAT < value < math.inf else value
