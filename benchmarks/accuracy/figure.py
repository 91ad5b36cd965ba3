"""What a grid of training runs found: a table, two bars, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

from benchmarks import drawing, results
from benchmarks.accuracy.grid import FIND_LR, Grid, Row

LOWEST = 50  # %


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


def figure(grid: Grid, rows: Sequence[Row]) -> Any:
    """Accuracy against batch; below it, the search for a rate at each batch."""
    made, (top, *others) = drawing.panels([2.4, *(1.3 for _ in grid.batches)], right=1.0)
    _against_batch(top, grid, rows)
    for panel, batch in zip(others, grid.batches, strict=True):
        _against_rate(panel, grid, rows, batch)
    others[-1].set_xlabel("rate / the best rate")
    return made


def _style(grid: Grid) -> Iterator[tuple[str, str, str, str]]:
    """Of each optimizer: name, colour, line and marker."""
    kinds = (("C3", ":", "D"), ("C0", "-", "o"), ("C1", "--", "s"), ("C2", "-.", "^"))
    for name, kind in zip(grid.optimizers, cycle(kinds), strict=False):
        yield name, *kind


def _against_batch(axis: Any, grid: Grid, rows: Sequence[Row]) -> None:
    """The means over the seeds as lines, all runs as points.

    Means below LOWEST stand next to the names: on the axis, they would leave no room for the rest.
    """
    ends = []
    for name, colour, line, marker in _style(grid):
        runs = {batch: accuracies(grid, rows, name, batch) for batch in grid.batches}
        for batch, found in runs.items():
            axis.plot([batch] * len(found), found, marker, color=colour, markersize=2.5, alpha=0.6)
        means = {batch: mean(found) for batch, found in runs.items() if found}
        if not means:
            continue
        axis.plot(list(means), list(means.values()), line, color=colour)
        last, value = max(means.items())
        low = [f"\n{m:.0f}% at {batch:,}" for batch, m in means.items() if m < LOWEST]
        ends.append(("".join([name, *low]), last, max(value, LOWEST), colour))
    drawing.log_axes(axis, xs=grid.batches)
    axis.set(xlabel="batch", title="accuracy, test images, %")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], LOWEST))
    drawing.name_ends(axis, ends, lines=1 + max((e[0].count("\n") for e in ends), default=0))


def _against_rate(axis: Any, grid: Grid, rows: Sequence[Row], batch: int) -> None:
    """A line for each optimizer; rates in units of its best one, because they differ in kind."""
    ends = []
    for name, colour, line, marker in _style(grid):
        searched, best = grid.searched(rows, name, batch), grid.best_rate(rows, name, batch)
        if searched and best:
            found = [(lr / best, 100 * accuracy) for lr, accuracy in searched.items()]
            axis.plot(*zip(*found, strict=True), line, marker=marker, color=colour)
            ends.append((name, *found[-1], colour))
    drawing.log_axes(axis, xs=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4])
    axis.set_title(f"batch {batch:,}: held-out images, %")
    if ends:
        drawing.name_ends(axis, ends)
