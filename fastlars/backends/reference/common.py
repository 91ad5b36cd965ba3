"""Shared by the equations of all rules: results stay in the range of float32."""

from __future__ import annotations

import math

import torch

LARGEST_FLOAT = torch.finfo(torch.float32).max


def guarded_ratio(
    w: float,
    u: float,
    numerator: float,
    denominator: float,
    floor: float = 0.0,
    ceiling: float = math.inf,
) -> float:
    """q = numerator / denominator within [floor, ceiling]; 1 where either norm is 0: such a tensor,
    of fresh zeros or without a gradient, would otherwise never move again."""
    if not (w > 0.0 and u > 0.0):
        return 1.0
    q = min(max(numerator / denominator, floor), ceiling)
    return LARGEST_FLOAT if q > LARGEST_FLOAT and math.isfinite(numerator) else q


def coefficient(value: float) -> float:
    """lr q can overflow float32 even where q does not: it is then the largest float."""
    return LARGEST_FLOAT if LARGEST_FLOAT < value < math.inf else value
