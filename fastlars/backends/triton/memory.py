"""Where chunks lie, and how they are read and written: csrc/core's dtype.h, random.h and chunks.h.

Addresses come from a table of 64-bit integers on the device, a row per tensor, so that one launch
serves any number of tensors. bfloat16 is converted through its bits: the interpreter then runs what
a GPU runs, and both round to nearest even.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars import _C
from fastlars.backends.triton.common import StepScalars

# Elements of a chunk, which one program works on. It fixes the order of sums, and so their bits.
BLOCK = tl.constexpr(4096)

# Columns of the address table, which csrc/core/tensors.h writes. One for each state follows.
COLUMNS = tl.constexpr(_C.TABLE_COLUMNS)
WEIGHT, GRAD, COPY, COUNTER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
STATE = tl.constexpr(4)


class Types(NamedTuple):
    """How tensors are stored; of each combination kernels are compiled anew."""

    weight: tl.constexpr
    grad: tl.constexpr
    state: tl.constexpr | None  # None without states
    copy: tl.constexpr | None
    stochastic_rounding: tl.constexpr  # of the weights


class Chunk(NamedTuple):
    """The elements that one program works on."""

    tensor: tl.tensor
    begin: tl.tensor
    size: tl.tensor
    whole: tl.tensor  # as many elements as a block, on 16-byte boundaries in all tensors
    row: tl.tensor  # of its tensor in the address table


@triton.jit
def locate(table: tl.tensor, numel: tl.tensor, chunks: tl.tensor, scalars: StepScalars) -> Chunk:
    """This program's chunk; without elements where the step is to be skipped."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    size = tl.minimum(tl.load(numel + tensor) - begin, BLOCK).to(tl.int32)
    size = tl.where(scalars.step_taken, size, 0)
    row = table + tensor.to(tl.int64) * COLUMNS
    # Absent tensors have the address 0. A chunk begins at a multiple of the block.
    every = tl.load(row + WEIGHT) | tl.load(row + GRAD) | tl.load(row + COPY)
    for column in tl.static_range(STATE, COLUMNS):
        every = every | tl.load(row + column)
    return Chunk(tensor, begin, size, (size == BLOCK) & (every % 16 == 0), row)


@triton.jit
def address(chunk: Chunk, COLUMN: tl.constexpr) -> tl.tensor:
    return tl.load(chunk.row + COLUMN)


@triton.jit
def load_counter(chunk: Chunk) -> tl.tensor:
    """The tensor's counter; 0 without one."""
    base = address(chunk, COUNTER)
    return tl.load(base.to(tl.pointer_type(tl.float32)), mask=base != 0, other=0.0)


@triton.jit
def store_ratio(ratios: tl.tensor, chunk: Chunk, ratio: tl.tensor) -> None:
    """The first chunk of each tensor reports its trust ratio."""
    if chunk.begin == 0:
        tl.store(ratios + chunk.tensor, ratio.to(tl.float32))


@triton.jit
def pointers(
    base: tl.tensor, chunk: Chunk, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Of a chunk's elements. ALIGNED: the chunk is whole, which allows wide accesses."""
    STORAGE: tl.constexpr = tl.uint16 if DTYPE == tl.bfloat16 else DTYPE
    first = base.to(tl.pointer_type(STORAGE)) + chunk.begin
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, BLOCK)


@triton.jit
def to_float(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 of what was loaded."""
    if DTYPE == tl.bfloat16:
        value = (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = value.to(tl.float32)
    return value


@triton.jit
def from_float(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """What is stored for a float32: to nearest, ties to even."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        value = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet_nan, rounded).to(tl.uint16)
    else:
        value = value.to(DTYPE)
    return value


@triton.jit
def stored(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """What a later load of the stored value gives."""
    return to_float(from_float(value, DTYPE), DTYPE)


@triton.jit
def read(base: tl.tensor, chunk: Chunk, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """A chunk as float32, with zeros after its end."""
    at = pointers(base, chunk, DTYPE, ALIGNED)
    inside = tl.arange(0, BLOCK) < chunk.size
    value = tl.load(at) if ALIGNED else tl.load(at, mask=inside, other=0)
    return to_float(value, DTYPE)


@triton.jit
def store_raw(
    base: tl.tensor, chunk: Chunk, value: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> None:
    """Store what :func:`from_float` returned."""
    at = pointers(base, chunk, DTYPE, ALIGNED)
    if ALIGNED:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=tl.arange(0, BLOCK) < chunk.size)


@triton.jit
def write(
    base: tl.tensor, chunk: Chunk, value: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> None:
    store_raw(base, chunk, from_float(value, DTYPE), DTYPE, ALIGNED)


@triton.jit
def random_bits(seed: tl.tensor, chunk: Chunk) -> tl.tensor:
    """16 uniform bits for every element: Philox4x32-10 of (seed, tensor, element).

    Eight elements share one block of four words.
    """
    SHARES: tl.constexpr = BLOCK // 8
    block = (chunk.begin // 8 + tl.arange(0, SHARES)).to(tl.uint64)
    seed = seed.to(tl.uint64)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.full((SHARES,), 0, tl.uint32) + chunk.tensor.to(tl.uint32)
    c3 = tl.full((SHARES,), 0, tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))


@triton.jit
def round_stochastically(value: tl.tensor, random: tl.tensor) -> tl.tensor:
    """bfloat16 bits, rounded up with a probability in proportion to the bits that are cut off."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    stochastic = ((bits + random) >> 16).to(tl.uint16)
    return tl.where(finite, stochastic, from_float(value, tl.bfloat16))


@triton.jit
def write_weight(
    chunk: Chunk, value: tl.tensor, seed: tl.tensor, types: Types, ALIGNED: tl.constexpr
) -> None:
    """The weights, rounded to nearest or stochastically, and their low-precision copy if any."""
    base = address(chunk, WEIGHT)
    if types.stochastic_rounding:
        rounded = round_stochastically(value, random_bits(seed, chunk))
        store_raw(base, chunk, rounded, types.weight, ALIGNED)
    else:
        write(base, chunk, value, types.weight, ALIGNED)
    if types.copy is not None:
        write(address(chunk, COPY), chunk, value, types.copy, ALIGNED)
