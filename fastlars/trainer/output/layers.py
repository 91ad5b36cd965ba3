"""What a run's records say of each layer, as pictures and as tables.

Trust ratios over the run, and the norms at its first step, as in table 2 of the LARS paper (You,
Gitman and Ginsburg 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fastlars.trainer.errors import printable
from fastlars.trainer.output.records import Record

_ROW = 0.16  # inches that a layer's name takes
_NAMED = 300  # names in a picture at most: above, only every second one or fewer

Table = list[list[Any]]


def trust_table(records: Iterable[Record]) -> Table:
    """Step, epoch and the trust ratio of each layer."""
    trust = [record for record in records if record["kind"] == "trust"]
    layers = list(dict.fromkeys(name for record in trust for name in record["ratios"]))
    lines = [[r["step"], r["epoch"], *(r["ratios"].get(name) for name in layers)] for r in trust]
    return [["step", "epoch", *layers], *lines]


def norm_table(records: Iterable[Record]) -> Table:
    """Layer, |w|, |g| and |w|/|g|, which is empty where the gradient is 0; as last recorded."""
    found = _norms(records).get("layers", {})
    lines = [[name, w, g, w / g if w is not None and g else None] for name, (w, g) in found.items()]
    return [["layer", "weight_norm", "gradient_norm", "ratio"], *lines]


def _norms(records: Iterable[Record]) -> Record:
    return max((r for r in records if r["kind"] == "norms"), key=lambda r: r["step"], default={})


def heat_map(records: Sequence[Record]) -> Figure:
    """Trust ratios: a row for each layer, a column for each record, colour on a logarithmic scale.

    What is no positive number, and so has no logarithm, is grey.
    """
    (_, _, *layers), *lines = trust_table(records)
    ratios = _positive([line[2:] for line in lines]).T
    figure, (axis,) = _figure(records, layers, [1])
    axis.set(xlabel="step", title="Trust ratio of each layer", facecolor="0.8")
    low, high = (ratios.min(), ratios.max()) if ratios.count() else (1.0, 1.0)
    if low == high:  # a scale needs a length
        low, high = low / 2, high * 2
    steps = [line[0] for line in lines]
    mesh = axis.pcolormesh(
        _edges(steps), _edges(range(len(layers))), ratios, norm=LogNorm(low, high)
    )
    thin = 4 * figure.get_figheight()
    figure.colorbar(mesh, ax=axis, label="trust ratio", pad=0.01, aspect=thin)
    return figure


def norms(records: Sequence[Record]) -> Figure:
    """Norms of weights and gradients and their ratio, as points and in numbers."""
    _, *lines = norm_table(records)
    layers = [line[0] for line in lines]
    values = _positive([line[1:] for line in lines])
    figure, (pairs, ratio, numbers) = _figure(records, layers, [3, 3, 2])
    rows = np.arange(len(layers))
    pairs.plot(values[:, 0], rows, "o", ms=4, label="weights |w|")
    pairs.plot(values[:, 1], rows, "s", ms=4, label="gradient |g|")
    after = _norms(records).get("step")
    when = f"after {after} steps" if after else "at the first step"
    pairs.set(title=f"Norms {when}", xlabel="norm")
    ratio.plot(values[:, 2], rows, "D", ms=4, color="tab:green")
    ratio.set(title="Ratio |w|/|g|", xlabel="ratio")
    for axis in (pairs, ratio):
        if values.count():
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    # Outside: among the points it would hide some.
    figure.legend(*pairs.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    numbers.set(xlim=(0, 3))
    numbers.set_axis_off()
    for row, line in enumerate([["", "|w|", "|g|", "|w|/|g|"], *lines], start=-1):
        for column, value in enumerate(line[1:]):
            at = column + 0.9, row
            numbers.text(*at, _short(value), ha="right", va="center", fontsize=7)
    return figure


def _figure(
    records: Iterable[Record], layers: Sequence[str], widths: Sequence[int]
) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share their rows, the first layer on top."""
    height = max(4.0, 1.6 + _ROW * min(len(layers), _NAMED))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]
    title = next((r["title"] for r in records if r["kind"] == "start"), "")
    figure.suptitle(printable(title), parse_math=False)
    apart = math.ceil(len(layers) / _NAMED) or 1
    axes[0].set_yticks(range(0, len(layers), apart), layers[::apart], fontsize=7, parse_math=False)
    axes[0].set(ylabel="layer", ylim=(max(len(layers), 1) - 0.5, -0.5))
    return figure, list(axes)


def _short(value: Any) -> str:
    """Three digits, or all of a whole number."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _positive(values: Sequence[Sequence[float | None]]) -> np.ma.MaskedArray[Any, Any]:
    """Numbers above 0; all else is masked."""
    numbers = np.array([[math.nan if x is None else x for x in line] for line in values], float)
    return np.ma.masked_less_equal(np.ma.masked_invalid(numbers), 0)


def _edges(centres: Sequence[float]) -> np.ndarray[Any, Any]:
    """Limits of cells around their centres: halfway between neighbours."""
    at = np.asarray(centres, float)
    if len(at) < 2:
        return np.array([x + half for x in at for half in (-0.5, 0.5)])
    middles = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - middles[0]], middles, [2 * at[-1] - middles[-1]]])
