"""Draws the pictures of the documentation from the CSV files in benchmarks/results.

``python -m benchmarks.pictures [FOLDER]``, or ``make pictures``: an SVG of each for light pages,
and another for dark ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT, drawing
from benchmarks.accuracy import figure as accuracy
from benchmarks.accuracy import trust
from benchmarks.accuracy.grid import Grid, read
from benchmarks.accuracy.run import GRID
from benchmarks.overlap import figure as overlap
from benchmarks.results import read_csv
from benchmarks.scaling import figure as scaling
from benchmarks.scaling import model
from benchmarks.step import figures


def _large_batch() -> Any:
    grid = Grid(GRID)
    return accuracy.figure(grid, read(RESULTS / "large_batch.csv", grid))


PICTURES: dict[str, Callable[[], Any]] = {
    "roofline": lambda: figures.roofline(read_csv(RESULTS / "cpu.csv")),
    "cost": lambda: figures.cost(read_csv(RESULTS / "cpu.csv")),
    "overlap": lambda: overlap.figure(read_csv(RESULTS / "timeline.csv")),
    "scaling": lambda: scaling.figure(model.profile()),
    "large_batch": _large_batch,
    "trust_ratio": lambda: trust.figure(read_csv(RESULTS / "trust_ratio.csv")),
}


def main(folder: Path = ROOT / "docs" / "images") -> None:
    """Draw all of them."""
    for name, make in PICTURES.items():
        for path in drawing.save(make, folder / f"{name}.svg"):
            print(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
