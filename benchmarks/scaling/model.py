"""What overlap, compression and bucket size are worth on many GPUs: a model, not a measurement.

``python -m benchmarks.scaling.model [--csv OUT.csv]`` prints two tables: the model
beside the papers' figures, and what it says of 256, 1,024 and 8,192 GPUs training ResNet-50.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import RESULTS, results
from benchmarks.scaling.alphabeta import (
    Cluster,
    Gradient,
    Link,
    Way,
    halving_doubling,
    iteration,
    ring,
)

PROFILE = RESULTS / "backward.csv"
MIB = 2**20
SIZES = (256, 1024, 8192)
BUCKETS = tuple(size * MIB for size in (1, 2, 5, 10, 25, 50, math.inf))

# Goyal et al. 2017: 8 P100 a machine with NVLink, 50 Gbit/s Ethernet; back-propagation of 32 images
# takes 120 ms; an iteration on 256 GPUs 0.256 s (90 epochs of 8,192 images in an hour); 0.9 of
# the 8 GPUs' speed; halving/doubling 3 times faster than the ring on 32 machines.
GOYAL_BACKWARD, GOYAL_256, GOYAL_EFFICIENCY, GOYAL_SPEEDUP = 0.120, 0.256, 0.90, 3.0
GOYAL_WAY = Way(bucket=0)  # an all-reduce for each gradient, float32
# Akiba et al. 2017: 8 P100 a machine, two InfiniBand FDR; one float16 buffer after the backward
# pass, NCCL's ring; 897.9 s for 3,519 iterations on 1,024 GPUs.
AKIBA_1024 = 897.9 / 3519
AKIBA_WAY = Way(ring, reduce_overlaps=False, gradient_bytes=2, bucket=math.inf)

P100_MEMORY = 0.75 * 732e9  # three quarters of the data sheet's
NVLINK, PCIE = Link(5e-6, 20e9), Link(5e-6, 10e9)
ETHERNET_50, FDR_TWICE = 50e9 / 8, 2 * 56e9 / 8  # bytes a second, nominal
INFINIBAND = 6e-6  # seconds a message, between GPUs of two machines


def profile(path: Path = PROFILE) -> list[Gradient]:
    """The gradients of ResNet-50 as benchmarks.overlap.backward saw them come."""
    return [Gradient(int(row["elements"]), float(row["ready"])) for row in results.read_csv(path)]


def latency_from_speedup(
    speedup: float, p: int, count: int, size: float, bandwidth: float
) -> float:
    """The latency with which halving/doubling beats the ring so many times, over all `count`
    all-reduces of `size` bytes in all."""
    wire = 2 * (p - 1) / p * size / bandwidth
    return (speedup - 1) * wire / (count * (2 * (p - 1) - speedup * 2 * math.log2(p)))


def _solve(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses zero."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def goyal(gradients: Sequence[Gradient]) -> Cluster:
    """Latency, jitter and the time outside back-propagation, from three of the paper's figures."""
    size = 4 * sum(gradient.elements for gradient in gradients)
    latency = latency_from_speedup(GOYAL_SPEEDUP, 32, len(gradients), size, ETHERNET_50)
    start = Cluster(
        8, NVLINK, Link(latency, ETHERNET_50), flat=False, forward=0.0,
        backward=GOYAL_BACKWARD, memory=P100_MEMORY, jitter=0.0,
    )  # fmt: skip

    def with_jitter(jitter: float) -> Cluster:
        cluster = replace(start, jitter=jitter)
        forward = _solve(
            lambda seconds: (
                iteration(replace(cluster, forward=seconds), 256, GOYAL_WAY, gradients) - GOYAL_256
            ),
            0.0,
            GOYAL_256,
        )
        return replace(cluster, forward=forward)

    def loss(jitter: float) -> float:
        return GOYAL_EFFICIENCY - efficiency(with_jitter(jitter), 8, 256, GOYAL_WAY, gradients)

    return with_jitter(_solve(loss, 0.0, 0.3))


def akiba(gradients: Sequence[Gradient], like: Cluster, latency: float = INFINIBAND) -> Cluster:
    """Jitter as fitted to Goyal et al.; one more figure sets the GPU's speed."""
    start = replace(like, flat=True, local=PCIE, between=Link(latency, FDR_TWICE))

    def with_compute(seconds: float) -> Cluster:
        return replace(start, forward=seconds / 3, backward=2 * seconds / 3)

    seconds = _solve(
        lambda s: iteration(with_compute(s), 1024, AKIBA_WAY, gradients) - AKIBA_1024, 0.0, 1.0
    )
    return with_compute(seconds)


def h200(like: Cluster) -> Cluster:
    """Eight H200 a machine, a 400 Gbit/s card each; all of it assumed, nothing measured."""
    return replace(
        like, local=Link(3e-6, 300e9), between=Link(INFINIBAND, 8 * 400e9 / 8),
        forward=4e-3, backward=8e-3, memory=4.3e12,
    )  # fmt: skip


def efficiency(
    cluster: Cluster, few: int, many: int, way: Way, gradients: Sequence[Gradient]
) -> float:
    """Images a second and GPU on `many`, as a share of those on `few`."""
    return iteration(cluster, few, way, gradients) / iteration(cluster, many, way, gradients)


@dataclass(frozen=True)
class Check:
    """One figure of a paper beside the model's."""

    what: str
    paper: float
    model: float
    fitted: bool  # to this very figure, which then says nothing about the model


def validation(gradients: Sequence[Gradient]) -> list[Check]:
    """The papers' figures; the first four set the model's free parameters."""
    facebook = goyal(gradients)
    preferred = akiba(gradients, facebook)
    slower = akiba(gradients, facebook, facebook.between.latency)
    total = {
        name: sum(algorithm(32, 4 * gradient.elements, facebook.between) for gradient in gradients)
        for name, algorithm in (("ring", ring), ("halving", halving_doubling))
    }

    def share(cluster: Cluster, few: int, many: int, way: Way) -> float:
        return efficiency(cluster, few, many, way, gradients)

    def seconds(cluster: Cluster, p: int, way: Way) -> float:
        return iteration(cluster, p, way, gradients)

    return [
        Check("Goyal: halving/doubling over ring, 32 machines", GOYAL_SPEEDUP,
              total["ring"] / total["halving"], True),
        Check("Goyal: iteration on 256 GPUs, s", GOYAL_256,
              seconds(facebook, 256, GOYAL_WAY), True),
        Check("Goyal: efficiency, 8 to 256 GPUs", GOYAL_EFFICIENCY,
              share(facebook, 8, 256, GOYAL_WAY), True),
        Check("Akiba: iteration on 1,024 GPUs, s", AKIBA_1024,
              seconds(preferred, 1024, AKIBA_WAY), True),
        Check("Goyal: iteration, 352 GPUs over 8", 1.12,
              1 / share(facebook, 8, 352, GOYAL_WAY), False),
        Check("Akiba: efficiency, 8 to 1,024 GPUs", 0.80,
              share(preferred, 8, 1024, AKIBA_WAY), False),
        Check("Akiba: efficiency, 1 to 1,024 GPUs", 0.70,
              share(preferred, 1, 1024, AKIBA_WAY), False),
        Check("the same, 8 to 1,024, with the latency of Goyal's Ethernet", 0.80,
              share(slower, 8, 1024, AKIBA_WAY), False),
    ]  # fmt: skip


@dataclass(frozen=True)
class Worth:
    """One line of the table: an iteration as DDP does it, and what each change does to it.

    Seconds; below zero is saved. `plain` is halving/doubling, buckets of 25 MiB sent during the
    backward pass, float32, weights written at the end.
    """

    machines: str
    gpus: int
    plain: float
    efficiency: float  # over one machine of 8
    ring: float
    nothing_overlaps: float
    step_overlaps: float
    half: float
    both: float
    bucket: float  # the best of BUCKETS, with both
    best_bucket: float


def worth(gradients: Sequence[Gradient]) -> list[Worth]:
    """The table, for the papers' machines and for today's."""
    old = goyal(gradients)
    lines = []
    for name, cluster in (("P100, 50 Gbit/s", old), ("H200, 8 x 400 Gbit/s", h200(old))):
        for gpus in SIZES:

            def seconds(way: Way, cluster: Cluster = cluster, gpus: int = gpus) -> float:
                return iteration(cluster, gpus, way, gradients)

            plain = Way()
            base = seconds(plain)
            both = replace(plain, step_overlaps=True, gradient_bytes=2)
            best = min(BUCKETS, key=lambda size: seconds(replace(both, bucket=size)))
            lines.append(
                Worth(
                    name, gpus, base, efficiency(cluster, 8, gpus, plain, gradients),
                    ring=seconds(replace(plain, algorithm=ring)) - base,
                    nothing_overlaps=seconds(
                        replace(plain, reduce_overlaps=False, bucket=math.inf)
                    ) - base,
                    step_overlaps=seconds(replace(plain, step_overlaps=True)) - base,
                    half=seconds(replace(plain, gradient_bytes=2)) - base,
                    both=seconds(both) - base,
                    bucket=best / MIB,
                    best_bucket=seconds(replace(both, bucket=best)) - base,
                )
            )  # fmt: skip
    return lines


def checks_table(checks: Sequence[Check]) -> str:
    """Markdown: the model beside the papers."""
    lines = []
    for check in checks:
        note = "sets a parameter" if check.fitted else f"{check.model / check.paper - 1:+.1%}"
        lines.append([check.what, f"{check.paper:.3g}", f"{check.model:.3g}", note])
    return results.markdown("figure | paper | model |", "lrrl", lines)


def worth_table(lines: Sequence[Worth]) -> str:
    """Markdown: milliseconds of an iteration, and what each change adds to it."""
    out = []
    for line in lines:
        changes = (line.ring, line.nothing_overlaps, line.step_overlaps, line.half, line.both)
        cells = " | ".join(f"{1e3 * change:+.2f}" for change in changes)
        size = "one" if math.isinf(line.bucket) else f"{line.bucket:.0f} MiB"
        out.append(
            f"{line.machines} | {line.gpus:,} | {1e3 * line.plain:.1f} | {line.efficiency:.0%} | "
            f"{cells} | {1e3 * line.best_bucket:+.2f} ({size})"
        )
    return results.markdown(
        "machines | GPUs | plain, ms | efficiency | ring | nothing overlaps | step overlaps "
        "| half precision | both | both, best bucket",
        "lr",
        out,
    )


def main(argv: list[str] | None = None) -> int:
    """Print both tables; write the CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, help="write the second table here too")
    arguments = parser.parse_args(argv)
    gradients = profile()
    lines = worth(gradients)
    print(checks_table(validation(gradients)), worth_table(lines), sep="\n\n")
    if arguments.csv:
        shown = [
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in vars(line).items()}
            for line in lines
        ]
        results.write_csv(arguments.csv, shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
