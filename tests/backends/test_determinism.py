"""The same bits: for any number of threads, from run to run, with AVX2 and without."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlars
from backend_cases import (
    ADAPTED,
    BF16,
    DEFAULTS,
    F16,
    F32,
    OPTIONS,
    PLAIN,
    TYPE_MIXES,
    Dtypes,
    Row,
    Run,
    label,
)
from fastlars.backends.base import StepScalars, Tensors
from fastlars.backends.choose import instance
from fastlars.rules import GradientNorm, LarsRule
from problems import PROBLEMS, Entry, Problem, place
from repository_files import python_path
from tolerances import assert_same_bits


def _sizes(generator: torch.Generator) -> list[Entry]:
    """Ends of chunks, of blocks and of threads in different places."""
    sizes = (1, 40_000, 31, 16_384, 400_003, 7, 7, 7, 131_072, 0, 90_001)
    values = [torch.randn(size, generator=generator) for size in sizes]
    return [Entry(w, (0.1 * w.flip(0) + 0.01, 0.2 * w)) for w in values]


SIZES = Problem("sizes", _sizes)
ROWS = (*DEFAULTS, *(row for row in OPTIONS if "combined, nesterov" in row.name))
TYPES = (PLAIN, Dtypes(BF16, BF16, BF16), Dtypes(F16, F32, F32), Dtypes(F32, BF16, F32, copy=BF16))


def _trained(row: Row, dtypes: Dtypes, problem: Problem, seed: int | None = None) -> Run:
    run = Run("cpu", row, dtypes, problem)
    for step in range(2):
        run.take_gradients(step)
        run.step(step, seed)
    return run


def _assert_same(what: str, a: Run, b: Run) -> None:
    for (name, x), (_, y) in zip(a.written(), b.written(), strict=True):
        assert_same_bits(f"{what}: {name}", x, y)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtypes", TYPES, ids=label)
def test_any_number_of_threads(row: Row, dtypes: Dtypes) -> None:
    torch.set_num_threads(1)
    expected = _trained(row, dtypes, SIZES)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        _assert_same(f"{threads} threads", _trained(row, dtypes, SIZES), expected)
    _assert_same("a second run", _trained(row, dtypes, SIZES), expected)


@pytest.mark.parametrize("row", ADAPTED, ids=lambda row: row.name)
def test_sums_for_any_number_of_threads(row: Row) -> None:
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        run = Run("cpu", row, PLAIN, SIZES)
        run.take_gradients(0)
        now = row.now(0)
        norms = run.backend.measure(GradientNorm(), run.bind(), now)
        found.append(torch.cat([norms, run.backend.measure(row.rule, run.bind(), now)], dim=1))
    for sums in found[1:]:
        assert_same_bits("sums", sums, found[0])


def test_number_of_threads_is_torchs(tmp_path: Path) -> None:
    # Without this, the tests above could compare one thread with itself.
    code = """
import os, torch, fastlars
weight = torch.nn.Parameter(torch.randn(400_000))
weight.grad = torch.randn(400_000)
optimizer = fastlars.LARS([weight], lr=1.0)
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
optimizer.step()
print(len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads in /proc, which this system lacks")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["2"], out.stdout + out.stderr


# Run by a fresh process, for the instruction set is chosen once in a process.
_PROBE = """
import torch
from fastlars.backends.cpu import instruction_set
from backends.test_determinism import everything
torch.save((instruction_set(), everything()), {out!r})
"""


def everything() -> dict[str, Tensor]:
    """What the default rows write, for all types and the problems that differ in their loops."""
    torch.set_num_threads(1)
    names = {
        "ordinary",
        "around the cut",
        "tiny",
        "huge weights",
        "NaN gradient",
        "ends of float16",
    }
    written = {}
    for problem in (p for p in PROBLEMS if p.name in names):
        for row in ROWS:
            for dtypes in TYPE_MIXES:
                if problem.half_range or F16 not in (dtypes.weight, dtypes.grad, dtypes.copy):
                    run = _trained(row, dtypes, problem)
                    for name, x in run.written():
                        written[f"{row.name}; {label(dtypes)}; {name}"] = x
    rounded = _trained(DEFAULTS[0], Dtypes(BF16, F32, F32), problem, seed=5)
    return written | {f"stochastic {name}": x for name, x in rounded.written()}


def test_avx2_equals_baseline(tmp_path: Path) -> None:
    results = {}
    for isa in ("", "baseline"):
        out = tmp_path / f"written-{isa}.pt"
        code = _PROBE.format(out=str(out))
        environment = {**os.environ, "FASTLARS_CPU": isa, "PYTHONPATH": python_path()}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        name, written = torch.load(out)
        results[name] = written
    if "avx2" not in results:
        pytest.skip("this machine has no AVX2: there is only the baseline")
    assert set(results) == {"avx2", "baseline"}
    assert results["avx2"].keys() == results["baseline"].keys()
    for name, value in results["avx2"].items():
        assert_same_bits(name, value, results["baseline"][name])


# Stochastic rounding.


def _rounded(value: float, count: int, seed: int, backend: str = "cpu", tensors: int = 1) -> Tensor:
    """bfloat16 neighbours of ``value``, made by a step from 0 that lands on it."""
    weights = [torch.zeros(count, dtype=BF16) for _ in range(tensors)]
    grads = [torch.full((count,), -value) for _ in range(tensors)]
    chosen = instance(backend)
    lists = Tensors(weights, grads, (), None, None, Dtypes(BF16, F32, F32))
    bound = chosen.bind(lists, chosen.layout(weights))
    chosen.step(LarsRule(momentum=0.0, adapt=False), bound, StepScalars(lr=1.0, seed=seed))
    return torch.stack(weights).double()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("above", [1, 100, 0x4000, 0x8000, 0xC123, 0xFFFF])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_is_unbiased(backend: str, above: int, sign: float) -> None:
    # 1 + above / 2^16 of the way to the next bfloat16: up with exactly that probability.
    step, count = 2.0**-7, 200_000
    value = sign * (1.0 + above / 2**16 * step)
    found = _rounded(value, count, seed=above, backend=backend)
    assert set(found.unique().tolist()) <= {sign, sign * (1.0 + step)}
    p = above / 2**16
    up = float((found != sign).double().mean())
    # Five standard deviations: one run in two million would fail by chance, and the seed is fixed.
    assert abs(up - p) <= 5.0 * math.sqrt(p * (1.0 - p) / count) + 1e-9


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_stochastic_rounding_leaves_exact_values_alone(backend: str) -> None:
    for value in (1.0, -0.5, 0.0, 3.0e38, float("inf")):
        exact = torch.tensor(value).to(BF16).item()
        assert _rounded(exact, 1000, seed=1, backend=backend).unique().tolist() == [exact]
    assert bool(_rounded(float("nan"), 100, seed=1, backend=backend).isnan().all())


def test_random_bits_are_independent_of_place() -> None:
    """Neither neighbours nor tensors nor seeds go up together more often than by chance."""
    count = 100_000
    up = (_rounded(1.0 + 2.0**-8, count, seed=3, tensors=2) != 1.0).double() - 0.5
    other = (_rounded(1.0 + 2.0**-8, count, seed=4) != 1.0).double() - 0.5
    bound = 5.0 * 0.25 / math.sqrt(count)
    pairs = {f"elements {lag} apart": (up[0, lag:], up[0, :-lag]) for lag in (1, 2, 4, 7, 8, 16384)}
    pairs |= {"tensors": (up[0], up[1]), "seeds": (up[0], other[0])}
    for what, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) <= bound * math.sqrt(count / len(a)), what


def _rounding_run(steps: int = 3) -> Tensor:
    weights = [torch.nn.Parameter(torch.ones(size, dtype=BF16)) for size in (50_000, 33, 40_000)]
    optimizer = fastlars.LARS(weights, lr=0.01, adapt=False, stochastic_rounding=True)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.03)
        optimizer.step()
    return torch.cat([weight.detach() for weight in weights])


def test_stochastic_rounding_follows_manual_seed() -> None:
    torch.manual_seed(11)
    first = _rounding_run()
    torch.manual_seed(11)
    assert_same_bits("the same seed", _rounding_run(), first)
    torch.manual_seed(12)
    assert not torch.equal(_rounding_run(), first)


def test_stochastic_rounding_for_any_number_of_threads() -> None:
    runs = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(11)
        runs.append(_rounding_run())
    for run in runs[1:]:
        assert_same_bits("threads", run, runs[0])


def test_stochastic_rounding_moves_what_rounding_to_nearest_freezes() -> None:
    """A step of 3e-4 is far below half a step of bfloat16 at 1; on average it is taken anyhow."""
    moved = float(_rounding_run(steps=1).double().mean())
    # A mean of 90,033 values, each at most one step of 2^-8 from its expectation of 1 - 3e-4.
    assert moved == pytest.approx(1.0 - 3e-4, abs=5.0 * 2.0**-8 * 0.5 / math.sqrt(90_033))
    weight = torch.nn.Parameter(torch.ones(1000, dtype=BF16))
    weight.grad = torch.full_like(weight, 0.03)
    fastlars.LARS([weight], lr=0.01, adapt=False).step()
    assert bool((weight == 1.0).all())


def test_dropping_rounding_makes_no_random_numbers() -> None:
    before = torch.get_rng_state()
    weight = torch.nn.Parameter(place(torch.ones(10), BF16))
    weight.grad = torch.ones_like(weight)
    fastlars.LARS([weight], lr=0.01).step()
    assert torch.equal(torch.get_rng_state(), before)
