"""The trust ratios of a run of the trainer: its table, shortened, and a picture by stages.

``python -m fastlars.trainer --output RUN``, which is ResNet-50 with LARS on handwritten digits, and
``python -m benchmarks.accuracy.trust RUN --csv benchmarks/results/trust_ratio.csv``
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import drawing, results
from benchmarks.machine import describe

_STYLES = (
    ("C4", ":"),
    ("C0", "-"),
    ("C1", "--"),
    ("C2", "-."),
    ("C3", "-"),
    ("C5", "-"),
)


def shortened(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows of a trust.csv with three digits: a picture needs no more."""
    return [{k: v if k in ("step", "epoch") else f"{float(v):.3g}" for k, v in row.items()}
            for row in rows]  # fmt: skip


def figure(rows: Sequence[Mapping[str, str]]) -> Any:
    """The median of each stage's layers over the epochs, in a band from the least to the most."""
    layers = [name for name in rows[0] if name.endswith(".weight")]
    stages = list(dict.fromkeys(name.split(".")[0] for name in layers))
    epochs = [float(row["epoch"]) for row in rows]
    made, (axis,) = drawing.panels([3.4], right=0.7)
    ends = []
    for stage, (colour, line) in zip(stages, _STYLES, strict=True):
        own = [name for name in layers if name.split(".")[0] == stage]
        ratios = [[float(row[name]) for name in own] for row in rows]
        low, middle, high = ([*map(of, ratios)] for of in (min, median, max))
        axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(epochs, middle, line, color=colour)
        ends.append((stage, epochs[-1], middle[-1], colour))
    drawing.log_axes(axis, ys=[0.001, 0.01, 0.1, 1, 10, 100])
    axis.set(title="trust ratio of the layers of ResNet-50", xlabel="epoch")
    drawing.name_ends(axis, ends)
    return made


def main() -> None:
    """Write the shortened table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the directory of a run of the trainer")
    parser.add_argument("--csv", type=Path, required=True, help="write the rows here")
    options = parser.parse_args()
    rows = shortened(results.read_csv(options.run / "trust.csv"))
    where = describe()
    results.publish(f"{len(rows)} steps", [row | where for row in rows], options.csv)


if __name__ == "__main__":
    main()
