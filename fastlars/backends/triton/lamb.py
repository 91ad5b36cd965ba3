"""LAMB: csrc/rules/lamb.h line by line, and its kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastlars import rules
from fastlars.backends.triton.common import (
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


class LambCoefficients(NamedTuple):
    """float32 coefficients of one tensor."""

    gradient_scale: tl.tensor
    gradient_decay: tl.tensor
    beta1: tl.tensor
    gradient_weight: tl.tensor
    beta2: tl.tensor
    square_weight: tl.tensor
    correction1: tl.tensor  # of m and v in the direction
    correction2: tl.tensor
    ahead1: tl.tensor  # of the gradient and its square there, where the moments look ahead
    ahead2: tl.tensor
    eps: tl.tensor
    update_decay: tl.tensor
    shrink: tl.tensor  # 1 - lr wd where the decay is decoupled, else 1
    rate: tl.tensor  # lr q


FIELDS = tl.constexpr(len(LambCoefficients._fields))


@triton.jit
def shrink_of(rule: rules.LambRule, scalars: StepScalars) -> tl.tensor:
    shrink = double(1.0)
    if rule.decay == "decoupled":
        shrink = 1.0 - scalars.lr * decoded(rule.weight_decay)
    return shrink


@triton.jit
def trust_ratio(
    rule: rules.LambRule, scalars: StepScalars, weight: tl.tensor, update: tl.tensor
) -> tl.tensor:
    """phi(|w|) / (|u| + ratio_eps), phi(z) = min(max(z, lower), upper)."""
    shrink = shrink_of(rule, scalars)
    weight = weight * shrink * shrink
    phi = bounded(tl.sqrt(weight), decoded(rule.lower), decoded(rule.upper))
    floor, ceiling = decoded(rule.ratio_floor), decoded(rule.ratio_ceiling)
    denominator = tl.sqrt(update) + decoded(rule.ratio_eps)
    q = guarded_ratio(weight, update, phi, denominator, floor, ceiling)
    if rule.trust_clip:
        q = tl.where(q > 1.0, double(1.0), q)
    return q


@triton.jit
def factors(
    beta: tl.tensor, power: tl.tensor, weight: tl.tensor, LOOKS_AHEAD: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The direction's factors of a moment, and of the gradient (or its square) that enters the
    moment with ``weight``. ``power`` is beta^t, or 0 without bias correction."""
    of_moment = 1.0 / (1.0 - power)
    of_gradient = double(0.0)
    if LOOKS_AHEAD:
        of_moment = beta / (1.0 - beta * power)
        of_gradient = weight / (1.0 - power)
    return of_moment, of_gradient


@triton.jit
def coefficients(
    rule: rules.LambRule, scalars: StepScalars, step: tl.tensor, ratio: tl.tensor
) -> LambCoefficients:
    """``step`` counts from 1."""
    beta1, beta2 = decoded(rule.beta1), decoded(rule.beta2)
    weight_decay = decoded(rule.weight_decay)
    lr = scalars.lr
    power1 = double(0.0)
    power2 = double(0.0)
    if rule.bias_correction == "moments":
        power1 = power(beta1, step)
        power2 = power(beta2, step)
    elif rule.bias_correction == "rate":
        lr = lr / (1.0 - power(beta1, step))
    gradient_decay = double(0.0)
    update_decay = double(0.0)
    if rule.decay == "gradient":
        gradient_decay = weight_decay
    elif rule.decay == "update":
        update_decay = weight_decay
    gradient_weight = double(1.0)
    if rule.grad_averaging:
        gradient_weight = 1.0 - beta1
    correction1, ahead1 = factors(beta1, power1, gradient_weight, rule.nesterov != "none")
    correction2, ahead2 = factors(beta2, power2, 1.0 - beta2, rule.nesterov == "both")
    if rule.nesterov == "first":
        correction2 = beta2 / (1.0 - power2)
    return LambCoefficients(
        gradient_scale=scalars.gradient_scale.to(tl.float32),
        gradient_decay=gradient_decay.to(tl.float32),
        beta1=beta1.to(tl.float32),
        gradient_weight=gradient_weight.to(tl.float32),
        beta2=beta2.to(tl.float32),
        square_weight=(1.0 - beta2).to(tl.float32),
        correction1=correction1.to(tl.float32),
        correction2=correction2.to(tl.float32),
        ahead1=ahead1.to(tl.float32),
        ahead2=ahead2.to(tl.float32),
        eps=decoded(rule.eps).to(tl.float32),
        update_decay=update_decay.to(tl.float32),
        shrink=shrink_of(rule, scalars).to(tl.float32),
        rate=coefficient(lr * ratio),
    )


@triton.jit
def gradient(c: LambCoefficients, w: tl.tensor, g: tl.tensor) -> tl.tensor:
    """The gradient that enters the moments."""
    # Without decay, not even 0 * w is added: for an infinite weight it would be NaN.
    scaled = c.gradient_scale * g
    return tl.where(c.gradient_decay != 0.0, scaled + c.gradient_decay * w, scaled)


@triton.jit
def moments(
    c: LambCoefficients, w: tl.tensor, g: tl.tensor, m: tl.tensor, v: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    d = gradient(c, w, g)
    m = c.beta1 * m + c.gradient_weight * d
    v = c.beta2 * v + c.square_weight * (d * d)
    return m, v


@triton.jit
def direction(
    rule: rules.LambRule,
    c: LambCoefficients,
    w: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
) -> tl.tensor:
    """u: the trust ratio divides by its norm. ``g`` is read where moments look ahead."""
    first = c.correction1 * m
    second = c.correction2 * v
    if rule.nesterov != "none":
        d = gradient(c, w, g)
        first = first + c.ahead1 * d
        if rule.nesterov == "both":
            second = second + c.ahead2 * (d * d)
    r = tl.div_rn(first, tl.sqrt_rn(second) + c.eps)
    return tl.where(c.update_decay != 0.0, r + c.update_decay * w, r)


@triton.jit
def updated(c: LambCoefficients, w: tl.tensor, u: tl.tensor) -> tl.tensor:
    return c.shrink * w - c.rate * u


@triton.jit
def _advance_moments(
    chunk: Chunk,
    rule: rules.LambRule,
    c: LambCoefficients,
    w: tl.tensor,
    types: Types,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
) -> tl.tensor:
    """Advance and store the moments; LAST: nothing reads them again in this step. Return the
    direction, computed from the moments as they were rounded when stored: ``apply`` reads these."""
    base1 = chunk.states[0]
    base2 = chunk.states[1]
    g = read(chunk.grad, chunk, types.grad, WHOLE, LAST or rule.nesterov == "none")
    m = read(base1, chunk, types.state, WHOLE, LAST)
    v = read(base2, chunk, types.state, WHOLE, LAST)
    m, v = moments(c, w, g, m, v)
    write(base1, chunk, m, types.state, WHOLE, LAST)
    write(base2, chunk, v, types.state, WHOLE, LAST)
    return direction(rule, c, w, g, stored(m, types.state), stored(v, types.state))


@triton.jit
def _measure(
    chunk: Chunk,
    slots: tl.tensor,
    rule: rules.LambRule,
    c: LambCoefficients,
    types: Types,
    WHOLE: tl.constexpr,
) -> None:
    w = read(chunk.weight, chunk, types.weight, WHOLE, False)
    u = _advance_moments(chunk, rule, c, w, types, WHOLE, False)
    if not WHOLE:
        # After the end of the tensor all values are 0, and the direction 0 / (0 + eps) is NaN for
        # eps = 0.
        u = tl.where(tl.arange(0, BLOCK) < chunk.size, u, 0.0)
    store_sums(slots, (w, u))


@triton.jit
def _apply(
    chunk: Chunk,
    seed: tl.tensor,
    rule: rules.LambRule,
    c: LambCoefficients,
    types: Types,
    WHOLE: tl.constexpr,
) -> None:
    w = read(chunk.weight, chunk, types.weight, WHOLE, rule.adapt)
    if rule.adapt:
        m = read(chunk.states[0], chunk, types.state, WHOLE, True)
        v = read(chunk.states[1], chunk, types.state, WHOLE, True)
        g = w
        if rule.nesterov != "none":
            g = read(chunk.grad, chunk, types.grad, WHOLE, True)
        u = direction(rule, c, w, g, m, v)
    else:
        u = _advance_moments(chunk, rule, c, w, types, WHOLE, True)
    write_weight(chunk, updated(c, w, u), seed, types, WHOLE)


@triton.jit
def measure(
    table: tl.tensor,
    sizes: tl.tensor,
    chunks: tl.tensor,
    coefficient_table: tl.tensor,
    slots: tl.tensor,
    rule: rules.LambRule,
    types: Types,
) -> None:
    """For each chunk: advance the moments, and store the sums of squares of w and of u."""
    chunk = locate(table, sizes, chunks, None, False)
    c = LambCoefficients(*load_coefficients(coefficient_table, chunk, FIELDS))
    if chunk.whole:
        _measure(chunk, slots, rule, c, types, True)
    else:
        _measure(chunk, slots, rule, c, types, False)


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
    rule: rules.LambRule,
    LANES: tl.constexpr,
) -> None:
    """For each tensor: store its coefficients, and what the step reports of it. The first launch of
    a step, which has no sums yet, counts the step and reports nothing."""
    scalars = step_scalars(device_scalars, lr, gradient_scale)
    tensor = tl.program_id(0).to(tl.int64)
    ratio = double(1.0)
    squares = (double(float("nan")), double(float("nan")))
    step = load_counter(table, tensor)
    if slots is None and sums is None:
        step += 1.0
        store_counter(table, tensor, scalars, step)
    else:
        squares = sums_of(tensor, first_chunk, slots, sums, 2, LANES)
        ratio = trust_ratio(rule, scalars, squares[0], squares[1])
    if report is not None:
        store_report(report, tensor, ratio, squares)
    c = coefficients(rule, scalars, step, ratio)
    store_coefficients(tensor, numel, sizes, coefficient_table, scalars, c)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["streams"])
def apply(
    table: tl.tensor,
    sizes: tl.tensor,
    chunks: tl.tensor,
    coefficient_table: tl.tensor,
    seed: tl.int64,
    streams: tl.tensor,
    rule: rules.LambRule,
    types: Types,
) -> None:
    """For each chunk: write weights; and the moments, if the rule does not adapt."""
    chunk = locate(table, sizes, chunks, None, rule.adapt, streams)
    c = LambCoefficients(*load_coefficients(coefficient_table, chunk, FIELDS))
    if chunk.whole:
        _apply(chunk, seed, rule, c, types, True)
    else:
        _apply(chunk, seed, rule, c, types, False)
