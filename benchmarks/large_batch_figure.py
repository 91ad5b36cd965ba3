"""What a grid of benchmarks/large_batch.py found: a table, two bars, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from large_batch_grid import FIND_LR, Grid, Row

COLOURS = ("tab:cyan", "tab:blue", "tab:red", "tab:green", "tab:purple", "tab:brown")


def accuracies(grid: Grid, rows: Sequence[Row], optimizer: str, batch: int) -> list[float]:
    """On the test images, in %, of all seeds at the best rate; 0 where training diverged.

    None where the grid has no such optimizer or batch.
    """
    if (optimizer, batch) not in grid.places():
        return []
    return [100 * row.accuracy for row in grid.final(rows, optimizer, batch)]


def table(grid: Grid, rows: Sequence[Row]) -> str:
    """Markdown: a line for every batch and optimizer."""
    lines = [
        "| batch | optimizer | rates tried | best | `--find-lr` | held out, % | test, % | seeds |",
        "|--:|---|---|--:|--:|--:|--:|---|",
    ]
    for name, batch in grid.places():
        lr, found = grid.best_rate(rows, name, batch), accuracies(grid, rows, name, batch)
        if lr is None or not found:
            continue
        searched, suggested, held_out = grid.searched(rows, name, batch), "", ""
        if searched:
            held_out = f"{100 * searched[lr]:.1f}"
            place = FIND_LR, name, batch
            sweeps = [r for r in rows if (r.kind, r.optimizer, r.batch) == place]
            suggested = f"{sweeps[0].suggested:.2g}" if sweeps else ""
        tried = " ".join(f"{rate:g}" for rate in searched) or "none"
        seeds = " ".join(f"{accuracy:.1f}" for accuracy in found)
        lines.append(
            f"| {batch:,} | {name} | {tried} | {lr:g} | {suggested} | {held_out} | "
            f"{mean(found):.1f} | {seeds} |"
        )
    return "\n".join(lines)


def bars(grid: Grid, rows: Sequence[Row]) -> Iterator[str]:
    """What LARS is to reach, and by how much it did or did not, where there are runs to say."""
    small, large = grid.batches[0], grid.batches[-1]
    for batch, other, other_batch, least in (
        (large, "sgd-linear", large, 1.0),
        (8 * small, "sgd", small, -0.5),
    ):
        found = accuracies(grid, rows, "lars", batch)
        others = accuracies(grid, rows, other, other_batch)
        if found and others:
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
    """The means over the seeds as lines, all runs as points."""
    for name, colour in zip(grid.optimizers, COLOURS, strict=False):
        found = {batch: accuracies(grid, rows, name, batch) for batch in grid.batches}
        runs = [(batch, accuracy) for batch, values in found.items() for accuracy in values]
        axis.plot(*zip(*runs, strict=True), ".", color=colour) if runs else None
        means = [(batch, mean(values)) for batch, values in found.items() if values]
        axis.plot(*zip(*means, strict=True), color=colour, label=name) if means else None
    axis.set_xscale("log", base=2)
    axis.set_xticks(grid.batches, [f"{batch:,}" for batch in grid.batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="batch", ylabel="accuracy, test images, %")
    axis.grid(alpha=0.3)
    if any(grid.final(rows, *place) for place in grid.places()):
        axis.legend()


def _against_rate(axis: Axes, grid: Grid, rows: Sequence[Row], batch: int) -> None:
    """A line for each optimizer; rates in units of its best one, because they differ in kind."""
    for name, colour in zip(grid.optimizers, COLOURS, strict=False):
        searched, best = grid.searched(rows, name, batch), grid.best_rate(rows, name, batch)
        if searched and best:
            relative = [lr / best for lr in searched]
            axis.plot(relative, [100 * a for a in searched.values()], ".-", color=colour)
    axis.set_xscale("log", base=2)
    axis.set(title=f"batch {batch:,}", xlabel="rate / the best rate")
    axis.grid(alpha=0.3)
