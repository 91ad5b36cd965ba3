"""Where chunks lie, and how they are read and written: csrc/core's dtype.h, random.h and chunks.h.

Addresses come from a table of 64-bit integers on the device, a row per tensor, so that one launch
serves any number of tensors. bfloat16 is converted through its bits: the interpreter then runs what
a GPU runs, and both round to nearest even.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars.backends.triton.rules import Now, double

# Columns of the table; csrc/bindings.cpp writes it.
COLUMNS = tl.constexpr(6)
WEIGHT, GRAD, STATE, STATE2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
COPY, COUNTER = tl.constexpr(4), tl.constexpr(5)


class Chunk(NamedTuple):
    """What one program works on."""

    tensor: tl.tensor
    begin: tl.tensor
    size: tl.tensor
    whole: tl.tensor  # as many elements as a block, on 16-byte boundaries in all tensors


@triton.jit
def address(table: tl.tensor, tensor: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    return tl.load(table + tensor.to(tl.int64) * COLUMNS + COLUMN)


@triton.jit
def locate(
    table: tl.tensor, numel: tl.tensor, chunks: tl.tensor, now: Now, BLOCK: tl.constexpr
) -> Chunk:
    """This program's chunk; without elements where the step is to be skipped."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    size = tl.minimum(tl.load(numel + tensor) - begin, BLOCK).to(tl.int32)
    size = tl.where(now.live, size, 0)
    # Absent tensors have the address 0. A chunk begins at a multiple of the block.
    row = table + tensor.to(tl.int64) * COLUMNS
    low = tl.load(row + WEIGHT) | tl.load(row + GRAD) | tl.load(row + COPY)
    low = low | tl.load(row + STATE) | tl.load(row + STATE2)
    return Chunk(tensor, begin, size, (size == BLOCK) & (low % 16 == 0))


@triton.jit
def scalars(numbers: tl.tensor, lr: tl.tensor, gradient_scale: tl.tensor) -> Now:
    """From the device where they lie there, which no host has to wait for; else by value."""
    if numbers is None:
        now = Now(double(lr), double(gradient_scale), double(0.0) == 0.0)
    else:
        now = Now(tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2) == 0.0)
    return now


@triton.jit
def places(
    base: tl.tensor, chunk: Chunk, DTYPE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr
) -> tl.tensor:
    """Pointers to a chunk's elements; W promises 16-byte boundaries, for wide accesses."""
    STORAGE: tl.constexpr = tl.uint16 if DTYPE == tl.bfloat16 else DTYPE
    first = base.to(tl.pointer_type(STORAGE)) + chunk.begin
    if W:
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
def read(
    base: tl.tensor, chunk: Chunk, DTYPE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr
) -> tl.tensor:
    """A chunk as float32, zeros behind its end."""
    pointers = places(base, chunk, DTYPE, BLOCK, W)
    if W:
        value = tl.load(pointers)
    else:
        value = tl.load(pointers, mask=tl.arange(0, BLOCK) < chunk.size, other=0)
    return to_float(value, DTYPE)


@triton.jit
def put(
    base: tl.tensor,
    chunk: Chunk,
    value: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    """Store what :func:`from_float` made."""
    pointers = places(base, chunk, DTYPE, BLOCK, W)
    if W:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=tl.arange(0, BLOCK) < chunk.size)


@triton.jit
def write(
    base: tl.tensor,
    chunk: Chunk,
    value: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    put(base, chunk, from_float(value, DTYPE), DTYPE, BLOCK, W)


@triton.jit
def random_bits(seed: tl.tensor, chunk: Chunk, BLOCK: tl.constexpr) -> tl.tensor:
    """16 uniform bits for every element: Philox4x32-10 of (seed, tensor, element).

    Eight elements share one block of four words.
    """
    block = (chunk.begin // 8 + tl.arange(0, BLOCK // 8)).to(tl.uint64)
    seed = seed.to(tl.uint64)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.full((BLOCK // 8,), 0, tl.uint32) + chunk.tensor.to(tl.uint32)
    c3 = tl.full((BLOCK // 8,), 0, tl.uint32)
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
    """bfloat16 bits: up with the probability of the bits that are cut off."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    stochastic = ((bits + random) >> 16).to(tl.uint16)
    return tl.where(finite, stochastic, from_float(value, tl.bfloat16))


@triton.jit
def write_weight(
    table: tl.tensor,
    chunk: Chunk,
    value: tl.tensor,
    seed: tl.tensor,
    WEIGHTS: tl.constexpr,
    COPIES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    """Weights as they are, or beside a low-precision copy, or rounded stochastically."""
    base = address(table, chunk.tensor, WEIGHT)
    if STOCHASTIC:
        rounded = round_stochastically(value, random_bits(seed, chunk, BLOCK))
        put(base, chunk, rounded, WEIGHTS, BLOCK, W)
    else:
        write(base, chunk, value, WEIGHTS, BLOCK, W)
    if COPIES is not None:
        write(address(table, chunk.tensor, COPY), chunk, value, COPIES, BLOCK, W)
