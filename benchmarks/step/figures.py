"""Pictures of what report.py tabulates: the roofline, and cost against number and size of tensors.

matplotlib is asked for only when one is drawn: machines with GPUs may lack it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.models import SHAPES, SWEEP

Rows = Sequence[Mapping[str, Any]]
Points = dict[str, list[tuple[float, float]]]  # by name: x, milliseconds
# Least bytes a parameter of a rule, where an implementation's own were not counted.
_LEAST = {"lars": 20.0, "lamb": 28.0}


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Write roofline.png and, of a run that has the sweep, cost.png."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, make in (("roofline", _roofline), ("cost", _cost)):
        figure = make(rows)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110)
            drawn.append(path)
    return drawn


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def rule_of(row: Mapping[str, Any]) -> str:
    """The rule in a row's group: "resnet50 lars bf16 + masters"."""
    return next((word for word in str(row["group"]).split() if word in _LEAST), "")


def gigabytes(row: Mapping[str, Any]) -> float:
    """The least that a step must move."""
    least = float(row["bytes_per_parameter"] or _LEAST[rule_of(row)])
    return least * float(row["parameters"]) / 1e9


def _roofline(rows: Rows) -> Any:
    """Bytes that must be moved against time, a point for each implementation and model."""
    models = [row for row in rows if rule_of(row) and " x " not in str(row["group"])]
    if not models:
        return None
    figure, axes = _figure(2)
    for axis, rule in zip(axes, _LEAST, strict=True):
        points: Points = defaultdict(list)
        for row in models:
            if rule_of(row) == rule:
                low = ", bfloat16" if "bf16" in str(row["group"]) else ""
                name = f"{row['contender']}{low}"
                points[name].append((gigabytes(row), float(row["p50_ms"])))
        _panel(axis, points, line="o")
        xs = [x for series in points.values() for x, _ in series]
        rate = median(float(row["memory_gb_s"]) for row in models)
        ends = [min(xs, default=1e-3) / 2, max(xs, default=1.0) * 2]
        axis.plot(
            ends, [1e3 * x / rate for x in ends], "k--", lw=1, label=f"memory, {rate:.0f} GB/s"
        )
        axis.set(title=rule.upper(), xlabel="GB that a step must move at least", ylabel="step, ms")
        axis.legend(fontsize=7)
    return figure


def _cost(rows: Rows) -> Any:
    """The sweep: one tensor that grows, tensors of 64 elements that become more."""
    sizes = _sweep(rows, lambda name: name.startswith("1 x 1e"), by_tensors=False)
    counts = _sweep(rows, lambda name: name == "tiny" or name.endswith(" x 64"), by_tensors=True)
    if not sizes or not counts:
        return None
    figure, (left, right) = _figure(2)
    _panel(left, sizes, line="o-")
    left.set(title="one tensor", xlabel="elements", ylabel="step, ms")
    _panel(right, counts, line="o-")
    right.set(title="tensors of 64 elements", xlabel="tensors", ylabel="step, ms")
    for axis in (left, right):
        axis.legend(fontsize=7)
    return figure


def _sweep(rows: Rows, chosen: Callable[[str], bool], *, by_tensors: bool) -> Points:
    """Steps by the number of parameters, or of tensors."""
    points: Points = defaultdict(list)
    for row in rows:
        name = str(row["group"]).rsplit(" ", 1)[0]
        if chosen(name):
            shapes = (SHAPES | SWEEP)[name]()
            x = len(shapes) if by_tensors else float(row["parameters"])
            ours = row["contender"] == "fastlars"
            label = f"fastlars {rule_of(row).upper()}" if ours else str(row["contender"])
            points[label].append((x, float(row["p50_ms"])))
    return points


def _panel(axis: Any, points: Points, *, line: str) -> None:
    """Both axes logarithmic: what is proportional is a line of slope 1."""
    for name, series in points.items():
        series.sort()
        hollow = {"fillstyle": "none"} if "bfloat16" in name else {}
        axis.plot(*zip(*series, strict=True), line, label=name, markersize=5, alpha=0.8, **hollow)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
