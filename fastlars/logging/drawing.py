"""Pictures with a row for each layer, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

_ROW = 0.16  # inches of height for one layer's name
_MAX_NAMES = 300  # in one picture; with more layers, only every second (third, ...) name is shown


def heat_map(history: Sequence[tuple[float, Mapping[str, float | None]]], title: str) -> Figure:
    """Trust ratios: a row for each layer, a column for each pair of step and ratios."""
    layers = list(dict.fromkeys(name for _, ratios in history for name in ratios))
    ratios = masked([[found.get(name) for name in layers] for _, found in history]).T
    figure, (axis,) = panels(title, layers, [1])
    axis.set(xlabel="step", title="Trust ratio of each layer", facecolor="0.8")
    low, high = (ratios.min(), ratios.max()) if ratios.count() else (1.0, 1.0)
    if low == high:  # a colour scale needs two different ends
        low, high = low / 2, high * 2
    steps, depths = _borders([step for step, _ in history]), _borders(range(len(layers)))
    mesh = axis.pcolormesh(steps, depths, ratios, norm=LogNorm(low, high))
    figure.colorbar(mesh, ax=axis, label="trust ratio", pad=0.01, aspect=4 * figure.get_figheight())
    return figure


def panels(title: str, layers: Sequence[str], widths: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Panels next to each other with one row for each layer, the first layer at the top."""
    height = max(4.0, 1.6 + _ROW * min(len(layers), _MAX_NAMES))
    figure = Figure(figsize=(12, height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]
    every = math.ceil(len(layers) / _MAX_NAMES)
    axes[0].set_yticks(range(0, len(layers), every), layers[::every], fontsize=7, parse_math=False)
    axes[0].set(ylabel="layer", ylim=(len(layers) - 0.5, -0.5))
    return figure, list(axes)


def masked(table: Sequence[Sequence[float | None]]) -> np.ma.MaskedArray[Any, Any]:
    """The values of a table, with a mask over those that a logarithmic scale cannot show."""
    return np.ma.masked_less_equal(np.ma.masked_invalid(np.array(table, float)), 0)


def _borders(centres: Sequence[float]) -> np.ndarray[Any, Any]:
    """Borders of cells: halfway between neighbouring centres. A single cell is 1 wide."""
    at = np.asarray(centres, float)
    more = np.pad(at, 1, "reflect", reflect_type="odd") if len(at) > 1 else at + np.arange(-1, 2)
    return (more[:-1] + more[1:]) / 2
