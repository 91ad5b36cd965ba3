"""csrc/core by itself: trust ratios, and the cut into chunks and blocks."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from backend_cases import F32, NAMES
from core_library import core as core
from fastlars.backends.base import Dtypes, StepScalars, Tensors
from fastlars.backends.choose import instance
from fastlars.rules import LambRule, LarsRule

# Trust ratios.

INF, NAN = math.inf, math.nan
LARS_RATIOS = [
    # weight^2, update^2, coefficient, decay, eps, combined, ratio
    (25.0, 4.0, 0.5, 0.1, 0.5, False, 2.5 / 3.0),
    (25.0, 4.0, 0.5, 0.1, 0.5, True, 1.0),
    (0.0, 4.0, 0.5, 0.1, 0.5, False, 1.0),  # fresh zeros
    (25.0, 0.0, 0.5, 0.1, 0.5, False, 1.0),  # no gradient
    (0.0, 0.0, 0.5, 0.0, 0.0, False, 1.0),
    (NAN, 4.0, 0.5, 0.1, 0.0, False, 1.0),  # the NaN itself shows in the element that it hits
    (25.0, NAN, 0.5, 0.1, 0.0, False, 1.0),
    (25.0, INF, 0.5, 0.1, 0.0, False, 0.0),
    (1e-60, 1e-60, 0.5, 0.0, 0.0, False, 0.5),  # squares of what float32 holds, not float32
    (1e60, 1e60, 0.5, 0.0, 0.0, False, 0.5),
    (1.0, 1e-84, 1.0, 0.0, 0.0, False, 3.4028234663852886e38),  # not infinity
    (25.0, 4.0, 0.0, 0.1, 0.5, False, 0.0),
]
LAMB_RATIOS = [
    # weight^2, update^2, lower, upper, eps, ratio
    (25.0, 4.0, 0.0, INF, 0.0, 2.5),
    (25.0, 4.0, 0.0, INF, 0.5, 2.0),
    (25.0, 4.0, 6.0, 10.0, 0.0, 3.0),
    (25.0, 4.0, 1.0, 3.0, 0.0, 1.5),
    (0.0, 4.0, 6.0, 10.0, 0.0, 1.0),
    (25.0, 0.0, 0.0, INF, 0.5, 1.0),
    (NAN, 4.0, 6.0, 10.0, 0.0, 1.0),
    (25.0, NAN, 0.0, INF, 0.0, 1.0),
    (25.0, INF, 0.0, INF, 0.0, 0.0),
    (1.0, 1e-84, 0.0, INF, 0.0, 3.4028234663852886e38),
]


BOUNDS = [
    # rule, weight^2, update^2, ratio at lr 0.1
    (LarsRule(trust_coefficient=1.0, ratio_floor=3.0), 25.0, 4.0, 3.0),
    (LarsRule(trust_coefficient=1.0, ratio_ceiling=2.0), 25.0, 4.0, 2.0),
    (LarsRule(trust_coefficient=1.0, ratio_floor=2.0, ratio_ceiling=3.0), 25.0, 4.0, 2.5),
    # LARC has the last word: 0.5 / lr, and 1 where the bounds leave q above lr.
    (LarsRule(trust_coefficient=1.0, ratio_ceiling=0.05, trust_clip=True), 25.0, 4.0, 0.5),
    (LarsRule(trust_coefficient=1.0, ratio_floor=3.0, trust_clip=True), 25.0, 4.0, 1.0),
    # No ratio, so no bounds.
    (LarsRule(ratio_floor=3.0), 0.0, 4.0, 1.0),
    (LarsRule(ratio_ceiling=0.5), 25.0, 0.0, 1.0),
    (LarsRule(ratio_floor=3.0), NAN, 4.0, 1.0),
    (LarsRule(adapt=False, ratio_floor=3.0), 25.0, 4.0, 1.0),
    (LambRule(ratio_floor=3.0), 25.0, 4.0, 3.0),
    (LambRule(ratio_ceiling=2.0), 25.0, 4.0, 2.0),
    (LambRule(ratio_floor=2.0, ratio_ceiling=3.0), 25.0, 4.0, 2.5),
    (LambRule(ratio_floor=2.0, ratio_ceiling=2.0), 1e-8, 4.0, 2.0),
    (LambRule(upper=3.0, ratio_floor=2.0), 25.0, 4.0, 2.0),  # phi: 1.5
    (LambRule(ratio_floor=3.0, trust_clip=True), 25.0, 4.0, 1.0),
    (LambRule(ratio_floor=3.0), 0.0, 4.0, 1.0),
    (LambRule(ratio_ceiling=0.5), 25.0, 0.0, 1.0),
    (LambRule(ratio_ceiling=0.5), 25.0, NAN, 1.0),
    (LambRule(ratio_floor=0.5), 25.0, INF, 0.5),
    (LambRule(ratio_ceiling=2.0), 1.0, 1e-84, 2.0),  # beyond float32 without the ceiling
]


@pytest.mark.parametrize("row", LARS_RATIOS, ids=str)
def test_lars_ratio(core: ctypes.CDLL, row: tuple[float, ...]) -> None:
    *arguments, combined, expected = row
    found = core.lars(*map(ctypes.c_double, arguments), int(combined))
    assert found == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("row", LAMB_RATIOS, ids=str)
def test_lamb_ratio(core: ctypes.CDLL, row: tuple[float, ...]) -> None:
    *arguments, expected = row
    assert core.lamb(*map(ctypes.c_double, arguments)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("row", LARS_RATIOS + LAMB_RATIOS, ids=str)
def test_back_ends_guard_ratios_alike(backend: str, row: tuple[float, ...]) -> None:
    rule: LarsRule | LambRule
    if len(row) == 7:
        w, u, trust, decay, eps, combined, expected = row
        ratio = "combined" if combined else "separate"
        rule = LarsRule(0.0, 0.0, decay, False, trust, eps, ratio)  # type: ignore[arg-type]
    else:
        w, u, lower, upper, eps, expected = row
        rule = LambRule(lower=lower, upper=upper, ratio_eps=eps)
    assert _ratio_of_sums(backend, rule, w, u) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(("rule", "w", "u", "expected"), BOUNDS, ids=str)
def test_back_ends_bound_ratios_alike(
    backend: str, rule: LarsRule | LambRule, w: float, u: float, expected: float
) -> None:
    assert _ratio_of_sums(backend, rule, w, u) == pytest.approx(expected, rel=1e-6)


def _ratio_of_sums(backend: str, rule: LarsRule | LambRule, w: float, u: float) -> float:
    """The ratio that a back end makes of sums of squares, at a learning rate of 0.1."""
    one = [torch.zeros(1)]
    counters = [torch.ones(())] if rule.counter else None
    tensors = Tensors(
        one,
        [torch.zeros(1)],
        tuple([torch.zeros(1)] for _ in rule.states),
        counters,
        None,
        Dtypes(F32, F32, F32),
    )
    chosen = instance(backend)
    sums = torch.tensor([[w, u]], dtype=torch.float64) if rule.adapt else None
    found = chosen.apply(rule, chosen.bind(tensors, chosen.layout(one)), StepScalars(lr=0.1), sums)
    return float(found[0, 0])


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("buffer", LarsRule.CHOICES["buffer"])
def test_vanishing_gradients_take_finite_steps(backend: str, buffer: str) -> None:
    # |w| / |g| is beyond float32, and the learning rate goes on top of it.
    weight, grad = torch.ones(4), torch.full((4,), 1e-42)
    rule = LarsRule(trust_coefficient=1.0, buffer=buffer)  # type: ignore[arg-type]
    tensors = Tensors([weight], [grad], ([torch.zeros(4)],), None, None, Dtypes(F32, F32, F32))
    chosen = instance(backend)
    report = chosen.step(rule, chosen.bind(tensors, chosen.layout([weight])), StepScalars(lr=30.0))
    assert float(report[0, 0]) == pytest.approx(torch.finfo(F32).max)
    assert bool(weight.isfinite().all())
    assert bool((weight < 1.0).all())


@pytest.mark.parametrize("backend", NAMES)
def test_trust_clip_at_rate_0_changes_nothing(backend: str) -> None:
    for coefficient in (0.0, 1.0):
        weight, grad = torch.ones(4), torch.ones(4)
        rule = LarsRule(momentum=0.0, trust_coefficient=coefficient, trust_clip=True)
        tensors = Tensors([weight], [grad], (), None, None, Dtypes(F32, F32, F32))
        chosen = instance(backend)
        bound = chosen.bind(tensors, chosen.layout([weight]))
        assert float(chosen.step(rule, bound, StepScalars(lr=0.0))[0, 0]) == 1.0
        assert weight.tolist() == [1.0] * 4


# Chunks.

CHUNK = 16384


def _chunks(core: ctypes.CDLL, numel: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    rows = (ctypes.c_int64 * 3000)()
    first = (ctypes.c_int * (len(numel) + 1))()
    count = core.chunks((ctypes.c_int64 * len(numel))(*numel), len(numel), rows, first)
    return [tuple(rows[3 * i : 3 * i + 3]) for i in range(count)], list(first)


def test_chunks_cover_every_element_once(core: ctypes.CDLL) -> None:
    numel = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 0, 3 * CHUNK, 5, 0]
    rows, first = _chunks(core, numel)
    assert rows == [
        (1, 0, 1),
        (2, 0, CHUNK - 1),
        (3, 0, CHUNK),
        (4, 0, CHUNK),
        (4, CHUNK, 1),
        (6, 0, CHUNK),
        (6, CHUNK, CHUNK),
        (6, 2 * CHUNK, CHUNK),
        (7, 0, 5),
    ]
    assert first == [0, 0, 1, 2, 3, 5, 5, 8, 9, 9]


def test_chunks_of_more_than_2_31_elements(core: ctypes.CDLL) -> None:
    # Cutting needs no memory: only the last chunks are looked at.
    numel = 2**33 + 3
    count = -(-numel // CHUNK)
    rows = (ctypes.c_int64 * (3 * count))()
    first = (ctypes.c_int * 2)()
    assert core.chunks((ctypes.c_int64 * 1)(numel), 1, rows, first) == count
    assert list(rows[-6:]) == [0, 2**33 - CHUNK, CHUNK, 0, 2**33, 3]


def _blocks(core: ctypes.CDLL, numel: list[int], target: int) -> list[int]:
    ends = (ctypes.c_int * max(1, len(numel)))()
    values = (ctypes.c_int64 * max(1, len(numel)))(*numel)
    count = core.blocks(values, len(numel), ctypes.c_int64(target), ends)
    return list(ends[:count])


SIZES = [[100] * 7, [3 * CHUNK, 1, 1, 2 * CHUNK, 0, 5], [0, 0], [], [0, CHUNK, 0]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("target", [1, 250, CHUNK, 10 * CHUNK])
def test_blocks_hold_whole_tensors(core: ctypes.CDLL, sizes: list[int], target: int) -> None:
    _, first = _chunks(core, sizes)
    ends = _blocks(core, sizes, target)
    assert set(ends) <= set(first)
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == first[-1]
    begin = 0
    for end in ends[:-1]:
        tensors = [t for t in range(len(sizes)) if begin <= first[t] < end]
        assert sum(sizes[t] for t in tensors) >= target > sum(sizes[t] for t in tensors[:-1])
        begin = end
