"""Parameter groups: biases and norms out of weight decay and adaptation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    exclude: Callable[[str, nn.Parameter], bool] | None = None,
    adapt_excluded: bool = False,
) -> list[dict[str, Any]]:
    """Two groups: matrices and filters, decayed and adapted; biases and norms, neither.

    A bias or the gain of a normalisation layer has at most one dimension. Their norms are small or
    zero at the start, so that a layer-wise ratio stalls them, and every large-batch recipe since
    Goyal et al. 2017 and Jia et al. 2018 leaves them out of weight decay; MLPerf's reference leaves
    them out of both.

    Args:
        model: its trainable parameters are grouped; shared ones appear once.
        weight_decay: of the first group, at least 0.
        exclude: ``exclude(name, parameter)`` says what belongs to the second group; by default,
            parameters of at most one dimension.
        adapt_excluded: True leaves the second group without decay, but adapted.

    Returns:
        Up to two dicts with ``params`` (pairs of name and parameter) and ``weight_decay``; the
        second also with ``adapt``. What they do not say is the optimizer's. A group without
        parameters is left out.

    Raises:
        ValueError: the model has no trainable parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> for group in parameter_groups(model, weight_decay=1e-4):
        ...     print([name for name, _ in group.pop("params")], group)
        ['0.weight'] {'weight_decay': 0.0001}
        ['0.bias', '1.weight', '1.bias'] {'weight_decay': 0.0, 'adapt': False}
    """

    def is_excluded(name: str, parameter: nn.Parameter) -> bool:
        return exclude(name, parameter) if exclude is not None else parameter.ndim <= 1

    kept: list[tuple[str, Tensor]] = []
    excluded: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (excluded if is_excluded(name, parameter) else kept).append((name, parameter))
    if not kept and not excluded:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    groups: list[dict[str, Any]] = [
        {"params": kept, "weight_decay": weight_decay},
        {"params": excluded, "weight_decay": 0.0, **({} if adapt_excluded else {"adapt": False})},
    ]
    return [group for group in groups if group["params"]]
