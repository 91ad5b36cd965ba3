"""The norm of the gradients, for the global norm."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlars import rules
from fastlars.backends.triton.common import single, step_scalars
from fastlars.backends.triton.memory import Types, locate, read
from fastlars.backends.triton.sums import store_sums


@triton.jit
def measure(
    table: tl.tensor,
    numel: tl.tensor,
    chunks: tl.tensor,
    slots: tl.tensor,
    device_scalars: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    rule: rules.GradientNorm,
    types: Types,
) -> None:
    """Store the sum of squares of the scaled gradient."""
    scalars = step_scalars(device_scalars, lr, gradient_scale)
    chunk = locate(table, numel, chunks, scalars, False)
    scale = single(scalars.gradient_scale)
    base = chunk.grad
    if chunk.whole:
        store_sums(slots, (scale * read(base, chunk, types.grad, True, False),))
    else:
        store_sums(slots, (scale * read(base, chunk, types.grad, False, False),))
