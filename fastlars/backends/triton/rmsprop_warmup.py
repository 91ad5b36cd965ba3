"""RMSprop warm-up over one chunk a program, and its rule: csrc/core/rules.h, line by line."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars.backends.triton.memory import (
    COUNTER,
    GRAD,
    STATE,
    STATE2,
    WEIGHT,
    Chunk,
    address,
    locate,
    read,
    scalars,
    write,
    write_weight,
)
from fastlars.backends.triton.rules import Now, coefficient, double, power


class RmspropWarmupRule(NamedTuple):
    """float64 numbers, as the host's rule of the same name."""

    momentum: tl.tensor
    weight_decay: tl.tensor
    square_decay: tl.tensor
    eps: tl.tensor
    lr_rmsprop: tl.tensor
    center: tl.tensor
    rise: tl.tensor
    below: tl.tensor
    shrink: tl.tensor


class RmspropWarmupCoefficients(NamedTuple):
    """float32, one each per tensor."""

    gradient_scale: tl.tensor
    weight_decay: tl.tensor
    momentum: tl.tensor
    square_decay: tl.tensor
    square_weight: tl.tensor
    eps: tl.tensor
    sgd: tl.tensor  # the share of SGD
    rmsprop: tl.tensor  # (1 - that share) lr_rmsprop / lr
    lr: tl.tensor
    warming: tl.tensor  # false: the share is 1 for good, and squares are neither read nor written


@triton.jit
def sgd_share(rule: RmspropWarmupRule, steps: tl.tensor) -> tl.tensor:
    """The share of SGD after ``steps`` steps."""
    left = tl.maximum(rule.center - steps, double(0.0))
    share = tl.minimum(0.5 + (steps - rule.center) / rule.rise, double(1.0))
    return tl.where(steps < rule.center, rule.below * power(rule.shrink, left), share)


@triton.jit
def rmsprop_warmup_coefficients(
    rule: RmspropWarmupRule, now: Now, step: tl.tensor
) -> RmspropWarmupCoefficients:
    """``step`` counts from 1."""
    share = sgd_share(rule, step.to(tl.float64) - 1.0)
    positive = now.lr > 0.0
    rmsprop = (1.0 - share) * rule.lr_rmsprop / tl.where(positive, now.lr, double(1.0))
    return RmspropWarmupCoefficients(
        now.gradient_scale.to(tl.float32),
        rule.weight_decay.to(tl.float32),
        rule.momentum.to(tl.float32),
        rule.square_decay.to(tl.float32),
        (1.0 - rule.square_decay).to(tl.float32),
        rule.eps.to(tl.float32),
        share.to(tl.float32),
        tl.where(positive, coefficient(rmsprop), 0.0),
        coefficient(now.lr),
        share < 1.0,
    )


@triton.jit
def rmsprop_warmup_update(
    c: RmspropWarmupCoefficients, d: tl.tensor, buffer: tl.tensor, square: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The advanced buffer and mean of squares, of the decayed gradient."""
    square = c.square_decay * square + c.square_weight * (d * d)
    direction = c.sgd * d + c.rmsprop * tl.div_rn(d, tl.sqrt_rn(square) + c.eps)
    return c.momentum * buffer + direction, square


@triton.jit
def _apply(
    table: tl.tensor,
    chunk: Chunk,
    c: RmspropWarmupCoefficients,
    seed: tl.tensor,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    COPIES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    base = address(table, chunk.tensor, STATE)
    w = read(address(table, chunk.tensor, WEIGHT), chunk, WEIGHTS, BLOCK, W)
    g = read(address(table, chunk.tensor, GRAD), chunk, GRADS, BLOCK, W)
    buffer = read(base, chunk, STATES, BLOCK, W)
    d = c.gradient_scale * g + c.weight_decay * w
    if c.warming:
        squares = address(table, chunk.tensor, STATE2)
        square = read(squares, chunk, STATES, BLOCK, W)
        buffer, square = rmsprop_warmup_update(c, d, buffer, square)
        write(squares, chunk, square, STATES, BLOCK, W)
    else:
        buffer = c.momentum * buffer + d
    write(base, chunk, buffer, STATES, BLOCK, W)
    write_weight(table, chunk, w - c.lr * buffer, seed, WEIGHTS, COPIES, STOCHASTIC, BLOCK, W)


@triton.jit(do_not_specialize=["seed"])
def apply(
    table: tl.tensor,
    numel: tl.tensor,
    chunks: tl.tensor,
    ratios: tl.tensor,
    numbers: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    seed: tl.int64,
    momentum: tl.float64,
    weight_decay: tl.float64,
    square_decay: tl.float64,
    eps: tl.float64,
    lr_rmsprop: tl.float64,
    center_steps: tl.float64,
    rise: tl.float64,
    below: tl.float64,
    shrink: tl.float64,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    COPIES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Weights and states of one chunk."""
    now = scalars(numbers, lr, gradient_scale)
    chunk = locate(table, numel, chunks, now, BLOCK)
    rule = RmspropWarmupRule(
        double(momentum), double(weight_decay), double(square_decay), double(eps),
        double(lr_rmsprop), double(center_steps), double(rise), double(below), double(shrink),
    )  # fmt: skip
    step = tl.load(address(table, chunk.tensor, COUNTER).to(tl.pointer_type(tl.float32))) + 1.0
    c = rmsprop_warmup_coefficients(rule, now, step)
    if chunk.begin == 0:
        tl.store(ratios + chunk.tensor, 1.0)
    if chunk.whole:
        _apply(table, chunk, c, seed, WEIGHTS, GRADS, STATES, COPIES, STOCHASTIC, BLOCK, True)
    else:
        _apply(table, chunk, c, seed, WEIGHTS, GRADS, STATES, COPIES, STOCHASTIC, BLOCK, False)
