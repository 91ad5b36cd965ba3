"""Norms of every layer's weights and gradient: table 2 of the LARS paper, for any model.

You, Gitman and Ginsburg 2017 print the norms at the first step, and their ratio; the gradient is
the loss's, without weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A residual block whose last gamma starts at 0 sends no gradient to its other layers in the first
# step; after a few steps every layer has one.
STEPS = (0, 10)
LayerNorms = dict[str, tuple[float, float]]  # by parameter name: |w|, |g|


def weights(model: nn.Module) -> dict[str, Tensor]:
    """|w| of every parameter, by name, left on its device."""
    return {name: _norm(p.detach()) for name, p in model.named_parameters()}


def measure(model: nn.Module, weights: dict[str, Tensor], scale: float = 1.0) -> LayerNorms:
    """(|w|, |g|) of every parameter that has a gradient, by name, in the model's order.

    Waits for the device once, whatever the number of parameters.

    `weights` is what the function of that name returned before the backward pass; the model's
    gradients are `scale` times the loss's.
    """
    named = {n: _norm(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    if not named:
        return {}
    gradients = torch.stack(list(named.values()))
    pairs = torch.stack([torch.stack([weights[name] for name in named]), gradients], 1).tolist()
    return {
        name: (weight, gradient / scale)
        for name, (weight, gradient) in zip(named, pairs, strict=True)
    }


def _norm(values: Tensor) -> Tensor:
    # float64: a gradient's squares may lie below float32's range, and this is rarely computed.
    return torch.linalg.vector_norm(values, dtype=torch.float64)
