"""Pictures of report.py's rows: the roofline, and cost against number and size of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import drawing
from benchmarks.models import SHAPES, SWEEP

Rows = Sequence[Mapping[str, Any]]
Points = dict[str, list[tuple[float, float]]]  # by name: x, milliseconds
# Least bytes a parameter of a rule, where an implementation's own were not counted.
_LEAST = {"lars": 20.0, "lamb": 28.0}
_MODELS = {
    "tiny": "10,000 small", "resnet50": "ResNet-50", "vit_b": "ViT-B",
    "bert_large": "BERT-large", "giant": "500M in one",
}  # fmt: skip
# By the start of a contender's name: its short name, marker and colour.
_MARKS = {
    "fastlars": ("fastlars", "o", "C0"),
    "torch": ("torch, fused", "s", "C1"),
    "timm": ("timm", "^", "C2"),
    "pytorch_optimizer": ("pytorch_optimizer", "v", "C3"),
    "optax": ("optax", "D", "C4"),
}


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Write the roofline and, of a run that has the sweep, the cost; both for light and dark."""
    drawn = []
    if _of_models(rows):
        drawn += drawing.save(lambda: roofline(rows), folder / "roofline.svg")
    if all(_sweeps(rows)):
        drawn += drawing.save(lambda: cost(rows), folder / "cost.svg")
    return drawn


def rule_of(row: Mapping[str, Any]) -> str:
    """The rule in a row's group: "resnet50 lars bf16 + masters"."""
    return next((word for word in str(row["group"]).split() if word in _LEAST), "")


def gigabytes(row: Mapping[str, Any]) -> float:
    """The least that a step must move."""
    least = float(row["bytes_per_parameter"] or _LEAST[rule_of(row)])
    return least * float(row["parameters"]) / 1e9


def _of_models(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if rule_of(row) and " x " not in str(row["group"])]


def roofline(rows: Rows) -> Any:
    """Bytes that must be moved against time, a point for each implementation and model."""
    models = _of_models(rows)
    rate = median(float(row["memory_gb_s"]) for row in models)
    figure, axes = drawing.panels([2.5, 2.5])
    for axis, rule in zip(axes, _LEAST, strict=True):
        points: Points = defaultdict(list)
        names: dict[float, str] = {}
        for row in models:
            if rule_of(row) == rule:
                half = ", bf16" if "bf16" in str(row["group"]) else ""
                points[f"{str(row['contender']).split()[0]}{half}"].append(
                    (gigabytes(row), float(row["p50_ms"]))
                )
                if not half:
                    names[gigabytes(row)] = _MODELS.get(str(row["group"]).split()[0], "")
        xs = [x for series in points.values() for x, _ in series]
        line = [min(xs) / 2, max(xs) * 2]
        axis.plot(line, [1e3 * x / rate for x in line], "--", color=drawing.GREY, lw=1)
        drawing.log_axes(axis, xs=[0.01, 0.1, 1, 10], ys=[0.1, 1, 10, 100, 1000])
        axis.set(xlim=line, ylim=(0.1, 4000), title=f"{rule.upper()}: a step, ms")
        axis.text(0.06, 0.2, f"memory,\n{rate:.0f} GB/s", color=drawing.GREY)
        ends = []
        for name, series in points.items():
            series.sort()
            short, marker, colour = _MARKS[name.split(",")[0]]
            half = name.endswith("bf16")
            fill = "none" if half else "full"
            axis.plot(*zip(*series, strict=True), marker, color=colour, fillstyle=fill)
            ends.append((f"{short.split(',')[0]}, bf16" if half else short, *series[-1], colour))
        drawing.name_ends(axis, ends)
        for x, name in names.items():
            y = 100 if x < 0.1 else 0.14  # where no point is
            axis.text(x, y, name, rotation=90, ha="center", va="bottom", color=drawing.GREY)
    axes[-1].set_xlabel("GB that a step must move at least")
    return figure


def _sweeps(rows: Rows) -> tuple[Points, Points]:
    sizes = _sweep(rows, lambda name: name.startswith("1 x 1e"), by_tensors=False)
    counts = _sweep(rows, lambda name: name == "tiny" or name.endswith(" x 64"), by_tensors=True)
    return sizes, counts


def cost(rows: Rows) -> Any:
    """The sweep: one tensor that grows, tensors of 64 elements that become more."""
    figure, axes = drawing.panels([2.2, 2.2])
    titles = (("one tensor", "elements"), ("tensors of 64 elements", "tensors"))
    for axis, points, (title, xlabel) in zip(axes, _sweeps(rows), titles, strict=True):
        ends = []
        for name, series in points.items():
            series.sort()
            colour, marker = ("C0", "o") if name.endswith(("LARS", "SGD")) else ("C1", "s")
            style = "-" if name.startswith("fastlars") else "--"
            axis.plot(*zip(*series, strict=True), style, marker=marker, color=colour)
            ends.append((name, *series[-1], colour))
        xs = sorted({x for series in points.values() for x, _ in series})
        drawing.log_axes(axis, xs=xs, ys=[0.01, 0.1, 1, 10, 100])
        axis.set(title=f"{title}: a step, ms", xlabel=xlabel)
        drawing.name_ends(axis, ends)
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
            points[label.removesuffix("(fused)")].append((x, float(row["p50_ms"])))
    return points
