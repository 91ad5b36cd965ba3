"""Time of one data-parallel iteration, by the alpha-beta model. Used by model.py.

A message of n bytes takes ``latency + n / bandwidth``. Nothing here was timed: the numbers that go
in are in scaling.py, with where each comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Link:
    """What connects two neighbours: seconds a message, bytes a second each way."""

    latency: float
    bandwidth: float


def ring(p: int, size: float, link: Link) -> float:
    """All-reduce of `size` bytes over p: 2(p-1) messages of size/p, one after the other."""
    return 2 * (p - 1) * link.latency + _bytes(p, size) / link.bandwidth


def halving_doubling(p: int, size: float, link: Link) -> float:
    """The same bytes in 2 log2(p) messages; 2 more where p is no power of two (Goyal, sec. 4.1)."""
    rounds = p.bit_length() - 1
    steps = 2 * rounds + (0 if p == 2**rounds else 2)
    return steps * link.latency + _bytes(p, size) / link.bandwidth


def _bytes(p: int, size: float) -> float:
    return 2 * (p - 1) / p * size


Algorithm = Callable[[int, float, Link], float]


@cache
def expected_largest(p: int) -> float:
    """Mean of the largest of p standard normal numbers: how late the last of p workers is.

    >>> [round(expected_largest(p), 3) for p in (1, 2, 3)]
    [0.0, 0.564, 0.846]
    """
    width, total = 1e-3, 0.0
    for number in range(-8000, 8001):
        x = number * width
        below = 0.5 * math.erfc(-x / math.sqrt(2))
        density = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        total += x * p * density * below ** (p - 1) * width
    return total


_FIRST = 2**20  # bytes


@dataclass(frozen=True)
class Gradient:
    """Elements, and the share of the backward pass after which they are ready."""

    elements: int
    ready: float


def buckets(gradients: Sequence[Gradient], cap: float) -> list[Gradient]:
    """Gradients as DDP joins them: a bucket is full with the gradient that reaches `cap` bytes.

    The first one is full at 1 MiB already. `cap=0`: each gradient for itself; inf: all at once.
    """
    full, elements = [], 0
    limit = cap if math.isinf(cap) else min(cap, _FIRST)
    for gradient in gradients:
        elements += gradient.elements
        if 4 * elements >= limit:
            full.append(Gradient(elements, gradient.ready))
            elements, limit = 0, cap
    if elements:
        full.append(Gradient(elements, gradients[-1].ready))
    return full


@dataclass(frozen=True)
class Cluster:
    """Machines of several GPUs each, and the work of one GPU in an iteration.

    Args:
        node: GPUs in a machine.
        local: link between the GPUs of a machine.
        between: link of a whole machine to the others, all its network cards together.
        flat: one ring through all GPUs instead of an all-reduce in two levels, first among
            the GPUs of a machine, then among machines.
        forward: seconds of everything before the backward pass, input included.
        backward: seconds of the backward pass.
        memory: bytes a second that the GPU's memory moves.
        jitter: standard deviation of a GPU's forward and backward, as a share of them. In each
            iteration all wait for the slowest.
    """

    node: int
    local: Link
    between: Link
    flat: bool
    forward: float
    backward: float
    memory: float
    jitter: float

    def all_reduce(self, p: int, size: float, algorithm: Algorithm) -> float:
        """Seconds for `size` bytes over p GPUs; `algorithm` is the one among machines."""
        if p <= self.node:
            return ring(p, size, self.local)
        if self.flat:  # every message waits for those between machines
            link = Link(
                max(self.local.latency, self.between.latency),
                min(self.local.bandwidth, self.between.bandwidth),
            )
            return ring(p, size, link)
        inside = ring(self.node, size, self.local)
        return inside + algorithm(-(-p // self.node), size, self.between)


@dataclass(frozen=True)
class Way:
    """How gradients travel and when weights are written.

    Args:
        algorithm: of the all-reduce among machines.
        reduce_overlaps: buckets are sent while backward goes on; else all after it.
        step_overlaps: a bucket's weights are written as soon as it has arrived; else all at the
            end.
        gradient_bytes: of an element on the wire; 2 costs one more pass through memory to cast.
        bucket: bytes of gradients in float32 that are sent together; inf: all at once.
    """

    algorithm: Algorithm = halving_doubling
    reduce_overlaps: bool = True
    step_overlaps: bool = False
    gradient_bytes: int = 4
    bucket: float = 25 * 2**20


STEP_BYTES = 20  # a parameter: LARS reads w, g and m, writes w and m
CAST_BYTES = 6  # a parameter: float32 in, half precision out
LAUNCH = 5e-6  # seconds until a kernel runs


def iteration(cluster: Cluster, p: int, way: Way, gradients: Sequence[Gradient]) -> float:
    """Seconds of one iteration on p GPUs."""
    late = 1 + cluster.jitter * expected_largest(p)
    begin = cluster.forward * late
    end = begin + cluster.backward * late
    wire = stepped = 0.0  # when each is free again
    for bucket in buckets(gradients, way.bucket):
        ready = begin + (end - begin) * bucket.ready if way.reduce_overlaps else end
        cast = LAUNCH + CAST_BYTES * bucket.elements / cluster.memory
        wire = max(wire, ready) + (cast if way.gradient_bytes < 4 and p > 1 else 0)
        wire += cluster.all_reduce(p, way.gradient_bytes * bucket.elements, way.algorithm)
        step = LAUNCH + STEP_BYTES * bucket.elements / cluster.memory
        if way.step_overlaps:
            stepped = max(stepped, wire) + step
    if not way.step_overlaps:
        elements = sum(gradient.elements for gradient in gradients)
        stepped = max(wire, end) + LAUNCH + STEP_BYTES * elements / cluster.memory
    return max(stepped, end)
