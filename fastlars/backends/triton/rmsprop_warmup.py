"""RMSprop warm-up: csrc/rules/rmsprop_warmup.h line by line, and its kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars import rules
from fastlars.backends.triton.common import (
    StepScalars,
    coefficient,
    decoded,
    double,
    power,
    step_scalars,
)
from fastlars.backends.triton.memory import (
    Chunk,
    Types,
    locate,
    read,
    write,
    write_weight,
)
from fastlars.backends.triton.tensor import (
    load_coefficients,
    load_counter,
    store_coefficients,
    store_counter,
    store_report,
)

# With 8 warps, four arrays and a division take 164 registers a thread; with 16 warps they take 103.
OPTIONS = {"num_warps": 16}


class RmspropWarmupCoefficients(NamedTuple):
    """float32 coefficients of one tensor."""

    gradient_scale: tl.tensor
    weight_decay: tl.tensor
    momentum: tl.tensor
    square_decay: tl.tensor
    square_weight: tl.tensor
    eps: tl.tensor
    sgd: tl.tensor  # the share of SGD
    rmsprop: tl.tensor  # (1 - that share) lr_rmsprop / lr
    lr: tl.tensor
    warming: tl.tensor  # 0: the share stays 1, so squares are neither read nor written


FIELDS = tl.constexpr(len(RmspropWarmupCoefficients._fields))


@triton.jit
def sgd_share(rule: rules.RmspropWarmupRule, steps: tl.tensor) -> tl.tensor:
    """The share of SGD after ``steps`` steps."""
    center_steps = decoded(rule.center_steps)
    left = tl.maximum(center_steps - steps, double(0.0))
    share = tl.minimum(0.5 + (steps - center_steps) / decoded(rule.rise), double(1.0))
    # `below` and `shrink` are computed for `constants`; they are no fields that mypy knows.
    before = decoded(rule.below) * power(decoded(rule.shrink), left)  # type: ignore[attr-defined]
    return tl.where(steps < center_steps, before, share)


@triton.jit
def coefficients(
    rule: rules.RmspropWarmupRule, scalars: StepScalars, step: tl.tensor
) -> RmspropWarmupCoefficients:
    """``step`` counts from 1."""
    share = sgd_share(rule, step.to(tl.float64) - 1.0)
    positive = scalars.lr > 0.0
    lr = tl.where(positive, scalars.lr, double(1.0))
    rmsprop = (1.0 - share) * decoded(rule.lr_rmsprop) / lr
    square_decay = decoded(rule.square_decay)
    return RmspropWarmupCoefficients(
        gradient_scale=scalars.gradient_scale.to(tl.float32),
        weight_decay=decoded(rule.weight_decay).to(tl.float32),
        momentum=decoded(rule.momentum).to(tl.float32),
        square_decay=square_decay.to(tl.float32),
        square_weight=(1.0 - square_decay).to(tl.float32),
        eps=decoded(rule.eps).to(tl.float32),
        sgd=share.to(tl.float32),
        rmsprop=tl.where(positive, coefficient(rmsprop), 0.0),
        lr=coefficient(scalars.lr),
        warming=tl.where(share < 1.0, 1.0, 0.0),
    )


@triton.jit
def update(
    c: RmspropWarmupCoefficients, d: tl.tensor, buffer: tl.tensor, square: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The advanced buffer and mean of squares; d is the gradient with weight decay."""
    square = c.square_decay * square + c.square_weight * (d * d)
    direction = c.sgd * d + c.rmsprop * tl.div_rn(d, tl.sqrt_rn(square) + c.eps)
    return c.momentum * buffer + direction, square


@triton.jit
def _apply(
    chunk: Chunk,
    seed: tl.tensor,
    c: RmspropWarmupCoefficients,
    types: Types,
    WHOLE: tl.constexpr,
) -> None:
    buffers = chunk.states[0]
    w = read(chunk.weight, chunk, types.weight, WHOLE, False)
    g = read(chunk.grad, chunk, types.grad, WHOLE, True)
    buffer = read(buffers, chunk, types.state, WHOLE, True)
    d = c.gradient_scale * g + c.weight_decay * w
    if c.warming != 0.0:
        squares = chunk.states[1]
        square = read(squares, chunk, types.state, WHOLE, True)
        buffer, square = update(c, d, buffer, square)
        write(squares, chunk, square, types.state, WHOLE, True)
    else:
        buffer = c.momentum * buffer + d
    write(buffers, chunk, buffer, types.state, WHOLE, True)
    write_weight(chunk, w - c.lr * buffer, seed, types, WHOLE)


@triton.jit(do_not_specialize_on_alignment=["sums"])
def prepare(
    table: tl.tensor,
    numel: tl.tensor,
    first_chunk: tl.tensor,
    gradient_slots: tl.tensor,
    gradient_sums: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    report: tl.tensor,
    sizes: tl.tensor,
    coefficient_table: tl.tensor,
    device_scalars: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    rule: rules.RmspropWarmupRule,
    LANES: tl.constexpr,
) -> None:
    """For each tensor: store its coefficients, and count the step. The rule measures no sums; every
    ratio is 1."""
    scalars = step_scalars(device_scalars, lr, gradient_scale)
    tensor = tl.program_id(0).to(tl.int64)
    store_report(report, tensor, double(1.0), ())
    step = load_counter(table, tensor) + 1.0
    c = coefficients(rule, scalars, step)
    store_coefficients(tensor, numel, sizes, coefficient_table, scalars, c)
    store_counter(table, tensor, scalars, step)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["streams"])
def apply(
    table: tl.tensor,
    sizes: tl.tensor,
    chunks: tl.tensor,
    coefficient_table: tl.tensor,
    seed: tl.int64,
    streams: tl.tensor,
    rule: rules.RmspropWarmupRule,
    types: Types,
) -> None:
    """For each chunk: write weights and states."""
    chunk = locate(table, sizes, chunks, None, False, streams)
    c = RmspropWarmupCoefficients(*load_coefficients(coefficient_table, chunk, FIELDS))
    if chunk.whole:
        _apply(chunk, seed, c, types, True)
    else:
        _apply(chunk, seed, c, types, False)
