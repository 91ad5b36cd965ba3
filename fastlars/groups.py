"""Parameter groups: biases and norms out of weight decay, out of adaptation, or out of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Excluded = Literal["none", "norms", "norms+biases"]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Excluded = "norms+biases",
    no_ratio: Excluded = "norms+biases",
    exclude: Callable[[str, nn.Parameter], bool] | None = None,
    adapt_excluded: bool = False,
) -> list[dict[str, Any]]:
    """Matrices and filters, decayed and adapted; biases and norms, by default neither.

    A bias or the gain of a normalisation layer has at most one dimension. Their norms are small or
    zero at the start, so that a layer-wise ratio stalls them, and every large-batch recipe since
    Goyal et al. 2017 and Jia et al. 2018 leaves some of them out of weight decay; MLPerf's
    reference leaves them out of both, LAMB's authors the norms alone.

    Args:
        model: its trainable parameters are grouped; shared ones appear once.
        weight_decay: of the parameters that are decayed, at least 0.
        no_decay: parameters without weight decay. ``"norms"``: gains and biases of normalisation
            layers, known by having at most one dimension in a module without any larger parameter
            of its own; ``"norms+biases"``: all of at most one dimension; ``"none"``.
        no_ratio: parameters that are not adapted, likewise.
        exclude: ``exclude(name, parameter)`` names the parameters that get neither, in place of
            ``no_decay`` and ``no_ratio``.
        adapt_excluded: True is ``no_ratio="none"``, and adapts also what ``exclude`` names.

    Returns:
        Up to four dicts with ``params`` (pairs of name and parameter) and ``weight_decay``; those
        that are not adapted also with ``adapt``. What they do not say is the optimizer's. A group
        without parameters is left out.

    Raises:
        ValueError: the model has no trainable parameters, or arguments are none of their choices
            or exclude each other.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        >>> for group in parameter_groups(model, weight_decay=1e-4):
        ...     print([name for name, _ in group.pop("params")], group)
        ['0.weight'] {'weight_decay': 0.0001}
        ['0.bias', '1.weight', '1.bias'] {'weight_decay': 0.0, 'adapt': False}
        >>> for group in parameter_groups(model, 1e-4, no_decay="norms", no_ratio="none"):
        ...     print([name for name, _ in group.pop("params")], group)
        ['0.weight', '0.bias'] {'weight_decay': 0.0001}
        ['1.weight', '1.bias'] {'weight_decay': 0.0}
    """
    if exclude is None:
        undecayed = _small(model, "no_decay", no_decay)
        unadapted = _small(model, "no_ratio", no_ratio)
    elif (no_decay, no_ratio) == ("norms+biases", "norms+biases"):
        undecayed = unadapted = {name for name, p in model.named_parameters() if exclude(name, p)}
    else:
        raise ValueError("exclude takes the place of no_decay and no_ratio: leave them out")
    if adapt_excluded:
        unadapted = set()
    found: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {
        (decay, adapt): [] for decay in (True, False) for adapt in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name not in undecayed, name not in unadapted].append((name, parameter))
    if not any(found.values()):
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decay else 0.0,
            **({} if adapt else {"adapt": False}),
        }
        for (decay, adapt), params in found.items()
        if params
    ]


def _small(model: nn.Module, keyword: str, which: str) -> set[str]:
    """Names of the parameters of at most one dimension that the choice `which` means."""
    if which not in ("none", "norms", "norms+biases"):
        raise ValueError(f'{keyword} must be "none", "norms" or "norms+biases", got {which!r}')
    small = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    return {"none": set(), "norms": small & _of_norms(model), "norms+biases": small}[which]


def _of_norms(model: nn.Module) -> set[str]:
    """Parameters of modules whose own parameters all have at most one dimension."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        # What torch's weight_norm and the like make of a weight lies in a child of its module.
        held = module.parametrizations.parameters() if is_parametrized(module) else ()
        if all(parameter.ndim <= 1 for parameter in (*own.values(), *held)):
            names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names
