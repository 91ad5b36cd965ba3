"""Triton against the compiled CPU back end, bit for bit where both do the same arithmetic.

On a GPU, or, in the process that test_triton.py starts, in Triton's interpreter.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from backend_cases import DEFAULTS, F64, PLAIN
from device_bits import Bits
from device_cases import DEVICES, SIZES, Twin, marks
from device_streams import Streams
from fastlars.rules import LambRule

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastlars.backends.triton import sums  # noqa: E402
from fastlars.backends.triton.backend import LANES  # noqa: E402
from fastlars.backends.triton.common import decoded, rule_argument  # noqa: E402
from fastlars.backends.triton.memory import BLOCK, locate  # noqa: E402

DEVICE = DEVICES["triton"]
pytestmark = marks("triton")


class TestBits(Bits):
    backend = "triton"


class TestStreams(Streams):
    backend = "triton"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_of_many_chunks(count: int) -> None:
    counts = (1, 3000, 0, 1024, 1025)
    first = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    slots = torch.rand(sum(counts), count, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = torch.empty(len(counts), count, dtype=F64, device=DEVICE)
    kernel: Any = sums.total
    kernel[(len(counts),)](first, slots.to(DEVICE), found, COUNT=count, LANES=LANES)
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
def _located(table, sizes, chunks, out, BACKWARDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    chunk = locate(table, sizes, chunks, None, BACKWARDS)
    first = out + 3 * tl.program_id(0)
    tl.store(first, chunk.tensor.to(tl.int64))
    tl.store(first + 1, chunk.begin)
    tl.store(first + 2, chunk.size.to(tl.int64))


@pytest.mark.parametrize("backwards", [False, True])
def test_every_chunk_has_a_program_and_backwards_the_last_comes_first(backwards: bool) -> None:
    block = BLOCK.value
    twin = Twin("triton", DEFAULTS[0], PLAIN, SIZES)
    twin.take_gradients(0)
    given = twin.bind().workspace
    out = torch.full((len(given.chunks), 3), -1, dtype=torch.int64, device=DEVICE)
    _located[(len(out),)](given.table, given.numel, given.chunks, out, BACKWARDS=backwards)
    expected = [
        [i, begin, min(block, weight.numel() - begin)]
        for i, weight in enumerate(twin.tensors.weights)
        for begin in range(0, max(weight.numel(), 1), block)
    ]
    assert out.tolist() == (expected[::-1] if backwards else expected)
