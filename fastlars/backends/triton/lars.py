"""LARS over one chunk a program."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlars.backends.triton.memory import (
    COUNTER,
    GRAD,
    STATE,
    WEIGHT,
    Chunk,
    address,
    locate,
    read,
    scalars,
    write,
    write_weight,
)
from fastlars.backends.triton.rules import (
    NEVER_STEPPED,
    LarsCoefficients,
    LarsRule,
    double,
    lars_coefficients,
    lars_measured,
    lars_trust_ratio,
    lars_update,
    lars_update_without_momentum,
    single,
)
from fastlars.backends.triton.sums import put_sums


@triton.jit
def _measure(
    table: tl.tensor,
    chunk: Chunk,
    slots: tl.tensor,
    c: LarsCoefficients,
    COMBINED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    w = read(address(table, chunk.tensor, WEIGHT), chunk, WEIGHTS, BLOCK, W)
    g = read(address(table, chunk.tensor, GRAD), chunk, GRADS, BLOCK, W)
    put_sums(slots, w, lars_measured(c, w, g, COMBINED))


@triton.jit
def _apply(
    table: tl.tensor,
    chunk: Chunk,
    c: LarsCoefficients,
    seed: tl.tensor,
    NESTEROV: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    COPIES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
) -> None:
    w = read(address(table, chunk.tensor, WEIGHT), chunk, WEIGHTS, BLOCK, W)
    g = read(address(table, chunk.tensor, GRAD), chunk, GRADS, BLOCK, W)
    if STATES is None:
        w = lars_update_without_momentum(c, w, g)
    else:
        base = address(table, chunk.tensor, STATE)
        buffer = read(base, chunk, STATES, BLOCK, W)
        w, buffer = lars_update(c, w, g, buffer, NESTEROV)
        write(base, chunk, buffer, STATES, BLOCK, W)
    write_weight(table, chunk, w, seed, WEIGHTS, COPIES, STOCHASTIC, BLOCK, W)


@triton.jit
def measure(
    table: tl.tensor,
    numel: tl.tensor,
    chunks: tl.tensor,
    slots: tl.tensor,
    numbers: tl.tensor,
    lr: tl.float64,
    gradient_scale: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    trust_coefficient: tl.float64,
    eps: tl.float64,
    BUFFER: tl.constexpr,
    COMBINED: tl.constexpr,
    NESTEROV: tl.constexpr,
    CORRECTS: tl.constexpr,
    TRUST_CLIP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A slot per chunk: the sums of squares of w, and of g or g + wd w."""
    now = scalars(numbers, lr, gradient_scale)
    chunk = locate(table, numel, chunks, now, BLOCK)
    rule = LarsRule(
        double(momentum), double(dampening), double(weight_decay), double(trust_coefficient),
        double(eps), BUFFER, COMBINED, NESTEROV, CORRECTS, TRUST_CLIP,
    )  # fmt: skip
    c = lars_coefficients(rule, now, single(NEVER_STEPPED), double(1.0))
    if chunk.whole:
        _measure(table, chunk, slots, c, COMBINED, WEIGHTS, GRADS, BLOCK, True)
    else:
        _measure(table, chunk, slots, c, COMBINED, WEIGHTS, GRADS, BLOCK, False)


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
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    trust_coefficient: tl.float64,
    eps: tl.float64,
    BUFFER: tl.constexpr,
    COMBINED: tl.constexpr,
    NESTEROV: tl.constexpr,
    CORRECTS: tl.constexpr,
    TRUST_CLIP: tl.constexpr,
    COUNTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADS: tl.constexpr,
    STATES: tl.constexpr,
    COPIES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Buffers and weights of one chunk; each tensor's first chunk reports its ratio."""
    now = scalars(numbers, lr, gradient_scale)
    chunk = locate(table, numel, chunks, now, BLOCK)
    rule = LarsRule(
        double(momentum), double(dampening), double(weight_decay), double(trust_coefficient),
        double(eps), BUFFER, COMBINED, NESTEROV, CORRECTS, TRUST_CLIP,
    )  # fmt: skip
    trust = double(1.0)
    if sums is not None:
        pair = sums + 2 * chunk.tensor.to(tl.int64)
        trust = lars_trust_ratio(rule, now, tl.load(pair), tl.load(pair + 1))
    last_lr = single(0.0)
    if COUNTS:
        last_lr = tl.load(address(table, chunk.tensor, COUNTER).to(tl.pointer_type(tl.float32)))
    c = lars_coefficients(rule, now, last_lr, trust)
    if chunk.begin == 0:
        tl.store(ratios + chunk.tensor, trust.to(tl.float32))
    if chunk.whole:
        _apply(
            table, chunk, c, seed, NESTEROV, WEIGHTS, GRADS, STATES, COPIES,
            STOCHASTIC, BLOCK, True,
        )  # fmt: skip
    else:
        _apply(
            table, chunk, c, seed, NESTEROV, WEIGHTS, GRADS, STATES, COPIES,
            STOCHASTIC, BLOCK, False,
        )  # fmt: skip
