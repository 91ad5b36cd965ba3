"""What ``prepare`` reads and writes for each tensor: its counter, its coefficients, its report."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlars.backends.triton.common import StepScalars, single
from fastlars.backends.triton.memory import COLUMNS, COUNTER, Chunk

# float32 coefficients of a tensor in the table of coefficients: as many as any rule has, or more.
COEFFICIENTS = tl.constexpr(16)


@triton.jit
def load_counter(table: tl.tensor, tensor: tl.tensor) -> tl.tensor:
    """The tensor's counter; 0 if the rule has none."""
    base = tl.load(table + tensor * COLUMNS + COUNTER)
    return tl.load(base.to(tl.pointer_type(tl.float32)), mask=base != 0, other=0.0)


@triton.jit
def store_counter(
    table: tl.tensor, tensor: tl.tensor, scalars: StepScalars, value: tl.tensor
) -> None:
    """Advance the counter: the number of steps, or the last learning rate."""
    base = tl.load(table + tensor * COLUMNS + COUNTER)
    mask = scalars.step_taken & (base != 0)
    tl.store(base.to(tl.pointer_type(tl.float32)), single(value), mask=mask)


@triton.jit
def store_report(report: tl.tensor, tensor: tl.tensor, ratio: tl.tensor, squares: tl.tuple) -> None:
    """Store what a step returns of the tensor: its trust ratio, and the norms that the sums
    ``squares`` are squares of."""
    row = report + (1 + len(squares)) * tensor
    tl.store(row, ratio.to(tl.float32))
    for which in tl.static_range(len(squares)):
        tl.store(row + 1 + which, tl.sqrt(squares[which]).to(tl.float32))


@triton.jit
def store_coefficients(
    tensor: tl.tensor,
    numel: tl.tensor,
    sizes: tl.tensor,
    coefficient_table: tl.tensor,
    scalars: StepScalars,
    values: tl.tuple,
) -> None:
    """Store what ``load_coefficients`` returns for the tensor's chunks; and how many of the
    tensor's elements are stepped: none if the step is skipped."""
    tl.static_assert(len(values) <= COEFFICIENTS)
    tl.store(sizes + tensor, tl.where(scalars.step_taken, tl.load(numel + tensor), 0))
    for which in tl.static_range(len(values)):
        tl.store(coefficient_table + COEFFICIENTS * tensor + which, values[which])


@triton.jit
def load_coefficients(coefficient_table: tl.tensor, chunk: Chunk, COUNT: tl.constexpr) -> tl.tuple:
    """The coefficients of the tensor that the chunk belongs to."""
    first = coefficient_table + COEFFICIENTS * chunk.tensor.to(tl.int64)
    values = ()
    for which in tl.static_range(COUNT):
        values += (tl.load(first + which),)  # type: ignore[assignment]
    return values
