"""Checks of what cannot be combined with work during backward, made before anything changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlars.optim.base import FusedOptimizer, inner_optimizer

# Attributes of an optimizer that GradScaler sets for the time of a step.
_SET_BY_SCALER = ("grad_scale", "found_inf")


def shared_parameters(
    optimizer: Any, module: torch.nn.Module, feature: str
) -> tuple[FusedOptimizer, list[Tensor]]:
    """The optimizer inside its wrappers, and the parameters of ``module`` that it steps."""
    optimizer = inner_optimizer(optimizer)
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"{feature} needs an optimizer of fastlars, got {type(optimizer).__name__}")
    if optimizer.overlap_hook is not None:
        raise RuntimeError(
            "this optimizer already steps during backward: remove() that handle first, which after "
            "a backward pass takes effect in optimizer.step()"
        )
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    shared: list[Tensor] = [p for p in module.parameters() if p.requires_grad and p in stepped]
    if not shared:
        raise ValueError("the optimizer steps none of the module's parameters")
    return optimizer, shared


def has_scaler(optimizer: FusedOptimizer) -> bool:
    """Whether a GradScaler has passed its scale or its verdict to this step."""
    return any(getattr(optimizer, name, None) is not None for name in _SET_BY_SCALER)


def raise_scaler(optimizer: FusedOptimizer, advice: str) -> None:
    """Raise the error for a GradScaler where parameters are stepped during backward."""
    for name in _SET_BY_SCALER:
        # After an error GradScaler does not remove them, and the next step would find them.
        vars(optimizer).pop(name, None)
    raise RuntimeError(
        "a GradScaler does not go with steps during backward, which are taken before it has seen "
        f"all gradients; bfloat16 needs no scaler. {advice}"
    )


def raise_changed(what: str, advice: str) -> None:
    """Raise the error for a tensor or option that was changed after it was used in backward."""
    clip = "For a clip of all gradients, or their norm alone (math.inf), set max_grad_norm. "
    raise RuntimeError(
        f"a {what} was changed between backward and optimizer.step(): it was used already, during "
        f"backward. Change it before backward, or after optimizer.step(). "
        f"{clip if what == 'gradient' else ''}{advice}"
    )
