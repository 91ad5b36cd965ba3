"""The CUDA back end's numbers: both paths, any grid, every type and alignment.

On a GPU; most of it also where the kernels were compiled for the CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch
from torch import Tensor

from backend_cases import (
    BF16,
    DEFAULTS,
    F16,
    F32,
    F64,
    PLAIN,
    ROWS,
    USUAL,
    Dtypes,
    Row,
    in_float64,
    label,
)
from backends.test_backends import CASES, _compare
from device_bits import Bits
from device_cases import DEVICES, LAYOUTS, SIZES, Twin, assert_same_runs, marks, moved
from fastlars import _C
from fastlars.backends.base import StepScalars
from fastlars.backends.choose import instance
from fastlars.backends.cuda import PATHS, Cuda
from fastlars.rules import GradientNorm, LarsRule
from problems import ORDINARY, PROBLEMS, Entry, Problem
from tolerances import assert_same_bits

DEVICE = DEVICES["cuda"]
pytestmark = marks("cuda")
TYPE_MIXES = (
    PLAIN,
    Dtypes(BF16, F16, BF16),
    Dtypes(F16, BF16, F32),
    Dtypes(F32, BF16, F32, copy=F16),
)
NAMED = {problem.name: problem for problem in PROBLEMS}
# How a step may be launched: path, grid, shared slots. All must equal the first.
LAUNCHES = (
    ("two-launch", 0, 0),
    *(("two-launch", grid, 0) for grid in (1, 2, 16)),
    *(("one-launch", grid, slots) for grid in (0, 1, 2, 16) for slots in (0, 1)),
)


class TestBits(Bits):
    backend = "cuda"

    @pytest.fixture(autouse=True, params=PATHS)
    def _path(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(instance("cuda"), "path", request.param)

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
    def test_apply_of_every_option_equals_cpu(self, row: Row) -> None:
        self.assert_apply_equals_cpu(row, PLAIN, ORDINARY)


def _launched(path: str, grid: int, shared_slots: int) -> Cuda:
    backend = Cuda()
    backend.path, backend.grid, backend.shared_slots = path, grid, shared_slots
    return backend


@pytest.mark.parametrize("row", USUAL, ids=lambda row: row.name)
@pytest.mark.parametrize(
    ("dtypes", "problem"),
    [
        *((dtypes, SIZES) for dtypes in TYPE_MIXES),
        *(
            (PLAIN, problem)
            for problem in (LAYOUTS, *map(NAMED.get, ("zeros", "tiny", "all empty")))
        ),
        (PLAIN, NAMED["thousands"]),  # more than one launch takes
    ],
    ids=lambda x: label(x) if isinstance(x, Dtypes) else x.name,
)
def test_any_path_grid_and_number_of_slots_have_the_same_bits(
    row: Row, dtypes: Dtypes, problem: Problem
) -> None:
    expected: tuple[Twin, list[Tensor]] | None = None
    for launch in LAUNCHES:
        twin, reports = Twin("cuda", row, dtypes, problem), []
        twin.backend = _launched(*launch)
        for step in range(2 if problem.steps > 1 else 1):
            twin.take_gradients(step)
            reports.append(twin.step(step).cpu())
        expected = expected or (twin, reports)
        assert_same_bits(f"{launch}, reports", torch.stack(reports), torch.stack(expected[1]))
        assert_same_runs(str(launch), twin, expected[0])


def _by_types() -> Iterator[tuple[Row, Dtypes, list[Problem]]]:
    """What test_backends.py asks of the CPU."""
    cases = sorted(
        (case[1:] for case in CASES if case[0] == "cpu"),
        key=lambda case: (case[0].name, label(case[1])),
    )
    for _, same in groupby(cases, key=lambda case: case[:2]):
        rows = list(same)
        yield rows[0][0], rows[0][1], [problem for *_, problem in rows]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("row", "dtypes", "problems"),
    list(_by_types()),
    ids=lambda x: label(x) if isinstance(x, Dtypes) else getattr(x, "name", ""),
)
def test_equals_reference_in_float64(row: Row, dtypes: Dtypes, problems: list[Problem]) -> None:
    reference = instance("reference")
    for problem in problems:
        twin, other = (Twin("cuda", row, dtypes, problem) for _ in range(2))
        twin.backend, other.backend = (_launched(path, 0, 0) for path in PATHS)
        for step in range(problem.steps):
            twin.take_gradients(step)
            other.take_gradients(step)
            run = twin.at_home()
            before, expected = in_float64(run.tensors), in_float64(run.tensors)
            bound = reference.bind(expected, reference.layout(expected.weights))
            right = reference.step(row.rule, bound, row.now(step))
            report = twin.step(step).cpu()
            _compare(twin.at_home(), before, expected, report, right.double(), row.now(step))
            assert_same_bits("report on the other path", other.step(step).cpu(), report)
            assert_same_runs("the other path", other, twin)
            for was, grad in zip(run.tensors.grads, twin.tensors.grads, strict=True):
                assert_same_bits("gradient, which is never written", grad.cpu(), was)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        *((name, dtypes) for name in ("weights", "grads", "states") for dtypes in TYPE_MIXES),
        ("copies", TYPE_MIXES[-1]),
    ],
    ids=lambda x: label(x) if isinstance(x, Dtypes) else x,
)
def test_alignment_does_not_show(name: str, dtypes: Dtypes, path: str) -> None:
    """One array at a time is off its boundary; a chunk and a half, so that both loops run."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6145, generator=generator) for _ in range(3)]

    def trained(layout: str) -> Twin:
        problem = Problem(layout, lambda _: [Entry(values[0], tuple(values[1:]), layout)])
        other = dataclasses.replace(problem, make=lambda _: [Entry(values[0], tuple(values[1:]))])
        twin = Twin("cuda", DEFAULTS[2], dtypes, other)
        twin.backend = _launched(path, 2, 0)
        for step in range(2):
            off = Twin("cuda", DEFAULTS[2], dtypes, problem)
            off.take_gradients(step)
            twin.take_gradients(step)
            chosen = getattr(off.tensors, name)
            if name == "grads" or step == 0:
                setattr(twin.tensors, name, chosen)
            twin.step(step)
        return twin

    assert_same_runs(name, trained("misaligned"), trained("contiguous"))


@pytest.mark.parametrize("path", PATHS)
def test_weights_and_states_may_move(path: str) -> None:
    """One layout serves lists that lie elsewhere, in any order."""
    row = DEFAULTS[2]
    expected, run = (Twin("cuda", row, PLAIN, SIZES) for _ in range(2))
    backend = expected.backend = run.backend = _launched(path, 0, 0)
    for each in (expected, run):
        each.take_gradients(0)
        each.step(0)
    layout = backend.layout(run.tensors.weights)
    copies = [run.tensors, moved(run.tensors, DEVICE), moved(run.tensors, DEVICE)]
    for x in copies[1:]:
        x.weights, x.states = (
            [w.clone() for w in x.weights],
            tuple([s.clone() for s in state] for state in x.states),
        )
        assert x.counters is not None
        x.counters = [c.clone() for c in x.counters]
    expected.step(0)
    bound = [backend.bind(tensors, layout) for tensors in copies]
    for i in (1, 0, 2):
        backend.step(row.rule, bound[i], row.now(0))
        run.tensors = copies[i]
        assert_same_runs(f"list {i}", run, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_more_than_2_to_31_elements(path: str) -> None:
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 5 * 2 * size:
        pytest.skip("needs 20 GB of free GPU memory")
    backend = _launched(path, 0, 0)
    weight = torch.ones(size, dtype=BF16, device=DEVICE)
    grad = torch.full_like(weight, 0.5)
    far = slice(2**31, None)
    weight[far], grad[far] = 2.0, -1.0
    # |w|^2 = 2^31 + 4 * 4099, |g|^2 = (2^31 + 4 * 4099) / 4: q = 2 h, whatever the size.
    rule = LarsRule(momentum=0.0, weight_decay=0.0, trust_coefficient=0.25)
    run = Twin("cuda", Row("", rule), Dtypes(BF16, BF16, F32), NAMED["all empty"])
    run.tensors.weights, run.tensors.grads = [weight], [grad]
    bound = backend.bind(run.tensors, backend.layout([weight]))
    report = backend.step(rule, bound, StepScalars(lr=0.5))
    norm = math.sqrt(2**31 + 4 * 4099)
    assert report[0].tolist() == pytest.approx([0.5, norm, norm / 2], rel=1e-6)
    norms = backend.measure(GradientNorm(), bound, StepScalars(lr=0.0))
    assert norms.item() == (2**31 + 4 * 4099) / 4
    # w - 0.5 q g, whose ratio may be off by a rounding that bfloat16 does not see.
    assert bool((weight[: 2**31] == 0.875).all())
    assert bool((weight[far] == 2.25).all())


def _bound(backend: Cuda) -> tuple[Twin, object]:
    twin = Twin("cuda", DEFAULTS[0], PLAIN, LAYOUTS)
    twin.take_gradients(0)
    return twin, backend.bind(twin.tensors, backend.layout(twin.tensors.weights))


def test_addresses_of_other_devices_never_reach_a_kernel() -> None:
    backend = _launched("two-launch", 0, 0)
    twin, bound = _bound(backend)
    rule = twin.row.rule
    n = len(twin.entries)
    for sums in (None, torch.zeros(n - 1, 2, dtype=F64), torch.zeros(n, 2)):
        with pytest.raises(ValueError, match=rf"float64 sums of shape \[{n}, 2\]"):
            backend.apply(rule, bound, StepScalars(lr=0.1), sums)
    elsewhere = torch.zeros(n, 2, dtype=F64, device="meta")
    with pytest.raises(ValueError, match=f"needs sums on {twin.device}(:0)?, got some on meta"):
        backend.apply(rule, bound, StepScalars(lr=0.1), elsewhere)
    with pytest.raises(ValueError, match="needs weights on one"):
        backend.layout([*twin.tensors.weights, torch.zeros(3, device="meta")])


@pytest.mark.parametrize("path", PATHS)
def test_an_error_names_the_kernel_and_leaves_torch_usable(path: str) -> None:
    expected, run = (Twin("cuda", DEFAULTS[0], PLAIN, SIZES) for _ in range(2))
    for each in (expected, run):
        each.take_gradients(0)
    # More shared memory than any device has.
    backend = run.backend = _launched("one-launch", 0, 100_000)
    bound = run.bind()
    with pytest.raises(_C.CudaError, match="fastlars kernel step: cudaError"):
        backend.step(run.row.rule, bound, run.row.now(0))
    assert float(torch.ones(3, device=DEVICE).sum()) == 3.0
    backend.shared_slots, backend.path = 0, path
    backend.step(run.row.rule, bound, run.row.now(0))
    expected.step(0)
    assert_same_runs("after an error", run, expected)
