"""The options of parameter groups: those of every optimizer, and those of its signature."""

from __future__ import annotations

from typing import Any

import torch

# Options of every optimizer, whatever its rule.
OPTIONS: dict[str, Any] = {
    "maximize": False,
    "max_grad_norm": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "state_dtype": torch.float32,
    "capturable": False,
    "fused_unscale": None,
}


def from_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The defaults of parameter groups, from ``locals()`` at the top of a subclass's ``__init__``.

    An option is thus named once, in the signature, whose order is that of the groups' keys.
    """
    others = ("self", "__class__", "params", "norm_group", "skip_if")
    return {name: value for name, value in arguments.items() if name not in others}
