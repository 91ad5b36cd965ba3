"""Norms of every layer's weights and gradient: table 2 of the LARS paper, for any model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The paper's table is of the first step. A residual block whose last gamma starts at 0 has no
# gradient behind it then; after a few steps every layer has one.
STEPS = (0, 10)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """|w| of every parameter, by name, left on its device.

    To be taken before a backward pass: with --overlap that one moves the weights.
    """
    return {name: _norm(p.detach()) for name, p in model.named_parameters()}


def measure(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """(|w|, |g|) of every parameter that has a gradient, by name, in the model's order.

    The loop calls it in the steps of a run that `STEPS` names, when all gradients are there, and
    writes ``layers=measure(model, weights)`` as the record "norms". You, Gitman and Ginsburg 2017
    print these norms and their ratio in table 2; the gradient is the loss's, without weight decay.

    One transfer from the device, whatever the number of parameters.
    """
    named = {n: _norm(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    if not named:
        return {}
    gradients = torch.stack(list(named.values()))
    pairs = torch.stack([torch.stack([weights[name] for name in named]), gradients], 1).tolist()
    return {name: (weight, gradient) for name, (weight, gradient) in zip(named, pairs, strict=True)}


def _norm(values: Tensor) -> Tensor:
    # float64: a gradient's squares may lie below float32's range, and twice a run it costs nothing.
    return torch.linalg.vector_norm(values, dtype=torch.float64)
