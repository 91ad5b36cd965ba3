"""LAMB over one chunk a program."""

from __future__ import annotations

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
    stored,
    write,
    write_weight,
)
from fastlars.backends.triton.rules import (
    LambCoefficients,
    LambRule,
    double,
    lamb_coefficients,
    lamb_direction,
    lamb_moments,
    lamb_trust_ratio,
    lamb_update,
)
from fastlars.backends.triton.sums import put_sums


@triton.jit
def _advance(
    table: tl.tensor,
    chunk: Chunk,
    c: LambCoefficients,
    w: tl.tensor,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> tl.tensor:
    """The direction, from the moments as they are stored, because that is what apply reads."""
    base1 = address(table, chunk.tensor, STATE)
    base2 = address(table, chunk.tensor, STATE2)
    g = read(address(table, chunk.tensor, GRAD), chunk, GRADS, BLOCK, W)
    m = read(base1, chunk, STATES, BLOCK, W)
    v = read(base2, chunk, STATES, BLOCK, W)
    m, v = lamb_moments(c, w, g, m, v)
    write(base1, chunk, m, STATES, BLOCK, W)
    write(base2, chunk, v, STATES, BLOCK, W)
    return lamb_direction(c, w, stored(m, STATES), stored(v, STATES))


@triton.jit
def _measure(
    table: tl.tensor,
    chunk: Chunk,
    slots: tl.tensor,
    c: LambCoefficients,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    w = read(address(table, chunk.tensor, WEIGHT), chunk, WEIGHTS, BLOCK, W)
    u = _advance(table, chunk, c, w, GRADS, STATES, BLOCK, W)
    if not W:
        # Zeros lie behind the end, and their direction of 0 / (0 + eps) is NaN for an eps of 0.
        u = tl.where(tl.arange(0, BLOCK) < chunk.size, u, 0.0)
    put_sums(slots, w, u)


@triton.jit
def _apply(
    table: tl.tensor,
    chunk: Chunk,
    c: LambCoefficients,
    seed: tl.tensor,
    MEASURED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    COPIES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    w = read(address(table, chunk.tensor, WEIGHT), chunk, WEIGHTS, BLOCK, W)
    if MEASURED:
        m = read(address(table, chunk.tensor, STATE), chunk, STATES, BLOCK, W)
        v = read(address(table, chunk.tensor, STATE2), chunk, STATES, BLOCK, W)
        u = lamb_direction(c, w, m, v)
    else:
        u = _advance(table, chunk, c, w, GRADS, STATES, BLOCK, W)
    write_weight(table, chunk, lamb_update(c, w, u), seed, WEIGHTS, COPIES, STOCHASTIC, BLOCK, W)


@triton.jit
def measure(
    table: tl.tensor,
    numel: tl.tensor,
    chunks: tl.tensor,
    slots: tl.tensor,
    numbers: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    ratio_eps: tl.float64,
    DECAY: tl.constexpr,
    CORRECTION: tl.constexpr,
    AVERAGING: tl.constexpr,
    TRUST_CLIP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Advances the moments; a slot per chunk: the sums of squares of w and of u."""
    now = scalars(numbers, lr, gradient_scale)
    chunk = locate(table, numel, chunks, now, BLOCK)
    rule = LambRule(
        double(beta1), double(beta2), double(eps), double(weight_decay), double(lower),
        double(upper), double(ratio_eps), DECAY, CORRECTION, AVERAGING, TRUST_CLIP,
    )  # fmt: skip
    step = tl.load(address(table, chunk.tensor, COUNTER).to(tl.pointer_type(tl.float32))) + 1.0
    c = lamb_coefficients(rule, now, step, double(1.0))
    if chunk.whole:
        _measure(table, chunk, slots, c, WEIGHTS, GRADS, STATES, BLOCK, True)
    else:
        _measure(table, chunk, slots, c, WEIGHTS, GRADS, STATES, BLOCK, False)


@triton.jit(do_not_specialize=["seed"])
def apply(
    table: tl.tensor,
    numel: tl.tensor,
    chunks: tl.tensor,
    sums: tl.tensor,
    ratios: tl.tensor,
    numbers: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    seed: tl.int64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    ratio_eps: tl.float64,
    DECAY: tl.constexpr,
    CORRECTION: tl.constexpr,
    AVERAGING: tl.constexpr,
    TRUST_CLIP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    COPIES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Weights of one chunk; without sums its moments too. First chunks report the ratios."""
    now = scalars(numbers, lr, gradient_scale)
    chunk = locate(table, numel, chunks, now, BLOCK)
    rule = LambRule(
        double(beta1), double(beta2), double(eps), double(weight_decay), double(lower),
        double(upper), double(ratio_eps), DECAY, CORRECTION, AVERAGING, TRUST_CLIP,
    )  # fmt: skip
    MEASURED: tl.constexpr = sums is not None
    trust = double(1.0)
    step = tl.load(address(table, chunk.tensor, COUNTER).to(tl.pointer_type(tl.float32)))
    if MEASURED:
        pair = sums + 2 * chunk.tensor.to(tl.int64)
        trust = lamb_trust_ratio(rule, now, tl.load(pair), tl.load(pair + 1))
    else:
        step += 1.0
    c = lamb_coefficients(rule, now, step, trust)
    if chunk.begin == 0:
        tl.store(ratios + chunk.tensor, trust.to(tl.float32))
    if chunk.whole:
        _apply(
            table, chunk, c, seed, MEASURED, WEIGHTS, GRADS, STATES, COPIES,
            STOCHASTIC, BLOCK, True,
        )  # fmt: skip
    else:
        _apply(
            table, chunk, c, seed, MEASURED, WEIGHTS, GRADS, STATES, COPIES,
            STOCHASTIC, BLOCK, False,
        )  # fmt: skip
