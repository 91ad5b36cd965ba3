"""LANS: csrc/rules/lans.h line by line, and its kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars import rules
from fastlars.backends.triton.common import (
    INFINITY,
    StepScalars,
    bounded,
    coefficient,
    decoded,
    double,
    guarded_ratio,
    power,
    step_scalars,
)
from fastlars.backends.triton.memory import (
    BLOCK,
    Chunk,
    Types,
    locate,
    read,
    stored,
    write,
    write_weight,
)
from fastlars.backends.triton.sums import store_sums, sums_of
from fastlars.backends.triton.tensor import (
    load_coefficients,
    load_counter,
    store_coefficients,
    store_counter,
    store_report,
)


class LansCoefficients(NamedTuple):
    """float32 coefficients of one tensor."""

    gradient_scale: tl.tensor  # divided by the gradient's norm, where gradients are normalized
    gradient_decay: tl.tensor
    beta1: tl.tensor
    gradient_weight: tl.tensor
    beta2: tl.tensor
    square_weight: tl.tensor
    correction1: tl.tensor
    correction2: tl.tensor
    eps: tl.tensor
    update_decay: tl.tensor
    momentum_rate: tl.tensor  # lr beta1 q_r
    gradient_rate: tl.tensor  # lr (1 - beta1) q_c


FIELDS = tl.constexpr(len(LansCoefficients._fields))


@triton.jit
def normalizing_scale(rule: rules.LansRule, scalars: StepScalars, square: tl.tensor) -> tl.tensor:
    """The float32 factor that scales a gradient and divides it by its norm; ``square`` is the sum
    of squares of the scaled gradient. A gradient of zeros stays as it is."""
    scale = scalars.gradient_scale
    zero = square == 0.0
    norm = tl.sqrt(tl.where(zero, double(1.0), square)) + decoded(rule.norm_eps)
    # `coefficient` clamps above alone, and `maximize` makes the scale negative.
    factor = coefficient(tl.abs(scale) / norm)
    factor = tl.where(scale < 0.0, -factor, factor)
    return tl.where(zero, scale.to(tl.float32), factor)


@triton.jit
def trust_ratios(
    rule: rules.LansRule, weight: tl.tensor, momentum: tl.tensor, gradient: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """phi(|w|) / |r| and phi(|w|) / |c|, phi(z) = min(max(z, lower), upper)."""
    phi = bounded(tl.sqrt(weight), decoded(rule.lower), decoded(rule.upper))
    floor, ceiling = double(0.0), double(INFINITY)
    of_momentum = guarded_ratio(weight, momentum, phi, tl.sqrt(momentum), floor, ceiling)
    of_gradient = guarded_ratio(weight, gradient, phi, tl.sqrt(gradient), floor, ceiling)
    return of_momentum, of_gradient


@triton.jit
def coefficients(
    rule: rules.LansRule,
    scalars: StepScalars,
    gradient_scale: tl.tensor,
    step: tl.tensor,
    momentum_ratio: tl.tensor,
    gradient_ratio: tl.tensor,
) -> LansCoefficients:
    """``step`` counts from 1."""
    beta1, beta2 = decoded(rule.beta1), decoded(rule.beta2)
    weight_decay = decoded(rule.weight_decay)
    correction1 = double(1.0)
    correction2 = double(1.0)
    if rule.bias_correction:
        correction1 = 1.0 / (1.0 - power(beta1, step))
        correction2 = 1.0 / (1.0 - power(beta2, step))
    gradient_decay = double(0.0)
    update_decay = double(0.0)
    if rule.decay == "gradient":
        gradient_decay = weight_decay
    else:
        update_decay = weight_decay
    gradient_weight = double(1.0)
    if rule.grad_averaging:
        gradient_weight = 1.0 - beta1
    return LansCoefficients(
        gradient_scale=gradient_scale,
        gradient_decay=gradient_decay.to(tl.float32),
        beta1=beta1.to(tl.float32),
        gradient_weight=gradient_weight.to(tl.float32),
        beta2=beta2.to(tl.float32),
        square_weight=(1.0 - beta2).to(tl.float32),
        correction1=correction1.to(tl.float32),
        correction2=correction2.to(tl.float32),
        eps=decoded(rule.eps).to(tl.float32),
        update_decay=update_decay.to(tl.float32),
        momentum_rate=coefficient(scalars.lr * beta1 * momentum_ratio),
        gradient_rate=coefficient(scalars.lr * gradient_weight * gradient_ratio),
    )


@triton.jit
def scaled(c: LansCoefficients, w: tl.tensor, g: tl.tensor) -> tl.tensor:
    """The normalized gradient, with the decay that enters before the moments."""
    # Without decay, not even 0 * w is added: for an infinite weight it would be NaN.
    x = c.gradient_scale * g
    return tl.where(c.gradient_decay != 0.0, x + c.gradient_decay * w, x)


@triton.jit
def moments(
    c: LansCoefficients, g: tl.tensor, m: tl.tensor, v: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The advanced moments; g is what ``scaled`` returns."""
    m = c.beta1 * m + c.gradient_weight * g
    v = c.beta2 * v + c.square_weight * (g * g)
    return m, v


@triton.jit
def directions(
    c: LansCoefficients, w: tl.tensor, g: tl.tensor, m: tl.tensor, v: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """r and c: each trust ratio divides by the norm of one."""
    d = tl.sqrt_rn(c.correction2 * v) + c.eps
    of_momentum = tl.div_rn(c.correction1 * m, d)
    of_gradient = tl.div_rn(g, d)
    decay = c.update_decay * w
    of_momentum = tl.where(c.update_decay != 0.0, of_momentum + decay, of_momentum)
    of_gradient = tl.where(c.update_decay != 0.0, of_gradient + decay, of_gradient)
    return of_momentum, of_gradient


@triton.jit
def updated(
    c: LansCoefficients, w: tl.tensor, of_momentum: tl.tensor, of_gradient: tl.tensor
) -> tl.tensor:
    return w - (c.momentum_rate * of_momentum + c.gradient_rate * of_gradient)


@triton.jit
def _advance_moments(
    chunk: Chunk,
    c: LansCoefficients,
    w: tl.tensor,
    types: Types,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Advance and store the moments; LAST: nothing reads them again in this step. Returns r and c,
    computed from the moments as they were rounded when stored: ``apply`` reads these."""
    base1 = chunk.states[0]
    base2 = chunk.states[1]
    g = scaled(c, w, read(chunk.grad, chunk, types.grad, WHOLE, LAST))
    m = read(base1, chunk, types.state, WHOLE, LAST)
    v = read(base2, chunk, types.state, WHOLE, LAST)
    m, v = moments(c, g, m, v)
    write(base1, chunk, m, types.state, WHOLE, LAST)
    write(base2, chunk, v, types.state, WHOLE, LAST)
    return directions(c, w, g, stored(m, types.state), stored(v, types.state))


@triton.jit
def _measure(
    chunk: Chunk, slots: tl.tensor, c: LansCoefficients, types: Types, WHOLE: tl.constexpr
) -> None:
    w = read(chunk.weight, chunk, types.weight, WHOLE, False)
    of_momentum, of_gradient = _advance_moments(chunk, c, w, types, WHOLE, False)
    if not WHOLE:
        # After the end of the tensor all values are 0, and the directions 0 / (0 + eps) are NaN for
        # eps = 0.
        inside = tl.arange(0, BLOCK) < chunk.size
        of_momentum = tl.where(inside, of_momentum, 0.0)
        of_gradient = tl.where(inside, of_gradient, 0.0)
    store_sums(slots, (w, of_momentum, of_gradient))


@triton.jit
def _apply(
    chunk: Chunk,
    seed: tl.tensor,
    rule: rules.LansRule,
    c: LansCoefficients,
    types: Types,
    WHOLE: tl.constexpr,
) -> None:
    w = read(chunk.weight, chunk, types.weight, WHOLE, True)
    if rule.adapt:
        g = scaled(c, w, read(chunk.grad, chunk, types.grad, WHOLE, True))
        m = read(chunk.states[0], chunk, types.state, WHOLE, True)
        v = read(chunk.states[1], chunk, types.state, WHOLE, True)
        of_momentum, of_gradient = directions(c, w, g, m, v)
    else:
        of_momentum, of_gradient = _advance_moments(chunk, c, w, types, WHOLE, True)
    write_weight(chunk, updated(c, w, of_momentum, of_gradient), seed, types, WHOLE)


@triton.jit
def measure(
    table: tl.tensor,
    sizes: tl.tensor,
    chunks: tl.tensor,
    coefficient_table: tl.tensor,
    slots: tl.tensor,
    rule: rules.LansRule,
    types: Types,
) -> None:
    """For each chunk: advance the moments, and store the sums of squares of w, r and c."""
    chunk = locate(table, sizes, chunks, None, False)
    c = LansCoefficients(*load_coefficients(coefficient_table, chunk, FIELDS))
    if chunk.whole:
        _measure(chunk, slots, c, types, True)
    else:
        _measure(chunk, slots, c, types, False)


@triton.jit(do_not_specialize_on_alignment=["sums", "gradient_sums"])
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
    rule: rules.LansRule,
    LANES: tl.constexpr,
) -> None:
    """For each tensor: store its coefficients, and what the step reports of it. The first one of a
    step, which has no sums of w, r and c yet, counts the step and reports nothing."""
    scalars = step_scalars(device_scalars, lr, gradient_scale)
    tensor = tl.program_id(0).to(tl.int64)
    momentum_ratio = double(1.0)
    gradient_ratio = double(1.0)
    squares = (double(float("nan")), double(float("nan")), double(float("nan")))
    step = load_counter(table, tensor)
    if slots is None and sums is None:
        step += 1.0
        store_counter(table, tensor, scalars, step)
    else:
        squares = sums_of(tensor, first_chunk, slots, sums, 3, LANES)
        momentum_ratio, gradient_ratio = trust_ratios(rule, squares[0], squares[1], squares[2])
    if report is not None:
        store_report(report, tensor, momentum_ratio, squares)
    scale = scalars.gradient_scale.to(tl.float32)
    if rule.normalize_grad:
        square = sums_of(tensor, first_chunk, gradient_slots, gradient_sums, 1, LANES)
        scale = normalizing_scale(rule, scalars, square[0])
    c = coefficients(rule, scalars, scale, step, momentum_ratio, gradient_ratio)
    store_coefficients(tensor, numel, sizes, coefficient_table, scalars, c)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["streams"])
def apply(
    table: tl.tensor,
    sizes: tl.tensor,
    chunks: tl.tensor,
    coefficient_table: tl.tensor,
    seed: tl.int64,
    streams: tl.tensor,
    rule: rules.LansRule,
    types: Types,
) -> None:
    """For each chunk: write weights; and the moments, if the rule does not adapt."""
    chunk = locate(table, sizes, chunks, None, rule.adapt, streams)
    c = LansCoefficients(*load_coefficients(coefficient_table, chunk, FIELDS))
    if chunk.whole:
        _apply(chunk, seed, rule, c, types, True)
    else:
        _apply(chunk, seed, rule, c, types, False)
