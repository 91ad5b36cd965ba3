"""Sums of squares: float32 within a chunk, float64 across chunks, each in a fixed order.

Each chunk stores its sums in slots of its own, and a second launch adds up the slots of each
tensor. Atomic additions would save this launch, but their order, and so the bits of the sum, would
differ between runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlars.backends.triton.common import StepScalars, single, step_scalars
from fastlars.backends.triton.memory import COLUMNS, COUNTER, Chunk


@triton.jit
def sum_of_squares(x: tl.tensor) -> tl.tensor:
    """The sum over a chunk. A sum close to the limits of float32 is computed again in float64:
    squares of values beyond about 1e19 or 1e-19 exceed these limits."""
    total = tl.sum(x * x, 0).to(tl.float64)
    if not ((total > 1e-25) & (total < 1e37)):
        wide = x.to(tl.float64)
        total = tl.sum(wide * wide, 0)
    return total


@triton.jit
def store_sums(slots: tl.tensor, values: tl.tuple) -> None:
    """Store the sum of squares of each of ``values`` in the slots of this program's chunk."""
    first = slots + len(values) * tl.program_id(0).to(tl.int64)
    for which in tl.static_range(len(values)):
        tl.store(first + which, sum_of_squares(values[which]))


@triton.jit
def load_sums(sums: tl.tensor, chunk: Chunk, COUNT: tl.constexpr) -> tl.tuple:
    """The sums of the tensor that the chunk belongs to."""
    first = sums + COUNT * chunk.tensor.to(tl.int64)
    values = ()
    for which in tl.static_range(COUNT):
        values += (tl.load(first + which),)  # type: ignore[assignment]
    return values


@triton.jit
def _advance_counters(
    table: tl.tensor,
    tensor: tl.tensor,
    mask: tl.tensor,
    scalars: StepScalars,
    COUNTS_STEPS: tl.constexpr,
) -> None:
    """A counter holds the number of steps (COUNTS_STEPS) or the last learning rate."""
    mask = tl.where(scalars.step_taken, mask, False)
    address = tl.load(table + tensor * COLUMNS + COUNTER, mask=mask, other=0)
    counter = address.to(tl.pointer_type(tl.float32))
    value = single(scalars.lr)
    if COUNTS_STEPS:
        value = tl.load(counter, mask=mask, other=0.0) + 1.0
    tl.store(counter, value, mask=mask)


@triton.jit
def total(
    table: tl.tensor,
    first: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    device_scalars: tl.tensor,
    lr: tl.float64,
    COUNT: tl.constexpr,
    ADVANCES: tl.constexpr,
    COUNTS_STEPS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Each program adds up one of the COUNT sums of one tensor; with ADVANCES, one program per
    tensor also advances its counter."""
    tensor = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    begin = tl.load(first + tensor)
    end = tl.load(first + tensor + 1)
    lanes = tl.zeros((LANES,), tl.float64)
    for at in range(begin, end, LANES):
        slot = at + tl.arange(0, LANES)
        lanes += tl.load(slots + COUNT * slot + which, mask=slot < end, other=0.0)
    tl.store(sums + COUNT * tensor + which, tl.sum(lanes, 0))
    if ADVANCES:
        scalars = step_scalars(device_scalars, lr, 1.0)
        _advance_counters(table, tensor, which == 0, scalars, COUNTS_STEPS)


@triton.jit(do_not_specialize=["count"])
def advance(
    table: tl.tensor,
    count: tl.tensor,
    device_scalars: tl.tensor,
    lr: tl.float64,
    COUNTS_STEPS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Each program advances the counters of LANES tensors. Launched after ``apply``."""
    tensor = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64)
    scalars = step_scalars(device_scalars, lr, 1.0)
    _advance_counters(table, tensor, tensor < count, scalars, COUNTS_STEPS)
