"""The picture of the model: efficiency over GPUs, and the size of a bucket.

``python -m benchmarks.scaling.figure OUT.png``
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.scaling.alphabeta import Gradient, Way, iteration, ring
from benchmarks.scaling.model import (
    AKIBA_WAY,
    BUCKETS,
    GOYAL_EFFICIENCY,
    GOYAL_WAY,
    MIB,
    SIZES,
    akiba,
    efficiency,
    goyal,
    profile,
)

_COUNTS = [2**power for power in range(3, 14)]


def draw(path: Path, gradients: Sequence[Gradient]) -> None:
    """Write the PNG."""
    facebook = goyal(gradients)
    preferred = akiba(gradients, facebook)
    ours = Way(step_overlaps=True, gradient_bytes=2)
    curves = {
        "Akiba's way: one fp16 buffer at the end, ring, InfiniBand": (preferred, AKIBA_WAY, "C2-"),
        "Goyal's way: a message a gradient, 50 Gbit/s": (facebook, GOYAL_WAY, "C0-"),
        "  the same in a ring": (facebook, replace(GOYAL_WAY, algorithm=ring), "C0:"),
        "  25 MiB buckets, step and fp16 overlapped": (facebook, ours, "C3--"),
        "  one buffer at the end": (
            facebook, Way(reduce_overlaps=False, bucket=math.inf), "C1-.",
        ),
    }  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, (cluster, way, style) in curves.items():
        shares = [100 * efficiency(cluster, 8, p, way, gradients) for p in _COUNTS]
        left.plot(_COUNTS, shares, style, label=name)
    left.plot(256, 100 * GOYAL_EFFICIENCY, "C0o", label="Goyal, reported (sets the jitter)")
    left.plot(1024, 80, "C2s", label="Akiba, reported")
    left.set(xlabel="GPUs", ylabel="% of the speed of 8 GPUs, each", ylim=(30, 102))
    left.set_xscale("log", base=2)
    left.set_xticks(_COUNTS, [f"{p:,}" for p in _COUNTS], rotation=45)
    left.legend(fontsize=7, loc="lower left")
    left.set_title("model: ResNet-50, 32 images a GPU, P100", fontsize=10)

    sizes = [size for size in BUCKETS if not math.isinf(size)]
    for color, gpus in zip(("C4", "C5", "C6"), SIZES, strict=True):
        for style, name, way in (
            ("-", "halving/doubling", replace(ours, bucket=0)),
            (":", "ring", replace(ours, bucket=0, algorithm=ring)),
        ):
            times = [
                1e3 * iteration(facebook, gpus, replace(way, bucket=size), gradients)
                for size in sizes
            ]
            right.plot(
                [size / MIB for size in sizes], times, color + style, marker=".",
                label=f"{gpus:,} GPUs, {name}",
            )  # fmt: skip
    right.set(xlabel="bucket, MiB", ylabel="iteration, ms", ylim=(245, 400))
    right.set_xscale("log")
    right.set_xticks([size / MIB for size in sizes], [f"{size / MIB:.0f}" for size in sizes])
    right.minorticks_off()
    right.legend(fontsize=7)
    right.set_title("model: step and fp16 overlapped, 50 Gbit/s", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), profile())
