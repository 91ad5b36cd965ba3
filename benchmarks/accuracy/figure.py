"""What a grid of training runs found: a table, two bars, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import results
from benchmarks.accuracy.grid import FIND_LR, Grid, Row

LOWEST = 50  # %
COLOURS = ("tab:cyan", "tab:blue", "tab:red", "tab:green", "tab:purple", "tab:brown")


def accuracies(grid: Grid, rows: Sequence[Row], optimizer: str, batch: int) -> list[float]:
    """On the test images, in %, of all seeds at the best rate; a run that diverged counts as 0.

    An empty list where the grid has no such optimizer or batch.
    """
    if (optimizer, batch) not in grid.places():
        return []
    return [100 * row.accuracy for row in grid.final(rows, optimizer, batch)]


def table(grid: Grid, rows: Sequence[Row]) -> str:
    """Markdown: a line for every batch and optimizer."""
    lines = []
    for name, batch in grid.places():
        lr, found = grid.best_rate(rows, name, batch), accuracies(grid, rows, name, batch)
        if lr is None or not found:
            continue
        searched, suggested, held_out = grid.searched(rows, name, batch), "", ""
        if searched:
            held_out = f"{100 * searched[lr]:.1f}"
            place = FIND_LR, name, batch
            sweeps = [r.suggested for r in rows if (r.kind, r.optimizer, r.batch) == place]
            suggested = f"{sweeps[0]:.2g}" if any(sweeps) else ""
        tried = " ".join(f"{rate:g}" for rate in searched) or "none"
        seeds = " ".join(f"{accuracy:.1f}" for accuracy in found)
        average = f"{mean(found):.1f}"
        lines.append([f"{batch:,}", name, tried, f"{lr:g}", suggested, held_out, average, seeds])
    return results.markdown(
        "batch | optimizer | rates tried | best | `--find-lr` | held out, % | test, % | seeds",
        "rllrrrrl",
        lines,
    )


def bars(grid: Grid, rows: Sequence[Row]) -> Iterator[str]:
    """A line for each target of `lars`: the difference in points, and whether it is met.

    The targets are relative to `sgd-linear` and `sgd`. One without all seeds has no line.
    """
    small, large = grid.batches[0], grid.batches[-1]
    for batch, other, other_batch, least in (
        (large, "sgd-linear", large, 1.0),
        (8 * small, "sgd", small, -0.5),
    ):
        found = accuracies(grid, rows, "lars", batch)
        others = accuracies(grid, rows, other, other_batch)
        if len(found) == len(others) == len(grid.seeds):
            ahead = mean(found) - mean(others)
            yield (
                f"lars at {batch:,}: {ahead:+.2f} points from {other} at {other_batch:,}, to be "
                f"at least {least:+g}: {'met' if ahead >= least else 'missed'}"
            )


def draw(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Write the PNG: accuracy against batch; below it, the search for a rate at each batch."""
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.add_gridspec(2, len(grid.batches), height_ratios=(1.4, 1))
    _against_batch(figure.add_subplot(places[0, :]), grid, rows)
    first = None
    for number, batch in enumerate(grid.batches):
        panel = figure.add_subplot(places[1, number], sharey=first)
        _against_rate(panel, grid, rows, batch)
        first = first or panel
    figure.axes[1].set_ylabel("accuracy, held-out images, %")
    figure.savefig(path, dpi=110)


def _against_batch(axis: Axes, grid: Grid, rows: Sequence[Row]) -> None:
    """The means over the seeds as lines, all runs as points.

    Means below LOWEST are given in the legend: on the axis, they would leave no room for the rest.
    """
    for name, colour in zip(grid.optimizers, cycle(COLOURS), strict=False):
        runs = {batch: accuracies(grid, rows, name, batch) for batch in grid.batches}
        for batch, found in runs.items():
            axis.plot([batch] * len(found), found, ".", color=colour)
        means = {batch: mean(found) for batch, found in runs.items() if found}
        low = [f"{value:.0f}% at {batch:,}" for batch, value in means.items() if value < LOWEST]
        label = ", ".join([name, *low])
        axis.plot(list(means), list(means.values()), color=colour, label=label)
    axis.set_ylim(bottom=max(axis.get_ylim()[0], LOWEST))
    axis.set_xscale("log", base=2)
    axis.set_xticks(grid.batches, [f"{batch:,}" for batch in grid.batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="batch", ylabel="accuracy, test images, %")
    axis.grid(alpha=0.3)
    axis.legend()


def _against_rate(axis: Axes, grid: Grid, rows: Sequence[Row], batch: int) -> None:
    """A line for each optimizer; rates in units of its best one, because they differ in kind."""
    for name, colour in zip(grid.optimizers, cycle(COLOURS), strict=False):
        searched, best = grid.searched(rows, name, batch), grid.best_rate(rows, name, batch)
        if searched and best:
            relative = [lr / best for lr in searched]
            axis.plot(relative, [100 * a for a in searched.values()], ".-", color=colour)
    axis.set_xscale("log", base=2)
    axis.set(title=f"batch {batch:,}", xlabel="rate / the best rate")
    axis.grid(alpha=0.3)
