"""The picture of the model: efficiency over GPUs, and the size of a bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import drawing
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
)

_COUNTS = [2**power for power in range(3, 14)]
_OURS = Way(step_overlaps=True, gradient_bytes=2)


def figure(gradients: Sequence[Gradient]) -> Any:
    """Two panels."""
    made, (top, bottom) = drawing.panels([2.6, 2.6], right=1.05)
    _efficiency(top, gradients)
    _buckets(bottom, gradients)
    return made


def _efficiency(axis: Any, gradients: Sequence[Gradient]) -> None:
    facebook = goyal(gradients)
    preferred = akiba(gradients, facebook)
    ends = []
    for name, cluster, way, style in (
        ("a message for\neach gradient\n(Goyal et al.)", facebook, GOYAL_WAY, "C0-"),
        ("25 MiB buckets", facebook, _OURS, "C3--"),
        ("one buffer\nat the end", facebook, Way(reduce_overlaps=False, bucket=math.inf), "C1-."),
        ("one buffer in\na ring, fp16\n(Akiba et al.)", preferred, AKIBA_WAY, "C2-"),
        ("", facebook, replace(GOYAL_WAY, algorithm=ring), "C0:"),
    ):
        shares = [100 * efficiency(cluster, 8, p, way, gradients) for p in _COUNTS]
        axis.plot(_COUNTS, shares, style)
        if name:
            ends.append((name, _COUNTS[-1], shares[-1], style[:2]))
    axis.plot(256, 100 * GOYAL_EFFICIENCY, "C0o")
    axis.plot(1024, 80, "C2s")
    axis.text(290, 92, "reported", color="C0")
    axis.text(520, 72, "reported", color="C2")
    axis.text(800, 46, "Goyal et al.,\nin a ring", color="C0")
    drawing.log_axes(axis, xs=_COUNTS[::2])
    axis.set(ylim=(30, 103), xlabel="GPUs", title="model: % of the speed of 8 GPUs")
    drawing.name_ends(axis, ends, lines=3)


def _buckets(axis: Any, gradients: Sequence[Gradient]) -> None:
    facebook, ends = goyal(gradients), []
    sizes = [size for size in BUCKETS if not math.isinf(size)]
    xs = [size / MIB for size in sizes]
    for colour, marker, gpus in zip(("C0", "C1", "C3"), "os^", SIZES, strict=True):
        for style, kind, algorithm in ((":", ", ring", ring), ("-", "", _OURS.algorithm)):
            way = replace(_OURS, algorithm=algorithm)
            times = [
                1e3 * iteration(facebook, gpus, replace(way, bucket=size), gradients)
                for size in sizes
            ]
            axis.plot(xs, times, style, color=colour, marker=marker)
            ends.append((f"{gpus:,}{kind}", xs[-1], times[-1], colour))
    drawing.log_axes(axis, xs=xs)
    axis.set(ylim=(245, 400), xlabel="bucket, MiB", title="model: ms of an iteration, by GPUs")
    drawing.name_ends(axis, ends)
