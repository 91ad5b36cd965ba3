"""Sums of squares: float32 within a chunk, float64 across chunks, each in a fixed order.

Every chunk has a slot of its own, and a second launch adds up each tensor's slots: no atomics, so
that the bits are the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlars.backends.triton.memory import (
    COLUMNS,
    COUNTER,
    GRAD,
    address,
    locate,
    read,
    scalars,
)
from fastlars.backends.triton.rules import single


@triton.jit
def sum_of_squares(x: tl.tensor) -> tl.tensor:
    """Squares of floats beyond about 1e+-19 leave float32: such a chunk is summed in float64."""
    total = tl.sum(x * x, 0).to(tl.float64)
    if not ((total > 1e-25) & (total < 1e37)):
        wide = x.to(tl.float64)
        total = tl.sum(wide * wide, 0)
    return total


@triton.jit
def put_sums(slots: tl.tensor, w: tl.tensor, u: tl.tensor) -> None:
    slot = slots + 2 * tl.program_id(0).to(tl.int64)
    tl.store(slot, sum_of_squares(w))
    tl.store(slot + 1, sum_of_squares(u))


@triton.jit
def measure_gradient(
    table: tl.tensor,
    numel: tl.tensor,
    chunks: tl.tensor,
    slots: tl.tensor,
    numbers: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A slot per chunk: 0, and the sum of squares of the scaled gradient."""
    now = scalars(numbers, lr, gradient_scale)
    chunk = locate(table, numel, chunks, now, BLOCK)
    base = address(table, chunk.tensor, GRAD)
    slot = slots + 2 * tl.program_id(0).to(tl.int64)
    if chunk.whole:
        g = single(now.gradient_scale) * read(base, chunk, GRADS, BLOCK, True)
        tl.store(slot + 1, sum_of_squares(g))
    else:
        g = single(now.gradient_scale) * read(base, chunk, GRADS, BLOCK, False)
        tl.store(slot + 1, sum_of_squares(g))
    tl.store(slot, 0.0)


@triton.jit
def total(
    table: tl.tensor,
    first: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    numbers: tl.tensor,
    COUNTS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """The sums of one tensor per program; LAMB's step counter advances with them."""
    tensor = tl.program_id(0).to(tl.int64)
    begin = tl.load(first + tensor)
    end = tl.load(first + tensor + 1)
    weight = tl.zeros((LANES,), tl.float64)
    update = tl.zeros((LANES,), tl.float64)
    for at in range(begin, end, LANES):
        slot = at + tl.arange(0, LANES)
        weight += tl.load(slots + 2 * slot, mask=slot < end, other=0.0)
        update += tl.load(slots + 2 * slot + 1, mask=slot < end, other=0.0)
    tl.store(sums + 2 * tensor, tl.sum(weight, 0))
    tl.store(sums + 2 * tensor + 1, tl.sum(update, 0))
    if COUNTS:
        counter = address(table, tensor, COUNTER).to(tl.pointer_type(tl.float32))
        now = scalars(numbers, 0.0, 1.0)
        tl.store(counter, tl.load(counter) + tl.where(now.live, 1.0, 0.0))


@triton.jit(do_not_specialize=["count"])
def advance(
    table: tl.tensor,
    count: tl.tensor,
    numbers: tl.tensor,
    lr: tl.float64,
    REMEMBERS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Counters of a step that is done: LARS remembers its rate, LAMB counts."""
    now = scalars(numbers, lr, 1.0)
    tensor = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64)
    here = tensor < tl.where(now.live, count, 0)
    addresses = tl.load(table + tensor * COLUMNS + COUNTER, mask=here, other=0)
    counters = addresses.to(tl.pointer_type(tl.float32))
    if REMEMBERS:
        value = tl.zeros((LANES,), tl.float32) + single(now.lr)
    else:
        value = tl.load(counters, mask=here, other=0.0) + 1.0
    tl.store(counters, value, mask=here)
