"""Reads and writes chunks of tensors: csrc/core's dtype.h, random.h and chunks.h for Triton.

Addresses come from a table of 64-bit integers on the device, one row per tensor, so that one launch
serves any number of tensors. bfloat16 is converted by integer operations on its bits: Triton's
interpreter truncates it, and would compute other results than a GPU, which rounds to nearest even.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars import _C
from fastlars.backends.triton.common import StepScalars

# Elements of a chunk; each program works on one chunk. Another size would add up sums in another
# order, and so change their bits.
BLOCK = tl.constexpr(4096)

# Columns of the address table, as csrc/core/tensors.h writes it. From STATE on, one for each state.
COLUMNS = tl.constexpr(_C.TABLE_COLUMNS)
WEIGHT, GRAD, COPY, COUNTER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
STATE = tl.constexpr(4)


class Types(NamedTuple):
    """How tensors are stored. Kernels are compiled anew for each combination."""

    weight: tl.constexpr
    grad: tl.constexpr
    state: tl.constexpr | None  # None without states
    copy: tl.constexpr | None
    stochastic_rounding: tl.constexpr  # of the weights


class Chunk(NamedTuple):
    """The elements that one program works on."""

    tensor: tl.tensor  # index in the list
    stream: tl.tensor  # the tensor's number in the draw of random bits
    begin: tl.tensor  # its first element
    size: tl.tensor
    whole: tl.tensor  # true: BLOCK elements
    # Addresses of the tensor's arrays; 0 for one that it has not.
    weight: tl.tensor
    grad: tl.tensor
    copy: tl.tensor
    states: tl.tuple


@triton.jit
def locate(
    table: tl.tensor,
    sizes: tl.tensor,
    chunks: tl.tensor,
    scalars: StepScalars | None,
    BACKWARDS: tl.constexpr,
    streams: tl.tensor | None = None,
) -> Chunk:
    """This program's chunk; empty if the step is skipped.

    BACKWARDS: the last chunk is the first program's. ``apply`` then begins with what ``measure``
    has read last, which the GPU's cache still holds.
    """
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    tensor = tl.load(chunks + 2 * program)
    stream = tensor
    if streams is not None:
        stream = tl.load(streams + tensor)
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    size = tl.minimum(tl.load(sizes + tensor) - begin, BLOCK).to(tl.int32)
    if scalars is not None:
        size = tl.where(scalars.step_taken, size, 0)
    row = table + tensor.to(tl.int64) * COLUMNS
    weight, grad, copy = tl.load(row + WEIGHT), tl.load(row + GRAD), tl.load(row + COPY)
    states = ()
    for column in tl.static_range(STATE, COLUMNS):
        states += (tl.load(row + column),)  # type: ignore[assignment]
    return Chunk(tensor, stream, begin, size, size == BLOCK, weight, grad, copy, states)


@triton.jit
def pointers(base: tl.tensor, chunk: Chunk, DTYPE: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Pointers to a chunk's elements. WIDE: the array is on a 16-byte boundary."""
    STORAGE: tl.constexpr = tl.uint16 if DTYPE == tl.bfloat16 else DTYPE
    first = base.to(tl.pointer_type(STORAGE)) + chunk.begin
    if WIDE:
        # A chunk begins at a multiple of BLOCK elements, so it is on such a boundary too.
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, BLOCK)


@triton.jit
def to_float(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A loaded value as float32."""
    if DTYPE == tl.bfloat16:
        value = (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = value.to(tl.float32)
    return value


@triton.jit
def from_float(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A float32 in the stored type, rounded to nearest, ties to even."""
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
    """The value as a later load would return it, after it was stored."""
    return to_float(from_float(value, DTYPE), DTYPE)


@triton.jit
def read(
    base: tl.tensor,
    chunk: Chunk,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
) -> tl.tensor:
    """A chunk as float32; zeros after its end.

    WHOLE: the chunk has BLOCK elements. An array that begins off a 16-byte boundary, as DDP's views
    of gradients do, is then read element by element, and the others by vectors.
    LAST: the last use in this step, which need not stay in the cache.
    """
    POLICY: tl.constexpr = "evict_first" if LAST else ""
    narrow = pointers(base, chunk, DTYPE, False)
    if WHOLE:
        if base % 16 == 0:
            value = tl.load(pointers(base, chunk, DTYPE, True), eviction_policy=POLICY)
        else:
            value = tl.load(narrow, eviction_policy=POLICY)
    else:
        inside = tl.arange(0, BLOCK) < chunk.size
        value = tl.load(narrow, mask=inside, other=0, eviction_policy=POLICY)
    return to_float(value, DTYPE)


@triton.jit
def store_raw(
    base: tl.tensor,
    chunk: Chunk,
    value: tl.tensor,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    """Store a value that is already in the stored type; WHOLE and LAST as for ``read``."""
    POLICY: tl.constexpr = "evict_first" if LAST else ""
    narrow = pointers(base, chunk, DTYPE, False)
    if WHOLE:
        if base % 16 == 0:
            tl.store(pointers(base, chunk, DTYPE, True), value, eviction_policy=POLICY)
        else:
            tl.store(narrow, value, eviction_policy=POLICY)
    else:
        tl.store(narrow, value, mask=tl.arange(0, BLOCK) < chunk.size, eviction_policy=POLICY)


@triton.jit
def write(
    base: tl.tensor,
    chunk: Chunk,
    value: tl.tensor,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    store_raw(base, chunk, from_float(value, DTYPE), DTYPE, WHOLE, LAST)


@triton.jit
def random_bits(seed: tl.tensor, chunk: Chunk) -> tl.tensor:
    """16 uniform bits for each element: Philox4x32-10 of (seed, stream, element).

    Eight elements share one Philox block of four 32-bit words.
    """
    PHILOX_BLOCKS: tl.constexpr = BLOCK // 8
    block = (chunk.begin // 8 + tl.arange(0, PHILOX_BLOCKS)).to(tl.uint64)
    seed = seed.to(tl.uint64)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.full((PHILOX_BLOCKS,), 0, tl.uint32) + chunk.stream.to(tl.uint32)
    c3 = tl.full((PHILOX_BLOCKS,), 0, tl.uint32)
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
    """bfloat16 bits, rounded up with a probability proportional to the truncated bits."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    stochastic = ((bits + random) >> 16).to(tl.uint16)
    return tl.where(finite, stochastic, from_float(value, tl.bfloat16))


@triton.jit
def write_weight(
    chunk: Chunk, value: tl.tensor, seed: tl.tensor, types: Types, WHOLE: tl.constexpr
) -> None:
    """Store the weights, rounded to nearest or stochastically, and their low-precision copies."""
    if types.stochastic_rounding:
        rounded = round_stochastically(value, random_bits(seed, chunk))
        store_raw(chunk.weight, chunk, rounded, types.weight, WHOLE, False)
    else:
        write(chunk.weight, chunk, value, types.weight, WHOLE, False)
    if types.copy is not None:
        write(chunk.copy, chunk, value, types.copy, WHOLE, False)
