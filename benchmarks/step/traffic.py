"""Bytes that a step of fastlars moves on a GPU, counted from what its kernels read and write.

Counted by design, from the chunks of csrc/cuda/chunk_table.h; nothing here is measured. What
reaches the memory lies between the two figures: what a second pass finds in the cache costs no
traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CHUNK = 4096
# Bytes of csrc/cuda/chunk_table.h: of a ChunkEntry, of a TensorEntry, and of a chunk's sum.
CHUNK_ENTRY, TENSOR_ENTRY, SUM = 16, 56, {"one-launch": 16, "two-launch": 8}
# Sums of squares that a rule takes of each chunk; of LANS without the gradient's.
SUMS = {"lars": 2, "lamb": 2, "lans": 3}


@dataclass(frozen=True)
class Widths:
    """Bytes an element of every array; ``copy`` is the low-precision parameter of a master."""

    weight: int = 4
    grad: int = 4
    state: int = 4
    copy: int = 0


FLOAT32 = Widths()
MASTERS = Widths(grad=2, copy=2)


@dataclass(frozen=True)
class Traffic:
    """Bytes a parameter.

    Attributes:
        least: every array once: what no order of work can avoid.
        touched: what the kernels ask for, from memory or from cache.
    """

    least: float
    touched: float


def elements(rule: str, path: str, widths: Widths) -> Traffic:
    """Bytes an element, without tables."""
    w, g, s = widths.weight, widths.grad, widths.state
    written = w + widths.copy
    if rule == "lars":
        measure = w + g
        # The one-launch path has kept the gradient on chip; the weight it takes from the cache.
        apply = w + s + (0 if path == "one-launch" else g) + written + s
        return Traffic(w + g + s + written + s, measure + apply)
    measure = w + g + 2 * s + 2 * s
    # The update is kept on chip, or else computed again from the moments; LANS's, which has the
    # gradient in it, from the gradient too.
    again = 2 * s + (g if rule == "lans" else 0)
    apply = w + (0 if path == "one-launch" else again) + written
    norms = g if rule == "lans" else 0
    return Traffic(w + g + 2 * s + written + 2 * s, norms + measure + apply)


def chunks(sizes: list[int]) -> int:
    """Into how many chunks tensors of these sizes are cut."""
    return sum(math.ceil(size / CHUNK) for size in sizes)


def traffic(rule: str, path: str, sizes: list[int], widths: Widths = FLOAT32) -> Traffic:
    """Bytes a parameter, tables included.

    Args:
        rule: ``"lars"``, ``"lamb"`` or ``"lans"``.
        path: ``"one-launch"``, or ``"two-launch"``, whose order of work Triton's kernels share.
        sizes: elements of every tensor; all are adapted.
        widths: of the arrays.
    """
    count, total = chunks(sizes), sum(sizes)
    moved = elements(rule, path, widths)
    # A slot is written by its chunk and read by the last chunk of the tensor to arrive.
    sums = 2 * SUMS[rule] * SUM[path]
    least = count * (CHUNK_ENTRY + sums) + len(sizes) * TENSOR_ENTRY
    touched = count * (2 * CHUNK_ENTRY + sums + 2 * TENSOR_ENTRY)
    if rule == "lans":  # a launch before, with a sum of its own
        norms = CHUNK_ENTRY + 2 * SUM["two-launch"] + TENSOR_ENTRY
        least, touched = least + count * norms, touched + count * norms
    return Traffic(moved.least + least / total, moved.touched + touched / total)
