"""Triton against the compiled CPU back end, bit for bit where both do the same arithmetic.

On a GPU, or, in the process that test_triton.py starts, in Triton's interpreter.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from backend_cases import BF16, DEFAULTS, F16, F32, F64
from device_bits import Bits
from device_cases import DEVICES, Twin, marks
from device_streams import Streams
from fastlars.rules import LambRule
from problems import Entry, Problem

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastlars.backends.base import Dtypes  # noqa: E402
from fastlars.backends.triton import sums  # noqa: E402
from fastlars.backends.triton.backend import LANES  # noqa: E402
from fastlars.backends.triton.common import decoded, rule_argument, step_scalars  # noqa: E402
from fastlars.backends.triton.memory import BLOCK, locate  # noqa: E402

DEVICE = DEVICES["triton"]
pytestmark = marks("triton")


class TestBits(Bits):
    backend = "triton"


class TestStreams(Streams):
    backend = "triton"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_of_many_chunks(count: int) -> None:
    counts = (1, 300, 0, 128, 129)
    first = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    slots = torch.rand(sum(counts), count, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = torch.empty(len(counts), count, dtype=F64, device=DEVICE)
    options = {"COUNT": count, "ADVANCES": False, "COUNTS_STEPS": False, "LANES": LANES}
    kernel: Any = sums.total
    kernel[(len(counts), count)](None, first, slots.to(DEVICE), found, None, 0.0, **options)
    expected = torch.stack([part.sum(0) for part in slots.split(counts)])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-14, atol=0.0)


@triton.jit
def _numbers(rule, out):  # type: ignore[no-untyped-def]
    tl.store(out, decoded(rule.lower))
    tl.store(out + 1, decoded(rule.upper))
    tl.store(out + 2, decoded(rule.ratio_eps))


@pytest.mark.parametrize("value", [0.0, 5e-324, 0.1, 1.0, 1e308])
def test_numbers_arrive_with_all_their_bits(value: float) -> None:
    out = torch.zeros(3, dtype=F64, device=DEVICE)
    _numbers[(1,)](rule_argument(LambRule(lower=value, ratio_eps=value)), out)
    assert out.tolist() == [value, math.inf, value]


@triton.jit
def _whole(table, numel, chunks, out):  # type: ignore[no-untyped-def]
    chunk = locate(table, numel, chunks, step_scalars(None, 1.0, 1.0))
    tl.store(out + tl.program_id(0), chunk.whole.to(tl.int32))


@pytest.mark.parametrize("name", ["weights", "grads", 0, 1, "copies"])
def test_wide_accesses_need_16_byte_boundaries(name: str | int) -> None:
    def entries(layout: str) -> Problem:
        value = torch.ones(2 * BLOCK.value + 1)
        return Problem(layout, lambda _: [Entry(value, (value,), layout)])

    dtypes = Dtypes(F32, BF16, F32, copy=F16)
    found = []
    for layout in ("contiguous", "misaligned"):
        twin = Twin("triton", DEFAULTS[2], dtypes, entries("contiguous"))
        twin.take_gradients(0)
        other = Twin("triton", DEFAULTS[2], dtypes, entries(layout))
        other.take_gradients(0)
        if isinstance(name, int):
            twin.tensors.states[name][:] = other.tensors.states[name]
        else:
            setattr(twin.tensors, name, getattr(other.tensors, name))
        bound = twin.bind()
        out = torch.zeros(bound.chunks.chunk_count, dtype=torch.int32, device=DEVICE)
        chunks = bound.chunks
        _whole[(chunks.chunk_count,)](bound.table, chunks.numel, chunks.entries, out)
        found.append(out.tolist())
    assert found == [[1, 1, 0], [0, 0, 0]]
