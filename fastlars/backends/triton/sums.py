"""Sums of squares: float32 within a chunk, float64 across chunks, each in a fixed order.

Each chunk stores its sums in slots of its own, and the launch after it adds up the slots of each
tensor. Atomic additions would save this launch, but their order, and so the bits of the sum, would
differ between runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def sums_of(
    tensor: tl.tensor,
    first_chunk: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    COUNT: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tuple:
    """The COUNT sums of one tensor: loaded from ``sums``, or, if ``sums`` is None, those of its
    chunks, added up."""
    values = ()
    for which in tl.static_range(COUNT):
        if sums is None:
            at = tl.load(first_chunk + tensor)
            end = tl.load(first_chunk + tensor + 1)
            lanes = tl.zeros((LANES,), tl.float64)
            while at < end:  # the interpreter of Triton 3.6 takes no tensors in `range`
                slot = at + tl.arange(0, LANES)
                lanes += tl.load(slots + COUNT * slot + which, mask=slot < end, other=0.0)
                at += LANES
            values += (tl.sum(lanes, 0),)  # type: ignore[assignment]
        else:
            values += (tl.load(sums + COUNT * tensor + which),)  # type: ignore[assignment]
    return values


@triton.jit
def total(
    first_chunk: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    COUNT: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Store the sums of one tensor, for a caller that adds up those of several processes."""
    tensor = tl.program_id(0).to(tl.int64)
    values = sums_of(tensor, first_chunk, slots, None, COUNT, LANES)
    for which in tl.static_range(COUNT):
        tl.store(sums + COUNT * tensor + which, values[which])
