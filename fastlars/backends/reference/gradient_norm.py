"""The norm of the gradient, for the global norm."""

from __future__ import annotations

from torch import Tensor

from fastlars.rules import GradientNorm


def measured(
    rule: GradientNorm, w: Tensor, g: Tensor, states: list[Tensor], counter: None
) -> tuple[Tensor]:
    return (g,)
