"""Norms of every layer's weights and gradient: table 2 of the LARS paper, for any model."""

from __future__ import annotations

import torch
from torch import nn


def measure(model: nn.Module) -> dict[str, tuple[float, float]]:
    """(|w|, |g|) of every parameter that has a gradient, by name, in the model's order.

    The loop calls it before the first step of a run, when all gradients are there and no weight has
    moved yet, and writes ``layers=measure(model)`` as the record "norms". You, Gitman and Ginsburg
    2017 print these norms and their ratio in table 2; the gradient is the loss's, without weight
    decay.

    One transfer from the device, whatever the number of parameters.
    """
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    if not named:
        return {}
    # float64: a gradient's squares may lie below float32's range, and once a run it costs nothing.
    norms = [
        torch.stack(
            [torch.linalg.vector_norm(t, dtype=torch.float64) for t in (p.detach(), p.grad)]
        )
        for p in named.values()
        if p.grad is not None
    ]
    pairs = torch.stack(norms).tolist()
    return {name: (weight, gradient) for name, (weight, gradient) in zip(named, pairs, strict=True)}
