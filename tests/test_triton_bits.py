"""Triton against the compiled CPU back end, bit for bit where both do the same arithmetic.

On a GPU, or, in the process that test_triton.py starts, in Triton's interpreter.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlars
from backend_cases import (
    BF16,
    DEFAULTS,
    F16,
    F32,
    F64,
    OPTIONS,
    PLAIN,
    ROWS,
    Kinds,
    Row,
    Run,
    label,
)
from fastlars.backends.base import Scalars, Tensors
from fastlars.rules import GradientNorm
from problems import ORDINARY, PROBLEMS, Entry, Problem
from tolerances import assert_close, assert_same_bits

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastlars.backends.triton import sums  # noqa: E402
from fastlars.backends.triton.backend import LANES  # noqa: E402
from fastlars.backends.triton.memory import locate, scalars  # noqa: E402
from fastlars.backends.triton.table import BLOCK  # noqa: E402

INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
# The interpreter is slow, and test_backends.py runs every row in it.
SOME_ROWS = (*DEFAULTS, *OPTIONS[::5]) if INTERPRETED else ROWS
KINDS = (Kinds(BF16, F16, BF16), Kinds(F16, BF16, F32), Kinds(F32, BF16, F32, copy=F16))
LAYOUTS = next(problem for problem in PROBLEMS if problem.name == "layouts")


def _sizes(generator: torch.Generator) -> list[Entry]:
    """Ends of Triton's chunks and of Philox's blocks."""
    values = [torch.randn(size, generator=generator) for size in (4095, 4096, 8199, 0, 7)]
    return [Entry(w, (0.1 * w.flip(0) + 0.01, 0.2 * w)) for w in values]


SIZES = Problem("sizes", _sizes)


class Twin(Run):
    """A run of the Triton back end, its tensors on the device."""

    def __init__(self, row: Row, kinds: Kinds, problem: Problem) -> None:
        super().__init__("triton", row, kinds, problem)
        t = self.tensors
        self.tensors = Tensors(
            _there(t.weights),
            [],
            tuple(_there(state) for state in t.states),
            None if t.counters is None else _there(t.counters),
            None if t.copies is None else _there(t.copies),
            kinds,
        )

    def take_gradients(self, step: int) -> None:
        super().take_gradients(step)
        self.tensors.grads = _there(self.tensors.grads)


def _there(tensors: list[Tensor]) -> list[Tensor]:
    # A view that begins off a 16-byte boundary stays one.
    bases = [(tensor if tensor._base is None else tensor._base).to(DEVICE) for tensor in tensors]
    places = [(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors]
    return [base.as_strided(*place) for base, place in zip(bases, places, strict=True)]


def _assert_same(what: str, a: Run, b: Run) -> None:
    for (name, x), (_, y) in zip(a.written(), b.written(), strict=True):
        assert_same_bits(f"{what}: {name}", x.cpu(), y.cpu())


@pytest.mark.parametrize(
    ("row", "kinds", "problem"),
    [
        *((row, PLAIN, ORDINARY) for row in SOME_ROWS),
        *((row, kinds, ORDINARY) for row in DEFAULTS for kinds in KINDS),
        *((row, PLAIN, problem) for row in DEFAULTS[::2] for problem in (LAYOUTS, SIZES)),
    ],
    ids=lambda value: label(value) if isinstance(value, Kinds) else getattr(value, "name", None),
)
def test_apply_equals_cpu_for_equal_sums(row: Row, kinds: Kinds, problem: Problem) -> None:
    run, twin = Run("cpu", row, kinds, problem), Twin(row, kinds, problem)
    for step in range(2):
        run.take_gradients(step)
        twin.take_gradients(step)
        now, expected, found = row.now(step), None, None
        bound, other = run.bind(), twin.bind()
        if row.rule.adapt:
            expected = run.backend.measure(row.rule, bound, now)
            found = twin.backend.measure(row.rule, other, now)
            assert_close("sums", "sum", found.cpu(), expected)
            found.copy_(expected)
        ratios = run.backend.apply(row.rule, bound, now, expected)
        assert_same_bits("ratios", twin.backend.apply(row.rule, other, now, found).cpu(), ratios)
        _assert_same(f"step {step}", twin, run)


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row.name)
def test_stochastic_rounding_draws_the_same_bits_as_cpu(row: Row) -> None:
    kinds = Kinds(BF16, F32, F32)
    run, twin = Run("cpu", row, kinds, SIZES), Twin(row, kinds, SIZES)
    for step, seed in enumerate((3, 2**61 + 12345)):
        for each in (run, twin):
            each.take_gradients(step)
        now = row.now(step, seed)
        found = run.backend.measure(row.rule, run.bind(), now) if row.rule.adapt else None
        bound = twin.bind()
        if found is not None:
            twin.backend.measure(row.rule, bound, now)
        run.backend.apply(row.rule, run.bind(), now, found)
        twin.backend.apply(row.rule, bound, now, None if found is None else found.to(DEVICE))
        _assert_same(f"step {step}", twin, run)


@pytest.mark.parametrize("row", DEFAULTS[::2], ids=lambda row: row.name)
def test_sums_are_the_same_from_run_to_run(row: Row) -> None:
    found = []
    for _ in range(2):
        twin = Twin(row, PLAIN, SIZES)
        twin.take_gradients(0)
        norms = twin.backend.measure(GradientNorm(), twin.bind(), row.now(0))
        found.append(torch.cat([norms, twin.backend.measure(row.rule, twin.bind(), row.now(0))]))
    assert_same_bits("sums", found[1].cpu(), found[0].cpu())


@pytest.mark.parametrize(
    "row", [*DEFAULTS, *(r for r in OPTIONS if "correction" in r.name)][:7], ids=lambda r: r.name
)
def test_numbers_on_the_device_equal_numbers_by_value(row: Row) -> None:
    by_value, on_device = (Twin(row, PLAIN, ORDINARY) for _ in range(2))
    for step in range(2):
        now = row.now(step)
        there = torch.tensor([now.lr, now.gradient_scale, 0.0], dtype=torch.float64, device=DEVICE)
        for run, given in ((by_value, now), (on_device, Scalars(9.0, 9.0, None, there))):
            run.take_gradients(step)
            run.backend.step(row.rule, run.bind(), given)
        _assert_same("device", on_device, by_value)
    before = [x.clone() for _, x in on_device.written()]
    there[2] = 1.0
    on_device.backend.step(row.rule, on_device.bind(), Scalars(9.0, 9.0, None, there))
    for (name, x), was in zip(on_device.written(), before, strict=True):
        assert_same_bits(f"skipped: {name}", x.cpu(), was.cpu())


def test_sums_of_many_chunks() -> None:
    counts = (1, 300, 0, 128, 129)
    first = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    slots = torch.rand(sum(counts), 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = torch.empty(len(counts), 2, dtype=F64, device=DEVICE)
    kernel: Any = sums.total
    kernel[(len(counts),)](None, first, slots.to(DEVICE), found, None, COUNTS=False, LANES=LANES)
    expected = torch.stack([part.sum(0) for part in slots.split(counts)])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-14, atol=0.0)


@triton.jit
def _whole(table, numel, chunks, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    chunk = locate(table, numel, chunks, scalars(None, 1.0, 1.0), BLOCK)
    tl.store(out + tl.program_id(0), chunk.whole.to(tl.int32))


@pytest.mark.parametrize("name", ["weights", "grads", 0, 1, "copies"])
def test_wide_accesses_need_16_byte_boundaries(name: str | int) -> None:
    def entries(layout: str) -> Problem:
        value = torch.ones(2 * BLOCK + 1)
        return Problem(layout, lambda _: [Entry(value, (value,), layout)])

    kinds = Kinds(F32, BF16, F32, copy=F16)
    found = []
    for layout in ("contiguous", "misaligned"):
        twin = Twin(DEFAULTS[2], kinds, entries("contiguous"))
        twin.take_gradients(0)
        other = Twin(DEFAULTS[2], kinds, entries(layout))
        other.take_gradients(0)
        if isinstance(name, int):
            twin.tensors.states[name][:] = other.tensors.states[name]
        else:
            setattr(twin.tensors, name, getattr(other.tensors, name))
        bound = twin.bind()
        out = torch.zeros(bound.chunks.count, dtype=torch.int32, device=DEVICE)
        chunks = bound.chunks
        _whole[(chunks.count,)](bound.table, chunks.numel, chunks.chunk, out, BLOCK=BLOCK)
        found.append(out.tolist())
    assert found == [[1, 1, 0], [0, 0, 0]]


# The optimizers.


def _optimizer(name: str, device: str, **options: object) -> tuple[list[Tensor], fastlars.LARS]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).to(device)) for n in (50, 7)]
    optimizer = getattr(fastlars, name)(params, **{"lr": 0.1, "weight_decay": 0.1, **options})
    return list(params), optimizer


def _gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_optimizer_reads_scaler_clip_and_rate_on_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "cpu")
    expected, other = _optimizer(name, "cpu", max_grad_norm=0.5)
    monkeypatch.setenv("FASTLARS_BACKEND", "triton")
    rate = torch.tensor(0.1, device=DEVICE)
    params, optimizer = _optimizer(name, DEVICE, max_grad_norm=0.5, lr=rate, capturable=True)
    for step, found_inf in enumerate((0.0, 1.0, 0.0)):
        rate.fill_(0.1 * (step + 1))
        other.param_groups[0]["lr"] = 0.1 * (step + 1)
        for tensors, each, device in ((expected, other, "cpu"), (params, optimizer, DEVICE)):
            monkeypatch.setenv("FASTLARS_BACKEND", "cpu" if each is other else "triton")
            _gradients(tensors, step)
            each.grad_scale = torch.full((1,), 4.0, device=device)  # type: ignore[attr-defined]
            each.found_inf = torch.full((1,), found_inf, device=device)  # type: ignore[attr-defined]
            each.step()
    for p, q in zip(params, expected, strict=True):
        assert_close(name, "weight", p.detach().cpu(), q.detach().double(), 3.0)
        for key, value in other.state[q].items():
            found = optimizer.state[p][key]
            assert found.device.type == DEVICE
            assert_close(key, "state", found.cpu(), value.double(), 3.0)


def test_capturable_refuses_random_numbers() -> None:
    with pytest.raises(ValueError, match="stochastic_rounding does not go with capturable"):
        _optimizer("LARS", DEVICE, capturable=True, stochastic_rounding=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_step_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "triton")
    params, optimizer = _optimizer(name, "cuda", max_grad_norm=0.5)
    for step in range(3):
        _gradients(params, step)
        optimizer.grad_scale = torch.ones(1, device="cuda")  # type: ignore[attr-defined]
        optimizer.found_inf = torch.zeros(1, device="cuda")  # type: ignore[attr-defined]
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_replays_equal_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "triton")
    rates = [torch.tensor(0.1, device="cuda") for _ in range(2)]
    runs = [_optimizer(name, "cuda", lr=rate, capturable=True) for rate in rates]
    for step in range(2):
        for params, optimizer in runs:
            _gradients(params, step)
            optimizer.step()
    (params, optimizer), (recorded, other) = runs
    graph = torch.cuda.CUDAGraph()
    _gradients(recorded, 2)
    with torch.cuda.graph(graph):
        other.step()
    for step in range(2, 5):
        rates[0].fill_(0.1 / step)
        rates[1].fill_(0.1 / step)
        _gradients(params, step)
        optimizer.step()
        for p, q in zip(recorded, params, strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad.copy_(q.grad)
        graph.replay()
        for p, q in zip(recorded, params, strict=True):
            assert_same_bits(f"replay {step}", p.detach().cpu(), q.detach().cpu())
