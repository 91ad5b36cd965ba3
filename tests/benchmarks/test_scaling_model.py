"""The alpha-beta model against cases computed by hand, messages counted, and the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.scaling import model
from benchmarks.scaling.alphabeta import (
    CAST_BYTES,
    LAUNCH,
    STEP_BYTES,
    Algorithm,
    Cluster,
    Gradient,
    Link,
    Way,
    buckets,
    expected_largest,
    halving_doubling,
    iteration,
    ring,
)
from repository_files import ROOT

LINK = Link(latency=1e-3, bandwidth=1e9)
MEGA = 2**20


@pytest.mark.parametrize(
    ("algorithm", "p", "seconds"),
    [
        (ring, 1, 0.0),
        (ring, 4, 6e-3 + 12e-3),  # 6 messages, 2 * 3/4 * 8 MB
        (halving_doubling, 1, 0.0),
        (halving_doubling, 4, 4e-3 + 12e-3),
        (halving_doubling, 6, 6e-3 + 2 * 5 / 6 * 8e-3),  # 2 log2(4) + 2 messages
    ],
)
def test_all_reduce_by_hand(algorithm: Algorithm, p: int, seconds: float) -> None:
    assert algorithm(p, 8e6, LINK) == pytest.approx(seconds, rel=1e-12)


def run_ring(values: list[list[float]]) -> tuple[int, int]:
    """All-reduce lists in place; messages one after the other, elements each process sends."""
    p, part = len(values), len(values[0]) // len(values)
    steps = sent = 0
    for phase in range(2):  # reduce-scatter, all-gather
        for step in range(p - 1):
            before = [list(row) for row in values]
            for rank in range(p):
                block = (rank + phase - step) % p
                for i in range(block * part, (block + 1) * part):
                    kept = values[(rank + 1) % p][i] if phase == 0 else 0.0
                    values[(rank + 1) % p][i] = kept + before[rank][i]
            steps, sent = steps + 1, sent + part
    return steps, sent


def run_halving_doubling(values: list[list[float]]) -> tuple[int, int]:
    """The same for powers of two."""
    p, size = len(values), len(values[0])
    blocks = [(0, size)] * p
    steps = sent = 0
    distance, trace = 1, []
    while distance < p:
        before = [list(row) for row in values]
        trace.append((distance, list(blocks)))
        for rank in range(p):
            low, high = blocks[rank]
            middle = (low + high) // 2
            mine = (low, middle) if rank & distance == 0 else (middle, high)
            for i in range(*mine):
                values[rank][i] = before[rank][i] + before[rank ^ distance][i]
            blocks[rank] = mine
        steps, sent = steps + 1, sent + (blocks[0][1] - blocks[0][0])
        distance *= 2
    for distance, earlier in reversed(trace):
        before = [list(row) for row in values]
        for rank in range(p):
            for i in range(*blocks[rank ^ distance]):
                values[rank][i] = before[rank ^ distance][i]
        steps, sent = steps + 1, sent + (blocks[0][1] - blocks[0][0])
        blocks = earlier
    return steps, sent


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_all_reduce_by_counting_messages(p: int) -> None:
    """Latency alone counts messages, bandwidth alone counts elements; both ways add up right."""
    size = 2 * p
    for algorithm, simulate in ((ring, run_ring), (halving_doubling, run_halving_doubling)):
        values = [[float(100 * rank + i) for i in range(size)] for rank in range(p)]
        wanted = [sum(column) for column in zip(*values, strict=True)]
        steps, sent = simulate(values)
        assert all(row == wanted for row in values)
        assert algorithm(p, size, Link(1.0, math.inf)) == steps
        assert algorithm(p, size, Link(0.0, 1.0)) == pytest.approx(sent)


@pytest.mark.parametrize(
    ("p", "mean"), [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))]
)
def test_the_slowest_of_few(p: int, mean: float) -> None:
    assert expected_largest(p) == pytest.approx(mean, abs=1e-9)


def test_buckets_close_as_those_of_ddp() -> None:
    sizes = [MEGA // 8, MEGA // 4, MEGA // 8, MEGA // 4, MEGA // 4, 1]  # float32: 4 bytes each
    gradients = [Gradient(size, number / 10) for number, size in enumerate(sizes)]
    joined = buckets(gradients, 2 * MEGA)
    assert joined == [
        Gradient(3 * MEGA // 8, 0.1),  # 1.5 MiB: the first is full at 1 MiB
        Gradient(5 * MEGA // 8, 0.4),
        Gradient(1, 0.5),
    ]
    assert buckets(gradients, 0) == gradients
    assert buckets(gradients, math.inf) == [Gradient(sum(sizes), 0.5)]


# Two gradients of 1,000,000 elements, ready after a half and at the end of a backward pass of 20
# ms; on two machines of one GPU each 4 MB take 2 ms for two messages and 4 ms on the wire.
CLUSTER = Cluster(
    node=1, local=LINK, between=LINK, flat=False, forward=10e-3, backward=20e-3, memory=20e9,
    jitter=0.0,
)  # fmt: skip
TWO = [Gradient(1_000_000, 0.5), Gradient(1_000_000, 1.0)]
STEP = LAUNCH + STEP_BYTES * 1e6 / 20e9  # 1 ms, and a launch
CAST = LAUNCH + CAST_BYTES * 1e6 / 20e9


@pytest.mark.parametrize(
    ("way", "seconds"),
    [
        # 30 ms, 8 MB at once, one step of both
        (Way(reduce_overlaps=False, bucket=math.inf), 30e-3 + 10e-3 + 2 * STEP - LAUNCH),
        # 4 MB from 20 to 26 ms; the others from 30 to 36 ms
        (Way(bucket=0), 36e-3 + 2 * STEP - LAUNCH),
        # the first step from 26 ms on, out of sight; the second from 36 ms on
        (Way(bucket=0, step_overlaps=True), 36e-3 + STEP),
        # 2 MB: 2 ms on the wire, after a cast
        (Way(bucket=0, step_overlaps=True, gradient_bytes=2), 30e-3 + CAST + 4e-3 + STEP),
    ],
)
def test_an_iteration_by_hand(way: Way, seconds: float) -> None:
    assert iteration(CLUSTER, 2, way, TWO) == pytest.approx(seconds, rel=1e-12)


def test_buckets_wait_for_the_wire_and_all_for_the_slowest() -> None:
    slow = replace(CLUSTER, between=Link(0.0, 0.2e9))  # 20 ms for each bucket
    overlapped = iteration(slow, 2, Way(bucket=0), TWO)
    assert overlapped == pytest.approx(20e-3 + 2 * 20e-3 + 2 * STEP - LAUNCH, rel=1e-12)
    late = iteration(replace(CLUSTER, jitter=0.1), 2, Way(bucket=0), TWO)
    more = 0.1 / math.sqrt(math.pi) * 30e-3
    assert late - iteration(CLUSTER, 2, Way(bucket=0), TWO) == pytest.approx(more, rel=1e-6)


def test_two_levels_and_one_ring() -> None:
    cluster = replace(CLUSTER, node=8, local=Link(1e-4, 4e9))
    inside = ring(8, 8e6, cluster.local)
    assert cluster.all_reduce(8, 8e6, ring) == inside
    assert cluster.all_reduce(32, 8e6, halving_doubling) == inside + halving_doubling(4, 8e6, LINK)
    assert replace(cluster, flat=True).all_reduce(32, 8e6, halving_doubling) == ring(32, 8e6, LINK)


@pytest.mark.slow
def test_the_papers() -> None:
    """Four figures set the free parameters; what the others come to stands in the docs."""
    checks = model.validation(model.profile())
    fitted = [check for check in checks if check.fitted]
    held_out = [check for check in checks if not check.fitted]
    assert len(fitted) == 4
    assert all(check.model == pytest.approx(check.paper, rel=1e-6) for check in fitted)
    assert len(held_out) == 4
    assert all(check.model == pytest.approx(check.paper, rel=0.05) for check in held_out)


@pytest.mark.slow
def test_the_documentation_shows_what_the_model_says() -> None:
    text = (ROOT / "docs" / "distributed.md").read_text()
    gradients = model.profile()
    assert model.checks_table(model.validation(gradients)) in text
    assert model.worth_table(model.worth(gradients)) in text
