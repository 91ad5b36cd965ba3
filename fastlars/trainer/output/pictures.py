"""Pictures and tables of a run, drawn from the records in its metrics.jsonl.

The norms at the first step correspond to table 2 of the LARS paper (You, Gitman and Ginsburg 2017).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastlars.logging import drawing
from fastlars.trainer.errors import printable, reason_of
from fastlars.trainer.output import atomic

Records = list[dict[str, Any]]
Table = list[list[Any]]

rcParams["text.usetex"] = False  # LaTeX would read names as formulas


@contextmanager
def optional(warn: Callable[[str], None]) -> Iterator[None]:
    """Turn any error while drawing into a warning: a run must not end because a picture failed."""
    try:
        yield
    except Exception as error:
        warn(f"no picture: {reason_of(error)}")


def draw_layers(records: Records, folder: Path) -> None:
    """Write trust.csv, norms.csv and a picture of each; nothing of a table without rows."""
    tables = {"trust": trust_table(records), "norms": norm_table(records)}
    pictures = {"trust": heat_map, "norms": norms}
    filled = {name: table for name, table in tables.items() if len(table) > 1}
    for name, table in filled.items():
        atomic.write_table(table, folder / f"{name}.csv")
    for name in filled:  # after both tables, which a failing picture must not prevent
        save(pictures[name](records), folder / f"{name}.png")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, completely or not at all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        atomic.write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def trust_table(records: Records) -> Table:
    """Step, epoch and the trust ratio of each layer, after a row of headings."""
    trust = _of_kind("trust", records)
    layers = list(dict.fromkeys(name for record in trust for name in record["ratios"]))
    rows = [[r["step"], r["epoch"], *(r["ratios"].get(name) for name in layers)] for r in trust]
    return [["step", "epoch", *layers], *rows]


def norm_table(records: Records) -> Table:
    """Layer, |w|, |g| and |w|/|g| (None if the gradient is 0) at the last step with norms."""
    found = _latest_norms(records).get("layers", {})
    rows = [[name, w, g, w / g if w is not None and g else None] for name, (w, g) in found.items()]
    return [["layer", "weight_norm", "gradient_norm", "ratio"], *rows]


def curves(records: Records) -> Figure:
    """Loss, accuracy, learning rate and trust ratios over the epochs."""
    train, test = _of_kind("train", records), _of_kind("test", records)
    result = f": {test[-1]['accuracy']:.2%} test accuracy" if test else ""
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(_title(records) + result, parse_math=False)
    (loss, accuracy), (rate, ratios) = figure.subplots(2, 2)

    for axis, key in ((loss, "loss"), (accuracy, "accuracy")):
        _plot(axis, [(r["epoch"], r[key]) for r in train], label="training, augmented", alpha=0.8)
        _plot(axis, [(r["epoch"], r[key]) for r in test], label="test", marker="o", markersize=4)
        axis.legend()
    loss.set(title="Loss", ylabel="cross-entropy per image", ylim=(0, None))
    accuracy.set(title="Accuracy", ylabel="images classified correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))

    _plot(rate, [(r["epoch"], r["lr"]) for r in train], color="tab:green")
    rate.set(title="Learning rate", ylabel="learning rate", ylim=(0, None))

    _plot_ratios(figure, ratios, _of_kind("trust", records))
    for axis in (loss, accuracy, rate, ratios):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    return figure


def _plot_ratios(figure: Figure, axis: Axes, trust: Records) -> None:
    axis.set(title="Trust ratio of each layer", ylabel="trust ratio")
    if not trust:
        axis.text(0.5, 0.5, "this optimizer has none", ha="center", transform=axis.transAxes)
        return
    layers = list(trust[0]["ratios"])
    colours, scale = colormaps["viridis"], Normalize(1, max(len(layers), 2))
    for depth, layer in enumerate(layers, start=1):
        ratios = [(r["epoch"], r["ratios"].get(layer)) for r in trust]
        positive = [(epoch, ratio) for epoch, ratio in ratios if ratio and ratio > 0]
        _plot(axis, positive, color=colours(scale(depth)), lw=0.9)
    axis.set_yscale("log")
    figure.colorbar(
        ScalarMappable(scale, colours),
        ax=axis,
        label="layer, from the input to the classifier",
        ticks=MaxNLocator(integer=True),
    )


def heat_map(records: Records) -> Figure:
    """Trust ratios: a row for each layer, a column for each record."""
    history = [(r["step"], r["ratios"]) for r in _of_kind("trust", records)]
    return drawing.heat_map(history, _title(records))


def norms(records: Records) -> Figure:
    """Norms of weights and gradients and their ratio, as points and as numbers."""
    _, *table = norm_table(records)
    values = drawing.masked([row[1:] for row in table])
    layers = [row[0] for row in table]
    figure, (pairs, ratio, numbers) = drawing.panels(_title(records), layers, [3, 3, 2])
    rows = np.arange(len(table))
    pairs.plot(values[:, 0], rows, "o", ms=4, label="weights |w|")
    pairs.plot(values[:, 1], rows, "s", ms=4, label="gradient |g|")
    step = _latest_norms(records).get("step")
    when = f"after {step} steps" if step else "at the first step"
    pairs.set(title=f"Norms {when}", xlabel="norm")
    ratio.plot(values[:, 2], rows, "D", ms=4, color="tab:green")
    ratio.set(title="Ratio |w|/|g|", xlabel="ratio")
    for axis in (pairs, ratio):
        if values.count():
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    # Outside of the panel: inside, the legend would hide some of the points.
    figure.legend(*pairs.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    numbers.set(xlim=(0, 3))
    numbers.set_axis_off()
    for row, cells in enumerate([["", "|w|", "|g|", "|w|/|g|"], *table], start=-1):
        for column, value in enumerate(cells[1:]):
            numbers.text(column + 0.9, row, _cell(value), ha="right", va="center", fontsize=7)
    return figure


def sweep(
    title: str,
    losses: dict[float, float],
    means: Sequence[float],
    found: tuple[float, float] | None,
    window: int,
) -> Figure:
    """Loss over learning rate: of every step, and `means` of `window` of these losses.

    The means fall fastest at the first of the two rates `found`, and are lowest at the second.
    """
    rates = list(losses)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    axis.plot(rates, list(losses.values()), ".", color="0.6", label="a step's loss")
    axis.plot(rates, means, label=f"mean of {window} steps")
    if found is not None:
        fastest, lowest = found
        axis.axvline(fastest, color="tab:green", ls="--", label=f"falls fastest: {fastest:.2g}")
        word = "still falls" if lowest == rates[-1] else "is lowest"
        axis.axvline(lowest, color="tab:red", ls=":", label=f"{word}: {lowest:.2g}")
    axis.set_xscale("log")
    # The losses of a diverged model would squeeze all others into a line.
    before = means[: int(np.argmin(means)) + 1]
    axis.set_ylim(0, 1.5 * max(before))
    axis.set_title(title, parse_math=False)
    axis.set(xlabel="learning rate", ylabel="cross-entropy per image")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    return figure


def _of_kind(kind: str, records: Records) -> Records:
    return [record for record in records if record["kind"] == kind]


def _latest_norms(records: Records) -> dict[str, Any]:
    return max(_of_kind("norms", records), key=lambda record: record["step"], default={})


def _title(records: Records) -> str:
    return printable(next((record["title"] for record in _of_kind("start", records)), ""))


def _plot(axis: Axes, points: Iterable[tuple[float, float | None]], **style: Any) -> None:
    """Draw a line through the points that have a value."""
    known = [(x, y) for x, y in points if y is not None]
    axis.plot([x for x, _ in known], [y for _, y in known], **style)


def _cell(value: Any) -> str:
    """A number with three digits; a whole number of four digits or more completely."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
