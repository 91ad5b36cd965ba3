"""Trust ratios, and the norms that made them, by the names of the layers: for logs and pictures.

``layer_statistics`` reads what the last step measured; ``scalars`` and ``summary`` make of it what
loggers take; ``heat_map`` draws several steps. A step costs the same with and without them: what
they read is there after every step, and stays on the device until it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastlars.optim.base import FusedOptimizer, inner_optimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerStatistics", "heat_map", "layer_statistics", "scalars", "summary"]


@dataclass(frozen=True)
class LayerStatistics:
    """What a step measured of a layer, that is, of one parameter.

    Attributes:
        trust_ratio: q, a factor of the layer's step: by default ``eta |w| / (|g| + wd |w|)`` for
            LARS, ``|w| / |u|`` for LAMB. Of the two that LANS has, the momentum's.
        norms: the Euclidean norms that q was computed from, by name. ``"weight"``, before the
            step; LARS: ``"gradient"`` (with ``ratio="combined"``, of the gradient with its weight
            decay); LAMB: ``"update"``; LANS: ``"momentum"`` and ``"gradient"``, its two directions.
            Gradients are unscaled and clipped; a sharded layer's norms are of all of it.
    """

    trust_ratio: float
    norms: dict[str, float]


def layer_statistics(model: nn.Module, optimizer: Optimizer) -> dict[str, LayerStatistics]:
    """Trust ratio and norms of every layer that the last step adapted.

    This waits for the device, and copies from it once, whatever the number of layers: call it at
    the steps that are logged. No process waits for another one.

    Args:
        model: the names of its ``named_parameters()`` are those of the result, in the same order.
        optimizer: the optimizer, or a wrapper of Lightning or Accelerate around it.

    Returns:
        A dict from names to statistics, without the parameters that have no ratio, such as those
        with ``adapt=False``. It is empty before the first step, after a step that was skipped, and
        for ``fastlars.RMSpropWarmup``. Where a ``GradScaler`` did not call ``step``, and after a
        step inside ``torch.compile``, it still describes the step before.

    Raises:
        TypeError: the optimizer is not one of fastlars.
        ValueError: the optimizer steps none of the model's parameters.

    Example:
        >>> import torch, fastlars
        >>> model = torch.nn.Linear(4, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> groups = fastlars.parameter_groups(model, weight_decay=0.0)
        >>> optimizer = fastlars.LARS(groups, lr=1.0)
        >>> model(torch.full((4,), 0.5)).sum().backward()
        >>> optimizer.step()
        >>> layers = layer_statistics(model, optimizer)
        >>> list(layers), layers["weight"].norms
        (['weight'], {'weight': 4.0, 'gradient': 2.0})
        >>> round(layers["weight"].trust_ratio, 6)  # 0.001 * 4 / 2
        0.002
    """
    fused = inner_optimizer(optimizer)
    if not isinstance(fused, FusedOptimizer):
        raise TypeError(
            f"layer_statistics needs an optimizer of fastlars, got {type(fused).__name__}"
        )
    results = [result for result in fused.stepper.results if result.rule.adapt]
    if not results:
        return {}
    verdict = fused.stepper.verdict
    flag = [] if verdict is None else [verdict]
    reports = _on_host([*(result.report for result in results), *flag])
    if flag and reports.pop():
        return {}
    found = {
        p: LayerStatistics(ratio, dict(zip(result.rule.norms, norms, strict=True)))
        for result, report in zip(results, reports, strict=True)
        for p, (ratio, *norms) in zip(result.params, report.tolist(), strict=True)
    }
    named = {name: found[p] for name, p in model.named_parameters() if p in found}
    stepped = {p for group in fused.param_groups for p in group["params"]}
    if not named and stepped.isdisjoint(model.parameters()):
        raise ValueError("the optimizer steps none of the model's parameters")
    return named


def scalars(statistics: Mapping[str, LayerStatistics]) -> dict[str, float]:
    """A flat dict for a logger, with a trust ratio and the norms of every layer.

    Args:
        statistics: what ``layer_statistics`` returned.

    Returns:
        Keys such as ``trust_ratio/NAME``, ``weight_norm/NAME`` and ``gradient_norm/NAME``, which
        TensorBoard and Weights & Biases show in a section for each word.

    Example:
        >>> scalars({"fc": LayerStatistics(0.002, {"weight": 4.0, "gradient": 2.0})})
        {'trust_ratio/fc': 0.002, 'weight_norm/fc': 4.0, 'gradient_norm/fc': 2.0}
    """
    found = {f"trust_ratio/{name}": layer.trust_ratio for name, layer in statistics.items()}
    for name, layer in statistics.items():
        found |= {f"{norm}_norm/{name}": value for norm, value in layer.norms.items()}
    return found


def summary(statistics: Mapping[str, LayerStatistics]) -> dict[str, float]:
    """The smallest, the median and the largest trust ratio, as a flat dict for a logger.

    Args:
        statistics: what ``layer_statistics`` returned.

    Returns:
        ``trust_ratio_min``, ``trust_ratio_median`` (of an even number of layers, the smaller one
        of the two in the middle) and ``trust_ratio_max``; all NaN where any ratio is NaN. Empty
        for no layer.

    Example:
        >>> ratios = {"conv1": 4.0, "conv2": 0.5, "fc": 1.0}
        >>> summary({name: LayerStatistics(q, {}) for name, q in ratios.items()})
        {'trust_ratio_min': 0.5, 'trust_ratio_median': 1.0, 'trust_ratio_max': 4.0}
    """
    if not statistics:
        return {}
    given = [layer.trust_ratio for layer in statistics.values()]
    ratios = torch.tensor(given, dtype=torch.float64, device="cpu")
    three = {"min": ratios.min(), "median": ratios.median(), "max": ratios.max()}
    return {f"trust_ratio_{name}": value.item() for name, value in three.items()}


def heat_map(
    history: Iterable[tuple[float, Mapping[str, LayerStatistics | float | None]]], title: str = ""
) -> Figure:
    """Draw trust ratios: a row for each layer, a column for each step, colours on a log scale.

    A ratio without a logarithm (missing, None, NaN, 0 or negative) is grey. This needs matplotlib,
    which ``pip install 'fastlars[trainer]'`` brings.

    Args:
        history: pairs of a step and what ``layer_statistics`` returned after it, or a dict of
            ratios by name, in the order of the steps. A layer may be missing at some of them.
        title: stands above the picture; default none.

    Returns:
        A figure of matplotlib's, which a notebook shows, and ``figure.savefig("trust.png")``
        writes. No pyplot is involved, nothing is to be closed.

    Raises:
        ValueError: the history has no ratio at all.

    Example:
        >>> figure = heat_map([(1, {"conv": 0.5, "fc": 2.0}), (2, {"conv": 0.25, "fc": 1.0})])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['conv', 'fc']
    """
    from fastlars.logging import drawing

    columns = [
        (step, {name: _ratio(value) for name, value in layers.items()}) for step, layers in history
    ]
    if not any(ratios for _, ratios in columns):
        raise ValueError("the history has no trust ratio: was every step skipped?")
    return drawing.heat_map(columns, title)


def _ratio(value: LayerStatistics | float | None) -> float | None:
    return value.trust_ratio if isinstance(value, LayerStatistics) else value


def _on_host(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, as float32, by one copy from each device."""
    found: dict[int, Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        there = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        copied = torch.cat([tensors[i].reshape(-1) for i in there]).cpu()
        parts = copied.split([tensors[i].numel() for i in there])
        found |= dict(zip(there, parts, strict=True))
    return [found[i].view_as(tensor) for i, tensor in enumerate(tensors)]
