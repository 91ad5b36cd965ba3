"""What benchmarks/large_batch.py found: a table, and accuracy against batch as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from large_batch_grid import Row

COLOURS = {"sgd": "tab:blue", "sgd-poly": "tab:cyan", "lars": "tab:red", "lamb": "tab:green"}


@dataclass(frozen=True)
class Point:
    """An optimizer at a batch, at the best of its rates."""

    lr: float
    rates: int  # that were tried
    accuracies: tuple[float, ...]  # of the seeds, at that rate

    @property
    def mean(self) -> float:
        return mean(self.accuracies)


Curves = dict[str, dict[int, Point]]  # by optimizer and batch


@dataclass(frozen=True, order=True)
class Task:
    """What is trained how long: runs of different tasks are not compared."""

    model: str
    per_class: int
    epochs: int

    def __str__(self) -> str:
        images = f"{self.per_class:,} images a class" if self.per_class else "all images"
        return f"{self.model}, {images}, {self.epochs} epochs"


def best(rows: Sequence[Row]) -> dict[Task, Curves]:
    """Every optimizer at every batch, at the rate of the best mean."""
    by_rate: dict[tuple[Task, str, int], dict[float, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        key = Task(row.model, row.per_class, row.epochs), row.optimizer, row.batch
        by_rate[key][row.lr].append(row.accuracy)
    found: dict[Task, Curves] = defaultdict(lambda: defaultdict(dict))
    for (task, optimizer, batch), accuracies in sorted(by_rate.items()):
        # A rate that was not run with all seeds yet could be the best by luck.
        most = max(map(len, accuracies.values()))
        whole = {lr: values for lr, values in accuracies.items() if len(values) == most}
        lr = max(whole, key=lambda rate: mean(whole[rate]))
        found[task][optimizer][batch] = Point(lr, len(whole), tuple(whole[lr]))
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for every model, batch and optimizer."""
    lines = [
        "| task | batch | optimizer | accuracy | best lr | rates | seeds |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for task, curves in best(rows).items():
        places = sorted((batch, name) for name, points in curves.items() for batch in points)
        for batch, name in places:
            point = curves[name][batch]
            lines.append(
                f"| {task} | {batch:,} | {name} | {point.mean:.2%} | {point.lr:g} | "
                f"{point.rates} | {len(point.accuracies)} |"
            )
    return "\n".join(lines)


def bars(rows: Sequence[Row]) -> list[str]:
    """What was to be shown, and by how much it was or was not; for each task with those runs."""
    lines = []
    for task, curves in best(rows).items():
        sgd, lars = curves.get("sgd", {}), curves.get("lars", {})
        if 4096 in sgd and 4096 in lars:
            ahead = 100 * (lars[4096].mean - sgd[4096].mean)
            lines.append(
                f"{task}: LARS at 4,096 is {ahead:+.2f} points from SGD at 4,096 "
                f"(to be at least +1): {'met' if ahead >= 1 else 'missed'}"
            )
        if 128 in sgd and 1024 in lars:
            behind = 100 * (sgd[128].mean - lars[1024].mean)
            lines.append(
                f"{task}: LARS at 1,024 is {-behind:+.2f} points from SGD at 128 "
                f"(to be at least -0.5): {'met' if behind <= 0.5 else 'missed'}"
            )
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG: a panel for each task."""
    panels = best(rows)
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, curves) in zip(axes, panels.items(), strict=True):
        _panel(axis, curves)
        axis.set_title(str(task), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axis: Axes, curves: Curves) -> None:
    """Means at the best rate; bars from the worst to the best seed."""
    for name, points in curves.items():
        batches = sorted(points)
        means = [100 * points[batch].mean for batch in batches]
        low = [m - 100 * min(points[b].accuracies) for m, b in zip(means, batches, strict=True)]
        high = [100 * max(points[b].accuracies) - m for m, b in zip(means, batches, strict=True)]
        axis.errorbar(
            batches, means, yerr=(low, high), marker="o", capsize=3, label=name,
            color=COLOURS.get(name),
        )  # fmt: skip
    all_batches = sorted({batch for points in curves.values() for batch in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(all_batches, [f"{batch:,}" for batch in all_batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="batch", ylabel="test accuracy after the last epoch, %")
    axis.grid(alpha=0.3)
    axis.legend()
